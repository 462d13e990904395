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
from edge_bcs.runtime.archive import is_artifact
from edge_bcs.targets.cost_model import lanes_of
from onnx import helper, numpy_helper

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import Objective
from edge_bcs.method.sparse_model import SparseModel

from ..activations import applied, of_activation, unactivated
from ..forward import Lowering
from ..graphs import (
    empty_graph,
    evaluation_graph,
    forward_and_loss,
    images_of,
    lists_graph,
)
from ..network import Network, network_of
from ..nodes import DOMAIN, Graph, Node
from ..operators import OPERATORS
from ..operators.base import Operator, map_of
from ..operators.elementwise import MaskedAdd
from ..operators.folding import ZeroAffine
from .checkpoint import TRAINABLE

FROZEN = ("batchnorm.mean", "batchnorm.variance", "coo.lists")


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
    for operator, rule in OPERATORS.items():
        definitions = []
        for node in rule.ort_gradient:
            made = GradientNodeDefinition()
            made.domain = "" if node.operator.startswith("onnx:") else DOMAIN
            made.op_type = node.operator.removeprefix("onnx:")
            made.inputs, made.outputs, made.attributes = list(node.inputs), list(node.outputs), []
            if node.axes:
                axes = GradientNodeAttributeDefinition()
                axes.name, axes.value_json, axes.dtype = "value", str([*node.axes]), "int"
                axes.is_tensor = True
                made.attributes = [axes]
            definitions.append(made)
        if definitions:
            register_gradient_definition(f"{DOMAIN}::{operator}", definitions)


# The forward graphs


def loss_graph(network: Network, micro_batch: int, objective: Objective, beta: float = 0.0) -> Graph:
    """The loss of a micro-batch, not differentiated: what `graphs.training_graph` begins with.

    Inputs and outputs are those of the training graph without its gradient buffers.
    """
    read = (*images_of(objective.two_branches), "labels", "sample_weight", *network.training.parameters)
    graph = empty_graph("forward_model", network, read, ["loss"], micro_batch, objective.two_branches)
    lowering = Lowering(graph, network, network.training, lanes_of(micro_batch))
    forward_and_loss(lowering, objective.loss, objective.two_branches, beta)
    graph.resolve()
    _separate(graph)
    return graph


def logits_graph(network: Network, micro_batch: int) -> Graph:
    """The logits f32 [n, K] of a micro-batch with running statistics, ready to be differentiated."""
    graph = evaluation_graph(network, micro_batch)
    graph.name = "forward_model"
    _separate(graph)
    return graph


def _separate(graph: Graph) -> None:
    """What the builder needs: choices of pools and statistics as outputs, residuals as additions of their
    own, and in an addition the input that needs a gradient first.
    """
    nodes: list[Node] = []
    learned: set[str] = set()
    for node in graph.nodes:
        y, a, rule = node.outputs[0], node.attributes, OPERATORS[node.operator]
        nodes.append(node)
        for position, port in enumerate(rule.outputs):
            if port.for_backward:
                node.outputs[position] = f"{y}.{port.name}"
        activated = node
        if rule.has_input("residual") and rule.read(node, "residual"):
            activated = _addition(node, rule.input("residual"))
            nodes.append(activated)
        elif rule.commutative and node.inputs[0] not in learned:
            node.inputs.reverse()
            a["a_halo"], a["b_halo"] = a["b_halo"], a["a_halo"]
        function, activated_rule = applied(activated.attributes), OPERATORS[activated.operator]
        if function is not None and function.kept == "pre" and activated_rule.has_output("pre"):
            activated.outputs[activated_rule.output("pre")] = f"{y}.pre"
            activated.attributes["pre_halo"] = 0
        if rule.parameters or not learned.isdisjoint(node.inputs):
            learned.update((y, node.outputs[0]))
    graph.nodes = nodes


