"""edge-bcs train."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import (
    AugmentingCommand,
    Seed,
    attack_of,
    augment_option,
    augmentation,
    balance_option,
    check_beta,
    class_names,
    class_names_option,
    command_line,
    data_option,
    examples,
    given,
    json_option,
    objective_option,
    on_bad_option,
    pairs,
    percent,
    print_json,
    schedule_option,
    threads_option,
    trust_option,
    trusted,
    warmup_option,
    word,
)
from edge_bcs.cli.networks import (
    asked_classes,
    asked_shape,
    channels_option,
    classes_option,
    dense_option,
    dense_patterns,
    distribution_option,
    input_shape_option,
    input_size_option,
    is_own,
    model_option,
    normalization,
    normalize_option,
    own,
    prepared,
    registered,
    resize_option,
    short_name,
    start,
    start_option,
    unknown_shape,
    weights_option,
)
from edge_bcs.core.errors import EdgeBcsDeprecationWarning, EdgeBcsError
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.objectives import PSEUDO_LABELLED, objective_named
from edge_bcs.core.outputs import check_folder
from edge_bcs.core.progress import Progress, say
from edge_bcs.core.resizing import Resize
from edge_bcs.core.settings import Hyper, Schedule
from edge_bcs.training.settings import METHODS, PRUNED, Compute, Feed, Gradual, Output

_SAVED = "last.safetensors"
_COMPARATORS = ("lwm", "hydra", "admm")
# Options of some methods only: a training that took no notice of one would not be what was asked for.
_OWNERS = {
    "counts_from": ("fixed",),
    "rewire": ("bcs",),
    "gradual": ("bcs",),
    "distribution": ("bcs",),
    "dense_patterns": ("bcs", "random", "dense", *_COMPARATORS),
    "weights": ("bcs", "dense", *_COMPARATORS),
    "pretrained": _COMPARATORS,
    "pretrain_epochs": _COMPARATORS,
    "fine_tuning_rate": _COMPARATORS,
    "search_epochs": _COMPARATORS,
    "admm_interval": _COMPARATORS,
}


@click.command(cls=AugmentingCommand)
@model_option
@data_option
@class_names_option
@classes_option
@on_bad_option
@objective_option
@click.option(
    "--method", type=click.Choice([*METHODS, *_COMPARATORS]), default="bcs", show_default=True,
    help="bcs moves connections while it learns; random and fixed never move them; dense keeps all weights; "
    "lwm, hydra and admm prune a dense robust network, with --schedule cosine by default.",
)  # fmt: skip
@click.option(
    "--counts-from",
    type=click.Path(),
    help="For fixed: the checkpoint whose number of connections in each layer is taken.",
)
@click.option("--pretrained", type=click.Path(), help="The old spelling of --weights for lwm, hydra, admm.")
@click.option(
    "--rewire", type=click.Choice(["uniform", "by-layer"]), default="uniform", show_default=True,
    help="For bcs: new connections are drawn over all layers at once (Algorithm 1 of the paper), or layer by "
    "layer (its code).",
)  # fmt: skip
@click.option(
    "--sparsity", default="0.99", show_default=True,
    help="Share of the weights that are zero, from 0 and below 1; for fixed it is that of --counts-from.",
)  # fmt: skip
@distribution_option
@click.option(
    "--gradual", is_flag=False, flag_value=str(PRUNED), metavar="[SHARE]",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Begin with all weights, and prune to --sparsity while training, in the first share of the steps "
    f"(default: {PRUNED}), more and more slowly (Zhu & Gupta, 2017). Rewiring goes on afterwards, with "
    "exactly as many connections as --sparsity leaves; the best epoch is one of these. Until then this "
    "machine holds a dense network and its momentum.",
)  # fmt: skip
@click.option(
    "--width", type=float, default=1.0, show_default=True, help="Multiplies the channels of all layers."
)
@click.option(
    "--epochs", type=click.IntRange(1), help="Passes over the data; default: 200, or 100 after pruning."
)
@click.option(
    "--pretrain-epochs", type=click.IntRange(1), metavar="N",
    help="For lwm, hydra, admm: epochs of the dense network; default: 100, and none with --weights, of which "
    "a checkpoint of edge-bcs is taken as it is.",
)  # fmt: skip
@click.option(
    "--search-epochs",
    type=click.IntRange(1),
    help="For hydra (default 20), admm (100): epochs in which they search what to prune.",
)
@click.option(
    "--admm-interval", type=click.IntRange(1), default=20, show_default=True,
    help="For admm: epochs from one pruning step to the next.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps (of each phase), instead of epochs.")
@click.option(
    "--batch-size", type=click.IntRange(1), help="Images per optimizer step; default: 128, for rst 256."
)
@click.option(
    "--learning-rate", type=float, default=0.1, show_default=True,
    help="At its highest; --schedule says how it changes.",
)  # fmt: skip
@click.option(
    "--fine-tuning-rate", type=float, default=0.01, show_default=True,
    help="For lwm, hydra, admm: learning rate after pruning.",
)  # fmt: skip
@click.option(
    "--weight-decay", type=float, help="Default: 5e-4; for lwm, hydra and admm 1e-4 once they prune."
)
@click.option(
    "--beta", type=float, help="Weight of the robust term; default: 6 for trades and rst, 4 for mart."
)
@click.option(
    "--epsilon", default="8/255", show_default=True, help="How far the attack may change a pixel, in [0, 1]."
)
@click.option(
    "--step-size", default="2/255", show_default=True, help="How far one attack step moves a pixel."
)
@click.option(
    "--attack-steps", type=click.IntRange(1), default=10, show_default=True,
    help="Steps of the attack (PGD) in training.",
)  # fmt: skip
@click.option(
    "--batch-norm", type=click.Choice(["batch", "frozen"]), default="batch", show_default=True,
    help="Batch norm with the statistics of each batch, or with those that the network has.",
)  # fmt: skip
@schedule_option
@warmup_option
@click.option(
    "--patience", type=click.IntRange(1), metavar="EPOCHS",
    help="End after so many epochs without a higher accuracy on the held-out images.",
)  # fmt: skip
@augment_option
@balance_option
@click.option(
    "--validation", type=float, default=0.02, show_default=True,
    help="Share of the training images that are held out to choose the best epoch.",
)  # fmt: skip
@click.option("--pseudo-labelled", metavar="PATH", help="For rst: the second data set, an .npz of x and y.")
@click.option(
    "--trust-pickle", is_flag=True,
    help="Let --pseudo-labelled be the .pickle of RST's authors; nothing but arrays is read from it.",
)  # fmt: skip
@input_size_option
@channels_option
@input_shape_option
@normalize_option
@resize_option
@dense_option
@weights_option
@start_option
@click.option(
    "--seed", type=Seed(), default=0, show_default=True, help="Of the connections and of all randomness."
)
@click.option(
    "--engine", type=click.Choice(["torch", "sparse"]), default="torch", show_default=True,
    help="What computes: PyTorch, or the sparse kernels of edge-bcs on the CPU.",
)  # fmt: skip
@click.option("--device", help="Such as cuda or cpu; default: a GPU if there is one.")
@click.option(
    "--precision",
    type=click.Choice(["f32", "bf16"]),
    help="Of PyTorch's arithmetic; default: bf16 on a GPU, else f32.",
)
@click.option("--compile", is_flag=True, help="Speed PyTorch up with torch.compile.")
@threads_option
@trust_option
@click.option(
    "-o", "--output", type=click.Path(), help="Folder of checkpoints and metrics; default: runs/MODEL."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the training in the output folder.",
)
@json_option
@examples("""
    edge-bcs train --data digits --model vgg16 --width 0.25 --epochs 5 --engine sparse
    edge-bcs train --model resnet18 --data cifar-10-batches-py --objective trades -o runs/resnet18
    edge-bcs train --model nets.py:make --input-shape 3,48,48 --data photos/ -o runs/mine
    edge-bcs train --data photos/ --augment photo --balance --schedule cosine --warmup 0.05 --patience 10
    edge-bcs train --model nets.py:make --weights dense.pt --data photos/ --input-size 96 --gradual
    edge-bcs train --data cifar-10-batches-py --method fixed --counts-from runs/vgg16 -o runs/fixed
    edge-bcs train --data cifar-10-batches-py --method hydra --weights runs/dense -o runs/hydra
    torchrun --nproc-per-node 4 -m edge_bcs.cli train --data cifar-10-batches-py -o runs/vgg16
    edge-bcs export --checkpoint runs/resnet18 --memory 16MiB
