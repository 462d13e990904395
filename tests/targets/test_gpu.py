"""What the GPU of a board, which is not used, would have to do for the dense network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.targets import boards
from edge_bcs.targets.plans import plan_of
from edge_bcs.targets.roofline import beside_gpu, dense_flops, step_runs

from edge_bcs.simulation import simulate


def test_what_the_gpu_would_have_to_do(tmp_path: Path) -> None:
    """As counted in torch: attack and training go forward and back through every layer, and training takes
    the gradients of the weights, but not of the image."""
    torch = pytest.importorskip("torch")
    import edge_bcs

    network = edge_bcs.models.resnet18(num_classes=10, width=0.25, input_size=16).eval()
    sparse = edge_bcs.sparsify(network, sparsity="0.97", seed=0)
    options: dict[str, Any] = {"memory": edge_bcs.Memory(micro_batch=16), "batch_size": 32, "validate": False}
    options |= {"attack": edge_bcs.Attack(steps=3), "batch_norm": "frozen", "input_shape": (3, 16, 16)}
    edge_bcs.export(sparse, tmp_path / "a", objective="at", **options)
    counts: list[int] = []
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(
                lambda layer, _, out: counts.append(layer.weight.numel() * out[0].numel() // len(out[0]))
            )
    network(torch.rand(1, 3, 16, 16))
    wanted = 2 * 32 * ((2 * 3 + 3) * sum(counts) - counts[0])
    artifact = Artifact.read(tmp_path / "a")
    plan, runs = plan_of(artifact.manifest["memory"]), step_runs(artifact)
    kernels = {walk.kernel for phase in plan.phases.values() for walks in phase.walks for walk in walks}
    assert {"sparse", "dense"} <= kernels
    assert dense_flops(plan, runs, artifact.layers) == wanted
    gpu = boards.Gpu(name="G", flops=wanted / 2)
    sentence = beside_gpu(gpu, plan, runs, artifact.layers)
    assert "the GPU (G) is not used: the dense network's arithmetic takes it 2 s at least" in sentence
    unknown = [replace(layer, density=0.5) for layer in artifact.layers]
    assert beside_gpu(gpu, plan, runs, unknown) == "the GPU (G) is not used"
    found = simulate(artifact, "jetson-nano", run=False)
    assert found.expected is not None and found.expected.assumptions[-1].startswith("the GPU (Maxwell, 128")
