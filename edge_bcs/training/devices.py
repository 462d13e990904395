"""Where torch computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method.attacks import evaluation_mode
from edge_bcs.method.sparse_model import SparseModel


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device of that name; a GPU if none is named and there is one, else the CPU.

    Raises:
        EdgeBcsError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EdgeBcsError(f"there is no kind of device {name!r}; give cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EdgeBcsError(
            f"there is no device {str(name)!r} here: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs"
        )
    return device


def fastest_layout(sparse: SparseModel, shape: Sequence[int]) -> torch.memory_format:
    """Return how images [C, H, W] of ``shape`` lie best on the network's device: channel by channel on the
    CPU; on a GPU, whose convolutions are faster so, pixel by pixel, unless the network looks at its maps by
    `Tensor.view`, which knows no other order than its own."""
    fast = sparse.index.device.type == "cuda" and takes_pixels(sparse, shape)
    return torch.channels_last if fast else torch.contiguous_format


def takes_pixels(sparse: SparseModel, shape: Sequence[int]) -> bool:
    """Whether the network takes images that lie in memory pixel by pixel (torch.channels_last), as far
    as evaluation tells."""
    images = torch.zeros(2, *shape, device=sparse.index.device)
    try:
        with evaluation_mode(sparse), torch.no_grad():
            sparse(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True
