"""edge-bcs inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_bcs.cli.common import (
    activations,
    dense_kernels,
    examples,
    json_option,
    pairs,
    print_json,
    table,
    trust_option,
)
from edge_bcs.core.progress import Progress

if TYPE_CHECKING:
    from edge_bcs.runtime.artifact import Artifact

_SIGNATURES = {
    "none": "none",
    "unchecked": "there is one, not checked (give --trust-key)",
    "valid": "valid: made with the trusted key",
}


@click.command()
@click.argument("artifact", type=click.Path())
@trust_option
@json_option
@examples("""
    edge-bcs inspect out/vgg16
    edge-bcs inspect run --json
""")
def command(artifact: str, trust_keys: tuple[str, ...], min_release: int | None, as_json: bool) -> None:
    """Check every file of an artifact (a folder, or a .tar) or a run, and show what it holds."""
    from edge_bcs.core.units import format_bytes
    from edge_bcs.data.classes import shown
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.connections import layer_counts
    from edge_bcs.runtime.state import read_state

    with Progress(f"reading {artifact}"):
        described = Artifact.read(artifact, trust_keys, min_release)
        tensors, metadata = read_state(described)
    active = layer_counts(described, tensors["coo.index"])
    if as_json:
        print_json(
            {
                **{key: value for key, value in described.manifest.items() if key not in ("files", "memory")},
                "classes": described.classes,
                "signature": described.signature,
                "step": int(metadata["step"]),
                "state_seed": int(metadata["seed"]),
                "predicted_peak_bytes": described.predicted_peak_bytes,
                "active": {
                    layer.name: int(count) for layer, count in zip(described.layers, active, strict=True)
                },
            }
        )
        return
    objective = described.objective
    attack = f"PGD-{objective.attack.steps}, ε = {objective.attack.epsilon * 255:.3g}/255"
    if objective.attack.single_step:
        attack = f"{objective.attack.kind}, or else {attack}"
    pairs(
        [
            ("network", f"{described.network}{_made(described)}, "
                        f"{'×'.join(map(str, described.input_shape))} images, "
                        f"{described.num_classes} classes"),
            ("classes", "no names stored: labels are matched by position" if described.classes is None
                        else shown(described.classes)),
            ("connections", f"{described.kappa:,} of {described.size:,} (sparsity {described.sparsity})"),
            ("dense kernels", dense_kernels(described)),
            ("trained", f"{metadata['step']} steps, seed {metadata['seed']}"),
            ("objective", f"{objective.name}" + (f" with {attack}" if objective.kind.adversarial else "")),
            ("batch norm", described.batch_norm),
            ("learns", described.trained_text),
            ("batches", f"{described.batch_size} images, in micro-batches of {described.micro_batches}"),
            ("activations", activations(described)),
            ("predicted peak", format_bytes(described.predicted_peak_bytes)),
            ("budget", None if described.budget is None else format_bytes(described.budget)),
            ("release", described.release),
            ("signature", _SIGNATURES[described.signature]),
        ]
    )  # fmt: skip
    click.echo()
    table(
        "Layers",
        ("layer", "shape", "active", "density", "stride", "kernel"),
        [
            (layer.name, "×".join(map(str, layer.shape)), f"{count:,}", f"{100 * count / layer.size:.2f} %",
             "×".join(str(step) for step in dict.fromkeys(layer.strides)), layer.algorithm)
            for layer, count in zip(described.layers, active, strict=True)
        ],
    )  # fmt: skip


def _made(artifact: Artifact) -> str:
    """What made a network of the user's own, as the manifest says."""
    factory = artifact.manifest["network"].get("factory")
    return f" (made by {factory})" if isinstance(factory, str) else ""
