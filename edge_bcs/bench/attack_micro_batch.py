"""What an attack takes an image by the images that are held at once, beside the bytes of attack and training.

    python -m edge_bcs.bench.attack_micro_batch

One thread of our own engine at 99 %, with the paper's densities; processor time, the sizes in turn, lower
quartiles. Writes a table of Markdown, which `results/speed/limit.md` has.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import numpy as np

from edge_bcs.bench.step import batch_of, exported
from edge_bcs.core.progress import note

NETWORKS = ("resnet18", "vgg16", "wrn28_4")
SIZES = (1, 2, 4, 8, 16, 32)
ROUNDS = 12


def measure(network: str) -> dict[int, tuple[float, int, int]]:
    """Images at once → seconds an image of an attack pass, peak bytes of training and of the attack."""
    from edge_bcs.runtime import Artifact
    from edge_bcs.runtime.attack import craft
    from edge_bcs.runtime.engines import open_engine
    from edge_bcs.targets.plans import plan_of

    engines: dict[int, Any] = {}
    bytes_of: dict[int, tuple[int, int]] = {}
    with contextlib.ExitStack() as stack:
        for size in SIZES:
            given = (network, 0.99, "paper", 32, size, note, max(SIZES), 1)
            artifact = Artifact.read(stack.enter_context(exported(*given))[0])
            phases = plan_of(artifact.manifest["memory"]).phases
            bytes_of[size] = phases["training"].peak_bytes, phases["attack"].peak_bytes
            engines[size] = engine = open_engine("native", artifact, None, 1)
            stack.callback(engine.close)
            images, labels = batch_of(size, 32)
            engine.load(images, labels, 1 / size)
            craft(engine, 0, size, seed=0, step=0)
        taken: dict[int, list[float]] = {size: [] for size in SIZES}
        for _ in range(ROUNDS):
            for size, engine in engines.items():
                began = time.process_time()
                for _ in range(max(SIZES) // size):
                    engine.run("attack")
                taken[size].append((time.process_time() - began) / max(SIZES))
    return {size: (float(np.quantile(taken[size], 0.25)), *bytes_of[size]) for size in SIZES}


def table(found: dict[str, dict[int, tuple[float, int, int]]]) -> str:
    """Rows of Markdown: for each size each network's milliseconds, and MiB of training and attack."""
    lines = ["| images at once | " + " | ".join(f"{name}, ms | MiB" for name in found) + " |"]
    lines.append("| ---: |" + " ---: | --- |" * len(found))
    for size in SIZES:
        cells = []
        for sizes in found.values():
            seconds, training, attack = sizes[size]
            cells += [f"{1e3 * seconds:.2f}", f"{training / 2**20:.1f} / {attack / 2**20:.1f}"]
        lines.append("| " + " | ".join([str(size), *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table({network: measure(network) for network in NETWORKS}) + "\n")
