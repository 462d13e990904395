"""Training in part: gradients, what is kept, memory, state, and what is refused."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edge_bcs.exporters.compiler import compile_network
from edge_bcs.exporters.memory.choice import Job
from edge_bcs.exporters.memory.planner import Planner
from edge_bcs.exporters.network import network_of
from edge_bcs.exporters.operators.base import KEPT
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.budget import BudgetExceeded
from helpers.in_part import PARTS, SHAPE, mobile
from helpers.networks import torch_gradients

import edge_bcs
from edge_bcs import Attack, Hyper, Memory
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import OBJECTIVES, objective_named
from edge_bcs.core.part import Part
from edge_bcs.method.sparse_model import SparseModel

LAYERS = {  # part → kernels among the connections that it trains
    "head": {"head"},
    "last:2": {"head", "widen"},
    "last:4": {"head", "widen", "project.0", "excite.0"},
    "norm": set(),
    "bias": set(),
}
NORMS = {"stem.1", "expand.1", "after.0", "project.1", "grouped"}
BIASED = {"head", "expand.0", "squeeze.1", "excite.0"}
DENSE = {  # part → the other parameters
    "head": {"head.bias"},
    "last:2": {"head.bias", "grouped.weight", "grouped.bias"},
    "last:4": {
        "head.bias",
        "grouped.weight",
        "grouped.bias",
        "project.1.weight",
        "project.1.bias",
        "excite.0.bias",
    },
    "norm": {f"{norm}.{kind}" for norm in NORMS for kind in ("weight", "bias")},
    "bias": {f"{layer}.bias" for layer in NORMS | BIASED},
}
STILL = Hyper(learning_rate=1e-12, weight_decay=0.0, momentum=0.9, noise=0.0)
BUSY = Hyper(learning_rate=0.05, weight_decay=1e-3, momentum=0.9, noise=1e-3)


def exported(
    folder: Path, part: str, sparse: SparseModel | None = None, images: int = 3, **options: Any
) -> Artifact:
    options = {"objective": "natural", "hyper": BUSY, "attack": Attack(steps=1), "validate": False, **options}
    memory = options.pop("memory", Memory(micro_batch=images))
    return edge_bcs.export(
        mobile() if sparse is None else sparse,
        folder,
        input_shape=SHAPE,
        memory=memory,
        train=part,
        **options,
    )


def batch(n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.random((n, *SHAPE), dtype=np.float32), random.integers(0, 5, n)


def names_of(artifact: Artifact) -> tuple[set[str], set[str]]:
    trained = artifact.trained
    return {kernel.name for kernel in trained.kernels}, {parameter.name for parameter in trained.dense}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_trained_follows_the_order_of_computation(part: str, tmp_path: Path) -> None:
    artifact = exported(tmp_path / "a", part)
    assert names_of(artifact) == (LAYERS[part], DENSE[part])
    assert names_of(Artifact.read(tmp_path / "a")) == (LAYERS[part], DENSE[part])
    assert artifact.manifest["version"] == 2 and artifact.trained.part.text == part


def check_gradients(artifact: Artifact, sparse: SparseModel, objective: str) -> None:
    """A step from no momentum, so short that nothing moves, leaves the gradient as momentum."""
    x, y = batch(3)
    with Trainer(artifact, threads=1) as trainer:
        trainer.step(x, y)
        adversarial, state = trainer.buffers["adversarial"].copy(), trainer.state()
    seen = x if objective == "natural" else adversarial
    weight = np.full(3, 1 / 3, np.float32)
    images = x if objective in ("trades", "mart") else seen
    beta = artifact.objective.beta
    exact = torch_gradients(sparse, objective, images, seen, y, weight, beta, False)
    index = sparse.state()["coo.index"]
    found = artifact.trained.whole({**state, "coo.index": index})
    kernels, names = names_of(artifact)
    for layer in sparse.layers:
        inside = (index >= layer.offset) & (index < layer.offset + layer.size)
        close(found["coo.momentum"][inside], exact["coo"][inside], layer.name in kernels, layer.name)
    for parameter in sparse.dense:
        span = parameter.span
        close(found["dense.momentum"][span], exact["dense"][span], parameter.name in names, parameter.name)


def close(found: np.ndarray, exact: np.ndarray, trained: bool, name: str) -> None:
    if not trained:
        assert not found.any(), name
        return
    # Where the next normalisation takes a bias away again, its gradient is rounding, in torch, too.
    assert np.linalg.norm(found - exact) <= 1e-4 * np.linalg.norm(exact) + 1e-8, name
    assert np.linalg.norm(exact) > 1e-6, name


@pytest.mark.parametrize(
    ("part", "objective"),
    [
        *((part, "natural") for part in PARTS),
        ("last:4", "at"),
        ("norm", "trades"),
        ("bias", "mart"),
        ("head", "trades"),
    ],
)
def test_gradients_are_torchs(part: str, objective: str, tmp_path: Path) -> None:
    sparse = mobile()
    artifact = exported(tmp_path / "a", part, sparse, objective=objective, hyper=STILL)
    check_gradients(artifact, sparse, objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("part", PARTS)
def test_every_part_and_objective_agrees_with_torch(part: str, objective: str, tmp_path: Path) -> None:
    for statistics in ("frozen", "batch"):
        if statistics == "frozen" or part not in ("head", "last:2"):
            named = {"objective": objective, "batch_norm": statistics, "images": 6, "validate": True}
            exported(tmp_path / statistics, part, **named)


@pytest.mark.parametrize(
    ("part", "objective"),
    [("head", "trades"), ("last:4", "mart"), ("norm", "trades"), ("bias", "mart"), ("last:4", "natural")],
)
def test_the_smallest_budget_recomputes_and_is_kept(part: str, objective: str, tmp_path: Path) -> None:
    """Activations that are made again, and a clean branch that is computed twice: gradients are torch's."""
    sparse, rule = mobile(), objective_named(objective)
    network = network_of(sparse, SHAPE, part=Part.parse(part), attacked=rule.adversarial)
    budget = Planner(network).smallest(Job(rule, rule.beta), 2).peak_bytes
    memory = Memory(budget, micro_batch=2)
    artifact = exported(tmp_path / "a", part, sparse, objective=objective, memory=memory, validate=True)
    assert artifact.predicted_peak_bytes <= budget
    x, y = batch(5)
    with Trainer(artifact, memory=budget, threads=2) as trainer:
        trainer.step(x, y)
        trainer.evaluate((x, y), attack_steps=0)
        assert trainer.peak_bytes == artifact.predicted_peak_bytes


