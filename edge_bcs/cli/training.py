"""What `edge-bcs train` does: from its options to data, a network and a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_bcs.cli.common import attack_of, class_names, given, trusted, word
from edge_bcs.cli.networks import (
    asked_classes,
    asked_shape,
    dense_patterns,
    is_checkpoint,
    is_own,
    normalization,
    own,
    prepared,
    registered,
    shape_of,
    start,
    unknown_shape,
)
from edge_bcs.cli.pretrained import with_outputs
from edge_bcs.cli.teacher import teacher
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.resizing import Resize
from edge_bcs.core.settings import Hyper, Schedule
from edge_bcs.training.settings import Compute, Feed, Gradual, Growth, Method, Output

COMPARATORS = ("lwm", "hydra", "admm")
_SAVED = "last.safetensors"


@dataclass(frozen=True)
class _Asked:
    """A training as it is asked for.

    Attributes:
        network: with its weights; of --pretrained a sparse one, all others a module.
        data: to train on. second: the second data set of rst, or None.
        options: of the command. numbers, machine: arguments that every method takes.
    """

    network: Any
    data: Any
    second: Any
    options: dict[str, Any]
    numbers: dict[str, Any]
    machine: dict[str, Any]


def is_begun(output: Path) -> bool:
    """Whether a training has saved into a folder."""
    return any(output.rglob(_SAVED))


def how_to_go_on(output: Path) -> str:
    """What to say of a training that was stopped: how far its folder has it, and how it goes on."""
    from edge_bcs.checkpoint import read_checkpoint

    if not is_begun(output):
        return "Stopped; nothing was saved yet."
    last = output / _SAVED  # those of a phase before the last one lie deeper
    after = f" after step {read_checkpoint(last).step}" if last.is_file() else ""
    return f"Stopped{after}; go on with --resume -o {word(output)}."


def trained(model: str, data_spec: str, output: Path, options: dict[str, Any], first: bool) -> dict[str, Any]:
    """Read the data, make the network, and train it; return the report. ``first``: of all processes."""
    import torch

    from edge_bcs.cli.reading import Reading
    from edge_bcs.method.hooks import set_normalization

    torch.manual_seed(options["seed"])  # biases begin as torch draws them
    options["class_names"] = names = class_names(options)
    classes = asked_classes(options, names)
    network: Any = None
    if options["zoo_file"] is not None:
        from edge_bcs import loading

        network = loading.load(options["zoo_file"])
        shape: tuple[int, int, int] | None = shape_of(network, options)
    else:
        shape = asked_shape(options)
        network = own(model, shape, classes) if is_own(model) else None
        shape = shape or getattr(network, "edge_bcs_input_shape", None)
    if shape is None:
        raise unknown_shape(type(network).__name__)
    resumed = output if options["resume"] else None
    resize = Resize.parse(options["resize"] or "squash")
    reading = Reading(data_spec, shape, options["on_bad"], folder=resumed, quiet=not first, resize=resize)
    data = reading.open("train")
    if first and (resumed or not is_begun(output)):
        reading.record(output)
    if options["zoo_file"] is not None:
        network = _of_zoo(network, data, classes or (None if names is None else len(names)))
    elif network is None:
        channels, size, _ = shape
        classes = classes or len(names or data.classes)
        network = registered(
            model,
            num_classes=classes,
            width=options["width"],
            input_channels=channels,
            input_size=size,
        )
    elif classes is None and start(options) == "magnitude":
        classes = _classes_of(data, network, shape)
    taken = options["method"] in COMPARATORS and is_checkpoint(options["weights"])
    if not taken and options["zoo_file"] is None:
        prepared(network, options, classes, shape)
    if options["resize"] is not None:
        network.edge_bcs_resize = resize  # type: ignore[assignment]
    if options["normalize"] is not None:
        set_normalization(network, normalization(options))
    _use_threads(options)
    numbers = {
        "objective": options["objective"],
        "beta": options["beta"],
        "batch_size": options["batch_size"],
        "batch_norm": options["batch_norm"],
        "attack": attack_of(options),
    }
    machine = {
        "compute": Compute(
            options["engine"],
            device=options["device"],
            precision=options["precision"],
            compile=options["compile"],
            threads=options["threads"],
            attack_precision=options["attack_precision"],
        ),
        "output": Output(output, resume=options["resume"]),
    }
    method = _train_comparator if options["method"] in COMPARATORS else _train
    asked = _Asked(network, data, _pseudo_labelled(options, shape), options, numbers, machine)
    return {**method(asked), **reading.report()}


def _of_zoo(sparse: Any, data: Any, classes: int | None) -> Any:
    """Return a network of the zoo with so many outputs; without a number as many as the data has names of, if
    the network does not know them all."""
    known = set(sparse.classes or ())
    if classes is None and getattr(data, "named", False) and not known.issuperset(data.classes):
        classes = len(data.classes)
    return sparse if classes is None else with_outputs(sparse, classes)


def _classes_of(data: Any, network: Any, shape: tuple[int, int, int]) -> int | None:
    """Return how many outputs trained weights of the user's own shall get: one for each class that the data
    has a name of; None if it has only numbers, or nobody can tell the network's last layer."""
    from edge_bcs.exportable import last_layer

    try:
        last_layer(network, shape)
    except EdgeBcsError:
        return None
    return len(data.classes) if getattr(data, "named", False) else None


