"""The model of time: walks counted by hand, costs found again from times that they made, and the file."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_bcs.targets import cost_model
from edge_bcs.targets.cost_model import (
    COSTS,
    KERNELS,
    UPDATES,
    WINOGRAD,
    KernelCosts,
    Machine,
    Sample,
    Walk,
    fit,
    fit_threads,
    load,
    save,
)

from edge_bcs import EdgeBcsError
from edge_bcs.bench import calibrate

HOST = Machine("avx512", (1e11, 1e11), 1e10, COSTS["avx512"], 'a "fast" one')


@pytest.mark.parametrize(
    ("isa", "rows", "floats", "run", "expected"),
    [
        # 32 pixels of 16 images: 32 vectors a row; tiles of 4 rows × 4 vectors.
        ("avx512", 32, 512, 512, (8 * 8, 32 * 32)),
        # 4 pixels of one image: a vector of 4 a row; tiles of 8 rows × 1.
        ("avx512", 4, 4, 4, (1, 4)),
        # 32 pixels of 3 images: 96 floats, 6 vectors a row: a tile across of 4 and one of 2.
        ("avx512", 32, 96, 96, (8 * 2, 32 * 6)),
        # With a stride, 8 lanes are what lies side by side: vectors of 8.
        ("avx512", 16, 16 * 8, 8, (4 * 4, 16 * 16)),
        # 2 lanes are too few for any vector.
        ("neon", 8, 8, 2, (2 * 2, 8 * 8)),
        # Half the registers: 15 rows are seven tiles of 2 rows and a strip of 1.
        ("avx2", 15, 32, 32, (7 + 1, 15 * 4)),
    ],
)
def test_tiles_and_vectors_by_hand(
    isa: str, rows: int, floats: int, run: int, expected: tuple[int, int]
) -> None:
    assert Walk("sparse", 1, rows, floats, run).tiles_and_vectors(isa) == expected


def test_seconds_by_hand() -> None:
    costs = replace(COSTS["neon"], scaling=0.5, node=1e-3, fork=1e-4, stack=2.0, sparse=KernelCosts(10, 5, 2))
    board = Machine("neon", (8e9, 8e9, 4e9), 1e9, costs)
    # A vector operation takes 8 flops / 8e9 s; two more cores add half of themselves: 1.75 cores.
    # 100 entries on 8 rows of 4 vectors: 2 tiles of 4×4, 32 vectors: 10 + 2·5 + 32·2 = 84 operations each.
    walk = Walk("sparse", 100, 8, 16, 16)
    assert board.compute_seconds([walk]) == pytest.approx(100 * 84 * 1e-9 / 1.75)
    assert board.on(1).compute_seconds([walk]) == pytest.approx(100 * 84 * 1e-9)
    # One core moves half of the bandwidth, 1.75 of them seven eighths, and three cores no more than all.
    # To start the operator and to share it among them takes 1.1 milliseconds; nobody to share it with, one.
    assert board.seconds([walk], 5000) == pytest.approx(1.1e-3 + 100 * 84e-9 / 1.75 + 8 / 7 * 5000 / 1e9)
    assert board.seconds([], 5000) == pytest.approx(1.1e-3 + 6 / 1.75 * 5000 / 1e9)
    assert board.on(1).seconds([], 5000) == pytest.approx(1e-3 + 6 * 5000 / 1e9)
    more = replace(board, arithmetic=(8e9,) * 4)
    assert more.seconds([walk], 5000) == pytest.approx(1.1e-3 + 100 * 84e-9 / 2.5 + 5000 / 1e9)


@pytest.mark.parametrize(
    ("isa", "kernel", "run", "expected"),
    [
        ("avx512", "dense", 16, "dense"),
        ("avx512", "dense", 4, "dense"),
        ("avx512", "dense", 2, "sparse"),  # single floats
        ("neon", "dense_gradient", 1, "sparse_gradient"),
        ("neon", "sparse", 1, "sparse"),
        ("scalar", "dense", 1, "dense"),  # never anything else there, so measured as what it is
        ("avx512", "rewire", 1, "rewire"),
        ("avx512", "winograd", 16, "dense"),
    ],
)
def test_a_dense_kernel_on_single_floats_costs_like_a_sparse_one(
    isa: str, kernel: str, run: int, expected: str
) -> None:
    walk = Walk(kernel, 100, 8, 16 * run, run)
    assert walk.costs_like(isa) == expected
    costs = replace(COSTS[isa], dense=KernelCosts(0, 1, 1), sparse=KernelCosts(10, 20, 30))
    if kernel == "dense":
        ours = Machine(isa, (1e9,), 1e9, costs).compute_seconds([walk])
        assert ours == Machine(isa, (1e9,), 1e9, costs).compute_seconds([replace(walk, kernel=expected)])


def test_winograds_products_take_three_quarters_where_they_fit_the_registers() -> None:
    walk = Walk("winograd", 100, 8, 64, 64, lanes=16)
    for isa, share in (("avx512", 0.75), ("neon", 0.75), ("avx2", 1), ("scalar", 1)):
        board = Machine(isa, (1e9,), 1e9, COSTS[isa])
        dense = board.compute_seconds([replace(walk, kernel="dense")])
        assert board.compute_seconds([walk]) == pytest.approx(share * dense)


def test_an_update_costs_by_its_connections() -> None:
    costs = replace(COSTS["neon"], scaling=0.5, node=1e-3, fork=0.0, stack=2.0, rewire=50, lists=20)
    board = Machine("neon", (8e9, 8e9), 1e9, costs)
    # A vector operation takes a nanosecond; one and a half cores reach three quarters of the bandwidth.
    for kernel, cost in (("rewire", 50), ("lists", 20)):
        seconds = board.seconds([Walk(kernel, 3000)], 6000)
        assert seconds == pytest.approx(1e-3 + 3000 * cost * 1e-9 / 1.5 + 4 / 3 * 6000 / 1e9)


def operators(seed: int) -> list[tuple[tuple[Walk, ...], int]]:
    """Walks and bytes of operators of all kinds."""
    random = np.random.default_rng(seed)
    found: list[tuple[tuple[Walk, ...], int]] = []
    for _ in range(200):
        kernel = (*KERNELS, WINOGRAD)[random.integers(5)]
        rows, floats = int(random.integers(4, 65)), int(4 * random.integers(1, 129))
        walks: tuple[Walk, ...] = (
            Walk(kernel, int(random.integers(50, 5000)), rows, floats, floats, 16 * int(random.integers(2))),
        )
        walks = walks if random.random() < 0.8 else ()
        if random.random() < 0.1:
            walks = (Walk(UPDATES[random.integers(2)], int(random.integers(1000, 100000))),)
        found.append((walks, int(random.integers(10_000, 10_000_000))))
    return found


def timed(machine: Machine, noise: float = 0.0) -> list[Sample]:
    """What ``machine`` takes for all kinds of operators, off by up to ``noise`` (a share) each."""
    random = np.random.default_rng(1)
    return [
        Sample(walks, moved, machine.seconds(walks, moved) * random.uniform(1 - noise, 1 + noise))
        for walks, moved in operators(0)
    ]


def test_costs_are_found_again() -> None:
    random = np.random.default_rng(0)
    costs = replace(COSTS["avx512"], **{k: KernelCosts(*random.uniform(1, 9, 3)) for k in KERNELS})
    costs = replace(costs, rewire=77.0, lists=13.0)
    true = replace(HOST, costs=replace(costs, stack=0.7, element=3.0, node=2e-5)).on(1)
    samples = timed(true)
    found = fit(samples, HOST)
    for sample in samples:
        assert found.on(1).seconds(sample.walks, sample.moved) == pytest.approx(sample.seconds, rel=1e-6)
    assert found.costs.node == pytest.approx(2e-5)
    assert (found.costs.scaling, found.costs.fork) == (HOST.costs.scaling, HOST.costs.fork)
    assert (found.costs.rewire, found.costs.lists) == pytest.approx((77.0, 13.0))
    with pytest.raises(EdgeBcsError, match="too few"):
        fit(samples[:3], HOST)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_what_threads_bring_and_cost_is_found_again(noise: float) -> None:
    true = replace(HOST, costs=replace(HOST.costs, scaling=0.7, fork=3e-5))
    found = fit_threads(timed(true, noise), HOST).costs
    assert found.scaling == pytest.approx(0.7, abs=1e-9 + 0.5 * noise)
    assert found.fork == pytest.approx(3e-5, rel=1e-6 + 2 * noise)
    assert replace(found, scaling=0.7, fork=3e-5) == true.costs  # nothing else is touched


def test_no_cost_is_negative() -> None:
    # Times that fall with the traffic are noise, not a cost.
    samples = [
        Sample((Walk("sparse", 1000, 8, 64 * n, 64 * n),), 10**6 * (40 - n), 1e-4 * n) for n in range(1, 40)
    ]
    found = fit(samples, HOST).costs
    assert found.stack == 0 and min(found.sparse.entry, found.sparse.tile, found.sparse.vector) >= 0


def test_the_file_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_BCS_CONFIG", str(tmp_path / "config"))
    assert load() is None
    assert save(HOST) == cost_model.default_path() == tmp_path / "config" / "machine.toml"
    assert load() == replace(HOST, processor="a 'fast' one")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("version = 2", "version = 1", "version"),
        ('"avx512"', '"mmx"', "isa"),
        ("arithmetic = [", "arithmetic = [-1, ", "arithmetic"),
        ("bandwidth = 1", "bandwidth = -1", "bandwidth"),
        ("[costs]", "[costs]\ncolour = 1", "colour"),
        ("scaling = ", "scaled = ", "scaling|scaled"),
        ("tile = ", "tile = nan # ", "tile"),
        ("[costs.dense]", "[costs.thick]", "thick"),
    ],
)
def test_a_bad_file_is_refused_by_field(tmp_path: Path, old: str, new: str, field: str) -> None:
    path = tmp_path / "machine.toml"
    save(HOST, path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(EdgeBcsError, match=f"`.*({field})") as error:
        load(path)
    assert "bench --calibrate" in str(error.value)


def test_of_runs_that_nothing_disturbed_the_median_counts() -> None:
    quiet, busy = calibrate.QUIET, calibrate.QUIET - 0.01
    assert calibrate.typical([1, 9, 2, 3, 50], [quiet, quiet, quiet, 1.0, busy]) == 2.5
    # Two are too few; of five runs a quarter, rounded up, is the second least.
    assert calibrate.typical([5, 1, 4, 2, 3], [quiet, quiet, busy, busy, busy]) == 2
    assert calibrate.typical([9.0], [busy]) == 9.0


def test_a_busy_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "cores_share", lambda threads: 0.4)
    with pytest.raises(EdgeBcsError, match="other work takes 60 % of the cores' time"):
        calibrate.calibrate(2)


class Timed:
    """A graph whose operators take what ``machine`` says, and are disturbed in each run but every third."""

    def __init__(self, machine: Machine, share: float) -> None:
        self.machine, self.share = machine, share
        self.rounds = 0

    def run(self) -> None:
        self.rounds += 1

    @property
    def undisturbed(self) -> int:
        return self.rounds // 3 if self.share >= calibrate.QUIET else 0

    @property
    def shares(self) -> list[float]:
        return [self.share] * self.rounds

    def samples(self, threads: int) -> list[Sample]:
        return timed(self.machine.on(threads))


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_further_cores_are_measured_only_on_a_quiet_machine(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    true = replace(HOST, costs=replace(HOST.costs, scaling=0.3, fork=5e-5, element=2.5))
    roof = calibrate.roof.Roof("a processor", 2, "avx512", (1e11, 1e11), ((1, 1e10),), ((1, 1e9),), "")
    graphs = [Timed(true, share), Timed(true, share)]
    monkeypatch.setattr(calibrate, "cores_share", lambda threads: share)
    monkeypatch.setattr(calibrate.roof, "measure", lambda threads: roof)
    monkeypatch.setattr(calibrate, "timed_graphs", lambda *_: graphs)
    found = calibrate.calibrate(2, runs=4, seconds=0.2)
    costs, assumed = found.machine.costs, COSTS["avx512"]
    assert costs.element == pytest.approx(2.5)
    expected = (0.3, 5e-5) if share == 1.0 else (assumed.scaling, assumed.fork)
    assert (costs.scaling, costs.fork) == pytest.approx(expected)
    assert found.available == pytest.approx(share) and found.quiet == (share == 1.0)
    # It waits for four undisturbed runs of each graph, but not for ever.
    assert graphs[0].rounds == 12 if share == 1.0 else graphs[0].rounds > 12


def test_a_graph_is_timed_on_one_thread_and_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SETTINGS", (("resnet18", "uniform", 0.99, (2,)),))
    graphs = calibrate.timed_graphs(2, str(tmp_path), lambda message: None)
    assert [graph.phase for graph in graphs] == ["attack", "training", "optimizer"]
    attack = graphs[0]
    attack.run()
    attack.run()
    assert len(attack.shares) == 2 * 2 * calibrate.IN_A_ROW and all(0 <= x <= 1 for x in attack.shares)
    one, all_ = attack.samples(1), attack.samples(2)
    assert len(one) == len(all_) == len(attack.setting.compiled.graphs["attack"].nodes)
    assert [s.walks for s in one] == [s.walks for s in all_] and any(sample.walks for sample in one)
    assert all(0 <= sample.seconds < 1 for sample in (*one, *all_))
