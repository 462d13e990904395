"""Pixel normalisation, (x − mean) / std for each channel: part of a network, behind images in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_bcs.core.errors import EdgeBcsError

_KNOWN = {"imagenet": "0.485,0.456,0.406:0.229,0.224,0.225", "none": "0:1"}


@dataclass(frozen=True)
class Normalization:
    """Means and standard deviations, one a channel or one for all, in units of pixels in [0, 1].

    Raises:
        EdgeBcsError: means and standard deviations of different numbers of channels, a number that is not
            finite, or a standard deviation that is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        counts = {len(self.mean), len(self.std)} - {1}
        if not self.mean or not self.std or len(counts) > 1:
            raise EdgeBcsError(
                f"the normalisation has {len(self.mean)} means and {len(self.std)} standard deviations: give "
                "one of each, or one a channel"
            )
        if not all(math.isfinite(number) for number in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise EdgeBcsError(
                "the means of the normalisation must be finite, and its standard deviations positive"
            )

    @classmethod
    def parse(cls, text: str) -> Normalization:
        """Read "imagenet", or MEAN:STD, each a number or one a channel with commas: "0.5:0.5"."""
        mean, colon, std = _KNOWN.get(text, text).partition(":")
        try:
            numbers = [tuple(float(part) for part in side.split(",")) for side in (mean, std)]
        except ValueError:
            numbers = []
        if not colon or not numbers:
            raise EdgeBcsError(
                "a normalisation is imagenet or MEAN:STD, each a number or one a channel with commas, such "
                f"as 0.5:0.5, not {text!r}"
            )
        return cls(*numbers)

    @classmethod
    def of_record(cls, record: Any) -> Normalization:
        """Read what `record` returned; ValueError if it is something else."""
        if not isinstance(record, Mapping) or set(record) != {"mean", "std"}:
            raise ValueError("a normalisation has mean and std")
        sides = record["mean"], record["std"]
        if not all(
            isinstance(side, Sequence) and all(type(n) in (int, float) for n in side) for side in sides
        ):
            raise ValueError("mean and std are lists of numbers")
        try:
            return cls(*(tuple(float(number) for number in side) for side in sides))
        except EdgeBcsError as error:
            raise ValueError(str(error)) from None

    @property
    def record(self) -> dict[str, list[float]]:
        """What is stored of it."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        return set(self.mean) == {0.0} and set(self.std) == {1.0}

    def of_channels(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return (means, standard deviations), one for each of so many channels.

        Raises:
            EdgeBcsError: it is for another number of channels.
        """
        for side in (self.mean, self.std):
            if len(side) not in (1, channels):
                raise EdgeBcsError(
                    f"the normalisation is for images of {len(side)} channels, and these have {channels}"
                )
        return tuple(side * channels if len(side) == 1 else side for side in (self.mean, self.std))  # type: ignore[return-value]
