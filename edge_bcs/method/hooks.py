"""What a network does beside its layers: hooks that lie on its modules, so that copies of it keep them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edge_bcs.core.normalization import Normalization
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.method.wrappers import logits_among


def _remember_variance(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if module.training:
        assert isinstance(module.running_var, Tensor)
        module.variance_before = module.running_var.clone()


def _make_variance_biased(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Replace the unbiased batch variance that torch put into the running average by the biased one."""
    if module.training:
        before, running = module.variance_before, module.running_var
        assert isinstance(before, Tensor) and isinstance(running, Tensor)
        assert isinstance(module.momentum, float)
        kept = (1 - module.momentum) * before
        values = inputs[0].numel() // inputs[0].shape[1]
        # Through .data: autograd keeps the buffer for the backward pass, which never reads it.
        running.data.copy_(kept + (running - kept) * ((values - 1) / values))
        del module.variance_before


def keep_biased_variance(module: nn.Module) -> None:
    """Make a batch norm average biased variances; a module that already does stays as it is."""
    if not getattr(module, "keeps_biased_variance", False):
        module.register_forward_pre_hook(_remember_variance)
        module.register_forward_hook(_make_variance_biased)
        module.keeps_biased_variance = True  # type: ignore[assignment]


def normalization_of(network: nn.Module) -> Normalization | None:
    """Return the pixel normalisation that is part of `network`, if there is one."""
    found = getattr(network, "edge_bcs_normalize", None)
    return found if isinstance(found, Normalization) else None


def set_normalization(network: nn.Module, normalization: Normalization | None) -> None:
    """Make a pixel normalisation part of `network`, in the place of one that it may have."""
    if normalization is not None and normalization.identity:
        normalization = None
    network.edge_bcs_normalize = normalization  # type: ignore[assignment]
    if _normalized not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_normalized)


def resize_of(network: nn.Module) -> Resize:
    """Return how image files are brought to the size of `network`'s images."""
    found = getattr(network, "edge_bcs_resize", None)
    return found if isinstance(found, Resize) else SQUASH


def _normalized(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Normalise the images before the network reads them."""
    normalization = normalization_of(network)
    if normalization is None:
        return None
    images, *others = inputs
    mean, std = (images.new_tensor(side)[:, None, None] for side in (normalization.mean, normalization.std))
    return ((images - mean) / std, *others)


def take_logits(network: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
    """Return the logits of what the network returns, up to a number an image, on which no loss depends."""
    if not isinstance(output, Tensor):
        output, _ = logits_among(output)
    if getattr(network, "edge_bcs_ending", "") == "softmax" and isinstance(output, Tensor):
        return output.clamp_min(torch.finfo(output.dtype).tiny).log()
    return output
