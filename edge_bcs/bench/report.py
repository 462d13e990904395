"""Writes what `suite.run` measured so far: JSON, a README with tables, and plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edge_bcs.bench import targets
from edge_bcs.bench.suite import median, stack_least, stack_seconds
from edge_bcs.bench.turns import median_ratio
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically, write_json
from edge_bcs.core.metadata import parse_object
from edge_bcs.core.outputs import check_outputs, json_with
from edge_bcs.core.units import format_bytes
from edge_bcs.plots import write_figure

COMMAND = "make bench"
_LIMIT = """\
### What the limit is

An operator takes at least the largest of three times: of its *arithmetic*, at the rate of multiply-adds in
registers; of its *loads*, the vectors that its multiply-adds need from the caches; of its *traffic*, each
tensor once, at the rate of copies within as many bytes. The second is what binds a sparse product: a weight
meets every vector of its input plane once, and the next weight that meets the same vector comes long after
the first-level cache has lost it, so each multiply-add of a vector loads that vector from wherever the input
around a tile of output, of all planes, lies: tens to hundreds of kilobytes, so the second-level cache. The
lines of the result come the same way before they are written. The rate is measured by the kernels' own inner
loop on such working sets, above. A dense product meets what it loads several times in registers.
`edge_bcs/bench/roofline.py` is the model; `results/speed/limit.md` says what was tried to come nearer.

"The rooflines allow" is the other side's time over ours if every operator ran at its roofline; in brackets
without the traffic, as if no tensor left the caches from one operator to the next. What a target asks beyond
that is out of this machine's reach with one load a multiply-add; what it allows beyond what was measured is
the kernels' to find. In the tables "of roof" is the fraction of the larger of arithmetic and traffic, the
traffic at the rate of copies within 8 MiB a core; "of roofline" that of the largest of the three, which is
named.
"""
_OTHERS = ("torch", "sparseprop")
_DENSE = {"torch": "dense PyTorch", "bf16": "under bfloat16", "compiled": "torch.compile"}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write `bench.json`, `README.md` and, of what is there, the plots `scaling.png` and `layers.png`."""
    write_json(folder / "bench.json", result, make_folder=True)
    write_atomically(folder / "README.md", readme(result).encode())
    if result["scaling"]:
        plot_scaling(result, folder / "scaling.png")
    if result["stacks"]:
        plot_layers(result, folder / "layers.png")


def check(folder: Path) -> None:
    """Raise EdgeBcsError if `write` would write over anything in ``folder`` that it did not write."""
    files = ("README.md", "scaling.png", "layers.png")
    ours = json_with("machine", "repetitions", "steps", "stacks")
    check_outputs(folder, files, "bench.json", ours, "report of `edge-bcs bench --all`")


def read(folder: Path) -> dict[str, Any]:
    """What `write` left in ``folder``.

    Raises:
        EdgeBcsError: there is none, or it cannot be read.
    """
    try:
        return parse_object(read_small(folder / "bench.json"))
    except (OSError, ValueError) as error:
        raise EdgeBcsError(f"{folder / 'bench.json'} cannot be resumed: {error}") from None


