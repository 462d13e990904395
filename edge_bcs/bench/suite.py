"""Everything that `make bench` reports, as one dictionary of plain numbers.

Seconds are lists with one entry a repetition, in the order in which they ran; the sides of a comparison ran
in turn. The dictionary grows part by part, so that an interrupted run loses only the part it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from edge_bcs.bench import attacks
from edge_bcs.bench import machine as roof
from edge_bcs.bench.step import compare_pass, compare_step
from edge_bcs.core.errors import EdgeBcsError

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
GROWTH: dict[str, dict[str, Any]] = {
    "batch": {"batch_size": (32, 64, 128, 256)},
    "kappa": {"sparsity": (0.995, 0.99, 0.98, 0.96, 0.92), "batch_size": 32},
    "pixels": {"image_size": (32, 64, 96), "batch_size": 32, "model": "resnet18"},
}
"""What grows, everything else kept: the argument of `compare_step` that takes several values, and others."""
ROBUST_STEPS = (
    ("vgg16", "uniform", "0.99", 128),
    ("vgg16", "paper", "0.99", 128),
    ("resnet18", "uniform", "0.99", 128),
    ("wrn28_4", "uniform", "0.99", 64),
    ("vgg16", "uniform", "0.9", 128),
)
"""Network, distribution, sparsity, batch of the whole steps in both precisions, beside each dense PyTorch."""
SECTIONS = ("steps", "passes", "stacks", "strided", "scaling", "attacks", "robust steps")


class Part(NamedTuple):
    """One measurement: where its result goes, and how it is made."""

    section: str
    name: str
    measure: Callable[[], Any]


def parts(peak: roof.Roof, repetitions: int, progress: Progress = lambda message: None) -> list[Part]:
    """All parts in the order in which they are measured."""
    threads = peak.threads
    common: dict[str, Any] = {"threads": threads, "repetitions": repetitions, "progress": progress}

    def step(model: str, distribution: str, batch: int) -> Callable[[], Any]:
        return lambda: compare_step(
            model=model, distribution=distribution, batch_size=batch, roof=peak, **common
        ).as_dict()

    def whole(network: str, sparsity: str) -> Callable[[], Any]:
        return lambda: compare_pass(model=network, sparsity=float(sparsity), roof=peak, **common)

    def layers(network: str, sparsity: str) -> Callable[[], Any]:
        return lambda: stack(network, sparsity, peak, repetitions, progress)

    def attack(network: str, sparsity: str) -> Callable[[], Any]:
        return lambda: attacks.compare_attack(model=network, sparsity=float(sparsity), **common)

    def robust_step(network: str, distribution: str, sparsity: str, batch: int) -> Callable[[], Any]:
        settings: dict[str, Any] = {"distribution": distribution, "sparsity": float(sparsity)}
        return lambda: attacks.compare_step(model=network, batch_size=batch, **settings, **common)

    def growth(what: str) -> Callable[[], Any]:
        return lambda: scaling(what, threads, repetitions, progress)

    return [
        *(Part("steps", f"{model}, {densities}", step(model, densities, n)) for model, densities, n in STEPS),
        *(Part("passes", f"{network}, {sparsity}", whole(network, sparsity)) for network, sparsity in STACKS),
        *(
            Part("stacks", f"{network}, {sparsity}", layers(network, sparsity))
            for network, sparsity in STACKS
        ),
        Part("strided", "all", lambda: strided(peak, repetitions, progress)),
        *(Part("scaling", what, growth(what)) for what in GROWTH),
        *(
            Part("attacks", f"{network}, {sparsity}", attack(network, sparsity))
            for network, sparsity in STACKS
        ),
        *(Part("robust steps", ", ".join(each[:3]), robust_step(*each)) for each in ROBUST_STEPS),
    ]


def run(
    threads: int,
    repetitions: int,
    progress: Progress = lambda message: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    earlier: dict[str, Any] | None = None,
    only: Sequence[str] = SECTIONS,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        threads, repetitions: of all sides, of each measurement.
        progress: called with a sentence before each part.
        save: called with the result after each part; its "missing" lists the parts that are still to come.
        earlier: what an interrupted run saved: its parts are kept, the missing ones measured.
        only: of `SECTIONS`; the parts of others stay in "missing".

    Raises:
        EdgeBcsError: ``earlier`` was measured on another machine or otherwise.
    """
    import torch

    torch.set_num_threads(threads)
    progress("the machine's roof")
    peak = roof.measure(threads)
    result: dict[str, Any] = {"machine": peak.as_dict(), "repetitions": repetitions}
    result |= {section: {} for section in SECTIONS}
    if earlier is not None:
        _check_same(earlier, result)
        result = earlier
    todo = [part for part in parts(peak, repetitions, progress) if part.name not in result[part.section]]
    result["missing"] = [f"{part.section}: {part.name}" for part in todo]
    for part in todo:
        if part.section in only:
            result[part.section][part.name] = part.measure()
            result["missing"].remove(f"{part.section}: {part.name}")
            save(result)
    return result


