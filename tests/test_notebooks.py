"""The notebooks of examples/ are valid, keep what they print, and run from their first cell to their last."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import edge_bcs

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    return list(notebook["cells"])


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["board", "method"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_form_of_one_and_its_outputs(path: Path) -> None:
    """Of nbformat 4.5: what its schema requires of a cell, and that the cells were run in their order."""
    found = cells(path)
    names = [cell["id"] for cell in found]
    assert len(set(names)) == len(names)
    code = [cell for cell in found if cell["cell_type"] == "code"]
    for cell in found:
        required = {"id", "cell_type", "metadata", "source"}
        required |= {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == required and cell["cell_type"] in ("code", "markdown")
        assert all(line.endswith("\n") for line in cell["source"][:-1])
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(cell["outputs"] for cell in code)
    for cell in code:
        ast.parse("".join(cell["source"]))
        assert all(one["output_type"] in ("stream", "execute_result") for one in cell["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(path, tmp_path))
    kept = [cell["outputs"] for cell in cells(copy) if cell["cell_type"] == "code"]
    environment = {**os.environ, "PYTHONPATH": str(Path(edge_bcs.__file__).resolve().parents[1])}
    command = [sys.executable, str(EXAMPLES / "execute.py"), str(copy)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    now = [cell["outputs"] for cell in cells(copy) if cell["cell_type"] == "code"]
    assert [bool(one) for one in now] == [bool(one) for one in kept]


def test_a_cell_that_fails_ends_the_run(tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOKS[0].read_text())
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][:1]
    notebook["cells"][0]["source"] = ["1 / 0"]
    (tmp_path / "wrong.ipynb").write_text(json.dumps(notebook))
    command = [sys.executable, str(EXAMPLES / "execute.py"), str(tmp_path / "wrong.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert json.loads((tmp_path / "wrong.ipynb").read_text()) == notebook