def _addition(node: Node, position: int) -> Node:
    """Take the residual at input ``position`` and the activation from ``node`` and return the addition that
    does them.
    """
    a, y = node.attributes, node.outputs[0]
    channels, height, width = map_of(a, "out_" if "out_channels" in a else "")
    addition = {"channels": channels, "height": height, "width": width}
    addition |= {"lanes": a["lanes"], "out_halo": a["out_halo"], **of_activation(a)}
    addition |= {"a_halo": a["out_halo"], "b_halo": a.get("residual_halo", a["out_halo"])}
    residual, node.inputs[position], node.outputs[0] = node.inputs[position], "", f"{y}.before"
    node.attributes = a = unactivated(a)
    if "residual_halo" in a:
        a["residual_halo"] = 0
    return Node("Add", [node.outputs[0], residual], [y, "", ""], addition, f"{node.name}.Add")


# The gradient graph


def gradient_model(forward: onnx.ModelProto, loss: str = "loss") -> onnx.ModelProto:
    """The forward graph with the nodes that ORT's gradient builder adds for the trainable buffers.

    Its outputs are those of ``forward`` and `coo.value_grad`, `dense.value_grad`.
    """
    import onnxruntime
    from onnxruntime.capi._pybind_state import GradientGraphBuilder

    register_gradients()
    name_absent_inputs(forward)
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


def name_absent_inputs(model: onnx.ModelProto) -> None:
    """Write absent inputs at the end of a node as absent, in place: a definition names every input, and the
    builder takes it for a fault where a node has fewer."""
    for node in model.graph.node:
        rule = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        if rule is not None and rule.ort_gradient:
            node.input.extend([""] * (len(rule.inputs) - len(node.input)))


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
    rule = OPERATORS[node.op_type]
    values = {item.name: helper.get_attribute_value(item) for item in forward.attribute}
    source = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
    missing = rule.complete(source, node.name)
    before: list[onnx.NodeProto] = []
    if missing.inputs is not None:
        del node.input[missing.inputs :]
    if missing.masking is not None:
        masked = f"{node.name}.dy"
        mask = ["", _mask(forward, source)] if missing.masking["mask_kind"] else []
        inputs = [node.input[0], *mask]
        before.append(_node(MaskedAdd, inputs, masked, **missing.masking))
        node.input[0] = masked
    elif rule is OPERATORS["MaskedAdd"] and len(node.input) == 3:
        node.input[2] = _mask(forward, source)
    if missing.spare and not node.output[0]:
        node.output[0] = f"{node.name}.unused"  # nobody wants it, but the operator gives it
    for position in rule.aliases.values():  # accumulators begin at zero
        if node.input[position]:
            start = f"{node.name}.start_{position}"
            before.append(_node(ZeroAffine, [node.input[position]], start))
            node.input[position] = start
    node.attribute.extend(helper.make_attribute(key, value) for key, value in missing.attributes.items())
    return before


def _mask(forward: onnx.NodeProto, attributes: dict[str, Any]) -> str:
    """What the derivative of a forward node's activation is made from."""
    rule, function = OPERATORS[forward.op_type], applied(attributes)
    if function is None or function.kept != "pre":
        return str(forward.output[0])
    return str(forward.output[rule.output("pre")] if rule.has_output("pre") else forward.input[0])


def _node(operator: type[Operator], inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator.__name__, inputs, [output], output, domain=DOMAIN, **attributes)


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
    name_absent_inputs(model)
    return model


def _lists(index: np.ndarray[Any, Any], network: Network) -> np.ndarray[Any, Any]:
    """coo.lists i32[M], as the operator BuildLists makes them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    library.register(options)
    session = onnxruntime.InferenceSession(
        lists_graph(network).to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    lists = np.zeros(network.lists_length, np.int32)
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
    if is_artifact(folder):
        raise EdgeBcsError(
            f"{folder} is an artifact of edge-bcs, which stays as it is; choose another folder."
        )
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
    for file in sorted(folder / f"{graph}_model.onnx" for graph in ("training", "eval", "optimizer")):
        written = onnx.load(file)
        # The tools write the newest version that the onnx package knows, which this onnxruntime refuses.
        written.ir_version = min(written.ir_version, model.ir_version)
        complete(written)
        onnx.save(written, file)
