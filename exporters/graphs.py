"""The graphs of an artifact, from the fused network: training, attack, evaluation, optimizer and lists.

The order of nodes in each file is the intended order of execution.
"""

from __future__ import annotations

from edge_bcs.core.objectives import Objective, objective_named

from .autodiff import Chains, Tape
from .forward import Branch, FoldedAffine
from .network import Network
from .nodes import Graph, TensorType
from .operators.base import named_halos
from .operators.images import PgdStep, UnpackOutput
from .operators.lists import BuildLists
from .operators.losses import LOSSES, CrossEntropy, SoftmaxDifference
from .operators.order import After, GradientReady, ResetGradient
from .operators.update import DenseStep, RewireStep

MAX_LANES = 16


def lanes_of(micro_batch: int) -> int:
    """B, the largest divisor of the micro-batch that is at most 16: images that lie innermost in a stack."""
    return max(lanes for lanes in range(1, min(MAX_LANES, micro_batch) + 1) if micro_batch % lanes == 0)


def _buffers(network: Network) -> dict[str, TensorType]:
    statistics = TensorType("f32", (network.layout.statistics_size,))
    return {
        "coo.value": TensorType("f32", (network.kappa,)),
        "dense.value": TensorType("f32", (network.layout.dense_size,)),
        "batchnorm.mean": statistics,
        "batchnorm.variance": statistics,
        "coo.lists": TensorType("i32", (network.lists.length,)),
    }


def _images(network: Network, micro_batch: int) -> TensorType:
    return TensorType("f32", (micro_batch, *network.image))


def evaluation_graph(network: Network, micro_batch: int) -> Graph:
    """Logits of a micro-batch with running statistics."""
    graph = Graph("eval_model", {"input": _images(network, micro_batch), **_buffers(network)})
    graph.outputs["logits"] = TensorType("f32", (micro_batch, network.classes))
    branch = Branch(graph, network, lanes_of(micro_batch), "input", FoldedAffine(graph, network.evaluation))
    UnpackOutput.emit(graph, {"stack": branch.logits}, {"y": "logits"}, {"lanes": lanes_of(micro_batch)})
    graph.resolve()
    return graph


def attack_graph(network: Network, micro_batch: int) -> Graph:
    """One step of projected gradient descent on the images, with running statistics.

    The seed softmax(logits) − target is the gradient of the cross-entropy for a one-hot target and that of
    KL(target ‖ softmax) for clean probabilities.
    """
    images, scalar = _images(network, micro_batch), TensorType("f32", (1,))
    lanes = lanes_of(micro_batch)
    graph = Graph(
        "attack_model",
        {
            "adversarial": images,
            "input": images,
            "target": TensorType("f32", (micro_batch, network.classes)),
            "step_size": scalar,
            "epsilon": scalar,
            **_buffers(network),
        },
        {"adversarial.out": images},
    )
    affine = FoldedAffine(graph, network.evaluation)
    branch = Branch(graph, network, lanes, "adversarial", affine)
    seed = f"d.{branch.logits}"
    graph.halos.zero(seed)
    inputs = {"logits": branch.logits, "target": "target"}
    SoftmaxDifference.emit(graph, inputs, {"dlogits": seed}, {"lanes": lanes})
    tape = Tape(graph, branch.nodes, branch.geometry, affine.learned, image=True, chains=None)
    tape.run(branch.logits, seed)
    gradient = tape.image_gradient
    inputs = {"x_adv": "adversarial", "x": "input", "dx": gradient}
    inputs |= {"step_size": "step_size", "epsilon": "epsilon"}
    attributes = {"lanes": lanes, **named_halos(dx_halo=gradient)}
    PgdStep.emit(graph, inputs, {"x_adv_out": "adversarial.out"}, attributes)
    graph.resolve()
    return graph


