"""Where the operator library lies, and how a session gets it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_bcs.core.errors import EdgeBcsError

if TYPE_CHECKING:
    import onnxruntime

_NAME = "libedge_bcs_ops.so"


def library_path() -> Path:
    """Returns the path of the operator library.

    Looks at the environment variable ``EDGE_BCS_LIBRARY``, then for a development build in ``build/native``
    of a source checkout, then beside this module, then in the installed package.

    Raises:
        EdgeBcsError: there is none at any of these places.
    """
    named = os.environ.get("EDGE_BCS_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise EdgeBcsError(f"EDGE_BCS_LIBRARY names {named}, which is not a file.")
        return Path(named)
    here = Path(__file__).resolve().parent
    for place in (here.parent / "build" / "native", here):
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
