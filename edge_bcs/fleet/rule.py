"""The rule by which sparse networks become one: scores, the κ connections that stay, and their values.

Over the union of the positions that the clients hold, a position's score is |Σ n·w / Σ n|: n is the weight
of a client, w its connection there, or 0 where it has none. The κ largest scores stay, of equal ones those of
the lowest positions; the value is the mean, weighted by n, over the clients that hold the position. Where all
hold the same positions, this is the plain weighted average.

Sums are taken in double precision, client after client in the order in which they come: who calls this
decides an order that does not depend on how the clients were named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_bcs.core import random
from edge_bcs.core.state import NEWBORN

Array = np.ndarray[Any, Any]
Clients = Callable[[], Iterable[tuple[Array, Array, float]]]
"""Gives, each time anew and in the same order, (positions, values, n) of one client after the other."""
SEGMENT = 1 << 22
"""Positions that are summed up at once, 18 bytes each; a larger network is read so many times."""
_CHUNK = 1 << 19


@dataclass(frozen=True)
class Group:
    """Positions among which a number of connections never changes.

    Attributes:
        spans: (begin, end) of runs of positions, ascending. kappa: connections that lie there, of each client
            and of what becomes of them.
    """

    spans: Sequence[tuple[int, int]]
    kappa: int


@dataclass(frozen=True)
class Kept:
    """The connections that stay.

    Attributes:
        index: positions i64[κ], ascending. value: f32[κ], none of them 0. holders: i64[κ], clients that hold
            each. union: positions that at least one client holds. common: that all hold.
        shared: summed over all pairs of clients, the positions that both hold.
    """

    index: Array
    value: Array
    holders: Array
    union: int
    common: int
    shared: int


def merge_connections(
    clients: Clients, count: int, size: int, groups: Sequence[Group], seed: int, segment: int = SEGMENT
) -> Kept:
    """Apply the rule to the connections of ``count`` clients.

    Args:
        clients: see `Clients`; positions ascend within [0, size), none twice, and n is positive.
        size: N, positions of the network. groups: which parts of it keep how many connections.
        seed: of the signs of connections whose mean is 0.
        segment: positions that are summed up at once.
    """
    choices = [_Choice(group.kappa) for group in groups]
    union = common = shared = 0
    for begin in range(0, size, segment):
        end = min(begin + segment, size)
        sums, holders = _sums(clients, count, begin, end)
        for first in range(0, end - begin, _CHUNK):
            held = holders[first : first + _CHUNK].astype(np.int64)
            union += int(np.count_nonzero(held))
            common += int(np.count_nonzero(held == count))
            shared += int((held * (held - 1)).sum()) // 2
        for group, choice in zip(groups, choices, strict=True):
            for lowest, highest in group.spans:
                for first in range(max(lowest, begin), min(highest, end), _CHUNK):
                    last = min(first + _CHUNK, highest, end)
                    choice.offer(
                        first, sums[first - begin : last - begin], holders[first - begin : last - begin]
                    )
    index = np.concatenate([choice.index for choice in choices])
    order = np.argsort(index)
    index = index[order]
    mean = np.concatenate([choice.mean for choice in choices])[order]
    kept = np.concatenate([choice.holders for choice in choices])[order]
    return Kept(index, as_weights(mean, index, seed), kept, union, common, shared)


def as_weights(mean: Array, index: Array, seed: int) -> Array:
    """Return means f64[κ] as weights f32[κ], none of which is 0: a mean of 0 becomes a newborn's weight, with
    the sign γ of its position."""
    value = mean.astype(np.float32)
    if not value.all():
        none = np.flatnonzero(value == 0)
        signs = np.where(mean[none] == 0, random.signs(index[none], seed=seed), np.sign(mean[none]))
        value[none] = signs.astype(np.float32) * NEWBORN
    return value


def _sums(clients: Clients, count: int, begin: int, end: int) -> tuple[Array, Array]:
    """Of each position in [begin, end): Σ n·w and Σ n over the clients that hold it, as the real and the
    imaginary part of one number, so that memory is gone through once; and how many hold it."""
    sums = np.zeros(end - begin, np.complex128)
    holders = np.zeros(end - begin, np.min_scalar_type(count))
    for index, value, weight in clients():
        first, last = np.searchsorted(index, np.array([begin, end], index.dtype))
        places = index[first:last].astype(np.int64)
        places -= begin
        terms = np.empty(len(places), np.complex128)
        np.multiply(value[first:last], weight, out=terms.real, dtype=np.float64)
        terms.imag = weight
        terms += sums.take(places)
        sums[places] = terms
        holders[places] += holders.dtype.type(1)
    return sums, holders


class _Choice:
    """The κ best of the positions that were offered so far, which come in ascending order.

    Attributes:
        index: positions i64, ascending. mean: f64, over the holders. holders: how many there are.
    """

    def __init__(self, kappa: int) -> None:
        self._kappa = kappa
        self._score = np.empty(0)
        self.index, self.mean, self.holders = np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64)

    def offer(self, first: int, sums: Array, holders: Array) -> None:
        """Take the positions from ``first`` on into account."""
        # Σ n over all clients divides every score alike, and would only make some equal that are not.
        score = np.abs(sums.real)
        wanted = holders > 0
        if len(self._score) == self._kappa:  # of equal scores those stay that came first
            wanted &= score > self._score.min(initial=np.inf)
        held = np.flatnonzero(wanted)
        found = sums[held]
        self._score = np.concatenate([self._score, score[held]])
        self.index = np.concatenate([self.index, held + first])
        self.mean = np.concatenate([self.mean, found.real / found.imag])
        self.holders = np.concatenate([self.holders, holders[held].astype(np.int64)])
        excess = len(self._score) - self._kappa
        if excess <= 0:
            return
        least = np.partition(self._score, excess)[excess]
        stays = self._score > least
        level = np.flatnonzero(self._score == least)
        stays[level[: self._kappa - int(np.count_nonzero(stays))]] = True
        self._score, self.index = self._score[stays], self.index[stays]
        self.mean, self.holders = self.mean[stays], self.holders[stays]


def average(vectors: Iterable[tuple[Sequence[Array], float]]) -> list[Array]:
    """Return the weighted means, f32, of vectors of which each client has several: (vectors, n) of one client
    after the other."""
    sums: list[Array] = []
    total = 0.0
    for ours, weight in vectors:
        terms = [vector.astype(np.float64) * weight for vector in ours]
        sums = [one + other for one, other in zip(sums, terms, strict=True)] if sums else terms
        total += weight
    return [(one / total).astype(np.float32) for one in sums]


def median(columns: Array) -> Array:
    """Return the median f64[n] of each column of f32[m, n], of what is no NaN in it: at least one number. Of
    an even number it is the mean of the two in the middle."""
    ordered = np.sort(columns.T, axis=1)  # NaN comes last
    count = np.count_nonzero(~np.isnan(ordered), axis=1)
    rows = np.arange(len(ordered))
    low, high = ordered[rows, (count - 1) // 2], ordered[rows, count // 2]
    middle: Array = (low.astype(np.float64) + high) / 2
    return middle