def training_graph(
    network: Network, micro_batch: int, objective: str, beta: float = 0.0, keep_both: bool | None = None
) -> Graph:
    """Loss and accumulated gradients of a micro-batch.

    Args:
        network: the network; ``batch_statistics`` decides how batch norms normalise.
        micro_batch: images per run.
        objective: name of one of `edge_bcs.core.objectives`.
        beta: weight of the robust term of TRADES and MART.
        keep_both: for the two-branch objectives, keep the clean branch's activations while the adversarial
            branch is differentiated, instead of computing them a second time. Default: only with batch
            statistics.
    """
    rule = objective_named(objective)
    images = _images(network, micro_batch)
    graph = Graph("training_model", {"input": images})
    if rule.two_branches:
        graph.inputs["adversarial"] = images
    buffers = _buffers(network)
    graph.inputs |= {
        "labels": TensorType("i64", (micro_batch,)),
        "sample_weight": TensorType("f32", (micro_batch,)),
        **buffers,
        "coo.value_grad.accumulation.buffer": buffers["coo.value"],
        "dense.value_grad.accumulation.buffer": buffers["dense.value"],
        "lazy_reset_grad": TensorType("bool", (1,)),
    }
    graph.outputs |= {
        "loss": TensorType("f32", ()),
        "correct": TensorType("f32", (2 if rule.two_branches else 1,)),
        "coo.value_grad.accumulation.out": TensorType("bool", (1,)),
        "dense.value_grad.accumulation.out": TensorType("bool", (1,)),
    }
    _Training(graph, network, lanes_of(micro_batch), rule, beta, keep_both)
    graph.resolve()
    return graph


class _Training:
    """Emits the body of the training graph."""

    def __init__(
        self,
        graph: Graph,
        network: Network,
        lanes: int,
        objective: Objective,
        beta: float,
        keep_both: bool | None,
    ) -> None:
        self.graph, self.network, self.lanes = graph, network, lanes
        self.affine = FoldedAffine(graph, network.training)
        self.statistics = ["batchnorm.mean", "batchnorm.variance"]
        reset = {name: f"{name}.start" for name in ("coo.value_grad", "dense.value_grad")}
        for name, start in reset.items():
            inputs = {"buffer": f"{name}.accumulation.buffer", "lazy_reset_grad": "lazy_reset_grad"}
            ResetGradient.emit(graph, inputs, {"buffer_out": start})
        self.chains = Chains(reset["coo.value_grad"], "")
        if objective.two_branches:
            keep = network.batch_statistics if keep_both is None else keep_both
            self._two_branches(objective, beta, keep)
        else:
            self._one_branch()
        dense_grad = self.affine.fold_gradient(
            self.chains.affine_grad, reset["dense.value_grad"], self.statistics
        )
        for name, gradient in (("coo.value", self.chains.coo_grad), ("dense.value", dense_grad)):
            GradientReady.emit(graph, {"buffer": gradient}, {"ready": f"{name}_grad.accumulation.out"})
        if self.statistics[0] != "batchnorm.mean":
            self._publish_statistics()

    def _publish_statistics(self) -> None:
        """Name the last tensors of the running statistics as graph outputs."""
        for tensor, key in zip(self.statistics, ("mean", "variance"), strict=True):
            for node in self.graph.nodes:
                node.inputs = [f"batchnorm.{key}.out" if name == tensor else name for name in node.inputs]
                node.outputs = [f"batchnorm.{key}.out" if name == tensor else name for name in node.outputs]
            self.graph.outputs[f"batchnorm.{key}.out"] = self.graph.inputs[f"batchnorm.{key}"]

    def _branch(self, image: str, prefix: str = "", update: bool = True) -> Branch:
        return Branch(
            self.graph,
            self.network,
            self.lanes,
            image,
            self.affine,
            prefix,
            self.statistics,
            update,
        )

    def _backward(self, branch: Branch, seed: str) -> None:
        if not self.chains.affine_grad:
            self.chains.affine_grad = self.affine.start_gradient()
        self.graph.halos.zero(seed)
        learned = self.affine.learned
        Tape(self.graph, branch.nodes, branch.geometry, learned, False, self.chains).run(branch.logits, seed)

    def _one_branch(self) -> None:
        branch = self._branch("input")
        seed = f"d.{branch.logits}"
        inputs = {"logits": branch.logits, "labels": "labels", "sample_weight": "sample_weight"}
        outputs = {"loss": "loss", "dlogits": seed, "correct": "correct"}
        CrossEntropy.emit(self.graph, inputs, outputs, {"lanes": self.lanes})
        self._backward(branch, seed)

    def _two_branches(self, objective: Objective, beta: float, keep_both: bool) -> None:
        clean = self._branch("input", "clean.")
        adversarial = self._branch("adversarial", "adversarial.")
        seeds = {branch: f"d.{branch.logits}" for branch in (clean, adversarial)}
        inputs = {"clean": clean.logits, "adversarial": adversarial.logits}
        inputs |= {"labels": "labels", "sample_weight": "sample_weight"}
        outputs = {"loss": "loss", "correct": "correct"}
        outputs |= {"dclean": seeds[clean], "dadversarial": seeds[adversarial]}
        LOSSES[objective.loss].emit(self.graph, inputs, outputs, {"lanes": self.lanes, "beta": float(beta)})
        self._backward(adversarial, seeds[adversarial])
        if keep_both:
            self._backward(clean, seeds[clean])
            return
        # Computing the clean branch again costs one forward pass and saves all that it would have kept.
        image = "input.again"
        After.emit(self.graph, {"x": "input", "token": self.chains.coo_grad}, {"y": image})
        self._backward(self._branch(image, "again.", update=False), seeds[clean])


