"""edge-bcs doctor."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

import click

from edge_bcs.cli.common import examples, json_option, print_json

Finding = tuple[str, str, str]  # topic, what was found, what to do ("" if nothing)


@click.command()
@json_option
@examples("edge-bcs doctor")
def command(as_json: bool) -> None:
    """Check this machine (libraries, processor, memory, clock, temperature) and say what to fix.

    Exits with status 1 if training cannot run here.
    """
    findings = [*_software(), *_processor(), *_memory()]
    usable = not any(topic in ("onnxruntime", "operators") and advice for topic, _, advice in findings)
    if as_json:
        print_json(
            {
                "usable": usable,
                "findings": [
                    {"topic": topic, "found": found, "advice": advice} for topic, found, advice in findings
                ],
            }
        )
    else:
        width = max(len(topic) for topic, _, _ in findings)
        for topic, found, advice in findings:
            click.echo(f"  {'!' if advice else '✓'} {topic:<{width}}  {found}")
            if advice:
                click.echo(f"    {'':<{width}}  → {advice}")
    sys.exit(0 if usable else 1)


def _software() -> list[Finding]:
    findings: list[Finding] = [("python", f"{platform.python_version()} on {platform.machine()}", "")]
    if importlib.util.find_spec("onnxruntime") is None:
        findings.append(("onnxruntime", "not installed", "run `pip install 'edge-bcs[device]'`"))
        return findings
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    advice = (
        "" if version >= (1, 23) else "upgrade to 1.23 or newer, which can enforce the byte budget exactly"
    )
    findings.append(("onnxruntime", onnxruntime.__version__, advice))
    from edge_bcs.errors import EdgeBcsError
    from edge_bcs.runtime import budget
    from edge_bcs.runtime.library import library_path, register

    try:
        register(onnxruntime.SessionOptions())
        exact = "exact byte budget" if budget.exact() else "byte budget for the bound buffers only"
        findings.append(("operators", f"{library_path().name}, {budget.isa()} kernels, {exact}", ""))
    except (EdgeBcsError, OSError, AttributeError) as error:
        findings.append(("operators", "the operator library does not load", str(error)))
    host = importlib.util.find_spec("torch") is not None
    findings.append(
        ("torch", "installed" if host else "not installed (only export, train and bench need it)", "")
    )
    pillow = importlib.util.find_spec("PIL") is not None
    findings.append(
        ("pillow", "installed" if pillow else "missing", "" if pillow else "needed for image files")
    )
    return findings


def _processor() -> list[Finding]:
    from edge_bcs.runtime.engine import available_threads

    findings: list[Finding] = [
        ("processors", f"{available_threads()} of {os.cpu_count()} for this process", "")
    ]
    governor = _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        slow = governor in ("powersave", "conservative")
        findings.append(
            ("governor", governor, "set it to performance or schedutil while training" if slow else "")
        )
    degrees = [int(value) / 1000 for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp")
               if (value := _text(str(zone))).lstrip("-").isdigit()]  # fmt: skip
    if degrees:
        hot = max(degrees) >= 80
        findings.append(
            ("temperature", f"{max(degrees):.0f} °C", "cool the board, or it will throttle" if hot else "")
        )
    return findings


def _memory() -> list[Finding]:
    from edge_bcs.runtime.units import format_bytes

    fields = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines() if ":" in line)
    size = {
        name: int(fields[name].split()[0]) * 1024
        for name in ("MemTotal", "MemAvailable", "SwapTotal")
        if name in fields
    }
    if not size:
        return [("memory", "unknown", "")]
    available = size["MemAvailable"]
    low = available < 128 << 20
    findings = [
        (
            "memory",
            f"{format_bytes(available)} of {format_bytes(size['MemTotal'])} available",
            "free some: interpreter and libraries alone take about 65 MiB" if low else "",
        )
    ]
    if size.get("SwapTotal"):
        findings.append(
            ("swap", f"{format_bytes(size['SwapTotal'])} (wears SD cards; `swapoff -a` while training)", "")
        )
    return findings


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
