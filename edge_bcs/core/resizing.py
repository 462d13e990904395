"""How an image file of any size becomes an image of the network's: part of what a network expects."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_bcs.core.errors import EdgeBcsError

Box = tuple[float, float, float, float]
_HOW = "squash, crop, or crop:SHARE, such as crop:0.875"


@dataclass(frozen=True)
class Resize:
    """Both sides to the network's ("squash"), or a crop from the middle with the network's proportions.

    Attributes:
        crop: share of the largest such crop that is taken, above 0 and at most 1; None: no crop.
    """

    crop: float | None = None

    def __post_init__(self) -> None:
        """Raise EdgeBcsError for a share out of range."""
        if self.crop is not None and not (math.isfinite(self.crop) and 0 < self.crop <= 1):
            raise EdgeBcsError(f"a crop takes a share above 0 and at most 1 of the image, not {self.crop}")

    @classmethod
    def parse(cls, text: str) -> Resize:
        """Read "squash", "crop" or "crop:0.875" (torchvision's 224 of 256); EdgeBcsError for another text."""
        kind, colon, share = text.partition(":")
        try:
            crop = float(share) if colon else 1.0
        except ValueError:
            crop = math.nan
        if text != "squash" and (kind != "crop" or math.isnan(crop)):
            raise EdgeBcsError(f"images are resized by {_HOW}, not {text[:60]!r}")
        return cls(None if kind == "squash" else crop)

    @property
    def text(self) -> str:
        """What `parse` reads."""
        if self.crop is None:
            return "squash"
        return "crop" if self.crop == 1 else f"crop:{self.crop!r}"

    def box(self, image: tuple[float, float], wanted: tuple[int, int]) -> Box:
        """Return the part (left, top, right, bottom) of an image (width, height) that becomes one of
        ``wanted`` pixels."""
        width, height = image
        if self.crop is None:
            return 0.0, 0.0, width, height
        scale = self.crop * min(width / wanted[0], height / wanted[1])
        wide, tall = min(scale * wanted[0], width), min(scale * wanted[1], height)
        left, top = (width - wide) / 2, (height - tall) / 2
        return left, top, left + wide, top + tall


SQUASH = Resize()
