"""edge-bcs train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import data_option, examples, fraction, json_option, pairs, print_json


@click.command()
@click.option(
    "--model", default="vgg16", show_default=True, help="vgg16, resnet18/34/50, wrn28_2/_4/_10, wrn34_10."
)
@data_option
@click.option(
    "--objective",
    type=click.Choice(["natural", "at", "mixed", "trades", "rst", "mart"]),
    default="at",
    show_default=True,
)
@click.option("--sparsity", default="0.99", show_default=True, help="Share of dormant weights, in [0, 1).")
@click.option(
    "--distribution", type=click.Choice(["paper", "uniform", "erk"]), default="paper", show_default=True
)
@click.option(
    "--width", type=float, default=1.0, show_default=True, help="Multiplier of all channel numbers."
)
@click.option("--epochs", type=click.IntRange(1), default=200, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="End after so many steps instead.")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option("--learning-rate", type=float, default=0.1, show_default=True)
@click.option("--epsilon", default="8/255", show_default=True)
@click.option("--attack-steps", type=click.IntRange(1), default=10, show_default=True)
@click.option("--pseudo-labelled", metavar="PATH", help="The second data set of RST.")
@click.option("--input-size", type=click.IntRange(1), default=32, show_default=True, help="Height and width.")
@click.option("--channels", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", help="Such as cuda or cpu; default: a GPU if there is one.")
@click.option(
    "-o", "--output", type=click.Path(), help="Folder of checkpoints and metrics; default: runs/MODEL."
)
@click.option("--resume", is_flag=True, help="Continue what the output folder holds.")
@json_option
@examples("""
    edge-bcs train --model resnet18 --data cifar-10-batches-py --objective trades -o runs/resnet18
    edge-bcs train --data digits --epochs 5 --width 0.25
    edge-bcs export --checkpoint runs/resnet18 --memory 16MiB
""")
def command(model: str, data_spec: str, as_json: bool, **options: Any) -> None:
    """Train a sparse robust network from scratch with PyTorch, on the host (Algorithm 1 of the paper)."""
    from edge_bcs import connectivity, models, training
    from edge_bcs.data import open_data

    shape = (options["channels"], options["input_size"], options["input_size"])
    data = open_data(data_spec, "train", shape)
    extra = options["pseudo_labelled"]
    network = models.create(
        model,
        num_classes=len(data.classes),
        width=options["width"],
        input_channels=options["channels"],
        input_size=options["input_size"],
    )
    sparse = connectivity.sparsify(
        network, sparsity=options["sparsity"], seed=options["seed"], distribution=options["distribution"]
    )
    output = Path(options["output"] or Path("runs") / model)
    result: dict[str, Any] = training.train(
        sparse,
        data,
        objective=options["objective"],
        epochs=options["epochs"],
        steps=options["steps"],
        batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        epsilon=fraction(options["epsilon"], "--epsilon"),
        attack_steps=options["attack_steps"],
        pseudo_labelled=None if extra is None else open_data(extra, "train", shape),
        device=options["device"],
        output=output,
        resume=options["resume"],
        progress=not as_json,
    )
    if as_json:
        print_json({"output": str(output), **result})
        return
    pairs(list(result.items()))
    click.echo(f"Saved {output}; next: edge-bcs export --checkpoint {output}")
