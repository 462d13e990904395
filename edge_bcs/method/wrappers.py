"""What torch puts around a module: compilers and replicas are taken off, TorchScript is refused."""

from __future__ import annotations

import torch
from torch import nn

from edge_bcs.core.errors import EdgeBcsError


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile`, DataParallel or DistributedDataParallel was given.

    Raises:
        EdgeBcsError: it is TorchScript, or has a part that is.
    """
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if inner is None:
            break
        module = inner
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise EdgeBcsError(
                f"{f'the module {name!r}' if name else 'the network'} is TorchScript, which shows no parts; "
                "give the torch.nn.Module that it was made from"
            )
    return module
