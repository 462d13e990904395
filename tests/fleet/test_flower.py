"""The rounds over Flower, with messages made by hand: no SuperLink, no SuperNodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from helpers.artifacts import state as hand_made
from helpers.artifacts import write_artifact

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.fleet import flower
from edge_bcs.fleet.flower import ARRAYS, CONFIG, METRICS, Merging, packed, unpacked
from edge_bcs.fleet.rounds import Rounds

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def as_in_flowers_process() -> None:
    """Which task of which run this is, Flower tells the processes that it starts."""
    for name in ("run_id", "node_id", "task_id"):
        setattr(TaskIdentity, name, 1)


class Nodes:
    """What the strategy asks of Flower's grid: which nodes there are."""

    def __init__(self, *nodes: int) -> None:
        self._nodes = nodes

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact.read(write_artifact(tmp_path / "artifact"))


def strategy(folder: Path, artifact: Artifact) -> Merging:
    return Merging(Rounds(folder, "server", boards=1), artifact, min_train_nodes=1, min_available_nodes=2)


def asked(merging: Merging, number: int, *nodes: int) -> list[Message]:
    arrays = packed(merging.met.state)
    return list(merging.configure_train(number, arrays, ConfigRecord({}), Nodes(*nodes)))  # type: ignore[arg-type]


def reply(
    message: Message, change: Callable[[dict[str, Any]], None] = lambda state: None, **told: int
) -> Message:
    state = dict(hand_made())
    change(state)
    arrays = {name: Array(array) for name, array in state.items() if not name.endswith("momentum")}
    number = int(message.content[CONFIG]["server-round"])
    metrics = {"round": number, "step": 5, "seed": 7, "images": 64, **told}
    content = RecordDict({ARRAYS: ArrayRecord(arrays), METRICS: MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


def test_what_is_on_the_wire(artifact: Artifact) -> None:
    state = hand_made()
    record = packed(state)
    assert set(record) == {name for name in state if not name.endswith("momentum")}
    back = unpacked(record, artifact)
    assert all(
        np.array_equal(back[name], 0 * array if "momentum" in name else array)
        for name, array in state.items()
    )
    for name, array, message in (
        ("coo.value", state["coo.value"][:-1], r"coo.value is float32\[4\] instead of float32\[5\]"),
        ("coo.index", state["coo.index"].astype(np.int64), r"coo.index is int64\[5\] instead of int32\[5\]"),
        ("dense.value", state["dense.value"][:, None], r"dense.value is float32\[9, 1\]"),
    ):
        with pytest.raises(EdgeBcsError, match=message):
            unpacked(ArrayRecord({**record, name: Array(array)}), artifact)
    with pytest.raises(EdgeBcsError, match=r"coo.value is missing"):
        unpacked(
            ArrayRecord({name: array for name, array in record.items() if name != "coo.value"}), artifact
        )
    garbage = Array("float32", (5,), "numpy.ndarray", b"not an array")
    with pytest.raises(EdgeBcsError, match=r"coo.value cannot be read"):
        unpacked(ArrayRecord({**record, "coo.value": garbage}), artifact)


def unsorted(state: dict[str, Any]) -> None:
    state["coo.index"] = state["coo.index"][::-1].copy()


def nan(state: dict[str, Any]) -> None:
    state["dense.value"] = state["dense.value"] * np.nan


def far(state: dict[str, Any]) -> None:
    state["coo.value"] = state["coo.value"] * np.float32(1e6)


def shorter(state: dict[str, Any]) -> None:
    state["coo.value"] = state["coo.value"][:-1]


def test_a_round_goes_on_without_what_cannot_take_part(artifact: Artifact, tmp_path: Path) -> None:
    merging = strategy(tmp_path / "rounds", artifact)
    messages = asked(merging, 1, *range(1, 9))
    assert {int(message.content[CONFIG]["server-round"]) for message in messages} == {1}
    changes = [
        None,
        lambda state: state.update({"coo.value": state["coo.value"] + 1}),
        unsorted,
        nan,
        far,
        shorter,
    ]
    replies = [
        reply(message, *([change] if change else []))
        for message, change in zip(messages, changes, strict=False)
    ]
    replies.append(reply(messages[6], round=9))
    replies.append(Message(content=RecordDict({}), reply_to=messages[7]))
    replies.append(Message(Error(0, "out of memory"), reply_to=messages[7]))
    arrays, metrics = merging.aggregate_train(1, replies)
    assert arrays is not None and metrics is not None and metrics["runs"] == 2
    merged = unpacked(arrays, artifact)
    assert merged["coo.value"] == pytest.approx(hand_made()["coo.value"] + 0.5, rel=1e-6)
    kept = read_state(Artifact.read(tmp_path / "rounds" / "round-0001" / "merged"))[0]
    assert all(np.array_equal(kept[name], array) for name, array in merged.items())
    # The next round begins with it; nobody answers, and all stays as it was.
    following = asked(merging, 2, 1, 2)
    assert following[0].content[CONFIG]["step"] == 5
    assert merging.aggregate_train(2, []) == (None, None)
    assert merging.aggregate_train(3, [reply(following[0], nan)]) == (None, None)


def test_a_server_that_is_started_again_goes_on(artifact: Artifact, tmp_path: Path) -> None:
    first = strategy(tmp_path, artifact)
    first.aggregate_train(1, [reply(message) for message in asked(first, 1, 1, 2)])
    Rounds(tmp_path, "node-1").send(
        2, artifact, hand_made(), {"step": "9", "seed": "7", "images": "1"}, None
    )  # it was stopped in round 2
    again = strategy(tmp_path, artifact)
    assert (again.met.step, Rounds(tmp_path, "x").last_merged()) == (5, 1)
    messages = asked(again, 1, 1, 2)
    assert int(messages[0].content[CONFIG]["server-round"]) == 2
    _, metrics = again.aggregate_train(1, [reply(messages[0]), reply(messages[1])])
    assert metrics is not None and metrics["runs"] == 2
    assert Rounds(tmp_path, "x").last_merged() == 2


def test_a_board_trains(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    artifact = Artifact.read(tiny_artifact())
    merging = strategy(tmp_path / "rounds", artifact)
    config: dict[str, Any] = {
        "artifact": str(artifact.path),
        "data": str(digits),
        "run": str(tmp_path / "run"),
    }
    context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
    steps = []
    for number in (1, 2):
        arrays = packed(merging.met.state)
        messages = list(merging.configure_train(number, arrays, ConfigRecord({"steps": 2}), Nodes(1, 2)))  # type: ignore[arg-type]
        answer = flower.train(messages[0], context)
        told = answer.content[METRICS]
        assert (told["round"], told["images"]) == (number, 2 * artifact.batch_size)
        steps.append(told["step"])
        assert merging.aggregate_train(number, [answer])[0] is not None
    assert steps == [2, 4]
    # Asked again, as after it was killed: the round that it was in is done.
    again = flower.train(messages[0], context)
    assert all(
        np.array_equal(again.content[ARRAYS][name].numpy(), answer.content[ARRAYS][name].numpy())
        for name in answer.content[ARRAYS]
    )