@pytest.mark.parametrize("part", ["last:4", "norm", "bias"])
def test_norms_that_are_trained_take_the_statistics_of_the_batch(part: str, tmp_path: Path) -> None:
    artifact = exported(tmp_path / "a", part, batch_norm="batch", images=6, validate=True)  # against torch
    x, y = batch(6)
    before = mobile().state()
    with Trainer(artifact, threads=1) as trainer:
        trainer.step(x, y)
        after = trainer.state()
        trainer.evaluate((x, y), attack_steps=0)
        assert trainer.peak_bytes == artifact.predicted_peak_bytes
    moved = {norm["name"]: before["batchnorm.mean"][norm["offset"] :][: norm["channels"]].tolist()
             != after["batchnorm.mean"][norm["offset"] :][: norm["channels"]].tolist()
             for norm in artifact.manifest["statistics"]}  # fmt: skip
    assert moved == {norm: part != "last:4" or norm == "project.1" for norm in NORMS - {"grouped"}}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_trained_keeps_its_bits_and_the_rest_learns(part: str, tmp_path: Path) -> None:
    artifact = exported(tmp_path / "a", part, images=2, objective="natural")
    x, y = batch(5)  # micro-batches do not divide it
    before = mobile().state()
    states = []
    for threads in (1, 2):
        with Trainer(artifact, threads=threads) as trainer:
            for _ in range(20):
                trainer.step(x, y)
            states.append(trainer.state())
            trainer.evaluate((x, y), attack_steps=0)
            assert trainer.peak_bytes == artifact.predicted_peak_bytes
    assert all(np.array_equal(states[0][name], states[1][name]) for name in before)
    after, trained = states[0], artifact.trained
    assert len(after["coo.index"]) == artifact.kappa
    for name in ("coo.value", "coo.index"):
        still = [state[name][~trained.connections(state["coo.index"])] for state in (before, after)]
        assert np.array_equal(*still), name
    others = ~trained.numbers(artifact.dense_size)
    assert np.array_equal(before["dense.value"][others], after["dense.value"][others])
    for name in ("batchnorm.mean", "batchnorm.variance"):
        assert np.array_equal(before[name], after[name])
    assert trained.connections(after["coo.index"]).sum() == trained.kappa == len(after["coo.momentum"])
    assert (before["dense.value"][~others] != after["dense.value"][~others]).mean() > 0.5
    assert np.array_equal(before["coo.index"], after["coo.index"]) == (part in ("norm", "bias"))


