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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_bcs.checkpoint import TORCHSCRIPT, kind_of
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import reading
from edge_bcs.core.tensor_file import TensorFile
from edge_bcs.exportable import last_layer, with_outputs
from edge_bcs.method import heads
from edge_bcs.method.heads import NewHead
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


def load_weights(
    module: nn.Module,
    path: str | Path,
    classes: int | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    seed: int = 0,
) -> NewHead | None:
    """Replace all parameters and buffers of `module` by those in a file.

    Args:
        module: the network; its shapes must be those of the file, but for the last layer's if `classes` says
            how many outputs it shall have.
        path: a state dict, .pt or .pth of `torch.save`, or .safetensors.
        classes: outputs that the network has afterwards. If the file's last layer has as many, it is loaded
            like the others, whatever the module had; else the last layer is made anew, without the file's.
        input_shape: (C, H, W) of the images, if that is known: the last layer is found by them.
        seed: of the weights of a new last layer (see `edge_bcs.method.heads`).

    Returns:
        what is new; None if everything was loaded.

    Raises:
        EdgeBcsError: no such file, one that is truncated or holds no state dict, tensors that are missing,
            too many, of other shapes or not finite, or a last layer that cannot be told. The module is then
            as it was.
    """
    module, path = unwrapped(module), Path(path)
    stored = _renamed(read_weights(path), set(module.state_dict()))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if classes is None:
        _check(path, stored, module, shapes)
        _put(stored, module)
        return None
    layer = last_layer(module, input_shape)
    names = {f"{layer}.{kind}".removeprefix(".") for kind in ("weight", "bias")} & set(shapes)
    known = _outputs(stored, layer)
    if known == classes:
        shapes |= {name: (classes, *shapes[name][1:]) for name in names}
    else:
        stored = {name: tensor for name, tensor in stored.items() if name not in names}
        shapes = {name: shape for name, shape in shapes.items() if name not in names}
    _check(path, stored, module, shapes)
    before = known or heads.outputs(module, layer)
    new = with_outputs(module, classes, input_shape=input_shape, seed=seed)
    if known != classes and new is None:
        heads.renew(module, layer, classes, seed)
    _put(stored, module)
    return None if known == classes else NewHead(layer, before, classes)


def load_as_saved(module: nn.Module, path: str | Path, input_shape: Sequence[int] | None = None) -> None:
    """`load_weights` of everything in a file; the last layer gets as many outputs as it has there."""
    try:
        load_weights(module, path)
    except EdgeBcsError as fault:
        module = unwrapped(module)
        try:
            stored = _renamed(read_weights(path), set(module.state_dict()))
            layer = last_layer(module, input_shape)
        except EdgeBcsError:
            raise fault from None
        known = _outputs(stored, layer)
        if known in (None, heads.outputs(module, layer)):
            raise
        load_weights(module, path, known, input_shape=input_shape)


def _outputs(stored: Mapping[str, Tensor], layer: str) -> int | None:
    weight = stored.get(f"{layer}.weight".removeprefix("."))
    return None if weight is None or not weight.ndim else int(weight.shape[0])


def _check(
    path: Path, stored: Mapping[str, Tensor], module: nn.Module, wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `EdgeBcsError` unless a file has tensors of these shapes, and nothing else."""
    missing = [name for name in wanted if name not in stored and not _is_counter(name)]
    unknown = [name for name in stored if name not in wanted]
    other = [name for name in wanted if name in stored and tuple(stored[name].shape) != wanted[name]]
    faults = []
    if missing:
        faults.append(f"it lacks {_counted(missing, 'tensor')}")
    if unknown:
        faults.append(f"it has {_counted(unknown, 'tensor')} that the network has not")
    if other:
        theirs, ours = list(stored[other[0]].shape), list(wanted[other[0]])
        faults.append(f"{other[0]} is {theirs} in the file and {ours} in the network")
    if faults:
        raise EdgeBcsError(
            f"{path} does not fit the network: {'; '.join(faults)}. Make the network as it was when the file "
            "was saved; if only the number of classes is another, say how many there shall be (--classes)."
        )
    types = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    for name, tensor in stored.items():
        if tensor.is_floating_point() != types[name].is_floating_point or tensor.is_complex():
            raise EdgeBcsError(f"{path}: {name} is {tensor.dtype}, and {types[name]} in the network.")
        if not torch.isfinite(tensor).all():
            raise EdgeBcsError(f"{path}: {name} holds a number that is not finite.")


def _put(stored: Mapping[str, Tensor], module: nn.Module) -> None:
    """Load tensors that were checked; what they leave out stays."""
    module.load_state_dict({**module.state_dict(), **stored})


def _is_counter(name: str) -> bool:
    """Whether a tensor is a batch norm's counter, which old files lack."""
    return name.rpartition(".")[2] == _COUNTER


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
    if kind_of(path) == TORCHSCRIPT:
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