def readme(result: dict[str, Any]) -> str:
    """All tables as Markdown."""
    machine = result["machine"]
    peak = ", ".join(f"{rate / 1e9:.0f}" for rate in machine["core_arithmetic"])
    lines = [
        "# Speed",
        "",
        f"{machine['processor']}, {machine['threads']} threads, {machine['isa']};",
        f"measured {machine['date']} by `{COMMAND}`:",
        f"{result['repetitions']} repetitions, the sides in turn; medians (least to most).",
        f"Roof: {peak} GFLOP/s of multiply-adds in registers a core. All cores together:",
        "GB/s copied, by the bytes of a core within which: "
        + ", ".join(f"{format_bytes(size)} {rate / 1e9:.0f}" for size, rate in machine["copies"])
        + ";",
        "billions of vectors loaded a second, for a multiply-add each, by the bytes of a core from which: "
        + ", ".join(f"{format_bytes(size)} {rate / 1e9:.1f}" for size, rate in machine["vector_loads"])
        + ".",
        "",
    ]
    if result["missing"]:
        lines += ["**Not measured**: " + "; ".join(result["missing"]) + ".", ""]
    lines += ["## Targets", ""]
    lines += _table(
        ("what", "target", "measured", "the rooflines allow (in cache)", ""),
        (target.cells() for target in targets.of(result)),
    )
    lines += ["", *_LIMIT.splitlines()]
    if result["steps"]:
        lines += _steps(list(result["steps"].values()))
    if result["passes"]:
        lines += ["", "## A network forward and backward", ""]
        lines += [
            "One pass over 32 images, all gradients, uniform density; the layers follow each other, with",
            "everything that is between the convolutions.",
            "",
        ]
        lines += _table(
            (
                "network, sparsity", "ours, ms", "at its rooflines, ms (in cache)", "dense PyTorch, ms",
                "times", "SparseProp, ms", "times",
            ),
            (_pass_row(*item) for item in result["passes"].items()),
        )  # fmt: skip
    if result["stacks"]:
        from edge_bcs.bench.operators import TURN_SECONDS, WARM_SECONDS

        lines += ["", "## All convolutions of a network, one at a time", ""]
        lines += [
            "Sums over all convolutions, forward and both gradients, uniform density, batch "
            f"{next(iter(result['stacks'].values()))['batch']};",
            "ours with batch norm, ReLU and masks fused. Each side waits until the others' threads sleep,",
            f"runs untimed for {1e3 * WARM_SECONDS:.0f} ms, and is timed for {1e3 * TURN_SECONDS:.0f} ms.",
            "",
        ]
        lines += _table(
            (
                "network", "sparsity", "ours, ms", "at its rooflines, ms (in cache)", "dense PyTorch, ms",
                "times", "SparseProp, ms", "times",
            ),
            map(_stack_row, result["stacks"].values()),
        )  # fmt: skip
        lines += ["", "![layers](layers.png)"]
    for stack in result["stacks"].values():
        lines += ["", f"### {stack['network']} at {stack['sparsity']}", "", *_layers(stack["layers"])]
    lines += _attacks(result)
    for rows in result["strided"].values():
        lines += ["", "## Strided and 1×1 layers", "", *_layers(rows)]
    if result["scaling"]:
        lines += ["", "## As batch, κ and image grow", "", "![scaling](scaling.png)", ""]
    for name, points in result["scaling"].items():
        ratios = [f"{point['x']:g}: {point['seconds']:.3f} s" for point in points]
        lines.append(f"- {name}: {', '.join(ratios)}")
    return "\n".join(lines) + "\n"


def _steps(steps: list[dict[str, Any]]) -> list[str]:
    """Whole steps, and where our time goes."""
    lines = [
        "",
        "## Whole training steps",
        "",
        "AT with PGD: attack, gradients, update, rewiring; batch norm with running statistics on all sides.",
        "Micro-batch: images that ours holds at once, 16 or 16 for each thread, whichever was the faster.",
        "",
    ]
    lines += _table(
        (
            "network", "densities", "batch", "micro-batch", "ours, s", "at its rooflines, s (in cache)",
            "dense PyTorch, s", "times", "SparseProp, s", "times",
            "whole update", "RewireStep alone", "working set",
        ),
        map(_step_row, steps),
    )  # fmt: skip
    lines += ["", "### Where our step's time goes", ""]
    columns = (
        "network",
        "densities",
        "attack pass, ms",
        "passes",
        "training pass, ms",
        "passes",
        "update, ms",
    )
    lines += _table(columns, map(_part_row, steps))
    lines += ["", "Operators of one pass or update, ms, and what that is of their rooflines:", ""]
    for step in steps:
        for graph, taken in step["operators"].items():
            least = step["rooflines"][graph]
            parts = [
                f"{name} {1e3 * seconds:.2f} ({_reached(least[name], seconds)})"
                for name, seconds in taken.items()
                if seconds > 5e-5
            ]
            lines.append(f"- {step['model']}, {step['distribution']}, {graph}: {', '.join(parts)}")
    return lines


