"""`make order`: the functions that a training runs, beside each other, for edge-bcs-run's linker.

    python -m edge_bcs.bench.order build/native/edge-bcs-run cmake/order.ld

The system maps a program's file in pieces of 64 KiB, so functions that are used and lie among others that are
not bring these into memory. Trains the networks of `make resident` with the program (not stripped, its linker
map beside it) on x86-64 Linux with AVX-512, stops once at each function (ptrace), and lists sections of the
link in the order in which they were first run: what a training runs first, then what only opening does. Names
of sections that are no longer there do no harm, and new ones lie behind.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_bcs.bench.resident import CASES, exported, photographs

SETS = ("avx512", "avx2")
"""Instruction sets that the networks are trained with."""
OPTIONS = ("--steps", "1", "--eval-samples", "4", "--eval-steps", "1", "--threads", "1")
PHASE = "give_back_unused"
"""From this function on everything counts as run by the training."""
_TRACE_ME, _CONT, _GET_REGISTERS, _SET_REGISTERS = 0, 7, 12, 13
_RAX, _RIP, _RSP = 10, 16, 19  # their places among the registers


@dataclass(frozen=True)
class Section:
    """A piece of the link: where it lies, how long it is, its name and the object that it came from."""

    address: int
    size: int
    name: str
    origin: str

    @property
    def pattern(self) -> str:
        """What a linker script calls it: by name alone, or with its object where many share the name."""
        if re.fullmatch(r"\.text(\.\w{1,12})?", self.name):
            archive = re.search(r"([^/]+\.a)\(([^)]+)\)$", self.origin)
            return (
                f"*{archive[1]}:{archive[2]}({self.name})"
                if archive
                else f"*{Path(self.origin).name}({self.name})"
            )
        return f"*({self.name})"


def sections_of(linker_map: Path) -> list[Section]:
    """The sections of code, by address."""
    found = []
    text = linker_map.read_text().partition("Linker script and memory map")[2]
    for name, address, size, origin in re.findall(
        r"^ (\.text\S*)\s+0x([0-9a-f]+)\s+0x([0-9a-f]+) (\S+)$", text, re.M
    ):
        if int(size, 16) > 0 and int(address, 16) > 0:
            found.append(Section(int(address, 16), int(size, 16), name, origin))
    return sorted(found, key=lambda section: section.address)


def functions_of(program: Path) -> dict[int, str]:
    """Address of each function -> its name."""
    listing = subprocess.run(
        ["readelf", "-sW", program], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    rows = (line.split() for line in listing.splitlines())
    return {
        int(row[1], 16): row[7]
        for row in rows
        if len(row) > 7 and row[3] in ("FUNC", "IFUNC") and row[6] != "UND"
    }


class Traced:
    """A process that stops where it runs a function for the first time."""

    def __init__(self, command: Sequence[str], isa: str, skipped: int) -> None:
        self._skipped = skipped  # this function returns 0 at once
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self.process = os.fork()
        if self.process == 0:
            self._ptrace(_TRACE_ME)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            os.execve(command[0], list(command), {**os.environ, "EDGE_BCS_ISA": isa})
        os.waitpid(self.process, 0)
        self._memory = os.open(f"/proc/{self.process}/mem", os.O_RDWR)
        self._first_bytes: dict[int, bytes] = {}

    def _ptrace(self, request: int, data: object = None) -> None:
        if self._libc.ptrace(request, getattr(self, "process", 0), None, data) < 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    def stop_at(self, addresses: Iterable[int]) -> None:
        """Stop at these, once each."""
        for address in addresses:
            self._first_bytes.setdefault(address, os.pread(self._memory, 1, address))
            os.pwrite(self._memory, b"\xcc", address)

    def next(self) -> int | None:
        """Go on to the next function that has not run; None at the end of the process."""
        self._ptrace(_CONT)
        _, status = os.waitpid(self.process, 0)
        if os.WIFEXITED(status):
            os.close(self._memory)
            if os.WEXITSTATUS(status) != 0:
                raise RuntimeError(f"the program failed with status {os.WEXITSTATUS(status)}")
            return None
        if os.WIFSIGNALED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
            raise RuntimeError(f"the program ended with status {status}")
        registers = (ctypes.c_ulonglong * 27)()
        self._ptrace(_GET_REGISTERS, ctypes.byref(registers))
        address = int(registers[_RIP]) - 1
        if address == self._skipped:
            # What it would give back holds the places to stop at.
            after = os.pread(self._memory, 8, registers[_RSP])
            registers[_RAX], registers[_RIP] = 0, int.from_bytes(after, "little")
            registers[_RSP] += 8
        else:
            os.pwrite(self._memory, self._first_bytes[address], address)
            registers[_RIP] = address
        self._ptrace(_SET_REGISTERS, ctypes.byref(registers))
        return address


def run(command: Sequence[str], isa: str, functions: dict[int, str]) -> tuple[list[int], list[int]]:
    """Addresses of the functions in the order in which they first ran: before the training, and in it."""
    phase = next(address for address, name in functions.items() if PHASE in name)
    skipped = next(address for address, name in functions.items() if name in ("madvise", "__madvise"))
    traced = Traced(command, isa, skipped)
    traced.stop_at(functions)
    before: list[int] = []
    training: list[int] = []
    ran = before
    while (address := traced.next()) is not None:
        ran.append(address)
        if address == phase and ran is before:
            ran = training
            traced.stop_at(functions)
    return before, training


def main(program: Path, target: Path) -> None:
    """Train, and write the script."""
    functions = functions_of(program)
    sections = sections_of(program.with_name(program.name + ".map"))
    starts = [section.address for section in sections]
    opening: dict[Section, None] = {}
    training: dict[str, dict[Section, None]] = {isa: {} for isa in SETS}
    with tempfile.TemporaryDirectory() as scratch:
        data = photographs(Path(scratch))
        for network, statistics in CASES:
            artifact = exported(network, statistics, Path(scratch) / f"{network}-{statistics}", batch_size=16)
            for isa in SETS:
                out = Path(scratch) / "run"
                command = [program, "finetune", artifact, "--data", data, "-o", out, *OPTIONS]
                for into, ran in zip(
                    (opening, training[isa]), run(list(map(str, command)), isa, functions), strict=True
                ):
                    for address in ran:
                        place = bisect.bisect(starts, address) - 1
                        section = sections[place] if place >= 0 else None
                        if section is not None and address < section.address + section.size:
                            into.setdefault(section)
                shutil.rmtree(out)
                print(network, statistics, isa, len(opening), len(training[isa]), flush=True)
    target.write_text(script([*training.values(), opening]))


def script(groups: Iterable[Iterable[Section]]) -> str:
    """The linker script: each section once."""
    lines: dict[str, None] = {}
    for group in groups:
        for section in group:
            lines.setdefault(section.pattern)
            # 64-bit ARM has vectors half as long as AVX2, and the same functions else.
            if "12kernels_avx2" in section.pattern:
                lines.setdefault(
                    section.pattern.replace("12kernels_avx2", "12kernels_neon").replace("ILi8E", "ILi4E")
                )
    said = "Written by edge_bcs/bench/order.py: the functions that a training runs, beside each other."
    listed = "\n".join(f"    {line}" for line in lines)
    return f"/* {said} */\nSECTIONS\n{{\n  .text.used :\n  {{\n{listed}\n  }}\n}}\nINSERT BEFORE .text;\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