""")
def command(model: str, data_spec: str, as_json: bool, **options: Any) -> None:
    """Train a sparse robust network on the host, with the paper's method or one to compare with.

    It is trained from scratch, or from trained weights (--weights): of these the largest are kept, or all in
    the beginning with --gradual. Where the data has other classes, the last layer is made anew.

    The output folder gets checkpoint.safetensors (the best epoch on held-out images), last.safetensors (the
    newest), metrics.jsonl and epochs.jsonl. --resume goes on with a training that was stopped, and ends with
    the same bits as one that was not.
    """
    from edge_bcs.cli.reading import check_apart

    options["model"] = model
    _check(options)
    output = Path(options["output"] or Path("runs") / short_name(model))
    check_folder(output)
    if not any(output.rglob(_SAVED)):
        check_apart(output, data_spec)
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes of torchrun
    try:
        lock = FolderLock(output) if first else nullcontext()
        with lock, Progress("preparing to train", shown=first):
            result = _trained(model, data_spec, output, options, first)
    except KeyboardInterrupt:
        saved = any(output.rglob(_SAVED))
        say(f"Stopped; {f'go on with --resume -o {word(output)}' if saved else 'nothing was saved yet'}.")
        sys.exit(130)
    if not first:
        return
    if as_json:
        print_json({"output": str(output), **result})
        return
    early = result.get("early")
    pairs(
        [
            ("steps", f"{result['step']} in {result['seconds']:.0f} s"),
            ("ended early", f"after {options['patience']} epochs that were no better" if early else None),
            ("best epoch", result.get("best_epoch")),
            ("clean accuracy", _share(result, "best_clean_acc")),
            ("robust accuracy", _share(result, "best_robust_acc")),
            *(("warning", text) for text in result["warnings"]),
        ]
    )
    made = ("--model", model) if is_own(model) else ()
    click.echo(f"Saved {output}; next: {command_line('evaluate', output, *made, '--data', data_spec)}")
    click.echo(f"      or: {command_line('export', *made, '--checkpoint', output)}")


def _trained(
    model: str, data_spec: str, output: Path, options: dict[str, Any], first: bool
) -> dict[str, Any]:
    """Read the data, make the network, and train it; return the report. ``first``: of all processes."""
    import torch

    from edge_bcs.cli.reading import Reading
    from edge_bcs.method.hooks import set_normalization

    shape = asked_shape(options)
    torch.manual_seed(options["seed"])  # biases begin as torch draws them
    options["class_names"] = names = class_names(options)
    classes = asked_classes(options, names)
    network = own(model, shape, classes) if is_own(model) else None
    shape = shape or getattr(network, "edge_bcs_input_shape", None)
    if shape is None:
        raise unknown_shape(type(network).__name__)
    resumed = output if options["resume"] else None
    resize = Resize.parse(options["resize"] or "squash")
    reading = Reading(data_spec, shape, options["on_bad"], folder=resumed, quiet=not first, resize=resize)
    data = reading.open("train")
    if first and (resumed or not any(output.rglob(_SAVED))):
        reading.record(output)
    if network is None:
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
    if options["method"] not in _COMPARATORS or not _is_checkpoint(options["weights"]):
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
    second = _pseudo_labelled(options, shape)
    machine = {
        "compute": Compute(
            options["engine"],
            device=options["device"],
            precision=options["precision"],
            compile=options["compile"],
            threads=options["threads"],
        ),
        "output": Output(output, resume=options["resume"]),
    }
    method = _train_comparator if options["method"] in _COMPARATORS else _train
    return {**method(network, data, second, options, numbers, machine), **reading.report()}


def _classes_of(data: Any, network: Any, shape: tuple[int, int, int]) -> int | None:
    """Return how many outputs trained weights of the user's own shall get: one for each class that the data
    has a name of; None if it has only numbers, or nobody can tell the network's last layer."""
    from edge_bcs.exportable import last_layer

    try:
        last_layer(network, shape)
    except EdgeBcsError:
        return None
    return len(data.classes) if getattr(data, "named", False) else None


