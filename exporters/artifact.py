"""`export`: from a sparse torch network to an artifact folder that has validated itself."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from edge_bcs.runtime import archive as archives
from edge_bcs.runtime import signature
from edge_bcs.runtime.artifact import Artifact, sha256_of
from edge_bcs.runtime.manifest import (
    FORMAT,
    IN_PART,
    MANIFEST,
    PROGRAM,
    SINGLE_STEP,
    STATE,
    VERSION,
    WIDE_ATTACK,
    TrainedObjective,
    graph_file,
)
from edge_bcs.runtime.ort.checkpoint import CHECKPOINT
from edge_bcs.targets.cost_model import TYPICAL_BOARD

from edge_bcs import __version__
from edge_bcs.checkpoint import state_metadata
from edge_bcs.core.deprecated import OldSpellings
from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.core.objectives import objective_named
from edge_bcs.core.part import Part
from edge_bcs.core.progress import note
from edge_bcs.core.settings import (
    BATCH_NORMS,
    PRECISIONS,
    Attack,
    Hyper,
    check_choice,
    check_count,
    filled,
)
from edge_bcs.core.state import state_fault
from edge_bcs.core.tensor_file import write_tensors
from edge_bcs.data.classes import check_names, completed
from edge_bcs.method.sparse_model import SparseModel

from .compiler import Compiled, compile_network
from .half import half_fault
from .memory.choice import Choice, Job
from .network import network_of
from .ort import checkpoint as ort_checkpoint
from .plain_eval import PLAIN_EVAL, plain_evaluation_model
from .publish import check_target, publishing
from .settings import PLACES, Memory, OldKeywords, Publishing
from .validation import Array, run
from .validation import validate as validate_artifact

if TYPE_CHECKING:
    from typing import Unpack


def export(
    sparse: SparseModel,
    directory: str | Path,
    objective: str = "at",
    input_shape: tuple[int, int, int] | None = None,
    *,
    memory: int | str | Memory | None = None,
    attack: Attack | None = None,
    hyper: Hyper | None = None,
    beta: float | None = None,
    batch_norm: str = "frozen",
    train: str = "all",
    batch_size: int = 128,
    epochs: int = 200,
    seed: int | None = None,
    step: int = 0,
    validate: bool = True,
    publish: Publishing | None = None,
    attack_precision: str = "f32",
    **old: Unpack[OldKeywords],
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
        memory: byte budget of the working set, such as "12MiB", or a `Memory`, which has it first and may
            also fix the micro-batch, allow bfloat16 and name the machine whose time is planned.
        attack: of the fine-tuning run; default: PGD-10 with ε 8/255; a single step is watched on the board,
            too, which falls back on PGD by the same graph.
        hyper: learning rate, weight decay, momentum and noise of the fine-tuning run.
        beta: weight of the robust term; default 6 for TRADES and RST, 4 for MART.
        batch_norm: "frozen" (running statistics) or "batch" (statistics of the micro-batch, of at least 2
            images, in the batch norms that are trained).
        train: what is trained: "all"; "head", the last layer with weights; "last:N", the last N of them, in
            the order of computation, with the norms and biases from there on; "norm", the scales and shifts
            of norms; "bias", the biases and the shifts of norms. The attack sees all of the network.
        batch_size: default logical batch of the runtime.
        epochs: of the fine-tuning run.
        seed: of the fine-tuning run; default: that of ``sparse``.
        step: training steps that the network has behind it.
        validate: compare logits, loss and one gradient with torch in float64 and print the differences.
        publish: signing key and release, a second evaluation model, and what may be replaced.
        attack_precision: "f32"; "half", two bytes a number between the layers of the attack, on boards whose
            processors have arithmetic in it; "auto": half on those, float32 on others. The board decides when
            it opens the artifact, whose memory plan holds for both. What is learned is float32 in any case.
        **old: keywords of 0.1, whose warning names what takes their place.

    Returns:
        The artifact, read back from disk.

    Raises:
        EdgeBcsError: a network that is not supported or holds a number that is not finite, an impossible
            budget, a folder that is something else, a disk that is full or read-only, or an artifact that
            does not agree with torch; nothing is left on disk then, and what was there is as it was.
    """
    spelt = OldSpellings("export", old, PLACES)
    limits = spelt.into(
        "memory", *((memory, Memory()) if isinstance(memory, Memory) else (None, Memory(memory)))
    )
    publish = spelt.into("publish", publish, Publishing())
    target = Path(directory)
    rule = objective_named(objective)
    trained = TrainedObjective(
        rule, rule.beta if beta is None else beta, spelt.into("attack", attack, Attack())
    )
    check_choice("batch norm", batch_norm, BATCH_NORMS)
    check_choice("attack precision", attack_precision, PRECISIONS)
    part = Part.parse(train)
    check_count("batch_size", batch_size, 1)
    check_count("epochs", epochs, 1)
    begin = filled(spelt.into("hyper", hyper, Hyper()), fine_tuning=True, batch_norm=batch_norm)
    if limits.micro_batch == 1 and batch_norm == "batch":
        raise EdgeBcsError(
            "a micro-batch of 1 image has no statistics; take 2 at least, or batch norm frozen"
        )
    state = sparse.state()
    fault = state_fault(state, sparse.parts)
    if fault is not None:
        raise EdgeBcsError(f"the network cannot be exported: {fault}.")
    check_target(target, publish.force)
    key = None if publish.sign_key is None else signature.private_key(publish.sign_key)
    job = Job(
        rule,
        trained.beta,
        batch_size,
        trained.attack.steps_taken,
        limits.store == "bf16",
        limits.machine or TYPICAL_BOARD,
    )
    note("reading the network")
    input_shape = input_shape or sparse.input_shape or (3, 32, 32)
    network = network_of(sparse, input_shape, batch_norm == "batch", part, rule.adversarial)
    if network.graph.left_out:
        said = "; ".join(network.graph.left_out)
        warnings.warn(f"of the network a part is not exported: {said}", EdgeBcsWarning, stacklevel=2)
    note("planning its memory")
    compiled = compile_network(network, job, limits.micro_batch, limits.bytes)
    without = half_fault(network, compiled.graphs["attack"])
    if without and attack_precision == "half":
        raise EdgeBcsError(
            f"the attack has no half-precision form: {without}. Take the attack precision f32 or auto."
        )
    seed = sparse.seed if seed is None else seed
    classes = sparse.classes
    if classes is not None:
        classes = completed(check_names(classes, "the network's classes"), network.num_classes)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": _version(trained, part, compiled.choice),
        "created_by": f"edge-bcs {__version__}",
        **({} if publish.release is None else {"release": publish.release}),
        "network": {
            **sparse.record,
            "input_shape": list(network.input_shape),
            "num_classes": network.num_classes,
        },
        **({} if classes is None else {"classes": list(classes)}),
        "sparsity": sparse.sparsity,
        "distribution": sparse.distribution,
        "seed": seed,
        "objective": trained.described(),
        **({} if without else {"attack_precision": attack_precision}),
        "batch_norm": batch_norm,
        "batch_size": batch_size,
        "hyper": {**asdict(begin), "epochs": epochs},
        **compiled.described(limits.bytes, limits.store),
    }
    with publishing(target, publish.force) as folder:
        if publish.plain_eval:
            (folder / PLAIN_EVAL).write_bytes(
                plain_evaluation_model(network.graph, sparse.network).SerializeToString()
            )
        note("writing it")
        metadata = {"objective": rule.name, **state_metadata(sparse, step, seed, classes)}
        _write(folder, compiled, manifest, state, metadata)
        if validate:
            note("comparing it with torch")
            print(validate_artifact(Artifact.read(folder), sparse).summary())
        if key is not None:
            signed = signature.sign((folder / MANIFEST).read_bytes(), key)
            (folder / archives.SIGNATURE).write_bytes(signed)
    return Artifact.read(target)


