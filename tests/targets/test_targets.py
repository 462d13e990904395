"""Board descriptions: what comes with the package is sound, and a bad file is refused by field."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from edge_bcs.targets.boards import Gpu
from edge_bcs.targets.cost_model import COSTS, Machine, save

from edge_bcs import targets
from edge_bcs.cli import main
from edge_bcs.core.errors import EdgeBcsError

GOOD = """
title = "A board of mine"
[memory]
total = "1GiB"
usable = "600MiB"
default_budget = "16MiB"
bandwidth = 4.0e9
[cpu]
isa = "neon"
[[cpu.clusters]]
core = "Cortex-A53"
cores = 4
frequency = 1.0e9
flops_per_cycle = 8
"""


def test_every_board_of_the_package_loads_and_names_its_sources() -> None:
    assert len(targets.names()) >= 14
    for name in targets.names():
        board = targets.load(name)
        assert board.default_budget <= board.usable <= board.total
        topics = {"memory", "usable", "bandwidth", "cpu", "arithmetic"}
        assert set(board.sources) == topics | ({"gpu"} if board.gpu else set())


def test_bandwidths_are_what_their_sources_compute() -> None:
    computed = []
    for name in targets.names():
        board = targets.load(name)
        bus = re.match(r"computed, the bus's peak: (\d+) MT/s × (\d+) bytes", board.sources["bandwidth"])
        if bus is not None:
            computed.append(name)
            assert board.bandwidth == pytest.approx(int(bus[1]) * 1e6 * int(bus[2]), rel=0.005), name
    assert set(targets.names()) - set(computed) == {"generic-aarch64", "generic-x86-64"}


def test_arithmetic_is_what_was_measured_elsewhere() -> None:
    """GFLOP/s of one core of each cluster, from benchmark_result/arm64 of github.com/pigirons/cpufp."""
    measured = {"raspberry-pi-4": [11.958], "raspberry-pi-5": [38.369], "rk3588": [38.012, 14.593]}
    for name, rates in measured.items():
        clusters = targets.load(name).clusters
        found = [cluster.peak_flops / cluster.cores / 1e9 for cluster in clusters]
        assert found == pytest.approx(rates, rel=0.02), name


def test_peak_arithmetic_of_the_zero_2_w() -> None:
    # 4 cores × 1 GHz × one 128-bit fused multiply-add (4 lanes × 2 operations) a cycle.
    assert targets.load("raspberry-pi-zero-2w").peak_flops == 32e9
    assert targets.load("raspberry-pi-zero-2w").total == 512 * 2**20


def test_a_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    board = targets.load(path)
    assert (board.name, board.usable, board.cores) == ("mine", 600 * 2**20, 4)


def test_a_users_own_file_with_what_was_measured_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('calibration = "measured.toml"\n' + GOOD)
    with pytest.raises(EdgeBcsError, match="`calibration` names"):
        targets.load(path)
    measured = Machine("neon", (8e9,) * 4, 3e9, COSTS["neon"], "Cortex-A53")
    save(measured, tmp_path / "measured.toml")
    assert targets.load(path).calibration == measured
    save(replace(measured, isa="avx2"), tmp_path / "measured.toml")
    with pytest.raises(EdgeBcsError, match="`calibration` names a machine with avx2"):
        targets.load(path)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('title = "A board of mine"', "", "title"),
        ("[cpu]", "[sources]\nusable = 5\n[cpu]", "sources.usable"),
        ("bandwidth = 4.0e9", "", "memory.bandwidth"),
        ("[memory]", "[memories]", "memories"),
        ('usable = "600MiB"', 'usable = "2GiB"', "memory.usable"),
        ('default_budget = "16MiB"', 'default_budget = "lots"', "memory.default_budget"),
        ('default_budget = "16MiB"', "", "memory.default_budget"),
        ("bandwidth = 4.0e9", "bandwidth = -1", "memory.bandwidth"),
        ('isa = "neon"', 'isa = "mmx"', "cpu.isa"),
        ("cores = 4", "cores = 0", "cpu.clusters[0].cores"),
        ("cores = 4", "cores = 4\ncolour = 1", "cpu.clusters[0].colour"),
        ("frequency = 1.0e9", 'frequency = "fast"', "cpu.clusters[0].frequency"),
    ],
)
def test_a_bad_file_is_refused_by_field(tmp_path: Path, old: str, new: str, field: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(EdgeBcsError, match=r"`" + field.replace("[", r"\[").replace("]", r"\]") + "`"):
        targets.load(path)


def test_a_field_is_missing_or_wrong_and_the_sentence_ends_once(tmp_path: Path) -> None:
    def refused(old: str, new: str) -> str:
        (tmp_path / "bad.toml").write_text(GOOD.replace(old, new))
        with pytest.raises(EdgeBcsError) as caught:
            targets.load(tmp_path / "bad.toml")
        return str(caught.value).partition("refused: ")[2]

    assert refused('title = "A board of mine"', "") == "`title` is missing: it must be text."
    assert refused('"A board of mine"', "5") == "`title` must be text."
    assert refused("bandwidth = 4.0e9", "") == "`memory.bandwidth` is missing: it must be a positive number."
    assert refused("bandwidth = 4.0e9", "bandwidth = nan") == "`memory.bandwidth` must be a positive number."
    assert refused('"16MiB"', '"lots"').endswith("or 6291456.")


def test_the_file_of_a_board_is_one_to_begin_with(tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["targets", "raspberry-pi-5", "--toml"])
    (tmp_path / "mine.toml").write_text(printed.output)
    assert targets.load(tmp_path / "mine.toml") == replace(targets.load("raspberry-pi-5"), name="mine")
    assert CliRunner().invoke(main, ["targets", "--toml"]).exit_code == 2
    unknown = CliRunner().invoke(main, ["targets", "../boards/raspberry-pi-5", "--toml"])
    assert unknown.exit_code == 1 and "No board is called" in unknown.output


def test_a_gpu_is_named_and_checked(tmp_path: Path) -> None:
    assert targets.load("jetson-orin-nano").gpu == Gpu(name="Ampere, 1024 CUDA cores", flops=1.28e12)
    assert targets.load("raspberry-pi-5").gpu is None
    for gpu, field in (
        ('[gpu]\nname = "G"', "gpu.flops"),
        ('[gpu]\nname = "G"\nflops = -1', "gpu.flops"),
        ('[gpu]\nname = ""\nflops = 1', "gpu.name"),
        ('[gpu]\nname = "G"\nflops = 1\ncores = 3', "gpu.cores"),
    ):
        (tmp_path / "mine.toml").write_text(f"{GOOD}\n{gpu}\n")
        with pytest.raises(EdgeBcsError, match=re.escape(f"`{field}`")):
            targets.load(tmp_path / "mine.toml")


def test_an_unknown_board_lists_the_known_ones() -> None:
    with pytest.raises(EdgeBcsError, match="raspberry-pi-5"):
        targets.load("commodore-64")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "torn.toml"
    path.write_text(GOOD[:40] + "\n[memory")
    with pytest.raises(EdgeBcsError, match="not valid TOML"):
        targets.load(path)


def test_this_room_knows_no_torch_and_no_onnx() -> None:
    code = "import sys, edge_bcs.targets.simulator, edge_bcs.targets.report, edge_bcs.targets.terminal;"
    code += "print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "scipy"} & set(done.stdout.split())
