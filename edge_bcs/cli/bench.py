"""edge-bcs bench."""

from __future__ import annotations

import click

from edge_bcs.cli.common import examples, json_option, pairs, print_json


@click.command()
@click.option("--model", default="vgg16", show_default=True)
@click.option("--sparsity", type=float, default=0.99, show_default=True)
@click.option(
    "--distribution", type=click.Choice(["paper", "uniform", "erk"]), default="uniform", show_default=True
)
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option("--micro-batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--attack-steps", type=click.IntRange(1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--repetitions", type=click.IntRange(1), default=3, show_default=True)
@json_option
@examples("""
    edge-bcs bench
    edge-bcs bench --model resnet18 --distribution paper --batch-size 32 --json
""")
def command(as_json: bool, **options: object) -> None:
    """Time whole adversarial training steps, ours and dense PyTorch's, turn about on the same cores."""
    from edge_bcs.bench import compare_step
    from edge_bcs.runtime.units import format_bytes

    result = compare_step(progress=lambda message: click.echo(message, err=True), **options)  # type: ignore[arg-type]
    if as_json:
        print_json(result.as_dict())
        return
    summary = result.as_dict()
    pairs(
        [
            (
                "edge-bcs",
                f"{summary['sparse_median_seconds']:.2f} s a step ({result.isa}, {result.threads} threads)",
            ),
            ("dense PyTorch", f"{summary['dense_median_seconds']:.2f} s a step"),
            ("faster", f"{result.ratio:.1f} times"),
            ("working set", format_bytes(result.peak_bytes)),
        ]
    )
