"""edge-bcs export."""

from __future__ import annotations

import contextlib
import io
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_bcs.cli.common import (
    activations,
    attack_of,
    attack_option,
    beta_option,
    check_beta,
    class_names,
    class_names_option,
    command_line,
    dense_kernels,
    examples,
    json_option,
    objective_option,
    pairs,
    precision_option,
    print_json,
    seed_option,
    train_option,
    trust_option,
    trusted,
)
from edge_bcs.cli.networks import (
    asked_classes,
    asked_shape,
    channels_option,
    check_width,
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
    shape_of,
    short_name,
    start,
    start_option,
    weights_option,
)
from edge_bcs.cli.pretrained import (
    OF_NEW_NETWORKS,
    pretrained_option,
    refuse_options,
    with_outputs,
    zoo_file,
)
from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.core.progress import Progress, note
from edge_bcs.core.resizing import Resize
from edge_bcs.core.settings import Hyper

if TYPE_CHECKING:
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.targets.cost_model import Machine
    from edge_bcs.targets.microcontrollers import Microcontroller


@click.command()
@model_option
@click.option(
    "--checkpoint",
    type=click.Path(),
    help="A trained network (folder of `train`, run, artifact) to compile, instead of a new one.",
)
@pretrained_option
@click.option(
    "--sparsity",
    default="0.99",
    show_default=True,
    help="Share of the weights that are zero, from 0 and below 1.",
)
@distribution_option
@classes_option
@class_names_option
@input_size_option
@channels_option
@input_shape_option
@normalize_option
@resize_option
@dense_option
@weights_option
@start_option
@click.option(
    "--width", type=float, help="Multiplies the channels of all layers; default: 1. A checkpoint has its own."
)
@objective_option
@click.option(
    "--batch-norm",
    type=click.Choice(["frozen", "batch"]),
    help="Batch norm with the statistics of the checkpoint (frozen, its default) or of each micro-batch "
    "(batch, "
    "a new network's default, unless --train names a part of it).",
)
@train_option
@click.option(
    "--target",
    metavar="NAME|FILE",
    help="The board to plan for: a name of `edge-bcs targets` or a board file of yours. Without --memory its "
    "default budget is used. For a microcontroller a C project is written, too, beside the artifact.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Byte budget, such as 12MiB: the most that tensors and buffers may take at once. The fastest plan "
    "inside it is used.",
)
@click.option(
    "--store",
    type=click.Choice(["f32", "bf16"]),
    default="f32",
    show_default=True,
    help="How activations may be kept for the backward pass; bf16 halves their bytes and rounds gradients.",
)
@click.option(
    "--micro-batch",
    type=click.IntRange(1),
    help="Images that are trained on at a time; default: what is fastest inside the memory, or 32 without a "
    "limit. Inside a limit more may be attacked at once.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Images per optimizer step."
)
@attack_option(0)
@precision_option("f32", "f32")
@beta_option
@click.option(
    "--learning-rate",
    type=float,
    help="Of the first steps; default: 0.1 with --batch-norm batch, 0.001 with frozen.",
)
@seed_option
@click.option(
    "--validate/--no-validate",
    default=True,
    show_default=True,
    help="Compare the artifact with torch in float64.",
)
@click.option(
    "--plain-eval", is_flag=True, help="Also write eval_model.plain.onnx, which needs no library of edge-bcs."
)
@click.option("--archive", is_flag=True, help="Write one file, NAME.tar, instead of a folder.")
@click.option(
    "--sign-key",
    type=click.Path(),
    metavar="FILE",
    help="Private key that signs the artifact (Ed25519, PEM: `openssl genpkey -algorithm ed25519`).",
)
@click.option(
    "--release",
    type=click.IntRange(1),
    metavar="N",
    help="Release number, above those before it: a board that trusts the key refuses a lower one afterwards.",
)
@trust_option
@click.option(
    "-o", "--output", type=click.Path(), help="The artifact folder, or a NAME.tar; default: out/MODEL."
)
@click.option(
    "--force", is_flag=True,
    help="Also replace a trained run or a changed artifact; never files that edge-bcs did not write.",
)  # fmt: skip
@json_option
@examples("""
    edge-bcs export --sparsity 0.99
    edge-bcs export --model resnet18 --objective trades --target raspberry-pi-4 -o out/resnet18
    edge-bcs export --checkpoint runs/vgg16 --memory 12MiB -o out/vgg16
    edge-bcs export --pretrained resnet18-digits-16x16-99-at --memory 10MiB -o out/digits
    edge-bcs export --model nets.py:make --input-shape 3,48,48 --sparsity 0.95 -o out/mine
    edge-bcs export --model nets.py:make --weights dense.pt --sparsity 0.9 --input-size 96 -o out/pruned
    edge-bcs export --model nets.py:make --checkpoint runs/mine --memory 8MiB -o out/mine
    edge-bcs export --model nets.py:make --input-shape 1,8,8 --sparsity 0.95 --target stm32h7 -o out/small
    edge-bcs export --checkpoint runs/vgg16 --classes 3 --memory 8MiB -o out/three
    edge-bcs export --checkpoint runs/vgg16 --train last:2 --memory 6MiB -o out/vgg16-last
    edge-bcs export --checkpoint runs/vgg16 --archive --sign-key key.pem --release 7 -o out/vgg16.tar
""")
def command(**options: Any) -> None:
    """Compile a sparse network into an artifact: one folder (or one file) that a board can train inside a
    byte budget.

    The network is a new one (--model) or a trained one (--checkpoint, --pretrained), which with --classes
    keeps all but its last layer. An artifact that is already at the output is replaced as a whole; nothing
    else is.
    """
    from edge_bcs.core.part import Part

    check_beta(options)
    Part.parse(options["train"])
    if (options["trust_keys"] or options["min_release"]) and not options["checkpoint"]:
        raise EdgeBcsError("--trust-key checks what --checkpoint reads: leave it out for a new network.")

    if options["pretrained"]:
        if options["checkpoint"]:
            raise EdgeBcsError("--checkpoint and --pretrained both name the network: give one of them.")
        options["checkpoint"] = zoo_file(options)
    elif options["checkpoint"]:
        own_module = is_own(options["model"])
        refuse_options(
            "a checkpoint", *(name for name in OF_NEW_NETWORKS if name != "model" or not own_module)
        )
    check_width(options)

    memory = options["memory"]
    machine = None
    small = None
    if options["target"] is not None:
        from edge_bcs.targets import boards, microcontrollers
        from edge_bcs.targets.roofline import machine_of

        if microcontrollers.is_one(options["target"]):
            from edge_bcs.exporters.microcontroller.project import check_attack

            small = microcontrollers.load(options["target"])
            check_attack(attack_of(options))
            if options["archive"] or str(options["output"]).endswith(".tar"):
                raise EdgeBcsError(f"a project for {small.title} is a folder: leave --archive and .tar out.")
            memory = memory or small.default_budget
        else:
            board = boards.load(options["target"])
            memory = memory or board.default_budget
            machine = machine_of(board)
    with Progress("compiling"):
        artifact, output, validation = _exported(options, memory, machine, small)
    if validation:
        click.echo(validation, err=options["as_json"])
    project = None
    if small is not None:
        from edge_bcs.exporters.microcontroller.project import write_project

        project = write_project(artifact, small, _project_of(output, small))
    _report(artifact, output, options, project)


