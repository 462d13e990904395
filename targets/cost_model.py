"""How long an operator takes on a machine, and which kernel a layer gets.

An operator's time is a sum: a fixed time to start it, and on several threads to share it among them; its
traffic (every tensor that it reads or writes, once); and its walks. A walk is one sparse or dense product:
for every entry of the matrix the kernel visits all tiles of the output plane, and all vectors of a tile.
Which of these decides differs from layer to layer (large planes: vectors; small planes or few images side by
side: tiles), so a walk costs

    entries · (entry + tiles · tile + vectors · vector)

in units of one vector operation at the core's peak. The update walks over each connection once: over its
value, with a random number for the noise (`rewire`), and over its place in the lists (`lists`). The constants
are a `Machine`: defaults for an instruction set (`COSTS`), or what `edge-bcs bench --calibrate` measured on
this machine and saved with `save` to `default_path()`. Nothing here imports torch or onnx, so that the
simulator runs on a board.

The file is TOML:

    format = "edge-bcs-machine"
    version = 2
    processor = "Intel(R) Xeon(R) Processor"  # for people
    isa = "avx512"            # kernels that ran: scalar, avx2, avx512 or neon
    arithmetic = [1.6e11, 1.6e11]  # float32 operations a second of each core at its peak, fastest first
    bandwidth = 1.2e10        # bytes a second between all cores and memory
    [costs]
    scaling = 0.9             # of a core, what each thread beyond the first adds
    node = 9e-6               # seconds to start an operator
    fork = 6e-6               # seconds to hand its parts to several threads and wait for the last one
    stack = 1.2               # time of one core's traffic over that at the full bandwidth: convolutions
    element = 1.5             # all other operators
    rewire = 22.0             # updating a connection, in vector operations at peak: decision, noise, merge
    lists = 14.0              # likewise: its place in the lists
    [costs.sparse]            # forward and input gradient over connections, in vector operations at peak
    entry = 5.0
    tile = 7.0
    vector = 1.7
    [costs.sparse_gradient]   # of the connections' values
    [costs.dense]             # forward and input gradient over all weights
    [costs.dense_gradient]    # (these three tables have the same three fields)

`arithmetic` and `bandwidth` need not be exact: costs are relative to them, and `fit` and `fit_threads` find
the costs from timed operators whatever the two say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically
from edge_bcs.core.metadata import parse_toml
from edge_bcs.core.text import check_text

FORMAT, VERSION = "edge-bcs-machine", 2
VECTOR = {"scalar": 1, "avx2": 8, "avx512": 16, "neon": 4}
"""Instruction set → float32 numbers in a register."""
_REGISTERS = {"scalar": 8, "avx2": 8, "avx512": 16, "neon": 16}  # that hold sums in a tile
KERNELS = ("sparse", "sparse_gradient", "dense", "dense_gradient")
WINOGRAD = "winograd"
"""The dense kernel with Winograd's products, where the graph asks for it; see `Walk.saves`."""
UPDATES = ("rewire", "lists")
"""Walks of the optimizer's graph, which cost the same for each entry."""

WINOGRAD_TIME = 0.75
"""Time with Winograd's products, over that of the dense kernel without: measured with AVX-512, 64 and 128
channels on 16² and 32² pixels."""
DENSE_THRESHOLD = 0.5
"""Density from which a dense kernel can be the faster one; the planner leaves it where it is not. With
AVX-512 and 3×3 kernels the two meet at 0.43 (64 channels on 32² pixels) to 0.52 (256 on 8²) with Winograd's
products, and between 0.5 and 0.65 without."""


MAX_LANES = 16


def lanes_of(micro_batch: int) -> int:
    """B, the largest divisor of the micro-batch that is at most 16: images that lie innermost in a stack."""
    return max(lanes for lanes in range(1, min(MAX_LANES, micro_batch) + 1) if micro_batch % lanes == 0)


def algorithm(density: float, threshold: float = DENSE_THRESHOLD) -> str:
    """ "dense" for a layer whose fraction of active connections reaches ``threshold``, else "sparse"."""
    return "dense" if density >= threshold else "sparse"


