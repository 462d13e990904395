"""edge-bcs doctor."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_bcs.cli.common import examples, json_option, print_json
from edge_bcs.core.progress import Progress

if TYPE_CHECKING:
    from edge_bcs.core.machine import ThisMachine

_HOT = 80.0  # °C; boards slow down between 80 and 97
_LITTLE_MEMORY, _LITTLE_DISK = 128 << 20, 64 << 20
_EXACT_SINCE = (1, 23)  # of onnxruntime: the operator library owns every allocation
_JETSON = "NVIDIA"
_COOL = ("cool the board, or let training pause before it is throttled", "edge-bcs finetune … --max-temp 75")


@dataclass(frozen=True)
class Finding:
    """What was looked at and found; ``advice`` and the ``command`` that follows it, if something should be
    done; ``blocks`` if training cannot run before."""

    topic: str
    found: str
    advice: str = ""
    command: str = ""
    blocks: bool = False


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    default=".",
    help="The folder that runs will lie in; default: this one.",
)
@json_option
@examples("""
    edge-bcs doctor
    edge-bcs doctor -o /mnt/data/runs --json
""")
def command(output: str, as_json: bool) -> None:
    """Check this machine (libraries, processor, memory, clock, heat, disk) and say what to fix, and how.

    The exit status is 1 if training cannot run here.
    """
    from edge_bcs.core.machine import ThisMachine

    with Progress("looking at this machine"):
        findings = [*software(), *machine_findings(ThisMachine(), Path(output))]
    usable = not any(finding.blocks for finding in findings)
    if as_json:
        print_json({"usable": usable, "findings": [asdict(finding) for finding in findings]})
    else:
        width = max(len(finding.topic) for finding in findings)
        for finding in findings:
            mark = "✗" if finding.blocks else "!" if finding.advice else "✓"
            click.echo(f"  {mark} {finding.topic:<{width}}  {finding.found}")
            for line in filter(None, (finding.advice and f"→ {finding.advice}", finding.command)):
                click.echo(f"    {'':<{width}}  {line}")
    sys.exit(0 if usable else 1)


def software() -> Iterator[Finding]:
    """What is installed, and what it can enforce."""
    yield Finding("python", f"{platform.python_version()} on {platform.machine()}")
    installed = importlib.util.find_spec("onnxruntime") is not None
    if installed:
        yield _onnx_runtime()
    else:
        yield Finding("onnxruntime", "not installed: our own engine runs the training, with the same bits")
    yield _operators(installed)
    if importlib.util.find_spec("PIL") is None:
        yield Finding("pillow", "missing", "image files need it", "pip install 'edge-bcs[device]'")
    else:
        yield Finding("pillow", "installed")
    host = importlib.util.find_spec("torch") is not None
    yield Finding("torch", "installed" if host else "not installed (only export, train and bench need it)")


def _onnx_runtime() -> Finding:
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version >= _EXACT_SINCE:
        return Finding("onnxruntime", f"{onnxruntime.__version__}, keeps --memory to the byte")
    return Finding(
        "onnxruntime",
        f"{onnxruntime.__version__}, keeps --memory in whole chunks of its arena",
        "from 1.23 on it is kept to the byte",
        "pip install --upgrade 'onnxruntime>=1.23'",
    )


def _operators(with_onnx_runtime: bool) -> Finding:
    from edge_bcs.core.errors import EdgeBcsError
    from edge_bcs.runtime import budget
    from edge_bcs.runtime.library import library_path, register

    try:
        exact = True  # our own engine has one block of memory
        if with_onnx_runtime:
            import onnxruntime

            register(onnxruntime.SessionOptions())
            exact = budget.exact()
        kept = "exact byte budget" if exact else "byte budget kept by ONNX Runtime's arena"
        return Finding("operators", f"{library_path().name}, {budget.isa()} kernels, {kept}")
    except (EdgeBcsError, OSError, AttributeError) as error:
        reinstall = "pip install --force-reinstall --no-deps edge-bcs"
        return Finding("operators", f"the library does not load: {error}", "reinstall it", reinstall, True)


def machine_findings(machine: ThisMachine, folder: Path) -> Iterator[Finding]:
    """What the machine's own files say; ``folder`` is where runs will be saved."""
    from edge_bcs.runtime.engine import available_threads

    jetson = _JETSON in machine.model()
    yield Finding("board", machine.model() or "unknown")
    yield Finding("cores", f"{available_threads()} of {os.cpu_count()} for this process")
    yield from _clock(machine, jetson)
    yield from _memory(machine)
    yield from _disk(machine, folder)


