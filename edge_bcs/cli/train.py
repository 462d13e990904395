"""edge-bcs train."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from edge_bcs.cli import recipes
from edge_bcs.cli.common import (
    AugmentingCommand,
    attack_option,
    augment_option,
    augmentation,
    balance_option,
    beta_option,
    check_beta,
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
    seed_option,
    threads_option,
    train_option,
    trust_option,
    warmup_option,
    word,
)
from edge_bcs.cli.networks import (
    channels_option,
    check_width,
    classes_option,
    dense_option,
    distribution_option,
    input_shape_option,
    input_size_option,
    is_checkpoint,
    is_own,
    model_option,
    normalize_option,
    resize_option,
    short_name,
    start_option,
    weights_option,
)
from edge_bcs.cli.pretrained import pretrained_option, zoo_file
from edge_bcs.cli.stopping import Terminated, terminable
from edge_bcs.cli.teacher import check_teacher, teacher_options
from edge_bcs.cli.training import COMPARATORS, how_to_go_on, is_begun, trained
from edge_bcs.core.errors import EdgeBcsDeprecationWarning, EdgeBcsError
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.objectives import PSEUDO_LABELLED, objective_named
from edge_bcs.core.outputs import check_folder
from edge_bcs.core.progress import Progress, say
from edge_bcs.training.settings import ATTACK_PRECISIONS, ENGINES, METHODS, PRECISIONS, PRUNED, Growth

# Options of some methods only: a training that took no notice of one would not be what was asked for.
_OWNERS = {
    "recipe": ("bcs",),
    "counts_from": ("fixed",),
    "rewire": ("bcs",),
    "gradual": ("bcs",),
    "grow": ("bcs",),
    "recycle": ("bcs",),
    "train": METHODS,
    "teacher": METHODS,
    "pgd_from": METHODS,
    "distribution": ("bcs",),
    "dense_patterns": ("bcs", "random", "dense", *COMPARATORS),
    "weights": ("bcs", "dense", *COMPARATORS),
    "pretrain_epochs": COMPARATORS,
    "fine_tuning_rate": COMPARATORS,
    "search_epochs": COMPARATORS,
    "admm_interval": COMPARATORS,
}
_WITH_PRETRAINED = ("bcs", "random")


@click.command(cls=AugmentingCommand)
@model_option
@data_option
@class_names_option
@classes_option
@on_bad_option
@objective_option
@click.option(
    "--method", type=click.Choice([*METHODS, *COMPARATORS]), default="bcs", show_default=True,
    help="bcs moves connections while it learns; random and fixed never move them; dense keeps all weights; "
    "lwm, hydra and admm prune a dense robust network, with --schedule cosine by default.",
)  # fmt: skip
@click.option(
    "--counts-from",
    type=click.Path(),
    help="For fixed: the checkpoint whose number of connections in each layer is taken.",
)
@pretrained_option
@click.option(
    "--rewire", type=click.Choice(["uniform", "by-layer"]), default="uniform", show_default=True,
    help="For bcs: new connections are drawn over all layers at once (Algorithm 1 of the paper), or layer by "
    "layer (its code).",
)  # fmt: skip
@train_option
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
    "--recipe", type=click.Choice(list(recipes.RECIPES)), default=recipes.PAPER, show_default=True,
    help="For bcs: paper is Algorithm 1; best also has --grow, which gained more than seeds differ by. An "
    "option that is given counts before the recipe's.",
)  # fmt: skip
@click.option(
    "--grow", is_flag=False, flag_value=str(Growth.share), metavar="[SHARE]",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="For bcs: beside the rewiring, every 100 steps the smallest connections move to where the gradient "
    "is largest among four times as many dormant places, drawn at random. At first this share of all moves "
    f"(default: {Growth.share}), falling along a cosine.",
)  # fmt: skip
@click.option(
    "--grow-until", type=click.FloatRange(0, 1, min_open=True), default=Growth.until, show_default=True,
    help="Share of the steps after which neither --grow nor --recycle moves any.",
)  # fmt: skip
@click.option(
    "--recycle", is_flag=True,
    help="For bcs: every 100 steps the connections that carry nothing, of units that no image opens or from "
    "which nothing leads on, move as --grow moves the smallest; alone or with it.",
)  # fmt: skip
@teacher_options
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
@beta_option
@attack_option(1)
@click.option(
    "--pgd-from", type=click.FloatRange(0, 1), metavar="SHARE",
    help="With a single-step attack: after this share of the steps the training attacks with PGD.",
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
@click.option(
    "--pseudo-labelled",
    metavar="PATH",
    help="For rst: the second data set, an .npz of x and of y, the labels that a network gave.",
)
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
@seed_option
@click.option(
    "--engine", type=click.Choice(ENGINES), default="torch", show_default=True,
    help="What computes: PyTorch, or the sparse kernels of edge-bcs on the CPU.",
)  # fmt: skip
@click.option("--device", help="Such as cuda or cpu; default: a GPU if there is one.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of PyTorch's arithmetic; default: bf16 on a GPU, else f32.",
)
@click.option(
    "--attack-precision", type=click.Choice(ATTACK_PRECISIONS), default="f32", show_default=True,
    help="Of the sparse engine's attacks: half is two bytes a number, faster on processors that have "
    "arithmetic in it (AVX-512 BF16, ARM's FP16). What is learned stays float32.",
)  # fmt: skip
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
    edge-bcs train --model nets.py:make --weights dense.pt --data photos/ --train head --batch-norm frozen
    edge-bcs train --model nets.py:make --weights dense.pt --data photos/ --teacher runs/dense -o runs/mine
    edge-bcs train --pretrained resnet18-digits-16x16-99-at --data digits --epochs 5 -o runs/digits
    edge-bcs train --data cifar-10-batches-py --method fixed --counts-from runs/vgg16 -o runs/fixed
    edge-bcs train --data cifar-10-batches-py --method hydra --weights runs/dense -o runs/hydra
    torchrun --nproc-per-node 4 -m edge_bcs.cli train --data cifar-10-batches-py -o runs/vgg16
    edge-bcs export --checkpoint runs/resnet18 --memory 16MiB
""")
def command(model: str, data_spec: str, as_json: bool, **options: Any) -> None:
    """Train a sparse robust network on the host, with the paper's method or one to compare with.

    It is trained from scratch, from a sparse network of the zoo (--pretrained), or from trained weights
    (--weights): of these the largest are kept, or all in the beginning with --gradual. Where the data has
    other classes, the last layer is made anew.

    The output folder gets checkpoint.safetensors (the best epoch on held-out images), last.safetensors (the
    newest), metrics.jsonl and epochs.jsonl. Ctrl-C and SIGTERM save what was done. --resume goes on with a
    training that was stopped, and ends with the same bits as one that was not.
    """
    from edge_bcs.cli.reading import check_apart

    options["model"] = model
    _check(options)
    output = Path(options["output"] or Path("runs") / (options["pretrained"] or short_name(model)))
    check_folder(output)
    if not is_begun(output):
        check_apart(output, data_spec)
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes of torchrun
    try:
        lock = FolderLock(output) if first else nullcontext()
        with terminable(), lock, Progress("preparing to train", shown=first):
            result = trained(model, data_spec, output, options, first)
    except KeyboardInterrupt as interrupt:
        say(how_to_go_on(output))
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)
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
            ("attack", fell_back(result, options["training_attack"])),
            ("best epoch", result.get("best_epoch")),
            ("clean accuracy", _share(result, "best_clean_acc")),
            ("robust accuracy", _share(result, "best_robust_acc")),
            *(("warning", text) for text in result["warnings"]),
        ]
    )
    made = ("--model", model) if is_own(model) else ()
    click.echo(f"Saved {output}; next: {command_line('evaluate', output, *made, '--data', data_spec)}")
    click.echo(f"      or: {command_line('export', *made, '--checkpoint', output)}")