def _project_of(output: Path, board: Microcontroller) -> Path:
    """The folder of the C project beside an artifact."""
    return output.with_name(f"{output.name}-{board.name}")


def _exported(
    options: dict[str, Any], memory: int | str | None, machine: Machine | None, small: Microcontroller | None
) -> tuple[Artifact, Path, str]:
    """Make or read the network and compile it; return the artifact, where it lies, and what is said of it."""
    from edge_bcs.exporters import export
    from edge_bcs.exporters.publish import check_target
    from edge_bcs.exporters.settings import Memory, Publishing
    from edge_bcs.runtime.archive import SUFFIX

    def checked(output: Path) -> Path:
        if options["archive"] and output.suffix != SUFFIX:
            output = output.with_name(output.name + SUFFIX)
        _check_source(options["checkpoint"], output)
        check_target(output, options["force"])
        if small is not None:
            from edge_bcs.exporters.microcontroller.project import check_folder

            check_folder(_project_of(output, small))
        return output

    # A network takes long to read: what is wrong with the output is said before, where it is known.
    known = options["output"]
    if known is None and options["pretrained"]:
        known = Path("out") / options["pretrained"]
    elif known is None and not options["checkpoint"]:
        known = Path("out") / short_name(options["model"])
    output = None if known is None else checked(Path(known))
    note("reading the network")
    names = class_names(options)
    sparse, name, step = _network(options, names)
    if names is not None:
        _rename(sparse, names)
    adapted = options["checkpoint"] or options["train"] != "all"
    batch_norm = options["batch_norm"] or ("frozen" if adapted else "batch")
    output = output or checked(Path("out") / name)

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        artifact = export(
            sparse,
            output,
            objective=options["objective"],
            input_shape=shape_of(sparse, options),
            memory=Memory(
                memory, micro_batch=options["micro_batch"], store=options["store"], machine=machine
            ),
            attack=attack_of(options),
            hyper=Hyper(learning_rate=options["learning_rate"]),
            beta=options["beta"],
            batch_norm=batch_norm,
            train=options["train"],
            batch_size=options["batch_size"],
            step=step,
            validate=options["validate"],
            attack_precision=options["attack_precision"],
            publish=Publishing(
                plain_eval=options["plain_eval"],
                sign_key=options["sign_key"],
                release=options["release"],
                force=options["force"],
            ),
        )
    return artifact, output, said.getvalue().strip()


