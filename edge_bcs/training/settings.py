"""What a user sets of a training on the host beyond `core.settings`: how it comes by its connections, what it
reads, on what it runs, and where it is kept."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, TypedDict

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import exact_sparsity
from edge_bcs.core.settings import REWIRE, Attack, Hyper, Schedule, check_choice, check_count, check_number

if TYPE_CHECKING:
    import torch

    from edge_bcs.core.deprecated import Places
    from edge_bcs.data.augmentation import Augment

METHODS = ("bcs", "random", "fixed", "dense")
"""Of `train`; all but "bcs" keep the mask that the network has."""
ENGINES = ("torch", "sparse")
PRECISIONS = ("f32", "bf16")
ATTACK_PRECISIONS = ("f32", "half")
PRUNED = 0.4
"""Share of the steps in which `Gradual` prunes: before the learning rate of "steps" first falls."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What of the data a training reads, and how.

    Attributes:
        augment: "shift" or True: shift by up to ±10 % and flip; "photo": crop, flip and colour; "zoom": the
            same, from nearer or farther; "mix": zoom and AugMix; "mirror": flip alone; "none" or
            False (see `edge_bcs.data.augmentation`).
        validation: fraction of the data that is held out to choose the best epoch, at least 0 and below 1;
            with 0 the last epoch is kept.
        pseudo_labelled: the second data set of rst, of the same kinds as the first; a path is read whole (an
            .npz).
        balance: draw images so that the classes come up evenly (see `edge_bcs.data.balance`).
    """

    augment: Augment = True
    validation: float = 0.02
    pseudo_labelled: Any = None
    balance: bool = False

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a fraction out of range or an unknown augmentation."""
        from edge_bcs.data.augmentation import augmentation_of  # here: the command line starts without numpy

        augmentation_of(self.augment)
        if not 0 <= self.validation < 1:
            raise EdgeBcsError(f"the held-out fraction must be at least 0 and below 1, not {self.validation}")


@dataclass(frozen=True)
class Compute:
    """On what a training runs.

    Attributes:
        engine: "torch", or "sparse": through the compiled artifact, many times faster on a CPU for a sparse
            network, with the same options and the same checkpoints (see `training.backends`).
        device: where to train; a GPU if there is one.
        precision: "f32" or "bf16" (autocast; weights and updates stay f32); bf16 on a GPU if None.
        compile: compile the network with torch.compile; the minutes that takes are worth it on a GPU.
        threads: of the sparse engine; all processors of this process if None.
        attack_precision: of the sparse engine's attacks, those on held-out images among them: "f32", or
            "half", two bytes a number, where the processor has arithmetic in it.
    """

    engine: str = "torch"
    _: KW_ONLY
    device: str | torch.device | None = None
    precision: str | None = None
    compile: bool = False
    threads: int | None = None
    attack_precision: str = ATTACK_PRECISIONS[0]

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for an engine or a precision that there is not."""
        check_choice("engine", self.engine, ENGINES)
        check_choice("attack precision", self.attack_precision, ATTACK_PRECISIONS)
        if self.attack_precision == "half" and self.engine != "sparse":
            raise EdgeBcsError(
                "attacks in half precision need the sparse engine; PyTorch has its own precision"
            )
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)

    @property
    def place(self) -> str | torch.device | None:
        """The device that is asked for, or the only one of the engine; None: whichever is there."""
        return "cpu" if self.device is None and self.engine == "sparse" else self.device


@dataclass(frozen=True)
class Output:
    """Where a training is kept.

    Attributes:
        folder: gets checkpoint.safetensors (best epoch), last.safetensors (newest state), metrics.jsonl (a
            line for each step) and epochs.jsonl (a line for each epoch, with the connections of each layer);
            None keeps nothing.
        resume: continue what the folder holds; what was interrupted before its first save begins anew.
        save_seconds: time between saves of the newest state; it is also saved at the end of each epoch.
    """

    folder: str | PathLike[str] | None = None
    _: KW_ONLY
    resume: bool = False
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for what cannot be resumed, or a time out of range."""
        if not self.save_seconds >= 0:
            raise EdgeBcsError(f"save_seconds must be at least 0, not {self.save_seconds}")
        if self.resume and self.folder is None:
            raise EdgeBcsError("a training can only be resumed from the output folder that it wrote")