def _share(result: dict[str, Any], name: str) -> str | None:
    return f"{percent(result[name])} of the held-out images" if result.get(name) is not None else None


def fell_back(result: dict[str, Any], attack: str) -> str | None:
    """Say that the training's attack collapsed; None where it did not."""
    step = result.get("fell_back")
    return None if step is None else f"{attack} collapsed: PGD took its place after step {step}"


def _check(options: dict[str, Any]) -> None:
    """Refuse what the chosen method has no use for, before anything is read."""
    method = options["method"]
    check_width(options)
    for name, owners in _OWNERS.items():
        if given(name) and method not in owners:
            option = name.removesuffix("_patterns").replace("_", "-")
            raise EdgeBcsError(f"--{option} belongs to {', '.join(owners)}, not to {method}.")
    recipes.take(options, given)
    if options["grow"] is not None and not given("grow") and not _takes_growth(options):
        raise EdgeBcsError(
            f"--recipe {options['recipe']} has --grow, which goes neither with --gradual, nor with --rewire "
            "by-layer, nor with a part of the network (--train): choose --recipe paper."
        )
    _take_old_spelling(options)
    _check_pretrained(options)
    if is_checkpoint(options["weights"]) and method in COMPARATORS and given("pretrain_epochs"):
        raise EdgeBcsError(
            "--pretrain-epochs is for a network that is not robust yet, and a checkpoint is taken as it is: "
            "leave it or --weights out."
        )
    if given("grow_until") and options["grow"] is None and not options["recycle"]:
        raise EdgeBcsError("--grow-until says when --grow and --recycle end: give one of them, too.")
    if options["pgd_from"] is not None and options["training_attack"] == "pgd":
        raise EdgeBcsError(
            "--pgd-from is for --training-attack fgsm-rs or n-fgsm: pgd attacks from the first step."
        )
    check_teacher(options)
    if method == "fixed" and options["counts_from"] is None:
        raise EdgeBcsError("--method fixed needs --counts-from CHECKPOINT: a network that bcs trained.")
    check_beta(options)
    options["augment"] = augmentation(options) or "shift"
    if options["engine"] == "sparse":
        if options["gradual"] is not None:
            raise EdgeBcsError("--gradual begins with a dense network: use --engine torch.")
        if options["compile"]:
            raise EdgeBcsError("--compile is for --engine torch; the sparse engine compiles by itself.")
    elif options["attack_precision"] != "f32":
        raise EdgeBcsError("--attack-precision needs --engine sparse; PyTorch's is --precision.")
    if objective_named(options["objective"]).pseudo_labelled != (options["pseudo_labelled"] is not None):
        names = " or ".join(PSEUDO_LABELLED)
        raise EdgeBcsError(
            f"--objective {names} needs --pseudo-labelled PATH, and no other objective takes it."
        )


