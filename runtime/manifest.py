"""What a manifest says of an artifact, and whether it can be right.

Every field is checked before it is used; every fault names the field. Nothing here reads a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_bcs.runtime import archive
from edge_bcs.runtime.fields import Fields

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import exact_sparsity, parse_json
from edge_bcs.core.objectives import OBJECTIVES, Objective
from edge_bcs.core.part import ALL, Part, Trained
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.core.segments import Segment
from edge_bcs.core.settings import ATTACKS, MOST_ATTACK_STEPS, PRECISIONS, Attack, check_number
from edge_bcs.core.text import check_text
from edge_bcs.data.classes import Names

FORMAT = "edge-bcs-artifact"
VERSION, IN_PART, SINGLE_STEP, WIDE_ATTACK = 1, 2, 3, 4
"""Format versions: of artifacts that train all of a network; of those that train a part of it; of those, in
part or not, whose attack is a single step; and of those, with either or not, that attack more images at once
than they train on. Earlier releases would misread the last three."""
VERSIONS = (VERSION, IN_PART, SINGLE_STEP, WIDE_ATTACK)
GRAPHS = ("training", "attack", "eval", "optimizer", "lists")
MANIFEST = archive.MANIFEST
STATE = "state.safetensors"
PROGRAM = "program.bin"
"""The graphs for our own runner; artifacts of 0.1 have none."""
_MOST_NUMBERS = 2**31 - 1  # of any buffer
LARGEST_RELEASE = 2**53 - 1  # what every reader of JSON takes for a whole number
_LARGEST_FILE = 2 << 30  # bytes; read in pieces
_LARGEST_GRAPH = 64 << 20  # bytes; read at once, and without any weights


def graph_file(graph: str) -> str:
    """File name of a graph: "training" → "training_model.onnx"."""
    return f"{graph}_model.onnx"


def compiled_files(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the files that the compiler made and that a run has as well: the graphs, and their program."""
    graphs = [graph_file(graph) for graph in GRAPHS]
    return [*graphs, PROGRAM] if PROGRAM in manifest["files"] else graphs


@dataclass(frozen=True)
class PrunableLayer(Segment):
    """One prunable layer: its kernel, [out, in, kh, kw] or [out, in] if linear, among the N positions."""

    kernel: tuple[int, int]
    strides: tuple[int, ...]
    pads: tuple[int, ...]  # top, left, bottom, right
    dilations: tuple[int, ...]
    groups: int
    density: float
    algorithm: str


@dataclass(frozen=True)
class TrainedObjective:
    """What an artifact is trained for: an objective of the table, its β and its attack."""

    kind: Objective
    beta: float
    attack: Attack

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a β out of range, or an attack that the objective has no use for."""
        check_number("beta", self.beta)
        self.kind.check_attack(self.attack)

    @property
    def name(self) -> str:
        """The objective's name."""
        return self.kind.name

    @property
    def start(self) -> str:
        """Where PGD starts; "uniform" where there is none."""
        return self.kind.attack_start or "uniform"

    @property
    def attack_loss(self) -> str:
        """What the attack increases, "cross_entropy" or "kl"."""
        return self.kind.attack_loss

    @property
    def two_branches(self) -> bool:
        """Whether clean and adversarial images both go through the network."""
        return self.kind.two_branches

    def described(self) -> dict[str, Any]:
        """Its part of the manifest, which also says what follows from the name."""
        return {
            "name": self.name,
            "beta": self.beta,
            "epsilon": self.attack.epsilon,
            "step_size": self.attack.step_size,
            "attack_steps": self.attack.steps,
            **({"training_attack": self.attack.kind} if self.attack.single_step else {}),
            "start": self.start,
            "attack_loss": self.attack_loss,
            "two_branches": self.two_branches,
        }


