"""Figures: what is drawn is what the files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_training import SHORT, digits, tiny

import edge_bcs
from edge_bcs import training
from edge_bcs.cli import main
from edge_bcs.errors import EdgeBcsError

pytest.importorskip("matplotlib")
from edge_bcs import plots


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "bcs"
    sparse = edge_bcs.sparsify(tiny(), 0.9)
    training.train(sparse, digits(60), epochs=3, validation=0.2, output=folder, **SHORT)
    return folder


def report(folder: Path, name: str, **content: Any) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"samples": 10, "attack": "pgd", **content}))
    return file


def test_training_curves_are_the_lines_of_the_file(run: Path) -> None:
    epochs = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    figure = plots.training_curves([plots.read_run(run)])
    loss, accuracy = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[line["epoch"] + 1, line["loss"]] for line in epochs]
    clean, robust = accuracy.lines
    assert clean.get_ydata() == pytest.approx([100 * line["validation_clean_acc"] for line in epochs])
    assert robust.get_ydata() == pytest.approx([100 * line["validation_robust_acc"] for line in epochs])
    assert (clean.get_linestyle(), robust.get_linestyle()) == (":", "-")


def test_connectivity_is_that_of_each_layer(run: Path) -> None:
    last = json.loads((run / "epochs.jsonl").read_text().splitlines()[-1])["connections"]
    figure = plots.connectivity([plots.read_run(run)] * 2)
    assert len(figure.axes) == 3  # two panels and the bar of depths
    depths = [float(text.get_text()) for text in figure.axes[2].get_yticklabels() if text.get_text()]
    assert all(depth.is_integer() for depth in depths) and depths  # there is no layer 1½
    convolution, linear, whole = figure.axes[0].lines
    assert convolution.get_ydata()[-1] == pytest.approx(100 * last["0"] / 72)
    assert linear.get_ydata()[-1] == pytest.approx(100 * last["4"] / 5120)
    assert whole.get_ydata()[0] == pytest.approx(100 * 519 / 5192)


def test_compression_and_queries(tmp_path: Path) -> None:
    files = [
        report(tmp_path, "a", method="bcs", sparsity="0.99", accuracy=0.7, robust_accuracy=0.42),
        report(tmp_path, "b", method="bcs", sparsity="0.9", accuracy=0.78, robust_accuracy=0.44),
        report(tmp_path, "c", method="random", sparsity="0.99", accuracy=0.42, robust_accuracy=0.27),
    ]
    axes = plots.compression([plots.read_report(file) for file in files]).axes[0]
    clean, robust, other, _ = axes.lines
    assert clean.get_xdata() == pytest.approx([10, 100]) and clean.get_ydata() == pytest.approx([78, 70])
    assert robust.get_ydata() == pytest.approx([44, 42]) and other.get_ydata() == pytest.approx([42])
    assert [text.get_text() for text in axes.get_legend().texts] == ["bcs", "random"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "100"]
    curve = [{"queries": 50, "adv_acc": 0.6}, {"queries": 500, "adv_acc": 0.5}]
    square = [
        report(
            tmp_path, "d", method="bcs", attack="square", accuracy=0.7, curve=curve, queries=500, adv_acc=0.5
        ),
        report(tmp_path, "e", method="bcs", attack="square", accuracy=0.7, queries=5000, adv_acc=0.45),
    ]
    (line,) = plots.queries([plots.read_report(file) for file in square]).axes[0].lines
    assert list(line.get_xdata()) == [50, 500, 5000]
    assert line.get_ydata() == pytest.approx([60, 50, 45])


def test_seeds_are_one_point(tmp_path: Path) -> None:
    files = [
        report(
            tmp_path, f"{seed}", method="bcs", sparsity="0.99", attack="square", accuracy=clean,
            robust_accuracy=robust, queries=50, adv_acc=robust,
        )
        for seed, (clean, robust) in enumerate([(0.7, 0.4), (0.8, 0.5), (0.75, 0.42)])
    ]  # fmt: skip
    reports = [plots.read_report(file) for file in files]
    for draw in (plots.compression, plots.queries):
        axes = draw(reports).axes[0]
        assert [list(line.get_ydata()) for line in axes.lines][-1] == pytest.approx([44])
        (low, high) = axes.collections[-1].get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((40, 50))
    assert len(axes.get_legend().texts) == 1


def test_command(run: Path, tmp_path: Path) -> None:
    reports = [
        report(tmp_path, "a", method="bcs", sparsity="0.9", accuracy=0.78, robust_accuracy=0.44),
        report(tmp_path, "d", attack="square", accuracy=0.7, queries=500, adv_acc=0.5),
    ]
    arguments = ["plot", str(run), *map(str, reports), "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    files = [Path(name) for name in json.loads(result.stdout)["files"]]
    assert [file.stem for file in files] == ["training", "connectivity", "compression", "queries"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match="not a folder of a training"):
        plots.read_run(tmp_path)
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(EdgeBcsError, match="not a report of edge-bcs evaluate"):
        plots.read_report(tmp_path / "bad.json")
    result = CliRunner().invoke(main, ["plot", str(tmp_path / "nothing")])
    assert result.exit_code == 1 and "there is no file or folder" in result.stderr
