"""Whether a training with a single-step attack has collapsed, on the host and on a board.

Catastrophic overfitting (Wong et al., 2020): within an epoch the network learns to answer the one step, and
PGD fools it on nearly every image, which its training does not show. So after an epoch a batch of images is
attacked twice, as the training does and by PGD-20. It has collapsed where all of this holds:

- PGD leaves fewer than half of the images right that the training's own attack leaves right: the step is no
  attack any more. In a sound training PGD leaves four of five.
- PGD leaves fewer than half as many right as it did at the best: the network has lost what it had, and is not
  one that never was robust, such as a pretrained one in its first epoch.
- That fall is more than three standard deviations of such a share, so that chance makes none of it.

The rest of the training then attacks with PGD, which repairs such a network within few steps (Li et al.,
2020). Where epochs are short not each is looked at: the look is to cost no more than a tenth of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

WATCHED_IMAGES = 128
"""At most: of those that are held out, or, where they are too few, of those that are trained on, where a
collapse shows as well."""
FEWEST_HELD_OUT = 32
"""Of fewer a share says little: three standard deviations are a quarter and more."""
WATCHED_STEPS = 20
"""Of PGD, 2.5·ε/20 each."""
APART = 100
"""Images trained on, of two passes each, for one that is looked at with 22."""
_DEVIATIONS = 3.0


@dataclass
class Watch:
    """What is known of a training with a single-step attack; saved with it.

    Attributes:
        step: steps of the training that were done when it was looked at last; −1: it was not.
        best: the largest share of images that PGD ever left right.
        fell_back: steps that were done when it went over to PGD; None while it has not.
    """

    step: int = -1
    best: float = 0.0
    fell_back: int | None = None

    def is_due(self, done: int, batch_size: int, images: int, *, over: bool) -> bool:
        """Whether it is to be looked at now, before the first step or after an epoch.

        Args:
            done: steps. batch_size: images of a step. images: that are looked at.
            over: whether the training ends here.
        """
        if self.fell_back is not None or done <= self.step or not images:
            return False
        return self.step < 0 or over or (done - self.step) * batch_size >= APART * images

    def note(self, done: int, own: float, pgd: float, images: int) -> bool:
        """Note the shares of images that are right under the training's own attack and under PGD; return
        whether the training has collapsed, and so falls back."""
        self.step, best = done, self.best
        deviation = (best * (1 - best) / images) ** 0.5
        fallen = pgd < best / 2 and best - pgd > _DEVIATIONS * deviation
        if fallen and pgd < own / 2:
            self.fell_back = done
        self.best = max(best, pgd)
        return self.fell_back is not None

    def dump(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Watch:
        """Return what `dump` gave; ValueError or TypeError if it cannot be that."""
        watch = cls(**content)
        counts = (watch.step + 1, 0 if watch.fell_back is None else watch.fell_back)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("a step that is none")
        if not 0 <= watch.best <= 1:
            raise ValueError("a share that is none")
        return watch

    def sentence(self, kind: str, own: float, pgd: float) -> str:
        """Say that the training has collapsed.

        Args:
            kind: of the attack. own, pgd: as in `note`.
        """
        return (
            f"{kind} has collapsed: it leaves {100 * own:.1f} % of the watched images right, PGD-"
            f"{WATCHED_STEPS} {100 * pgd:.1f} %; from step {self.step + 1} on the training attacks with PGD"
        )