def _check_same(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Figures of different machines or settings do not belong in one table."""
    machine = earlier.get("machine")
    known = isinstance(machine, dict) and machine.keys() == now["machine"].keys()
    if not known or not all(isinstance(earlier.get(section), dict) for section in SECTIONS):
        raise EdgeBcsError("the bench.json there is not one that can be resumed; run without --resume.")
    for what in ("processor", "threads", "isa"):
        if earlier["machine"].get(what) != now["machine"][what]:
            raise EdgeBcsError(
                f"the bench.json there was measured with {what} {earlier['machine'].get(what)}, not "
                f"{now['machine'][what]}; run without --resume."
            )
    if earlier.get("repetitions") != now["repetitions"]:
        raise EdgeBcsError(
            f"the bench.json there has {earlier.get('repetitions')} repetitions, not {now['repetitions']}; "
            "run without --resume."
        )


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
STACK_FORMS = ("forward", "both_gradients")
"""What a training pass does with each convolution."""


def compare_layer(layer: Any, peak: roof.Roof, rounds: int) -> dict[str, Any]:
    """One convolution on all sides: seconds of each form, and what ours reaches of the roof."""
    from edge_bcs.bench import operators
    from edge_bcs.targets.cost_model import algorithm

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
    ours = {}
    rooflines = operators.rooflines(layer, BATCH, LANES, chosen, peak)
    for form, (moved, least) in zip(_FORMS, rooflines, strict=True):
        seconds = float(np.median(taken[list(functions).index(f"edge_bcs.{form}")]))
        flops = 2.0 * layer.active * BATCH * layer.out_size**2 * (2 if form == "both_gradients" else 1)
        ours[form] = {
            "flops": flops,
            "bytes": moved,
            "gflops": flops / seconds / 1e9,
            "roof_fraction": max(flops / peak.arithmetic, moved / peak.stack_bandwidth) / seconds,
            "roofline_fraction": least.seconds / seconds,
            "least": least.as_dict(),
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
    return float(sum(row["count"] * median(row, f"{side}.{form}") for row in rows for form in STACK_FORMS))


def stack_least(rows: Sequence[dict[str, Any]], which: str) -> float:
    """Seconds of forward and backward of all convolutions if each ran at its roofline.

    Args:
        which: "seconds", or "in_cache_seconds" (see `roofline.Least.in_cache`).
    """
    least = ((row["count"], row["edge_bcs"][form]["least"]) for row in rows for form in STACK_FORMS)
    return float(sum(count * seconds[which] for count, seconds in least))


def scaling(what: str, threads: int, repetitions: int, progress: Progress) -> list[dict[str, float]]:
    """Our step's seconds as the batch, κ or the image grows, everything else kept."""
    grown, others = next(iter(GROWTH[what].items())), dict(list(GROWTH[what].items())[1:])
    found = []
    for value in grown[1]:
        arguments: dict[str, Any] = {
            "model": "vgg16",
            "dense": False,
            "micro_batch": LANES,
            **others,
            grown[0]: value,
        }
        # A step of ours alone is short.
        taken = compare_step(threads=threads, repetitions=5 * repetitions, progress=progress, **arguments)
        x = {"batch": taken.batch_size, "kappa": taken.kappa, "pixels": value**2}[what]
        found.append({"x": x, "seconds": taken.sparse_median})
    return found
