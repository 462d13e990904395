"""The one table of training objectives: what attack, graphs, planner, board and command lines ask of them.

p(x) is the softmax of the logits at x, x̃ the adversarial image. Per sample:

- natural: CE(x).
- at: CE(x̃) (Madry et al., 2018).
- mixed: CE(x̃) in the first half of the batch, CE(x) in the second (Kurakin et al., 2017).
- trades: CE(x) + β·KL(p(x) ‖ p(x̃)) (Zhang et al., 2019).
- rst: as trades, on labelled and pseudo-labelled data (Carmon et al., 2019).
- mart: CE(x̃) − log(1.0001 − max_{j≠y} p_j(x̃) + 1e-12) + β·KL(p(x) ‖ p(x̃))·(1.0000001 − p_y(x))
  (Wang et al., 2020).

The losses themselves are `edge_bcs.method.losses` in torch and `exporters.operators.losses` in a graph; both
are found by `Objective.loss`.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import Attack, Crafting

NO_LABEL = -1
"""The label of an image that has none."""


@dataclass(frozen=True)
class Objective:
    """What an objective needs of attack, network and data.

    Attributes:
        name: as in the list above.
        loss: "cross_entropy" of one pass, or "trades" or "mart" of two: x and x̃ both go through the network.
        attack_start: "uniform" in ±ε, "gaussian" (0.001·N(0, 1)), or None: not attacked.
        attack_loss: what PGD increases, "cross_entropy" with the label or "kl" from p(x).
        adversarial_part: how much of the batch is attacked, counted from its beginning.
        beta: default weight of the loss's second term; 0 where there is none.
        pseudo_labelled: whether it needs a second data set, whose labels a network gave.
        batch_size: default images of one step on the host.
    """

    name: str
    loss: str
    attack_start: str | None
    attack_loss: str
    adversarial_part: float
    beta: float = 0.0
    pseudo_labelled: bool = False
    batch_size: int = 128

    @property
    def two_branches(self) -> bool:
        """Whether x and x̃ both go through the network, in two passes; the second term, with weight β, is
        what compares them."""
        return self.loss != "cross_entropy"

    @property
    def learns_without_labels(self) -> bool:
        """Whether an image with `NO_LABEL` teaches it something: the second term alone, which compares two
        answers, as the attack does."""
        return self.two_branches and self.attack_loss == "kl"

    @property
    def adversarial(self) -> bool:
        """Whether any image is attacked."""
        return self.attack_start is not None

    @property
    def accuracy_is_robust(self) -> bool:
        """Whether the loss sees adversarial images alone, so that what it counts as right is robust."""
        return self.adversarial_part == 1 and not self.two_branches

    @property
    def training_input(self) -> str:
        """The bound buffer behind the training graph's `input`: with one pass, the images as assembled."""
        return "adversarial" if self.adversarial and not self.two_branches else "input"

    def crafting(self, attack: Attack) -> Crafting:
        """How ``attack`` crafts the images of a training."""
        return attack.crafting(self.attack_start or "uniform")

    def check_attack(self, attack: Attack) -> None:
        """Raise `EdgeBcsError` for a single step in a training that attacks nothing."""
        if attack.single_step and not self.adversarial:
            raise EdgeBcsError(
                f"{self.name} training attacks nothing: leave {attack.kind} out, or choose another objective"
            )

    def attacked(self, batch: int) -> int:
        """How many images of a batch are attacked: the first ones."""
        return int(batch * self.adversarial_part)

    def runs(
        self, batch: int, micro_batch: int, attack_steps: int, attack_micro_batch: int | None = None
    ) -> dict[str, int]:
        """How often each graph runs in one step over ``batch`` images (Algorithm 1: craft, accumulate,
        update).

        Args:
            micro_batch: images that are trained on at once. attack_micro_batch: that are attacked at once, a
                multiple of those; default: as many.
        """
        crafted = -(-self.attacked(batch) // (attack_micro_batch or micro_batch))
        return {
            "attack": crafted * attack_steps,
            "eval": crafted if self.attack_loss == "kl" else 0,
            "training": -(-batch // micro_batch),
            "optimizer": 1,
        }


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("natural", "cross_entropy", None, "cross_entropy", 0.0),
        Objective("at", "cross_entropy", "uniform", "cross_entropy", 1.0),
        Objective("mixed", "cross_entropy", "uniform", "cross_entropy", 0.5),
        Objective("trades", "trades", "gaussian", "kl", 1.0, beta=6.0),
        Objective("rst", "trades", "gaussian", "kl", 1.0, beta=6.0, pseudo_labelled=True, batch_size=256),
        Objective("mart", "mart", "gaussian", "cross_entropy", 1.0, beta=4.0),
    )
}
PLAIN = OBJECTIVES["at"]
"""Plain adversarial training: what to fall back on where two passes need too much."""
WEIGHTED = tuple(name for name, objective in OBJECTIVES.items() if objective.two_branches)
"""Names of those with a second term, which β weighs."""
PSEUDO_LABELLED = tuple(name for name, objective in OBJECTIVES.items() if objective.pseudo_labelled)
"""Names of those that need a second, pseudo-labelled data set."""


def objective_named(name: str) -> Objective:
    """Return the objective of that name, or raise `EdgeBcsError`."""
    if name not in OBJECTIVES:
        raise EdgeBcsError(f"there is no objective {name!r}; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
