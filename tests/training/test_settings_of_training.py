"""What `train` is told: old keywords give the plan of the new ones, and a plan is written as it ever was."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.training import digits, tiny

import edge_bcs
from edge_bcs import Attack, Compute, EdgeBcsError, Feed, Hyper, Method, Output, Schedule
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.core.errors import EdgeBcsDeprecationWarning
from edge_bcs.training import loop
from edge_bcs.training.plan import TrainingPlan
from edge_bcs.training.settings import PLACES, OldKeywords

OLD: dict[str, Any] = {
    "rewire": "by-layer",
    "steps": 7,
    "schedule": "cosine",
    "learning_rate": 0.02,
    "weight_decay": 1e-3,
    "momentum": 0.8,
    "noise": 1e-5,
    "epsilon": 4 / 255,
    "step_size": 1 / 255,
    "attack_steps": 3,
    "augment": False,
    "pseudo_labelled": digits(8),
    "validation": 0.25,
    "engine": "torch",
    "device": "cpu",
    "precision": "bf16",
    "compile": True,
    "threads": 1,
    "resume": True,
    "save_seconds": 3.0,
}
NEW: dict[str, Any] = {
    "method": Method(rewire="by-layer"),
    "schedule": Schedule(epochs=3, steps=7, kind="cosine"),
    "hyper": Hyper(learning_rate=0.02, weight_decay=1e-3, momentum=0.8, noise=1e-5),
    "attack": Attack(epsilon=4 / 255, step_size=1 / 255, steps=3),
    "feed": Feed(augment=False, validation=0.25, pseudo_labelled=OLD["pseudo_labelled"]),
    "compute": Compute("torch", device="cpu", precision="bf16", compile=True, threads=1),
}
ASKED: dict[str, Any] = {"objective": "rst", "beta": 2, "batch_size": 8, "batch_norm": "frozen", "seed": 4}
WRITTEN = {
    "objective": "rst", "beta": 2, "method": "bcs", "rewire": "by-layer", "engine": "torch", "processes": 1,
    "epochs": 3, "steps": 7, "batch_size": 8, "learning_rate": 0.02, "weight_decay": 1e-3,
    "schedule": "cosine", "momentum": 0.8, "noise": 1e-5, "epsilon": 4 / 255, "step_size": 1 / 255,
    "attack_steps": 3, "batch_norm": "frozen", "precision": "bf16", "augment": False, "validation": 0.25,
    "samples": 40, "seed": 4,
}  # fmt: skip
"""As the plan stands in checkpoints since 0.1."""


class Planned(Exception):  # noqa: N818
    """What `run_plan` was asked for."""


def asked(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[TrainingPlan, dict[str, Any]]:
    def stand_in(sparse: object, data: object, plan: object, update: object, **more: object) -> None:
        raise Planned(plan, more)

    monkeypatch.setattr(loop, "run_plan", stand_in)
    with pytest.raises(Planned) as caught:
        edge_bcs.train(edge_bcs.sparsify(tiny(), 0.9), digits(40), **arguments)
    plan, more = caught.value.args
    assert len(more.pop("pseudo_labelled") or ()) == (8 if arguments.get("objective") == "rst" else 0)
    return plan, more


def test_every_old_keyword_has_a_place_that_is_there() -> None:
    assert PLACES.keys() == {*OldKeywords.__annotations__, "schedule"} == OLD.keys()
    for parameter, kind, field in PLACES.values():
        assert parameter in edge_bcs.train.__annotations__
        assert field in {entry.name for entry in fields(kind)}


def test_old_and_new_spelling_give_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path, resume=True, save_seconds=3.0)
    new = asked(monkeypatch, output=output, **ASKED, **NEW)
    with pytest.warns(EdgeBcsDeprecationWarning, match=r"schedule=edge_bcs\.Schedule\(.*kind=….*Compute\("):
        old = asked(monkeypatch, epochs=3, output=tmp_path, **ASKED, **OLD)
    assert old == new and new[1]["output"] == output and new[1]["compute"] == NEW["compute"]
    # In 0.1 the decay stayed, which in a cosine outlives the gradient: that must be asked for, and is told.
    assert list(new[0].described().items()) == list({**WRITTEN, "decay": "falls"}.items())


def test_what_is_left_out_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, more = asked(monkeypatch, compute=Compute(device="cpu"))
    assert plan.described() == {
        **WRITTEN, "objective": "at", "beta": 0.0, "rewire": "uniform", "epochs": 200, "steps": None,
        "batch_size": 128, "learning_rate": 0.1, "weight_decay": 5e-4, "schedule": "steps", "momentum": 0.9,
        "noise": 1e-6, "epsilon": 8 / 255, "step_size": 2 / 255, "attack_steps": 10, "batch_norm": "batch",
        "precision": "f32", "augment": True, "validation": 0.02, "seed": 0,
    }  # fmt: skip
    assert more["output"] == Output() and more["progress"]
    static, _ = asked(monkeypatch, method="random", epochs=5, compute=Compute(device="cpu"))
    assert (static.rewire, static.hyper.noise, static.schedule.epochs) == ("none", 0.0, 5)


@pytest.mark.filterwarnings("ignore::edge_bcs.core.errors.EdgeBcsDeprecationWarning")
@pytest.mark.parametrize(
    ("mixed", "sentence"),
    [
        ({"attack": Attack(steps=3), "attack_steps": 4}, "given attack_steps= and another in attack="),
        ({"schedule": Schedule(steps=3), "steps": 4}, "given steps= and another in schedule="),
        ({"schedule": Schedule(steps=3), "epochs": 4}, "given epochs= and another in schedule="),
        ({"compute": Compute("sparse"), "device": "cpu"}, "given device= and another in compute="),
        (
            {"feed": Feed(augment=False), "pseudo_labelled": [1]},
            "given pseudo_labelled= and another in feed=",
        ),
        ({"output": Output("run"), "resume": True}, "given resume= and another in output="),
        ({"method": Method(rewire="by-layer"), "rewire": "uniform"}, "given rewire= and another in method="),
        ({"rewire": "none"}, "the rewiring is uniform or by-layer, not 'none'"),
    ],
)
def test_what_contradicts_itself_is_refused(mixed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EdgeBcsError, match=sentence) as error:
        edge_bcs.train(edge_bcs.sparsify(tiny(), 0.9), digits(40), **mixed)
    assert "\n" not in str(error.value)


def test_a_checkpoint_says_the_plan_as_it_ever_did(tmp_path: Path) -> None:
    """Old spelling or new, the bytes are the same; those of 0.1 are told by `WRITTEN`."""
    feed, cpu = Feed(augment=False, validation=0.25), Compute(device="cpu")
    same: dict[str, Any] = {"batch_size": 8, "progress": False}
    new: dict[str, Any] = {
        "schedule": Schedule(steps=2),
        "attack": Attack(steps=1),
        "feed": feed,
        "compute": cpu,
    }
    old: dict[str, Any] = {
        "steps": 2,
        "attack_steps": 1,
        "augment": False,
        "validation": 0.25,
        "device": "cpu",
    }
    edge_bcs.train(edge_bcs.sparsify(tiny(), 0.9), digits(40), output=tmp_path / "new", **same, **new)
    with pytest.warns(EdgeBcsDeprecationWarning):
        edge_bcs.train(edge_bcs.sparsify(tiny(), 0.9), digits(40), output=tmp_path / "old", **same, **old)
    for name in ("checkpoint.safetensors", "last.safetensors", "epochs.jsonl"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()
    plan = json.loads(read_checkpoint(tmp_path / "new" / "last.safetensors").metadata["plan"])
    assert list(plan) == list(WRITTEN)