@dataclass(frozen=True)
class Described:
    """What a manifest says of an artifact, typed. See contract of `manifest.json`.

    Attributes:
        manifest: as it stands in the file.
        kappa: κ, connections of the whole network; size: N, its prunable positions.
        micro_batch: images per run of the training graph. attack_micro_batch: that the buffers hold, a
            multiple of those, which an attack and an evaluation take at once.
        lanes: images per vector in training; batch_size: the default logical batch.
        classes: names of the outputs in label order, ``num_classes`` of them; None while they are unknown.
        dense_size, statistics_size: lengths of dense.value and of batchnorm.mean.
        trained: which parameters learn.
        budget: the byte budget it was exported for, or None; hyper: learning_rate, weight_decay, momentum,
            noise.
        resize: how image files are brought to the size of ``input_shape``.
        release: number that the maker gave it, which grows from one to the next; None without one.
        attack_precision: one of PRECISIONS, in which attacks are to be; None for a network whose attack has
            no half-precision form, or of a release that knew none.
    """

    manifest: dict[str, Any]
    input_shape: tuple[int, int, int]
    num_classes: int
    classes: Names | None
    sparsity: str
    kappa: int
    size: int
    seed: int
    layers: tuple[PrunableLayer, ...]
    dense_size: int
    statistics_size: int
    trained: Trained
    objective: TrainedObjective
    batch_norm: str
    micro_batch: int
    attack_micro_batch: int
    lanes: int
    batch_size: int
    hyper: dict[str, float]
    lists_length: int
    budget: int | None
    release: int | None
    resize: Resize
    attack_precision: str | None

    @property
    def network(self) -> str:
        """The network's name, e.g. "vgg16"."""
        return str(self.manifest["network"]["name"])

    @property
    def batch_statistics(self) -> bool:
        """Whether training normalises by the micro-batch."""
        return self.batch_norm == "batch"

    @property
    def micro_batches(self) -> str:
        """ "1 image", or "4 images, attacked 16 at once", for messages."""
        text = f"{self.micro_batch} image" + ("" if self.micro_batch == 1 else "s")
        if self.attack_micro_batch == self.micro_batch:
            return text
        return f"{text}, attacked {self.attack_micro_batch} at once"

    @property
    def release_text(self) -> str:
        """ "release 7", or "of no release", for messages."""
        return "of no release" if self.release is None else f"release {self.release}"

    @property
    def trained_text(self) -> str:
        """ "all", or what part is trained and how much that is, for messages."""
        trained = self.trained
        if trained.part.everything:
            return trained.part.text
        return (
            f"{trained.part.text}: {trained.kappa:,} of {self.kappa:,} connections, "
            f"{trained.dense_size:,} of {self.dense_size:,} other numbers"
        )

    @property
    def untrained_bytes(self) -> int:
        """Bytes of the momentum and the gradients that are not there, because not all is trained."""
        trained = self.trained
        return 8 * (self.kappa - trained.kappa + self.dense_size - trained.dense_size)

    @property
    def attack_bytes(self) -> int:
        """Working set of an attack with which the artifact is evaluated, where its training has none that the
        predicted peak counts; else 0."""
        if "transposed" not in self.manifest.get("train", {}):
            return 0
        return self.peak_of("attack")

    def peak_of(self, graph: str) -> int:
        """Working set of a graph, in bytes; 0 where the plan does not tell."""
        phase = self.manifest["memory"].get("phases", {}).get(graph, {})
        return int(phase.get("peak_bytes", 0))

    @property
    def placed(self) -> bool:
        """Whether the predicted peak is that of the program's arena, as of every artifact since 0.2."""
        return PROGRAM in self.manifest["files"] and self.manifest["memory"].get("placed", False) is True

    @property
    def predicted_peak_bytes(self) -> int:
        """The working set that the compiler predicted, in bytes: the arena in which a training lies."""
        return int(self.manifest["memory"]["predicted_peak_bytes"])


