"""Where every parameter of a network lies in the flat buffers (positions, dense values, statistics)."""

from __future__ import annotations

from dataclasses import dataclass

from edge_bcs.core.segments import Segment
from edge_bcs.method.sparse_model import SparseModel


@dataclass(frozen=True)
class Layout:
    """The numbering of a network; dictionaries are in the order of the buffers.

    Attributes:
        prunable: module name → its kernel's segment among the N prunable positions, row-major [out, in, kh,
            kw].
        dense: parameter name (``module.weight`` of batch norms, ``module.bias``) → segment of
            ``dense.value``.
        statistics: batch-norm module name → segment of ``batchnorm.mean`` and ``batchnorm.variance``.
    """

    prunable: dict[str, Segment]
    dense: dict[str, Segment]
    statistics: dict[str, Segment]

    @property
    def size(self) -> int:
        """N, the number of prunable weights."""
        return sum(segment.size for segment in self.prunable.values())

    @property
    def dense_size(self) -> int:
        """D, the number of all other trainable parameters."""
        return sum(segment.size for segment in self.dense.values())

    @property
    def statistics_size(self) -> int:
        """S, the number of batch-norm channels."""
        return sum(segment.size for segment in self.statistics.values())


def layout_of(sparse: SparseModel) -> Layout:
    """The numbering that ``sparse`` uses for its own buffers."""
    return Layout(
        {segment.name: segment for segment in sparse.layers},
        {segment.name: segment for segment in sparse.dense},
        {segment.name: segment for segment in sparse.statistics},
    )