def _takes_growth(options: dict[str, Any]) -> bool:
    return options["gradual"] is None and options["rewire"] == "uniform" and options["train"] == "all"


def _check_pretrained(options: dict[str, Any]) -> None:
    """Put the file that --pretrained names into "zoo_file"; refuse what would make another network."""
    options["zoo_file"] = zoo_file(options, "counts_from", "gradual", "seed")
    if options["zoo_file"] is not None and options["method"] not in _WITH_PRETRAINED:
        raise EdgeBcsError(
            f"--pretrained is a sparse network, which {' and '.join(_WITH_PRETRAINED)} can train; "
            f"{options['method']} makes its own."
        )


def _take_old_spelling(options: dict[str, Any]) -> None:
    """Take --pretrained FILE as --weights FILE, with a word, for a method that had it and a path at which
    something is; else it names a network of the zoo."""
    file = options["pretrained"]
    if file is None or options["method"] not in COMPARATORS or not Path(file).exists():
        return
    if options["weights"] not in (None, file):
        raise EdgeBcsError("--pretrained is the old spelling of --weights: give one of them.")
    warnings.warn(
        "--pretrained FILE is an old spelling that a later release refuses; write --weights "
        f"{word(Path(file))}",
        EdgeBcsDeprecationWarning,
        stacklevel=1,
    )
    options["weights"], options["pretrained"] = file, None