def _share(result: dict[str, Any], name: str) -> str | None:
    return f"{percent(result[name])} of the held-out images" if result.get(name) is not None else None


def _check(options: dict[str, Any]) -> None:
    """Refuse what the chosen method has no use for, before anything is read."""
    method = options["method"]
    if is_own(options["model"]) and given("width"):
        raise EdgeBcsError("--width belongs to the networks of edge-bcs; one of your own has its own.")
    for name, owners in _OWNERS.items():
        if given(name) and method not in owners:
            option = name.removesuffix("_patterns").replace("_", "-")
            raise EdgeBcsError(f"--{option} belongs to {', '.join(owners)}, not to {method}.")
    _take_old_spelling(options)
    if _is_checkpoint(options["weights"]) and method in _COMPARATORS and given("pretrain_epochs"):
        raise EdgeBcsError(
            "--pretrain-epochs is for a network that is not robust yet, and a checkpoint is taken as it is: "
            "leave it or --weights out."
        )
    if method == "fixed" and options["counts_from"] is None:
        raise EdgeBcsError("--method fixed needs --counts-from CHECKPOINT: a network that bcs trained.")
    check_beta(options)
    options["augment"] = augmentation(options) or "shift"
    if options["engine"] == "sparse":
        if options["gradual"] is not None:
            raise EdgeBcsError("--gradual begins with a dense network: use --engine torch.")
        if method in _COMPARATORS:
            raise EdgeBcsError(f"{method} begins with a dense network: use --engine torch.")
        if options["compile"]:
            raise EdgeBcsError("--compile is for --engine torch; the sparse engine compiles by itself.")
    if objective_named(options["objective"]).pseudo_labelled != (options["pseudo_labelled"] is not None):
        names = " or ".join(PSEUDO_LABELLED)
        raise EdgeBcsError(
            f"--objective {names} needs --pseudo-labelled PATH, and no other objective takes it."
        )


