"""Commands of edge-bcs that a bench runs as users do; what one says as JSON is kept, and not asked again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_bcs.cli.training import is_begun
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_json

AUTOATTACK = ("--attack", "autoattack", "--engine", "sparse")
"""Words of `edge-bcs evaluate` that a sparse network is attacked with."""


def kept(file: Path, asked: Sequence[Any], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``find`` finds, which is kept in a file until something else is ``asked``."""
    question = [str(word) for word in asked]
    content = json.loads(read_small(file)) if file.exists() else {}
    if content.get("asked") != question:
        content = {"asked": question, "found": find()}
        write_json(file, content, make_folder=True)
    found: dict[str, Any] = content["found"]
    return found


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
    resumed = ["--resume"] if is_begun(folder) else []

    def trained() -> dict[str, Any]:
        report: dict[str, Any] = json.loads(command("train", *words, "-o", folder, "--json", *resumed))
        return report

    return kept(folder.with_name(f"{folder.name}.json"), words, trained)


def export(folder: Path) -> Path:
    """Export a checkpoint to measure it, unless that is done; return the artifact."""
    artifact = folder / "artifact"
    if not (artifact / "manifest.json").exists():
        command("export", "--checkpoint", folder, "--micro-batch", 32, "-o", artifact)
    return artifact


def evaluate(name: str, artifact: Path, *words: Any) -> dict[str, Any]:
    """Run `edge-bcs evaluate` with these words; return the accuracies, and of how many images.

    They are kept beside the artifact, in NAME.json.
    """

    def measured() -> dict[str, Any]:
        return accuracies(json.loads(command("evaluate", artifact, *words, "--json", "-")))

    return kept(artifact.parent / f"{name}.json", words, measured)


def accuracies(report: dict[str, Any]) -> dict[str, Any]:
    """What a row has of a measurement."""
    return {key: report[key] for key in ("accuracy", "robust_accuracy", "samples")}
