"""The simulator: layouts, times by hand, verdicts, runs under a board's limits, and changes that are true."""

# mypy: disable-error-code="type-var"

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.buffers import aligned
from edge_bcs.targets import cost_model, outside, simulator, terminal
from edge_bcs.targets.cost_model import COSTS, KernelCosts, Walk
from edge_bcs.targets.host_run import measure
from edge_bcs.targets.layout import assign, letters, text_map
from edge_bcs.targets.outside import MEASURED, PREDICTED, predicted_outside
from edge_bcs.targets.plans import Allocation, MemoryPlan, Phase, plan_of
from edge_bcs.targets.roofline import machine_of, step_runs, step_time, this_host
from edge_bcs.targets.simulator import DOES_NOT_FIT, FITS, TIGHT
from rich.console import Console

from edge_bcs import EdgeBcsError, targets
from edge_bcs.cli import main
from edge_bcs.simulation import simulate

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 of 4 channels on 16×16 images, TRADES with batch statistics, micro-batch 16."""
    pytest.importorskip("torch")
    import edge_bcs

    network = edge_bcs.models.resnet18(num_classes=10, width=0.0625, input_size=16)
    sparse = edge_bcs.sparsify(network, sparsity="0.9", seed=0)
    folder = tmp_path_factory.mktemp("resnet") / "artifact"
    options: dict[str, Any] = {"objective": "trades", "batch_norm": "batch"}
    edge_bcs.export(
        sparse,
        folder,
        input_shape=(3, 16, 16),
        memory=edge_bcs.Memory(micro_batch=16),
        batch_size=32,
        validate=False,
        **options,
    )
    return folder


# Layout


def test_placing_four_tensors_by_hand() -> None:
    # The largest lies at 0; "small" fits above it, "late" reuses the place of the largest once that is gone.
    tensors = [
        Allocation("small", 10, "a", 0, 3),
        Allocation("large", 100, "a", 0, 1),
        Allocation("late", 60, "b", 2, 3),
        Allocation("last", 40, "b", 3, 3),
    ]
    layout = assign(tensors, alignment=1)
    assert layout.addresses == (100, 0, 0, 60)
    assert (layout.extent, layout.live) == (110, 110)


def test_no_two_tensors_share_a_byte_at_the_same_time() -> None:
    rng = random.Random(1)
    for _ in range(20):
        tensors = []
        for number in range(60):
            birth = rng.randrange(40)
            tensors.append(
                Allocation(str(number), rng.randrange(1, 1000), "a", birth, rng.randrange(birth, 40))
            )
        layout = assign(tensors, alignment=1)
        for step in range(40):
            live = [
                (address, address + tensor.bytes)
                for address, tensor in zip(layout.addresses, tensors, strict=True)
                if tensor.birth <= step <= tensor.death
            ]
            live.sort()
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(live))
            assert sum(end - start for start, end in live) <= layout.live <= layout.extent


def plainly(tensors: list[Allocation]) -> list[int]:
    """What `assign` does, a byte a unit, tried address by address."""
    lives = [range(tensor.birth, tensor.death + 1) for tensor in tensors]
    alive = [sum(t.bytes for t in tensors if t.birth <= step <= t.death) for step in range(40)]

    def placed(order: list[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for i in order:
            meets = [j for j in found if set(lives[i]) & set(lives[j])]
            below = {0, *(found[j] + tensors[j].bytes for j in meets)}
            found[i] = min(
                address
                for address in below
                if all(
                    address + tensors[i].bytes <= found[j] or address >= found[j] + tensors[j].bytes
                    for j in meets
                )
            )
        return found

    def extent(found: dict[int, int]) -> int:
        return max(address + tensors[i].bytes for i, address in found.items())

    def improved(order: list[int]) -> dict[int, int]:
        best = placed(order)
        for _ in range(40):
            top = min(range(len(tensors)), key=lambda i: (-best[i] - tensors[i].bytes, i))
            place = order.index(top)
            if extent(best) == max(alive) or place == 0:
                break
            order = [i for i in order if i != top]
            order.insert(place // 2, top)
            again = placed(order)
            best = again if extent(again) <= extent(best) else best
        return best

    sizes, spans = [t.bytes for t in tensors], [len(life) for life in lives]
    births = [t.birth for t in tensors]
    keys: list[Callable[[int], Any]] = [
        lambda i: (-sizes[i], births[i]),
        lambda i: (-spans[i], births[i], -sizes[i]),
        lambda i: (-sizes[i] * spans[i], births[i]),
        lambda i: (-max(alive[births[i] : births[i] + spans[i]]), -sizes[i]),
        lambda i: (births[i], -sizes[i]),
    ]
    results = [improved(sorted(range(len(tensors)), key=key)) for key in keys]
    least = min(results, key=extent)
    return [least[i] for i in range(len(tensors))]


def test_places_are_those_of_the_plain_search() -> None:
    rng = random.Random(2)
    for _ in range(12):
        tensors = []
        for number in range(25):
            birth = rng.randrange(40)
            size = rng.choice([1, 8, 8, rng.randrange(1, 60)])
            tensors.append(Allocation(str(number), size, "a", birth, min(39, birth + rng.randrange(15))))
        assert assign(tensors, alignment=1).addresses == tuple(plainly(tensors))


def phase(**changes: Any) -> Phase:
    tensors = (
        Allocation("x", 3072, "activations kept for backward", 0, 1),
        Allocation("y", 1024, "workspace", 1, 2),
    )
    values: dict[str, Any] = {
        "name": "training",
        "peak_bytes": 4096 + 1000,
        "peak_node": "b",
        "categories": {"activations kept for backward": 3072, "workspace": 1024, "values": 1000},
        "nodes": ("a", "b", "c"),
        "flops": (2_000_000, 1_000_000, 0),
        "moved": (1000, 6_000_000, 0),
        "allocations": tensors,
    }
    return Phase(**{**values, **changes})


def test_the_map_in_letters() -> None:
    key = letters([phase()])
    assert key == {"activations kept for backward": "A", "workspace": "W"}
    lines = text_map(phase(), key, height=4)
    assert [line.split("│")[1] for line in lines] == ["AA.", "AA.", "AA.", ".WW"]
    assert [line.split("│")[0].strip() for line in lines] == ["0 B", "1.0 KiB", "2.0 KiB", "3.0 KiB"]
    assert "allocates nothing" in text_map(phase(allocations=()), key)[0]


# Roofline


def test_the_time_of_a_step_by_hand() -> None:
    # A Zero 2 W: 4 cores of 8 GFLOP/s, a vector operation of 8 flops in 1 ns; 3.6 GB/s. Node a has 1000
    # entries on 2 tiles and 32 vectors each, node b moves 6 MB, a node takes a millisecond to start, and
    # a tenth of it more where threads share it. A second thread adds half a core, and one core moves a third
    # of the bandwidth, two half of it.
    costs = replace(COSTS["neon"], scaling=0.5, node=1e-3, fork=1e-4, stack=3.0, element=3.0)
    costs = replace(costs, sparse=KernelCosts(10, 5, 2))
    board = targets.load("raspberry-pi-zero-2w")
    board = replace(board, calibration=replace(machine_of(board), costs=costs))
    walks = ((Walk("sparse", 1000, 8, 16, 16),), (), ())
    plan = MemoryPlan(5096, {"coo.value": 1000}, {"training": phase(walks=walks, moved=(0, 6_000_000, 0))})
    for threads, compute, traffic in ((1, 84e-6, 3 * 6 / 3600), (2, 84e-6 / 1.5, 2 * 6 / 3600)):
        time = step_time(plan, {"training": 10}, board, threads)
        assert time is not None and time.flops == 30_000_000
        shared = 3e-4 if threads > 1 else 0.0
        assert time.seconds == pytest.approx(10 * (compute + traffic + 3e-3 + shared))
        assert time.memory_bound == pytest.approx(10 * traffic / time.seconds)


def test_fast_cores_come_first_and_no_more_than_there_are() -> None:
    board = targets.load("rk3588")  # 4 cores of 38.4 GFLOP/s and 4 of 14.4
    assert [round(sum(machine_of(board, n).arithmetic) / 1e9, 1) for n in (1, 4, 5, 8, 99)] == [
        38.4,
        153.6,
        168.0,
        211.2,
        211.2,
    ]


def test_without_figures_there_is_no_time() -> None:
    plan = MemoryPlan(5096, {}, {"training": phase(flops=(), moved=())})
    assert step_time(plan, {"training": 1}, targets.load("raspberry-pi-4"), 4) is None


def test_a_calibration_of_this_machine_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_BCS_CONFIG", str(tmp_path))
    assert this_host("avx2").calibration is None
    cores = this_host("avx2").cores
    machine = cost_model.Machine("avx2", (1e11,) * cores, 5e9, COSTS["avx2"], "mine")
    cost_model.save(machine)
    host = this_host("avx2")
    assert machine_of(host) == machine and host.bandwidth == 5e9
    assert this_host("avx512").calibration is None  # other kernels


@pytest.mark.parametrize(
    ("objective", "runs"),
    [
        ("natural", {"attack": 0, "eval": 0, "training": 4, "optimizer": 1}),
        ("at", {"attack": 12, "eval": 0, "training": 4, "optimizer": 1}),
        ("mixed", {"attack": 6, "eval": 0, "training": 4, "optimizer": 1}),
        ("trades", {"attack": 12, "eval": 4, "training": 4, "optimizer": 1}),
    ],
)
def test_runs_a_step_are_those_of_the_trainer(
    tiny_artifact: Make, objective: str, runs: dict[str, int]
) -> None:
    path = tiny_artifact(objective=objective)
    assert step_runs(Artifact.read(path)) == runs
    measured = measure(str(path), None, 1, 20.0)
    assert measured["timed_micro_batches"] == measured["micro_batches_per_step"]
    assert {name: measured["phases"].get(name, {}).get("runs_per_step", 0) for name in runs} == runs


def test_a_part_of_the_micro_batches_stands_for_all(tiny_artifact: Make) -> None:
    measured = measure(str(tiny_artifact(objective="mixed")), None, 1, 0.0)
    assert (measured["timed_micro_batches"], measured["micro_batches_per_step"]) == (1, 4)
    runs = {name: phase["runs_per_step"] for name, phase in measured["phases"].items()}
    assert runs == {"attack": 6, "eval": 0, "training": 4, "optimizer": 1, "lists": 0}
    graphs = sum(phase["seconds_per_step"] for phase in measured["phases"].values())
    assert 0 < graphs <= measured["seconds_per_step"] and 0 <= measured["cores_share"] <= 1


# The manifest's plan


def test_a_plan_that_contradicts_itself_is_refused(tiny_artifact: Make) -> None:
    memory = Artifact.read(tiny_artifact()).manifest["memory"]

    def refused(change: Callable[[dict[str, Any]], Any]) -> str:
        copy = json.loads(json.dumps(memory))
        change(copy)
        with pytest.raises(EdgeBcsError) as caught:
            plan_of(copy)
        return str(caught.value)

    training = memory["phases"]["training"]
    assert plan_of(memory).phases["training"].peak_bytes == training["peak_bytes"]
    assert "phases" in refused(lambda m: m.pop("phases"))
    assert "no phases" in refused(lambda m: m.update(phases={}))
    assert "predicts 1 bytes" in refused(lambda m: m.update(predicted_peak_bytes=1))
    assert "impossible life" in refused(lambda m: m["phases"]["training"]["tensors"][0].__setitem__(4, 999))
    assert "names a peak" in refused(lambda m: m["phases"]["training"]["tensors"][0].__setitem__(1, 10**9))
    assert "cost of" in refused(lambda m: m["phases"]["training"]["flops"].pop())
    for number in (-1, 10**400):
        assert "impossible cost" in refused(
            lambda m, number=number: m["phases"]["training"]["flops"].__setitem__(0, number)  # type: ignore[misc]
        )
    for place in (0, 2):  # name and category
        assert "impossible life" in refused(
            lambda m, place=place: m["phases"]["training"]["tensors"][0].__setitem__(place, [])  # type: ignore[misc]
        )


def test_a_plan_without_end_is_refused() -> None:
    """Nodes times tensors: minutes of additions from a small manifest."""
    nodes = ["n"] * 20_000
    phase = {"peak_bytes": 0, "peak_node": "n", "categories": {}, "nodes": nodes}
    phase["tensors"] = [["t", 0, "work", 0, len(nodes) - 1]] * 20_000
    with pytest.raises(EdgeBcsError, match="more than can be added up"):
        plan_of({"phases": {"training": phase}, "bound": {}, "predicted_peak_bytes": 0})


# Verdicts and runs


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["natural", "at", "mixed", "trades", "mart"])
def test_predicted_is_measured(tiny_artifact: Make, objective: str, batch_norm: str) -> None:
    path = tiny_artifact(objective=objective, batch_norm=batch_norm)
    need = Artifact.read(path).predicted_peak_bytes
    result = simulate(path, "raspberry-pi-zero-2w", memory=need, threads=1, seconds=0)
    assert result.measured_peak_bytes == result.predicted_peak_bytes == need
    assert result.verdict == TIGHT  # all of the budget is used
    assert result.measured is not None
    for name, entry in result.measured.phases.items():
        assert entry["peak_bytes"] == result.plan.phases[name].peak_bytes, name
    assert result.measured.rss_peak_bytes and 20 << 20 < result.measured.rss_peak_bytes < 350 << 20


def test_budgets_and_verdicts(tiny_artifact: Make) -> None:
    path = tiny_artifact()
    need = Artifact.read(path).predicted_peak_bytes

    def verdict(memory: int | str | None, target: str | None = None) -> tuple[str, int | None]:
        result = simulate(path, target, memory=memory, run=False)
        return result.verdict, result.budget

    assert verdict(None) == (FITS, None)
    assert verdict(need) == (TIGHT, need)
    assert verdict(int(need / 0.9)) == (TIGHT, int(need / 0.9))
    assert verdict(int(need / 0.89)) == (FITS, int(need / 0.89))
    assert verdict(need - 1) == (DOES_NOT_FIT, need - 1)
    assert verdict(None, "raspberry-pi-zero-2w") == (FITS, 16 << 20)
    assert simulate(tiny_artifact(memory="1MiB"), "raspberry-pi-5", run=False).budget == 1 << 20


def test_a_run_over_the_budget_is_stopped_by_the_allocator(tiny_artifact: Make) -> None:
    path = tiny_artifact()
    result = simulate(path, memory=Artifact.read(path).predicted_peak_bytes - 1, threads=1, seconds=0)
    assert not result.fits and result.measured_peak_bytes is None
    assert result.measured is not None and "memory budget exceeded" in result.measured.refused


def small_board(tmp_path: Path, usable: str) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(
        f'title = "Small"\n[memory]\ntotal = "512MiB"\nusable = "{usable}"\ndefault_budget = "8MiB"\n'
        'bandwidth = 1e9\n[cpu]\nisa = "neon"\n[[cpu.clusters]]\ncore = "a"\ncores = 1\nfrequency = 1e9\n'
        "flops_per_cycle = 8\n"
    )
    return path


def test_a_board_too_small_for_the_process(tiny_artifact: Make, tmp_path: Path) -> None:
    result = simulate(tiny_artifact(), small_board(tmp_path, "16MiB"), seconds=0)
    assert result.verdict == DOES_NOT_FIT
    assert result.measured is not None and result.measured.refused
    # The limit is one of the process, not of this one: a board with room for it runs the same artifact.
    assert simulate(tiny_artifact(), small_board(tmp_path, "400MiB"), seconds=0).verdict == FITS


def test_a_wrong_prediction_is_noticed(tiny_artifact: Make) -> None:
    good = Artifact.read(tiny_artifact())
    manifest = json.loads(json.dumps(good.manifest))
    memory = manifest["memory"]
    lists = aligned(memory["bound"].pop("coo.lists"))
    for content in memory["phases"].values():
        content["peak_bytes"] -= lists
    memory["predicted_peak_bytes"] -= lists
    result = simulate(dataclasses.replace(good, manifest=manifest), threads=1, seconds=0)
    assert result.exceeded and result.measured_peak_bytes == good.predicted_peak_bytes


def test_the_arena_of_our_own_engine_is_no_wrong_prediction(
    tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ONNX Runtime is not installed that is measured, with holes that the prediction has not."""
    result = simulate(tiny_artifact(), threads=1, seconds=0)
    assert result.measured is not None and result.measured.details["engine"] == "onnxruntime"
    arena = result.predicted_peak_bytes + 64
    monkeypatch.setattr("edge_bcs.targets.simulator.arena_bytes", lambda artifact: arena)
    for engine, peak, exceeded in (
        ("native", arena, False), ("native", arena + 1, True), ("onnxruntime", arena, True),
    ):  # fmt: skip
        details = {**result.measured.details, "engine": engine}
        measured = dataclasses.replace(result.measured, details=details, peak_bytes=peak)
        assert dataclasses.replace(result, measured=measured).exceeded == exceeded


