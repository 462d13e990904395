"""The simulator's answer for a terminal."""

from __future__ import annotations

from edge_bcs.targets.tables import fitting
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from edge_bcs.core.units import format_bytes

from .layout import layout_of, letters, text_map
from .plans import Phase
from .simulator import DOES_NOT_FIT, TIGHT, Simulation

_NARROW = 60
_STYLES = {DOES_NOT_FIT: "bold red", TIGHT: "bold yellow"}


def show(simulation: Simulation, console: Console) -> None:
    """Print verdict, peaks, map, times and changes."""
    console.print(_verdict(simulation))
    for part in (_phases(simulation), _process(simulation), _categories(simulation)):
        console.print()
        console.print(fitting(part, console.width))
    console.print()
    console.print(_map(simulation, console.width))
    console.print()
    _print_times(simulation, console)
    if simulation.advice.changes:
        console.print()
        _print_changes(simulation, console)


def _verdict(simulation: Simulation) -> RenderableType:
    artifact, board = simulation.artifact, simulation.target
    title = f"{artifact.network} at sparsity {artifact.sparsity}, {artifact.objective.name}, "
    title += f"batch norm {artifact.batch_norm}, micro-batch {artifact.micro_batches}"
    if not artifact.trained.part.everything:
        title += (
            f", trained in part ({artifact.trained_text}; {format_bytes(artifact.untrained_bytes)} saved)"
        )
    where = f" on {board.title}" if board else ""
    line = Text(simulation.verdict.upper(), style=_STYLES.get(simulation.verdict, "bold green"))
    return Group(
        Text(title + where, style="bold"), line, *(Text(f"  {reason}") for reason in simulation.reasons)
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=True)
    return table


def _phases(simulation: Simulation) -> Table:
    table = _table("Peak of the working set, in bytes", "phase", "predicted", "measured", "difference")
    runs = simulation.measured.phases if simulation.measured else {}
    rows: list[tuple[str, int, int | None]] = []
    for name, phase in simulation.plan.phases.items():
        peak = runs.get(name, {}).get("peak_bytes")
        shown = f"{name} (to evaluate)" if phase.apart else name
        rows.append((shown, phase.peak_bytes, None if peak is None else int(peak)))
    rows.append(("all", simulation.predicted_peak_bytes, simulation.measured_peak_bytes))
    for name, predicted, measured in rows:
        found = "–" if measured is None else f"{measured:,}"
        difference = "–" if measured is None else f"{100 * (measured - predicted) / predicted:+.2f} %"
        table.add_row(name, f"{predicted:,}", found, difference, style="bold" if name == "all" else "")
    if simulation.arena_bytes not in (None, simulation.predicted_peak_bytes):
        table.add_row("arena of --engine native, holes included", f"{simulation.arena_bytes:,}", "", "")
    return table


def _process(simulation: Simulation) -> Table:
    outside = simulation.outside
    table = _table(f"The process that trains, {outside.source}", "what", "size")
    for name, size in (
        ("working set, which the budget counts", simulation.predicted_peak_bytes),
        ("holes that the allocator leaves between tensors", outside.holes),
        ("sessions and graph", outside.sessions),
        ("interpreter and libraries", outside.libraries),
    ):
        if size:
            table.add_row(name, format_bytes(size))
    table.add_row("all", format_bytes(simulation.process_bytes), style="bold")
    if simulation.target:
        table.add_row("margin for another machine's libraries", format_bytes(simulation.margin_bytes))
    return table


def _categories(simulation: Simulation) -> Table:
    shown = [phase for phase in simulation.plan.phases.values() if phase.allocations]
    table = _table("What is in memory at each peak", "category", *(phase.name for phase in shown), "share")
    peak = simulation.plan.peak_phase
    names = sorted(
        {name for phase in shown for name in phase.categories},
        key=lambda name: -peak.categories.get(name, 0),
    )
    for name in names:
        sizes = [phase.categories.get(name) for phase in shown]
        share = f"{100 * peak.categories.get(name, 0) / peak.peak_bytes:.0f} %"
        table.add_row(name, *("–" if size is None else format_bytes(size) for size in sizes), share)
    return table