@dataclass(frozen=True)
class Walk:
    """One product of a layer's matrix with a micro-batch.

    Attributes:
        kernel: one of ``KERNELS`` or ``UPDATES``, or ``WINOGRAD``.
        entries: connections, or all weights for the dense kernels.
        rows: image rows of the output, over all batch blocks. floats: of one such row (pixels × lanes).
        run: floats that lie side by side on both ends, the row or, with a stride, the lanes of a pixel.
        lanes: images that lie side by side.
    """

    kernel: str
    entries: int
    rows: int = 1
    floats: int = 1
    run: int = 1
    lanes: int = 1

    def tile(self, isa: str) -> tuple[int, int, int]:
        """A tile of registers: image rows, vectors of each, floats of a vector."""
        length = VECTOR[isa]
        while length >= 4 and self.run % length:
            length //= 2
        length = length if length >= 4 else 1
        vectors = self.floats // length
        across = 4 if vectors >= 4 else 2 if vectors >= 2 else 1
        return min(8, _REGISTERS[isa] // across), across, length

    def costs_like(self, isa: str) -> str:
        """The kernel whose costs explain this one's, of ``KERNELS`` or ``UPDATES``.

        Where only single floats lie side by side they cost so much that what a dense kernel saves on each
        entry is lost in it: an entry costs it what it costs the sparse one.
        """
        if self.kernel.startswith("dense") and VECTOR[isa] > 1 and self.tile(isa)[2] == 1:
            return self.kernel.replace("dense", "sparse")
        return "dense" if self.kernel == WINOGRAD else self.kernel

    def saves(self, isa: str) -> bool:
        """Whether Winograd's products are used: four for six. They need 32 registers of vectors; with fewer
        the plain dense kernel runs instead."""
        return self.kernel == WINOGRAD and _REGISTERS[isa] == 16

    def tiles_and_vectors(self, isa: str) -> tuple[int, int]:
        """Tiles of registers and vectors that each entry visits."""
        down, across, length = self.tile(isa)
        vectors = self.floats // length
        return _parts(self.rows, down) * _parts(vectors, across), self.rows * vectors


def _parts(count: int, size: int) -> int:
    """Pieces of ``size``, a power of two, and of smaller powers of two that make up ``count``."""
    return count // size + (count % size).bit_count()


@dataclass(frozen=True)
class KernelCosts:
    """What a kernel takes for an entry, each tile and each vector of it, in vector operations at peak."""

    entry: float
    tile: float
    vector: float


@dataclass(frozen=True)
class Costs:
    """The constants of the model; see the module."""

    scaling: float
    node: float
    fork: float
    stack: float
    element: float
    rewire: float
    lists: float
    sparse: KernelCosts
    sparse_gradient: KernelCosts
    dense: KernelCosts
    dense_gradient: KernelCosts


COSTS: Mapping[str, Costs] = {
    # scaling, node, fork, stack, element, rewire, lists; then entry, tile and vector of each of KERNELS
    isa: Costs(*numbers, *(KernelCosts(*kernel) for kernel in kernels))
    for isa, numbers, *kernels in (
        # Fitted to 76 graphs (VGG-16, ResNet-18 and -50, WRN-28-2) on one core of a Xeon at 2.6 GHz;
        # the update's to those of three networks; what a second thread brings and costs on a Xeon (0.75) and
        # an EPYC (0.83).
        (
            "avx512", (0.8, 5.5e-6, 6e-6, 0.8, 1.3, 22.0, 14.0),
            (33.0, 28.0, 0.65), (21.0, 16.0, 2.2), (0.0, 14.0, 0.3), (0.0, 13.0, 0.45),
        ),
        (
            "avx2", (0.9, 12e-6, 12e-6, 1.2, 2.0, 25.0, 14.0),
            (5.0, 10.0, 1.8), (35.0, 4.0, 3.0), (0.0, 8.0, 1.1), (35.0, 8.0, 1.5),
        ),
        (
            "neon", (0.9, 20e-6, 20e-6, 6.0, 6.0, 45.0, 15.0),
            (6.0, 8.0, 3.3), (35.0, 4.0, 4.5), (0.0, 7.0, 2.0), (35.0, 7.0, 2.5),
        ),
        (
            "scalar", (0.9, 20e-6, 20e-6, 2.0, 3.0, 60.0, 15.0),
            (5.0, 8.0, 2.0), (35.0, 4.0, 3.0), (0.0, 8.0, 2.0), (35.0, 8.0, 3.0),
        ),
    )
}  # fmt: skip
"""Instruction set → what is assumed of a machine that was not measured."""


@dataclass(frozen=True)
class Machine:
    """What runs the operators.

    Attributes:
        isa: instruction set of the kernels.
        arithmetic: float32 operations a second of each core in use at its peak, the fastest first.
        bandwidth: bytes a second between all cores and memory.
        costs: what the kernels make of that. processor: its name, "" if it was not measured.
    """

    isa: str
    arithmetic: tuple[float, ...]
    bandwidth: float
    costs: Costs
    processor: str = ""

    @cached_property
    def cores(self) -> float:
        """How many times as fast as its first core the machine is."""
        return 1 + self.costs.scaling * sum(self.arithmetic[1:]) / self.arithmetic[0]

    def on(self, threads: int) -> Machine:
        """The machine with its fastest ``threads`` cores alone."""
        return replace(self, arithmetic=self.arithmetic[: max(1, threads)])

    def compute_seconds(self, walks: Iterable[Walk]) -> float:
        """Time that the walks of an operator take."""
        unit = 2 * VECTOR[self.isa] / (self.arithmetic[0] * self.cores)
        total = 0.0
        for walk in walks:
            cost = getattr(self.costs, walk.costs_like(self.isa))
            if walk.kernel not in UPDATES:
                tiles, vectors = walk.tiles_and_vectors(self.isa)
                cost = cost.entry + tiles * cost.tile + vectors * cost.vector
            total += walk.entries * cost * (WINOGRAD_TIME if walk.saves(self.isa) else 1)
        return unit * total

    def traffic_seconds(self, moved: int, convolution: bool) -> float:
        """Time to read and write ``moved`` bytes.

        More cores share the work, but no more than the bandwidth lets them: what one core took longer than it
        must.
        """
        one = self.costs.stack if convolution else self.costs.element
        return moved * max(one / self.cores, min(one, 1.0)) / self.bandwidth

    def seconds(self, walks: Sequence[Walk], moved: int) -> float:
        """Time of one operator."""
        start = self.costs.node + (self.costs.fork if len(self.arithmetic) > 1 else 0.0)
        return start + self.compute_seconds(walks) + self.traffic_seconds(moved, bool(walks))


TYPICAL_BOARD = Machine("neon", (1.5e9 * 8,) * 4, 4e9, COSTS["neon"])
"""Four Cortex-A72 cores at 1.5 GHz (a Raspberry Pi 4): for whom plans are made when no board is named."""


@dataclass(frozen=True)
class Sample:
    """An operator that was timed."""

    walks: tuple[Walk, ...]
    moved: int
    seconds: float


def fit(samples: Sequence[Sample], machine: Machine) -> Machine:
    """``machine`` with costs that explain ``samples``, timed on one thread: least squares, no cost negative.

    What several threads cost and bring is kept; see ``fit_threads``.

    Raises:
        EdgeBcsError: too few samples.
    """
    from scipy.optimize import nnls  # a host's package: boards read what was fitted

    columns = [*((kernel, field.name) for kernel in KERNELS for field in fields(KernelCosts))]
    names = [*columns, *UPDATES, "stack", "element", "node"]
    if len(samples) < 2 * len(names):
        raise EdgeBcsError(f"{len(samples)} timed operators are too few to calibrate by.")
    unit = 2 * VECTOR[machine.isa] / machine.arithmetic[0]
    matrix = np.zeros((len(samples), len(names)))
    for row, sample in zip(matrix, samples, strict=True):
        for walk in sample.walks:
            if walk.kernel in UPDATES:
                row[names.index(walk.kernel)] += unit * walk.entries
                continue
            tiles, vectors = walk.tiles_and_vectors(machine.isa)
            first = 3 * KERNELS.index(walk.costs_like(machine.isa))
            share = WINOGRAD_TIME if walk.saves(machine.isa) else 1
            row[first : first + 3] += unit * walk.entries * share * np.array([1, tiles, vectors])
        row[-3 if sample.walks else -2] = sample.moved / machine.bandwidth
        row[-1] = 1
    seconds = np.array([sample.seconds for sample in samples])
    weight = _weight(seconds)
    matrix *= weight[:, None]
    scale = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)  # the costs differ by orders of magnitude
    found_costs, _ = nnls(matrix / scale, seconds * weight)
    costs = dict(zip(names, (found_costs / scale).tolist(), strict=True))
    found: dict[str, Any] = {
        kernel: KernelCosts(*(costs[kernel, field.name] for field in fields(KernelCosts)))
        for kernel in KERNELS
    }
    found |= {name: costs[name] for name in (*UPDATES, "stack", "element", "node")}
    return replace(machine, costs=replace(machine.costs, **found))


