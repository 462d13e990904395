"""Commands of edge-bcs that a bench runs as users do; what one says as JSON is kept, and not asked again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically


def told(file: Path, *words: Any) -> dict[str, Any]:
    """What a command says as JSON, which is kept in a file."""
    if not file.exists():
        write_atomically(file, command(*words).encode(), make_folder=True)
    content: dict[str, Any] = json.loads(read_small(file))
    return content


def command(*words: Any) -> str:
    """Run a command of edge-bcs and return its standard output; what it says on standard error is shown.

    Raises:
        EdgeBcsError: it failed.
    """
    arguments = [sys.executable, "-m", "edge_bcs", *map(str, words)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EdgeBcsError(f"edge-bcs {words[0]} failed, see above; the same command goes on")
    return done.stdout


def train(folder: Path, *words: Any) -> dict[str, Any]:
    """Run `edge-bcs train` with these words into a folder, resumed where it was cut; return what it says."""
    resumed = ["--resume"] if (folder / "last.safetensors").exists() else []
    return told(folder.with_suffix(".json"), "train", *words, "-o", folder, "--json", *resumed)


def export(folder: Path) -> Path:
    """Export a checkpoint to measure it, unless that is done; return the artifact."""
    artifact = folder / "artifact"
    if not (artifact / "manifest.json").exists():
        command("export", "--checkpoint", folder, "--micro-batch", 32, "-o", artifact)
    return artifact
