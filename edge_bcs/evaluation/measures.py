"""Clean and robust accuracy of any torch module, in RobustBench's terms.

An image counts as robust if the network is right about the clean image and about every adversarial image
found. Reports also warn of known signs of a robustness that is not real: gradients that vanish, a
network that answers at random, a black-box attack that beats a gradient attack (Athalye et al., 2018).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_bcs.core.answers import NO_ANSWER, OnAnswers, without_answer
from edge_bcs.core.answers import Batch as Answered
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically
from edge_bcs.core.metadata import parse_object
from edge_bcs.core.outputs import check_output, json_with
from edge_bcs.core.progress import Progress
from edge_bcs.core.resizing import SQUASH
from edge_bcs.data.adapt import as_array, dataset_of, is_pair, stated_classes
from edge_bcs.data.classes import match, match_batches, say
from edge_bcs.data.dataset import Data, check_finite, check_pixels
from edge_bcs.evaluation import libraries as external_attacks
from edge_bcs.evaluation.libraries import Adversary
from edge_bcs.method import attacks
from edge_bcs.method.attacks import Model
from edge_bcs.method.losses import cross_entropy
from edge_bcs.method.sparse_model import SparseModel

ATTACKS = ("none", "fgsm", "pgd", "autoattack", "square", "bb")


Batches = Iterable[tuple[NDArray[Any], NDArray[Any]]]


def device_of(model: object) -> torch.device:
    """Return where a module's first parameter lies; the CPU if it has none."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def evaluate(
    model: Model,
    data: Any,
    *,
    attack: str = "pgd",
    epsilon: float = 8 / 255,
    steps: int = 50,
    restarts: int = 10,
    step_size: float | None = None,
    queries: int | Sequence[int] = 5000,
    batch_size: int = 128,
    samples: int | None = None,
    seed: int = 0,
    progress: bool = False,
    resume: str | Path | None = None,
    on_answers: OnAnswers | None = None,
    corruptions: bool = False,
) -> dict[str, Any]:
    """Return clean and robust accuracy with everything that says how they were measured.

    Args:
        model: maps f32 [n, C, H, W] in [0, 1] to logits f32 [n, K]; a module is used in evaluation mode.
        data: a data set, (images, labels), "digits" or a path (its test images), or a map-style torch Dataset
            (see `edge_bcs.data.adapt`); or an iterable of batches (x f32 [n, C, H, W] in [0, 1], y i64[n]),
            such as a DataLoader. The classes of whatever names them are
            matched with those of a `SparseModel` by name (edge_bcs/data/classes.py).
        attack: "pgd" with uniform random starts, "fgsm", "none", or one that needs the extra `eval`:
            "autoattack", "square", "bb" (B&B∞).
        epsilon: radius of the l∞ ball, in units of pixels in [0, 1].
        steps, restarts: of PGD; an image is robust only if no restart fools the network. B&B∞ has steps, too.
        queries: of Square; of several budgets, one run with the largest tells all.
        step_size: of PGD; 2.5·ε/steps if None (Madry et al., 2018).
        batch_size: images at a time, where `data` is a data set.
        samples: only so many images, the first of a fixed shuffle (data on disk is often sorted by class), or
            the first of an iterable; all if None.
        seed: of PGD's starts.
        progress: show on standard error how far it is: a bar, or a line every ten seconds.
        resume: JSON file in which the counts are kept after each batch; if it holds those of an interrupted
            evaluation of the same network with the same settings, that one is continued; those of another are
            refused. Removed at the end.
        on_answers: called with each batch and its answers (`edge_bcs.core.answers`); of several budgets of
            queries those of the largest. What an interrupted evaluation did before is not told.
        corruptions: also measure the accuracy on corrupted images of a data set (see
            `edge_bcs.evaluation.corruptions`), drawn by ``seed``; `resume` keeps nothing of it.

    Returns:
        {"clean_acc", "adv_acc" (fractions), "samples", "attack", "norm": "Linf", "eps", "steps",
        "restarts", "step_size", "seed", "seconds", "warnings": [sentences]}; adv_acc is None for the attack
        "none". With ``corruptions`` "corruptions" and "mean_corruption_acc", see `under_corruptions`.
        Settings that an attack does not have are left out ("queries" is Square's). With several
        budgets "queries" and "adv_acc" are those of the largest, and "curve" lists {"queries", "adv_acc"} of
        each. Of a `SparseModel` and a data set also "classes", "matched_by" and "missing_classes" (see
        `classes.Match`).

    Raises:
        EdgeBcsError: an unknown attack or one whose library is missing, an empty data set, a class that the
            network does not know, a label outside its outputs.
    """
    if attack not in ATTACKS:
        raise EdgeBcsError(f"there is no attack {attack!r} here; choose one of {', '.join(ATTACKS)}")
    if corruptions:
        from edge_bcs.evaluation.corruptions import under_corruptions

        data = _readable(model, data)
        if not isinstance(data, Data):
            raise EdgeBcsError("corruptions need a data set, whose images have a place in it, not batches")
    warnings: list[str] = []
    budgets = sorted({queries} if isinstance(queries, int) else set(queries))
    adversarial, details = _adversary(
        model,
        attack,
        epsilon=epsilon,
        steps=steps,
        restarts=restarts,
        step_size=step_size,
        budgets=budgets,
        seed=seed,
        warnings=warnings,
    )
    report = measure(
        model,
        data,
        adversarial,
        {"attack": attack, "norm": "Linf", "eps": epsilon, **details, "seed": seed},
        batch_size=batch_size,
        samples=samples,
        progress=progress,
        resume=resume,
        warnings=warnings,
        budgets=budgets if attack == "square" else (),
        on_answers=on_answers,
    )
    if corruptions:
        labelled = match(data, model.classes).data if isinstance(model, SparseModel) else data
        with attacks.evaluation_mode(model):
            report |= under_corruptions(
                _answering(model),
                labelled,
                samples=samples,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
    return report


def _answering(model: Model) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Return what takes images f32 [n, C, H, W] for classes i64[n]."""
    device = device_of(model)

    def answer(images: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            answers: NDArray[Any] = (
                attacks.answers_of(model(torch.from_numpy(images).to(device))).cpu().numpy()
            )
        return answers

    return answer


def _adversary(
    model: Model,
    attack: str,
    *,
    epsilon: float,
    steps: int,
    restarts: int,
    step_size: float | None,
    budgets: Sequence[int],
    seed: int,
    warnings: list[str],
) -> tuple[Adversary | None, dict[str, Any]]:
    """Return what finds adversarial images, and those settings that it has."""
    if attack == "none":
        return None, {}
    if attack == "fgsm":
        return lambda x, labels, _: attacks.fgsm(model, x, labels, epsilon=epsilon), {"step_size": epsilon}
    if attack == "autoattack":
        return external_attacks.autoattack(model, epsilon=epsilon, seed=seed, warnings=warnings), {}
    if attack == "square":
        black_box = external_attacks.square(model, epsilon=epsilon, queries=budgets, seed=seed)
        return _beside_pgd(model, black_box, epsilon, seed, warnings), {"queries": budgets[-1]}
    if steps < 1:
        raise EdgeBcsError(f"an attack needs at least 1 step, not {steps}")
    if attack == "bb":
        return external_attacks.brendel_bethge(model, epsilon=epsilon, steps=steps), {"steps": steps}
    size = 2.5 * epsilon / steps if step_size is None else step_size

    def restarted(x: Tensor, labels: Tensor, number: int) -> Tensor:
        return attacks.pgd_restarts(
            model,
            x,
            labels,
            restarts=restarts,
            epsilon=epsilon,
            step_size=size,
            steps=steps,
            seed=seed,
            batch=number,
        )

    return restarted, {"steps": steps, "restarts": restarts, "step_size": size}


def _beside_pgd(
    model: Model,
    black_box: Adversary,
    epsilon: float,
    seed: int,
    warnings: list[str],
) -> Adversary:
    """Return the black-box attack, which warns if it beats PGD of 20 steps on the first batch.

    Gradients say more than queries; where they do not, they mislead (Athalye et al., 2018).
    """

    def compared(x: Tensor, labels: Tensor, number: int) -> Tensor:
        found = black_box(x, labels, number)
        if number == 0:
            by_gradient = attacks.pgd_restarts(
                model, x, labels, restarts=1, epsilon=epsilon, step_size=epsilon / 8, steps=20, seed=seed
            )
            with torch.no_grad():
                fooled, by_pgd = (
                    int((attacks.answers_of(model(images)) != labels).sum())
                    for images in (found[-1], by_gradient)
                )
            if fooled > by_pgd + 0.02 * len(x):
                warnings.append(
                    f"Square fools {fooled} of {len(x)} images where PGD fools {by_pgd}: gradients mislead, "
                    "and accuracies under gradient attacks mean little"
                )
        return found

    return compared


def measure(
    model: Model,
    data: Any,
    adversarial: Adversary | None,
    settings: dict[str, Any],
    *,
    batch_size: int = 128,
    samples: int | None = None,
    progress: bool = False,
    resume: str | Path | None = None,
    warnings: list[str] | None = None,
    budgets: Sequence[int] = (),
    on_answers: OnAnswers | None = None,
) -> dict[str, Any]:
    """Count over batches what `evaluate` reports, for any attack (x, labels, batch number) -> images.

    Sentences that the attack adds to `warnings` while it runs become part of the report. An attack with
    `budgets` of queries, ascending, returns images for each of them, f32 [budgets, n, C, H, W].
    """
    warnings = [] if warnings is None else warnings
    data = _readable(model, data)
    matching: dict[str, Any] = {}
    if isinstance(model, SparseModel):
        data, matching = _matched(model, data)
    device = device_of(model)
    total = samples
    if isinstance(data, Data):
        total = len(data) if samples is None else min(samples, len(data))
    if total == 0:
        raise EdgeBcsError("there is no image to evaluate")
    asked = {**settings, "batch_size": batch_size, "samples": total, "budgets": list(budgets)}
    if resume is not None:
        check_output(resume, json_with("asked", "counts"), "the counts of an interrupted evaluation")
        asked["of"] = _fingerprint(model, data)
    versions = max(1, len(budgets))
    new = {**dict.fromkeys(_COUNTS, 0), "adversarial": [0] * versions, "warnings": []}
    counts = {_LOST: 0, **(interrupted_counts(resume, asked, versions) or new)}
    began = time.monotonic()
    named = "measuring" if settings["attack"] == "none" else settings["attack"]
    bar = Progress(named, total, done=counts["samples"], unit="images", shown=progress)
    counting = _counting_passes(model, bar) if progress else contextlib.nullcontext()
    with bar, attacks.evaluation_mode(model), counting:
        for number, (places, images, targets) in enumerate(_batches(data, batch_size, total)):
            if number < counts["batches"]:
                continue
            x, labels = torch.from_numpy(images).to(device), torch.from_numpy(targets).to(device)
            with torch.no_grad():
                logits = model(x)
            _check_labels(labels, logits)
            answers = attacks.answers_of(logits)
            right, lost = answers == labels, answers == NO_ANSWER
            robust = None
            if number == 0:
                counts["warnings"] += _suspicions(model, x, labels, logits)
            counts["clean"] += int(right.sum())
            if adversarial is not None:
                found = adversarial(x, labels, number)
                with torch.no_grad():
                    for version, images_found in enumerate(found.view(versions, *x.shape)):
                        answers = attacks.answers_of(model(images_found))
                        robust, lost = right & (answers == labels), lost | (answers == NO_ANSWER)
                        counts["adversarial"][version] += int(robust.sum())
            if on_answers is not None:
                also_robust = None if robust is None else robust.cpu().numpy()
                on_answers(Answered(places, images, targets, logits.float().cpu().numpy(), also_robust))
            counts[_LOST] += int(lost.sum())
            counts["samples"] += len(x)
            counts["batches"] = number + 1
            counts["warnings"] += [text for text in warnings if text not in counts["warnings"]]
            if resume is not None:
                content = json.dumps({"asked": asked, "counts": counts}).encode()
                write_atomically(Path(resume), content, make_folder=True)
            bar.update(counts["samples"])
    if not counts["samples"]:
        raise EdgeBcsError("there is no image to evaluate")
    if resume is not None:
        Path(resume).unlink(missing_ok=True)
    shares = [count / counts["samples"] for count in counts["adversarial"]]
    report = {
        "clean_acc": counts["clean"] / counts["samples"],
        "adv_acc": shares[-1] if adversarial is not None else None,
        "samples": counts["samples"],
        **settings,
        "seconds": time.monotonic() - began,
        "warnings": [*counts["warnings"], *without_answer(counts[_LOST], counts["samples"])],
        **matching,
    }
    if len(budgets) > 1:
        report["curve"] = [
            {"queries": budget, "adv_acc": share} for budget, share in zip(budgets, shares, strict=True)
        ]
    return report


_COUNTS = ("batches", "samples", "clean")
_LOST = "lost"  # images without an answer, which 0.1 did not count


def _fingerprint(model: Model, data: Data | Batches) -> str:
    """Return a digest of the network's numbers and the data's labels: whose counts are to be continued."""
    digest = hashlib.sha256()
    if isinstance(model, nn.Module):
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(data, Data):
        digest.update(repr(data.shape).encode() + data.labels.tobytes())
    return digest.hexdigest()


def interrupted_counts(
    resume: str | Path | None, asked: dict[str, Any], versions: int
) -> dict[str, Any] | None:
    """Return the counts of an interrupted evaluation, None if there are none.

    Raises:
        EdgeBcsError: those that are there are of another one, and may have taken hours.
    """
    if resume is None or not Path(resume).is_file() or not Path(resume).stat().st_size:
        return None
    counts = _counts(Path(resume), asked, versions)
    if counts is None:
        raise EdgeBcsError(
            f"{resume} keeps the counts of another evaluation, or damaged ones (the network, the data or the "
            "settings differ): finish that one, name another file, or delete it"
        )
    return counts


def _counts(resume: Path, asked: dict[str, Any], versions: int) -> dict[str, Any] | None:
    """Return the counts in a file; None if they are not those of what is asked."""
    try:
        stored = parse_object(read_small(resume))
        counts = {name: stored["counts"][name] for name in (*_COUNTS, "adversarial", "warnings")}
        counts |= {name: stored["counts"][name] for name in (_LOST,) if name in stored["counts"]}
        right = [counts["clean"], *counts["adversarial"]]
    except (ValueError, KeyError, TypeError):
        return None
    numbers = [counts["batches"], counts["samples"], counts.get(_LOST, 0), *right]
    valid = all(type(number) is int and number >= 0 for number in numbers) and len(right) == 1 + versions
    valid = valid and max(right) <= counts["samples"]
    valid = (
        valid and isinstance(counts["warnings"], list) and all(isinstance(t, str) for t in counts["warnings"])
    )
    return counts if valid and stored.get("asked") == asked else None


def _readable(model: Model, data: Any) -> Data | Batches:
    """Return a data set, or the iterable of batches that `data` is."""
    whole = isinstance(data, (str, PathLike)) or is_pair(data)
    sequence = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, Data) or not (whole or (sequence and not isinstance(data, (list, tuple)))):
        batches: Data | Batches = data
        return batches
    shape, resize = getattr(model, "input_shape", None), getattr(model, "resize", SQUASH)
    return dataset_of(data, split="test", shape=shape, resize=resize)


def _matched(model: SparseModel, data: Data | Batches) -> tuple[Data | Batches, dict[str, Any]]:
    """Return the data with the network's labels and how they were matched; as it is if it has no names."""
    if isinstance(data, Data):
        matched = match(data, model.classes)
    else:
        names = stated_classes(getattr(data, "dataset", None))  # of a DataLoader
        if names is None:
            return data, {}
        matched = match_batches(data, names, model.classes)
    say(matched.notes)
    return matched.data, matched.report()


def _batches(data: Data | Batches, batch_size: int, total: int | None) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (places, images, labels) of all images in stored order, or of the first `total` of the shuffle
    that the board takes, too."""
    if isinstance(data, Data):
        order = data.order(0, 0, shuffle=total is not None and total < len(data))[:total]
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            yield places, *_checked(*data.read(places), first)
        return
    left, first = 2**62 if total is None else total, 0
    for x, y in data:
        if left <= 0:
            return
        images, labels = _checked(as_array(x)[:left], as_array(y)[:left], first)
        yield np.arange(first, first + len(images)), images, labels
        left, first = left - len(x), first + len(x)


def _checked(x: NDArray[Any], y: NDArray[Any], first: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a batch as f32 and i64 after looking at its pixels and the kind of its labels."""
    if x.dtype.kind != "f" or y.dtype.kind not in "iu":
        raise EdgeBcsError(
            f"a batch must have floats in [0, 1] and whole numbers as labels, not {x.dtype} and {y.dtype}"
        )
    check_finite(x, lambda place: f"image {first + place}")
    check_pixels(x, "images")
    return x.astype(np.float32, copy=False), y.astype(np.int64, copy=False)


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        wrong = low if low < 0 else high
        raise EdgeBcsError(f"label {wrong} is out of range: the network has {logits.shape[1]} classes")


def _suspicions(model: Model, x: Tensor, labels: Tensor, logits: Tensor) -> list[str]:
    """Return sentences about signs that gradients mislead an attack, seen on one batch."""
    found = []
    with torch.no_grad():
        if not torch.allclose(model(x), logits, rtol=1e-3, atol=1e-4, equal_nan=True):
            found.append("two passes of the same images differ: the network is randomised, and PGD may fail")
    gradient = attacks.input_gradient(model, x, lambda out: cross_entropy(out, labels))
    vanished = float((gradient.flatten(1).abs().amax(1) == 0).float().mean())
    if vanished > 0.1:
        found.append(
            f"the gradient with respect to the image is zero for {vanished:.0%} of images: "
            "a gradient attack cannot succeed there, so check with a black-box attack"
        )
    return found


@contextlib.contextmanager
def _counting_passes(model: Model, bar: Progress) -> Iterator[None]:
    """Tell how often images went through the network: an attack may take minutes over one batch."""
    if not isinstance(model, nn.Module):
        yield
        return
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        bar.update(text=f"passes of the network: {passes:,}")

    hook = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()
