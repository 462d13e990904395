"""edge-bcs zoo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_bcs.cli.common import command_line, examples, pairs, percent, print_json, table

if TYPE_CHECKING:
    from edge_bcs.zoo import Card

_ATTACKS = {"pgd": "PGD", "autoattack": "AutoAttack", "corruption": "corruptions"}


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the report cards as a JSON list of objects.")
@examples("""
    edge-bcs zoo
    edge-bcs zoo resnet18-digits-16x16-99-at
    edge-bcs export --pretrained resnet18-digits-16x16-99-at --memory 10MiB -o out/digits
""")
def command(name: str | None, as_json: bool) -> None:
    """List the trained networks that come with edge-bcs, or show the report card of one.

    Accuracies are of the data's test images; a dash: nobody has measured it yet.
    """
    from edge_bcs import zoo
    from edge_bcs.core.units import format_bytes

    cards = zoo.read_cards() if name is None else [zoo.card_of(name)]
    if as_json:
        print_json([card.record() for card in cards])
        return
    if name is not None:
        (card,) = cards
        _describe(card)
        return
    table(
        "Trained networks (edge-bcs export --pretrained NAME)",
        ("name", "network", "data", "sparsity", "clean", *_ATTACKS.values(), "size"),
        [
            (
                card.name,
                _network(card),
                card.data,
                f"{100 * float(card.sparsity):g} %",
                _share(card, "clean"),
                *(_share(card, measure) for measure in _ATTACKS),
                format_bytes(card.bytes),
            )
            for card in cards
        ],
    )


def _network(card: Card) -> str:
    """Its name, and the width where that is not the paper's."""
    width = card.arguments.get("width", 1.0)
    return card.network if width == 1 else f"{card.network} ×{width:g}"


def _share(card: Card, measure: str) -> str:
    share = card.accuracies[measure]
    return "–" if share is None else percent(share)


def _describe(card: Card) -> None:
    from edge_bcs.core.units import format_bytes
    from edge_bcs.data.classes import shown

    channels, height, width = card.input_shape
    recipe = card.recipe
    length = f"{recipe['epochs']} epochs" if recipe.get("epochs") else f"{card.step:,} steps"
    pairs(
        [
            ("name", card.name),
            ("network", f"{card.network}, {card.kappa:,} of {card.size:,} connections"),
            *((name.replace("_", " "), value) for name, value in card.arguments.items() if name == "width"),
            ("images", f"{channels}×{height}×{width}"),
            ("classes", None if card.classes is None else shown(tuple(card.classes))),
            ("data", card.data),
            ("training", f"{recipe.get('method', 'bcs')}, {card.objective}, {length}, seed {card.seed}"),
            *((f"{what} accuracy", _told(card, what)) for what in card.accuracies),
            ("file", f"{card.file}, {format_bytes(card.bytes)}, sha256 {card.sha256}"),
        ]
    )
    click.echo(f"Next: {command_line('export', '--pretrained', card.name)}")


def _told(card: Card, measure: str) -> str:
    """An accuracy, and how it was measured."""
    found = card.measured[measure]
    if found is None:
        return "not measured yet"
    how = [f"{found['samples']:,} test images"]
    if "steps" in found:
        how.append(f"{found['steps']} steps, {found['restarts']} restarts")
    if "eps" in found:
        how.append(f"ε {255 * found['eps']:.3g}/255")
    return f"{_share(card, measure)} ({', '.join(how)})"
