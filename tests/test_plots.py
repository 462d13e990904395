"""Figures: what is drawn is what the files say."""

# mypy: disable-error-code="list-item"

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.training import SHORT, digits, tiny

import edge_bcs
from edge_bcs.cli import main
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.training import loop as training

pytest.importorskip("matplotlib")
from edge_bcs import plots


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "bcs"
    sparse = edge_bcs.sparsify(tiny(), 0.9)
    training.train(sparse, digits(60), epochs=3, feed=edge_bcs.Feed(validation=0.2), output=folder, **SHORT)
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
    assert [text.get_text() for text in axes.get_legend().texts] == ["bcs", "random", "clean", "robust"]
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


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A run of `finetune`: two held-out accuracies, and steps of which one was skipped, one stands there
    twice and one was cut off."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 2.0 / step, "accuracy": 0.1 * step, "robust_accuracy": 0.05 * step}
        for step in (1, 2, 3, 3, 5)
    ]
    lines[2] = {**lines[2], "loss": 9.0}
    lines.insert(4, {"step": 4, "skipped": "in step 4, …"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    before, after = ({"accuracy": c, "robust_accuracy": r, "samples": 9} for c, r in ((0.2, 0.1), (0.6, 0.5)))
    training = {"step": 105, "done": 5}
    content = {"run": "some/tuned", "before": before, "training": training, "after": after}
    (folder / "report.json").write_text(json.dumps(content))
    return folder


def test_a_fine_tuning_is_its_steps_and_its_report(tuned: Path) -> None:
    loss, accuracy = plots.tuning_curves([plots.read_tuning(tuned)]).axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.0], [3, pytest.approx(2 / 3)], [5, 0.4]]
    clean, held_out_clean, robust, held_out_robust = (line.get_xydata().tolist() for line in accuracy.lines)
    assert clean == [[1, 10], [2, 20], [3, pytest.approx(30)], [5, 50]]
    assert robust == [[1, 5], [2, 10], [3, pytest.approx(15)], [5, 25]]
    assert held_out_clean == [[0, 20], [5, 60]] and held_out_robust == [[0, 10], [5, 50]]
    (axes,) = plots.tuning_curves([plots.read(tuned / "report.json")]).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[100, 20], [105, 60]],
        [[100, 10], [105, 50]],
    ]
    assert axes.get_legend().texts[0].get_text() == "tuned"


def test_a_long_fine_tuning_is_averaged() -> None:
    steps = [
        {"step": step, "loss": step % 2, "accuracy": 0.5, "robust_accuracy": 0.5} for step in range(1, 1001)
    ]
    loss, accuracy = plots.tuning_curves([plots.Tuning("long", steps, {})]).axes
    (line,) = loss.lines
    assert len(line.get_xdata()) == 50 and line.get_xdata()[0] == 10.5
    assert line.get_ydata() == pytest.approx([0.5] * 50)
    assert len(accuracy.lines) == 1  # one accuracy that is both is drawn as the robust one


def test_single_points_are_seen(run: Path) -> None:
    """Markers, the clean one around the robust one; and an axis that does not zoom into nothing."""
    known = plots.read_run(run)
    one = plots.Run("one", known.epochs[:1], known.sizes)
    for figure in (plots.training_curves([one]), plots.connectivity([one])):
        for axes in figure.axes[:2]:
            for line in axes.lines:
                if len(line.get_xdata()) == 1:
                    assert line.get_marker() not in ("", "None")
    loss, accuracy = plots.training_curves([one]).axes
    assert loss.get_xlim() == (0, 2)
    clean, robust = accuracy.lines
    assert clean.get_markerfacecolor() == "none" and clean.get_markersize() > robust.get_markersize()


def test_a_training_that_was_killed_can_be_drawn(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "killed")
    with (folder / "epochs.jsonl").open("a") as stream:
        stream.write('{"epoch": 3, "st')
    assert plots.read(folder) == plots.Run("killed", plots.read_run(run).epochs, plots.read_run(run).sizes)


def test_the_answer_says_what_was_drawn(run: Path, tuned: Path, tmp_path: Path) -> None:
    file = report(tmp_path, "a", method="bcs", sparsity="0.9", accuracy=0.78, robust_accuracy=0.44)
    out = tmp_path / "out"
    paths = (run, tuned, file, tuned / "report.json")
    result = CliRunner().invoke(main, ["plot", *map(str, paths), "-o", str(out)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert (
        f"Wrote {out}/finetuning.png: loss and accuracy by step, from {tuned}, {tuned}/report.json" in lines
    )
    assert f"Wrote {out}/compression.png: accuracy against compression, from {file}" in lines
    assert {file.name for file in out.iterdir()} == {
        "training.png", "connectivity.png", "finetuning.png", "compression.png",
    }  # fmt: skip


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match="not a folder of a training"):
        plots.read_run(tmp_path)
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(EdgeBcsError, match="not a report of edge-bcs evaluate"):
        plots.read(tmp_path / "bad.json")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(EdgeBcsError, match="has not finished an epoch yet"):
        plots.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(EdgeBcsError, match="nothing was trained or measured in"):
        plots.read(tmp_path)
    result = CliRunner().invoke(main, ["plot", str(tmp_path / "nothing")])
    assert result.exit_code == 1 and "there is no file or folder" in result.stderr