def test_this_host_is_a_board() -> None:
    host = this_host("scalar")
    assert host.cores >= 1 and host.usable <= host.total and host.peak_flops > 1e8


# Outside the budget


def test_the_process_is_split_into_what_was_measured(resnet: Path) -> None:
    need = Artifact.read(resnet).predicted_peak_bytes
    result = simulate(resnet, memory=need, threads=1, seconds=0)
    measured, content = result.measured, result.to_json()
    assert measured is not None and measured.placed_peak_bytes and measured.rss_peak_bytes
    parts = content["outside"]
    assert parts.pop("source") == MEASURED
    assert parts["allocator_holes"] == measured.placed_peak_bytes - need == 0
    assert sum(parts.values()) == content["outside_bytes"] == measured.rss_peak_bytes - need
    assert content["process_bytes"] == measured.rss_peak_bytes
    assert content["placed_peak_bytes"] == measured.placed_peak_bytes
    with Trainer(resnet, engine="native", memory=need) as trainer:
        assert content["arena_bytes"] == trainer.peak_bytes == need
    # Python with numpy and ONNX Runtime alone, and four sessions of some dozen nodes.
    assert 30 << 20 < parts["interpreter_and_libraries"] < 150 << 20
    assert 2 << 20 < parts["sessions_and_graph"] < 20 << 20
    assert content["margin_bytes"] == 0  # no board was named


