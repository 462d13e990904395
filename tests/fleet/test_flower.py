"""The rounds over Flower, with messages made by hand: no SuperLink, no SuperNodes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from helpers.artifacts import SIZE, write_artifact
from helpers.artifacts import state as hand_made
from helpers.signing import make_key, sign

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.fleet import flower
from edge_bcs.fleet.flower import ARRAYS, CONFIG, GAPS, METRICS, Asked, Merging, packed, unpacked
from edge_bcs.fleet.rounds import Rounds

Make = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


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


def by_node(messages: Iterable[Message]) -> list[Message]:
    """They come in an order that Flower draws."""
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def asked(merging: Merging, number: int, *nodes: int) -> list[Message]:
    arrays = packed(merging.met.state)
    return by_node(merging.configure_train(number, arrays, ConfigRecord({}), Nodes(*nodes)))  # type: ignore[arg-type]


def reply(
    message: Message, change: Callable[[dict[str, Any]], None] = lambda state: None, **told: int
) -> Message:
    state = dict(hand_made())
    change(state)
    gaps = state.pop(GAPS, None)
    arrays = dict(packed(state))
    if gaps is not None:
        arrays[GAPS] = Array(np.array(gaps, np.uint8))
    number = int(message.content[CONFIG]["server-round"])
    metrics = {"round": number, "step": 5, "seed": 7, "images": 64, **told}
    content = RecordDict({ARRAYS: ArrayRecord(arrays), METRICS: MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


def test_what_is_on_the_wire(artifact: Artifact) -> None:
    state = hand_made()
    record = packed(state)
    names = {name for name in state if not name.endswith("momentum")}
    assert set(record) == names - {"coo.index"} | {GAPS}
    back = unpacked(record, artifact)
    assert all(
        np.array_equal(back[name], 0 * array if "momentum" in name else array)
        for name, array in state.items()
    )
    for name, array, message in (
        ("coo.value", state["coo.value"][:-1], r"coo.value is float32\[4\] instead of float32\[5\]"),
        (GAPS, state["coo.index"], r"coo.gaps is int32\[5\] instead of bytes"),
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


def beyond(state: dict[str, Any]) -> None:
    state[GAPS] = [0, 0, 0, 0, SIZE - 4]


def fewer(state: dict[str, Any]) -> None:
    state[GAPS] = [0, 0, 0, 0x80, 0]


def nan(state: dict[str, Any]) -> None:
    state["dense.value"] = state["dense.value"] * np.nan


def far(state: dict[str, Any]) -> None:
    state["coo.value"] = state["coo.value"] * np.float32(1e6)


def shorter(state: dict[str, Any]) -> None:
    state["coo.value"] = state["coo.value"][:-1]


def test_a_round_goes_on_without_what_cannot_take_part(
    artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merging = strategy(tmp_path / "rounds", artifact)
    messages = asked(merging, 1, *range(1, 11))
    assert {int(message.content[CONFIG]["server-round"]) for message in messages} == {1}
    changes = [
        None,
        lambda state: state.update({"coo.value": state["coo.value"] + 1}),
        beyond,
        fewer,
        nan,
        far,
        shorter,
    ]
    replies = [
        reply(message, *([change] if change else []))
        for message, change in zip(messages, changes, strict=False)
    ]
    replies.append(reply(messages[7], round=9))
    replies.append(Message(content=RecordDict({}), reply_to=messages[8]))
    replies.append(Message(Error(0, "out of memory\x1b[2J"), reply_to=messages[9]))
    replies.append(reply(messages[0], far))
    with caplog.at_level("WARNING", "flwr"):
        arrays, metrics = merging.aggregate_train(1, replies)
    assert arrays is not None and metrics is not None and metrics["runs"] == 2
    for sentence in (
        "node 3 is left out: the gaps between positions lead beyond the network's 72 weights",
        "node 4 is left out: the gaps between positions are 4 numbers instead of 5",
        "node 7 is left out: coo.value is float32[4] instead of float32[5]",
        "node 8 is left out: it was sent in round 9, and is no answer in round 1",
        "node 9 is left out: it does not say what it is",
        "node 10 is left out: out of memory\\x1b[2J",
        "node 1 is left out: it has answered in this round already",
        "node-6 have a norm of",
    ):
        assert sentence in caplog.text, sentence
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
    # Asked for another length, as by another fleet: it trains anew.
    arrays = packed(merging.met.state)
    longer = list(merging.configure_train(2, arrays, ConfigRecord({"steps": 3}), Nodes(1, 2)))  # type: ignore[arg-type]
    assert flower.train(longer[0], context).content[METRICS]["images"] == 3 * artifact.batch_size


def asked_to_measure(merging: Merging, number: int, *nodes: int, **how: int) -> list[Message]:
    config = ConfigRecord({"attack-steps": 1, "limit": 0, **how})
    arrays = packed(merging.met.state)
    return by_node(merging.configure_evaluate(number, arrays, config, Nodes(*nodes)))  # type: ignore[arg-type]


def test_boards_measure_what_a_round_became(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    artifact = Artifact.read(tiny_artifact())
    merging = Merging(
        Rounds(tmp_path / "rounds", "server", boards=1), artifact, min_train_nodes=1, fraction_evaluate=1.0
    )
    assert asked_to_measure(merging, 1, 1, 2) == []  # nothing was merged
    sent = list(merging.configure_train(1, packed(merging.met.state), ConfigRecord({}), Nodes(1, 2)))  # type: ignore[arg-type]
    content = RecordDict(
        {
            ARRAYS: packed(merging.met.state),
            METRICS: MetricRecord({"round": 1, "step": 3, "seed": 0, "images": 64}),
        }
    )
    merging.aggregate_train(1, [Message(content=content, reply_to=sent[0])])
    config: dict[str, Any] = {"artifact": str(artifact.path), "data": str(digits), "run": "none"}
    context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
    messages = asked_to_measure(merging, 1, 1, 2)
    answer = flower.evaluate(messages[0], context)
    with Trainer(artifact.path) as trainer:
        expected = trainer.evaluate(str(digits), 1)
    told = answer.content[METRICS]
    assert (told["round"], told["images"]) == (1, 16)
    assert told["accuracy"] == expected["accuracy"]
    assert told["robust_accuracy"] == expected["robust_accuracy"]


def measured(message: Message, **told: float) -> Message:
    told = {"round": 1, "images": 10, "accuracy": 0.5, "robust_accuracy": 0.25, **told}
    return Message(content=RecordDict({METRICS: MetricRecord(dict(told))}), reply_to=message)


def test_measurements_are_weighted_and_what_is_none_is_named(
    artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merging = Merging(
        Rounds(tmp_path, "server", boards=1), artifact, min_train_nodes=1, fraction_evaluate=1.0
    )
    merging.aggregate_train(1, [reply(message) for message in asked(merging, 1, 1, 2)])
    messages = asked_to_measure(merging, 1, *range(1, 9))
    answers = [
        measured(messages[0], images=30, accuracy=1.0),
        measured(messages[1], images=10),
        measured(messages[2], images=10, accuracy=0.0, robust_accuracy=0.0),
        measured(messages[3], accuracy=float("nan")),
        measured(messages[4], images=0),
        measured(messages[5], round=2),
        Message(content=RecordDict({}), reply_to=messages[6]),
        Message(Error(0, "no data"), reply_to=messages[7]),
        measured(messages[0], accuracy=0.0),
    ]
    with caplog.at_level("WARNING", "flwr"):
        found = merging.aggregate_evaluate(1, answers)
    assert found is not None and dict(found) == {
        "boards": 3,
        "images": 50,
        "accuracy": pytest.approx(0.7),  # (30·1 + 10·0.5 + 10·0) / 50
        "robust_accuracy": pytest.approx(0.2),
    }
    assert caplog.text.count("is left out") == 6
    kept = json.loads((tmp_path / "round-0001" / "evaluation.json").read_text())
    assert [one["images"] for one in kept["each"]] == [30, 10, 10]
    assert merging.aggregate_evaluate(1, []) is None
    # One that says it has measured a million times as much counts ten times the median.
    many = [measured(m, images=10) for m in messages[:2]] + [
        measured(messages[2], images=10**7, accuracy=0.0)
    ]
    found = merging.aggregate_evaluate(1, many)
    assert found is not None and found["accuracy"] == pytest.approx(10 / 120)


def test_a_board_takes_no_artifact_that_its_key_did_not_sign(
    tiny_artifact: Make, digits: Path, tmp_path: Path
) -> None:
    private, public = make_key(tmp_path, "ours")
    _, other = make_key(tmp_path, "other")
    signed = sign(Path(shutil.copytree(tiny_artifact(), tmp_path / "signed")), private)
    artifact = Artifact.read(signed)
    merging = Merging(Rounds(tmp_path / "rounds", "server", boards=1), artifact, min_train_nodes=1)
    (message, *_) = list(
        merging.configure_train(1, packed(merging.met.state), ConfigRecord({"steps": 1}), Nodes(1, 2))  # type: ignore[arg-type]
    )
    config: dict[str, Any] = {"artifact": str(signed), "data": str(digits), "run": str(tmp_path / "run")}

    def answer(key: Path) -> Message:
        node = {**config, "trust-key": str(key)}
        return flower.train(
            message, Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={})
        )

    refused = answer(other)
    assert refused.has_error() and "other.pub.pem" in refused.error.reason
    assert not (tmp_path / "run").exists()
    assert not answer(public).has_error()
    # The maker has replaced it since, and this board has accepted the later one.
    (tmp_path / "run.release").write_text('{"accepted_release": 2}')
    old = answer(public)
    assert old.has_error() and "release 2 was accepted here before" in old.error.reason


def test_a_board_that_flower_simulates_has_a_number_alone() -> None:
    def settings(node: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        return flower.settings_of(
            Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config=run)
        )

    run = {"artifact": "a", "data": "d/{board}", "run": "r/{board}", "folder": "f", "trust-key": ""}
    simulated = settings({"partition-id": 3, "num-partitions": 5}, run)
    assert simulated == {"artifact": "a", "data": "d/3", "run": "r/3"}
    # Whoever starts a run says nothing about the folders of a real board.
    with pytest.raises(
        EdgeBcsError, match=r"this board does not say its data: flower-supernode --node-config"
    ):
        settings({"partition-id": 3, "artifact": "mine"}, run)
    with pytest.raises(EdgeBcsError, match=r"does not say its artifact"):
        settings({}, run)


def app_config() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")
    content = tomllib.loads((ROOT / "examples" / "flower" / "pyproject.toml").read_text())
    return dict(content["tool"]["flwr"]["app"]["config"])


def test_what_the_documents_ask_can_be_asked() -> None:
    """Flower takes only names that the app has, and puts what is given over the app's own."""
    commands = re.findall(r"--run-config '([^']*)'", (ROOT / "docs" / "fleets.md").read_text())
    assert len(commands) >= 2
    for words in commands:
        given = dict(word.split("=", 1) for word in words.split())
        assert not given.keys() - app_config().keys()
        asked = Asked.read({**app_config(), **{name: json.loads(text) for name, text in given.items()}})
        assert asked.length == {"epochs": 2} and (asked.rounds, asked.boards) == (20, 3)
    assert Asked.read(app_config()).length == {}  # an epoch


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 5, "epochs": 2}, "in steps or in epochs, and 0 for the other"),
        ({"steps": -1}, "steps must lie between 0 and 1e+09, and is -1"),
        ({"boards": 0}, "boards must lie between 1 and"),
        ({"fraction": 2.0}, "fraction must lie between 0 and 1, and is 2.0"),
        ({"evaluate": float("nan")}, "evaluate must lie between 0 and 1, and is nan"),
        ({"num-rounds": "many"}, "num-rounds must be a whole number, not 'many'"),
        ({"timeout": True}, "timeout must be a number, not True"),
        ({"folder": ""}, "the server does not know its folder"),
    ],
)
def test_what_nobody_can_do_is_refused_at_once(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EdgeBcsError, match=re.escape(sentence)):
        Asked.read({**app_config(), **change})
