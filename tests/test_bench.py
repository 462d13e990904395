"""The benchmark's arithmetic and its report, on numbers that a reader can check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

pytest.importorskip("torch")

from edge_bcs.bench import machine, operators, report, step, suite, targets
from edge_bcs.bench.operators import RUNS, Convolution
from edge_bcs.bench.step import StepComparison, compare_pass, compare_step
from edge_bcs.cli import main
from edge_bcs.errors import EdgeBcsError

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
    assert all(len(taken) == RUNS and min(taken) > 0 for taken in row["seconds"].values())


STEP = {
    "model": "vgg16", "distribution": "uniform", "batch_size": 128, "sparse_seconds": [0.5, 0.4, 0.6],
    "dense_seconds": [9.0, 10.0, 11.0], "sparseprop_seconds": [], "ratio": 20.0, "optimizer_share": 0.0125,
    "rewiring_share": 0.005, "peak_bytes": 1 << 20, "parts": {"attack": (0.01, 40), "training": (0.02, 4)},
    "operators": {"attack": {"Conv": 0.004, "PackInput": 1e-6}}, "optimizer_seconds": [0.002],
}  # fmt: skip
PASS = {"edge_bcs": [0.01, 0.02, 0.01], "torch": [0.2, 0.8, 0.3]}
POINTS = [{"x": 32, "seconds": 0.1}, {"x": 64, "seconds": 0.2}]
STACK = {"network": "vgg16", "sparsity": "0.99", "batch": 32, "layers": [_row(0.001, 0.03, 2)]}


def _measure(monkeypatch: pytest.MonkeyPatch, broken: str = "") -> list[str]:
    """Let the bench find the figures above instead of measuring; returns the list of what it asked for."""
    asked: list[str] = []

    def finds(section: str, figures: Any) -> Any:
        def measure(*_: Any, **given: Any) -> Any:
            asked.append(section)
            if section == broken:
                raise KeyboardInterrupt
            return figures

        return measure

    class Step:
        as_dict = staticmethod(lambda: STEP)

    monkeypatch.setattr(suite.roof, "measure", lambda threads: ROOF)
    monkeypatch.setattr(suite, "compare_step", finds("steps", Step))
    monkeypatch.setattr(suite, "compare_pass", finds("passes", PASS))
    monkeypatch.setattr(suite, "stack", finds("stacks", STACK))
    monkeypatch.setattr(suite, "strided", finds("strided", [_row(0.001, 0.03, 1)]))
    monkeypatch.setattr(suite, "scaling", finds("scaling", POINTS))
    return asked


def test_the_report_names_the_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _measure(monkeypatch)
    result = suite.run(2, 3)
    assert result["missing"] == []
    report.write(result, tmp_path / "speed")
    text = (tmp_path / "speed" / "README.md").read_text()
    assert text == report.readme(result)
    assert json.loads((tmp_path / "speed" / "bench.json").read_text())["scaling"]["kappa"] == POINTS
    for plot in ("layers.png", "scaling.png"):
        with Image.open(tmp_path / "speed" / plot) as image:
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10  # curves, not an empty sheet
    assert "| vgg16 | uniform | 128 | 0.50 (0.40–0.60) | 10.00 (9.00–11.00) | 20.0× |" in text
    assert "| vgg16 | 0.99 | 4.0 | 120.0 | 30.0× |" in text
    assert "| vgg16, 0.99 | 10.00 (10.00–20.00) | 300.00 (200.00–800.00) | 30.0× |" in text
    assert "- vgg16, uniform, attack: Conv 4.00\n" in text


def test_the_targets_say_met_not_met_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = targets.of({})
    assert len(empty) == 8 * 2 + 4 + 3 + 3
    assert {row.met for row in empty} == {None}
    _measure(monkeypatch)
    verdicts = {row.what: row for row in targets.of(suite.run(2, 3))}
    assert verdicts["whole AT step, vgg16, uniform"].met is True  # 20 of 20
    assert verdicts["RewireStep, VGG-16 at 99 %"].met is False  # the whole update is 1.25 %
    assert "0.50 %" in verdicts["RewireStep, VGG-16 at 99 %"].measured
    stack = [
        row.cells()[1:]
        for row in targets.of(suite.run(2, 3))
        if row.what.startswith("conv stack, vgg16, 0.99")
    ]
    assert stack == [
        ("≥ 30× dense PyTorch", "30.0×", "met"),
        ("≥ 30× dense PyTorch", "30.0×", "met"),
        ("≥ 6× SparseProp", "not measured", "–"),
        ("≥ 6× SparseProp", "not measured", "–"),
    ]
    assert verdicts["strided and 1×1 layers at ≥ 90 %, forward and backward"].met is True
    assert verdicts["time of a step as batch grows"].met is True


def test_a_slow_layer_and_a_bent_line_do_not_meet_their_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    _measure(monkeypatch)
    monkeypatch.setattr(suite, "strided", lambda *_: [_row(0.001, 0.03, 1), _row(0.031, 0.03, 1)])
    bent = [{"x": x, "seconds": y} for x, y in ((1, 1.0), (2, 2.0), (3, 5.0))]
    monkeypatch.setattr(suite, "scaling", lambda *_: bent)
    verdicts = {row.what: row for row in targets.of(suite.run(2, 3))}
    strided = verdicts["strided and 1×1 layers at ≥ 90 %, forward and backward"]
    assert (strided.met, strided.measured) == (False, "1.0× to 30.0×, 1 of 2 slower")
    assert verdicts["time of a step as kappa grows"].met is False


def test_an_interrupted_run_leaves_what_it_measured_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = ["bench", "--all", str(tmp_path)]
    for plot in ("plot_scaling", "plot_layers"):  # slow, and tested above
        monkeypatch.setattr(report, plot, lambda _, file: file.touch())
    asked = _measure(monkeypatch, broken="stacks")
    with pytest.raises(click.Abort):
        main(bench, standalone_mode=False)
    assert asked == ["steps"] * 4 + ["passes"] * 4 + ["stacks"]
    text = (tmp_path / "README.md").read_text()
    assert "**Interrupted**; not measured: stacks: vgg16, 0.99; stacks: vgg16, 0.9; " in text
    assert "| whole AT step, vgg16, uniform | ≥ 20× dense PyTorch | 20.0× | met |" in text
    assert not (tmp_path / "layers.png").exists()

    asked = _measure(monkeypatch)
    main([*bench, "--resume"], standalone_mode=False)
    assert asked == ["stacks"] * 4 + ["strided"] + ["scaling"] * 3
    assert "Interrupted" not in (tmp_path / "README.md").read_text()
    assert (tmp_path / "layers.png").exists()

    asked = _measure(monkeypatch)
    main(bench, standalone_mode=False)
    assert len(asked) == 4 + 4 + 4 + 1 + 3  # without --resume everything is measured anew


def test_figures_of_another_machine_are_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _measure(monkeypatch)
    result = suite.run(2, 3)
    with pytest.raises(EdgeBcsError, match="repetitions"):
        suite.run(2, 4, earlier=result)
    with pytest.raises(EdgeBcsError, match="measured with isa avx2"):
        suite.run(2, 3, earlier=result | {"machine": result["machine"] | {"isa": "avx2"}})
    with pytest.raises(EdgeBcsError, match="cannot be resumed"):
        report.read(tmp_path)
    with pytest.raises(EdgeBcsError, match="not one that can be resumed"):
        suite.run(2, 3, earlier={})


def test_a_whole_pass_is_timed_on_every_side() -> None:
    seconds = compare_pass(model="wrn28_2", sparsity=0.99, threads=1, repetitions=1, batch_size=1)
    assert {"edge_bcs", "torch"} <= seconds.keys()
    assert all(len(taken) == RUNS and min(taken) > 0 for taken in seconds.values())


class _Clock:
    """A clock that only the sides and the pauses move; a side that runs first after a pause takes longer."""

    def __init__(self) -> None:
        self.now, self.log, self.awake = 0.0, list[str](), False

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds == step.PAUSE
        self.log.append("pause")
        self.awake = False

    def side(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds if self.awake else 100 * seconds
            self.awake = True

        return run


def test_no_function_meets_the_threads_of_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr(operators, "time", clock)
    taken = operators.times([clock.side("a", 1.0), clock.side("b", 2.0)], rounds=2)
    assert clock.log == 2 * (["pause"] + (1 + RUNS) * ["a"] + ["pause"] + (1 + RUNS) * ["b"])
    assert taken == [2 * RUNS * [1.0], 2 * RUNS * [2.0]]  # the first run, which finds all asleep, is left out


def test_nor_does_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr(step, "time", clock)
    sides = {"ours": clock.side("ours", 1.0), "dense": clock.side("dense", 2.0)}
    taken = step._in_turn(sides, 2, lambda message: None)
    assert clock.log == 3 * ["pause", "ours", "pause", "dense"]  # once more than is timed
    assert [len(seconds) for seconds in taken.values()] == [2, 2]


def test_a_step_names_its_operators() -> None:
    taken = compare_step(
        model="wrn28_2", batch_size=1, attack_steps=1, threads=1, repetitions=1, image_size=8, dense=False
    )
    assert {"RewireStep", "BuildLists", "DenseStep"} == taken.operators["optimizer"].keys()
    assert "ConvInputGrad" in taken.operators["attack"] and "ConvGrad" in taken.operators["training"]
    assert 0 < taken.rewiring_share < 1 and taken.micro_batch == 1


def test_the_ratio_is_the_median_of_neighbouring_repetitions() -> None:
    taken = StepComparison(
        model="vgg16", sparsity=0.99, distribution="uniform", batch_size=128, micro_batch=32, attack_steps=10,
        threads=2, isa="avx512", sparse_seconds=(1.0, 2.0, 4.0), dense_seconds=(30.0, 20.0, 80.0),
        sparseprop_seconds=(5.0, 6.0, 20.0), optimizer_seconds=(0.1, 0.01, 0.02), parts={},
        operators={"optimizer": {"RewireStep": 0.01}}, kappa=1, peak_bytes=1,
    )  # fmt: skip
    assert taken.ratio == 20.0  # of 30, 10 and 20; the ratio of the medians would be 15
    assert taken.as_dict()["sparseprop_ratio"] == 5.0  # of 5, 3 and 5
    assert taken.optimizer_share == 0.02 / 2.0
    assert taken.rewiring_share == 0.01 / 2.0


def test_the_plot_shows_what_was_measured_beside_the_line(tmp_path: Path) -> None:
    # The same line fits both, so only the measured points can tell them apart.
    for name, seconds in (("level", (2.0, 2.0, 2.0)), ("peak", (1.0, 4.0, 1.0))):
        points = [{"x": x, "seconds": y} for x, y in zip((1, 2, 3), seconds, strict=True)]
        scaling = dict.fromkeys(("batch", "kappa", "pixels"), points)
        report.plot_scaling({"scaling": scaling}, tmp_path / f"{name}.png")
    assert (tmp_path / "level.png").read_bytes() != (tmp_path / "peak.png").read_bytes()