def _map(simulation: Simulation, width: int) -> RenderableType:
    phase: Phase = simulation.plan.peak_phase
    if not phase.allocations:
        return Text(f"{phase.name} works in the bound buffers alone")
    key = letters(simulation.plan.phases.values())
    layout = layout_of(phase)
    used = {tensor.category for tensor in phase.allocations}
    lines = text_map(phase, key, width=max(16, min(100, width - 14)))
    legend = [f"{letter} {category}" for category, letter in key.items() if category in used]
    holes = layout.extent - layout.live
    packed = (
        f"In the arena these tensors take {format_bytes(layout.extent)}; alive at once are at most "
        f"{format_bytes(layout.live)}, so {format_bytes(holes)} are holes."
    )
    return Group(
        Text(f"Address × time of {phase.name}: {len(phase.nodes)} nodes from left to right", style="bold"),
        Text("\n".join(lines)),
        Text("\n".join(_lines([*legend, ". free"], width, indent=12 if width >= _NARROW else 2))),
        Text(f"{packed} The bound buffers, {format_bytes(simulation.plan.bound_bytes)}, lie before them."),
    )


def _lines(items: list[str], width: int, indent: int) -> list[str]:
    """Items side by side, three spaces apart; none is broken at the end of a line."""
    lines = [" " * indent + items[0]]
    for item in items[1:]:
        if len(lines[-1]) + 3 + len(item) <= width:
            lines[-1] += "   " + item
        else:
            lines.append(" " * indent + item)
    return lines


def _print_times(simulation: Simulation, console: Console) -> None:
    expected, measured = simulation.expected, simulation.measured
    where = simulation.target.title if simulation.target else "this host"
    size = simulation.artifact.batch_size
    if expected:
        table = _table(
            f"Time of a step over {size} images", "phase", "runs", "expected there", "measured here"
        )
        for name, seconds in expected.phases.items():
            took = measured.phases.get(name, {}).get("seconds_per_step") if measured else None
            table.add_row(name, str(expected.runs[name]), _seconds(seconds), _seconds(took))
        took = measured.seconds_per_step if measured else None
        table.add_row("step", "", _seconds(expected.seconds), _seconds(took), style="bold")
        console.print(fitting(table, console.width))
        console.print(f"Expected on {where}, a roofline that assumes:")
        points = Table.grid(padding=(0, 1))
        for assumption in expected.assumptions:
            points.add_row("  ·", assumption)
        console.print(points)
    else:
        console.print(
            "The artifact's plan does not tell its arithmetic: export it again for an expected time."
        )
    if measured is None:
        console.print("Not run; the verdict rests on the prediction.")
        return
    if simulation.calibrated_seconds is not None and simulation.target:
        console.print(
            "Corrected by measured over expected on this host: "
            f"{_seconds(simulation.calibrated_seconds)} a step."
        )
    details = measured.details
    if measured.seconds_per_step is not None:
        part = ""
        if details["timed_micro_batches"] < details["micro_batches_per_step"]:
            timed, whole = details["timed_micro_batches"], details["micro_batches_per_step"]
            part = f", extrapolated from {timed} of {whole} micro-batches"
        console.print(f"Measured here with {measured.threads} threads, {details['isa']} kernels{part}.")
        if measured.disturbed:
            console.print(
                f"Other work took {100 * (1 - details['cores_share']):.0f} % of the cores meanwhile: a step "
                "is faster than that when nothing else runs. Bytes do not depend on it."
            )
    console.print(f"Process: {measured.confinement}.")
    if measured.rss_peak_bytes:
        libraries = measured.rss_libraries_bytes
        note = f", {format_bytes(libraries)} of it before the artifact was opened" if libraries else ""
        console.print(f"Resident memory at most {format_bytes(measured.rss_peak_bytes)}{note}.")
    if not measured.exact and not measured.refused:
        console.print(
            "This ONNX Runtime does not let every tensor be counted: the measured peak is a lower bound."
        )


def _print_changes(simulation: Simulation, console: Console) -> None:
    console.print(Text("What would help", style="bold"))
    for change in simulation.advice.changes:
        mark = ("fits", "green") if change.fits else ("still too large", "red")
        speed = (
            ""
            if change.slowdown is None
            else f", {change.slowdown:.2f} × the time ({_seconds(change.seconds)} a step)"
        )
        lost = ", needs training anew" if change.retrain else ""
        saved = f", {format_bytes(change.peak_bytes)}, saves {format_bytes(change.saved_bytes)}{speed}{lost}"
        console.print(Text.assemble(f"  {change.what}: ", mark, saved))
        console.print(Text(f"    {change.command}"), soft_wrap=True)
    console.print(f"  (figures {simulation.advice.source})")


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
