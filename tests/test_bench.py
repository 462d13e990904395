"""The benchmark's arithmetic and its report, on numbers that a reader can check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("torch")

from edge_bcs.bench import machine, report, suite
from edge_bcs.bench.operators import Convolution
from edge_bcs.bench.step import StepComparison

ROOF = machine.Roof("a processor", 2, "avx512", (3e9, 1e9), 2e9, 1e9, "2026-01-01T00:00:00+00:00")


def _row(ours: float, torch: float, count: int) -> dict[str, Any]:
    seconds = {}
    for form in ("forward", "input_gradient", "both_gradients"):
        seconds |= {f"edge_bcs.{form}": [ours, 9.0, ours], f"torch.{form}": [torch, torch, 0.0]}
    figures = {"gflops": 1.0, "bytes": 1e9, "roof_fraction": 0.5}
    geometry = Convolution(8, 16, 4, 3, 1, 1, 12)._asdict()
    return {
        "count": count,
        **geometry,
        "density": 0.01,
        "algorithm": "sparse",
        "seconds": seconds,
        "edge_bcs": dict.fromkeys(("forward", "input_gradient", "both_gradients"), figures),
    }


def test_the_least_time_is_the_larger_of_arithmetic_and_traffic() -> None:
    assert ROOF.seconds(flops=8e9, moved=1e9) == 2.0  # 4 GFLOP/s of both cores
    assert ROOF.seconds(flops=8e9, moved=6e9) == 3.0


def test_a_stack_weighs_each_layer_by_how_often_it_occurs() -> None:
    rows = [_row(0.001, 0.030, count=1), _row(0.002, 0.010, count=3)]
    assert suite.stack_seconds(rows, "edge_bcs") == pytest.approx(2 * 0.001 + 6 * 0.002)
    assert suite.stack_seconds(rows, "torch") == pytest.approx(2 * 0.030 + 6 * 0.010)
    assert suite.stack_seconds(rows, "sparseprop") is None


def test_one_layer_is_timed_on_every_side() -> None:
    row = suite.compare_layer(Convolution(8, 16, 4, 3, 1, 1, 12), ROOF, rounds=1)
    assert row["edge_bcs"]["forward"]["flops"] == 2 * 12 * 4 * 4 * 32
    assert row["edge_bcs"]["both_gradients"]["flops"] == 2 * row["edge_bcs"]["forward"]["flops"]
    assert {"edge_bcs.forward", "torch.both_gradients", "onnxruntime.forward"} <= row["seconds"].keys()
    assert all(len(taken) == 1 and taken[0] > 0 for taken in row["seconds"].values())


def test_the_report_names_the_ratio(tmp_path: Path) -> None:
    step = {
        "model": "vgg16", "distribution": "uniform", "batch_size": 128, "sparse_seconds": [0.5, 0.4, 0.6],
        "dense_seconds": [9.0, 10.0, 11.0], "sparseprop_seconds": [], "ratio": 20.0, "optimizer_share": 0.005,
        "peak_bytes": 1 << 20, "parts": {"attack": (0.01, 40), "training": (0.02, 4)},
        "optimizer_seconds": [0.002],
    }  # fmt: skip
    stack = {"network": "vgg16", "sparsity": "0.99", "batch": 32, "layers": [_row(0.001, 0.03, 2)]}
    points = [{"x": 32, "seconds": 0.1}, {"x": 64, "seconds": 0.2}]
    result = {
        "machine": ROOF.as_dict(),
        "repetitions": 3,
        "steps": [step],
        "stacks": [stack] * len(suite.STACKS),
        "strided": [_row(0.001, 0.03, 1)],
        "scaling": dict.fromkeys(("batch", "kappa", "pixels"), points),
    }
    report.write(result, tmp_path / "speed")
    text = (tmp_path / "speed" / "README.md").read_text()
    assert text == report.readme(result)
    assert json.loads((tmp_path / "speed" / "bench.json").read_text())["scaling"]["kappa"] == points
    for plot in ("layers.png", "scaling.png"):
        with Image.open(tmp_path / "speed" / plot) as image:
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10  # curves, not an empty sheet
    assert "| vgg16 | uniform | 128 | 0.50 (0.40–0.60) | 10.00 (9.00–11.00) | 20.0× |" in text
    assert "| vgg16 | 0.99 | 4.0 | 120.0 | 30.0× |" in text


def test_the_ratio_is_the_median_of_neighbouring_repetitions() -> None:
    taken = StepComparison(
        model="vgg16", sparsity=0.99, distribution="uniform", batch_size=128, micro_batch=32, attack_steps=10,
        threads=2, isa="avx512", sparse_seconds=(1.0, 2.0, 4.0), dense_seconds=(30.0, 20.0, 80.0),
        sparseprop_seconds=(5.0, 6.0, 20.0), optimizer_seconds=(0.1, 0.01, 0.02), parts={}, kappa=1,
        peak_bytes=1,
    )  # fmt: skip
    assert taken.ratio == 20.0  # of 30, 10 and 20; the ratio of the medians would be 15
    assert taken.as_dict()["sparseprop_ratio"] == 5.0  # of 5, 3 and 5
    assert taken.optimizer_share == 0.02 / 2.0


def test_the_plot_shows_what_was_measured_beside_the_line(tmp_path: Path) -> None:
    # The same line fits both, so only the measured points can tell them apart.
    for name, seconds in (("level", (2.0, 2.0, 2.0)), ("peak", (1.0, 4.0, 1.0))):
        points = [{"x": x, "seconds": y} for x, y in zip((1, 2, 3), seconds, strict=True)]
        scaling = dict.fromkeys(("batch", "kappa", "pixels"), points)
        report.plot_scaling({"scaling": scaling}, tmp_path / f"{name}.png")
    assert (tmp_path / "level.png").read_bytes() != (tmp_path / "peak.png").read_bytes()
