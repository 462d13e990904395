"""`write_project`: from an artifact to a C project that trains it on a microcontroller.

The project has everything but the compiler: the program, the manifest and the state as arrays, a static
arena, the runner's sources, a linker script with the sizes of the memories, and a Makefile, which also makes
the same program for a PC.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import edge_bcs.runtime
from edge_bcs.runtime.archive import LARGEST_MANIFEST
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.manifest import MANIFEST, PROGRAM, STATE
from edge_bcs.runtime.program import arena_bytes
from edge_bcs.targets.microcontrollers import CORES, STACK_BYTES, VARIABLES, Microcontroller, pool_bytes

from edge_bcs import __version__
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small
from edge_bcs.core.settings import Attack
from edge_bcs.core.units import format_bytes

_TEMPLATES = Path(__file__).resolve().parent / "template"
_NATIVE = Path(edge_bcs.runtime.__file__).resolve().parent / "native"
_ROOMS = ("ops", "kernels", "runner", "session", "image", "freestanding", "include")
# What needs an operating system, and what only ONNX Runtime or Python call.
_LEFT_OUT = {
    *("ops/ort_training.cpp", "runner/pool.cpp", "runner/interface.cpp"),
    *("session/archive_files.cpp", "session/tar_header.cpp"),
    *("session/folder_files.cpp", "session/lock.cpp", "session/run_folder.cpp"),
}
_MARKER = "network.h"


def check_folder(folder: Path) -> None:
    """Raise EdgeBcsError unless a project may be written into ``folder``."""
    try:
        free = not folder.exists() or not any(folder.iterdir()) or (folder / "src" / _MARKER).is_file()
    except OSError:
        free = False
    if not free:
        raise EdgeBcsError(f"{folder} exists and holds no project of edge-bcs; choose another -o.")


def check_attack(attack: Attack) -> None:
    """Raise EdgeBcsError for an attack that would have to be watched."""
    if attack.single_step:
        raise EdgeBcsError(
            f"a microcontroller cannot watch {attack.kind}: export it with --training-attack pgd; "
            "--attack-steps says of how many steps."
        )


def write_project(artifact: Artifact, board: Microcontroller, folder: str | Path) -> Path:
    """Write the project of ``artifact`` for ``board`` into ``folder``, which is new or holds such a project.

    Raises:
        EdgeBcsError: the network does not fit, or the folder holds something else.
    """
    folder = Path(folder)
    arena = arena_bytes(artifact)
    if arena is None:
        raise EdgeBcsError(f"{artifact.path} has no {PROGRAM}; export it again.")
    if STATE not in artifact.manifest["files"]:
        raise EdgeBcsError(f"{artifact.path} is a run; export it by --checkpoint first.")
    check_attack(artifact.objective.attack)
    contents = {name: artifact.read_file(name) for name in (PROGRAM, STATE)}
    contents[MANIFEST] = read_small(artifact.path / MANIFEST, LARGEST_MANIFEST)
    pool = pool_bytes(len(contents[PROGRAM]), len(contents[MANIFEST]))
    room = board.ram - pool - VARIABLES - STACK_BYTES
    if arena > room:
        raise EdgeBcsError(
            f"{artifact.path} does not fit into the {format_bytes(board.ram)} of {board.title}: the program "
            f"needs {format_bytes(board.ram - room)} beside its arena of {format_bytes(arena)}; "
            + (
                f"export with --memory {room >> 10}KiB, or a sparser or smaller network."
                if room > 0
                else "export a network of fewer layers."
            )
        )
    check_folder(folder)
    _copy_sources(folder)
    fill = {
        "TITLE": board.title,
        "CPU": CORES[board.core],
        "VERSION": __version__,
        "BOARD": "board_qemu" if board.emulator else "board_stm32h7",
        "EMULATION": ""
        if board.emulator is None
        else "\n# make run: the program in QEMU (apt-get install qemu-system-arm).",
        "PHONY": " run" if board.emulator else "",
        "RUN": "" if board.emulator is None else _RUN.format(machine=board.emulator),
        "VECTORS_ORIGIN": hex(board.vectors_origin),
        "FLASH_ORIGIN": hex(board.flash_origin),
        "FLASH_BYTES": str(board.flash),
        "RAM_ORIGIN": hex(board.ram_origin),
        "RAM_BYTES": str(board.ram),
        "STACK_BYTES": str(STACK_BYTES),
    }
    source = folder / "src"
    source.mkdir(parents=True, exist_ok=True)
    for template in _TEMPLATES.iterdir():
        place = folder if template.name in {"Makefile", "board.ld"} else source
        (place / template.name).write_text(_filled(template.read_text(), fill))
    (source / "network.c").write_text(_arrays(contents))
    (source / "sizes.h").write_text(_sizes(arena, pool, board))
    return folder


_RUN = (
    "\nrun: build/network.elf\n"
    "\tqemu-system-arm -M {machine} -nographic -monitor none -serial none \\\n"
    "\t    -semihosting-config enable=on,target=native -kernel build/network.elf\n"
)


def _copy_sources(folder: Path) -> None:
    if not _NATIVE.joinpath("include", "edge_bcs.h").is_file():
        raise EdgeBcsError(f"the runner's sources are not at {_NATIVE}; install edge-bcs again.")
    into = folder / "edge_bcs"
    shutil.rmtree(into, ignore_errors=True)
    for room in _ROOMS:
        for file in sorted((_NATIVE / room).glob("*.*")):
            name = f"{room}/{file.name}"
            if (
                name in _LEFT_OUT
                or file.suffix not in {".h", ".cpp"}
                or (room == "image" and file.suffix != ".h")
            ):
                continue
            (into / room).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, into / name)


def _filled(text: str, fill: Mapping[str, str]) -> str:
    for name, value in fill.items():
        text = text.replace(f"@{name}@", value)
    return text


def _sizes(arena: int, pool: int, board: Microcontroller) -> str:
    return (
        "/* In bytes, and as addresses. Written by edge-bcs export. */\n"
        f"#define ARENA_BYTES {max(arena, 64)}\n"
        f"#define POOL_BYTES {pool}\n"
        f"#define SLOTS_ORIGIN {hex(board.slots_origin)}\n"
        f"#define SLOT_BYTES {board.slot_bytes}\n"
    )


def _arrays(contents: Mapping[str, bytes]) -> str:
    names = {MANIFEST: "manifest", PROGRAM: "program", STATE: "state"}
    parts = ['#include "network.h"\n']
    for file, name in names.items():
        content = contents[file]
        lines = [",".join(map(str, content[at : at + 32])) for at in range(0, len(content), 32)]
        parts.append(
            f"/* {file} */\n_Alignas(8) const unsigned char network_{name}[] = {{\n"
            + ",\n".join(lines)
            + "};"
        )
        parts.append(f"const size_t network_{name}_bytes = sizeof network_{name};\n")
    return "\n".join(parts)
