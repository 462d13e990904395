"""`make pretrained`: measures a run of `edge-bcs train` and adds it to the zoo, with its report card.

Nothing on a card is typed in: the recipe is the plan in the checkpoint, and every accuracy is measured here,
on test images, with the file that is published, whose sparse graphs compute it: clean accuracy and PGD,
AutoAttack (pyautoattack, extra `eval`) on as many images as --autoattack says, and under the corruptions of
`evaluate --corruptions` as many as --corruptions says. A number that was not measured is null. Run again,
only what is asked for is measured anew; what the card of the same file says of the rest stays. An attack
that was cut goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import edge_bcs
from edge_bcs import zoo
from edge_bcs.checkpoint import read_checkpoint, save_checkpoint
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import parse_object
from edge_bcs.data import open_data
from edge_bcs.evaluation.measures import evaluate
from edge_bcs.exporters.passes import by_graphs
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.zoo import MEASURES, Card

EPSILON = 8 / 255
SUBSET = 100
"""Test images on which the tests look whether a loaded checkpoint is what was measured."""
_BATCH = 512
"""Images at a time: those that an attack still tries fill whole passes."""
_KEPT = ("objective", "plan", "best")
"""Of the metadata of a training: what says how the network came about."""


def publish(
    run: Path,
    name: str,
    data: str,
    *,
    folder: Path = zoo.FOLDER,
    described: str | None = None,
    steps: int = 50,
    restarts: int = 10,
    limit: int | None = None,
    autoattack: int | None = None,
    corruptions: int | None = None,
    threads: int = 1,
) -> Card:
    """Measure the checkpoint of a run, and write it and its card into the zoo ``folder``.

    Args:
        run: the folder of `edge-bcs train`, or its checkpoint. name: of the checkpoint in the zoo.
        data: "digits" or a path, as for `--data`; described: what the card calls it, default: its name.
        steps, restarts: of PGD, at ε = 8/255; 0 steps: not measured now.
        limit: test images for clean accuracy and PGD; default: all. autoattack: for AutoAttack, corruptions:
            for each corruption and severity; default, of both: not measured now.

    Raises:
        EdgeBcsError: no checkpoint of a training, a network that is not one of edge-bcs, or another
            checkpoint of that name in the zoo.
    """
    file = folder / f"{name}.safetensors"
    known = {card.name: card for card in (zoo.read_cards(folder) if (folder / zoo.INDEX).exists() else [])}
    source = run / "checkpoint.safetensors" if run.is_dir() else run
    metadata = read_checkpoint(source).metadata
    if "plan" not in metadata:
        raise EdgeBcsError(
            f"{source} was not written by `edge-bcs train`: it does not say how it came about."
        )
    sparse = edge_bcs.load(source)
    if sparse.own:
        raise EdgeBcsError(f"{source} holds a network of your own; the zoo has those of edge-bcs.")
    card = _described(name, file, sparse, parse_object(metadata["plan"]), described or _called(data))
    with tempfile.TemporaryDirectory() as held:
        fresh = Path(held) / file.name
        kept = {key: metadata[key] for key in _KEPT if key in metadata}
        save_checkpoint(fresh, sparse, metadata=kept, momentum=False)
        digest = zoo.sha256_of(fresh)
        before = known.get(name)
        if before is not None and before.sha256 != digest:
            raise EdgeBcsError(f"the zoo has another checkpoint {name}; choose another name, or remove it.")
        measured = dict(before.measured) if before else dict.fromkeys(MEASURES)
        accuracies = dict(before.accuracies) if before else dict.fromkeys(MEASURES)
        sparse = edge_bcs.load(fresh)

        def found(attack: str, **asked: Any) -> dict[str, Any]:
            counts = None if attack == "none" else source.with_name(f"{name}.{attack}.json")
            how: dict[str, Any] = {"epsilon": EPSILON, "batch_size": _BATCH, "resume": counts, **asked}
            return evaluate(sparse, _test(data, sparse), attack=attack, progress=True, **how)

        with by_graphs(sparse, _shape(sparse), threads):
            if steps:
                report = found("pgd", steps=steps, restarts=restarts, samples=limit)
                accuracies |= {"clean": report["clean_acc"], "pgd": report["adv_acc"]}
                measured["clean"] = {"samples": report["samples"]}
                measured["pgd"] = {key: report[key] for key in ("samples", "steps", "restarts", "eps")}
            if autoattack is not None:
                report = found("autoattack", samples=autoattack)
                accuracies["autoattack"] = report["adv_acc"]
                measured["autoattack"] = {key: report[key] for key in ("samples", "eps")}
            if corruptions is not None:
                report = found("none", samples=corruptions, corruptions=True)
                accuracies["corruption"] = report["mean_corruption_acc"]
                measured["corruption"] = {"samples": report["samples"]}
        subset = evaluate(sparse, _test(data, sparse), attack="none", samples=SUBSET)
        right = round(subset["clean_acc"] * subset["samples"])
        card = dataclasses.replace(
            card,
            accuracies=accuracies,
            measured=measured,
            subset={"samples": subset["samples"], "right": right},
            bytes=fresh.stat().st_size,
            sha256=digest,
        )
        if before is None:
            save_checkpoint(file, sparse, metadata=kept, momentum=False)
    zoo.write_cards([*(other for other in known.values() if other.name != name), card], folder)
    return card


def _called(data: str) -> str:
    return data if data == "digits" else Path(data).name.partition(".")[0]


def _shape(sparse: SparseModel) -> tuple[int, int, int]:
    shape = sparse.input_shape
    assert shape is not None, "networks of edge-bcs say which images they take"
    return shape


def _test(data: str, sparse: SparseModel) -> Any:
    return open_data(data, "test", _shape(sparse), resize=sparse.resize)


def _described(name: str, file: Path, sparse: SparseModel, plan: dict[str, Any], data: str) -> Card:
    """Return the card of a network of which nothing is measured yet."""
    return Card(
        name=name,
        network=str(sparse.record["name"]),
        arguments=sparse.record["arguments"],
        input_shape=list(_shape(sparse)),
        classes=sparse.classes,
        data=data,
        sparsity=sparse.sparsity,
        kappa=sparse.kappa,
        size=sparse.size,
        objective=str(plan["objective"]),
        recipe=plan,
        seed=sparse.seed,
        step=sparse.step,
        accuracies={},
        measured={},
        subset={},
        file=file.name,
        bytes=0,
        sha256="",
    )


def main() -> None:
    """Measure a run and add it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="what `edge-bcs train` wrote")
    parser.add_argument("name", help="of the checkpoint, such as resnet18-digits-16x16-99-at")
    parser.add_argument("--data", required=True, help="whose test images are measured")
    parser.add_argument("--described", help="what the card calls the data")
    parser.add_argument("--attack-steps", type=int, default=50, help="of PGD; 0: not measured now")
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--limit", type=int, help="test images for clean accuracy and PGD")
    parser.add_argument("--autoattack", type=int, metavar="N", help="measure N images by AutoAttack, too")
    parser.add_argument(
        "--corruptions", type=int, metavar="N", help="measure N images under corruptions, too"
    )
    parser.add_argument("--zoo", type=Path, default=zoo.FOLDER)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    card = publish(
        options.run,
        options.name,
        options.data,
        folder=options.zoo,
        described=options.described,
        steps=options.attack_steps,
        restarts=options.restarts,
        limit=options.limit,
        autoattack=options.autoattack,
        corruptions=options.corruptions,
        threads=options.threads,
    )
    print(card.name, {measure: share for measure, share in card.accuracies.items() if share is not None})


if __name__ == "__main__":
    try:
        main()
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
