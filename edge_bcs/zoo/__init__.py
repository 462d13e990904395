"""The zoo: trained sparse networks that come with edge-bcs, each with a report card.

`index.json` in this folder lists the cards; beside it lie the checkpoints, one file each, without momentum.
`python -m edge_bcs.bench.pretrained` measures a run and adds it. Nothing here imports torch: the list is read
on a board, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edge_bcs.core.digest import of_stream
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import cause_of, read_small, write_json
from edge_bcs.core.metadata import parse_json

FOLDER = Path(__file__).parent
INDEX = "index.json"
MEASURES = ("clean", "pgd", "autoattack", "corruption")
"""What a card has an accuracy for, or null until somebody has measured it."""
_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_ANEW = "install edge-bcs anew"


@dataclass(frozen=True)
class Card:
    """What is known of a checkpoint of the zoo.

    Attributes:
        name: by which it is asked for.
        network, arguments: its factory in `edge_bcs.models`, and what that was called with.
        input_shape: (C, H, W) of the images, pixels in [0, 1].
        classes: names of the outputs, in label order; None where nobody named them.
        data: what it was trained on.
        sparsity: share of the `size` weights that are zero, in decimal; `kappa` of them are not.
        objective, recipe: the loss, and all that the training was told (the plan of its checkpoint).
        seed, step: of the training, and how many steps it had done.
        accuracies: measure → share of right answers in [0, 1], or None.
        measured: measure → {"samples", …}: on how many test images, and by which attack, or None.
        subset: {"samples", "right"}: right answers on the first test images of the fixed shuffle.
        file: beside the index. bytes, sha256: of the file.
    """

    name: str
    network: str
    arguments: Mapping[str, Any]
    input_shape: Sequence[int]
    classes: Sequence[str] | None
    data: str
    sparsity: str
    kappa: int
    size: int
    objective: str
    recipe: Mapping[str, Any]
    seed: int
    step: int
    accuracies: Mapping[str, float | None]
    measured: Mapping[str, Mapping[str, Any] | None]
    subset: Mapping[str, int]
    file: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise EdgeBcsError(
                f"{self.name!r:.80} is no name for a checkpoint: small letters and digits, and one of . _ - "
                "between them."
            )

    def record(self) -> dict[str, Any]:
        """Return what the index holds of it, and what `edge-bcs zoo --json` prints."""
        return asdict(self)


def read_cards(folder: Path | None = None) -> list[Card]:
    """Return the cards of a zoo, by name.

    Args:
        folder: with the index and the checkpoints; default: what comes with edge-bcs.

    Raises:
        EdgeBcsError: the index cannot be read.
    """
    index = (folder or FOLDER) / INDEX
    names = {field.name for field in fields(Card)}
    try:
        stored = parse_json(read_small(index))
        if not isinstance(stored, list) or any(
            not isinstance(record, dict) or set(record) != names for record in stored
        ):
            raise ValueError("it is no list of cards")
        cards = [Card(**record) for record in stored]
    except OSError as error:
        raise EdgeBcsError(
            f"{index}, the index of the zoo, cannot be read: {cause_of(error)}; {_ANEW}."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise EdgeBcsError(f"{index}, the index of the zoo, is damaged ({error}); {_ANEW}.") from None
    return sorted(cards, key=lambda card: card.name)


def card_of(name: str, folder: Path | None = None) -> Card:
    """Return the card of a checkpoint; EdgeBcsError, with the names there are, if there is none."""
    cards = {card.name: card for card in read_cards(folder)}
    if name not in cards:
        known = ", ".join(cards) or "it is empty"
        file = (
            "; a file or a folder of yours is --weights, --checkpoint or PATH" if Path(name).exists() else ""
        )
        raise EdgeBcsError(f"the zoo has no checkpoint {name!r:.80} ({known}){file}.")
    return cards[name]


def file_of(card: Card, folder: Path | None = None) -> Path:
    """Return the file of a checkpoint, once its bytes are those that were measured.

    Raises:
        EdgeBcsError: it is missing, or another than the one of the card.
    """
    file = (folder or FOLDER) / card.file
    try:
        digest = sha256_of(file)
    except OSError as error:
        raise EdgeBcsError(
            f"{file}, a checkpoint of the zoo, cannot be read: {cause_of(error)}; {_ANEW}."
        ) from None
    if digest != card.sha256:
        raise EdgeBcsError(f"{file} is not the checkpoint that was measured: its sha256 differs; {_ANEW}.")
    return file


def sha256_of(file: Path) -> str:
    """Return the digest of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return of_stream(stream)


def write_cards(cards: Sequence[Card], folder: Path) -> None:
    """Replace the index of a zoo by these cards, sorted by name."""
    records = [card.record() for card in sorted(cards, key=lambda card: card.name)]
    write_json(folder / INDEX, json.loads(json.dumps(records)), make_folder=True)