def _attacks(result: dict[str, Any]) -> list[str]:
    """What half precision gains; nothing in records that are older than it."""
    lines: list[str] = []
    if result.get("attacks"):
        lines += ["", "## Attacks in half precision", "", "A pass of the attack over 32 images.", ""]
        lines += _table(
            ("network, sparsity", "float32, ms", "half, ms", "times"),
            (_precision_row(name, found["seconds"], 1e3) for name, found in result["attacks"].items()),
        )
    if result.get("robust steps"):
        lines += ["", "## Whole steps beside each dense PyTorch", ""]
        lines += [
            "AT with PGD-10 by our own engine, attacks in float32 and in half precision; in brackets the",
            "images that it holds at once, 16 or 16 for each thread, whichever was the faster. Beside it",
            "dense PyTorch in float32, under autocast to bfloat16 (where there is half), and compiled",
            "(torch.compile); behind each its time over ours with attacks in float32, and in half.",
            "",
        ]
        columns = ["network, densities, sparsity", "ours, float32, s", "half, s", "times"]
        lines += _table(
            [*columns, *(f"{title}, s" for title in _DENSE.values())],
            (_robust_step_row(name, found) for name, found in result["robust steps"].items()),
        )
    return lines


def _precision_row(name: str, seconds: dict[str, list[float]], unit: float = 1.0) -> list[str]:
    times = median_ratio(seconds, "f32", "half")
    taken = [_seconds(seconds.get(side, []), unit) for side in ("f32", "half")]
    return [name, *taken, "–" if times is None else f"{times:.2f}×"]


def _robust_step_row(name: str, found: dict[str, Any]) -> list[str]:
    seconds, cells = found["seconds"], _precision_row(name, found["seconds"])
    for column, side in ((1, "f32"), (2, "half")):
        if side in found["images"]:
            cells[column] += f" [{found['images'][side]}]"
    for side in _DENSE:
        times = (median_ratio(seconds, side, ours) for ours in ("f32", "half"))
        told = ", ".join(f"{each:.1f}×" for each in times if each is not None)
        cells.append(f"{_seconds(seconds[side])}: {told}" if side in seconds else "–")
    return cells


def _reached(least: dict[str, float], seconds: float) -> str:
    """Which part of the time the roofline is, and what most of that is for."""
    binds = max(("arithmetic", "loads", "traffic"), key=lambda name: least[name])
    return f"{100 * least['seconds'] / seconds:.0f} %, {binds}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    columns = list(columns)
    marks = ["---"] * len(columns)
    return ["| " + " | ".join(cells) + " |" for cells in (columns, marks, *map(list, rows))]


def _seconds(taken: list[float], unit: float = 1.0) -> str:
    if not taken:
        return "–"
    low, middle, high = (unit * value for value in (min(taken), statistics.median(taken), max(taken)))
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _step_row(step: dict[str, Any]) -> list[str]:
    other = f"{step['sparseprop_ratio']:.1f}×" if "sparseprop_ratio" in step else "–"
    return [
        step["model"],
        step["distribution"],
        str(step["batch_size"]),
        str(step["micro_batch"]),
        _seconds(step["sparse_seconds"]),
        f"{step['least_seconds']:.2f} ({step['least_in_cache_seconds']:.2f})",
        _seconds(step["dense_seconds"]),
        f"{step['ratio']:.1f}×",
        _seconds(step["sparseprop_seconds"]),
        other,
        f"{100 * step['optimizer_share']:.2f} %",
        f"{100 * step['rewiring_share']:.2f} %",
        format_bytes(step["peak_bytes"]),
    ]


def _part_row(step: dict[str, Any]) -> list[str]:
    cells = [step["model"], step["distribution"]]
    for graph in ("attack", "training"):
        seconds, runs = step["parts"][graph]
        cells += [f"{1e3 * seconds:.2f}", str(runs)]
    return [*cells, _seconds(step["optimizer_seconds"], 1e3)]


def _pass_row(name: str, whole: dict[str, Any]) -> list[str]:
    seconds = whole["seconds"]
    cells = [name, _seconds(seconds["edge_bcs"], 1e3)]
    cells.append(f"{1e3 * whole['least_seconds']:.2f} ({1e3 * whole['least_in_cache_seconds']:.2f})")
    for side in _OTHERS:
        ratio = median_ratio(seconds, side, "edge_bcs")
        cells += ["–", "–"] if ratio is None else [_seconds(seconds[side], 1e3), f"{ratio:.1f}×"]
    return cells


