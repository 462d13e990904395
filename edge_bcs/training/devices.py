"""Where torch computes."""

from __future__ import annotations

import torch

from edge_bcs.core.errors import EdgeBcsError


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