def _take_old_spelling(options: dict[str, Any]) -> None:
    """Take --pretrained FILE as --weights FILE, with a word."""
    file = options["pretrained"]
    if file is None:
        return
    if options["weights"] not in (None, file):
        raise EdgeBcsError("--pretrained is the old spelling of --weights: give one of them.")
    warnings.warn(
        "--pretrained FILE is an old spelling that a later release refuses; write --weights "
        f"{word(Path(file))}",
        EdgeBcsDeprecationWarning,
        stacklevel=1,
    )
    options["weights"] = file


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


def _train(
    network: Any,
    data: Any,
    second: Any,
    options: dict[str, Any],
    numbers: dict[str, Any],
    machine: dict[str, Any],
) -> dict[str, Any]:
    from edge_bcs import loading
    from edge_bcs.method import connectivity
    from edge_bcs.training import loop as training

    method, seed, gradual = options["method"], options["seed"], None
    distribution = "uniform" if method == "random" else options["distribution"]
    if options["gradual"] is not None:
        rest = {} if distribution is None else {"distribution": distribution}
        gradual, distribution = Gradual(options["sparsity"], share=options["gradual"], **rest), None
    if method == "fixed":
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
    sparse.classes = options["class_names"]
    length = {} if options["epochs"] is None else {"epochs": options["epochs"]}
    result: dict[str, Any] = training.train(
        sparse,
        data,
        method=method,
        rewire=options["rewire"],
        gradual=gradual,
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
            pseudo_labelled=second,
        ),
        **numbers,
        **machine,
    )
    return result


def _train_comparator(
    network: Any,
    data: Any,
    second: Any,
    options: dict[str, Any],
    numbers: dict[str, Any],
    machine: dict[str, Any],
) -> dict[str, Any]:
    from edge_bcs import comparators, loading
    from edge_bcs.method.connectivity import sparsify

    method = options["method"]
    recipe = comparators.Recipe(
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
        **numbers,
    )
    phases = comparators.Phases(
        method,
        recipe,
        data,
        pseudo_labelled=second,
        classes=options["class_names"],
        start=start(options),
        **machine,
    )
    pretrained = None
    if _is_checkpoint(options["weights"]):
        pretrained = loading.load(options["weights"], _same(network, options), **trusted(options))
        network = pretrained.network
    elif options["weights"] is not None and options["pretrain_epochs"] is None:
        pretrained = sparsify(network, 0, options["seed"], dense=recipe.dense, start="magnitude")
    more = {"interval": options["admm_interval"]} if method == "admm" else {}
    train: Any = comparators.METHODS[method]
    result: dict[str, Any] = train(network, phases, pretrained, **more)[1]
    return result


def _is_checkpoint(path: str | None) -> bool:
    """Whether --weights names what `edge-bcs train` wrote, not a state dict."""
    from edge_bcs.core.state import is_state
    from edge_bcs.core.tensor_file import TensorFile

    if path is None or Path(path).is_dir():
        return path is not None
    try:
        with TensorFile(Path(path)) as stored:
            return is_state(stored.metadata)
    except (ValueError, TypeError, OSError, EdgeBcsError):
        return False


def _same(network: Any, options: dict[str, Any]) -> Any:
    """The module to which another checkpoint of this training belongs, if no name says it."""
    return network if is_own(options["model"]) else None