@dataclass(frozen=True)
class Gradual:
    """A dense network is pruned to its κ connections while it is trained (Zhu & Gupta, 2017).

    From step t to the next, of the n in which it is pruned, κ + (N − κ)·(1 − t/n)³ of the N weights are left:
    those that are the largest then. They are trained like those of a static mask, with free signs and without
    noise. Afterwards there are exactly κ, which rewiring moves; no epoch before is the best one.

    Attributes:
        sparsity: in the end, in [0, 1), as a decimal.
        share: of the steps in which it is pruned, above 0 and below 1.
        distribution: how many of each layer are left: "global", the largest of the whole network (see
            `method.pruning.largest_of_all`), "uniform", "erk" or "paper" (see `method.connectivity`).
    """

    sparsity: str
    _: KW_ONLY
    share: float = PRUNED
    distribution: str = "global"

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range or an unknown distribution."""
        exact_sparsity(self.sparsity)
        check_number("the share of the steps in which a network is pruned", self.share, 1)
        if self.share in (0, 1):
            raise EdgeBcsError(
                f"a network is pruned in a share of the steps above 0 and below 1, not {self.share}"
            )
        check_choice("distribution", self.distribution, ("global", "uniform", "erk", "paper"))


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Beside the rewiring, small connections move to where their gradient would be large (`method.growth`).

    Attributes:
        share: of the connections that move the first time, below 1; it falls along half a cosine. Above 0, or
            0 where ``recycle`` alone moves any.
        every: so many steps, at least 1.
        until: share of the training after which none moves, above 0 and at most 1.
        candidates: dormant positions that are drawn for each connection that moves, at least 1.
        recycle: whether connections that carry nothing move first, however many they are.
    """

    share: float = 0.3
    every: int = 100
    until: float = 0.75
    candidates: int = 4
    recycle: bool = False

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range."""
        check_number("the share of the connections that move", self.share, 1)
        check_number("the share of the steps in which connections grow", self.until, 1)
        if self.share == 1 or (self.share == 0 and not self.recycle) or not self.until:
            raise EdgeBcsError(
                "of the connections a share above 0 and below 1 moves, in a share of the steps above 0, not "
                f"{self.share} in {self.until}"
            )
        check_count("the steps between growths", self.every, 1)
        check_count("candidates", self.candidates, 1)


@dataclass(frozen=True)
class Method:
    """How a training comes by its connections.

    Attributes:
        name: "bcs", or a baseline with a static mask: "random" and "fixed" (the mask is that of the network,
            see `connectivity.sparsify` and `connectivity.fixed`) or "dense" (a network of sparsity 0);
            baselines have neither rewiring nor noise nor a constraint on signs.
        rewire: where connections are born: "uniform" (Algorithm 1) or "by-layer" (the released code).
        gradual: prune a network that has all its weights (`sparsify` with a sparsity of 0) while it is
            trained, for "bcs" in PyTorch; then rewiring goes on. Its buffers are those of a dense network
            until then.
        growth: also move connections by their gradient, for "bcs" with uniform rewiring of the whole network;
            None: Algorithm 1 alone.
    """

    name: str = "bcs"
    _: KW_ONLY
    rewire: str = "uniform"
    gradual: Gradual | None = None
    growth: Growth | None = None

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a name that there is not, or a baseline that would be pruned."""
        check_choice("method", self.name, METHODS)
        check_choice("rewiring", self.rewire, REWIRE)
        if self.gradual is not None and self.static:
            raise EdgeBcsError(f"gradual pruning is for the method bcs, not for {self.name}")
        if self.growth is not None and (self.static or self.rewire != "uniform" or self.gradual is not None):
            raise EdgeBcsError(
                "growth by gradient goes with the method bcs, uniform rewiring and no gradual pruning"
            )

    @property
    def static(self) -> bool:
        """Whether connections stay where they are."""
        return self.name != "bcs"


class OldKeywords(TypedDict, total=False):
    """Keywords that `train` had up to 0.1."""

    rewire: str
    steps: int | None
    learning_rate: float
    weight_decay: float
    momentum: float
    noise: float
    epsilon: float
    step_size: float
    attack_steps: int
    augment: bool
    pseudo_labelled: Any
    validation: float
    engine: str
    device: str | torch.device | None
    precision: str | None
    compile: bool
    threads: int | None
    resume: bool
    save_seconds: float


PLACES: Places = {
    "rewire": ("method", Method, "rewire"),
    "steps": ("schedule", Schedule, "steps"),
    "schedule": ("schedule", Schedule, "kind"),
    "learning_rate": ("hyper", Hyper, "learning_rate"),
    "weight_decay": ("hyper", Hyper, "weight_decay"),
    "momentum": ("hyper", Hyper, "momentum"),
    "noise": ("hyper", Hyper, "noise"),
    "epsilon": ("attack", Attack, "epsilon"),
    "step_size": ("attack", Attack, "step_size"),
    "attack_steps": ("attack", Attack, "steps"),
    "augment": ("feed", Feed, "augment"),
    "pseudo_labelled": ("feed", Feed, "pseudo_labelled"),
    "validation": ("feed", Feed, "validation"),
    "engine": ("compute", Compute, "engine"),
    "device": ("compute", Compute, "device"),
    "precision": ("compute", Compute, "precision"),
    "compile": ("compute", Compute, "compile"),
    "threads": ("compute", Compute, "threads"),
    "resume": ("output", Output, "resume"),
    "save_seconds": ("output", Output, "save_seconds"),
}
"""What took their place; "schedule" was a text."""
