"""edge-bcs-run, where it was built."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime.library import library_path

_NAME = "edge-bcs-run"
TIMES = {"milliseconds", "milliseconds_per_step", "seconds", "rss_bytes", "bytes_per_hour", "bytes"}
"""What two runs of one training do not have in common; bytes are those of metrics, which hold times."""


@functools.cache
def program() -> Path:
    """The program: EDGE_BCS_PROGRAM, the one beside the library, or the installed one; skips without any."""
    installed = shutil.which(_NAME, path=str(Path(sys.executable).parent))
    places = [os.environ.get("EDGE_BCS_PROGRAM"), library_path().with_name(_NAME), installed]
    for place in places:
        if place is not None and Path(place).is_file():
            return Path(place)
    pytest.skip("edge-bcs-run is not built: it takes libjpeg-dev, libpng-dev and zlib1g-dev")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `edge-bcs-run` with these arguments does and prints."""
    words = [str(program()), *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def succeed(*arguments: object) -> dict[str, Any]:
    """Run with --json and return the object that standard output is."""
    result = run(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def refused(*arguments: object) -> str:
    """The one sentence with which a command ends that cannot do what it is asked for."""
    result = run(*arguments)
    assert result.returncode == 1, (result.stdout, result.stderr)
    *_, line = result.stderr.splitlines()
    return line.removeprefix("Error: ")


def timeless(content: Any) -> Any:
    """JSON without times."""
    if isinstance(content, dict):
        return {name: timeless(value) for name, value in content.items() if name not in TIMES}
    return [timeless(item) for item in content] if isinstance(content, list) else content


def metrics(run_folder: Path) -> list[Any]:
    """The lines of a run's metrics, without times."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [timeless(json.loads(line)) for line in lines]


def states(run_folder: Path) -> dict[str, bytes]:
    """The slots of a run."""
    return {file.name: file.read_bytes() for file in sorted(run_folder.glob("state*"))}