def _version(trained: TrainedObjective, part: Part, choice: Choice) -> int:
    """The oldest format that says all of it: an edge-bcs that does not know it refuses the artifact."""
    if choice.images != choice.micro_batch:
        return WIDE_ATTACK
    if trained.attack.single_step:
        return SINGLE_STEP
    return VERSION if part.everything else IN_PART


def _write(
    folder: Path,
    compiled: Compiled,
    manifest: dict[str, Any],
    state: dict[str, Array],
    metadata: dict[str, str],
) -> None:
    for phase, graph in compiled.graphs.items():
        model = graph.to_onnx()
        onnx.checker.check_model(model)
        (folder / graph_file(phase)).write_bytes(model.SerializeToString())
    (folder / PROGRAM).write_bytes(compiled.program.dump())
    with (folder / STATE).open("wb") as stream:
        write_tensors(stream, compiled.network.trained.of(state), metadata)
    # ONNX Runtime's own training has a gradient of the shape of each parameter, and so trains all of it.
    if ort_checkpoint.available() and compiled.network.part.everything:
        lists = np.zeros(compiled.network.lists_length, np.int32)
        run(str(folder / graph_file("lists")), {"coo.index": state["coo.index"], "coo.lists": lists})
        tensors = {**state, "coo.lists": lists}
        ort_checkpoint.write_ort_checkpoint(folder / CHECKPOINT, tensors, metadata)
    files = sorted(path.name for path in folder.iterdir())
    manifest["files"] = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
