"""Attacks in half precision beside float32 ones, and whole robust steps with them beside dense PyTorch's."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from edge_bcs.bench.step import batch_of, exported, micro_batches
from edge_bcs.bench.turns import TorchStep, in_turn, seconds_of

SIDES = ("f32", "half")
_PASSES = 8  # of the attack's graph, timed together


def has_half() -> bool:
    """Whether this processor has arithmetic in half precision."""
    from edge_bcs.runtime.library import half_kernels

    return half_kernels() == 2


def compare_attack(
    *,
    model: str,
    sparsity: float,
    threads: int,
    repetitions: int,
    images_at_once: int = 32,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Time passes of the attack's graph by our own engine (uniform density), in both precisions in turn.

    Returns:
        "seconds": "f32" and "half" → seconds of a pass, one a repetition; no half without the arithmetic.
    """
    from edge_bcs.runtime import Artifact
    from edge_bcs.runtime.attack import craft
    from edge_bcs.runtime.engines import open_engine

    images, labels = batch_of(images_at_once, 32)
    with contextlib.ExitStack() as stack:
        folder, _ = stack.enter_context(
            exported(model, sparsity, "uniform", 32, images_at_once, progress, images_at_once, 1)
        )
        artifact = Artifact.read(folder)
        sides: dict[str, Callable[[], float]] = {}
        for name in SIDES if has_half() else SIDES[:1]:
            engine = open_engine("native", artifact, None, threads, half=name == "half")
            stack.callback(engine.close)
            engine.load(images, labels, 1.0 / images_at_once)
            craft(engine, 0, images_at_once, seed=0, step=0)
            sides[name] = partial(seconds_of, _passes, engine)
        progress(f"attacks on {model}, sparsity {sparsity}")
        taken = in_turn(sides, repetitions, lambda _: None)
    return {"seconds": {name: [each / _PASSES for each in seconds] for name, seconds in taken.items()}}


def _passes(engine: Any) -> None:
    for _ in range(_PASSES):
        engine.run("attack")


def compare_step(
    *,
    model: str,
    distribution: str,
    sparsity: float,
    batch_size: int,
    threads: int,
    repetitions: int,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Time whole steps of AT with PGD-10 by our own engine, with attacks in both precisions, and those of
    dense PyTorch, in turn.

    Returns:
        "seconds": side → seconds, one a repetition. Sides: "f32" and "half", ours, no half without the
        arithmetic; of dense PyTorch "torch", "bf16" (under autocast, where there is arithmetic in half
        precision: elsewhere torch emulates it) and "compiled" (torch.compile, where it finds a compiler).
        "images": side of ours → images that it holds at once: 16, or 16 for each thread, both timed in the
        same run; the faster by its median counts.
    """
    import torch

    from edge_bcs.runtime import Trainer

    torch.set_num_threads(threads)
    images, labels = batch_of(batch_size, 32)
    precisions = SIDES if has_half() else SIDES[:1]
    sizes = micro_batches(batch_size, threads)
    with contextlib.ExitStack() as stack:
        sides: dict[str, Callable[[], float]] = {}
        for size in sizes:
            folder, _ = stack.enter_context(
                exported(model, sparsity, distribution, 32, size, progress, batch_size, 10)
            )
            for precision in precisions:
                trainer = Trainer(folder, threads=threads, engine="native", attack_precision=precision)
                step = stack.enter_context(trainer).step
                sides[f"{precision} {size}"] = partial(seconds_of, step, images, labels)
        tensors = torch.from_numpy(images), torch.from_numpy(labels)
        for name, dense in _dense_sides(model, tensors, progress).items():
            sides[name] = partial(seconds_of, dense, *tensors)
        progress(f"robust steps of {model}, {distribution}, {sparsity}")
        seconds = in_turn(sides, repetitions, progress)
    chosen = {}
    for precision in precisions:
        taken = {size: seconds.pop(f"{precision} {size}") for size in sizes}
        chosen[precision] = min(sizes, key=lambda size: statistics.median(taken[size]))
        seconds[precision] = taken[chosen[precision]]
    return {"seconds": seconds, "images": chosen}


def _dense_sides(model: str, batch: tuple[Any, Any], progress: Callable[[str], None]) -> dict[str, TorchStep]:
    from edge_bcs import models

    def side(**how: bool) -> TorchStep:
        return TorchStep(models.create(model, num_classes=10), 10, channels_last=True, **how)

    sides = {"torch": side()}
    if has_half():
        sides["bf16"] = side(bfloat16=True)
    progress(f"torch.compile of {model}")
    compiled = side(compiled=True)
    try:
        compiled(*batch)
    except (RuntimeError, OSError) as error:  # its own kinds of both
        progress(f"torch.compile is left out: {str(error).splitlines()[0]}")
    else:
        sides["compiled"] = compiled
    return sides
