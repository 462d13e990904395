"""The graphs of an artifact, from the fused network: training, attack, evaluation, optimizer and lists.

The order of nodes in each file is the intended order of execution. Inputs and outputs are bound buffers
(`edge_bcs.runtime.buffers`); an output NAME.out lies in the buffer NAME.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from edge_bcs.targets.cost_model import lanes_of

from edge_bcs.core.objectives import Objective

from .autodiff import Gradients, Tape
from .forward import Branch, Lowering
from .network import Network
from .nodes import Graph
from .operators.base import named_halos
from .operators.images import PgdStep, UnpackOutput
from .operators.lists import BuildLists
from .operators.losses import LOSSES, SoftmaxDifference
from .operators.order import After
from .operators.update import DenseStep, RewireStep

_READ = {
    "coo.value": (
        "coo.value",
        "coo.index",
        "coo.momentum",
        "coo.value_grad.accumulation.buffer",
        "coo.lists",
    ),
    "dense.value": ("dense.value", "dense.momentum", "dense.value_grad.accumulation.buffer"),
}
"""What the update of the connections, and that of the other parameters, reads."""
_CHANGED = {
    "coo.value": ("coo.value", "coo.index", "coo.momentum", "coo.lists"),
    "dense.value": ("dense.value", "dense.momentum"),
}
"""What they change."""


def empty_graph(
    name: str,
    network: Network,
    inputs: Iterable[str],
    outputs: Iterable[str],
    micro_batch: int = 1,
    two_branches: bool = False,
) -> Graph:
    """A graph without nodes, between bound buffers of ``network``."""
    buffers = network.buffers(micro_batch, two_branches)
    return Graph(
        name,
        {buffer: buffers[buffer] for buffer in inputs},
        {buffer: buffers.get(buffer) or buffers[buffer.removesuffix(".out")] for buffer in outputs},
    )


def other_graphs(network: Network, micro_batch: int) -> dict[str, Graph]:
    """Phase → graph of what is done once a step, once after loading, and only to evaluate a network."""
    graphs = {"optimizer": optimizer_graph(network), "lists": lists_graph(network)}
    if network.attack_apart:
        graphs["attack"] = attack_graph(network, micro_batch)
    return graphs


def evaluation_graph(network: Network, micro_batch: int) -> Graph:
    """Logits of a micro-batch with running statistics."""
    graph = empty_graph(
        "eval_model", network, ("input", *network.evaluation.parameters), ["logits"], micro_batch
    )
    lowering = Lowering(graph, network, network.evaluation, lanes_of(micro_batch))
    branch = Branch(lowering, "input")
    UnpackOutput.emit(graph, {"stack": branch.logits}, {"y": "logits"}, {"lanes": branch.lanes})
    graph.resolve()
    return graph


def attack_graph(network: Network, micro_batch: int) -> Graph:
    """One step of projected gradient descent on the images, with running statistics.

    The seed softmax(logits) − target is the gradient of the cross-entropy for a one-hot target and that of
    KL(target ‖ softmax) for clean probabilities.
    """
    graph = empty_graph(
        "attack_model",
        network,
        ("adversarial", "input", "target", "step_size", "epsilon", *network.attack.parameters),
        ["adversarial.out"],
        micro_batch,
    )
    lowering = Lowering(graph, network, network.attack, lanes_of(micro_batch))
    branch = Branch(lowering, "adversarial")
    inputs = {"logits": branch.logits, "target": "target"}
    SoftmaxDifference.emit(graph, inputs, {"dlogits": branch.seed}, {"lanes": branch.lanes})
    gradient = Tape(branch, branch.seed).image_gradient
    inputs = {"x_adv": "adversarial", "x": "input", "dx": gradient}
    inputs |= {"step_size": "step_size", "epsilon": "epsilon"}
    attributes = {"lanes": branch.lanes, **named_halos(dx_halo=gradient)}
    PgdStep.emit(graph, inputs, {"x_adv_out": "adversarial.out"}, attributes)
    graph.resolve()
    return graph


def training_graph(
    network: Network, micro_batch: int, objective: Objective, beta: float = 0.0, keep_both: bool | None = None
) -> Graph:
    """Loss and accumulated gradients of a micro-batch.

    Args:
        network: the network; ``batch_statistics`` decides how batch norms normalise.
        micro_batch: images per run.
        objective: what is trained.
        beta: weight of the robust term of TRADES and MART.
        keep_both: for the two-branch objectives, keep the clean branch's activations while the adversarial
            branch is differentiated, instead of computing them a second time. Default: as the network says.
    """
    graph = empty_graph(
        "training_model",
        network,
        [
            *images_of(objective.two_branches),
            "labels",
            "sample_weight",
            *network.training.parameters,
            *(f"{name}_grad.accumulation.buffer" for name in network.moving),
            "lazy_reset_grad",
        ],
        ["loss", "correct", *(f"{name}_grad.accumulation.out" for name in network.moving)],
        micro_batch,
        objective.two_branches,
    )
    lowering = Lowering(graph, network, network.training, lanes_of(micro_batch))
    gradients = Gradients(lowering)
    branches = forward_and_loss(lowering, objective.loss, objective.two_branches, beta)
    if len(branches) == 1:
        gradients.add(branches[0], branches[0].seed)
    else:
        clean, adversarial = branches
        gradients.add(adversarial, adversarial.seed)
        seed = clean.seed
        if not (network.keeps_both if keep_both is None else keep_both):
            # Computing the clean branch again costs one forward pass and saves all that it would have kept.
            image = "input.again"
            After.emit(graph, {"x": "input", "token": gradients.latest}, {"y": image})
            clean = Branch(lowering, image, "again.", update=False)
        gradients.add(clean, seed)
    gradients.finish()
    _publish(graph, lowering.statistics)
    graph.resolve()
    return graph


def images_of(two_branches: bool) -> tuple[str, ...]:
    """The images that a training graph reads."""
    return ("input", "adversarial") if two_branches else ("input",)


def forward_and_loss(lowering: Lowering, loss: str, two_branches: bool, beta: float) -> tuple[Branch, ...]:
    """Emit a branch for each of the images, and the loss with the gradients of their logits."""
    images = images_of(two_branches)
    prefixes = ("clean.", "adversarial.") if two_branches else ("",)
    branches = tuple(Branch(lowering, *of_one) for of_one in zip(images, prefixes, strict=True))
    names = ("clean", "adversarial") if two_branches else ("logits",)
    inputs = {"labels": "labels", "sample_weight": "sample_weight"}
    outputs = {"loss": "loss", "correct": "correct"}
    for name, branch in zip(names, branches, strict=True):
        inputs[name], outputs[f"d{name}"] = branch.logits, branch.seed
    attributes = {"lanes": lowering.lanes, **({"beta": float(beta)} if two_branches else {})}
    LOSSES[loss].emit(lowering.graph, inputs, outputs, attributes)
    return branches


def _publish(graph: Graph, statistics: list[str]) -> None:
    """Make the last tensors of the running statistics, where there are new ones, graph outputs."""
    for name, tensor in zip(("batchnorm.mean", "batchnorm.variance"), statistics, strict=True):
        if tensor != name:
            graph.outputs[f"{name}.out"] = graph.inputs[name]
            for node in graph.nodes:
                node.inputs = [f"{name}.out" if read == tensor else read for read in node.inputs]
                node.outputs = [f"{name}.out" if made == tensor else made for made in node.outputs]


def optimizer_graph(network: Network) -> Graph:
    """The rewiring step, the lists it changes, and momentum descent on the dense parameters, all in place; of
    what is trained."""
    graph = empty_graph(
        "optimizer_model",
        network,
        [
            *chain.from_iterable(_READ[name] for name in network.moving),
            "hyper",
            *(["counter"] if "coo.value" in network.moving else []),
        ],
        [f"{buffer}.out" for name in network.moving for buffer in _CHANGED[name]],
    )
    if "coo.value" in network.moving:
        inputs = {
            "value": "coo.value",
            "index": "coo.index",
            "momentum": "coo.momentum",
            "gradient": "coo.value_grad.accumulation.buffer",
            "hyper": "hyper",
            "counter": "counter",
        }
        outputs = {
            "value_out": "coo.value.out",
            "index_out": "coo.index.out",
            "momentum_out": "coo.momentum.out",
            "gradient_out": "coo.value_grad.consumed",
        }
        RewireStep.emit(graph, inputs, outputs, {"size": network.size, "spans": network.spans})
        inputs = {"index": "coo.index.out", "lists": "coo.lists"}
        BuildLists.emit(graph, inputs, {"lists_out": "coo.lists.out"}, network.lists.attributes)
    if "dense.value" in network.moving:
        inputs = {
            "value": "dense.value",
            "momentum": "dense.momentum",
            "hyper": "hyper",
            "gradient": "dense.value_grad.accumulation.buffer",
        }
        outputs = {"value_out": "dense.value.out", "momentum_out": "dense.momentum.out"}
        DenseStep.emit(graph, inputs, outputs, {"spans": network.dense_spans})
    return graph


def lists_graph(network: Network) -> Graph:
    """coo.index → coo.lists, once after loading."""
    graph = empty_graph("lists_model", network, ["coo.index", "coo.lists"], ["coo.lists.out"])
    inputs = {"index": "coo.index", "lists": "coo.lists"}
    BuildLists.emit(graph, inputs, {"lists_out": "coo.lists.out"}, network.lists.attributes)
    return graph
