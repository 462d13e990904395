"""What a user sees of the package before any document: dir(), help(), and how little importing it takes."""

from __future__ import annotations

import importlib
import inspect
import pydoc
import subprocess
import sys

import pytest

import edge_bcs

PACKAGES = ("", ".runtime", ".fleet", ".exporters", ".targets", ".data", ".models")


def package(name: str) -> object:
    pytest.importorskip("torch")
    return importlib.import_module(f"edge_bcs{name}")


@pytest.mark.parametrize("name", PACKAGES)
def test_dir_lists_what_is_public_and_nothing_else(name: str) -> None:
    module = package(name)
    listed = [item for item in dir(module) if not item.startswith("__")]
    assert listed == sorted(item for item in module.__all__ if not item.startswith("__"))  # type: ignore[attr-defined]
    assert not {"Any", "annotations", "Path", "importlib", "os"} & set(listed)
    for item in listed:
        assert getattr(module, item) is not None


def test_dir_imports_nothing() -> None:
    code = """
import sys, edge_bcs
assert {"sparsify", "train", "export", "load", "runtime"} <= set(dir(edge_bcs))
import edge_bcs.runtime
assert "Trainer" in dir(edge_bcs.runtime)
print(*sys.modules)
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "onnx", "onnxruntime", "numpy", "click"} & set(loaded.split())


@pytest.mark.parametrize("name", PACKAGES)
def test_help_begins_with_what_it_does(name: str) -> None:
    """No default of an argument is an object that prints itself over lines, or by its address."""
    module = package(name)
    for item in module.__all__:  # type: ignore[attr-defined]
        thing = getattr(module, item)
        if not callable(thing) or thing in (edge_bcs.EdgeBcsError, edge_bcs.runtime.BudgetExceeded):
            continue
        for parameter in inspect.signature(thing).parameters.values():
            if parameter.default is not parameter.empty:
                assert len(repr(parameter.default)) <= 20, f"{item}({parameter})"
        assert inspect.getdoc(thing), item
    text = pydoc.plain(pydoc.render_doc(edge_bcs.export))
    assert "attack: 'Attack | None' = None" in text and "epsilon" not in text.split("Args:")[0]
