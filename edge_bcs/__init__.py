"""edge-bcs: adversarially robust, globally sparse networks that keep training on low-power boards.

The method is Bayesian Connectivity Sampling (Özdenizci & Legenstein, ICML 2021): a fixed number κ of
connections for the whole network, rewired while it learns. Importing this package imports neither torch nor
onnx nor onnxruntime; each name below is loaded when it is first used, so that the command line starts on a
board.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # `typing` alone would take as long to import as all of this
if TYPE_CHECKING:
    from typing import Any

    from edge_bcs import data, fleet, models, runtime, targets
    from edge_bcs.core.errors import EdgeBcsError
    from edge_bcs.core.normalization import Normalization
    from edge_bcs.core.settings import Attack, Hyper, Schedule, Unlabelled
    from edge_bcs.exporters import export
    from edge_bcs.exporters.settings import Memory, Publishing
    from edge_bcs.loading import load, pretrained
    from edge_bcs.method.connectivity import SparseModel, sparsify
    from edge_bcs.method.distillation import Teacher
    from edge_bcs.training.loop import train
    from edge_bcs.training.settings import Compute, Feed, Gradual, Growth, Method, Output

__version__ = "0.2.0.dev0"

# From 1.29 on onnxruntime writes a device id below ~/.cache and reports its use to its maker. It looks at
# this variable once, when it is loaded; disable_telemetry_events() comes too late. Every module of ours is
# imported after this one, and onnxruntime after that; child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# In a source checkout the rooms `exporters`, `runtime` and `targets` lie beside this package; a wheel carries
# them inside it. Looking in both places makes `edge_bcs.runtime` mean the same thing in either.
_checkout = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.isfile(os.path.join(_checkout, "pyproject.toml")) and os.path.isdir(
    os.path.join(_checkout, "runtime", "native")
):
    __path__.append(_checkout)

_LAZY = {
    "data": "edge_bcs.data",
    "fleet": "edge_bcs.fleet",
    "models": "edge_bcs.models",
    "runtime": "edge_bcs.runtime",
    "targets": "edge_bcs.targets",
    "sparsify": "edge_bcs.method.connectivity:sparsify",
    "SparseModel": "edge_bcs.method.connectivity:SparseModel",
    "Teacher": "edge_bcs.method.distillation:Teacher",
    "train": "edge_bcs.training.loop:train",
    "export": "edge_bcs.exporters:export",
    "load": "edge_bcs.loading:load",
    "pretrained": "edge_bcs.loading:pretrained",
    "Attack": "edge_bcs.core.settings:Attack",
    "Hyper": "edge_bcs.core.settings:Hyper",
    "Schedule": "edge_bcs.core.settings:Schedule",
    "Unlabelled": "edge_bcs.core.settings:Unlabelled",
    "Memory": "edge_bcs.exporters.settings:Memory",
    "Publishing": "edge_bcs.exporters.settings:Publishing",
    "Compute": "edge_bcs.training.settings:Compute",
    "Feed": "edge_bcs.training.settings:Feed",
    "Gradual": "edge_bcs.training.settings:Gradual",
    "Growth": "edge_bcs.training.settings:Growth",
    "Method": "edge_bcs.training.settings:Method",
    "Output": "edge_bcs.training.settings:Output",
    "EdgeBcsError": "edge_bcs.core.errors:EdgeBcsError",
    "Normalization": "edge_bcs.core.normalization:Normalization",
}

__all__ = [
    "Attack",
    "Compute",
    "EdgeBcsError",
    "Feed",
    "Gradual",
    "Growth",
    "Hyper",
    "Memory",
    "Method",
    "Normalization",
    "Output",
    "Publishing",
    "Schedule",
    "SparseModel",
    "Teacher",
    "Unlabelled",
    "__version__",
    "data",
    "export",
    "fleet",
    "load",
    "models",
    "pretrained",
    "runtime",
    "sparsify",
    "targets",
    "train",
]


def __getattr__(name: str) -> Any:
    target = _LAZY.get(name)
    if target is None:
        raise AttributeError(f"module 'edge_bcs' has no attribute {name!r}")
    import importlib

    module_name, _, attribute = target.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def __dir__() -> list[str]:
    return sorted(__all__)