def fit_threads(samples: Sequence[Sample], machine: Machine) -> Machine:
    """``machine`` with the ``scaling`` and ``fork`` that explain ``samples``, timed on all its threads.

    Args:
        samples: operators of several networks: how much a further core brings differs from one to another.
        machine: several cores, and the costs of one of them (``fit``).
    """
    seconds = np.array([sample.seconds for sample in samples])
    weight = _weight(seconds) ** 2
    best, least = machine, float("inf")
    for scaling in np.linspace(0.02, 1.0, 99):
        tried = replace(machine, costs=replace(machine.costs, scaling=float(scaling), fork=0.0))
        missing = seconds - [tried.seconds(sample.walks, sample.moved) for sample in samples]
        fork = max(0.0, float(np.average(missing, weights=weight)))
        error = float(weight @ (missing - fork) ** 2)
        if error < least:
            best, least = replace(tried, costs=replace(tried.costs, fork=fork)), error
    return best


def _weight(seconds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each error, between absolute and relative ones: the sum over all operators is asked for."""
    weight: np.ndarray[Any, Any] = np.maximum(seconds, 1e-6) ** -0.7
    return weight


def default_path() -> Path:
    """This machine's calibration: machine.toml in EDGE_BCS_CONFIG, else in the user's config folder."""
    folder = os.environ.get("EDGE_BCS_CONFIG")
    if folder:
        return Path(folder) / "machine.toml"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "edge-bcs" / "machine.toml"


def save(machine: Machine, path: Path | None = None) -> Path:
    """Write ``machine`` to ``path`` (default: ``default_path()``) and return where it went."""
    path = path or default_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    costs = asdict(machine.costs)
    processor = machine.processor.replace("\\", "/").replace('"', "'")
    lines = [
        f'format = "{FORMAT}"',
        f"version = {VERSION}",
        f'processor = "{processor}"',
        f'isa = "{machine.isa}"',
        f"arithmetic = {[float(f'{rate:.6g}') for rate in machine.arithmetic]}",
        f"bandwidth = {machine.bandwidth:.6e}",
        "[costs]",
        *(f"{name} = {value:.6e}" for name, value in costs.items() if name not in KERNELS),
    ]
    for kernel in KERNELS:
        lines += [f"[costs.{kernel}]", *(f"{name} = {value:.6e}" for name, value in costs[kernel].items())]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def load(path: Path | None = None) -> Machine | None:
    """Read what ``save`` wrote; None if there is no file.

    Args:
        path: default: ``default_path()``.

    Raises:
        EdgeBcsError: a file that is none of ours; the message names the field.
    """
    path = path or default_path()
    try:
        document = parse_toml(read_small(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _bad(path, f"cannot be read: {error}") from None
    check_text(document, f"The calibration {path}")
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise _bad(path, f'has not `format = "{FORMAT}"` and `version = {VERSION}`')
    isa = document.get("isa")
    if isa not in VECTOR:
        raise _bad(path, f"has an `isa` that is none of {', '.join(VECTOR)}")
    arithmetic = document.get("arithmetic")
    if not isinstance(arithmetic, list) or not arithmetic or not all(_positive(rate) for rate in arithmetic):
        raise _bad(path, "has an `arithmetic` that is no list of positive numbers")
    bandwidth: Any = document.get("bandwidth")
    if not _positive(bandwidth):
        raise _bad(path, "has a `bandwidth` that is no positive number")
    table = _table(path, document, "costs")
    costs: dict[str, Any] = _numbers(path, {k: v for k, v in table.items() if k not in KERNELS}, Costs)
    for name in KERNELS:
        costs[name] = KernelCosts(**_numbers(path, _table(path, table, name), KernelCosts))
    rates = tuple(sorted(map(float, arithmetic), reverse=True))
    return Machine(isa, rates, bandwidth, Costs(**costs), str(document.get("processor", "")))


def _positive(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < float("inf")


def _table(path: Path, document: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = document.get(name)
    if not isinstance(table, dict):
        raise _bad(path, f"has no table `{name}`")
    return table


def _numbers(path: Path, table: Mapping[str, Any], kind: type) -> dict[str, float]:
    """The fields of ``kind`` that are numbers, from ``table``."""
    wanted = {field.name for field in fields(kind)} - set(KERNELS)
    for name in sorted(wanted ^ table.keys()):
        raise _bad(path, f"{'lacks' if name in wanted else 'has an unknown'} `{name}`")
    for name, value in table.items():
        if value != 0 and not _positive(value):
            raise _bad(path, f"has a `{name}` that is no number of at least 0")
    return {name: float(value) for name, value in table.items()}


def _bad(path: Path, what: str) -> EdgeBcsError:
    return EdgeBcsError(f"The calibration {path} {what}; write it anew with `edge-bcs bench --calibrate`.")
