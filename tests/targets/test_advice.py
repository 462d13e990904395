"""Changes that the simulator advises: their commands give what they say, the trade-off is the planner's."""

# mypy: disable-error-code="type-var"

from __future__ import annotations

import inspect
import itertools
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from edge_bcs.exporters import advice as compiled_advice
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.targets import advice, cost_model
from edge_bcs.targets.host_run import measure

import edge_bcs
from edge_bcs.cli import main
from edge_bcs.simulation import simulate

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VGG-16 of 4 channels on 16×16 images, TRADES with batch statistics, two micro-batches of 4 a step; as
    small as it is because it is planned for some fifty budgets."""
    pytest.importorskip("torch")
    sparse = edge_bcs.sparsify(
        edge_bcs.models.vgg16(width=0.0625, input_size=16), sparsity="0.9", seed=0, distribution="uniform"
    )
    folder = tmp_path_factory.mktemp("vgg") / "artifact"
    options: dict[str, Any] = {"objective": "trades", "batch_norm": "batch", "batch_size": 8}
    memory = edge_bcs.Memory(micro_batch=4)
    edge_bcs.export(sparse, folder, input_shape=(3, 16, 16), memory=memory, validate=False, **options)
    return folder


@pytest.mark.parametrize(
    ("target", "share"), [(None, 0.8), pytest.param("raspberry-pi-4", 0.5, marks=pytest.mark.slow)]
)
def test_every_command_does_what_it_says(
    vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str | None, share: float
) -> None:
    monkeypatch.setattr(compiled_advice, "SPARSITIES", ("0.95",))  # of five that are alike
    need = Artifact.read(vgg).predicted_peak_bytes
    budget = int(need * share)
    result = simulate(vgg, target, memory=budget, run=False)
    changes = result.advice.changes
    assert result.advice.source == advice.COMPILED
    assert {"--batch-norm", "--objective", "--sparsity", "--width"} <= {
        word for change in changes for word in shlex.split(change.command)
    }
    assert any(change.fits for change in changes)
    order = [(not change.fits, change.retrain and change.fits) for change in changes]
    assert order == sorted(order)
    for number, change in enumerate(changes):
        assert change.saved_bytes == need - change.peak_bytes > 0
        assert change.fits == (change.peak_bytes <= budget)
        words = shlex.split(change.command)
        assert words[:2] == ["edge-bcs", "export"] and words[-2] == "-o"
        path = words[-1] = str(tmp_path / str(number))
        done = CliRunner().invoke(main, [*words[1:], "--no-validate"])
        assert done.exit_code == 0, (change.command, done.output)
        assert Artifact.read(path).predicted_peak_bytes == change.peak_bytes, change.what
        assert "--store" not in words or Artifact.read(path).manifest["memory"]["choice"]["narrowed"]
        if not change.fits:
            continue
        # It really trains inside the budget that the artifact did not fit: the allocator refuses a byte more.
        measured = measure(path, budget, 1, 0.0)
        assert measured["peak_bytes"] == change.peak_bytes <= budget
        then = simulate(path, target, memory=budget, run=False, recompiled=None)
        assert then.fits and then.expected is not None
        # The optimizer's time depends on the connections alone and is not what is planned.
        assert then.expected.seconds == pytest.approx(change.seconds, rel=1e-6)


def test_the_trade_off_is_what_the_planner_makes_of_each_budget(
    vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_advice.Compiler, "variants", lambda *_: iter(()))  # not looked at here
    budget = int(0.7 * Artifact.read(vgg).predicted_peak_bytes)
    points = simulate(vgg, "raspberry-pi-4", memory=budget, run=False, curve=True).advice.curve
    assert len(points) > 4 and budget in [point.budget_bytes for point in points]
    assert [p.peak_bytes for p in points] == sorted(p.peak_bytes for p in points)
    seconds = [p.seconds for p in points if p.seconds is not None]
    assert len(seconds) == len(points) and seconds[-1] < 0.8 * seconds[0]
    assert all(later <= 1.02 * earlier for earlier, later in itertools.pairwise(seconds))
    assert points[0].recomputed and points[0].budget_bytes == points[0].peak_bytes
    for number, point in enumerate(points[:2]):
        path = tmp_path / str(number)
        words = ["--checkpoint", str(vgg), "--objective", "trades", "--batch-norm", "batch"]
        words += ["--batch-size", "8", "--input-size", "16", "--target", "raspberry-pi-4", "--no-validate"]
        words += ["--memory", str(point.budget_bytes), "-o", str(path)]
        assert CliRunner().invoke(main, ["export", *words]).exit_code == 0
        artifact = Artifact.read(path)
        assert (artifact.micro_batch, artifact.predicted_peak_bytes) == (point.micro_batch, point.peak_bytes)
    assert simulate(vgg, "raspberry-pi-4", run=False).advice.curve == ()


def test_a_board_scales_the_plan_and_says_so(vgg: Path) -> None:
    from edge_bcs.exporters.compiler import compile_network
    from edge_bcs.exporters.memory.choice import Job
    from edge_bcs.exporters.network import network_of

    from edge_bcs.core.objectives import objective_named
    from edge_bcs.loading import load

    network = network_of(load(vgg), (3, 16, 16), True)

    place = advice.Place(None, cost_model.TYPICAL_BOARD, lambda *_: None)

    def absent(*_: object) -> advice.Maker:
        raise ImportError("torch")

    need = Artifact.read(vgg).predicted_peak_bytes
    for compiler in (absent, None):
        result = simulate(vgg, memory=int(need * 0.8), run=False, curve=True, recompiled=compiler)
        assert result.advice.source == advice.SCALED
    assert [point.micro_batch for point in result.advice.curve] == [2, 4, 8]
    for point in result.advice.curve:
        compiled = compile_network(network, Job(objective_named("trades"), 6.0), point.micro_batch)
        assert point.peak_bytes == pytest.approx(compiled.memory.peak_bytes, rel=0.05)
        walks = [walk for walks in compiled.memory.phases["attack"].walks for walk in walks]
        scaled = advice.Scaler(result.artifact, result.plan, place).at(point.micro_batch)
        assert [walk for walks in scaled.phases["attack"].walks for walk in walks] == walks
    best = result.advice.changes[0]
    assert best.fits and "--micro-batch" in best.command and best.source == advice.SCALED


def test_a_module_of_the_users_own_gets_python(tiny_artifact: Make) -> None:
    pytest.importorskip("torch")
    path = tiny_artifact()
    need = Artifact.read(path).predicted_peak_bytes
    (change, *_) = simulate(path, memory=int(need * 0.9), run=False).advice.changes
    assert change.command.startswith(f"edge_bcs.export(edge_bcs.load({str(path)!r}, model=module)")
    assert "input_shape=(1, 8, 8)" in change.command
    # What it says is what `export` takes; only writing is left out.
    said: dict[str, Any] = {}
    stand_in = SimpleNamespace(
        load=lambda path, model: model,
        export=lambda sparse, folder, **options: said.update(options),
        **{name: getattr(edge_bcs, name) for name in ("Attack", "Memory")},
    )
    eval(change.command, {"edge_bcs": stand_in, "module": None})
    assert said["memory"].micro_batch is not None and said["attack"] == edge_bcs.Attack(steps=3)
    assert said.keys() <= inspect.signature(edge_bcs.export).parameters.keys()