def test_a_run_goes_on_where_it_was_killed_and_as_any_other(tmp_path: Path) -> None:
    x, y = batch(4)
    artifact = exported(tmp_path / "a", "last:2", images=2, objective="at")
    with Trainer(artifact, threads=1) as trainer:
        for _ in range(3):
            trainer.step(x, y)
        trainer.save(tmp_path / "run")
        for _ in range(3):
            trainer.step(x, y)
        straight = trainer.state()
    with Trainer.resume(tmp_path / "run", threads=1) as trainer:
        for _ in range(3):
            trainer.step(x, y)
        assert all(np.array_equal(array, straight[name]) for name, array in trainer.state().items())
        trainer.save(tmp_path / "run")
        logits = trainer.logits(x)
    sparse = edge_bcs.load(tmp_path / "run", mobile())
    whole = sparse.state()
    assert len(whole["coo.momentum"]) == artifact.kappa and sparse.step == 6
    fresh = ~artifact.trained.connections(whole["coo.index"])
    assert not whole["coo.momentum"][fresh].any() and whole["coo.momentum"][~fresh].any()
    # All of it goes on, with the momentum there was; and another part, which has none.
    everything = exported(tmp_path / "all", "all", sparse, images=2, validate=True)
    assert everything.manifest["version"] == 1 and "train" not in everything.manifest
    with Trainer(everything, threads=1) as trainer:
        assert np.allclose(trainer.logits(x), logits, atol=1e-5)
        assert np.array_equal(trainer.state()["coo.momentum"], whole["coo.momentum"])
        trainer.step(x, y)
        trainer.save(tmp_path / "run-of-all")
    sparse = edge_bcs.load(tmp_path / "run-of-all", mobile())
    again = exported(tmp_path / "head", "head", sparse, images=2)
    with Trainer(again, threads=1) as trainer:
        head = sparse.layers[0]  # which is numbered first
        kept = sparse.state()["coo.momentum"][: np.searchsorted(sparse.state()["coo.index"], head.size)]
        assert np.array_equal(trainer.state()["coo.momentum"], kept) and kept.any()
        trainer.step(x, y)


def operators(artifact: Artifact, graph: str = "training") -> list[str]:
    return [node.op_type for node in onnx.load(artifact.graph(graph)).graph.node]


def test_the_backward_pass_ends_where_nothing_is_trained(tmp_path: Path) -> None:
    found = {part: operators(exported(tmp_path / part.replace(":", ""), part)) for part in ("all", *PARTS)}
    back = {part: [name for name in names if name.endswith("Grad")] for part, names in found.items()}
    assert back["head"] == ["ConvGrad", "FoldAffineGrad"]
    assert back["last:2"] == ["ConvGrad", "AveragePoolGrad", "GroupNormGrad", "ConvGrad", "FoldAffineGrad"]
    for part in ("norm", "bias"):  # gradients of inputs alone, of all but the first layer
        assert not {"ConvGrad", "DenseConvGrad"} & set(back[part])
        assert back[part].count("ConvInputGrad") + back[part].count("DenseConvInputGrad") == 7
    assert back["bias"].count("ShiftGrad") == 7 and "AffineGrad" not in back["bias"]
    # The attack goes through everything, whatever is trained; where a training has none, it brings its lists.
    first, *attacks = (
        operators(Artifact.read(tmp_path / part.replace(":", "")), "attack") for part in ("all", *PARTS)
    )
    assert all(attack == ["MakeLists", *first] for attack in attacks)
    update = {part: operators(Artifact.read(tmp_path / part.replace(":", "")), "optimizer") for part in PARTS}
    assert update["norm"] == update["bias"] == ["DenseStep"]
    assert update["head"] == ["RewireStep", "BuildLists", "DenseStep"]


def test_less_is_kept_and_the_plan_knows_it(tmp_path: Path) -> None:
    sparse = mobile()
    job = Job(objective_named("natural"))
    found = {}
    for part in ("all", *PARTS):
        network = network_of(sparse, SHAPE, part=Part.parse(part))
        memory = compile_network(network, job, 8).memory
        kept = sum(
            tensor.bytes for tensor in memory.phases["training"].allocations if tensor.category == KEPT
        )
        found[part] = kept, sum(memory.bound.values())
    assert found["head"][0] < found["last:2"][0] < found["last:4"][0] < found["all"][0]
    assert found["bias"][0] < found["norm"][0]
    network, trained = network_of(sparse, SHAPE), network_of(sparse, SHAPE, part=Part.parse("last:2")).trained
    without = network.kappa - trained.kappa + network.dense_size - trained.dense_size
    assert found["all"][1] - found["last:2"][1] == 8 * without


