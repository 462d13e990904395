"""`export`: from a sparse torch network to an artifact folder that has validated itself."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from edge_bcs.runtime.artifact import FORMAT, MANIFEST, STATE, VERSION, Artifact, graph_file, sha256_of
from edge_bcs.runtime.buffers import bound_buffers
from edge_bcs.runtime.ort_checkpoint import CHECKPOINT
from edge_bcs.runtime.units import format_bytes, parse_bytes
from safetensors.numpy import save

import edge_bcs
from edge_bcs.errors import EdgeBcsError
from edge_bcs.objectives import Objective
from edge_bcs.objectives import get as objective_named
from edge_bcs.sparse_model import SparseModel

from . import ort_checkpoint
from .graphs import attack_graph, evaluation_graph, lanes_of, lists_graph, optimizer_graph, training_graph
from .layers import Convolution
from .network import Network, network_of
from .nodes import Graph
from .plain_eval import PLAIN_EVAL, plain_evaluation_model
from .plan import MemoryPlan, plan
from .validation import run
from .validation import validate as validate_artifact

MICRO_BATCHES = (128, 64, 32, 16, 8, 4, 2, 1)
DEFAULT_MICRO_BATCH = 16
BATCH_NORMS = ("frozen", "batch")


@dataclass(frozen=True)
class Compiled:
    """Graphs and plan for one micro-batch."""

    network: Network
    micro_batch: int
    graphs: dict[str, Graph]
    memory: MemoryPlan


def compile_network(network: Network, objective: Objective, beta: float, micro_batch: int) -> Compiled:
    """Emit and plan the graphs of ``network`` for one micro-batch; nothing is written or run."""
    graphs = {
        "training": training_graph(network, micro_batch, objective.name, beta),
        "attack": attack_graph(network, micro_batch),
        "eval": evaluation_graph(network, micro_batch),
        "optimizer": optimizer_graph(network),
        "lists": lists_graph(network),
    }
    bound = bound_buffers(
        kappa=network.kappa,
        lists_length=network.lists.length,
        dense_size=network.layout.dense_size,
        statistics_size=network.layout.statistics_size,
        micro_batch=micro_batch,
        input_shape=network.image,
        num_classes=network.classes,
        two_branches=objective.two_branches,
        batch_statistics=network.batch_statistics,
    )
    return Compiled(network, micro_batch, graphs, plan(graphs, bound, network.connections))


def _candidates(network: Network, batch_size: int) -> Iterator[tuple[Network, int]]:
    """(network, micro-batch) from the fastest to the smallest.

    A dense kernel needs work memory for its unpacked weights. Full vectors matter more than dense kernels,
    dense kernels more than batches beyond full vectors.
    """
    frugal = replace(network, algorithms=dict.fromkeys(network.algorithms, "sparse"))
    smallest = 2 if network.batch_statistics else 1
    for micro_batch in MICRO_BATCHES:
        if smallest <= micro_batch <= max(batch_size, smallest):
            yield network, micro_batch
            if micro_batch <= DEFAULT_MICRO_BATCH and "dense" in network.algorithms.values():
                yield frugal, micro_batch


def choose(
    network: Network,
    objective: Objective,
    beta: float,
    batch_size: int,
    micro_batch: int | None,
    budget: int | None,
) -> Compiled:
    """Compile for the given micro-batch, or the fastest that fits the budget.

    Raises:
        EdgeBcsError: nothing fits; the message gives the smallest feasible budget in bytes.
    """
    if micro_batch is None and budget is None:
        micro_batch = min(DEFAULT_MICRO_BATCH, max(2 if network.batch_statistics else 1, batch_size))
    if micro_batch is not None:
        options = [pair for pair in _candidates(network, micro_batch) if pair[1] == micro_batch]
        tried = options or [(network, micro_batch)]
    else:
        tried = list(_candidates(network, batch_size))
    smallest: Compiled | None = None
    for candidate, images in tried:
        compiled = compile_network(candidate, objective, beta, images)
        if budget is None or compiled.memory.peak_bytes <= budget:
            return compiled
        if smallest is None or compiled.memory.peak_bytes < smallest.memory.peak_bytes:
            smallest = compiled
    assert smallest is not None and budget is not None
    need = smallest.memory.peak_bytes
    advice = "" if micro_batch is None else f" with a micro-batch of {micro_batch}"
    raise EdgeBcsError(
        f"{format_bytes(budget)} ({budget} bytes) is too little{advice}: the smallest feasible budget is "
        f"{need} bytes ({format_bytes(need)}, micro-batch {smallest.micro_batch}), whose peak is in the "
        f"{smallest.memory.peak_phase} graph; raise the sparsity, choose a smaller network or allow that much"
    )


def export(
    sparse: SparseModel,
    directory: str | Path,
    objective: str = "at",
    input_shape: tuple[int, int, int] = (3, 32, 32),
    *,
    memory: int | str | None = None,
    micro_batch: int | None = None,
    batch_norm: str = "frozen",
    batch_size: int = 128,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    attack_steps: int = 10,
    beta: float | None = None,
    seed: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    momentum: float = 0.9,
    noise: float = 1e-6,
    epochs: int = 200,
    step: int = 0,
    validate: bool = True,
    plain_eval: bool = False,
) -> Artifact:
    """Compile ``sparse`` into the artifact folder ``directory`` and check it against torch.

    The folder appears complete or not at all; an artifact that is already there is replaced.

    Args:
        sparse: the network with its κ connections.
        directory: the folder to write.
        objective: natural, at, mixed, trades, rst or mart.
        input_shape: (channels, height, width) of the images, which lie in [0, 1].
        memory: byte budget of the working set, such as "12MiB"; the largest micro-batch that fits is chosen.
        micro_batch: images per run of a graph, at least 1 (2 with batch statistics); default: as ``memory``
            says, or 16.
        batch_norm: "frozen" (running statistics) or "batch" (statistics of the micro-batch).
        batch_size: default logical batch of the runtime.
        epsilon, step_size: radius and step of the attack in units of pixel values; attack_steps: its length.
        beta: weight of the robust term; default 6 for TRADES and RST, 4 for MART.
        seed: of the fine-tuning run; default: that of ``sparse``.
        learning_rate: of the fine-tuning run; default 0.1 with batch statistics (the paper's, from scratch) and
            0.001 with frozen ones, where nothing rescales activations that grow.
        weight_decay: default 0.005·learning_rate, the paper's ratio (5e-4 at 0.1).
        momentum, noise, epochs: of the fine-tuning run.
        step: training steps that the network has behind it.
        validate: compare logits, loss and one gradient with torch in float64 and print the differences.
        plain_eval: also write eval_model.plain.onnx, the evaluation model in ONNX's own operators.

    Returns:
        The artifact, read back from disk.

    Raises:
        EdgeBcsError: a network that is not supported, an impossible budget, a folder that is something else,
            or
            an artifact that does not agree with torch; nothing is left on disk then.
    """
    target = Path(directory)
    rule = objective_named(objective)
    beta = rule.beta if beta is None else beta
    budget = None if memory is None else parse_bytes(memory)
    if learning_rate is None:
        learning_rate = 0.1 if batch_norm == "batch" else 0.001
    if weight_decay is None:
        weight_decay = 5e-3 * learning_rate
    numbers = {
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "noise": noise,
    }
    _check(batch_norm, batch_size, micro_batch, attack_steps, {**numbers, "epsilon": epsilon, "beta": beta})
    _check_target(target)
    network = network_of(sparse, input_shape, batch_norm == "batch")
    compiled = choose(network, rule, beta, batch_size, micro_batch, budget)
    seed = sparse.seed if seed is None else seed
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created_by": f"edge-bcs {edge_bcs.__version__}",
        "network": {**sparse.record, "input_shape": list(network.image), "num_classes": network.classes},
        "sparsity": sparse.sparsity,
        "distribution": sparse.distribution,
        "kappa": network.kappa,
        "size": network.layout.size,
        "seed": seed,
        **_tables(compiled.network, sparse),
        "objective": {
            "name": rule.name,
            "beta": beta,
            "epsilon": epsilon,
            "step_size": step_size,
            "attack_steps": attack_steps,
            "start": rule.attack_start or "uniform",
            "attack_loss": rule.attack_loss,
            "two_branches": rule.two_branches,
        },
        "batch_norm": batch_norm,
        "micro_batch": compiled.micro_batch,
        "lanes": lanes_of(compiled.micro_batch),
        "batch_size": batch_size,
        "hyper": {**numbers, "epochs": epochs},
        "lists_length": network.lists.length,
        "memory": compiled.memory.to_json(budget),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        state = {"objective": rule.name, "step": str(step), "seed": str(seed)}
        if plain_eval:
            onnx.save(plain_evaluation_model(sparse, input_shape), folder / PLAIN_EVAL)
        _write(folder, compiled, manifest, sparse, state)
        if validate:
            print(validate_artifact(Artifact.read(folder), sparse).summary())
        _publish(folder, target, Path(scratch) / "replaced")
    return Artifact.read(target)


def _check(
    batch_norm: str, batch_size: int, micro_batch: int | None, attack_steps: int, numbers: Mapping[str, float]
) -> None:
    if batch_norm not in BATCH_NORMS:
        raise EdgeBcsError(f"batch_norm must be 'frozen' or 'batch', not {batch_norm!r}")
    if batch_size < 1:
        raise EdgeBcsError(f"the batch size must be at least 1, not {batch_size}")
    smallest = 2 if batch_norm == "batch" else 1
    if micro_batch is not None and not smallest <= micro_batch <= 1 << 16:
        raise EdgeBcsError(
            f"the micro-batch must lie between {smallest} and 65536 (batch_norm={batch_norm!r}), "
            f"not {micro_batch}"
        )
    if attack_steps < 0:
        raise EdgeBcsError(f"the number of attack steps must not be negative, not {attack_steps}")
    for name, number in numbers.items():
        if not 0 <= number < float("inf"):
            raise EdgeBcsError(f"{name} must be a finite number and not negative, not {number}")


def _check_target(target: Path) -> None:
    if (
        target.exists()
        and not (target / MANIFEST).is_file()
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise EdgeBcsError(f"{target} exists and is not an artifact; choose another folder")


def _tables(network: Network, sparse: SparseModel) -> dict[str, Any]:
    """The manifest's layers, dense parameters and statistics."""
    convolutions = {layer.module: layer for layer in network.graph.layers if isinstance(layer, Convolution)}
    counts = sparse.layer_counts()
    layers = []
    for name, segment in network.layout.prunable.items():
        convolution = convolutions.get(name)
        layers.append(
            {
                "name": name,
                "shape": list(segment.shape),
                "offset": segment.offset,
                "kernel": list(convolution.kernel) if convolution else [1, 1],
                "stride": convolution.stride if convolution else 1,
                "padding": convolution.padding if convolution else 0,
                "density": counts[name] / segment.size,
                "algorithm": network.algorithms[name],
            }
        )
    dense = network.layout.dense.values()
    statistics = network.layout.statistics.values()
    return {
        "layers": layers,
        "dense": [{"name": item.name, "shape": list(item.shape), "offset": item.offset} for item in dense],
        "statistics": [{"name": s.name, "channels": s.size, "offset": s.offset} for s in statistics],
    }


def _write(
    folder: Path, compiled: Compiled, manifest: dict[str, Any], sparse: SparseModel, state: dict[str, str]
) -> None:
    metadata = {
        "format": "edge-bcs-state",
        "version": "1",
        "network": json.dumps(sparse.record),
        "layers": json.dumps([[layer.name, list(layer.shape)] for layer in sparse.layers]),
        "sparsity": sparse.sparsity,
        "distribution": sparse.distribution,
        **state,
    }
    for phase, graph in compiled.graphs.items():
        model = graph.to_onnx()
        onnx.checker.check_model(model)
        (folder / graph_file(phase)).write_bytes(model.SerializeToString())
    (folder / STATE).write_bytes(_sorted_header(save(sparse.state(), metadata)))
    if ort_checkpoint.available():
        lists = np.zeros(compiled.network.lists.length, np.int32)
        feeds = {"coo.index": sparse.state()["coo.index"], "coo.lists": lists}
        run(str(folder / graph_file("lists")), feeds)
        ort_checkpoint.write_ort_checkpoint(folder / CHECKPOINT, sparse.state(), lists, metadata)
    files = sorted(path.name for path in folder.iterdir())
    manifest["files"] = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _sorted_header(content: bytes) -> bytes:
    """A safetensors file with its metadata in sorted order: one network gives one file to the byte."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _publish(folder: Path, target: Path, aside: Path) -> None:
    """Put ``folder`` in place of ``target`` by renaming; both lie on one file system."""
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(folder, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
