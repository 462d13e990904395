"""A small network that learns handwritten digits robustly on a microcontroller, inside 512 KiB:

    python digits.py out/digits --board mps2-an500
    make -C out/digits-mps2-an500 run

Exports the network of network.py, new and sparse, and writes the C project with the digits as its data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from edge_bcs.exporters.microcontroller.project import write_project
from edge_bcs.targets import microcontrollers
from network import digits

import edge_bcs
from edge_bcs.data.digits import Digits

SHAPE = (1, 8, 8)


def exported(folder: Path, budget: int | str) -> edge_bcs.runtime.Artifact:
    """Compile the network, of which one connection in ten is there, into an artifact."""
    torch.manual_seed(0)  # biases begin as torch draws them
    sparse = edge_bcs.sparsify(digits(), sparsity="0.9", seed=0)
    return edge_bcs.export(
        sparse,
        folder,
        objective="at",
        input_shape=SHAPE,
        memory=budget,
        batch_size=32,
        attack=edge_bcs.Attack(epsilon=0.1, steps=5),
        hyper=edge_bcs.Hyper(learning_rate=0.1),
        batch_norm="batch",
        validate=False,
    )


def write_data(project: Path, most: int | None = None) -> None:
    """Write the digits as the data of a project: all, or the first ``most`` of each split."""
    parts = ['#include "data.h"\n']
    for split, name in (("train", "training"), ("test", "test")):
        data = Digits(split, SHAPE)
        count = min(len(data), most or len(data))
        images = np.rint(data.images(np.arange(count)) * 255).astype(np.uint8)
        parts.append(f"const uint32_t {name}_count = {count};")
        for kind, numbers in (("images", images), ("labels", data.labels[:count])):
            text = ",".join(str(int(number)) for number in numbers.reshape(-1))
            parts.append(f"const unsigned char {name}_{kind}[] = {{{text}}};")
    (project / "src" / "data.c").write_text("\n".join(parts) + "\n")


def main() -> None:
    """Do what the file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--board", default="stm32h7", help="a microcontroller of `edge-bcs targets`")
    options = parser.parse_args()
    board = microcontrollers.load(options.board)
    artifact = exported(options.artifact, board.default_budget)
    project = write_project(artifact, board, f"{options.artifact}-{board.name}")
    write_data(project)
    print(f"wrote {project}: make -C {project}")


if __name__ == "__main__":
    main()
