"""What lies around a network: compilers and replicas are taken off, logits taken out of what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from edge_bcs.core.errors import EdgeBcsError

_LOGITS = ("logits", "out", "output", "prediction")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile`, DataParallel or DistributedDataParallel was given.

    Raises:
        EdgeBcsError: it is TorchScript, or has a part that is.
    """
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif getattr(module, "_orig_mod", None) is not None:
            module = cast(nn.Module, module._orig_mod)
        else:
            break
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise EdgeBcsError(
                f"{f'the module {name!r}' if name else 'the network'} is TorchScript, which shows no parts; "
                "give the torch.nn.Module that it was made from"
            )
    return module


def logits_among(result: Any) -> tuple[Any, str]:
    """Return the logits among what a network returns, and a clause that says what of it is left out.

    Of a tuple they are the first, of a mapping or a tuple with names what is called logits or out, else the
    first as well. Whatever is no tensor in the end is returned as it is.
    """
    if isinstance(result, Mapping):
        key = next((name for name in _LOGITS if name in result), next(iter(result), None))
        logits, count, called = result.get(key), len(result), repr(key)
    elif isinstance(result, (tuple, list)) and result:
        names = getattr(result, "_fields", ())
        position = next((names.index(name) for name in _LOGITS if name in names), 0)
        logits, count = result[position], len(result)
        called = repr(names[position]) if names else "the first"
    else:
        return result, ""
    said = f"of its {count} outputs only {called} is taken" if count > 1 else ""
    return logits, said
