"""--pretrained NAME: a network of the zoo, wherever a command needs one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edge_bcs.cli.common import given
from edge_bcs.core.errors import EdgeBcsError

if TYPE_CHECKING:
    from edge_bcs.method.sparse_model import SparseModel

OF_NEW_NETWORKS = (
    *("model", "sparsity", "distribution", "width", "dense_patterns", "normalize", "resize"),
    *("start", "weights"),
)
"""Options that say how a network is made, for which a trained one has no use."""

pretrained_option = click.option(
    "--pretrained",
    metavar="NAME",
    help="A trained network of the zoo: a name of `edge-bcs zoo`.",
)


def zoo_file(options: dict[str, Any], *others: str) -> str | None:
    """Return the file that --pretrained names; None without it.

    Args:
        options: of the command. others: options that would say it, too, or say how it is made.

    Raises:
        EdgeBcsError: no such name, or one of the other options was given.
    """
    from edge_bcs import zoo

    name = options["pretrained"]
    if name is None:
        return None
    card = zoo.card_of(name)
    refuse_options(f"--pretrained {name}", *OF_NEW_NETWORKS, *others)
    return str(zoo.file_of(card))


def refuse_options(why: str, *names: str) -> None:
    """Raise `EdgeBcsError` for the first of these options that was given: ``why`` has all of that."""
    for name in names:
        if given(name):
            option = name.removesuffix("_patterns").replace("_", "-")
            raise EdgeBcsError(f"--{option} belongs to a new network; {why} has its own.")


def with_outputs(sparse: SparseModel, classes: int) -> SparseModel:
    """Return a trained network with so many outputs; a new last layer is told."""
    from edge_bcs.cli.networks import say_new
    from edge_bcs.exportable import last_layer
    from edge_bcs.method import heads
    from edge_bcs.method.new_classes import with_classes

    layer = last_layer(sparse.network, sparse.input_shape)
    before = heads.outputs(sparse.network, layer)
    if before == classes:
        return sparse
    say_new(heads.NewHead(layer, before, classes))
    return with_classes(sparse, classes)
