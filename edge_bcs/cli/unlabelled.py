"""--unlabelled and what belongs to it: photographs without labels beside those of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import CONFIDENCE, UNLABELLED_SHARE, UNLABELLED_WEIGHT, Unlabelled

if TYPE_CHECKING:
    from edge_bcs.cli.reading import Reading

_OPTIONS = (
    click.option(
        "--unlabelled",
        type=click.Path(),
        metavar="DIR",
        help="A folder of photographs without labels, in folders of any depth and name. Before each epoch "
        "the network labels those that it is sure of; these are trained on, too. With trades and rst the "
        "others take part as well, in the second term. An epoch is then one pass over the labelled or the "
        "unlabelled images, whichever takes more steps; the others come up several times.",
    ),
    click.option(
        "--confidence",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="With --unlabelled: probability from which on the network's answer is a label; default: "
        f"{CONFIDENCE:g}.",
    ),
    click.option(
        "--unlabelled-share",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        metavar="SHARE",
        help=f"With --unlabelled: of each batch, that has no labels; default: {UNLABELLED_SHARE:g}.",
    ),
    click.option(
        "--unlabelled-weight",
        type=click.FloatRange(0, min_open=True),
        metavar="WEIGHT",
        help="With --unlabelled: of such an image in the loss, where a labelled one has 1; default: "
        f"{UNLABELLED_WEIGHT:g}.",
    ),
)


def unlabelled_options(function: Any) -> Any:
    """Add --unlabelled, --confidence, --unlabelled-share and --unlabelled-weight."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def check_unlabelled(options: dict[str, Any]) -> None:
    """Refuse what belongs to --unlabelled without it."""
    if options["unlabelled"] is not None:
        return
    for name in ("confidence", "unlabelled_share", "unlabelled_weight"):
        if options[name] is not None:
            raise EdgeBcsError(f"--{name.replace('_', '-')} belongs to --unlabelled, which is not given.")


def open_unlabelled(options: dict[str, Any], reading: Reading) -> Unlabelled | None:
    """Return the photographs and what they are trained with; None without --unlabelled."""
    if options["unlabelled"] is None:
        return None
    return Unlabelled(
        reading.open_unlabelled(options["unlabelled"]),
        confidence=options["confidence"],
        share=options["unlabelled_share"],
        weight=options["unlabelled_weight"],
    )


def described(used: dict[str, Any]) -> str:
    """Return what became of the unlabelled images, as a line, from a training's report."""
    if "labelled" not in used:
        return f"Unlabelled images: {used['images']:,}, none of which was looked at."
    classes = ", ".join(f"{name} {count:,}" for name, count in used["classes"].items())
    share = 100 * used["labelled"] / used["images"]
    of = f": {classes}" if classes else ""
    return (
        f"Of {used['images']:,} unlabelled images the network labelled {used['labelled']:,} ({share:.0f} %) "
        f"in the last epoch{of}."
    )
