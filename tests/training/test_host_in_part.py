"""Training in part on the host: the same part, the same numbers as the compiled artifact."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edge_bcs.runtime import Trainer
from helpers import commands
from helpers.in_part import PARTS, SHAPE, mobile

import edge_bcs
from edge_bcs import Attack, Compute, Feed, Gradual, Hyper, Memory, Method, Output, Schedule
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import objective_named
from edge_bcs.core.part import Part, Trained, merged
from edge_bcs.core.settings import Coefficients
from edge_bcs.exportable import trained_part
from edge_bcs.method.rewiring import rewire_step
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.method.step import accumulate, update

BUSY = Hyper(learning_rate=0.05, weight_decay=1e-3, noise=1e-3)
ATTACK = Attack(epsilon=0.03, step_size=0.02, steps=2)


def images(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.random((count, *SHAPE), dtype=np.float32), np.arange(count) % 5


def trained(part: str, engine: str = "torch", **more: Any) -> SparseModel:
    sparse = more.pop("sparse", None) or mobile()
    given: dict[str, Any] = {"objective": "at", "batch_norm": "frozen", "hyper": BUSY, "attack": ATTACK}
    given |= {"batch_size": 12, "schedule": Schedule(steps=3), "feed": Feed(augment="none", validation=0)}
    compute = Compute(engine, device="cpu", precision="f32")
    edge_bcs.train(sparse, images(), train=part, compute=compute, progress=False, **(given | more))
    return sparse


def of(sparse: SparseModel, part: str) -> Trained:
    found = trained_part(sparse, Part.parse(part), SHAPE)
    assert found is not None
    return found


def check_the_others_are_as_before(sparse: SparseModel, before: SparseModel, part: Trained) -> None:
    for name in ("value", "index"):
        first, second = (one.state()[f"coo.{name}"] for one in (before, sparse))
        still = [~part.connections(one.state()["coo.index"]) for one in (before, sparse)]
        assert np.array_equal(first[still[0]], second[still[1]])
    numbers = part.numbers(len(sparse.dense_momentum))
    first, second = before.state()["dense.value"], sparse.state()["dense.value"]
    assert np.array_equal(first[~numbers], second[~numbers])
    assert (first[numbers] != second[numbers]).mean() > 0.5


@pytest.mark.parametrize("part", PARTS)
def test_as_the_artifact_trains(part: str, tmp_path: Path) -> None:
    """One batch is the whole data, so that the order of an epoch says nothing."""
    sparse, (x, y) = trained(part, objective="natural"), images()
    artifact = edge_bcs.export(
        mobile(), tmp_path / "a", "natural", SHAPE, train=part, hyper=BUSY, batch_size=12,
        memory=Memory(micro_batch=12), validate=False,
    )  # fmt: skip
    with Trainer(artifact, threads=1) as trainer:
        for step in range(3):
            # As the host's schedule has it; the third quarter of so few steps comes at once.
            rates = Schedule(steps=3).rates(BUSY.learning_rate or 0, BUSY.weight_decay or 0, step, 3)
            trainer.learning_rate, trainer.weight_decay = rates
            trainer.step(x, y)
        state = artifact.trained.whole(trainer.state())
    found = sparse.state()
    assert np.array_equal(found["coo.index"], state["coo.index"])
    for name in ("coo.value", "coo.momentum", "dense.value", "dense.momentum"):
        assert found[name] == pytest.approx(state[name], abs=2e-4), name
    check_the_others_are_as_before(sparse, mobile(), artifact.trained)


@pytest.mark.parametrize(
    ("part", "batch_norm", "method"),
    [
        ("last:4", "frozen", "bcs"),
        ("last:4", "batch", "bcs"),
        ("norm", "batch", "bcs"),
        ("last:2", "frozen", "random"),
    ],
)
def test_both_engines_train_the_same_part(part: str, batch_norm: str, method: str) -> None:
    """The sparse engine as PyTorch: under attack, with statistics of the batch, on a static mask."""
    first, second = (
        trained(part, engine, batch_norm=batch_norm, method=method) for engine in ("torch", "sparse")
    )
    for name, one in first.state().items():
        assert one == pytest.approx(second.state()[name], abs=5e-3), name
    check_the_others_are_as_before(second, mobile(), of(mobile(), part))
    moved = {
        item.name
        for item in first.statistics
        if not np.array_equal(
            first.state()["batchnorm.mean"][item.span], mobile().state()["batchnorm.mean"][item.span]
        )
    }
    assert moved == (
        set(of(mobile(), part).norms([s.name for s in first.statistics])) if batch_norm == "batch" else set()
    )


@pytest.mark.parametrize("part", ["head", "last:4"])
def test_rewiring_in_part_is_the_numpy_step_to_the_bit(part: str) -> None:
    sparse = mobile()
    what = of(sparse, part)
    torch.manual_seed(0)
    sparse.zero_gradients()
    sparse.all_gradients().normal_()
    sparse.momentum.normal_()
    before, gradient = sparse.state(), sparse.gradients()[0].numpy()
    learn = what.connections(before["coo.index"])
    hyper = Coefficients(learning_rate=0.3, weight_decay=1e-3, noise=1e-2)
    deaths = update(sparse, hyper, step=7, trained=what)
    value, index, momentum = rewire_step(
        before["coo.value"], before["coo.index"], before["coo.momentum"][learn], gradient[learn],
        size=sparse.size, seed=sparse.seed, step=7, learning_rate=0.3, weight_decay=1e-3, momentum_factor=0.9,
        noise=1e-2, spans=merged(what.kernels),
    )  # fmt: skip
    after = sparse.state()
    assert deaths > 5
    assert np.array_equal(after["coo.index"], index) and np.array_equal(after["coo.value"], value)
    assert np.array_equal(after["coo.momentum"][what.connections(index)], momentum)
    assert np.array_equal(after["coo.momentum"][~what.connections(index)], before["coo.momentum"][~learn])


@pytest.mark.parametrize("part", PARTS)
def test_no_other_gradient_is_computed(part: str) -> None:
    sparse, computed = mobile(), set()
    for name, parameter in sparse.network.named_parameters():
        parameter.register_hook(lambda _, name=name: computed.add(name))
    x, y = (torch.from_numpy(array) for array in images())
    what = of(sparse, part)
    sparse.zero_gradients()
    accumulate(sparse, x, x, y, objective_named("natural"), batch_norm="frozen", trained=what)
    wanted = {kernel.name + ".weight" for kernel in what.kernels} | {one.name for one in what.dense}
    assert computed == wanted
    assert all(parameter.requires_grad for parameter in sparse.network.parameters())


def test_what_is_not_trained_has_no_momentum() -> None:
    sparse = trained("all")
    assert (sparse.momentum != 0).float().mean() > 0.5
    part = of(sparse, "last:2")
    trained("last:2", sparse=sparse, schedule=Schedule(steps=1))
    learn = part.connections(sparse.state()["coo.index"])
    assert (sparse.momentum.numpy()[learn] != 0).any() and not sparse.momentum.numpy()[~learn].any()


def test_a_training_goes_on_with_its_part_alone(tmp_path: Path) -> None:
    whole = trained("last:2", schedule=Schedule(epochs=3))
    trained("last:2", schedule=Schedule(epochs=3), output=tmp_path)
    again = trained("last:2", schedule=Schedule(epochs=3), output=Output(tmp_path, resume=True))
    assert all(np.array_equal(one, again.state()[name]) for name, one in whole.state().items())
    with pytest.raises(EdgeBcsError, match="begun with train 'last:2', not 'all'"):
        trained("all", schedule=Schedule(epochs=3), output=Output(tmp_path, resume=True))


@pytest.mark.parametrize(
    ("part", "more", "message"),
    [
        ("first", {}, "what is trained is all, head, last:N"),
        ("last:99", {}, "more layers than the 8 with weights"),
        ("head", {"batch_norm": "batch"}, "trains no batch norm"),
        ("head", {"method": Method(rewire="by-layer")}, "rewiring by layer concerns the whole network"),
        ("head", {"method": Method(gradual=Gradual("0.9"))}, "gradual pruning concerns the whole network"),
    ],
)
def test_refusals(part: str, more: dict[str, Any], message: str) -> None:
    sparse = mobile()
    before = sparse.state()
    with pytest.raises(EdgeBcsError, match=message):
        trained(part, sparse=sparse, **more)
    assert all(np.array_equal(one, sparse.state()[name]) for name, one in before.items())


def test_on_the_command_line(tmp_path: Path) -> None:
    network = ("--model", "resnet18", "--width", "0.0625", "--input-size", "16", "--sparsity", "0.9")
    common = (
        "train",
        "--data",
        "digits",
        *network,
        "--steps",
        "2",
        "--no-augment",
        "--batch-size",
        "8",
        "--objective",
        "natural",
    )
    states = []
    for name, more in (("a", ("--steps", "1")), ("b", ())):
        said = commands.run(
            *common, "--train", "head", "--batch-norm", "frozen", *more, "-o", tmp_path / name
        )
        assert said.exit_code == 0, said.output
        states.append(edge_bcs.load(tmp_path / name))
    part = trained_part(states[0], Part.parse("head"), (3, 16, 16))
    assert part is not None
    check_the_others_are_as_before(states[1], states[0], part)
    said = commands.run(*common, "--train", "head", "-o", tmp_path / "c")
    assert said.exit_code != 0 and "take --batch-norm frozen" in " ".join(said.output.split())
    said = commands.run(*common, "--method", "lwm", "--train", "head", "-o", tmp_path / "d")
    assert said.exit_code != 0 and "--train belongs to bcs" in " ".join(said.output.split())
