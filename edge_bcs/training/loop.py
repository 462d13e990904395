"""Training from scratch on the host: what is asked for becomes a plan, and the plan a run.

Every random number is a function of the seed and the step, and a checkpoint holds the whole state, so a
training that was interrupted (by kill -9, too) and resumed on the same machine ends with the same bits as
one that was not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edge_bcs.core.deprecated import OldSpellings
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import PSEUDO_LABELLED, Objective, objective_named
from edge_bcs.core.part import Part
from edge_bcs.core.settings import Attack, Hyper, Schedule, filled
from edge_bcs.core.signals import HeldSignals
from edge_bcs.data.adapt import batch_size_of, dataset_of
from edge_bcs.data.augmentation import augmentation_of
from edge_bcs.data.dataset import Data
from edge_bcs.data.pseudo_labelled import open_pseudo_labelled
from edge_bcs.exportable import trained_part, warn_if_not_exportable
from edge_bcs.method.distillation import Teacher
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training.backends import open_backend
from edge_bcs.training.devices import choose_device
from edge_bcs.training.gradual import GradualPruning
from edge_bcs.training.plan import TrainingPlan, default_precision
from edge_bcs.training.replicas import Replicas
from edge_bcs.training.run import Run
from edge_bcs.training.settings import PLACES, Compute, Feed, Method, OldKeywords, Output
from edge_bcs.training.updates import Rewiring, Update

if TYPE_CHECKING:
    from typing import Unpack

__all__ = ["run_plan", "train"]


def train(
    sparse: SparseModel,
    data: Any,
    *,
    objective: str = "at",
    beta: float | None = None,
    method: str | Method = "bcs",
    train: str = "all",
    epochs: int | None = None,
    schedule: Schedule | str | None = None,
    hyper: Hyper | None = None,
    attack: Attack | None = None,
    pgd_from: float | None = None,
    input_shape: Sequence[int] | None = None,
    batch_size: int | None = None,
    batch_norm: str = "batch",
    feed: Feed | None = None,
    teacher: Teacher | None = None,
    seed: int | None = None,
    compute: Compute | None = None,
    output: str | PathLike[str] | Output | None = None,
    progress: bool = True,
    **old: Unpack[OldKeywords],
) -> dict[str, Any]:
    """Train a sparse network (Algorithm 1), and leave it with the weights of its best epoch.

    The best epoch has the highest robust accuracy (PGD with the training attack; clean accuracy for natural
    training) on images of the training data that are held out for it. Under torchrun all processes train one
    network (see `edge_bcs.training.replicas`), and the first writes. Where KeyboardInterrupt or SystemExit
    ends it, the network and the folder are left with the steps that were done (torchrun's folder with those
    that were saved last).

    Args:
        sparse: what `sparsify` returned; trained in place. Its `classes` are matched with the data's by name
            (edge_bcs/data/classes.py); where it has none, it gets the data's.
        data: a data set of `edge_bcs.data`; (images, labels), arrays or tensors: floats [N, C, H, W] in
            [0, 1], or u8, which are divided by 255, and whole numbers; "digits" or a path; a map-style torch
            Dataset of (image, label), or a DataLoader of one. Of a loader its dataset and its batch size
            count, its order does not: every epoch has one of its own (see `edge_bcs.data.adapt`).
        objective: natural, at, mixed, trades, rst or mart.
        beta: weight of the objective's second term; its default if None.
        method: "bcs", or a baseline: "random", "fixed" or "dense"; or a `Method`, which has the name first
            and may also say where connections are born, that small ones move by their gradient, and that a
            dense network is pruned on the way.
        train: what is trained, as in `export`: "all"; "head", the last layer with weights; "last:N", the last
            N of them, in the order of computation, with the norms and biases from there on; "norm", the
            scales and shifts of norms; "bias", the biases and the shifts of norms. Connections move among
            what is trained; no other gradient is computed, and batch norms outside it keep their statistics.
            The attack sees all of the network. Neither with gradual pruning nor with rewiring by layer.
        epochs: passes over the data that is not held out, 200 if None; a last batch that is not full is left
            out. Short for the same field of `schedule`.
        schedule: a length in steps, how the rates change, and when to end early.
        hyper: learning rate, weight decay, momentum and noise.
        attack: while training; default: PGD-10 with ε 8/255. A single step is watched, and falls back on PGD
            where it collapses (see `edge_bcs.core.collapse`).
        pgd_from: share of the steps, in [0, 1], after which PGD takes the place of a single-step attack;
            never if None.
        input_shape: (C, H, W) to which the images of a path are brought; what the network was made for if
            None, which networks of `edge_bcs.models` say.
        batch_size: images a step; if None that of the DataLoader, or 128, or 256 for rst, half of them from
            the pseudo-labelled data.
        batch_norm: "batch", or "frozen" for running statistics throughout (fine-tuning).
        feed: augmentation, balance, the share that is held out, the second data set of rst.
        teacher: a trained network whose answers count beside the labels; the loss that is told has its part.
            In PyTorch alone.
        seed: of order, augmentation and attack; the network's if None.
        compute: engine (PyTorch, or the sparse kernels), device, precision, compilation, threads.
        output: folder for checkpoints and metrics, or an `Output`, which has it first and may also resume
            what the folder holds.
        progress: show on standard error how far it is: a bar, or a line every ten seconds.
        **old: keywords of 0.1, whose warning names what takes their place.

    Returns:
        the last line of epochs.jsonl, with "best_epoch", "best_step", "best_robust_acc", "best_clean_acc",
        "step", "early" (whether patience ended it), with a single-step attack "fell_back" (the steps done
        when PGD took its place, or None), "seconds", "warnings" (sentences: a network in which
        nothing leads from image to answer), "classes", "matched_by" and "missing_classes" (see
        `classes.Match`).

    Raises:
        EdgeBcsError: an argument out of range, a device that is not there, rst without its second data set,
            data or a teacher that does not fit, a class that the network does not know, a pixel beyond [0, 1]
            or not finite, a checkpoint of another plan, an output folder into which another process trains or
            in which something would be written over, or a step that would make a weight that is not finite.
    """
    given: dict[str, Any] = dict(old)
    if isinstance(schedule, str):
        given, schedule = {**given, "schedule": schedule}, None
    spelt = OldSpellings("train", given, PLACES)
    schedule = spelt.into("schedule", schedule, Schedule(), epochs=epochs)
    hyper = spelt.into("hyper", hyper, Hyper())
    attack = spelt.into("attack", attack, Attack())
    feed = spelt.into("feed", feed, Feed())
    compute = spelt.into("compute", compute, Compute())
    place = (output, Output()) if isinstance(output, Output) else (None, Output(output))
    kept = spelt.into("output", *place)
    way = spelt.into(
        "method", *((method, Method()) if isinstance(method, Method) else (None, Method(method)))
    )
    if teacher is not None and not isinstance(teacher, Teacher):
        raise EdgeBcsError(f"a teacher is an edge_bcs.Teacher(network), not a {type(teacher).__name__}")
    rule = objective_named(objective)
    batch_size = batch_size_of(data) if batch_size is None else batch_size
    data = dataset_of(data, shape=input_shape or sparse.input_shape, resize=sparse.resize)
    second = None if feed.pseudo_labelled is None else _second(feed.pseudo_labelled, data.shape)
    _check_data(rule, data, second)
    device = choose_device(compute.place)
    if way.gradual is not None and compute.engine != "torch":
        raise EdgeBcsError(f"gradual pruning is for the engine torch, not for {compute.engine}")
    if way.growth is not None and train != "all":
        raise EdgeBcsError(f"growth by gradient concerns the whole network: train all of it, not {train}")
    trained = trained_part(sparse, Part.parse(train), data.shape)
    if trained is not None:
        if way.gradual is not None or way.rewire == "by-layer":
            what = "gradual pruning" if way.gradual is not None else "rewiring by layer"
            raise EdgeBcsError(f"{what} concerns the whole network: train all of it, not {trained.part.text}")
        if batch_norm == "batch":
            trained.batch_norms([item.name for item in sparse.statistics])
    first = filled(hyper, fine_tuning=False, batch_norm=batch_norm)
    plan = TrainingPlan(
        objective=rule,
        beta=rule.beta if beta is None else beta,
        method=way.name,
        rewire="none" if way.static else way.rewire,
        engine=compute.engine,
        processes=Replicas.join(device).count,
        schedule=schedule,
        batch_size=rule.batch_size if batch_size is None else batch_size,
        hyper=replace(first, noise=0.0) if way.static else first,
        attack=attack,
        batch_norm=batch_norm,
        precision=compute.precision or default_precision(device),
        attack_precision=compute.attack_precision,
        pgd_from=pgd_from,
        augment=augmentation_of(feed.augment),
        balance=feed.balance,
        validation=feed.validation,
        samples=len(data),
        seed=sparse.seed if seed is None else seed,
        gradual=way.gradual,
        growth=way.growth,
        teacher=teacher,
        train="all" if trained is None else trained.part.text,
    )
    return run_plan(
        sparse,
        data,
        plan,
        Rewiring(plan.rewire, trained) if way.gradual is None else GradualPruning(plan.rewire, way.gradual),
        pseudo_labelled=second,
        device=device,
        compute=compute,
        output=kept,
        progress=progress,
    )


def _second(pseudo_labelled: Any, shape: tuple[int, int, int]) -> Data:
    if isinstance(pseudo_labelled, (str, PathLike)):
        return open_pseudo_labelled(Path(pseudo_labelled), shape)
    return dataset_of(pseudo_labelled)


def run_plan(
    sparse: SparseModel,
    data: Data,
    plan: TrainingPlan,
    update: Update,
    *,
    pseudo_labelled: Data | None = None,
    device: torch.device,
    compute: Compute,
    output: Output,
    progress: bool = True,
) -> dict[str, Any]:
    """Train as `plan` says, with any update; arguments, result and refusals are those of `train`.

    Of ``compute``, only what decides no number counts: the threads, and whether the network is compiled.
    """
    replicas = Replicas.join(device)
    sparse.to(device)
    replicas.start_alike(sparse)
    run = Run(sparse, data, pseudo_labelled, plan, update, replicas)
    if sparse.own:
        sparse.input_shape = data.shape
    if replicas.first:
        warn_if_not_exportable(sparse, data.shape, depth=4)
    names_before, sparse.classes = sparse.classes, run.classes
    began = False
    try:
        run.begin(
            open_backend(sparse, plan, update, shape=data.shape, replicas=replicas, threads=compute.threads)
        )
        if output.folder is not None:
            run.open(Path(output.folder), output.resume)
        if compute.compile:
            sparse.network.compile()
        run.backend.load(run.step)
        began = True
        return run.train(output.save_seconds, progress and replicas.first)
    except BaseException as error:
        if began and not run.over:
            with contextlib.suppress(EdgeBcsError):
                run.leave(keep=isinstance(error, (KeyboardInterrupt, SystemExit)))
        raise
    finally:
        with HeldSignals() as signals:
            signals.hold()
            if not began:
                sparse.classes = names_before
            sparse.network._compiled_call_impl = None
            sparse.eval()
            run.close()


def _check_data(objective: Objective, data: Data, pseudo_labelled: Data | None) -> None:
    if objective.pseudo_labelled and pseudo_labelled is None:
        raise EdgeBcsError(
            f"{objective.name} needs a second, pseudo-labelled data set (feed=Feed(pseudo_labelled=…))"
        )
    if pseudo_labelled is not None and not objective.pseudo_labelled:
        choices = " or ".join(PSEUDO_LABELLED)
        raise EdgeBcsError(
            f"{objective.name} has no use for pseudo-labelled data; choose the objective {choices}"
        )
    for part in (data, pseudo_labelled):
        if part is not None and len(part) == 0:
            raise EdgeBcsError("the data set is empty")
    if pseudo_labelled is not None and tuple(pseudo_labelled.shape) != tuple(data.shape):
        raise EdgeBcsError(
            f"the pseudo-labelled images have the shape {list(pseudo_labelled.shape)}, the others "
            f"{list(data.shape)}"
        )
