"""The least time of an operator on a machine: arithmetic, loads or traffic, whichever is the largest.

A dense product meets each number that it loads several times while it is in a register, so its arithmetic
or its traffic decides. A sparse one does not: a weight meets every vector of its input plane once, and where
one weight in a hundred is left, the next weight that meets the same vector comes long after the first-level
cache has lost it. So each multiply-add of a vector needs a load of that vector from wherever the input
around a tile lies, which for a layer's planes together is tens to hundreds of kilobytes: `Roof.loads` says
how fast that is. `least` takes the largest of the three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_bcs.bench.machine import Roof
from edge_bcs.targets.cost_model import WINOGRAD, Walk

if TYPE_CHECKING:
    from edge_bcs.runtime.artifact import Artifact

MAX_PARTS = 16
"""Parts into which the kernels cut a layer's input planes, at most."""
DENSE_LOADS = {
    "avx512": {"dense": 1 / 6, "winograd": 18 / 36, "dense_gradient": (4 + 6) / (4 * 6)},
    "neon": {"dense": 1 / 6, "winograd": 18 / 36, "dense_gradient": (4 + 6) / (4 * 6)},
    "avx2": {"dense": 1 / 6, "dense_gradient": (3 + 4) / (3 * 4)},
    "scalar": {"dense": 1.0, "dense_gradient": 1.0},
}
"""Instruction set → dense kernel → vector loads for each multiply-add of a vector, by what it holds in
registers: a pixel meets six output planes; rows of dy meet columns of the input. With Winograd's products
three planes, four pixels and three positions meet: twelve weights and six pixels for 36 multiply-adds, of
which 24 are left."""
WINOGRAD_MULTIPLICATIONS = 24 / 36


