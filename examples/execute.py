"""Run notebooks and keep what they print: `python examples/execute.py examples/*.ipynb`.

Each notebook runs in a folder of its own that is removed, in one process, cell by cell. What a cell prints,
and the value of its last line, become its outputs. No Jupyter is needed; a cell that fails ends it all.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


def run_cell(source: str, names: dict[str, Any], where: str) -> tuple[str, Any]:
    """Execute a cell in ``names``; return what it printed and the value of its last line, if it has one."""
    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    return printed.getvalue(), value


def outputs(printed: str, value: Any, count: int) -> list[dict[str, Any]]:
    """The outputs of a cell as a notebook has them."""
    found: list[dict[str, Any]] = []
    if printed:
        found.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        found.append(
            {"output_type": "execute_result", "execution_count": count, "data": data, "metadata": {}}
        )
    return found


def execute(notebook: dict[str, Any], name: str) -> None:
    """Run all code cells of a notebook in the current folder and store their outputs in it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(code, 1):
        printed, value = run_cell("".join(cell["source"]), names, f"{name}, code cell {count}")
        cell["outputs"], cell["execution_count"] = outputs(printed, value, count), count


def main(files: list[str]) -> None:
    """Run every file and write it back."""
    warnings.simplefilter("ignore")
    for path in [Path(file).resolve() for file in files]:
        notebook = json.loads(path.read_text())
        before = Path.cwd()
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            try:
                execute(notebook, path.name)
            finally:
                os.chdir(before)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
