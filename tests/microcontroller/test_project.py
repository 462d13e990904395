"""The C project for a microcontroller, without its compiler: what is in it, and what is refused."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from edge_bcs.targets import microcontrollers
from helpers import ROOT
from helpers.commands import run

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.units import format_bytes

pytest.importorskip("torch")
from edge_bcs.exporters.microcontroller import project
from edge_bcs.runtime import Artifact

Make = Callable[..., Path]
FILES = {"manifest": "manifest.json", "program": "program.bin", "state": "state.safetensors"}
BOARD = microcontrollers.load("stm32h7")


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Make) -> Path:
    return tiny_artifact()


@pytest.fixture(scope="module")
def written(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.write_project(Artifact.read(artifact), BOARD, tmp_path_factory.mktemp("project") / "c")


def defined(folder: Path, name: str) -> int:
    found = re.search(rf"^#define {name} (\w+)$", (folder / "src" / "sizes.h").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1], 0)


def test_arrays_are_the_bytes_of_the_artifact(artifact: Path, written: Path) -> None:
    text = (written / "src" / "network.c").read_text()
    for name, file in FILES.items():
        found = re.search(rf"network_{name}\[\] = \{{([0-9,\s]*)\}}", text)
        assert found is not None
        assert bytes(map(int, found[1].split(","))) == (artifact / file).read_bytes()


def test_the_linker_knows_the_memories(written: Path) -> None:
    script = (written / "board.ld").read_text()
    assert re.search(r"RAM \(rwx\) *: ORIGIN = 0x24000000, LENGTH = 524288\b", script)
    assert re.search(rf"FLASH \(rx\) *: ORIGIN = 0x8000400, LENGTH = {1792 * 1024 - 1024}\b", script)
    assert "@" not in script + (written / "Makefile").read_text().replace("$@", "").replace("\t@mkdir", "")
    assert defined(written, "SLOTS_ORIGIN") == 0x081C0000


def test_every_header_that_is_included_is_there(written: Path) -> None:
    """None of an operating system either, but for <unistd.h>, which newlib has."""
    sources = [*written.rglob("*.cpp"), *written.rglob("*.h"), *written.rglob("src/*.c")]
    assert len(sources) > 100
    for source in sources:
        for name in re.findall(r'^#include "([^"]+)"', source.read_text(), re.MULTILINE):
            places = (written / "edge_bcs", written / "src", source.parent)
            assert any((place / name).is_file() for place in places), (source, name)
        if source.name != "board_host.c":
            foreign = r"#include <(thread|mutex|fcntl\.h|sys/.*|filesystem|iostream|sstream|fstream)>"
            # A microcontroller's compiler never sees what Linux alone has.
            seen = re.sub(
                r"^#if [^\n]*\bdefined\(__linux__\)\n.*?^#endif", "", source.read_text(), flags=re.M | re.S
            )
            assert not re.search(foreign, seen), source


def test_a_network_that_does_not_fit_is_refused(artifact: Path, written: Path, tmp_path: Path) -> None:
    opened = Artifact.read(artifact)
    beside = 0
    arena = defined(written, "ARENA_BYTES")
    with pytest.raises(EdgeBcsError) as refused:
        project.write_project(opened, replace(BOARD, ram=arena), tmp_path / "c")
    found = re.search(r"needs ([\d.]+) KiB beside its arena of (.*); export a network", str(refused.value))
    assert found is not None and found[2] == format_bytes(arena)
    beside = int(float(found[1]) * 1024)
    assert beside > defined(written, "POOL_BYTES") + microcontrollers.STACK_BYTES
    with pytest.raises(EdgeBcsError, match=rf"fit into .*export with --memory {(arena - 1024) >> 10}KiB"):
        project.write_project(opened, replace(BOARD, ram=arena + beside - 1024), tmp_path / "c")
    assert not (tmp_path / "c").exists()
    project.write_project(opened, replace(BOARD, ram=arena + beside + 1024), tmp_path / "c")


def test_a_folder_of_others_is_left_alone(artifact: Path, written: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EdgeBcsError, match="holds no project of edge-bcs; choose another -o"):
        project.write_project(Artifact.read(artifact), BOARD, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    project.write_project(Artifact.read(artifact), BOARD, written)  # its own is written anew


def test_export_writes_it_beside_the_artifact(tmp_path: Path) -> None:
    network = f"{ROOT / 'examples' / 'microcontroller' / 'network.py'}:digits"
    out = tmp_path / "small"
    options = ["--model", network, "--input-shape", "1,8,8", "--sparsity", "0.97", "--no-validate"]
    result = run("export", *options, "--target", "stm32h7", "-o", out)
    assert result.exit_code == 0, result.output
    assert f"Next: make -C {out}-stm32h7" in result.output
    content = (tmp_path / "small-stm32h7" / "src" / "network.c").read_text()
    assert str(list((out / "program.bin").read_bytes()[:8]))[1:-1].replace(" ", "") in content
    assert Artifact.read(out).budget == BOARD.default_budget
    result = run("export", *options, "--target", "stm32h7", "--archive", "-o", tmp_path / "small.tar")
    assert result.exit_code != 0 and "is a folder: leave --archive" in result.output


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('ram = "512KiB"', "ram = 0", "memory.ram"),
        ("ram_origin = 0x24000000", 'ram_origin = "there"', "memory.ram_origin"),
        ('core = "cortex-m7"', 'core = "cortex-m0"', "cpu.core"),
        ("frequency = 480e6", "frequency = -1", "cpu.frequency"),
        ("slot_bytes", "slots", "memory.slots"),
    ],
)
def test_a_bad_file_is_refused_by_field(old: str, new: str, field: str, tmp_path: Path) -> None:
    content = microcontrollers.file_of("stm32h7").read_text()
    assert old in content
    (tmp_path / "mine.toml").write_text(content.replace(old, new))
    with pytest.raises(EdgeBcsError, match=f"`{field}`"):
        microcontrollers.load(tmp_path / "mine.toml")


def test_every_one_of_the_package_loads() -> None:
    assert set(microcontrollers.names()) == {"stm32h7", "mps2-an500", "mps3-an547"}
    for name in microcontrollers.names():
        assert microcontrollers.is_one(name) and microcontrollers.load(name).default_budget < 512 << 10
    assert not microcontrollers.is_one("raspberry-pi-5")
    result = run("targets", "stm32h7")
    assert result.exit_code == 0 and "STM32H743" in result.output


FAKE = """
#include <edge_bcs.h>
#include <string.h>
#include "slots.h"
/* A state is 1000 bytes of its number, or refused if they differ. */
static unsigned char flash[2 * 4096];
static unsigned char state[1000];
int calls, cut;
static int erase(size_t at, size_t bytes) { memset(flash + at, 0xff, bytes); return 0; }
static int program(size_t at, const void *data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) if (flash[at + i] != 0xff) return 1;
  if (++calls == cut) { memcpy(flash + at, data, bytes / 4); return 1; }
  memcpy(flash + at, data, bytes);
  return 0;
}
static const slots_flash where = {flash, 4096, erase, program};
edge_bcs_status edge_bcs_state_stream(edge_bcs_network *network, edge_bcs_writer write, void *user) {
  (void)network;
  for (size_t at = 0; at < sizeof state; at += 100)
    if (write(user, state + at, 100) != 0) return EDGE_BCS_STOPPED;
  return EDGE_BCS_OK;
}
edge_bcs_status edge_bcs_state_read(edge_bcs_network *network, const void *memory, size_t size) {
  (void)network;
  if (size != sizeof state || memcmp(memory, (const char *)memory + 1, size - 1) != 0) return EDGE_BCS_ERROR;
  memcpy(state, memory, size);
  return EDGE_BCS_OK;
}
void begin(void) { memset(flash, 0xff, sizeof flash); cut = 0; }
int save(int number, int fails_at) {
  calls = 0, cut = fails_at;
  memset(state, number, sizeof state);
  return slots_save(NULL, &where);
}
int load(void) { return slots_load(NULL, &where) == SLOTS_OK ? state[0] : -1; }
void damage(int at) { flash[at] ^= 4; }
"""


@pytest.fixture(scope="module")
def slots(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("slots")
    (folder / "fake.c").write_text(FAKE)
    template = ROOT / "exporters" / "microcontroller" / "template"
    include = [f"-I{template}", f"-I{ROOT / 'runtime' / 'native' / 'include'}"]
    options = ["-shared", "-fPIC", "-std=c11", "-Wall", "-Wextra", "-Werror", *include]
    subprocess.run(
        [compiler, *options, folder / "fake.c", template / "slots.c", "-o", folder / "slots.so"], check=True
    )
    return ctypes.CDLL(str(folder / "slots.so"))


def test_a_cut_anywhere_in_a_save_leaves_the_one_before(slots: ctypes.CDLL) -> None:
    slots.begin()
    assert slots.load() == -1
    assert slots.save(1, 0) == 0 and slots.load() == 1
    calls = ctypes.c_int.in_dll(slots, "calls").value
    assert calls == 1 + -(-1000 // 64)
    for number in range(2, 40):
        cut = (number - 2) % calls + 1
        assert slots.save(number, cut) != 0
        assert slots.load() == number - 1
        assert slots.save(number, 0) == 0 and slots.load() == number


def test_a_slot_that_rots_is_passed_over(slots: ctypes.CDLL) -> None:
    slots.begin()
    for number in (1, 2):
        assert slots.save(number, 0) == 0
    newest, older = 4096, 0
    slots.damage(newest + 64 + 500)
    assert slots.load() == 1
    slots.damage(older + 8)
    assert slots.load() == -1
    assert slots.save(3, 0) == 0 and slots.load() == 3


def test_simulate_says_what_the_project_takes(artifact: Path, written: Path, tmp_path: Path) -> None:
    found = json.loads(run("simulate", artifact, "--target", "stm32h7", "--json").stdout)
    assert found["fits"] and found["target"] == "stm32h7" and found["ram_limit_bytes"] == BOARD.ram
    assert found["arena_bytes"] == defined(written, "ARENA_BYTES") == found["ram"]["arena"]
    assert found["ram"]["what opening takes"] == defined(written, "POOL_BYTES")
    assert found["flash"]["state"] == (artifact / "state.safetensors").stat().st_size
    assert found["least_step_seconds"] > 0
    shown = run("simulate", artifact, "--target", "stm32h7")
    assert shown.exit_code == 0 and "STM32H743 (Cortex-M7): fits" in shown.output
    # By one byte less than the project needs, both refuse.
    board = microcontrollers.file_of("stm32h7").read_text()
    for change, what in ((f"{found['ram_bytes'] - 1}", "RAM"), (f"{found['ram_bytes']}", None)):
        file = tmp_path / "board.toml"
        file.write_text(board.replace('ram = "512KiB"', f'ram = "{change}"'))
        result = run("simulate", artifact, "--target", file)
        assert (result.exit_code == 1) == (what is not None)
        assert what is None or f"of {what} are needed" in result.output
    refused = run("simulate", artifact, "--target", "stm32h7", "--memory", "1MiB")
    assert refused.exit_code == 1 and "--memory is for boards" in refused.output


def test_a_microcontroller_that_is_unknown_is_named_with_those_that_are_known() -> None:
    with pytest.raises(EdgeBcsError, match="No microcontroller is called 'stm33': choose one of mps2-an500"):
        microcontrollers.file_of("stm33")
