"""Our gradient rules in the terms of ONNX Runtime's own gradient builder (training builds, 1.19.2).

`register_gradients` gives the builder a definition for every differentiable operator of the domain, so that
it differentiates a forward graph that it was given: a second differentiator, which shares the kernels with
ours and nothing else. Where ours threads one accumulator through all layers, masks and adds inside the
operators and chooses halos for gradients, the builder's graph starts every accumulator at zero, sums over
uses with ONNX operators, and keeps the gradient of a tensor in that tensor's own halo.

A definition is fixed for an operator type and cannot take attributes from the node that is differentiated, so
`complete` writes them into the finished graph, finding the forward node by the name that the builder gave the
gradient node ("NODE_Grad/TYPE_3"). `generate_artifacts` does all of this for a user who wants ORT's own loop
(a standard loss, AdamW or SGD on the values of the connections; the connections then stay what they are).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from edge_bcs.runtime import library
from onnx import helper, numpy_helper

from edge_bcs.errors import EdgeBcsError
from edge_bcs.sparse_model import SparseModel

from .forward import Branch, FoldedAffine
from .fusion import fuse
from .graphs import TWO_BRANCHES, lanes_of
from .network import Network, network_of
from .nodes import DOMAIN, Graph, Node, TensorType
from .operators import gradient_halo
from .ort_checkpoint import TRAINABLE

FROZEN = ("batchnorm.mean", "batchnorm.variance", "coo.lists")
_LOSSES = {"trades": "Trades", "rst": "Trades", "mart": "Mart"}

# Operator → nodes of its gradient: (type, inputs, outputs). GO(i): gradient of output i, I(i): input i, O(i):
# output i, GI(i): gradient of input i. A leading "onnx:" marks an operator of ONNX itself. The builder keeps
# the output at position j only if input j needs a gradient, whatever the output's name is: so a definition
# has no intermediate tensors (`complete` adds them), and an accumulator's place is held by the tensor of its
# shape.
_DEFINITIONS: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "FoldAffine": [("FoldAffineGrad", ["GO(0)", "I(0)", "I(1)", "I(2)", "I(0)"], ["GI(0)"])],
    "Conv": [
        (
            "ConvGrad",
            ["GO(0)", "I(0)", "I(1)", "I(2)", "", "", "I(1)", "I(2)", "I(4)"],
            ["GI(0)", "GI(1)", "GI(2)"],
        )
    ],
    "MaxPool": [("MaxPoolGrad", ["GO(0)", "O(1)"], ["GI(0)"])],
    "AveragePool": [("AveragePoolGrad", ["GO(0)", "", ""], ["GI(0)"])],
    "Affine": [("AffineGrad", ["GO(0)", "I(0)", "I(1)", "", "", "I(1)"], ["GI(0)", "GI(1)"])],
    "Add": [("MaskedAdd", ["GO(0)", "", "O(0)"], [f"GI({i})"]) for i in (0, 1)],
    "BatchNorm": [
        (
            "BatchNormGrad",
            ["GO(0)", "I(0)", "I(1)", "O(1)", "I(2)", "", "", "I(1)"],
            ["GI(0)", "GI(1)"],
        )
    ],
    "CrossEntropy": [("onnx:Mul", ["GO(0)", "O(1)"], ["GI(0)"])],
    "Trades": [("onnx:Mul", ["GO(0)", f"O({i + 1})"], [f"GI({i})"]) for i in (0, 1)],
    "Mart": [("onnx:Mul", ["GO(0)", f"O({i + 1})"], [f"GI({i})"]) for i in (0, 1)],
    "UnpackOutput": [
        ("onnx:Constant", [], ["axes"]),
        ("onnx:Unsqueeze", ["GO(0)", "axes"], ["image"]),
        ("PackInput", ["image"], ["GI(0)"]),
    ],
}
# Gradient operator → position of the accumulators that begin at zero.
_ACCUMULATORS = {"FoldAffineGrad": (4,), "ConvGrad": (6, 7), "AffineGrad": (5,), "BatchNormGrad": (7,)}


def register_gradients() -> None:
    """Give ORT's gradient builder a definition of every differentiable operator; harmless when repeated.

    Raises:
        EdgeBcsError: this onnxruntime is not a training build.
    """
    try:
        from onnxruntime.capi._pybind_state import (
            GradientNodeAttributeDefinition,
            GradientNodeDefinition,
            register_gradient_definition,
        )
    except ImportError:
        raise EdgeBcsError(
            "ONNX Runtime's gradient builder needs a training build: install 'edge-bcs[ort-training]' in an "
            "environment of its own."
        ) from None
    for operator, nodes in _DEFINITIONS.items():
        definitions = []
        for kind, inputs, outputs in nodes:
            made = GradientNodeDefinition()
            made.domain = "" if kind.startswith("onnx:") else DOMAIN
            made.op_type = kind.removeprefix("onnx:")
            made.inputs, made.outputs, made.attributes = inputs, outputs, []
            if made.op_type == "Constant":  # the axes that make images of logits
                axes = GradientNodeAttributeDefinition()
                axes.name, axes.value_json, axes.dtype, axes.is_tensor = "value", "[2, 3]", "int", True
                made.attributes = [axes]
            definitions.append(made)
        register_gradient_definition(f"{DOMAIN}::{operator}", definitions)


# The forward graphs


def loss_graph(network: Network, micro_batch: int, objective: str, beta: float = 0.0) -> Graph:
    """The loss of a micro-batch, not differentiated: what `graphs.training_graph` begins with.

    Inputs and outputs are those of the training graph without its gradient buffers.
    """
    images = TensorType("f32", (micro_batch, *network.image))
    branches = ("input", "adversarial") if objective in TWO_BRANCHES else ("input",)
    graph = Graph("forward_model", dict.fromkeys(branches, images))
    graph.inputs["labels"] = TensorType("i64", (micro_batch,))
    graph.inputs["sample_weight"] = TensorType("f32", (micro_batch,))
    statistics = ["batchnorm.mean", "batchnorm.variance"]
    logits = _branches(graph, network, micro_batch, branches, network.batch_statistics, statistics)
    gradients = [f"{name}.gradient" for name in logits]
    attributes = {"beta": float(beta)} if len(branches) == 2 else {}
    operator = _LOSSES.get(objective, "CrossEntropy")
    inputs = [*logits, "labels", "sample_weight"]
    graph.emit(operator, inputs, ["loss", *gradients, "correct"], **attributes)
    graph.outputs["loss"] = TensorType("f32", ())
    graph.resolve()
    _separate(graph)
    return graph


def logits_graph(network: Network, micro_batch: int) -> Graph:
    """The logits f32 [n, K] of a micro-batch with running statistics, ready to be differentiated."""
    graph = Graph("forward_model", {"input": TensorType("f32", (micro_batch, *network.image))})
    (logits,) = _branches(graph, network, micro_batch, ("input",), False, None)
    graph.emit("UnpackOutput", [logits], ["logits"], lanes=lanes_of(micro_batch))
    graph.outputs["logits"] = TensorType("f32", (micro_batch, network.classes))
    graph.resolve()
    _separate(graph)
    return graph


def _branches(
    graph: Graph,
    network: Network,
    micro_batch: int,
    images: tuple[str, ...],
    batch_statistics: bool,
    statistics: list[str] | None,
) -> list[str]:
    """Emit one pass for each input; returns the tensors of logits."""
    layers = fuse(network.graph, batch_statistics)
    vector = TensorType("f32", (network.layout.statistics_size,))
    graph.inputs |= {
        "coo.value": TensorType("f32", (network.kappa,)),
        "dense.value": TensorType("f32", (network.layout.dense_size,)),
        "batchnorm.mean": vector,
        "batchnorm.variance": vector,
        "coo.lists": TensorType("i32", (network.lists.length,)),
    }
    affine = FoldedAffine(graph, network, layers)
    lanes = lanes_of(micro_batch)
    return [
        Branch(graph, network, layers, lanes, image, affine, f"{image}.", statistics).logits
        for image in images
    ]


def _separate(graph: Graph) -> None:
    """What the builder needs: choices of pools and statistics as outputs, residuals as additions of their
    own, and in an addition the input that needs a gradient first.
    """
    nodes: list[Node] = []
    learned: set[str] = set()
    for node in graph.nodes:
        y, a = node.outputs[0], node.attributes
        nodes.append(node)
        position = {"Conv": 3, "BatchNorm": 5}.get(node.operator)
        if node.operator == "BatchNorm":
            node.outputs[1] = f"{y}.saved"
        if node.operator == "MaxPool":
            node.outputs[1] = f"{y}.choice"
        elif position is not None and node.inputs[position]:
            nodes.append(_addition(node, position))
        elif node.operator == "Add" and node.inputs[0] not in learned:
            node.inputs.reverse()
            a["a_halo"], a["b_halo"] = a["b_halo"], a["a_halo"]
        if node.operator in ("Conv", "Affine", "BatchNorm") or not learned.isdisjoint(node.inputs):
            learned.update((y, node.outputs[0]))
    graph.nodes = nodes


def _addition(node: Node, position: int) -> Node:
    """Take the residual at input ``position`` and the ReLU from ``node`` and return the addition that does
    them.
    """
    a, y = node.attributes, node.outputs[0]
    prefix = "out_" if node.operator == "Conv" else ""
    addition = {key: a[f"{prefix}{key}"] for key in ("channels", "height", "width")}
    addition |= {key: a[key] for key in ("lanes", "relu", "out_halo")}
    addition |= {"a_halo": a["out_halo"], "b_halo": a.get("residual_halo", a["out_halo"])}
    residual, node.inputs[position], node.outputs[0] = node.inputs[position], "", f"{y}.before"
    a["relu"] = 0
    if "residual_halo" in a:
        a["residual_halo"] = 0
    return Node("Add", [node.outputs[0], residual], [y, ""], addition, f"{node.name}.Add")


# The gradient graph


def gradient_model(forward: onnx.ModelProto, loss: str = "loss") -> onnx.ModelProto:
    """The forward graph with the nodes that ORT's gradient builder adds for the trainable buffers.

    Its outputs are those of ``forward`` and `coo.value_grad`, `dense.value_grad`.
    """
    import onnxruntime
    from onnxruntime.capi._pybind_state import GradientGraphBuilder

    register_gradients()
    options = onnxruntime.SessionOptions()
    library.register(options)
    read = {name for node in forward.graph.node for name in node.input}
    wanted = {name for name in TRAINABLE if name in read}
    seed = f"{loss}_grad"
    builder = GradientGraphBuilder(forward.SerializeToString(), {loss}, wanted, loss, options)
    builder.build()
    model = onnx.load_from_string(builder.get_model())
    held = {item.name for item in model.graph.initializer} | {item.name for item in model.graph.input}
    if seed not in held:
        raise AssertionError(f"the gradient builder left {seed} undefined")
    complete(model)
    return model


def complete(model: onnx.ModelProto) -> None:
    """Write attributes, masks and accumulators into the gradient nodes that ORT's builder made, in place."""
    forward = {node.name: node for node in model.graph.node if node.domain == DOMAIN}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        name, mark, _ = node.name.partition("_Grad/")
        if node.domain == DOMAIN and mark and name in forward and len(node.attribute) == 0:
            nodes += _completed(node, forward[name])
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _completed(node: onnx.NodeProto, forward: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Complete one gradient node; returns the nodes that go before it."""
    source = {item.name: helper.get_attribute_value(item) for item in forward.attribute}
    attributes: dict[str, Any] = {**source, "mask_kind": 0, "mask_halo": 0}
    before: list[onnx.NodeProto] = []
    if node.op_type == "MaskedAdd":  # of an addition; the builder counts the nodes of a definition from 0
        halo = source["a_halo"] if node.name.endswith("_0") else source["b_halo"]
        attributes = _masking(source, "", halo)
        if not source["relu"]:
            del node.input[1:]
    elif node.op_type == "PackInput":
        attributes = {"lanes": source["lanes"], "halo": 0}
    elif node.op_type in ("MaxPoolGrad", "FoldAffineGrad"):
        attributes = source
    elif node.op_type in ("ConvGrad", "AffineGrad", "BatchNormGrad"):
        convolution = node.op_type == "ConvGrad"
        halo = max(gradient_halo(source), 0) if convolution else source["out_halo"]
        attributes |= {"relu": 0, "dy_halo": halo, "dx_halo": source["in_halo"]}
        if source["relu"] or halo != source["out_halo"]:
            masked = f"{node.name}.dy"
            inputs = [node.input[0], "", forward.output[0]] if source["relu"] else [node.input[0]]
            masking = _masking(source, "out_" if convolution else "", halo)
            before.append(helper.make_node("MaskedAdd", inputs, [masked], masked, domain=DOMAIN, **masking))
            node.input[0] = masked
        if not (node.output[0] or convolution):
            node.output[0] = f"{node.name}.unused"  # nobody wants it, but the operator gives it
    for position in _ACCUMULATORS.get(node.op_type, ()):
        if node.input[position]:
            start = f"{node.name}.start_{position}"
            inputs = [node.input[position]]
            before.append(helper.make_node("ZeroAffine", inputs, [start], start, domain=DOMAIN))
            node.input[position] = start
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return before


def _masking(source: dict[str, Any], prefix: str, halo: int) -> dict[str, Any]:
    """Attributes of the MaskedAdd that rectifies a gradient as the forward node did and gives it a halo."""
    rectified = int(source["relu"])
    return {
        **{key: source[f"{prefix}{key}"] for key in ("channels", "height", "width")},
        "lanes": source["lanes"],
        "a_halo": source["out_halo"],
        "b_halo": 0,
        "out_halo": halo,
        "mask_kind": rectified,
        "mask_halo": source["out_halo"] * rectified,
    }


# ORT's own loop


def forward_model(
    sparse: SparseModel, input_shape: tuple[int, int, int], micro_batch: int
) -> onnx.ModelProto:
    """The network as ORT's tools expect one: input `input`, output `logits`, its buffers as initializers."""
    network = network_of(sparse, input_shape)
    model = logits_graph(network, micro_batch).to_onnx()
    state = sparse.state()
    held = {**state, "coo.lists": _lists(state["coo.index"], network)}
    inputs = [item for item in model.graph.input if item.name not in held]
    names = [item.name for item in model.graph.input if item.name in held]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(numpy_helper.from_array(held[name], name) for name in names)
    return model


def _lists(index: np.ndarray[Any, Any], network: Network) -> np.ndarray[Any, Any]:
    """coo.lists i32[M], as the operator BuildLists makes them."""
    import onnxruntime

    from .graphs import lists_graph

    options = onnxruntime.SessionOptions()
    library.register(options)
    session = onnxruntime.InferenceSession(
        lists_graph(network).to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    lists = np.zeros(network.lists.length, np.int32)
    result: np.ndarray[Any, Any] = session.run(None, {"coo.index": index, "coo.lists": lists})[0]
    return result


def generate_artifacts(
    sparse: SparseModel,
    directory: str | Path,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    micro_batch: int = 16,
    loss: Any = None,
    optimizer: Any = None,
) -> None:
    """`onnxruntime.training.artifacts.generate_artifacts` for a sparse network, its gradients completed.

    Writes training_model.onnx, eval_model.onnx, optimizer_model.onnx and checkpoint. Batch norm is frozen;
    the connections stay where they are, and the optimizer may carry a value through zero.

    Args:
        sparse: the network.
        directory: where; made if it is missing.
        input_shape: (channels, height, width) of the images.
        micro_batch: images per call of `Module`.
        loss: a LossType or onnxblock.Block; default: CrossEntropyLoss.
        optimizer: an OptimType or onnxblock.Block; default: AdamW.
    """
    register_gradients()
    from onnxruntime.training import artifacts

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    model = forward_model(sparse, input_shape, micro_batch)
    held = {item.name for item in model.graph.initializer}
    artifacts.generate_artifacts(
        model,
        requires_grad=[name for name in TRAINABLE if name in held],
        frozen_params=[name for name in FROZEN if name in held],
        loss=artifacts.LossType.CrossEntropyLoss if loss is None else loss,
        optimizer=artifacts.OptimType.AdamW if optimizer is None else optimizer,
        artifact_directory=folder,
        custom_op_library=library.library_path(),
    )
    for file in sorted(folder.glob("*_model.onnx")):
        written = onnx.load(file)
        # The tools write the newest version that the onnx package knows, which this onnxruntime refuses.
        written.ir_version = min(written.ir_version, model.ir_version)
        complete(written)
        onnx.save(written, file)