@pytest.mark.parametrize(
    ("part", "statistics", "message"),
    [
        ("first", "frozen", "what is trained is all, head, last:N .* or bias, not 'first'$"),
        ("last:0", "frozen", "not 'last:0'"),
        ("last:x", "frozen", "not 'last:x'"),
        ("last:9", "frozen", "last:9 are more layers than the 8 with weights"),
        ("head", "batch", "--train head trains no batch norm.*take --batch-norm frozen"),
    ],
)
def test_what_makes_no_sense_is_refused(part: str, statistics: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match=message) as caught:
        exported(tmp_path / "a", part, batch_norm=statistics)
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists()


def test_a_network_without_norms_has_none_to_train(tmp_path: Path) -> None:
    bare = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(144, 5, bias=False)
    )
    sparse = edge_bcs.sparsify(bare, 0.5, dense=[])
    for part in ("norm", "bias"):
        with pytest.raises(EdgeBcsError, match="so there is nothing to train: choose another --train"):
            exported(tmp_path / "a", part, sparse)


def test_too_small_a_budget_names_the_parts_that_would_fit(tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match="is too little") as caught:
        exported(tmp_path / "a", "all", memory=Memory(12_000, micro_batch=1))
    text = str(caught.value)
    assert "--train head: " in text and "--train last:2: " in text, text


@pytest.mark.parametrize("part", PARTS)
def test_a_natural_training_keeps_the_lists_that_its_gradients_go_through(part: str, tmp_path: Path) -> None:
    sparse = mobile()
    natural, attacked = (
        exported(tmp_path / name, part, sparse, objective=name) for name in ("natural", "at")
    )
    kept = natural.manifest["train"]["transposed"]
    through = {"head": 1, "last:2": 2, "last:4": 4}.get(part, len(natural.layers) - 1)
    assert len(kept["layers"]) == through and "transposed" not in attacked.manifest["train"]
    assert attacked.lists_length - natural.lists_length >= 2 * (natural.kappa - kept["kappa"])
    assert natural.attack_bytes > attacked.predicted_peak_bytes - attacked.lists_length * 4
    # It is evaluated under attack all the same, with the same answers, before and after connections moved.
    x, y = batch(7)
    under_attack = []
    for artifact in (natural, attacked):
        with Trainer(artifact, threads=1) as trainer:
            under_attack.append(trainer.evaluate((x, y), attack_steps=3, epsilon=0.5))
    assert under_attack[0] == under_attack[1]
    with Trainer(natural, threads=1) as trainer:
        for _ in range(3):
            trainer.step(x, y)
        answers, found = trainer.logits(x), trainer.evaluate((x, y), attack_steps=3, epsilon=0.5)
        trainer.save(tmp_path / "run")
    trained = edge_bcs.load(tmp_path / "run", mobile())
    assert np.abs(answers - trained(torch.from_numpy(x)).detach().numpy()).max() < 1e-4
    with Trainer(exported(tmp_path / "again", part, trained, objective="at"), threads=1) as trainer:
        assert trainer.evaluate((x, y), attack_steps=3, epsilon=0.5) == found


def test_an_attack_that_does_not_fit_is_refused_by_its_size(tmp_path: Path) -> None:
    x, y = batch(3)
    artifact = exported(tmp_path / "a", "head", objective="natural", images=1)
    assert artifact.attack_bytes > artifact.predicted_peak_bytes
    with Trainer(artifact, memory=artifact.predicted_peak_bytes, threads=1) as trainer:
        trainer.step(x, y)
        with pytest.raises(BudgetExceeded):
            trainer.evaluate((x, y), attack_steps=1)
        trainer.step(x, y)
    with Trainer(artifact, memory=artifact.attack_bytes, threads=1) as trainer:
        trainer.evaluate((x, y), attack_steps=1)
        assert trainer.peak_bytes == artifact.attack_bytes


@pytest.mark.parametrize(("part", "objective"), [("head", "natural"), ("last:4", "trades"), ("norm", "at")])
def test_our_own_runner_gives_the_same_bits(part: str, objective: str, tmp_path: Path) -> None:
    x, y = batch(5)
    artifact = exported(tmp_path / "a", part, objective=objective, images=2)
    states, measured = [], []
    for engine in ("onnxruntime", "native"):
        with Trainer(artifact, threads=1, engine=engine) as trainer:
            for _ in range(3):
                trainer.step(x, y)
            measured.append(trainer.evaluate((x, y), attack_steps=2))
            states.append(trainer.state())
    assert measured[0] == measured[1]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
