"""Images that cannot be used: how they are told, and whether they stop the reading or are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.text import shown

OnBad = Literal["stop", "skip"]
Watch = Callable[[], None]
_NAMED = 3  # in one sentence


class BadImageError(EdgeBcsError):
    """One image cannot be used, whatever is wrong with it; others of its data set may be."""


@dataclass(frozen=True)
class LeftOut:
    """An image that is not used: its name within its source, and a sentence that says why."""

    name: str
    why: str


@dataclass(frozen=True)
class Handling:
    """What happens to images that cannot be used.

    Attributes:
        on_bad: "stop" refuses the data with a sentence that names them; "skip" leaves them out.
        known: where a training goes on, the images that it left out, by name, with the reasons. These are
            left out again without being looked at.
        strict: refuse another one that cannot be used, for that training began with it.
        watch: called now and then while images are looked at or decoded; what it raises ends that.
    """

    on_bad: OnBad = "stop"
    known: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    watch: Watch = lambda: None

    def __post_init__(self) -> None:
        """Raise EdgeBcsError unless ``on_bad`` is one of the two."""
        if self.on_bad not in ("stop", "skip"):
            raise EdgeBcsError(f"on_bad is 'stop' or 'skip', not {self.on_bad!r}.")

    def settle(self, found: Sequence[LeftOut], source: str) -> tuple[LeftOut, ...]:
        """Return the images of ``source`` that are left out.

        Raises EdgeBcsError if there are any that are not ``known`` and they stop the reading.
        """
        new = [image for image in found if image.name not in self.known]
        if new and self.strict:
            raise EdgeBcsError(
                f"{_sentence(new[0])}, and this training began with it: put the image back as it was, or "
                "begin a new training."
            )
        if new and self.on_bad == "stop":
            several = f"{len(new)} images of {source} cannot be used: " if len(new) > 1 else ""
            named = "; ".join(_sentence(image) for image in new[:_NAMED])
            more = f"; and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
            them = "them" if several else "it"
            raise EdgeBcsError(
                f"{several}{named}{more}; mend or remove {them}, or leave {them} out with --on-bad skip."
            )
        return tuple(found)


def _sentence(image: LeftOut) -> str:
    return image.why.removesuffix(".")


def require_utf8(class_name: str) -> str:
    """Return the name of a class folder; EdgeBcsError if it is not UTF-8, for artifacts carry class names."""
    if not class_name.isascii():
        try:
            class_name.encode()
        except UnicodeEncodeError:
            raise EdgeBcsError(
                f"the name of the class folder {shown(class_name)} is not UTF-8: rename it."
            ) from None
    return class_name
