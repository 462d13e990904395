"""The page of `make zoo`, from the cells that are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from edge_bcs.bench import aims, zoo
from edge_bcs.core.files import read_small

HEADING = "# Networks of torchvision and timm"
Found = dict[str, Any]
TOLERANCE = 1e-4
"""`gradients.TOLERANCE`, without torch."""
_SAID = {"natural": "natural", "at": "AT"}

_CHECKS = "Steps of {} images in micro-batches of {}, and of {} in micro-batches of {}: natural, AT, TRADES,"
_INTRODUCTION = f"""{HEADING}

`make zoo` makes this page. Random weights, batch norms that leave most units open (half shut, a deep
random network makes of a rounding a change of hundredths), {zoo.CLASSES} classes; {100 * zoo.SPARSITY:.0f} %
of the weights of all kernels are zero, except of those that stay dense: depthwise kernels, and the first and
the last where it holds less than 1 % of all weights.

## Gradients, bits and bytes at {zoo.CROSSED}²

{_CHECKS.format(*zoo.DIVIDES, *zoo.LEAVES)}
frozen and batch statistics: twelve cells a network. Of those that are measured, there are

- *gradients*: those in which the loss, the gradient of every parameter and that of the image differ from
  torch's in float64 by at most 10⁻⁴ of the tensor's norm, or by five times what rounding does there: what
  torch's own float32 differs by or, where that is not enough, float64 on images each of whose pixels is moved
  by 10⁻⁷ of itself. For where an activation is within rounding of a kink, as of ReLU, both of its sides are
  right, and batch statistics of few numbers pass that on to all images. Those images count whose own
  gradients are least touched by it, and the best of up to {zoo.DRAWS} draws;
- *10⁻⁴*: those that need no such allowance;
- *bits*: those in which two threads compute the bits of one;
- *peak*: those in which the predicted peak is the measured one, to the byte.

The largest difference of any tensor is told beside what rounding does to that one, where it is more than
10⁻⁴. Such tensors mostly have hardly any gradient: a kernel with one connection a channel before the
statistics of a batch, which take its scale away. *Others* are parameters that are not sparse.

| network | weights | κ | others | gradients | 10⁻⁴ | bits | peak | largest, frozen | largest, batch |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |
"""
_LARGER = f"""
## Larger images

Natural training, frozen statistics, {zoo.LEAVES[0]} images in micro-batches of {zoo.LEAVES[1]}: the largest
difference of any tensor from float64, and the peak.
"""
_TIMES = f"""
## Milliseconds a step

{zoo.IMAGES} images, frozen statistics; at {zoo.CROSSED}² of AT, too, with {zoo.ATTACK_STEPS} attack steps.
Ours / dense PyTorch's (channels_last, but for {" and ".join(zoo.CONTIGUOUS)}, with which torch 2.13 crashes
in that layout), and how many times as fast ours is: the median of the ratios of neighbouring steps, which ran
in turn on the same cores.
"""


_AIMS = """
## What is aimed at

`{}`, {} images a step, frozen statistics, {} thread{} of {} ({}), {}; sides ran in turn.

| what | aim | measured | |
| --- | --- | --- | --- |
"""


def page(folder: Path) -> str:
    """All cells that are there, as text."""
    crossed = [cell for cell in zoo.cells([zoo.CROSSED]) if cell.objective]
    text = _INTRODUCTION
    for name in zoo.NETWORKS:
        found = [cell for cell in (_read(folder, name, cell) for cell in crossed) if cell]
        text += f"| {name} | {_checks(found)} |\n"
    others = [size for size in zoo.SIZES if size != zoo.CROSSED]
    text += _LARGER + _head([f"{size}² | peak (bytes)" for size in others], 2)
    for name in zoo.NETWORKS:
        cells = [zoo.Cell(size, "natural", "frozen", *zoo.LEAVES) for size in others]
        text += f"| {name} | {' | '.join(_larger(_read(folder, name, cell)) for cell in cells)} |\n"
    timed = [("natural", zoo.CROSSED), ("at", zoo.CROSSED), *(("natural", size) for size in others)]
    text += _TIMES + _head([f"{_SAID[kind]}, {size}²" for kind, size in timed], 1)
    for name in zoo.NETWORKS:
        row = [_time(_read(folder, name, zoo.Cell(size)).get(kind)) for kind, size in timed]
        text += f"| {name} | {' | '.join(row)} |\n"
    return text + _aims(folder)


def _aims(folder: Path) -> str:
    file = folder / "aims.json"
    if not file.is_file():
        return ""
    found = json.loads(read_small(file))
    said = (found[name] for name in ("command", "images", "threads", "processor", "isa", "date"))
    command, images, threads, processor, isa, date = said
    text = _AIMS.format(command, images, threads, "s" if threads > 1 else "", processor, isa, date)
    for row in aims.rows(found):
        what, aim, measured, _, verdict = row.cells()
        text += f"| {what} | {aim} | {measured} | {verdict} |\n"
    return text


def _head(columns: list[str], each: int) -> str:
    return f"\n| network | {' | '.join(columns)} |\n| --- |{' ---: |' * (each * len(columns))}\n"


def _read(folder: Path, name: str, cell: zoo.Cell) -> Found:
    file = folder / name / f"{cell.name}.json"
    found: Found = json.loads(read_small(file)) if file.is_file() else {}
    return found


def _checks(found: list[Found]) -> str:
    good = [cell for cell in found if "refused" not in cell]
    if not good:
        return ("not measured" if not found else f"refused: {found[0]['refused']}") + " |" * 8

    def counted(holds: Callable[[Found], bool]) -> str:
        return f"{sum(map(holds, good))} of {len(found)}"

    return " | ".join(
        (
            f"{good[0]['weights']:,}",
            f"{good[0]['kappa']:,}",
            f"{good[0]['others']:,}",
            counted(lambda cell: not cell["excess"]),
            counted(lambda cell: not cell["above_tolerance"]),
            counted(lambda cell: cell["same_bits"]),
            counted(lambda cell: cell["predicted_peak_bytes"] == cell["measured_peak_bytes"]),
            *(
                _worst([cell["worst"] for cell in good if cell["statistics"] == kind])
                for kind in zoo.STATISTICS
            ),
        )
    )


def _worst(found: list[Found]) -> str:
    worst = max(found, key=lambda item: item["difference"], default=None)
    if worst is None:
        return "–"
    return f"{_beside_rounding(worst)} (`{worst['tensor']}`)"


def _beside_rounding(worst: Found) -> str:
    rounding = max(worst["float32"] or 0.0, worst.get("moved") or 0.0)
    beside = f", rounding {rounding:.1e}" if worst["difference"] > TOLERANCE else ""
    return f"{worst['difference']:.1e}{beside}"


def _larger(found: Found) -> str:
    if not found or "refused" in found:
        return "– | –"
    predicted, real = found["predicted_peak_bytes"], found["measured_peak_bytes"]
    peak = f"{real:,}" if predicted == real else f"{real:,} (predicted {predicted:,})"
    return f"{_beside_rounding(found['worst'])}{' (too far)' if found['excess'] else ''} | {peak}"


def _time(found: Found | None) -> str:
    if found is None:
        return "–"
    ours, dense = (1e3 * median(found[f"{side}_seconds"]) for side in ("ours", "dense"))
    return f"{ours:.0f} / {dense:.0f} ({found['ratio']:.1f}×)"
