"""What `emulated_board.py` runs on either machine: the rewiring's digests and ORT artifacts' losses, as JSON.

    python on_board.py FOLDER

FOLDER holds rewire.onnx (one RewireStep), dense/ (tests/ort_training/dense) and rewire_digest.py. Needs what
a board has: edge-bcs, onnxruntime and numpy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import edge_bcs.runtime  # noqa: F401 (before onnxruntime, which it keeps from reporting its use)
import numpy as np
import onnxruntime
from edge_bcs.runtime import library
from edge_bcs.runtime.ort.artifact import OrtArtifact

REWIRING = {"connections": 2000, "positions": 40_000, "steps": 25, "seed": 2**33 + 5}


def rewiring(folder: Path) -> list[str]:
    """Digests of the operator's states, run by ONNX Runtime."""
    sys.path.insert(0, str(folder))
    import rewire_digest

    options = onnxruntime.SessionOptions()
    library.register(options)
    session = onnxruntime.InferenceSession(str(folder / "rewire.onnx"), options)
    hyper = np.array(list(rewire_digest.HYPER.values()), np.float32)

    def step(state: Any, gradient: Any, number: int) -> Any:
        value, index, momentum = state
        counter = np.array([REWIRING["seed"], number], np.int64)
        feeds = {"value": value, "index": index, "momentum": momentum, "gradient": gradient}
        return tuple(session.run(None, {**feeds, "hyper": hyper, "counter": counter})[:3])

    return rewire_digest.digests(**REWIRING, step=step)


def dense_losses(folder: Path) -> list[float]:
    """Losses of the six steps that expected.json has of onnxruntime-training 1.19.2."""
    random = np.random.default_rng(0)
    with OrtArtifact(folder, learning_rate=0.02) as training:
        return [
            training.step(random.random((4, 1, 9, 9), np.float32), random.integers(0, 10, 4))["loss"]
            for _ in range(6)
        ]


if __name__ == "__main__":
    work = Path(sys.argv[1])
    losses = {name: dense_losses(work / "dense" / name) for name in ("mobile", "residual")}
    print(json.dumps({"rewiring": rewiring(work), "losses": losses}))
