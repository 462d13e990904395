"""What the tests of exported folders share: an export, its refusal, and artifacts that can be told apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

from click.testing import Result
from edge_bcs.runtime.artifact import Artifact

from helpers.artifacts import write_artifact

EXPORT = (
    "export", "--model", "resnet18", "--width", 0.05, "--input-size", 8, "--sparsity", 0.9,
    "--micro-batch", 2, "--no-validate",
)  # fmt: skip


def refused(result: Result) -> str:
    """The one sentence of a command that failed."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def content(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder by name."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


def write(folder: Path) -> None:
    """Fill the folder of an export with an artifact that can be told from others: its seed is 8."""
    write_artifact(folder, change=lambda description: description.update(seed=8))


def seed(folder: Path) -> int:
    return Artifact.read(folder).seed
