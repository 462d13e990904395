"""`from_onnx`: an ONNX file as a torch module, which every command takes like any other.

Convolutions, linear layers and norms become modules under the names of their weights, as PyTorch writes them
(``features.0.weight`` → ``features.0``), so that checkpoints and `--dense` name them; everything else is a
function between them. The module is captured like a user's own (`exporters.frontends.torch`).
"""

from __future__ import annotations

from pathlib import Path

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.text import shown

from .onnx_constants import FOLDED
from .onnx_file import read_graph
from .onnx_module import Builder, OnnxNetwork, RefusedError
from .onnx_rules import RULES


def from_onnx(path: str | Path, input_shape: tuple[int, int, int] | None = None) -> OnnxNetwork:
    """Return the network of an ONNX file with its weights, in evaluation mode.

    Args:
        path: the file (opset 11 to 21, float32); external data is read from its own folder alone.
        input_shape: (C, H, W) of the images, where the file leaves it open.

    Raises:
        EdgeBcsError: not such a file, or an operator (by name and place) that is not supported.
    """
    path = Path(path)
    graph = read_graph(path)
    if input_shape is not None and graph.shape is not None and tuple(input_shape) != graph.shape:
        raise EdgeBcsError(f"{path} is for images of the shape {list(graph.shape)}, not {list(input_shape)}")
    shape = graph.shape or input_shape
    if shape is None:
        raise EdgeBcsError(f"{path} does not say the size of its images: give the input shape, C,H,W")
    try:
        return Builder(graph, shape, RULES, FOLDED).network.eval()
    except RefusedError as error:
        raise EdgeBcsError(shown(f"{path}: {error}")) from None