def parse_manifest(folder: Path, content: bytes) -> dict[str, Any]:
    """Return the object in ``content``, which stands in the manifest of ``folder``; EdgeBcsError if it is no
    manifest of a version that is read here."""
    file = folder / MANIFEST
    try:
        manifest = parse_json(content, unique=True)
    except ValueError:
        raise EdgeBcsError(
            f"{file} is not valid JSON (truncated or altered); copy the artifact again."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise EdgeBcsError(f"{file} does not describe an edge-bcs artifact (its format is not {FORMAT!r}).")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSIONS[-1]:
        raise EdgeBcsError(
            f"{folder} has artifact format {version} and this edge-bcs reads up to {VERSIONS[-1]}: upgrade "
            "edge-bcs here, or export again with this version."
        )
    if version not in VERSIONS or isinstance(version, bool):
        raise EdgeBcsError(f"{file} names the unknown format version {str(version)[:60]!r}.")
    check_text(manifest, str(file))
    return manifest


def describe(manifest: dict[str, Any]) -> Described:
    """Return what `parse_manifest` gave, every field checked; EdgeBcsError for one that cannot be right."""
    fields = Fields(manifest, "")
    network = fields.object("network")
    network.text("name")
    network.optional_object("arguments")
    fields.text("distribution", missing="paper")
    channels, height, width = network.integers("input_shape", (3,))
    kappa, size = fields.integer("kappa", 1), fields.integer("size", 1)
    if kappa > size:
        raise EdgeBcsError(f"the manifest has kappa {kappa} above the network's size {size}.")
    layers = _layers(fields, size)
    statistics = [
        (item.integer("offset"), item.integer("channels", 1)) for item in fields.objects("statistics")
    ]
    dense = [
        (item.integer("offset"), math.prod(item.integers("shape", (0, 1, 2, 3, 4))))
        for item in fields.objects("dense")
    ]
    lists_length = fields.integer("lists_length", 1)
    expected = _lists_length(fields, layers, kappa)
    if lists_length != expected:
        raise EdgeBcsError(f"the manifest's lists_length is {lists_length}; its layers need {expected}.")
    hyper = fields.object("hyper")
    memory = fields.object("memory")
    memory.integer("predicted_peak_bytes", 0, 1 << 50)
    memory.optional_object("choice")
    budget = None if memory.value.get("budget") is None else memory.integer("budget", 1, 1 << 50)
    num_classes = network.integer("num_classes", 2)
    objective = _objective(fields.object("objective"))
    single_step = objective.attack.single_step
    if manifest["version"] != WIDE_ATTACK and (manifest["version"] == SINGLE_STEP) != single_step:
        raise EdgeBcsError(
            f"the manifest's format version is {manifest['version']}, and its training attack "
            f"{objective.attack.kind}."
        )
    micro_batch = fields.integer("micro_batch", 1, 1 << 16)
    return Described(
        manifest=manifest,
        input_shape=(channels, height, width),
        num_classes=num_classes,
        classes=fields.names("classes", num_classes),
        sparsity=_sparsity(fields),
        kappa=kappa,
        size=size,
        seed=fields.integer("seed", 0, 2**64 - 1),
        layers=layers,
        dense_size=_contiguous(dense, "dense"),
        statistics_size=_contiguous(statistics, "statistics"),
        trained=_trained(fields, layers, kappa),
        objective=objective,
        batch_norm=fields.text("batch_norm", ("frozen", "batch")),
        micro_batch=micro_batch,
        attack_micro_batch=_attack_micro_batch(fields, micro_batch),
        lanes=fields.integer("lanes", 1, 64),
        batch_size=fields.integer("batch_size", 1, 1 << 20),
        hyper={name: hyper.number(name) for name in ("learning_rate", "weight_decay", "momentum", "noise")},
        lists_length=lists_length,
        budget=budget,
        release=fields.integer("release", 1, LARGEST_RELEASE) if "release" in manifest else None,
        resize=_resize(network),
        attack_precision=(
            fields.text("attack_precision", PRECISIONS) if "attack_precision" in manifest else None
        ),
    )


def _attack_micro_batch(fields: Fields, micro_batch: int) -> int:
    version = fields.value["version"]
    if "attack_micro_batch" not in fields.value:
        if version == WIDE_ATTACK:
            raise EdgeBcsError(
                f"the manifest's format version is {version}, but it has no attack_micro_batch."
            )
        return micro_batch
    images = fields.integer("attack_micro_batch", 1, 1 << 16)
    if version != WIDE_ATTACK or images <= micro_batch or images % micro_batch:
        raise EdgeBcsError(
            f"the manifest's attack_micro_batch is {images}, with a micro-batch of {micro_batch} and the "
            f"format version {version}."
        )
    return images


def _resize(network: Fields) -> Resize:
    text = network.text("resize", missing=SQUASH.text)
    try:
        return Resize.parse(text)
    except EdgeBcsError as error:
        raise EdgeBcsError(f"the manifest's field network.resize cannot be right: {error}.") from None


def _sparsity(fields: Fields) -> str:
    text = fields.text("sparsity")
    try:
        exact_sparsity(text)
    except EdgeBcsError as error:
        raise EdgeBcsError(f"the manifest cannot be right: {error}.") from None
    return text


def _layers(fields: Fields, size: int) -> tuple[PrunableLayer, ...]:
    layers = []
    offset = 0
    for item in fields.objects("layers"):
        kernel = item.integers("kernel", (2,))
        layer = PrunableLayer(
            name=item.text("name"),
            shape=item.integers("shape", (2, 4)),
            offset=item.integer("offset"),
            kernel=(kernel[0], kernel[1]),
            strides=item.each("strides", 2, "stride"),
            pads=item.each("pads", 4, "padding", low=0),
            dilations=item.each("dilations", 2),
            groups=item.integer("groups", 1, 1 << 23) if "groups" in item.value else 1,
            density=item.number("density", 0.0, 1.0),
            algorithm=item.text("algorithm", ("sparse", "dense")),
        )
        if layer.offset != offset:
            raise EdgeBcsError(
                f"the manifest's layer {layer.name} starts at {layer.offset} instead of {offset}."
            )
        offset += layer.size
        layers.append(layer)
    if offset != size:
        raise EdgeBcsError(f"the manifest's layers hold {offset} positions and its size is {size}.")
    return tuple(layers)


def _lists_length(fields: Fields, layers: tuple[PrunableLayer, ...], kappa: int) -> int:
    """One entry per row and one per (input channel, phase of the strides) of every layer, each list closed by
    an end; or the latter of those layers alone through which a training's gradients go."""
    train = fields.optional_object("train")
    through, transposed = layers, kappa
    if "transposed" in train.value:
        kept = train.object("transposed")
        through = kept.chosen("layers", layers)
        transposed = kept.integer("kappa", 0, kappa)
    rows = sum(layer.shape[0] + 1 for layer in layers)
    columns = sum(layer.shape[1] * layer.groups * math.prod(layer.strides) + 1 for layer in through)
    return kappa + 2 * transposed + rows + columns


def _trained(fields: Fields, layers: tuple[PrunableLayer, ...], kappa: int) -> Trained:
    """What is trained: all of it, unless the manifest says which part."""
    dense = [
        Segment(
            str(item.value.get("name", "")), item.integers("shape", (0, 1, 2, 3, 4)), item.integer("offset")
        )
        for item in fields.objects("dense")
    ]
    version = fields.value["version"]
    if version not in (SINGLE_STEP, WIDE_ATTACK) and (version == IN_PART) != ("train" in fields.value):
        raise EdgeBcsError(
            f"the manifest's format version is {version}, and it says "
            + ("nothing " if version == IN_PART else "")
            + "of a part that is trained."
        )
    if "train" not in fields.value:
        return Trained(ALL, layers, tuple(dense), kappa)
    train = fields.object("train")
    try:
        part = Part.parse(train.text("part"))
    except EdgeBcsError as error:
        raise EdgeBcsError(f"the manifest's field train.part cannot be right: {error}.") from None
    if part.everything:
        raise EdgeBcsError("the manifest's field train.part must be a part of the network, not 'all'.")
    kernels = train.chosen("layers", layers)
    chosen = train.chosen("dense", dense)
    # As many connections as ever lie in the kernels that are trained, and the others in those that are not.
    inside = sum(kernel.size for kernel in kernels)
    outside = sum(layer.size for layer in layers) - inside
    connections = train.integer("kappa", max(0, kappa - outside), min(kappa, inside))
    if not connections and not chosen:
        raise EdgeBcsError("the manifest's field train names nothing that is trained.")
    return Trained(part, kernels, chosen, connections)


def _contiguous(entries: list[tuple[int, int]], name: str) -> int:
    end = 0
    for offset, length in entries:
        if offset != end:
            raise EdgeBcsError(f"the manifest's {name} table has a gap or overlap at {end}.")
        end += length
    if end > _MOST_NUMBERS:
        raise EdgeBcsError(f"the manifest's {name} table holds {end} numbers, which is refused.")
    return end


def _objective(fields: Fields) -> TrainedObjective:
    objective = TrainedObjective(
        kind=OBJECTIVES[fields.text("name", tuple(OBJECTIVES))],
        beta=fields.number("beta"),
        attack=Attack(
            epsilon=fields.number("epsilon", 0.0, 1.0),
            step_size=fields.number("step_size", 0.0, 1.0),
            steps=fields.integer("attack_steps", 0, MOST_ATTACK_STEPS),
            kind=fields.text("training_attack", ATTACKS, missing="pgd"),
        ),
    )
    fields.text("start", ("uniform", "gaussian"))
    fields.text("attack_loss", ("cross_entropy", "kl"))
    fields.boolean("two_branches")
    described = objective.described()
    for name in ("start", "attack_loss", "two_branches"):
        stated, follows = json.dumps(fields.value[name]), json.dumps(described[name])
        if stated != follows:
            raise EdgeBcsError(
                f"the manifest's objective {objective.name} has {name} {stated} instead of {follows}."
            )
    return objective


def listed_files(manifest: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Yield (name, bytes, sha256) of each file that a manifest lists; EdgeBcsError if a graph is not among
    them, or one does not lie in the artifact's folder."""
    listed = Fields(manifest.get("files"), "files")
    for graph in GRAPHS:
        listed.object(graph_file(graph))
    for name in listed.value:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise EdgeBcsError(
                f"the manifest names the file {name!r}, which does not lie in the artifact's folder."
            )
        entry = listed.object(name)
        most = _LARGEST_GRAPH if name.endswith(graph_file("")) or name == PROGRAM else _LARGEST_FILE
        yield name, entry.integer("bytes", 0, most), entry.text("sha256")
