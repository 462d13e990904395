"""How a session gets the operator library; `edge_bcs.core.library` says where it lies."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.library import library_path, load

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["half_kernels", "half_precision", "library_path", "load", "register"]


def half_kernels() -> int:
    """What this machine can do in half precision: 2 if its processor has the arithmetic, 1 if only the scalar
    kernels, which are slow, compute it, 0 if nothing does."""
    return int(load({"edge_bcs_half_kernels": (ctypes.c_int, [])}).edge_bcs_half_kernels())


@contextmanager
def half_precision(half: bool) -> Iterator[None]:
    """Sessions that this thread opens inside this block keep their activations in half precision, if ``half``
    says so."""
    if not half:
        yield
        return
    switch = load({"edge_bcs_half_precision": (None, [ctypes.c_int])}).edge_bcs_half_precision
    switch(1)
    try:
        yield
    finally:
        switch(0)


@contextmanager
def _training_operators(path: Path) -> Iterator[None]:
    """What is registered inside this block has the operators of training builds, too."""
    library = ctypes.CDLL(str(path))
    library.edge_bcs_provide_training_operators(1)
    try:
        yield
    finally:
        library.edge_bcs_provide_training_operators(0)


def register(session_options: onnxruntime.SessionOptions, *, training_operators: bool = False) -> None:
    """Adds the operators of the domain ``edge_bcs`` to the sessions made with these options.

    Args:
        session_options: changed in place.
        training_operators: add those of training builds to the domain ``com.microsoft``, too.

    Raises:
        EdgeBcsError: the library is missing or does not load here.
    """
    path = library_path()
    try:
        with _training_operators(path) if training_operators else nullcontext():
            session_options.register_custom_ops_library(str(path))
    except Exception as error:
        raise EdgeBcsError(f"The operator library {path} does not load: {error}") from error