def optimizer_graph(network: Network) -> Graph:
    """The rewiring step, the lists it changes, and momentum descent on the dense parameters, all in place."""
    connections = TensorType("f32", (network.kappa,))
    dense = TensorType("f32", (network.layout.dense_size,))
    graph = Graph(
        "optimizer_model",
        {
            "coo.value": connections,
            "coo.index": TensorType("i32", (network.kappa,)),
            "coo.momentum": connections,
            "coo.value_grad.accumulation.buffer": connections,
            "coo.lists": TensorType("i32", (network.lists.length,)),
            "dense.value": dense,
            "dense.momentum": dense,
            "dense.value_grad.accumulation.buffer": dense,
            "hyper": TensorType("f32", (4,)),
            "counter": TensorType("i64", (2,)),
        },
    )
    names = ("coo.value", "coo.index", "coo.momentum", "coo.lists", "dense.value", "dense.momentum")
    graph.outputs = {f"{name}.out": graph.inputs[name] for name in names}
    state = {name: f"coo.{name}" for name in ("value", "index", "momentum")}
    inputs = {
        **state,
        "gradient": "coo.value_grad.accumulation.buffer",
        "hyper": "hyper",
        "counter": "counter",
    }
    outputs = {f"{name}_out": f"{tensor}.out" for name, tensor in state.items()}
    outputs["gradient_out"] = "coo.value_grad.consumed"
    RewireStep.emit(graph, inputs, outputs, {"size": network.layout.size})
    _build_lists(graph, network, "coo.index.out")
    inputs = {"value": "dense.value", "momentum": "dense.momentum", "hyper": "hyper"}
    inputs["gradient"] = "dense.value_grad.accumulation.buffer"
    DenseStep.emit(graph, inputs, {"value_out": "dense.value.out", "momentum_out": "dense.momentum.out"})
    return graph


def _build_lists(graph: Graph, network: Network, index: str) -> None:
    inputs, outputs = {"index": index, "lists": "coo.lists"}, {"lists_out": "coo.lists.out"}
    BuildLists.emit(graph, inputs, outputs, {"layers": network.lists.layers})


def lists_graph(network: Network) -> Graph:
    """coo.index → coo.lists, once after loading."""
    lists = TensorType("i32", (network.lists.length,))
    graph = Graph(
        "lists_model",
        {"coo.index": TensorType("i32", (network.kappa,)), "coo.lists": lists},
        {"coo.lists.out": lists},
    )
    _build_lists(graph, network, "coo.index")
    return graph
