"""edge-bcs evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import (
    data_option,
    examples,
    fraction,
    json_file_option,
    memory_option,
    pairs,
    percent,
    print_json,
    threads_option,
    write_report,
)
from edge_bcs.errors import EdgeBcsError

_ATTACKS = ("none", "fgsm", "pgd", "autoattack", "square", "bb")


@click.command()
@click.argument("path", type=click.Path())
@data_option
@click.option("--attack", type=click.Choice(_ATTACKS), default="pgd", show_default=True)
@click.option("--attack-steps", type=click.IntRange(1), default=50, show_default=True, help="Steps of PGD.")
@click.option(
    "--restarts", type=click.IntRange(1), default=1, show_default=True, help="Random starts of PGD."
)
@click.option("--epsilon", help="Radius, such as 8/255; default: the artifact's, or 8/255.")
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only so many images.")
@click.option(
    "--engine", type=click.Choice(["board", "torch"]), help="Default: board for artifacts, else torch."
)
@memory_option
@threads_option
@json_file_option
@examples("""
    edge-bcs evaluate run --data digits
    edge-bcs evaluate run --data photos/ --attack pgd --attack-steps 50 --restarts 10
    edge-bcs evaluate checkpoints/vgg16 --data cifar-10-batches-py --attack autoattack
""")
def command(path: str, json_file: str | None, **options: Any) -> None:
    """Measure clean and robust accuracy of an artifact, a saved run or a checkpoint.

    Artifacts and runs are measured by the board's own graphs; --engine torch loads them into PyTorch
    instead, which attacks other than FGSM and PGD need.
    """
    on_board = (
        (Path(path) / "manifest.json").is_file()
        if options["engine"] is None
        else options["engine"] == "board"
    )
    on_board = on_board and (options["attack"] in ("none", "fgsm", "pgd") or options["engine"] == "board")
    result = _on_board(path, options) if on_board else _in_torch(path, options, progress=json_file != "-")
    result = {"path": path, "data": options["data_spec"], "split": options["split"], **result}
    if json_file == "-":
        print_json(result)
        return
    if json_file is not None:
        write_report(Path(json_file), result)
    rows = [
        ("engine", result["engine"]),
        ("images", result["samples"]),
        ("clean accuracy", percent(result["accuracy"])),
    ]
    if "robust_accuracy" in result:
        rows.append((f"robust accuracy ({options['attack']})", percent(result["robust_accuracy"])))
    pairs([*rows, *(("warning", text) for text in result.get("warnings", []))])


def _on_board(path: str, options: dict[str, Any]) -> dict[str, Any]:
    from edge_bcs.data import open_data
    from edge_bcs.runtime.trainer import Trainer

    if options["attack"] not in ("none", "fgsm", "pgd"):
        raise EdgeBcsError(
            f"the board knows the attacks fgsm and pgd; {options['attack']} needs --engine torch."
        )
    with Trainer(path, memory=options["memory"], threads=options["threads"]) as trainer:
        data = open_data(options["data_spec"], options["split"], trainer.artifact.input_shape)
        epsilon = None if options["epsilon"] is None else fraction(options["epsilon"], "--epsilon")
        return {
            "engine": "board",
            "attack": options["attack"],
            "epsilon": trainer.artifact.objective.epsilon if epsilon is None else epsilon,
            **trainer.evaluate(
                data,
                0 if options["attack"] == "none" else options["attack_steps"],
                attack="pgd" if options["attack"] == "none" else options["attack"],
                restarts=options["restarts"],
                limit=options["limit"],
                epsilon=epsilon,
            ),
            "peak_bytes": trainer.memory()["peak_bytes"],
        }


def _in_torch(path: str, options: dict[str, Any], progress: bool) -> dict[str, Any]:
    if options["attack"] not in ("none", "fgsm", "pgd"):
        raise EdgeBcsError(f"{options['attack']} is not available in this version; use fgsm or pgd.")
    from edge_bcs import evaluation, loading
    from edge_bcs.data import open_data

    sparse = loading.load(path)
    arguments = sparse.record["arguments"]
    size = arguments.get("input_size", 32)
    data = open_data(options["data_spec"], options["split"], (arguments.get("input_channels", 3), size, size))
    result: dict[str, Any] = evaluation.evaluate(
        sparse,
        data,
        attack=options["attack"],
        epsilon=8 / 255 if options["epsilon"] is None else fraction(options["epsilon"], "--epsilon"),
        steps=options["attack_steps"],
        restarts=options["restarts"],
        samples=options["limit"],
        progress=progress,
    )
    named = {"accuracy": result["clean_acc"]}
    if options["attack"] != "none":
        named["robust_accuracy"] = result["adv_acc"]
    return {"engine": "torch", **named, **result}
