"""What a user sets of an export beyond the training: its memory, and what is written beside the graphs."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from edge_bcs.core.settings import Attack, Hyper, check_choice, check_count
from edge_bcs.core.units import parse_bytes

if TYPE_CHECKING:
    from edge_bcs.targets.cost_model import Machine

    from edge_bcs.core.deprecated import Places

STORES = ("f32", "bf16")
_MOST_IMAGES = 1 << 16  # of a micro-batch


@dataclass(frozen=True)
class Memory:
    """The memory of a training step, and what is fast inside it.

    Attributes:
        budget: bytes of the working set, such as "12MiB"; the planner chooses the fastest way to stay inside
            it: micro-batch, kernels, and what is recomputed for the backward pass. None: no limit.
        micro_batch: images per run of the training graph, 1 to 65536; default: as the planner says, or 32
            without a budget.
        store: "f32", or "bf16": activations may be kept for the backward pass as bfloat16, where the budget
            asks for it (without a budget all are). Gradients then carry its rounding, 2⁻⁹ a number.
        machine: whose time the planner counts; default: that of a typical board.
    """

    budget: int | str | None = None
    _: KW_ONLY
    micro_batch: int | None = None
    store: str = "f32"
    machine: Machine | None = None

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a budget that is no number of bytes, or something out of range."""
        _ = self.bytes
        if self.micro_batch is not None:
            check_count("micro_batch", self.micro_batch, 1, _MOST_IMAGES)
        check_choice("store", self.store, STORES)

    @property
    def bytes(self) -> int | None:
        """The budget in bytes."""
        return None if self.budget is None else parse_bytes(self.budget)


@dataclass(frozen=True, kw_only=True)
class Publishing:
    """What is written beside the graphs, for whom, and over what.

    Attributes:
        plain_eval: also write eval_model.plain.onnx, the evaluation model in ONNX's own operators.
        sign_key: PEM file of an Ed25519 private key that signs the artifact (runtime/signature.py).
        release: number of this artifact among its maker's, from 1, which only grows (runtime/release.py).
        force: also replace a run that training saved, or an artifact whose files were changed.
    """

    plain_eval: bool = False
    sign_key: str | Path | None = None
    release: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number that is no release."""
        from edge_bcs.runtime.manifest import LARGEST_RELEASE

        if self.release is not None:
            check_count("a release", self.release, 1, LARGEST_RELEASE)


class OldKeywords(TypedDict, total=False):
    """Keywords that `export` had up to 0.1."""

    store: str
    machine: Machine | None
    micro_batch: int | None
    epsilon: float
    step_size: float
    attack_steps: int
    learning_rate: float | None
    weight_decay: float | None
    momentum: float
    noise: float
    plain_eval: bool
    sign_key: str | Path | None
    release: int | None
    force: bool


PLACES: Places = {
    "store": ("memory", Memory, "store"),
    "machine": ("memory", Memory, "machine"),
    "micro_batch": ("memory", Memory, "micro_batch"),
    "epsilon": ("attack", Attack, "epsilon"),
    "step_size": ("attack", Attack, "step_size"),
    "attack_steps": ("attack", Attack, "steps"),
    "learning_rate": ("hyper", Hyper, "learning_rate"),
    "weight_decay": ("hyper", Hyper, "weight_decay"),
    "momentum": ("hyper", Hyper, "momentum"),
    "noise": ("hyper", Hyper, "noise"),
    "plain_eval": ("publish", Publishing, "plain_eval"),
    "sign_key": ("publish", Publishing, "sign_key"),
    "release": ("publish", Publishing, "release"),
    "force": ("publish", Publishing, "force"),
}
"""What took their place."""
