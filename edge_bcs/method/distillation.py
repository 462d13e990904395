"""A trained network as a teacher: its answers are a second target of the loss (Hinton et al., 2015)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor, nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import check_number
from edge_bcs.method import losses
from edge_bcs.method.attacks import evaluation_mode
from edge_bcs.method.hooks import normalization_of, take_logits
from edge_bcs.method.sparse_model import SparseModel


@dataclass(frozen=True)
class Teacher:
    """A network from whose answers another one learns beside the labels.

    Each sample's loss gets weight·T²·KL(q ‖ p) added: q is the softmax of the teacher's logits over T, p that
    of the logits that the loss sees. The teacher sees the clean image always; the network that learns sees
    what its objective shows it, of two branches the attacked image (Goldblum et al., 2020).

    Attributes:
        network: a torch module, or what `edge_bcs.load` returned, of the same images and at least the same
            classes, matched by name where both have names, else by place. Where it gives probabilities, their
            logarithms are its logits. It stays as it is: a training asks a copy, in evaluation mode and f32.
        weight: of the term, above 0.
        temperature: T, above 0: the larger, the more the classes that are wrong count.
    """

    network: nn.Module
    _: KW_ONLY
    weight: float = 1.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range."""
        if not isinstance(self.network, nn.Module):
            raise EdgeBcsError(f"a teacher is a torch module, not a {type(self.network).__name__}")
        for what, number in (("weight", self.weight), ("temperature", self.temperature)):
            check_number(f"the {what} of a teacher", number)
            if not number:
                raise EdgeBcsError(f"the {what} of a teacher must be above 0")

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell its weights, its running statistics and its normalisation from
        others'; in whatever file they were."""
        network = self.network.network if isinstance(self.network, SparseModel) else self.network
        digest = hashlib.sha256(repr(normalization_of(network)).encode())
        for name, tensor in sorted(network.state_dict().items()):
            if not name.endswith("num_batches_tracked"):
                digest.update(name.encode())
                digest.update(tensor.detach().to("cpu", torch.float32).numpy().tobytes())
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
        x = torch.zeros(1, *shape, device=sparse.index.device)
        with torch.no_grad(), evaluation_mode(sparse):
            outputs = sparse(x).shape[1]
        try:
            _ = self.fingerprint  # before a training changes it, which a network that teaches itself would
            network = copy.deepcopy(self.network).to(sparse.index.device).float().eval().requires_grad_(False)
            if take_logits not in network._forward_hooks.values() and not isinstance(network, SparseModel):
                network.register_forward_hook(take_logits)
            with torch.no_grad():
                answers = network(x)
        except Exception as error:  # it is the user's code that runs
            first = (str(error).strip().splitlines() or [""])[0][:200]
            why = f"{type(error).__name__}: {first}"
            raise EdgeBcsError(
                f"the teacher does not take images of the shape {list(shape)} ({why})"
            ) from None
        if not isinstance(answers, Tensor) or answers.dim() != 2:
            found = list(answers.shape[1:]) if isinstance(answers, Tensor) else type(answers).__name__
            raise EdgeBcsError(f"the teacher's answer is {found}, not a number for each class")
        if not answers.isfinite().all():
            raise EdgeBcsError("the teacher's answers are not finite")
        if not isinstance(network, SparseModel) and _are_probabilities(answers):
            network.edge_bcs_ending = "softmax"  # type: ignore[assignment]
        known, wanted = network.classes if isinstance(network, SparseModel) else None, sparse.classes
        if _are_names(known) and _are_names(wanted):
            missing = [name for name in wanted if name not in known]
            if missing:
                raise EdgeBcsError(f"the teacher does not know the class {missing[0]!r}")
            if known != wanted:
                network = _InOrder(network, [known.index(name) for name in wanted])
        elif answers.shape[1] != outputs:
            raise EdgeBcsError(f"the teacher has {answers.shape[1]} outputs, and the network {outputs}")
        return replace(self, network=network)

    def loss(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return what is added to each sample's loss, f32[n], of clean images f32 [n, C, H, W] and the
        logits f32 [n, K] of the network that learns."""
        with torch.no_grad():
            answers = self.network(x)
        apart = losses.kl(answers / self.temperature, logits / self.temperature)
        return self.weight * self.temperature**2 * apart


def _are_names(classes: Sequence[str] | None) -> TypeGuard[Sequence[str]]:
    """Whether somebody named the classes: "0", "1", … are places."""
    return classes is not None and list(classes) != [str(place) for place in range(len(classes))]


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
