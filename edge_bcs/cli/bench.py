"""edge-bcs bench."""

from __future__ import annotations

from pathlib import Path

import click

from edge_bcs.cli.common import THREADS, examples, json_option, pairs, print_json
from edge_bcs.core.progress import Progress, note

SECTIONS = ("steps", "passes", "stacks", "strided", "scaling", "attacks", "robust steps")
"""Of `edge_bcs.bench.suite`, which imports numpy."""


@click.command()
@click.option("--model", default="vgg16", show_default=True, help="A network of edge-bcs, such as resnet18.")
@click.option(
    "--sparsity", type=float, default=0.99, show_default=True, help="Share of the weights that are zero."
)
@click.option(
    "--distribution", type=click.Choice(["paper", "uniform", "erk"]), default="uniform", show_default=True,
    help="How connections are spread over the layers.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Images per training step."
)
@click.option(
    "--micro-batch",
    type=click.IntRange(1),
    default=None,
    help="Images at a time; default: 16, or 16 for each thread, whichever is faster.",
)
@click.option(
    "--attack-steps", type=click.IntRange(1), default=10, show_default=True, help="Steps of the attack (PGD)."
)
@click.option("--threads", type=THREADS, default=2, show_default=True, help="Threads that compute.")
@click.option(
    "--repetitions", type=click.IntRange(1), default=3, show_default=True, help="How often each is timed."
)
@click.option(
    "--all",
    "report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Measure the machine, whole steps, single layers and scaling, and write JSON, tables and plots into "
    "DIR. What was measured is kept if it is interrupted.",
)
@click.option(
    "--resume", is_flag=True, help="With --all: keep what DIR has and measure only what is missing."
)
@click.option(
    "--only", multiple=True, metavar="PART", type=click.Choice(SECTIONS),
    help="With --all: measure this part alone, and leave the others for --resume; may be repeated. Parts: "
    f"{', '.join(SECTIONS)}.",
)  # fmt: skip
@click.option(
    "--calibrate",
    is_flag=True,
    help="Measure this machine, and save the speeds with which `export` plans and `simulate` predicts.",
)
@json_option
@examples("""
    edge-bcs bench
    edge-bcs bench --model resnet18 --distribution paper --batch-size 32 --json
    edge-bcs bench --all results/speed
    edge-bcs bench --all results/speed --resume
    edge-bcs bench --all results/speed/here --only "robust steps"
    edge-bcs bench --calibrate
""")
def command(
    report: Path | None,
    resume: bool,
    only: tuple[str, ...],
    calibrate: bool,
    as_json: bool,
    **options: object,
) -> None:
    """Time a training step under attack beside dense PyTorch (and SparseProp, where it is installed).

    The sides take turns on the same cores. Ours uses the processor's cores alone, never a GPU.
    """
    threads, repetitions = options["threads"], options["repetitions"]
    assert isinstance(threads, int) and isinstance(repetitions, int)
    if (resume or only) and report is None:
        raise click.UsageError("--resume and --only need --all DIR.")
    if calibrate and report is not None:
        raise click.UsageError("--calibrate and --all are two measurements: give one of them.")
    if calibrate:
        _calibrate(threads, as_json)
    elif report is not None:
        from edge_bcs.bench import report as writer
        from edge_bcs.bench import suite

        writer.check(report)
        earlier = writer.read(report) if resume else None
        with Progress("measuring"):
            suite.run(
                threads, repetitions, note, lambda result: writer.write(result, report), earlier,
                only or suite.SECTIONS,
            )  # fmt: skip
        pictures = [name for name in ("layers.png", "scaling.png") if (report / name).is_file()]
        click.echo(f"wrote {report}: {', '.join(['README.md', 'bench.json', *pictures])}")
    else:
        _compare(as_json, **options)


def _calibrate(threads: int, as_json: bool) -> None:
    from dataclasses import asdict

    from edge_bcs.bench.calibrate import calibrate
    from edge_bcs.core.outputs import check_output, containing
    from edge_bcs.targets import cost_model

    ours = containing(f'format = "{cost_model.FORMAT}"')
    check_output(cost_model.default_path(), ours, "a calibration of edge-bcs")
    with Progress("calibrating"):
        found = calibrate(threads, progress=note)
    machine = found.machine
    path = cost_model.save(machine)
    if as_json:
        print_json(asdict(machine) | {"file": str(path), "available": found.available, "quiet": found.quiet})
        return
    rows = [
        ("processor", f"{machine.processor} ({machine.isa}, {len(machine.arithmetic)} cores)"),
        ("arithmetic", f"{sum(machine.arithmetic) / 1e9:.0f} GFLOP/s at the peak"),
        ("memory", f"{machine.bandwidth / 1e9:.1f} GB/s"),
        ("an operator starts in", f"{1e6 * machine.costs.node:.0f} µs"),
    ]
    if threads > 1 and found.quiet:
        rows.append(("a further core adds", f"{100 * machine.costs.scaling:.0f} % of itself"))
        rows.append(("sharing an operator takes", f"{1e6 * machine.costs.fork:.0f} µs"))
    pairs([*rows, ("saved", str(path))])
    if not found.quiet:
        assumed = " and what further cores add is assumed" if threads > 1 else ""
        click.echo(
            f"Other work took {100 * (1 - found.available):.0f} % of the cores' time meanwhile: these times "
            f"are less sure{assumed}. Calibrate again when nothing else runs."
        )


def _compare(as_json: bool, **options: object) -> None:
    from edge_bcs.bench import compare_step
    from edge_bcs.core.units import format_bytes

    with Progress("measuring"):
        result = compare_step(progress=note, **options)  # type: ignore[arg-type]
    summary = result.as_dict()
    if as_json:
        print_json(summary)
        return
    rows = [
        (
            "edge-bcs",
            f"{summary['sparse_median_seconds']:.2f} s a step ({result.isa}, {result.threads} threads)",
        ),
        ("dense PyTorch", f"{summary['dense_median_seconds']:.2f} s a step"),
        ("faster", f"{result.ratio:.1f} times"),
    ]
    if "sparseprop_ratio" in summary:
        rows.append(("than SparseProp", f"{summary['sparseprop_ratio']:.1f} times"))
    rows += [
        ("update and rewiring", f"{100 * result.optimizer_share:.1f} % of the step"),
        ("working set", format_bytes(result.peak_bytes)),
    ]
    pairs(rows)
