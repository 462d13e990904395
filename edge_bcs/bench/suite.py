"""Everything that `make bench` reports, as one dictionary of plain numbers.

Seconds are lists with one entry a repetition, in the order in which they ran; the sides of a comparison ran
in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edge_bcs.bench import machine as roof
from edge_bcs.bench.step import compare_step

Progress = Callable[[str], None]

STEPS = (
    ("vgg16", "uniform", 128),
    ("vgg16", "paper", 128),
    ("resnet18", "uniform", 128),
    ("wrn28_4", "uniform", 64),
)
"""Network, distribution, batch of the whole steps that targets are set for."""
STACKS = (("vgg16", "0.99"), ("vgg16", "0.9"), ("resnet18", "0.99"), ("resnet18", "0.9"))
"""Network, sparsity of the stacks of convolutions (uniform)."""
STRIDED = ((128, 256, 3, 2), (256, 512, 3, 2), (128, 256, 1, 2), (256, 256, 1, 1), (512, 512, 1, 1))
"""Channels in and out, kernel, stride of single strided and 1×1 layers on 16² pixels."""


def run(threads: int, repetitions: int, progress: Progress = lambda message: None) -> dict[str, Any]:
    """Measure everything."""
    import torch

    torch.set_num_threads(threads)
    progress("the machine's roof")
    peak = roof.measure(threads)
    result: dict[str, Any] = {"machine": peak.as_dict(), "repetitions": repetitions}
    result["stacks"] = [stack(network, sparsity, peak, repetitions, progress) for network, sparsity in STACKS]
    result["strided"] = strided(peak, repetitions, progress)
    result["steps"] = []
    for model, distribution, batch in STEPS:
        comparison = compare_step(
            model=model,
            distribution=distribution,
            batch_size=batch,
            threads=threads,
            repetitions=repetitions,
            progress=progress,
        )
        result["steps"].append(comparison.as_dict())
    result["scaling"] = scaling(threads, repetitions, progress)
    return result


def stack(network: str, sparsity: str, peak: roof.Roof, rounds: int, progress: Progress) -> dict[str, Any]:
    """All distinct convolutions of a network, each side's forward and backward."""
    from edge_bcs.bench.operators import convolutions

    rows = []
    for layer, count in convolutions(network, "uniform", sparsity).items():
        progress(f"{network} at {sparsity}: {layer.in_channels}→{layer.out_channels} on {layer.size}² pixels")
        rows.append({"count": count, **compare_layer(layer, peak, rounds)})
    return {"network": network, "sparsity": sparsity, "batch": BATCH, "layers": rows}


def strided(peak: roof.Roof, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Strided and 1×1 layers at 90 and 99 %."""
    from edge_bcs.bench.operators import Convolution

    rows = []
    for inputs, outputs, kernel, stride in STRIDED:
        for density in (0.1, 0.01):
            progress(f"{inputs}→{outputs}, {kernel}×{kernel}, stride {stride}, density {density}")
            active = round(density * inputs * outputs * kernel * kernel)
            layer = Convolution(inputs, outputs, 16, kernel, stride, kernel // 2, active)
            rows.append(compare_layer(layer, peak, rounds))
    return rows


BATCH, LANES = 32, 16
_FORMS = ("forward", "input_gradient", "both_gradients")


def compare_layer(layer: Any, peak: roof.Roof, rounds: int) -> dict[str, Any]:
    """One convolution on all sides: seconds of each form, and what ours reaches of the roof."""
    from edge_bcs.bench import operators
    from edge_bcs.exporters.cost_model import algorithm

    density = layer.active / layer.weights
    chosen = algorithm(density)
    functions = dict(
        zip(
            (f"edge_bcs.{form}" for form in _FORMS),
            operators.ours(layer, BATCH, LANES, peak.threads, chosen),
            strict=True,
        )
    )
    functions |= zip((f"torch.{form}" for form in _FORMS), operators.dense(layer, BATCH), strict=True)
    functions["onnxruntime.forward"] = operators.ort_dense(layer, BATCH, peak.threads)
    other = operators.sparseprop(layer, BATCH)
    if other is not None:
        functions |= zip(("sparseprop.forward", "sparseprop.both_gradients"), other, strict=True)
    taken = operators.times(list(functions.values()), rounds)
    images = 4.0 * BATCH * layer.in_channels * layer.size**2
    results = 4.0 * BATCH * layer.out_channels * layer.out_size**2
    multiplied = 2.0 * layer.active * BATCH * layer.out_size**2
    # Each stack once, and a bit for each element of the one that was or is to be rectified.
    moved = {"forward": images + results * 33 / 32, "input_gradient": results + images * 33 / 32}
    moved["both_gradients"] = moved["input_gradient"] + images
    ours = {}
    for form in _FORMS:
        flops = multiplied * (2 if form == "both_gradients" else 1)
        seconds = float(np.median(taken[list(functions).index(f"edge_bcs.{form}")]))
        ours[form] = {
            "flops": flops,
            "bytes": moved[form],
            "gflops": flops / seconds / 1e9,
            "roof_fraction": peak.seconds(flops, moved[form]) / seconds,
        }
    return {
        **layer._asdict(),
        "density": density,
        "algorithm": chosen,
        "seconds": dict(zip(functions, taken, strict=True)),
        "edge_bcs": ours,
    }


def median(row: dict[str, Any], name: str) -> float:
    """Median seconds of one side's form in a row of `compare_layer`."""
    return float(np.median(row["seconds"][name]))


def stack_seconds(rows: Sequence[dict[str, Any]], side: str) -> float | None:
    """Seconds of forward and backward of all convolutions; None where the side was not there."""
    if f"{side}.both_gradients" not in rows[0]["seconds"]:
        return None
    forms = (f"{side}.forward", f"{side}.both_gradients")
    return float(sum(row["count"] * median(row, form) for row in rows for form in forms))


def scaling(threads: int, repetitions: int, progress: Progress) -> dict[str, list[dict[str, float]]]:
    """Our step's seconds as the batch, κ and the image grow, everything else kept."""
    found: dict[str, list[dict[str, float]]] = {"batch": [], "kappa": [], "pixels": []}
    common: dict[str, Any] = {
        "model": "vgg16",
        "threads": threads,
        "repetitions": repetitions,
        "dense": False,
        "progress": progress,
    }
    for batch in (32, 64, 128, 256):
        taken = compare_step(batch_size=batch, **common)
        found["batch"].append({"x": batch, "seconds": taken.sparse_median})
    for sparsity in (0.995, 0.99, 0.98, 0.96, 0.92):
        taken = compare_step(batch_size=32, sparsity=sparsity, **common)
        found["kappa"].append({"x": taken.kappa, "seconds": taken.sparse_median})
    for size in (32, 64, 96):
        taken = compare_step(batch_size=32, image_size=size, **common | {"model": "resnet18"})
        found["pixels"].append({"x": size**2, "seconds": taken.sparse_median})
    return found
