"""The picture at the head of README, from recorded results: `python docs/make_pictures.py`.

Left: what robust fine-tuning inside 8 MiB gives back to a network whose camera sees other images than it was
trained on (results/shifted-camera). Right: the memory of one robust training step beside dense PyTorch's
(results/memory).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("Agg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "front.png"
TEAL, SAND, GREY, INK = "#2f8f83", "#d9a441", "#9aa5a8", "#24292f"
MIB = 1 << 20


def recorded(path: str) -> Any:
    """The content of a JSON file under results/."""
    return json.loads((ROOT / "results" / path).read_text())


def camera(axes: Axes) -> None:
    """Clean and robust accuracy on the camera's images, before and after."""
    rows = recorded("shifted-camera/report.json")["rows"]
    names = ["not fine-tuned", "fine-tuned\nplainly", "fine-tuned\nrobustly"]
    for offset, key, color, label in (
        (-0.2, "accuracy", GREY, "clean"),
        (0.2, "robust_accuracy", TEAL, "under attack (PGD-20)"),
    ):
        heights = [100 * row[key] for row in rows]
        bars = axes.bar(
            [place + offset for place in range(len(rows))], heights, 0.38, color=color, label=label
        )
        axes.bar_label(bars, [f"{height:.1f} %" for height in heights], padding=2, fontsize=9)
    axes.set_xticks(range(len(rows)), names)
    axes.set_ylim(0, 72)
    axes.set_ylabel("accuracy, %")
    axes.set_title("ResNet-18, 99 % sparse, on a shifted camera,\nfine-tuned inside 8 MiB", fontsize=11)
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def memory(axes: Axes) -> None:
    """The working set of a training step, of ours at the least and the most that was measured, and dense."""
    results = recorded("memory/trade_off.json")["results"]
    shown = (("vgg16", "VGG-16"), ("resnet18", "ResNet-18"))
    for place, (name, _) in enumerate(shown):
        ours = [point["peak_bytes"] / MIB for point in results[name]["points"] if "measured" in point]
        dense = results[name]["dense_pytorch"]["bytes"] / MIB
        for offset, size, color, label in (
            (-0.27, min(ours), TEAL, "edge-bcs, 2 images (working set)"),
            (0.0, max(ours), SAND, "edge-bcs, 16 images (working set)"),
            (0.27, dense, GREY, "dense PyTorch, 16 images (growth of its process)"),
        ):
            bars = axes.bar(place + offset, size, 0.25, color=color, label=label if place == 0 else None)
            axes.bar_label(bars, [f"{size:.0f}"], padding=2, fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(2, 4000)
    axes.set_xticks(range(len(shown)), [title for _, title in shown])
    axes.set_ylabel("MiB")
    axes.set_title(
        "Memory of one robust training step,\nMiB (32×32 pixels; 99 % sparse, and dense)", fontsize=11
    )
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def main() -> None:
    """Write the picture, on a white card, so that it can be read on any background."""
    plt.rcParams.update({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", facecolor="white")
    camera(left)
    memory(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor("white")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=144, metadata={"Software": None})


if __name__ == "__main__":
    main()
