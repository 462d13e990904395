"""`export`: from a sparse torch network to an artifact folder that has validated itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from edge_bcs.runtime import archive as archives
from edge_bcs.runtime import signature
from edge_bcs.runtime.artifact import (
    FORMAT,
    LARGEST_RELEASE,
    MANIFEST,
    STATE,
    VERSION,
    Artifact,
    TrainedObjective,
    graph_file,
    sha256_of,
)
from edge_bcs.runtime.ort.checkpoint import CHECKPOINT
from edge_bcs.targets.cost_model import TYPICAL_BOARD, Machine

from edge_bcs import __version__
from edge_bcs.checkpoint import state_metadata
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import objective_named
from edge_bcs.core.progress import note
from edge_bcs.core.state import state_fault
from edge_bcs.core.tensor_file import write_tensors
from edge_bcs.core.units import parse_bytes
from edge_bcs.data.classes import check_names, completed
from edge_bcs.method.sparse_model import SparseModel

from .compiler import Compiled, compile_network
from .graphs import lanes_of
from .memory.planner import Choice, Job
from .network import network_of
from .ort import checkpoint as ort_checkpoint
from .plain_eval import PLAIN_EVAL, plain_evaluation_model
from .publish import check_target, publishing
from .validation import run
from .validation import validate as validate_artifact

BATCH_NORMS = ("frozen", "batch")
STORES = ("f32", "bf16")


def export(
    sparse: SparseModel,
    directory: str | Path,
    objective: str = "at",
    input_shape: tuple[int, int, int] | None = None,
    *,
    memory: int | str | None = None,
    store: str = "f32",
    machine: Machine | None = None,
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
    sign_key: str | Path | None = None,
    release: int | None = None,
    force: bool = False,
) -> Artifact:
    """Compile ``sparse`` into the artifact ``directory`` and check it against torch.

    It appears complete or not at all. An artifact that is already there is replaced, whole; anything else,
    and an artifact with files of others in its folder, is not.

    Args:
        sparse: the network with its κ connections; `sparse.classes` are the names of its outputs, if it has
            any.
        directory: the folder to write, or a file NAME.tar: the same folder in one file.
        objective: natural, at, mixed, trades, rst or mart.
        input_shape: (channels, height, width) of the images, which lie in [0, 1]; default: those that the
            network was made for or trained on, or (3, 32, 32).
        memory: byte budget of the working set, such as "12MiB"; the planner chooses the fastest way to stay
            inside it: micro-batch, kernels, and what is recomputed for the backward pass.
        store: "f32", or "bf16": activations may be kept for the backward pass as bfloat16, where the budget
            asks for it (without a budget all are). Gradients then carry its rounding, 2⁻⁹ a number.
        machine: whose time the planner counts; default: that of a typical board.
        micro_batch: images per run of a graph, at least 1 (2 with batch statistics); default: as the planner
            says, or 32 without a budget.
        batch_norm: "frozen" (running statistics) or "batch" (statistics of the micro-batch).
        batch_size: default logical batch of the runtime.
        epsilon, step_size: radius and step of the attack in units of pixel values; attack_steps: its length.
        beta: weight of the robust term; default 6 for TRADES and RST, 4 for MART.
        seed: of the fine-tuning run; default: that of ``sparse``.
        learning_rate: of the fine-tuning run; default 0.1 with batch statistics (the paper's, from scratch)
            and 0.001 with frozen ones, where nothing rescales activations that grow.
        weight_decay: default 0.005·learning_rate, the paper's ratio (5e-4 at 0.1).
        momentum, noise, epochs: of the fine-tuning run.
        step: training steps that the network has behind it.
        validate: compare logits, loss and one gradient with torch in float64 and print the differences.
        plain_eval: also write eval_model.plain.onnx, the evaluation model in ONNX's own operators.
        sign_key: PEM file of an Ed25519 private key that signs the artifact (runtime/signature.py).
        release: number of this artifact among its maker's, which only grows (runtime/release.py).
        force: also replace a run that training saved, or an artifact whose files were changed.

    Returns:
        The artifact, read back from disk.

    Raises:
        EdgeBcsError: a network that is not supported or holds a number that is not finite, an impossible
            budget, a folder that is something else, a disk that is full or read-only, or an artifact that
            does not agree with torch; nothing is left on disk then, and what was there is as it was.
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
    if store not in STORES:
        raise EdgeBcsError(f"store must be 'f32' or 'bf16', not {store!r}")
    fault = state_fault(sparse.state(), sparse.parts)
    if fault is not None:
        raise EdgeBcsError(f"the network cannot be exported: {fault}.")
    check_target(target, force)
    if release is not None and not 1 <= release <= LARGEST_RELEASE:
        raise EdgeBcsError(f"a release is a whole number from 1 to {LARGEST_RELEASE}, not {release}")
    key = None if sign_key is None else signature.private_key(sign_key)
    job = Job(rule, beta, batch_size, attack_steps, store == "bf16", machine or TYPICAL_BOARD)
    note("reading the network")
    input_shape = input_shape or sparse.input_shape or (3, 32, 32)
    network = network_of(sparse, input_shape, batch_norm == "batch")
    note("planning its memory")
    compiled = compile_network(network, job, micro_batch, budget)
    seed = sparse.seed if seed is None else seed
    classes = sparse.classes
    if classes is not None:
        classes = completed(check_names(classes, "the network's classes"), network.classes)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created_by": f"edge-bcs {__version__}",
        **({} if release is None else {"release": release}),
        "network": {**sparse.record, "input_shape": list(network.image), "num_classes": network.classes},
        **({} if classes is None else {"classes": list(classes)}),
        "sparsity": sparse.sparsity,
        "distribution": sparse.distribution,
        "kappa": network.kappa,
        "size": network.size,
        "seed": seed,
        "layers": [kernel.described() for kernel in compiled.network.kernels.values()],
        "dense": [
            {"name": item.name, "shape": list(item.shape), "offset": item.offset}
            for item in network.dense.values()
        ],
        "statistics": [
            {"name": item.name, "channels": item.size, "offset": item.offset}
            for item in network.statistics.values()
        ],
        "objective": TrainedObjective(rule, beta, epsilon, step_size, attack_steps).described(),
        "batch_norm": batch_norm,
        "micro_batch": compiled.micro_batch,
        "lanes": lanes_of(compiled.micro_batch),
        "batch_size": batch_size,
        "hyper": {**numbers, "epochs": epochs},
        "lists_length": network.lists_length,
        "memory": {**compiled.memory.to_json(budget), "choice": _choice(compiled.choice, store)},
    }
    with publishing(target, force) as folder:
        state = {"objective": rule.name, **state_metadata(sparse, step, seed, classes)}
        if plain_eval:
            onnx.save(plain_evaluation_model(sparse, input_shape), folder / PLAIN_EVAL)
        note("writing it")
        _write(folder, compiled, manifest, sparse, state)
        if validate:
            note("comparing it with torch")
            print(validate_artifact(Artifact.read(folder), sparse).summary())
        if key is not None:
            signed = signature.sign((folder / MANIFEST).read_bytes(), key)
            (folder / archives.SIGNATURE).write_bytes(signed)
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


def _choice(choice: Choice, stored: str) -> dict[str, Any]:
    """What the planner chose, in the manifest's ``memory`` object."""
    return {
        "store": stored,
        "keep_both": choice.keep_both,
        "recomputed": sorted(choice.storage.recomputed),
        "narrowed": sorted(choice.storage.narrowed),
    }


def _write(
    folder: Path, compiled: Compiled, manifest: dict[str, Any], sparse: SparseModel, metadata: dict[str, str]
) -> None:
    for phase, graph in compiled.graphs.items():
        model = graph.to_onnx()
        onnx.checker.check_model(model)
        (folder / graph_file(phase)).write_bytes(model.SerializeToString())
    with (folder / STATE).open("wb") as stream:
        write_tensors(stream, sparse.state(), metadata)
    if ort_checkpoint.available():
        lists = np.zeros(compiled.network.lists_length, np.int32)
        feeds = {"coo.index": sparse.state()["coo.index"], "coo.lists": lists}
        run(str(folder / graph_file("lists")), feeds)
        ort_checkpoint.write_ort_checkpoint(folder / CHECKPOINT, sparse.state(), lists, metadata)
    files = sorted(path.name for path in folder.iterdir())
    manifest["files"] = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
