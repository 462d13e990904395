"""edge-bcs targets."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edge_bcs.cli.common import examples, json_option, pairs, print_json, table
from edge_bcs.core.files import read_small

if TYPE_CHECKING:
    from edge_bcs.targets.microcontrollers import Microcontroller


@click.command()
@click.argument("name", required=False)
@click.option("--toml", "as_toml", is_flag=True, help="Print the board's file, to write one of your own.")
@json_option
@examples("""
    edge-bcs targets
    edge-bcs targets raspberry-pi-5
    edge-bcs targets raspberry-pi-5 --toml > mine.toml
    edge-bcs simulate out/vgg16 --target mine.toml
""")
def command(name: str | None, as_toml: bool, as_json: bool) -> None:
    """List the boards whose memory and speed are known, or describe one.

    NAME is one of these, or a board file of yours.
    """
    from edge_bcs.core.units import format_bytes
    from edge_bcs.targets import boards, microcontrollers

    if as_toml and as_json:
        raise click.UsageError("--toml and --json are two forms: give one of them.")
    if as_toml:
        if name is None:
            raise click.UsageError("--toml needs the NAME of a board.")
        kind = microcontrollers if microcontrollers.is_one(name) else boards
        kind.load(name)
        click.echo(read_small(kind.file_of(name)).decode(), nl=False)
        return
    if name and microcontrollers.is_one(name):
        _describe(microcontrollers.load(name), as_json)
        return
    small = [] if name else [microcontrollers.load(item) for item in microcontrollers.names()]
    known = [boards.load(item) for item in ([name] if name else boards.names())]
    if as_json:
        print_json(
            {
                "targets": [{**asdict(board), "cores": board.cores} for board in known],
                **({"microcontrollers": [asdict(board) for board in small]} if small else {}),
            }
        )
        return
    if name:
        (board,) = known
        clusters = ", ".join(f"{c.cores}× {c.core} at {c.frequency / 1e9:.2g} GHz" for c in board.clusters)
        pairs(
            [
                ("board", board.title),
                ("memory", f"{format_bytes(board.total)}, {format_bytes(board.usable)} for one application"),
                ("default budget", format_bytes(board.default_budget)),
                ("bandwidth", f"{board.bandwidth / 1e9:.1f} GB/s"),
                ("processor", f"{clusters} ({board.isa})"),
                *([("GPU, not used", board.gpu.name)] if board.gpu else []),
                *((f"source, {topic}", source) for topic, source in board.sources.items()),
            ]
        )
        return
    table(
        "Boards",
        ("name", "memory", "usable", "default budget", "cores", "GFLOP/s"),
        [
            (board.name, format_bytes(board.total), format_bytes(board.usable),
             format_bytes(board.default_budget), board.cores, f"{board.peak_flops / 1e9:.0f}")
            for board in known
        ],
    )  # fmt: skip
    table(
        "Microcontrollers (edge-bcs export writes a C project)",
        ("name", "RAM", "flash", "default budget", "core", "MHz"),
        [
            (board.name, format_bytes(board.ram), format_bytes(board.flash),
             format_bytes(board.default_budget), board.core, f"{board.frequency / 1e6:.0f}")
            for board in small
        ],
    )  # fmt: skip


def _describe(board: Microcontroller, as_json: bool) -> None:
    from edge_bcs.core.units import format_bytes

    if as_json:
        print_json({"microcontrollers": [asdict(board)]})
        return
    pairs(
        [
            ("board", board.title),
            ("RAM", f"{format_bytes(board.ram)} at {hex(board.ram_origin)}"),
            ("flash", f"{format_bytes(board.flash)} at {hex(board.flash_origin)}"),
            ("states", f"two slots of {format_bytes(board.slot_bytes)} at {hex(board.slots_origin)}"),
            ("default budget", format_bytes(board.default_budget)),
            ("processor", f"{board.core} at {board.frequency / 1e6:.0f} MHz"),
            *((f"source, {topic}", source) for topic, source in board.sources.items()),
        ]
    )