def _stack_row(stack: dict[str, Any]) -> list[str]:
    ours = stack_seconds(stack["layers"], "edge_bcs")
    assert ours is not None
    least, in_cache = (stack_least(stack["layers"], which) for which in ("seconds", "in_cache_seconds"))
    cells = [stack["network"], stack["sparsity"], f"{1e3 * ours:.1f}"]
    cells.append(f"{1e3 * least:.1f} ({1e3 * in_cache:.1f})")
    for side in _OTHERS:
        taken = stack_seconds(stack["layers"], side)
        cells += ["–", "–"] if taken is None else [f"{1e3 * taken:.1f}", f"{taken / ours:.1f}×"]
    return cells


def _layers(rows: list[dict[str, Any]]) -> list[str]:
    def cells(row: dict[str, Any]) -> list[str]:
        name = f"{row['in_channels']}→{row['out_channels']}, {row['kernel']}×{row['kernel']}/{row['stride']}"
        found = [f"{name} on {row['size']}²", f"{row['density']:.3f} {row['algorithm']}"]
        for form in ("forward", "input_gradient", "both_gradients"):
            ours, own = row["edge_bcs"][form], median(row, f"edge_bcs.{form}")
            ratios = [f"{median(row, f'torch.{form}') / own:.1f}×"]
            if f"sparseprop.{form}" in row["seconds"]:
                ratios.append(f"{median(row, f'sparseprop.{form}') / own:.1f}×")
            if f"onnxruntime.{form}" in row["seconds"]:
                ratios.append(f"ORT {median(row, f'onnxruntime.{form}') / own:.1f}×")
            roof = f"{100 * ours['roof_fraction']:.0f} % / {100 * ours['roofline_fraction']:.0f} %"
            roof += f" {ours['least']['binds']}"
            found += [
                f"{1e3 * own:.2f}",
                f"{ours['gflops']:.0f} / {ours['bytes'] / own / 1e9:.0f} / {roof}",
                ", ".join(ratios),
            ]
        return found

    columns = ["layer", "density"]
    for form in ("forward", "input gradient", "both gradients"):
        columns += [f"{form}, ms", "GFLOP/s / GB/s / of roof / of roofline", "× torch, × SparseProp"]
    return _table(columns, map(cells, rows))


def plot_scaling(result: dict[str, Any], file: Path) -> None:
    """Our step's seconds over batch, κ and pixels, beside the straight line that fits them best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"batch": "images a step", "kappa": "connections κ", "pixels": "pixels of an image"}
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axis, (name, points) in zip(axes, result["scaling"].items(), strict=False):
        x, y = [point["x"] for point in points], [point["seconds"] for point in points]
        slope, offset = statistics.linear_regression(x, y)
        axis.plot(x, y, "o", color="#0072B2", label="measured")
        axis.plot([0, max(x)], [offset, offset + slope * max(x)], "--", color="#D55E00", label="line")
        axis.set(xlabel=labels[name], ylabel="seconds a step", xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False)
    write_figure(figure, file, 110)
    pyplot.close(figure)


def plot_layers(result: dict[str, Any], file: Path) -> None:
    """How many times faster than dense PyTorch and SparseProp each convolution is, forward and backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6), layout="constrained")
    for axis, stack in zip(axes.flat, result["stacks"].values(), strict=False):
        rows = stack["layers"]
        names = [
            f"{r['in_channels']}→{r['out_channels']}\n{r['size']}² {r['kernel']}/{r['stride']}" for r in rows
        ]
        for shift, side, colour in ((-0.2, "torch", "#0072B2"), (0.2, "sparseprop", "#D55E00")):
            totals = [stack_seconds([{**row, "count": 1}], side) for row in rows]
            own = [stack_seconds([{**row, "count": 1}], "edge_bcs") for row in rows]
            if None in totals:
                continue
            ratios = [total / ours for total, ours in zip(totals, own, strict=True)]  # type: ignore[operator]
            label = {"torch": "× dense PyTorch", "sparseprop": "× SparseProp"}[side]
            axis.bar([i + shift for i in range(len(rows))], ratios, 0.4, color=colour, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(rows)), names, fontsize=6)
        axis.set(title=f"{stack['network']} at {stack['sparsity']}", ylabel="times faster")
        axis.legend(frameon=False)
    write_figure(figure, file, 110)
    pyplot.close(figure)
