"""Names of classes: what they may be, and how the labels of data become those of a network.

A label is a place in a list of names, and every source has a list of its own: class folders in alphabetical
order, whichever of them are there. So a network keeps its names, and data is matched with them by name; the
order in which a source lists its classes, and which of them it lacks, then change no label.

| the network's names | the data's names | its labels are matched |
| --- | --- | --- |
| known | known | by name; a name that the network lacks is refused, classes that the data lacks are told |
| known | only label numbers | by position; by name if the network has those numbers as names elsewhere |
| only label numbers | names | refused: which output is which, only --class-names (`class_names`) can say |
| not stored (made by an earlier version) | any | by position, told; to train some of them, refused |
| not stored, never trained | of the first training data | they become the network's |

"Only label numbers": the names are "0", "1", … in this order, because .npz, .mat, arrays and CIFAR batches
without a meta file have no others. Class folders and the digits have names even if they look like that.

Names are compared in Unicode's composed form (NFC), in which file systems differ; case and spaces count. An
output beyond the first data's names is called "class 7", or "7" after numbers, until it gets a name; a name
of its own never changes afterwards, so nothing is ever shifted.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.core.metadata import parse_json
from edge_bcs.data.adapt import as_array
from edge_bcs.data.augmentation import Augment
from edge_bcs.data.dataset import Array, ArrayDataset, Dataset

Names = tuple[str, ...]
LONGEST_NAME = 255
_LARGEST_FILE = 16 << 20
_SHOWN = 12
_JOINERS = str.maketrans("", "", "\u200c\u200d")  # parts of words in Persian and of many emoji


def check_names(classes: Any, what: str, count: int | None = None) -> Names:
    """Return class names in composed form.

    Args:
        classes: a sequence of names. what: they are, for a message. count: how many there must be.

    Raises:
        EdgeBcsError: not ``count``, no text, empty, longer than 255 characters, not printable, or not
            distinct.
    """
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise EdgeBcsError(f"{what} must be a list of names, not {repr(classes)[:60]}.")
    if not classes:
        raise EdgeBcsError(f"{what} must be at least one name, not an empty list.")
    if count is not None and len(classes) != count:
        raise EdgeBcsError(f"{what} must be {count} names, not {len(classes)}.")
    found: dict[str, int] = {}
    for place, name in enumerate(classes):
        if not isinstance(name, str):
            raise EdgeBcsError(f"{what} must be text, but number {place} is {repr(name)[:60]}.")
        plain = name.translate(_JOINERS)
        if not plain.strip() or len(name) > LONGEST_NAME or not plain.isprintable():
            raise EdgeBcsError(
                f"{what} must be printable names of 1 to {LONGEST_NAME} characters; number {place} is "
                f"{ascii(name)[:60]}: rename it."
            )
        composed = unicodedata.normalize("NFC", name)
        if composed in found:
            raise EdgeBcsError(
                f"{what} must be distinct, but number {found[composed]} and number {place} are both "
                f"{composed[:60]!r}: rename one."
            )
        found[composed] = place
    return tuple(found)


def parse_names(text: str) -> Names:
    """Return the names in the metadata of a state, a JSON list.

    Raises:
        EdgeBcsError: it is none.
    """
    try:
        content = parse_json(text)
    except ValueError:
        raise EdgeBcsError("its class names are not valid JSON.") from None
    return check_names(content, "its classes")


def given_names(text: str) -> Names:
    """Return the names of a command line: "ant,bee,cat", or a file with a name a line, in label order.

    Raises:
        EdgeBcsError: no such file, an empty line between names, or names that are refused.
    """
    file = names_file(text)
    if file is None and "," not in text:
        raise EdgeBcsError(
            f"there is no file {text[:200]}; give the class names as ant,bee,cat or as a file with a name a "
            "line, in the order of the labels."
        )
    if file is None:
        return check_names([name.strip() for name in text.split(",")], "the class names")
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
        lines = content.decode("utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeBcsError(f"the class names in {file} cannot be read: {error}.") from None
    if len(content) > _LARGEST_FILE:
        raise EdgeBcsError(f"{file} is larger than 16 MiB, so it is no list of class names.")
    return check_names([line.strip() for line in lines], f"the class names in {file}")


def names_file(text: str) -> Path | None:
    """Return the file that ``text`` names; None if it is a list of names."""
    try:
        return Path(text) if Path(text).is_file() else None
    except (OSError, ValueError):  # too long, or no path at all
        return None


def numbers(count: int) -> Names:
    """Return the names of labels that have none: "0", "1", …"""
    return tuple(map(str, range(count)))


def completed(classes: Names, outputs: int) -> Names:
    """Return a name for every output: those of the first ones, then "class 7", or "7" after numbers.

    Raises:
        EdgeBcsError: more names than outputs, or a name that another output would get.
    """
    if len(classes) > outputs:
        raise _too_many(classes, outputs)
    if classes == numbers(len(classes)):
        return numbers(outputs)
    rest = tuple(map(_unnamed, range(len(classes), outputs)))
    for name in rest:
        if name in classes:
            raise EdgeBcsError(
                f"the network has {outputs} outputs and the {len(classes)} class names contain {name!r}, "
                "which is what an output without a name is called: name all outputs (--class-names), or "
                "rename it."
            )
    return (*classes, *rest)


def may_become(stored: Names | None, names: Names) -> bool:
    """Whether stored names may be replaced by ``names``: only outputs without a name get one."""
    if stored is None:
        return True
    return len(stored) == len(names) and all(
        old in (new, str(place), _unnamed(place))
        for place, (old, new) in enumerate(zip(stored, names, strict=True))
    )


def named(stored: Sequence[str] | None, given: Sequence[str], outputs: int | None = None) -> Names:
    """Return the names of a network that has ``stored`` and is told the names of its outputs in their order.

    Args:
        stored: its names, if any. given: the names. outputs: how many it has, if that is known.

    Raises:
        EdgeBcsError: more names than outputs, or another name for an output that has one.
    """
    names = check_names(given, "the class names")
    outputs = len(stored) if stored is not None else outputs
    if outputs is not None:
        names = completed(names, outputs)
    if stored is not None and not may_become(tuple(stored), names):
        raise EdgeBcsError(
            f"the network's classes have other names: it has {shown(stored)}; given were {shown(names)}. "
            "Leave the class names out, or export it anew with them to rename its classes."
        )
    return names


def shown(names: Sequence[str]) -> str:
    """Return a list of names for a sentence; of a long one the beginning."""
    listed = ", ".join(names[:_SHOWN])
    return listed if len(names) <= _SHOWN else f"{listed}, … ({len(names)} in all)"


@dataclass(frozen=True)
class Match:
    """How data is matched with a network.

    Attributes:
        data: it, with the network's labels.
        classes: the network's names, or None while it has none.
        missing: the network's classes that the data lacks.
        by: how labels were matched.
        notes: sentences worth telling.
    """

    data: Any
    classes: Names | None
    missing: Names
    by: Literal["name", "position"]
    notes: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """Return what reports say: "classes" (or None), "matched_by" and "missing_classes"."""
        classes = None if self.classes is None else list(self.classes)
        return {"classes": classes, "matched_by": self.by, "missing_classes": list(self.missing)}


def match(
    data: Any,
    known: Sequence[str] | None,
    outputs: int | None = None,
    *,
    naming: bool = False,
    trained: bool = True,
    resumed: bool = False,
) -> Match:
    """Match the labels of a data set with a network's, as the table of this module says.

    Args:
        data: see `edge_bcs.data.dataset.Data`.
        known: the network's names in the order of its outputs; None: not stored.
        outputs: how many it has; None: unknown, and nothing is refused for having more classes.
        naming: whether a network without names takes those of the data.
        trained: whether it was trained before, so that its outputs mean something already.
        resumed: whether a training goes on with the data that it began with.

    Raises:
        EdgeBcsError: a class that the network does not know, more classes than outputs, names that are
            refused, or names for some of the outputs of a trained network that has none: which they are,
            nobody has said.
    """
    names = check_names(data.classes, "the data's classes")
    numbered = names == numbers(len(names)) and not getattr(data, "named", False)
    if known is None:
        if naming and trained and not resumed and not numbered and len(names) < (outputs or 0):
            raise EdgeBcsError(
                f"the network was trained without names for its {outputs} outputs, and the data has only "
                f"{len(names)} classes ({shown(names)}): which outputs they are is not known. Give the names "
                "of the outputs in their order with --class-names (class_names)."
            )
        return _first(data, names, numbered, outputs, naming=naming, trained=trained)
    known = tuple(known)
    place_of = {name: place for place, name in enumerate(known)}
    places = [place_of.get(name) for name in names]
    if numbered and all(place in (None, number) for number, place in enumerate(places)):
        if len(names) > len(known):
            raise _too_many(names, len(known))
        notes = (
            [] if None not in places else [f"the data has only label numbers, {_positions(known, names)}."]
        )
        by: Literal["name", "position"] = "position" if notes else "name"
        labels = np.arange(len(names))
    else:
        unknown = [name for name, place in zip(names, places, strict=True) if place is None]
        if unknown:
            raise _unknown(unknown, names, known)
        notes, by, labels = [], "name", np.array(places, np.int64)
    present = set(labels.tolist())
    with_names = [(place, name) for place, name in enumerate(known) if name != _unnamed(place)]
    missing = tuple(name for place, name in with_names if place not in present)
    if missing:
        notes.append(
            f"the data lacks {len(missing)} of the network's {len(with_names)} classes: {shown(missing)}."
        )
    return Match(_relabelled(data, labels, known), known, missing, by, tuple(notes))


def match_batches(
    batches: Iterable[tuple[Any, Any]], names: Sequence[str], known: Sequence[str] | None
) -> Match:
    """Match batches (images, labels) of classes with these names, like a data set of them."""
    probe = ArrayDataset(np.zeros((len(names), 1, 1, 1), np.float32), np.arange(len(names)), tuple(names))
    matched = match(probe, known)
    places = matched.data.labels
    return replace(matched, data=((x, _network_labels(places, y)) for x, y in batches))


def _first(
    data: Any, names: Names, numbered: bool, outputs: int | None, *, naming: bool, trained: bool
) -> Match:
    """Match data with a network that has no names."""
    if outputs is not None and len(names) > outputs:
        raise _too_many(names, outputs)
    notes = []
    if not numbered and (trained or not naming):
        notes.append(
            f"the network has no class names stored, {_positions(names, names)}; to name its outputs, give "
            "their names in this order with --class-names."
        )
    if not naming:
        return Match(data, None, (), "position", tuple(notes))
    classes = names if outputs is None else completed(names, outputs)
    if not notes and len(names) < len(classes) and not numbered:
        notes.append(
            f"the data has {len(names)} classes and the network {len(classes)} outputs; those without a name "
            f"are {shown(classes[len(names) :])} until --class-names names them."
        )
    labels = np.arange(len(names))
    return Match(_relabelled(data, labels, classes), classes, (), "position", tuple(notes))


def say(notes: Sequence[str]) -> None:
    """Tell each sentence once, as a warning; the command line writes it as one line on standard error."""
    for note in notes:
        # Without a stack level: a sentence is told once, wherever it is said from.
        warnings.warn(note, EdgeBcsWarning, stacklevel=1)


class Relabelled(Dataset):
    """Another data set's images with the labels of a network.

    Args:
        data: the data set. places: i64[n], the network's label of each of its classes.
        classes: the network's names.
    """

    named = True

    def __init__(self, data: Any, places: Array, classes: Names) -> None:
        self.classes, self.shape = classes, data.shape
        self._data, self._places = data, places
        self.varies = bool(getattr(data, "varies", False))
        labels = getattr(data, "labels", None)
        if labels is not None:
            self.labels = _network_labels(places, labels)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._data)

    def images(self, positions: Array) -> Array:
        """Return the images at ``positions``, as they are."""
        return np.asarray(self._data.read(positions)[0])

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> Array:
        """Return the order that the data has."""
        return np.asarray(self._data.order(seed, epoch, shuffle))

    def read(
        self, positions: Array, *, seed: int = 0, epoch: int = 0, augment: Augment = False
    ) -> tuple[Array, Array]:
        """Return images and labels; see `Dataset.read`."""
        images, labels = self._data.read(positions, seed=seed, epoch=epoch, augment=augment)
        return images, _network_labels(self._places, labels)


def _network_labels(places: Array, labels: Any) -> Array:
    labels = as_array(labels)
    if labels.dtype.kind not in "iu":
        raise EdgeBcsError(f"labels must be whole numbers, not {labels.dtype}.")
    wrong = (labels < 0) | (labels >= len(places))
    if wrong.any():
        raise EdgeBcsError(f"label {labels[wrong][0]} is out of range: the data has {len(places)} classes.")
    return np.asarray(places[labels])


def _relabelled(data: Any, places: Array, classes: Names) -> Any:
    """Return ``data`` itself where its classes are the network's, all in one order."""
    return data if tuple(data.classes) == classes else Relabelled(data, places, classes)


