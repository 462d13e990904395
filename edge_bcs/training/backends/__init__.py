"""The ways of doing the same training step."""

from edge_bcs.training.backends.torch import Batch, Numbers, SparseEngine, TorchEngine, open_engine

__all__ = ["Batch", "Numbers", "SparseEngine", "TorchEngine", "open_engine"]
