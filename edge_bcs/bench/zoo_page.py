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

_CHECKS = "Steps of {} images in micro-batches of {}, and of {} in micro-batches of {}: natural, AT, TRADES,"
_INTRODUCTION = f"""{HEADING}

`make zoo` makes this page. Random weights, {zoo.CLASSES} classes; {100 * zoo.SPARSITY:.0f} % of the weights
of all kernels are zero, except of those that stay dense: depthwise kernels, and the first and the last where
it holds less than 1 % of all weights.

## Gradients, bits and bytes at {zoo.CROSSED}²

{_CHECKS.format(*zoo.DIVIDES, *zoo.LEAVES)}
frozen and batch statistics. Of these cells there are

- *gradients*: those in which the loss, the gradient of every parameter and that of the image differ from
  torch's in float64 by at most 10⁻⁴ of the tensor's norm, or by five times what torch's own float32 does (its
  rounding, which batch statistics of few numbers amplify). Images count of which no activation is so near a
  kink, as of ReLU, that rounding moves it to the other side, and the best of up to {zoo.DRAWS} draws;
- *10⁻⁴*: those that need no such allowance;
- *bits*: those in which two threads compute the bits of one;
- *peak*: those in which the predicted peak is the measured one, to the byte.

| network | weights | κ | other parameters | gradients | 10⁻⁴ | bits | peak | largest difference, frozen |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""
_LARGER = f"""
## Larger images

Natural training, frozen statistics, {zoo.LEAVES[0]} images in micro-batches of {zoo.LEAVES[1]}: the largest
difference of any tensor from float64, and the peak.
"""
_TIMES = f"""
## Milliseconds a step

{zoo.IMAGES} images, frozen statistics; AT with {zoo.ATTACK_STEPS} attack steps. Ours / dense PyTorch's
(channels_last), and how many times as fast ours is: the median of the ratios of neighbouring steps, which ran
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
    text += _TIMES + _head([f"natural, {size}² | AT, {size}²" for size in zoo.SIZES], 2)
    for name in zoo.NETWORKS:
        row = [_times(_read(folder, name, zoo.Cell(size))) for size in zoo.SIZES]
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
        return "not measured" + " |" * 7 if not found else f"refused: {found[0]['refused']}" + " |" * 7

    def counted(holds: Callable[[Found], bool]) -> str:
        return f"{sum(map(holds, good))} of {len(found)}"

    frozen = [cell["worst"] for cell in good if cell["statistics"] == "frozen"]
    worst = max(frozen, key=lambda item: item["difference"], default=None)
    return " | ".join(
        (
            f"{good[0]['weights']:,}",
            f"{good[0]['kappa']:,}",
            f"{good[0]['others']:,}",
            counted(lambda cell: not cell["excess"]),
            counted(lambda cell: not cell["above_tolerance"]),
            counted(lambda cell: cell["same_bits"]),
            counted(lambda cell: cell["predicted_peak_bytes"] == cell["measured_peak_bytes"]),
            f"{worst['difference']:.1e} (`{worst['tensor']}`)" if worst else "–",
        )
    )


def _larger(found: Found) -> str:
    if not found or "refused" in found:
        return "– | –"
    predicted, real = found["predicted_peak_bytes"], found["measured_peak_bytes"]
    peak = f"{real:,}" if predicted == real else f"{real:,} (predicted {predicted:,})"
    return f"{found['worst']['difference']:.1e}{' (too far)' if found['excess'] else ''} | {peak}"


def _times(found: Found) -> str:
    return " | ".join(_time(found.get(kind)) for kind in ("natural", "at"))


def _time(found: Found | None) -> str:
    if found is None:
        return "–"
    ours, dense = (1e3 * median(found[f"{side}_seconds"]) for side in ("ours", "dense"))
    return f"{ours:.0f} / {dense:.0f} ({found['ratio']:.1f}×)"
