"""A trained network as a teacher: its answers are a second target of the loss (Hinton et al., 2015)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import check_number
from edge_bcs.method import losses
from edge_bcs.method.attacks import evaluation_mode
from edge_bcs.method.hooks import take_logits
from edge_bcs.method.sparse_model import SparseModel


@dataclass(frozen=True)
class Teacher:
    """A network from whose answers another one learns beside the labels.

    Each sample's loss gets weight·T²·KL(q ‖ p) added: q is the softmax of the teacher's logits over T, p that
    of the logits that the loss sees. The teacher sees the clean image always; the network that learns sees
    what its objective shows it, of two branches the attacked image (Goldblum et al., 2020).

    Attributes:
        network: a torch module, or what `edge_bcs.load` returned, of the same images and at least the same
            classes; where it gives probabilities, their logarithms are its logits. Its batch norms have their
            running statistics, and it stays as it is: a training asks a copy.
        weight: of the term, above 0.
        temperature: T, above 0: the larger, the more the classes that are wrong count.
    """

    network: nn.Module
    _: KW_ONLY
    weight: float = 1.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range."""
        for what, number in (("weight", self.weight), ("temperature", self.temperature)):
            check_number(f"the {what} of a teacher", number)
            if not number:
                raise EdgeBcsError(f"the {what} of a teacher must be above 0")

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell its parameters and buffers from others'."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def ready(self, sparse: SparseModel, shape: Sequence[int]) -> Teacher:
        """Return one whose network is a copy on the device of ``sparse`` that answers in the order of its
        outputs.

        Args:
            sparse: the network that learns, with the names of its classes.
            shape: (C, H, W) of the images.

        Raises:
            EdgeBcsError: it does not take such images, or does not know the classes.
        """
        _ = self.fingerprint  # before a training changes it, which a network that teaches itself would
        network = copy.deepcopy(self.network).to(sparse.index.device).eval().requires_grad_(False)
        if take_logits not in network._forward_hooks.values() and not isinstance(network, SparseModel):
            network.register_forward_hook(take_logits)
        x = torch.zeros(1, *shape, device=sparse.index.device)
        try:
            with torch.no_grad(), evaluation_mode(sparse):
                answers, outputs = network(x), sparse(x).shape[1]
        except RuntimeError:
            raise EdgeBcsError(f"the teacher does not take images of the shape {list(shape)}") from None
        if not isinstance(network, SparseModel) and _are_probabilities(answers):
            network.edge_bcs_ending = "softmax"  # type: ignore[assignment]
        known = network.classes if isinstance(network, SparseModel) else None
        if known is not None and sparse.classes is not None:
            missing = [name for name in sparse.classes if name not in known]
            if missing:
                raise EdgeBcsError(f"the teacher does not know the class {missing[0]}")
            if known != sparse.classes:
                network = _InOrder(network, [known.index(name) for name in sparse.classes])
        elif answers.dim() != 2 or answers.shape[1] != outputs:
            raise EdgeBcsError(
                f"the teacher's answer has the shape {list(answers.shape[1:])}, and the network has "
                f"{outputs} outputs"
            )
        return replace(self, network=network)

    def loss(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return what is added to each sample's loss, f32[n], of clean images f32 [n, C, H, W] and the
        logits f32 [n, K] of the network that learns."""
        with torch.no_grad():
            answers = self.network(x)
        apart = losses.kl(answers / self.temperature, logits / self.temperature)
        return self.weight * self.temperature**2 * apart


def _are_probabilities(answers: Tensor) -> bool:
    return bool((answers >= 0).all() and (answers.sum(-1) - 1).abs().max() < 1e-4)


class _InOrder(nn.Module):
    """Some outputs of a network, in another order."""

    def __init__(self, network: nn.Module, places: list[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("places", torch.tensor(places, device=next(network.parameters()).device))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits f32 [n, K] of images f32 [n, C, H, W]."""
        answers: Tensor = self.network(x)[:, self.places]
        return answers