class Product(NamedTuple):
    """A product of a layer's matrix with a batch, and the planes that it reads.

    Attributes:
        walk: kernel, entries, output rows and floats, and images side by side.
        planes: input planes, among which a row's entries choose; height, width: theirs, in pixels.
        rows: rows of the matrix, the output planes. out_height: their height.
        reach, step: input pixels along a side that the kernel's positions span, and from one output pixel to
            the next.
    """

    walk: Walk
    planes: int
    height: int
    width: int
    rows: int
    out_height: int
    reach: int
    step: int

    def tile_bytes(self, isa: str) -> int:
        """Bytes of one input plane around a tile of the output; a tile may reach over several images."""
        down, across, length = self.walk.tile(isa)
        down = min(down, self.walk.rows)
        images = -(-down // self.out_height)
        pixels = max(1, across * length // self.walk.lanes)
        high = min(self.height, (min(down, self.out_height) - 1) * self.step + self.reach)
        wide = min(self.width, (pixels - 1) * self.step + self.reach)
        return images * high * wide * self.walk.lanes * 4


@dataclass(frozen=True)
class Least:
    """Least seconds of an operator, each by one thing that it must do, with all cores at once."""

    arithmetic: float
    loads: float
    traffic: float

    @property
    def binds(self) -> str:
        """What takes longest: "arithmetic", "loads" or "traffic"."""
        return max(("arithmetic", "loads", "traffic"), key=lambda name: float(getattr(self, name)))

    @property
    def seconds(self) -> float:
        """The roofline."""
        return max(self.arithmetic, self.loads, self.traffic)

    @property
    def in_cache(self) -> float:
        """The roofline if no tensor left the caches between two operators: without the traffic."""
        return max(self.arithmetic, self.loads)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        seconds = {name: getattr(self, name) for name in ("arithmetic", "loads", "traffic")}
        return seconds | {"binds": self.binds, "seconds": self.seconds, "in_cache_seconds": self.in_cache}


def least(products: Sequence[Product], flops: float, moved: float, roof: Roof) -> Least:
    """The least time of an operator.

    Args:
        products: what it multiplies; none for an operator that works element by element, which loads each
            vector of its tensors once, at best from the first-level cache.
        flops: float32 operations, those that Winograd's products save included.
        moved: bytes of its tensors, each once, all of which it may find in the nearest cache that holds them.
    """
    if products:
        loads = sum(load_seconds(product, roof) for product in products)
    else:
        loads = moved / (4 * roof.vector) / roof.loads(0)
    saved = sum(2 * p.walk.entries * p.walk.rows * p.walk.floats for p in products if p.walk.saves(roof.isa))
    flops -= (1 - WINOGRAD_MULTIPLICATIONS) * saved
    return Least(flops / roof.arithmetic, loads, moved / roof.bandwidth(moved / roof.threads))


def load_seconds(product: Product, roof: Roof) -> float:
    """The least time in which a product's vectors are loaded.

    Sparse kernels load one vector for each multiply-add of a vector, and each vector of the result, too: a
    cache fetches a line before it is written, by the way on which the input comes (the weight gradient loads
    dy instead). They may cut the input planes into parts so small that a nearer cache holds what is around a
    tile; then the sums of a tile (forward and input gradient: read and written; weight gradient: the tile of
    dy, read) pass the registers once more for each further part and row. The fastest number of parts counts.
    Dense kernels load from the first-level cache, as often as their blocks of registers make them.
    """
    walk = product.walk
    _, vectors = walk.tiles_and_vectors(roof.isa)
    multiply_adds = walk.entries * vectors
    kernel = "dense" if walk.kernel == WINOGRAD and not walk.saves(roof.isa) else walk.kernel
    if kernel in DENSE_LOADS[roof.isa]:
        return multiply_adds * DENSE_LOADS[roof.isa][kernel] / roof.loads(0)
    down, across, length = walk.tile(roof.isa)
    around = product.planes * product.tile_bytes(roof.isa)
    once = product.rows * vectors
    again = once if walk.kernel == "sparse_gradient" else 2 * once
    result_rate = roof.loads(product.rows * down * across * length * 4)
    return min(
        multiply_adds / roof.loads(around / parts) + (once + (parts - 1) * again) / result_rate
        for parts in range(1, min(MAX_PARTS, product.planes) + 1)
    )


def products(operator: str, attributes: Mapping[str, Any], walks: Iterable[Walk]) -> list[Product]:
    """What an operator of a graph multiplies.

    Args:
        operator: its type, that of a convolution or of its gradients; another one multiplies nothing.
        attributes: of its node. walks: of `exporters.operators.Operator.walks`.
    """
    if "Conv" not in operator:
        return []
    a = attributes
    found = []
    for walk in walks:
        # The gradient of the input reads dy, for each phase of the stride the positions that reach it.
        backward = operator.endswith("Grad") and not walk.kernel.endswith("_gradient")
        source, target = ("out", "in") if backward else ("in", "out")
        found.append(
            Product(
                walk,
                planes=a[f"{source}_channels"],
                height=a[f"{source}_height"],
                width=a[f"{source}_width"],
                rows=a[f"{target}_channels"],
                out_height=a["out_height"],
                reach=-(-a["kernel"][0] // a["strides"][0]) if backward else a["kernel"][0],
                step=1 if backward else a["strides"][0],
            )
        )
    return found


def graph_rooflines(artifact: Artifact, graph: str, roof: Roof) -> list[tuple[str, Least]]:
    """Type and least time of every operator in one run of a graph ("training", "attack", "optimizer")."""
    import onnx

    planned = artifact.manifest["memory"]["phases"][graph]
    flops, moved, walks = (
        dict(zip(planned["nodes"], planned[what], strict=True)) for what in ("flops", "bytes", "walks")
    )
    found = []
    for node in onnx.load_model_from_string(artifact.read_graph(graph)).graph.node:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        multiplied = products(node.op_type, attributes, (Walk(*walk) for walk in walks[node.name]))
        found.append((node.op_type, least(multiplied, flops[node.name], moved[node.name], roof)))
    return found


def sums(rooflines: Iterable[tuple[str, Least]]) -> dict[str, dict[str, float]]:
    """Operator type → what its operators take at least, one after another.

    Each entry has the sums of "arithmetic", "loads", "traffic", of "seconds" (each operator's largest of the
    three) and of "in_cache_seconds" (of the first two).
    """
    found: dict[str, dict[str, float]] = {}
    for kind, roofline in rooflines:
        total = found.setdefault(kind, {})
        for name, value in roofline.as_dict().items():
            if name != "binds":
                total[name] = total.get(name, 0.0) + value
    return found
