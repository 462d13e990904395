"""--teacher: a trained network from whose answers another one learns, wherever it comes from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import given, trusted
from edge_bcs.cli.networks import is_checkpoint, is_onnx, is_own, normalization, own
from edge_bcs.core.errors import EdgeBcsError

_WITH_TEACHER = ("model", "weight", "temperature")


def teacher_options(function: Any) -> Any:
    """Add --teacher, and what goes with it."""
    options = (
        click.option(
            "--teacher", metavar="PATH|NAME",
            help="A trained network, such as the dense one, whose answers count beside the labels: what "
            "`train`, `export` or `finetune` wrote, an ONNX file, a state dict, or a name of `edge-bcs zoo`. "
            "With --engine torch.",
        ),
        click.option(
            "--teacher-model", metavar="MODULE:FACTORY",
            help="What makes the teacher where it is a network of your own, and another one than --model.",
        ),
        click.option(
            "--teacher-weight", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
            help="How much the teacher counts: the loss gets this times T²·KL(its answers, ours) added, with "
            "both softened by T.",
        ),
        click.option(
            "--teacher-temperature", type=click.FloatRange(0, min_open=True), default=4.0, show_default=True,
            help="T, by which logits are divided: the larger, the more it counts how the teacher ranks the "
            "wrong classes.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def check_teacher(options: dict[str, Any]) -> None:
    """Refuse a teacher that is not there, and options that have no use, before anything is read."""
    from edge_bcs import zoo

    path, made = options["teacher"], options["teacher_model"]
    for name in _WITH_TEACHER:
        if path is None and given(f"teacher_{name}"):
            raise EdgeBcsError(f"--teacher-{name} is of a --teacher: give one.")
    if path is None:
        return
    if options["engine"] == "sparse":
        raise EdgeBcsError("--teacher is for --engine torch.")
    if not _is_there(path) and path not in [card.name for card in zoo.read_cards()]:
        raise EdgeBcsError(f"--teacher {path}: there is no such file or folder, nor such a name in the zoo.")
    if made is not None and not is_own(made):
        raise EdgeBcsError(
            f"--teacher-model {made}: give what makes a network of your own, FILE.py:FACTORY; a checkpoint "
            "of one of edge-bcs says by itself what it is."
        )
    if made is not None and (is_onnx(path) or not _is_there(path)):
        raise EdgeBcsError(f"--teacher {path} says by itself what it is: leave --teacher-model out.")


def teacher(network: Any, data: Any, options: dict[str, Any]) -> Any:
    """Return the `Teacher` that the options name; None without one.

    Args:
        network: the one that learns, a module or of the zoo a sparse network.
        data: to train on.

    Raises:
        EdgeBcsError: it cannot be read, or fits neither its own model nor the data.
    """
    from edge_bcs.method.distillation import Teacher

    if options["teacher"] is None:
        return None
    try:
        found = _found(network, data, options)
    except EdgeBcsError as error:
        raise EdgeBcsError(f"--teacher: {error}") from None
    return Teacher(found, weight=options["teacher_weight"], temperature=options["teacher_temperature"])


def _found(network: Any, data: Any, options: dict[str, Any]) -> Any:
    from edge_bcs import loading
    from edge_bcs.method.hooks import set_normalization
    from edge_bcs.runtime.archive import is_artifact
    from edge_bcs.weights import load_as_saved

    path, made = options["teacher"], options["teacher_model"]
    if not _is_there(path):
        return loading.pretrained(path)
    onnx, trust = is_onnx(path), trusted(options)
    ours = not onnx and (is_checkpoint(path) or is_artifact(Path(path)))
    record = loading.record_of(path) if ours else {}
    if ours and made is None and loading.rebuilds(record):
        return loading.load(path, **trust)
    if not ours:
        loading.check_unsigned(path, **trust)
    if onnx:
        module = own(path, data.shape, option="--teacher")
    elif made is not None:
        module = _made(made, data, "--teacher-model")
    elif is_own(options["model"]):
        module = _made(options["model"], data, "--model")
    elif ours:
        by = record.get("factory")
        raise EdgeBcsError(
            f"{path} holds a network of your own{f', made by {by[:200]}' if isinstance(by, str) else ''}: "
            "name what makes it with --teacher-model FILE.py:FACTORY."
        )
    else:
        module = copy.deepcopy(network if options["zoo_file"] is None else network.network)
    if ours:  # which says how its pixels are normalised
        return loading.load(path, module, **trust)
    if options["normalize"] is not None:
        set_normalization(module, normalization(options))
    if not onnx:
        try:
            load_as_saved(module, path, data.shape)
        except EdgeBcsError as error:
            more = "" if made else " Is it another network? --teacher-model names what makes it."
            raise EdgeBcsError(f"{error}{more}") from None
    return module


def _is_there(path: str) -> bool:
    return bool(path) and Path(path).exists()


def _made(source: str, data: Any, option: str) -> Any:
    """Return the network that a factory makes: with its own number of outputs, or one for each class."""
    try:
        return own(source, data.shape, option=option)
    except EdgeBcsError:
        return own(source, data.shape, len(data.classes), option)