def _clock(machine: ThisMachine, jetson: bool) -> Iterator[Finding]:
    governors = machine.governors()
    if set(governors) & {"powersave", "conservative"}:
        faster = "echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
        if jetson:
            faster = "sudo jetson_clocks"
        yield Finding("governor", ", ".join(governors), "it keeps the clock low while training", faster)
    elif governors:
        yield Finding("governor", ", ".join(governors))
    sensors = machine.temperatures()
    if sensors:
        hottest = max(sensors, key=lambda sensor: sensor.celsius)
        found = f"{hottest.celsius:.0f} °C ({hottest.name})"
        if hottest.celsius >= _HOT:
            yield Finding("temperature", found, *_COOL)
        else:
            yield Finding("temperature", found)
    else:
        yield Finding("temperature", "no sensor, so --max-temp cannot be used")
    causes = machine.throttling()
    if any("voltage" in cause for cause in causes):
        yield Finding("throttling", "; ".join(causes), "use the board's own power supply and a short cable")
    elif causes:
        yield Finding("throttling", "; ".join(causes), *_COOL)
    else:
        yield Finding("throttling", "none seen")


def _memory(machine: ThisMachine) -> Iterator[Finding]:
    from edge_bcs.core.units import format_bytes

    size = machine.memory()
    if "MemAvailable" in size:
        found = f"{format_bytes(size['MemAvailable'])} of {format_bytes(size.get('MemTotal', 0))} available"
        if size["MemAvailable"] < _LITTLE_MEMORY:
            advice = "interpreter and libraries alone take about 70 MiB: stop the desktop"
            yield Finding("memory", found, advice, "sudo systemctl isolate multi-user.target")
        else:
            yield Finding("memory", found)
    else:
        yield Finding("memory", "unknown")
    swaps = machine.disk_swaps()
    if swaps:
        off = "sudo swapoff -a"
        if (machine.root / "etc/dphys-swapfile").exists():  # Raspberry Pi OS 12 and older
            off = "sudo dphys-swapfile swapoff && sudo systemctl disable --now dphys-swapfile"
        elif (machine.root / "etc/rpi/swap.conf").exists():  # Raspberry Pi OS 13
            off = (
                "sudo mkdir -p /etc/rpi/swap.conf.d && printf '[Main]\\nMechanism=zram\\n' | "
                "sudo tee /etc/rpi/swap.conf.d/90-memory.conf && sudo reboot"
            )
        advice = "swapping wears the medium and slows every step: turn it off"
        yield Finding("swap", f"{format_bytes(size.get('SwapTotal', 0))} on {', '.join(swaps)}", advice, off)
    elif size.get("SwapTotal"):
        yield Finding("swap", f"{format_bytes(size['SwapTotal'])}, compressed in memory")
    else:
        yield Finding("swap", "none")


def _disk(machine: ThisMachine, folder: Path) -> Iterator[Finding]:
    from edge_bcs.core.units import format_bytes
    from edge_bcs.runtime.board.saving import DEFAULT_MAX_WRITES

    if folder.exists() and not folder.is_dir():
        yield Finding(
            "disk", f"{folder} is a file", "runs are saved in a folder: name one with -o", blocks=True
        )
        return
    medium = machine.medium(folder)
    found = f"{format_bytes(medium.free)} free on {medium.kind}"
    found += f" ({medium.filesystem})" if medium.filesystem else ""
    if medium.read_only:
        remount = f"sudo mount -o remount,rw {shlex.quote(medium.mount or '/')}"
        yield Finding("disk", f"{found}, read-only", "runs cannot be saved here", remount, blocks=True)
    elif not medium.writable:
        allow = f"sudo chown -R $USER {shlex.quote(str(folder.resolve()))}"
        yield Finding("disk", f"{found}, not yours to write", "runs cannot be saved here", allow, blocks=True)
    elif medium.free < _LITTLE_DISK:
        yield Finding(
            "disk", found, "make room: a run takes about three times its state", "df -h", blocks=True
        )
    elif medium.kind == "memory":
        yield Finding("disk", found, "what is saved here is lost without power: choose another -o")
    elif medium.kind in ("SD card", "eMMC"):
        yield Finding("disk", f"{found}; finetune writes at most {DEFAULT_MAX_WRITES} an hour (--max-writes)")
    else:
        yield Finding("disk", found)
