"""Writes the files of tiny artifacts and runs as the first cases of tests/fuzz/program.cpp and saved.cpp.

PYTHONPATH=.:tests python tests/fuzz/record_files.py FOLDER
"""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from edge_bcs.exporters import export
from edge_bcs.runtime import Trainer
from helpers.artifacts import tiny_network

from edge_bcs import Attack, Memory
from edge_bcs.method.connectivity import sparsify

_STATE = "state.safetensors"


def main(folder: Path) -> None:
    """Write program/NAME and saved/NAME into ``folder``."""
    for name in ("program", "saved"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for objective, batch_norm, part in (
        ("natural", "frozen", "all"),
        ("at", "batch", "all"),
        ("trades", "frozen", "head"),
        ("mart", "batch", "all"),
    ):
        torch.manual_seed(0)
        sparse = sparsify(tiny_network(), 0.5, seed=0, distribution="uniform")
        with tempfile.TemporaryDirectory() as scratch:
            path, run = Path(scratch) / "artifact", Path(scratch) / "run"
            export(
                sparse,
                path,
                objective=objective,
                input_shape=(1, 8, 8),
                batch_norm=batch_norm,
                memory=Memory(None, micro_batch=2),
                attack=Attack(steps=1),
                train=part,
                validate=False,
            )
            images = np.zeros((4, 1, 8, 8), np.float32)
            with Trainer(path, engine="native") as trainer:
                trainer.fit((images, np.arange(4)), steps=1, progress=False)
                trainer.save(run)
            (folder / "program" / objective).write_bytes((path / "program.bin").read_bytes())
            for kind, saved in (("artifact", path), ("run", run)):
                manifest = (saved / "manifest.json").read_bytes()
                case = struct.pack("<I", len(manifest)) + manifest + (saved / _STATE).read_bytes()
                (folder / "saved" / f"{objective}-{kind}").write_bytes(case)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