def _use_threads(options: dict[str, Any]) -> None:
    if options["threads"] is not None:
        import torch

        torch.set_num_threads(options["threads"])


def _pseudo_labelled(options: dict[str, Any], shape: tuple[int, int, int]) -> Any:
    """Return the second data set of rst, if any."""
    path = options["pseudo_labelled"]
    if path is None:
        return None
    from edge_bcs.data.pseudo_labelled import open_pseudo_labelled

    return open_pseudo_labelled(path, shape, trust_pickle=options["trust_pickle"])


def _train(asked: _Asked) -> dict[str, Any]:
    """Train by the method itself, or at fixed connections or with all of them."""
    from edge_bcs import loading
    from edge_bcs.method import connectivity
    from edge_bcs.training import loop as training

    network, options = asked.network, asked.options
    method, seed, gradual = options["method"], options["seed"], None
    distribution = "uniform" if method == "random" else options["distribution"]
    if options["gradual"] is not None:
        rest = {} if distribution is None else {"distribution": distribution}
        gradual, distribution = Gradual(options["sparsity"], share=options["gradual"], **rest), None
    growth = None
    if options["grow"] is not None or options["recycle"]:
        share = options["grow"] or 0.0
        growth = Growth(share=share, until=options["grow_until"], recycle=options["recycle"])
    if options["zoo_file"] is not None:
        sparse = network
    elif method == "fixed":
        trained = loading.load(options["counts_from"], _same(network, options), **trusted(options))
        sparse = connectivity.fixed(network, trained, seed, start=options["start"])
        if given("sparsity") and connectivity.kappa(sparse.size, options["sparsity"]) != sparse.kappa:
            raise EdgeBcsError(
                f"--counts-from has {sparse.kappa} connections, which is not a sparsity of "
                f"{options['sparsity']}; leave --sparsity out."
            )
    else:
        sparse = connectivity.sparsify(
            network,
            sparsity=0 if method == "dense" or options["gradual"] is not None else options["sparsity"],
            seed=seed,
            distribution=distribution,
            dense=dense_patterns(options),
            start=start(options),
        )
    if options["class_names"] is not None or options["zoo_file"] is None:
        sparse.classes = options["class_names"]
    length = {} if options["epochs"] is None else {"epochs": options["epochs"]}
    result: dict[str, Any] = training.train(
        sparse,
        asked.data,
        method=Method(method, rewire=options["rewire"], gradual=gradual, growth=growth),
        train=options["train"],
        schedule=Schedule(
            steps=options["steps"],
            kind=options["schedule"] or "steps",
            warmup=options["warmup"],
            patience=options["patience"],
            **length,
        ),
        hyper=Hyper(learning_rate=options["learning_rate"], weight_decay=options["weight_decay"]),
        feed=Feed(
            augment=options["augment"],
            balance=options["balance"],
            validation=options["validation"],
            pseudo_labelled=asked.second,
        ),
        pgd_from=options["pgd_from"],
        teacher=teacher(network, asked.data, options),
        **asked.numbers,
        **asked.machine,
    )
    return result


def _train_comparator(asked: _Asked) -> dict[str, Any]:
    """Train a dense network and prune it."""
    from edge_bcs import comparators, loading
    from edge_bcs.method.connectivity import sparsify

    network, options = asked.network, asked.options
    method = options["method"]
    settings = comparators.PhaseSettings(
        sparsity=options["sparsity"],
        seed=options["seed"],
        pretrain_epochs=options["pretrain_epochs"] or 100,
        search_epochs=options["search_epochs"] or (100 if method == "admm" else 20),
        fine_tuning_rate=options["fine_tuning_rate"],
        learning_rate=options["learning_rate"],
        steps=options["steps"],
        augment=options["augment"],
        balance=options["balance"],
        validation=options["validation"],
        schedule=options["schedule"] or "cosine",
        warmup=options["warmup"],
        patience=options["patience"],
        dense=dense_patterns(options),
        **{name: options[name] for name in ("weight_decay", "epochs") if options[name] is not None},
        **asked.numbers,
    )
    phases = comparators.Phases(
        method,
        settings,
        asked.data,
        pseudo_labelled=asked.second,
        classes=options["class_names"],
        start=start(options),
        **asked.machine,
    )
    pretrained = None
    if is_checkpoint(options["weights"]):
        pretrained = loading.load(options["weights"], _same(network, options), **trusted(options))
        network = pretrained.network
    elif options["weights"] is not None and options["pretrain_epochs"] is None:
        pretrained = sparsify(network, 0, options["seed"], dense=settings.dense, start="magnitude")
    more = {"interval": options["admm_interval"]} if method == "admm" else {}
    train: Any = comparators.METHODS[method]
    result: dict[str, Any] = train(network, phases, pretrained, **more)[1]
    return result


def _same(network: Any, options: dict[str, Any]) -> Any:
    """The module to which another checkpoint of this training belongs, if no name says it."""
    return network if is_own(options["model"]) else None
