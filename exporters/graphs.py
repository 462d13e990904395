"""The graphs of an artifact, from the fused network: training, attack, evaluation, optimizer and lists.

The order of nodes in each file is the intended order of execution. Inputs and outputs are bound buffers
(`edge_bcs.runtime.buffers`); an output NAME.out lies in the buffer NAME.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_bcs.targets.cost_model import lanes_of

from edge_bcs.core.objectives import Objective
from edge_bcs.core.part import merged

from .autodiff import Gradients, Tape
from .forward import Branch, Lowering
from .network import LAYER_INTEGERS, Network
from .nodes import Graph
from .operators.base import named_halos
from .operators.images import PgdStep, UnpackOutput
from .operators.lists import BuildLists, MakeLists
from .operators.losses import LOSSES, SoftmaxDifference
from .operators.order import After
from .operators.update import DenseStep, RewireStep

PARAMETERS = ("coo.value", "dense.value", "batchnorm.mean", "batchnorm.variance", "coo.lists")
"""What every pass of a network reads besides its images."""


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
        {output: buffers.get(output) or buffers[output.removesuffix(".out")] for output in outputs},
    )


def step_graphs(
    network: Network, micro_batch: int, objective: Objective, beta: float, keep_both: bool
) -> dict[str, Graph]:
    """Phase → graph of what is done with each micro-batch of a step; arguments as `training_graph`."""
    attack = {} if network.attack_apart else {"attack": attack_graph(network, micro_batch)}
    return {
        "training": training_graph(network, micro_batch, objective, beta, keep_both),
        **attack,
        "eval": evaluation_graph(network, micro_batch),
    }


def update_graphs(network: Network) -> dict[str, Graph]:
    """Phase → graph of what is done once a step, and once after loading."""
    return {"optimizer": optimizer_graph(network), "lists": lists_graph(network)}


def evaluation_graph(network: Network, micro_batch: int) -> Graph:
    """Logits of a micro-batch with running statistics."""
    graph = empty_graph("eval_model", network, ("input", *PARAMETERS), ["logits"], micro_batch)
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
    apart = network.attack_apart
    parameters = ["coo.index" if apart and name == "coo.lists" else name for name in PARAMETERS]
    read = ("adversarial", "input", "target", "step_size", "epsilon", *parameters)
    graph = empty_graph("attack_model", network, read, ["adversarial.out"], micro_batch)
    lists = ""
    if apart:
        lists = "lists"
        attributes = {"layers": network.geometry, "layer_integers": LAYER_INTEGERS}
        MakeLists.emit(graph, {"index": "coo.index"}, {"lists": lists}, attributes)
    lowering = Lowering(graph, network, network.evaluation, lanes_of(micro_batch), lists)
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
    buffers = [f"{name}_grad.accumulation.buffer" for name in network.moving]
    graph = empty_graph(
        "training_model",
        network,
        [
            *images_of(objective.two_branches),
            "labels",
            "sample_weight",
            *PARAMETERS,
            *buffers,
            "lazy_reset_grad",
        ],
        ["loss", "correct", *(name.replace(".buffer", ".out") for name in buffers)],
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
    connections, others = (name in network.moving for name in ("coo.value", "dense.value"))
    state = {name: f"coo.{name}" for name in ("value", "index", "momentum")}
    gradients = [f"{name}_grad.accumulation.buffer" for name in ("coo.value", "dense.value")]
    dense = ("dense.value", "dense.momentum")
    read = [*state.values(), gradients[0], "coo.lists"] if connections else []
    changed = [*state.values(), "coo.lists"] if connections else []
    if others:
        read, changed = [*read, *dense, gradients[1]], [*changed, *dense]
    read = [*read, "hyper", *(["counter"] if connections else [])]
    graph = empty_graph("optimizer_model", network, read, [f"{name}.out" for name in changed])
    everything = network.part.everything
    if connections:
        inputs = {**state, "gradient": gradients[0], "hyper": "hyper", "counter": "counter"}
        outputs = {f"{name}_out": f"{tensor}.out" for name, tensor in state.items()}
        outputs["gradient_out"] = "coo.value_grad.consumed"
        spans = {} if everything else {"spans": network.spans}
        RewireStep.emit(graph, inputs, outputs, {"size": network.size, **spans})
        _build_lists(graph, network, "coo.index.out")
    if others:
        inputs = {"value": dense[0], "momentum": dense[1], "hyper": "hyper", "gradient": gradients[1]}
        runs = [number for begin, end in merged(network.trained.dense) for number in (begin, end - begin)]
        outputs = {"value_out": f"{dense[0]}.out", "momentum_out": f"{dense[1]}.out"}
        DenseStep.emit(graph, inputs, outputs, {} if everything else {"spans": runs})
    return graph


def lists_graph(network: Network) -> Graph:
    """coo.index → coo.lists, once after loading."""
    graph = empty_graph("lists_model", network, ["coo.index", "coo.lists"], ["coo.lists.out"])
    _build_lists(graph, network, "coo.index")
    return graph


def _build_lists(graph: Graph, network: Network, index: str) -> None:
    inputs, outputs = {"index": index, "lists": "coo.lists"}, {"lists_out": "coo.lists.out"}
    attributes = {"layers": network.geometry, "layer_integers": LAYER_INTEGERS}
    if network.lists.partial:
        attributes["transposed"] = network.lists.flags
    BuildLists.emit(graph, inputs, outputs, attributes)
