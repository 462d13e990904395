"""Keywords that `export` had in 0.1: they give the manifest of the new ones, and a warning."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.exporters.settings import PLACES, OldKeywords
from helpers.signing import make_key

import edge_bcs
from edge_bcs import Attack, EdgeBcsError, Hyper, Memory, Publishing
from edge_bcs.core.errors import EdgeBcsDeprecationWarning

FIXED: dict[str, Any] = {"input_shape": (1, 8, 8), "batch_size": 8, "validate": False}


def sparse() -> edge_bcs.SparseModel:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Flatten())
    network.append(torch.nn.Linear(16 * 36, 3))
    return edge_bcs.sparsify(network, 0.5, seed=0)


def test_every_old_keyword_has_a_place_that_is_there() -> None:
    assert PLACES.keys() == OldKeywords.__annotations__.keys()
    for parameter, kind, field in PLACES.values():
        assert parameter in edge_bcs.export.__annotations__
        assert field in {entry.name for entry in fields(kind)}


def test_old_and_new_spelling_give_the_same_manifest(tmp_path: Path) -> None:
    key = make_key(tmp_path, "key")[0]
    new = edge_bcs.export(
        sparse(),
        tmp_path / "new",
        memory=Memory("1MiB", micro_batch=3, store="bf16"),
        attack=Attack(epsilon=4 / 255, step_size=1 / 255, steps=3),
        hyper=Hyper(learning_rate=0.02, weight_decay=1e-3, momentum=0.8, noise=1e-5),
        publish=Publishing(plain_eval=True, sign_key=key, release=3),
        **FIXED,
    )
    with pytest.warns(EdgeBcsDeprecationWarning, match=r"memory=edge_bcs\.Memory\(store=…, micro_batch=…"):
        old = edge_bcs.export(
            sparse(),
            tmp_path / "old",
            memory="1MiB",
            store="bf16",
            micro_batch=3,
            epsilon=4 / 255,
            step_size=1 / 255,
            attack_steps=3,
            learning_rate=0.02,
            weight_decay=1e-3,
            momentum=0.8,
            noise=1e-5,
            plain_eval=True,
            sign_key=key,
            release=3,
            **FIXED,
        )
    assert old.manifest == new.manifest and (old.release, old.signature) == (3, "unchecked")
    assert old.manifest["hyper"] == {
        "learning_rate": 0.02, "weight_decay": 1e-3, "momentum": 0.8, "noise": 1e-5, "epochs": 200,
    }  # fmt: skip
    assert (old.budget, old.micro_batch, old.objective.attack.steps) == (1 << 20, 3, 3)
    assert "eval_model.plain.onnx" in old.manifest["files"]


@pytest.mark.filterwarnings("ignore::edge_bcs.core.errors.EdgeBcsDeprecationWarning")
def test_both_spellings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match=r"^export was given micro_batch= and another in memory=; leave"):
        edge_bcs.export(sparse(), tmp_path / "a", memory=Memory("1MiB"), micro_batch=3, **FIXED)
    with pytest.raises(EdgeBcsError, match=r"^export was given epsilon= and another in attack="):
        edge_bcs.export(sparse(), tmp_path / "a", attack=Attack(steps=3), epsilon=0.1, **FIXED)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Memory("lots"), "lots"),
        (lambda: Memory(micro_batch=0), "micro_batch must be a whole number from 1 to 65536, not 0"),
        (lambda: Memory(store="f16"), "the store is f32 or bf16, not 'f16'"),
        (lambda: Publishing(release=0), "a release must be a whole number from 1 to"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(EdgeBcsError) as error:
        make()
    assert sentence in str(error.value) and "\n" not in str(error.value)