def test_what_was_simulated_is_what_finetune_takes(tiny_artifact: Make, tmp_path: Path) -> None:
    path = tiny_artifact()
    words = [
        "finetune",
        str(path),
        "--data",
        "digits",
        "--steps",
        "2",
        "--eval-samples",
        "4",
        "--threads",
        "1",
    ]
    # What is simulated has photographs and a bar on a terminal; digits into a pipe need neither.
    script = "import PIL.Image, rich.progress; from edge_bcs.cli import main; main()"
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run([*command, "-o", str(tmp_path / "run"), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)["memory"]
    assert memory["placed_peak_bytes"] == memory["peak_bytes"]
    result = simulate(path, threads=1, seconds=0)
    assert abs(result.process_bytes - memory["rss_bytes"]) < 3 << 20


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_not_run_is_predicted(resnet: Path, threads: int) -> None:
    measured = simulator.run_here(Artifact.read(resnet), None, None, threads, 0.0).outside
    plan = plan_of(Artifact.read(resnet).manifest["memory"])
    predicted = predicted_outside(plan, threads)
    assert measured is not None and predicted.source == PREDICTED
    assert abs(predicted.sessions + predicted.holes - measured.sessions - measured.holes) < 4 << 20
    assert simulate(resnet, threads=threads, run=False).outside == predicted_outside(
        plan, min(threads, this_host("scalar").cores)
    )


def test_the_prediction_grows_with_the_graph() -> None:
    few, many = phase(), phase(nodes=tuple(map(str, range(100))))
    small, large = (
        predicted_outside(MemoryPlan(5096, {"input": 3000}, {"training": p}), 1) for p in (few, many)
    )
    assert large.sessions - small.sessions == pytest.approx(97 * outside.NODE_BYTES, abs=1)
    once = predicted_outside(MemoryPlan(5096, {"input": 3000}, {"training": few, "lists": many}), 1)
    assert once == small  # its session is closed before the training begins


def test_the_recorded_figures_are_what_is_predicted_and_told() -> None:
    pytest.importorskip("torch")
    from edge_bcs.bench import outside as measured_outside

    folder = Path(__file__).resolve().parents[2] / "results" / "memory"
    content = json.loads((folder / "outside.json").read_text())
    assert (folder / "outside.md").read_text() == measured_outside.table(content)
    for row in content["rows"]:
        sessions, holes = outside.prediction(row["terms"])
        assert abs(sessions + holes - row["sessions_and_graph"] - row["allocator_holes"]) < outside.ACCURACY
    for name, value in measured_outside.fit(content["rows"]).items():
        assert getattr(outside, name) == pytest.approx(value, rel=0.02), name


def test_the_board_has_to_hold_what_lies_outside(tiny_artifact: Make, tmp_path: Path) -> None:
    result = simulate(tiny_artifact(), small_board(tmp_path, "400MiB"), run=False)
    assert result.margin_bytes == pytest.approx(result.outside.total / 4, abs=1)
    need = result.process_bytes + result.margin_bytes
    for usable, verdict in ((need, TIGHT), (need - 1, DOES_NOT_FIT)):
        found = simulate(tiny_artifact(), small_board(tmp_path, str(usable)), run=False)
        assert found.verdict == verdict
    assert (
        "the process, with a margin of 25 %" in found.failure and "1 more than the board's" in found.failure
    )


# Refusals and the command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "lots"}, "not a size"),
        ({"target": "commodore-64"}, "raspberry-pi-5"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_requests(tiny_artifact: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeBcsError, match=message):
        simulate(tiny_artifact(), run=False, **options)


def test_a_run_that_other_work_disturbed_says_so(tiny_artifact: Make) -> None:
    result = simulate(tiny_artifact(), "raspberry-pi-4", threads=1, seconds=0)
    assert result.measured is not None

    def shown(share: float) -> tuple[str, bool]:
        details = {**result.measured.details, "cores_share": share}
        measured = dataclasses.replace(result.measured, details=details)
        changed = dataclasses.replace(result, measured=measured)
        output = io.StringIO()
        terminal.show(changed, Console(file=output, width=200))
        time = simulator.calibrated_seconds(result.artifact, result.plan, result.expected, measured)
        assert changed.to_json()["measurement"]["disturbed"] == (time is None)
        return output.getvalue(), time is None

    text, disturbed = shown(0.3)
    assert "Other work took 70 % of the cores meanwhile" in text and disturbed
    text, disturbed = shown(0.95)
    assert "Other work" not in text and not disturbed


def test_a_run_that_dies_without_a_word_is_reported(
    tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator.sys, "executable", "/bin/false")
    with pytest.raises(EdgeBcsError, match="exit status 1"):
        simulate(tiny_artifact(), seconds=0)


def test_the_command_line(tiny_artifact: Make, tmp_path: Path) -> None:
    path, board = str(tiny_artifact()), str(small_board(tmp_path, "400MiB"))
    shown = CliRunner().invoke(main, ["simulate", path, "--target", board, "--seconds", "0"])
    assert shown.exit_code == 0, shown.output
    for text in (
        "FITS",
        "Small",
        "Address × time",
        "roofline",
        "Resident memory",
        "+0.00 %",
        "sessions and graph",
    ):
        assert text in shown.output, text
    result = CliRunner().invoke(main, ["simulate", "--no-run", "--memory", "9KiB", "--json", path])
    assert result.exit_code == 1 and "does not fit" in result.stderr
    content = json.loads(result.stdout)
    assert content["verdict"] == DOES_NOT_FIT and content["measured_peak_bytes"] is None
    assert content["predicted_peak_bytes"] == Artifact.read(path).predicted_peak_bytes
    listed = CliRunner().invoke(main, ["targets", board])
    assert listed.exit_code == 0 and "8.0 MiB" in listed.output
