"""AutoAttack, Square and Brendel & Bethge through the libraries that the field uses (extra `eval`).

| attack | library | settings |
| --- | --- | --- |
| autoattack | pyautoattack | standard ensemble (Croce & Hein, 2020) |
| square | pyautoattack | margin loss, budgets of `queries` (Andriushchenko et al., 2020) |
| bb | Foolbox | B&B∞ (Brendel et al., 2019): `steps` steps from an image of wide-radius PGD |
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method import attacks
from edge_bcs.method.attacks import Model

Adversary = Callable[[Tensor, Tensor, int], Tensor]
_INITIAL_RADII = (2, 4, 8, 32)


@contextlib.contextmanager
def _without_sockets() -> Iterator[None]:
    """Keep urllib3, which Foolbox imports and no attack needs, from trying IPv6 with a socket."""
    there, socket.has_ipv6 = socket.has_ipv6, False
    try:
        yield
    finally:
        socket.has_ipv6 = there
        if there and (connection := sys.modules.get("urllib3.util.connection")) is not None:
            connection.HAS_IPV6 = True  # type: ignore[attr-defined]  # for those who do use it


def _library(module: str, package: str) -> Any:
    try:
        with _without_sockets():
            return importlib.import_module(module)
    except ImportError:
        raise EdgeBcsError(
            f"this attack needs {package}; install it with pip install 'edge-bcs[eval]'"
        ) from None


def _on_right_answers(model: Model, attack: Adversary, *versions: int) -> Adversary:
    """Return an adversary that attacks only the images about which the network is right.

    What it returns has the shape of x, behind the leading dimensions `versions` that `attack` returns.
    """

    def adversary(x: Tensor, labels: Tensor, number: int) -> Tensor:
        with torch.no_grad():
            right = attacks.answers_of(model(x)) == labels
        found = x.expand(*versions, *x.shape).clone()
        if right.any():
            found[..., right, :, :, :] = attack(x[right], labels[right], number).detach()
        return found

    return adversary


@contextlib.contextmanager
def _warnings_of(logger: str, into: list[str]) -> Iterator[None]:
    """Collect what a library's logger warns of, each sentence once."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in into:
                into.append(record.getMessage())

    source, collector = logging.getLogger(logger), Collector(logging.WARNING)
    source.addHandler(collector)
    try:
        yield
    finally:
        source.removeHandler(collector)


def autoattack(model: Model, *, epsilon: float, seed: int, warnings: list[str]) -> Adversary:
    """Return AutoAttack's standard l∞ ensemble; what it finds suspicious is added to `warnings`.

    With fewer than ten classes its targeted attacks take all other classes as targets.

    Raises:
        EdgeBcsError: the library is missing; later, a network with fewer than four classes.
    """
    library = _library("pyautoattack", "pyautoattack")

    def attack(x: Tensor, labels: Tensor, number: int) -> Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        if classes < 4:
            raise EdgeBcsError(f"AutoAttack's loss needs at least 4 classes, and the network has {classes}")
        ensemble = library.AutoAttack(model, eps=epsilon, seed=seed + number, device=x.device)
        ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = min(9, classes - 1)
        with _warnings_of("auto-attack", warnings):
            found: Tensor = ensemble.run_standard_evaluation(x, labels, batch_size=len(x))[0]
        return found

    return _on_right_answers(model, attack)


def square(model: Model, *, epsilon: float, queries: Sequence[int], seed: int) -> Adversary:
    """Return Square with budgets of queries: black-box, so it sees through masked gradients.

    The adversary returns f32 [budgets, n, C, H, W], in the order of `queries`. One run with the largest
    budget tells what every smaller one finds: the search does not look ahead, and whatever the budget it is
    the same up to its end.
    """
    if min(queries) < 1:
        raise EdgeBcsError(f"Square needs at least 1 query, not {min(queries)}")
    library = _library("pyautoattack.square", "pyautoattack")

    def attack(x: Tensor, labels: Tensor, number: int) -> Tensor:
        search = library.SquareAttack(
            model,
            norm="Linf",
            n_queries=max(queries),
            eps=epsilon,
            p_init=0.8,
            n_restarts=1,
            loss="margin",
            resc_schedule=False,
            device=x.device,
        )
        search.init_hyperparam(x)
        torch.manual_seed(seed + number)
        # What the library calls n queries are n tries after that of the stripes it begins with.
        used, best = search.attack_single_run(x, labels)
        with torch.no_grad():
            fooled = attacks.answers_of(model(best)) != labels
        in_time = [(fooled & (used <= budget + 1)).view(-1, 1, 1, 1) for budget in queries]
        return torch.stack([torch.where(won, best, x) for won in in_time])

    return _on_right_answers(model, attack, len(queries))


def brendel_bethge(model: Model, *, epsilon: float, steps: int) -> Adversary:
    """Return B&B∞, which looks for the smallest perturbation; the image is fooled if that is within ε.

    It walks along the decision boundary, so it needs an adversarial image to begin with: that of PGD with the
    smallest of the radii 2, 4, 8 and 32 times ε that has one. Where none has, the image is left as it is.
    """
    foolbox = _library("foolbox", "foolbox")
    _library("numba", "numba")
    logging.getLogger("numba").setLevel(logging.WARNING)

    def attack(x: Tensor, labels: Tensor, number: int) -> Tensor:
        begin, fooled = x.clone(), torch.zeros_like(labels, dtype=torch.bool)
        for factor in _INITIAL_RADII:
            radius = min(1.0, factor * epsilon)
            tried = attacks.pgd(model, x, labels, epsilon=radius, step_size=radius / 8, steps=40)
            with torch.no_grad():
                won = (attacks.answers_of(model(tried)) != labels) & ~fooled
            begin[won], fooled = tried[won], fooled | won
        found = x.clone()
        if fooled.any():
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
            search = foolbox.attacks.LinfinityBrendelBethgeAttack(steps=steps)
            _, near, _ = search(
                wrapped, x[fooled], labels[fooled], starting_points=begin[fooled], epsilons=epsilon
            )
            found[fooled] = near
        return found

    return _on_right_answers(model, attack)
