"""Weights of the user's own, in a file: read into a torch module, with one sentence for what does not fit.

A file is what `torch.save(model.state_dict(), …)` or safetensors writes, or holds it where training scripts
put it: under "state_dict", "model" and the like, the average of the weights ("model_ema") before the last.
What wrappers add to the names (DataParallel, torch.compile) is taken off. Nothing but tensors is ever loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import reading
from edge_bcs.core.tensor_file import TensorFile
from edge_bcs.method.wrappers import unwrapped

_PLACES = (
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights", "params"),
)
"""Where training scripts keep a state dict in a larger one; the first that is there is taken."""
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.", "net.", "backbone.")
"""What may stand before every name."""
_COUNTER = "num_batches_tracked"
_SAVE = "save the state dict alone: torch.save(model.state_dict(), FILE)"
_DEEPEST = 4


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Replace all parameters and buffers of `module` by those in a file.

    Args:
        module: the network; its shapes must be those of the file.
        path: a state dict, .pt or .pth of `torch.save`, or .safetensors.

    Raises:
        EdgeBcsError: no such file, one that is truncated or holds no state dict, or tensors that are missing,
            too many, of other shapes or not finite. The module is then as it was.
    """
    module, path = unwrapped(module), Path(path)
    wanted = module.state_dict()
    stored = _renamed(read_weights(path), set(wanted))
    counters = {name for name in wanted if name.rpartition(".")[2] == _COUNTER}  # which old files lack
    missing = [name for name in wanted if name not in stored and name not in counters]
    unknown = [name for name in stored if name not in wanted]
    other = [name for name in wanted if name in stored and stored[name].shape != wanted[name].shape]
    faults = []
    if missing:
        faults.append(f"it lacks {_counted(missing, 'tensor')}")
    if unknown:
        faults.append(f"it has {_counted(unknown, 'tensor')} that the network has not")
    if other:
        theirs, ours = list(stored[other[0]].shape), list(wanted[other[0]].shape)
        faults.append(f"{other[0]} is {theirs} in the file and {ours} in the network")
    if faults:
        raise EdgeBcsError(
            f"{path} does not fit the network: {'; '.join(faults)}. Make the network as it was when the file "
            "was saved, with as many classes."
        )
    for name, tensor in stored.items():
        if tensor.is_floating_point() != wanted[name].is_floating_point() or tensor.is_complex():
            raise EdgeBcsError(f"{path}: {name} is {tensor.dtype}, and {wanted[name].dtype} in the network.")
        if not torch.isfinite(tensor).all():
            raise EdgeBcsError(f"{path}: {name} holds a number that is not finite.")
    module.load_state_dict({**{name: wanted[name] for name in counters}, **stored})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file, by the names that it has there.

    Raises:
        EdgeBcsError: there is no such file, or it holds no state dict.
    """
    path = Path(path)
    with reading(path):
        if not path.is_file():
            raise EdgeBcsError(f"there is no file {path}; --weights takes a state dict.")
        content = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    found = _state_dict(content)
    if not found:
        raise EdgeBcsError(f"{path} holds no state dict{_holds(content)}; {_SAVE}.")
    return found


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with TensorFile(path) as stored:
            return {name: torch.from_numpy(stored.read(name)) for name in stored.tensors}
    except (ValueError, TypeError) as error:
        raise EdgeBcsError(f"{path} is truncated or not a safetensors file ({error}).") from None


def _pickled(path: Path) -> Any:
    if _is_torchscript(path):
        raise EdgeBcsError(f"{path} is TorchScript; {_SAVE}, of the module that it was made from.")
    # What scripts save beside the weights: their arguments, which are nothing but names and values.
    safe = getattr(torch.serialization, "safe_globals", None)
    allowing = safe([argparse.Namespace]) if safe else contextlib.nullcontext()
    try:
        with allowing, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError):
        raise EdgeBcsError(f"{path} is truncated, or not a file of torch.save.") from None
    except Exception as error:
        # By its name: nothing in the package imports what unpickles (tests/test_hostile_files.py).
        if type(error).__name__ != "UnpicklingError":
            raise
        if re.search(r"GLOBAL|Unsupported (global|class)", str(error)):
            raise EdgeBcsError(f"{path} holds more than tensors, and only these are read; {_SAVE}.") from None
        raise EdgeBcsError(f"{path} is not a file of torch.save; {_SAVE}.") from None


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _state_dict(content: Any, depth: int = 0) -> dict[str, Tensor]:
    """The state dict in what a file holds, wherever it lies; empty if there is none."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return {}
    for place in _PLACES:
        if isinstance(content.get(place), Mapping):
            found = _state_dict(content[place], depth + 1)
            if found:
                return found
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors if all(isinstance(name, str) for name in tensors) else {}


def _renamed(stored: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Without what wrappers put before names, as far as that brings them nearer to ``wanted``."""
    stored = {name.replace("_orig_mod.", ""): tensor for name, tensor in stored.items()}
    if "n_averaged" in stored and "n_averaged" not in wanted:  # torch.optim.swa_utils.AveragedModel
        del stored["n_averaged"]
    while not wanted & set(stored):
        prefix = next((p for p in _WRAPPERS if stored and all(name.startswith(p) for name in stored)), None)
        if prefix is None:
            break
        stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    return stored


def _counted(names: list[str], what: str) -> str:
    if len(names) == 1:
        return f"the {what} {names[0]!r:.80}"
    return f"{len(names)} {what}s, the first of them {names[0]!r:.80}"


def _holds(content: Any) -> str:
    if isinstance(content, Mapping) and content:
        return f" but {', '.join(repr(key)[:40] for key in list(content)[:4])}"
    return f" but a {type(content).__name__}"