def _unnamed(place: int) -> str:
    return f"class {place}"


def _positions(network: Names, data: Names) -> str:
    if network[: len(data)] == numbers(len(data)):
        return "so labels are matched by position"
    pairs = [f"{place} = {network[place]}" for place in range(len(data))]
    return f"so labels are matched by position ({shown(pairs)})"


def _too_many(classes: Names, outputs: int) -> EdgeBcsError:
    return EdgeBcsError(
        f"the data has {len(classes)} classes, the network only {outputs}: make one with --classes "
        f"{len(classes)}."
    )


def _unknown(unknown: Sequence[str], names: Names, known: Names) -> EdgeBcsError:
    """Say which names do not fit, both lists, and what may be the matter."""
    alike = {_loosely(name): name for name in known}
    twin = next((name for name in unknown if _loosely(name) in alike), None)
    if all(name in (str(place), _unnamed(place)) for place, name in enumerate(known)):
        advice = "if the network's outputs are these classes, name them in their order with --class-names"
    elif twin is not None:
        advice = f"{twin!r} and {alike[_loosely(twin)]!r} differ in case or spaces, which count: rename one"
    elif any(name == _unnamed(place) for place, name in enumerate(known)):
        advice = "rename the data's classes, or name all outputs of the network with --class-names"
    else:
        advice = (
            "rename the data's classes or leave them out; a network with other classes is made by export or "
            "train, with --classes"
        )
    return EdgeBcsError(
        f"the network does not know the data's class{'es' * (len(unknown) > 1)} {shown(unknown)}. The data "
        f"has: {shown(names)}. The network has: {shown(known)}. What to do: {advice}."
    )


def _loosely(name: str) -> str:
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())
