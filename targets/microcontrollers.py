"""Descriptions of microcontrollers: one TOML file each, checked field by field.

What the compiler needs to know of one: how much memory its program may use, where memories lie, and where a
training is saved. A user adds one with a file of the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_bcs.targets import boards

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small
from edge_bcs.core.metadata import parse_toml
from edge_bcs.core.units import parse_bytes

_FOLDER = Path(__file__).resolve().parent / "microcontrollers"
_VECTORS = 1024  # bytes of the table of interrupt vectors
STACK_BYTES = 16 << 10
"""Of the program's stack."""
VARIABLES = 20 << 10
"""Bytes of the variables of the library, the C library and main.c."""
CODE_BYTES = 650 << 10
"""About what the program's code takes of flash (results/native), whatever the network."""
CORES = {
    "cortex-m7": "-mcpu=cortex-m7 -mfpu=fpv5-d16 -mfloat-abi=hard",
    # Its vector unit does not round small numbers as others do.
    "cortex-m55": "-mcpu=cortex-m55+nomve -mfloat-abi=hard",
}
"""The cores that a program can be made for, with the compiler's options for each."""


@dataclass(frozen=True, kw_only=True)
class Microcontroller:
    """A microcontroller.

    Sizes are in bytes, origins are addresses. `ram` holds everything that changes; `default_budget` is the
    working set that training gets when the user names none; `slot_bytes` are those of each of two slots of
    flash that keep states. `emulator` is the name of QEMU's machine, if this is one.
    """

    name: str
    title: str
    core: str
    ram: int
    ram_origin: int
    default_budget: int
    flash: int
    flash_origin: int
    vectors_origin: int
    slots_origin: int
    slot_bytes: int
    frequency: float
    flops_per_cycle: float
    emulator: str | None
    sources: Mapping[str, str]


def names() -> list[str]:
    """Names of the microcontrollers that come with the package, in alphabetical order."""
    return boards.names_in(_FOLDER)


def is_one(target: str | Path) -> bool:
    """Whether a target, named as `load` takes it, is a microcontroller: by its name, or by its file."""
    path = Path(target)
    if path.suffix != ".toml":
        return str(target) in names()
    try:
        memory = parse_toml(read_small(path)).get("memory")
    except (OSError, ValueError):
        return False
    return isinstance(memory, dict) and "ram" in memory


def file_of(target: str | Path) -> Path:
    """The file of a microcontroller that is named as `load` takes it; see `boards.file_in`."""
    return boards.file_in(_FOLDER, target, "microcontroller")


def load(target: str | Path) -> Microcontroller:
    """Read a microcontroller by its name (see `names`) or from a user's own TOML file.

    Raises:
        EdgeBcsError: no such one, or a field that is missing or makes no sense; the message names it.
    """
    path = file_of(target)
    return _read(path, boards.document_of(path))


def pool_bytes(program: int, manifest: int) -> int:
    """Bytes of the block from which opening a network takes what it needs beside its arena.

    Args:
        program: bytes of its program. manifest: of its manifest. Both are read into structures that are some
            times as large; what was measured is less than this by a quarter.
    """
    return (4 * manifest + 3 * program // 2 + (24 << 10)) // 1024 * 1024


def _read(path: Path, document: Mapping[str, Any]) -> Microcontroller:
    def refused(field: str, what: str) -> EdgeBcsError:
        return EdgeBcsError(f"The board file {path} is refused: `{field}` {what}.")

    def table(name: str) -> Mapping[str, Any]:
        found = document.get(name, {})
        if not isinstance(found, dict):
            raise refused(name, "must be a table")
        return found

    def only(fields: Mapping[str, Any], known: set[str], prefix: str) -> None:
        for field in fields:
            if field not in known:
                raise refused(prefix + field, f"is unknown; the fields here are {', '.join(sorted(known))}")

    memory, cpu, sources = table("memory"), table("cpu"), table("sources")
    sizes, origins = (
        ("ram", "default_budget", "flash", "slot_bytes"),
        ("ram_origin", "flash_origin", "slots_origin"),
    )
    only(document, {"title", "emulator", "memory", "cpu", "sources"}, "")
    only(memory, {*sizes, *origins, "vectors_origin"}, "memory.")
    only(cpu, {"core", "frequency", "flops_per_cycle"}, "cpu.")

    def text(fields: Mapping[str, Any], name: str, prefix: str = "") -> str:
        found = fields.get(name)
        if not isinstance(found, str) or not found.strip():
            raise refused(prefix + name, "must be text")
        return found

    def size(name: str) -> int:
        try:
            return parse_bytes(memory[name])
        except (KeyError, EdgeBcsError, TypeError):
            raise refused(f"memory.{name}", "must be a size such as '512KiB'") from None

    def origin(name: str, otherwise: int | None = None) -> int:
        found = memory.get(name, otherwise)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << 32:
            raise refused(f"memory.{name}", "must be an address such as 0x24000000")
        return found

    def positive(name: str) -> float:
        found = cpu.get(name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < float("inf"):
            raise refused(f"cpu.{name}", "must be a positive number")
        return float(found)

    core = text(cpu, "core", "cpu.")
    if core not in CORES:
        raise refused("cpu.core", f"must be one of {', '.join(CORES)}, not {core!r}")
    for topic in sources:
        text(sources, topic, "sources.")
    flash, flash_origin = size("flash"), origin("flash_origin")
    vectors = origin("vectors_origin", flash_origin)
    if vectors == flash_origin:  # then the code follows them
        flash, flash_origin = flash - _VECTORS, flash_origin + _VECTORS
    return Microcontroller(
        name=path.stem,
        title=text(document, "title"),
        core=core,
        ram=size("ram"),
        ram_origin=origin("ram_origin"),
        default_budget=size("default_budget"),
        flash=flash,
        flash_origin=flash_origin,
        vectors_origin=vectors,
        slots_origin=origin("slots_origin"),
        slot_bytes=size("slot_bytes"),
        frequency=positive("frequency"),
        flops_per_cycle=positive("flops_per_cycle"),
        emulator=text(document, "emulator") if "emulator" in document else None,
        sources=dict(sources),
    )
