"""Where the operator library lies, and how its functions are called."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_bcs.core.errors import EdgeBcsError

_NAME = "libedge_bcs_ops.so"


def library_path() -> Path:
    """Returns the path of the operator library.

    Looks at the environment variable ``EDGE_BCS_LIBRARY``, then for a development build in ``build/native``
    of a source checkout, then in the folder ``runtime`` beside it or of this package, then in the installed
    package.

    Raises:
        EdgeBcsError: there is none at any of these places.
    """
    named = os.environ.get("EDGE_BCS_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise EdgeBcsError(f"EDGE_BCS_LIBRARY names {named}, which is not a file.")
        return Path(named)
    package = Path(__file__).resolve().parent.parent
    for place in (package.parent / "build" / "native", package.parent / "runtime", package / "runtime"):
        if (place / _NAME).is_file():
            return place / _NAME
    installed = _installed()
    if installed is not None and (installed / _NAME).is_file():
        return installed / _NAME
    raise EdgeBcsError(f"The operator library {_NAME} is missing: reinstall edge-bcs, or run `make native`.")


def load(signatures: Mapping[str, tuple[Any, list[Any]]]) -> ctypes.CDLL:
    """The operator library, for calls of these functions: name → (type of the result, of the arguments).

    Raises:
        EdgeBcsError: it is missing, or cannot be loaded.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EdgeBcsError(
            f"the operator library {path} cannot be loaded ({error}); reinstall edge-bcs."
        ) from None
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _installed() -> Path | None:
    """The folder of the installed package, for a checkout that was not built itself."""
    # Megabytes of modules, which a board that finds the library beside this one does without.
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return Path(str(distribution("edge-bcs").locate_file("edge_bcs/runtime")))
    except PackageNotFoundError:
        return None
