"""Where two manifests differ, for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge_bcs.data.classes import check_names, may_become


def difference(run: dict[str, Any], artifact: dict[str, Any]) -> str | None:
    """Where two manifests differ first: "its objective.epsilon is 0.031, this artifact's 0.016"."""
    skipped = {"created_by", "attack_precision"}  # a run says what its training has
    # A run has the names of the data that its artifact was first trained on.
    stored, classes = (
        tuple(check_names(manifest["classes"], "the manifest's classes")) if "classes" in manifest else None
        for manifest in (artifact, run)
    )
    if classes is None or may_become(stored, classes) or may_become(classes, stored or ()):
        skipped.add("classes")
    names = [name for name in {**artifact, **run} if name not in skipped]
    names.sort(key=lambda name: name in ("memory", "files"))  # what follows from the others
    found = first_difference(run, artifact, names)
    if found is None:
        return None
    where, one, other = found
    if where.startswith("files."):
        return f"its {where.removeprefix('files.').removesuffix('.sha256')} is another"
    return f"its {where} is {one}, this artifact's {other}"


def first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]
) -> tuple[str, str, str] | None:
    """Return (field, its value in each, for people) of the first of the fields ``names``, or of what lies in
    them, in which two objects of JSON differ; None if they do not."""
    for name in names:
        for where, *values in _differences(name, one.get(name), other.get(name)):
            return where, *_shown(*values)
    return None


def _differences(where: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (field, its value, the other's) of what differs between two values of JSON."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in {**other, **one}:
            yield from _differences(f"{where}.{name}", one.get(name), other.get(name))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{where}[{number}]", *pair)
    elif json.dumps(one) != json.dumps(other):  # as text: a number that is none (NaN) is the same as itself
        yield where, one, other


def _shown(one: Any, other: Any) -> tuple[str, str]:
    """Two different values in as few digits as tell them apart."""
    if isinstance(one, float) and isinstance(other, float):
        for digits in (2, 4, 8):
            texts = f"{one:.{digits}g}", f"{other:.{digits}g}"
            if texts[0] != texts[1]:
                return texts
    return _short(one), _short(other)


def _short(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