def _report(artifact: Artifact, output: Path, options: dict[str, Any], project: Path | None) -> None:
    from edge_bcs.core.units import format_bytes
    from edge_bcs.data.classes import shown

    size = sum(file.stat().st_size for file in (output.iterdir() if output.is_dir() else [output]))
    if options["as_json"]:
        print_json(
            {
                "artifact": str(output),
                **({} if project is None else {"project": str(project)}),
                "network": artifact.network,
                "sparsity": artifact.sparsity,
                "kappa": artifact.kappa,
                "size": artifact.size,
                "classes": artifact.classes,
                "objective": artifact.objective.name,
                "batch_norm": artifact.batch_norm,
                "train": artifact.trained.part.text,
                "micro_batch": artifact.micro_batch,
                "attack_micro_batch": artifact.attack_micro_batch,
                "memory": artifact.budget,
                "predicted_peak_bytes": artifact.predicted_peak_bytes,
                "artifact_bytes": size,
                "signed": artifact.signature != "none",
            }
        )
        return
    signed = "" if artifact.signature == "none" else ", signed"
    click.echo(f"Wrote {output} ({format_bytes(size)}{signed})")
    budget = "; no budget was named (--memory, --target)"
    if artifact.budget is not None:
        budget = f" of {format_bytes(artifact.budget)}"
    pairs(
        [
            ("network", f"{artifact.network}, {artifact.kappa:,} of {artifact.size:,} connections"),
            ("dense kernels", dense_kernels(artifact)),
            ("classes", None if artifact.classes is None else shown(artifact.classes)),
            ("objective", f"{artifact.objective.name}, batch norm {artifact.batch_norm}"),
            ("learns", artifact.trained_text),
            ("micro-batch", f"{artifact.micro_batches}, batches of {artifact.batch_size}"),
            ("activations", activations(artifact)),
            ("predicted peak", format_bytes(artifact.predicted_peak_bytes) + budget),
        ]
    )
    if project is not None:
        click.echo(f"Wrote {project}, a C project\nNext: make -C {shlex.quote(str(project))}")
        return
    click.echo(f"Next: {command_line('simulate', output)}")
    if options["checkpoint"] or artifact.classes is not None or artifact.num_classes != 10:
        click.echo(
            f"      {command_line('finetune', output, '--data', 'PHOTOS')}\n"
            f"      (PHOTOS: a folder of {artifact.num_classes} class folders of images, or a .tar or .npz)"
        )
    else:
        click.echo(f"      {command_line('finetune', output, '--data', 'digits')}")


def _rename(sparse: Any, names: tuple[str, ...]) -> None:
    """Give the network's outputs these names, whatever they were called before."""
    from edge_bcs.data.classes import may_become, say, shown

    before = sparse.classes
    sparse.classes = names
    if before is not None and not may_become(before, names):
        say([f"the classes {shown(before)} are now called {shown(names)}."])


def _check_source(checkpoint: str | None, output: Path) -> None:
    """Refuse to replace what --checkpoint reads."""
    if checkpoint is None:
        return
    source, place = Path(checkpoint).resolve(), output.resolve()
    if place == source or place in source.parents:
        raise EdgeBcsError(
            f"the export would replace {output}, from which --checkpoint reads; choose another -o."
        )


def _network(options: dict[str, Any], names: tuple[str, ...] | None) -> tuple[Any, str, int]:
    """Return (sparse network, its name, training steps behind it)."""
    model = options["model"]
    if options["checkpoint"]:
        from edge_bcs.loading import load

        network = own(model, asked_shape(options)) if is_own(model) else None
        sparse = load(options["checkpoint"], network, **trusted(options))
        if options["classes"] is not None:
            sparse = with_outputs(sparse, options["classes"])
        return sparse, str(sparse.record["name"]), int(sparse.step)
    import torch

    from edge_bcs.method import connectivity

    torch.manual_seed(options["seed"])  # biases begin as torch draws them
    shape, classes = asked_shape(options), asked_classes(options, names)
    if is_own(model):
        network = own(model, shape, classes)
    else:
        channels, size, _ = shape = shape or (3, 32, 32)
        classes = options["classes"] or (10 if names is None else len(names))
        network = registered(
            model,
            num_classes=classes,
            width=1.0 if options["width"] is None else options["width"],
            input_channels=channels,
            input_size=size,
        )
    prepared(network, options, classes, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EdgeBcsWarning)  # of what export is about to say
        sparse = connectivity.sparsify(
            network,
            sparsity=options["sparsity"],
            seed=options["seed"],
            distribution=options["distribution"],
            dense=dense_patterns(options),
            start=start(options),
        )
    sparse.normalize = normalization(options)
    if options["resize"] is not None:
        sparse.resize = Resize.parse(options["resize"])
    return sparse, short_name(model), 0
