"""The same rounds over Flower: a ServerApp whose strategy merges by the rule, and a ClientApp over `Trainer`.

For one of Flower's apps (`flwr run`, flwr 1.42 or newer), whose module has `server` and `client` from here;
`examples/flower` is one. On the wire are values, the gaps between positions (`edge_bcs.fleet.wire`), other
parameters and running statistics: no graphs, no momentum, no photographs.

The server keeps what the boards send as runs in the folder of `edge_bcs.fleet.rounds`, so that what is
refused there is refused here, by the same sentences, and a server that is started again goes on after its
last round.

| run configuration (`tool.flwr.app.config`) | what |
| --- | --- |
| `artifact` | the server's artifact, with which round 1 begins |
| `folder` | where the rounds are kept |
| `num-rounds` | how many more |
| `timeout` | seconds after which a round goes on without those that are missing |
| `boards`, `fraction` | how many there must be to begin, and the share of them that takes part in a round |
| `steps`, `epochs` | how long a board trains in a round, one of them; both 0: an epoch |
| `robust` | "median", or "" |
| `evaluate` | share of the boards that measure what a round became on their test images; 0: none |
| `attack-steps`, `evaluate-images` | of PGD, 0 for clean accuracy alone; how many images, 0 for all |

| node configuration (`flower-supernode --node-config`) | what |
| --- | --- |
| `artifact` | this board's artifact: of the same network, for its own memory |
| `data` | what it learns from |
| `run` | the folder of its own run, which stays from round to round |
| `trust-key` | public key that must have signed the artifact, of no older release than before; or left out |
| `threads`, `memory` | as for `edge-bcs finetune` |

Boards that Flower simulates have a number instead of a node configuration: for all of them it stands in the
run configuration, with "{board}" where the number is to be. What a board cannot do it answers with one
sentence, which the server's log has.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import write_json
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.text import shown
from edge_bcs.fleet.members import LARGEST_WEIGHT, round_of
from edge_bcs.fleet.rounds import Met, Rounds, begin, open_round
from edge_bcs.fleet.wire import coded, decoded
from edge_bcs.runtime import release
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import is_run_of, layout_of, read_slot

Numbers = np.ndarray[Any, Any]
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
INDEX, GAPS = "coo.index", "coo.gaps"
BEGAN = "fleet.began"
"""What the run of a board says beside its round: a digest of what it was asked."""
EVALUATION = "evaluation.json"
_MOST_IMAGES = 1 << 40
_OF_A_BOARD = ("artifact", "data", "run", "trust-key", "threads", "memory")

server = ServerApp()
client = ClientApp()


# What is on the wire


def packed(state: Mapping[str, Numbers]) -> ArrayRecord:
    """Return what of a state is sent: all but momentum, and gaps instead of positions."""
    sent = {name: array for name, array in state.items() if not name.endswith(".momentum")}
    sent[GAPS] = coded(sent.pop(INDEX))
    return ArrayRecord({name: Array(array) for name, array in sent.items()})


def unpacked(record: ArrayRecord, artifact: Artifact) -> dict[str, Numbers]:
    """Return the state that was sent, without momentum; EdgeBcsError if it is none of this network's size."""
    state = {}
    for name, (kind, length) in layout_of(artifact).items():
        if name.endswith(".momentum"):
            state[name] = np.zeros(length, kind)
            continue
        if name == INDEX:
            gaps = _read(record, GAPS)
            if gaps.dtype != np.uint8 or gaps.ndim != 1:
                raise EdgeBcsError(f"{GAPS} is {gaps.dtype}{list(gaps.shape)} instead of bytes.")
            state[name] = decoded(gaps, length, artifact.size, kind)
            continue
        array = _read(record, name)
        if array.dtype != np.dtype(kind) or array.shape != (length,):
            raise EdgeBcsError(f"{name} is {array.dtype}{list(array.shape)} instead of {kind}[{length}].")
        state[name] = array
    return state


def _read(record: ArrayRecord, name: str) -> Numbers:
    if name not in record:
        raise EdgeBcsError(f"{name} is missing.")
    try:
        return np.asarray(record[name].numpy())
    except (ValueError, TypeError, EOFError, OSError):
        raise EdgeBcsError(f"{name} cannot be read.") from None


def _names(record: ConfigRecord) -> tuple[str, ...] | None:
    """Names of classes in a message; None where they are unknown."""
    names = record.get("classes")
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None


# The server


class Merging(FedAvg):  # type: ignore[misc]
    """Flower's strategy that samples boards as FedAvg does, and merges what they learned by the rule.

    Args:
        rounds: where runs are kept. artifact: the server's. sampling: what FedAvg takes of nodes; without
            ``fraction_evaluate`` no board measures what a round became.

    Attributes:
        met: what the last round became, with which the next begins.
    """

    def __init__(self, rounds: Rounds, artifact: Artifact, **sampling: Any) -> None:
        super().__init__(**{"fraction_evaluate": 0.0, "min_evaluate_nodes": 1, **sampling})
        self._rounds, self._artifact = rounds, artifact
        self._before = self._merged = rounds.last_merged()
        if self._before:
            self.met = rounds.merged(self._before, artifact)
        else:
            slot = read_slot(artifact)
            step, seed = int(slot.metadata["step"]), int(slot.metadata["seed"])
            self.met = Met(slot.tensors, step, seed, artifact.classes, {})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask boards to train; rounds are counted from the first that this folder ever saw."""
        number = self._before + server_round
        # What was sent in a round that a server did not finish is asked for again.
        shutil.rmtree(self._rounds.place(number), ignore_errors=True)
        config["step"], config["seed"] = self.met.step, self.met.seed
        config["classes"] = list(self.met.names or ())
        messages: Iterable[Message] = super().configure_train(number, arrays, config, grid)
        # From here on those that vanish are not waited for.
        self.min_available_nodes = self.min_train_nodes = 1
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Keep what was sent, and merge it; what cannot take part is named, and the round goes on."""
        number = self._before + server_round
        self._each_once(number, replies, self._keep)
        try:
            met = self.met = self._rounds.meet(number, self._artifact, wait=0)
        except EdgeBcsError as error:
            log(WARNING, "Round %s: nothing was merged: %s", number, error)
            return None, None
        for one in met.report.get("left_out", []):
            log(WARNING, "Round %s: left out: %s", number, one["why"])
        overlap = met.report.get("overlap", {}).get("pairwise", 1.0)
        runs = len(met.report.get("runs", []))
        log(INFO, "Round %s: merged %s runs, %.1f %% of their masks in common", number, runs, 100 * overlap)
        self._merged = number
        return packed(met.state), MetricRecord({"runs": runs, "overlap": overlap, "step": met.step})

    def _each_once(
        self, number: int, replies: Iterable[Message], take: Callable[[int, Message], None]
    ) -> None:
        """Take one reply of each node; what cannot be taken is named."""
        nodes: set[int] = set()
        for message in replies:
            node = message.metadata.src_node_id
            try:
                if node in nodes:
                    raise EdgeBcsError("it has answered in this round already; its first answer counts.")
                if message.has_error():
                    raise EdgeBcsError(str(message.error.reason))
                nodes.add(node)
                take(number, message)
            except EdgeBcsError as error:
                log(WARNING, "Round %s: node %s is left out: %s", number, node, shown(str(error)))

    def _keep(self, number: int, message: Message) -> None:
        """Keep what a board sent as a run; EdgeBcsError if it is none."""
        content, node = message.content, f"node-{message.metadata.src_node_id}"
        try:
            arrays, told = content[ARRAYS], content[METRICS]
            metadata = {name: str(int(told[name])) for name in ("step", "seed", "images")}
            of_round = int(told["round"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise EdgeBcsError("it does not say what it is.") from None
        _check_round(of_round, number)
        board = Rounds(self._rounds.folder, node)
        classes = _names(content[CONFIG]) if CONFIG in content else None
        board.send(number, self._artifact, unpacked(arrays, self._artifact), metadata, classes)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask boards to measure what a round became; nobody, where nothing was merged."""
        number = self._before + server_round
        if self._merged != number:
            return []
        config["classes"] = list(self.met.names or ())
        messages: Iterable[Message] = super().configure_evaluate(number, arrays, config, grid)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the means over what boards measured, weighted by their images, no board more than ten times
        the median; what is no measurement is named. The round's folder keeps each of them."""
        number = self._before + server_round
        found: list[dict[str, Any]] = []
        self._each_once(number, replies, lambda number, message: found.append(_measurement(number, message)))
        if not found:
            return None
        images = np.array([one["images"] for one in found], np.float64)
        weights = np.minimum(images, LARGEST_WEIGHT * np.median(images))
        means = {
            name: float(np.average([one[name] for one in found], weights=weights))
            for name in ("accuracy", "robust_accuracy")
            if all(name in one for one in found)
        }
        whole = {"boards": len(found), "images": int(images.sum()), **means}
        write_json(self._rounds.place(number) / EVALUATION, {**whole, "each": found})
        told = ", ".join(f"{100 * value:.1f} % {name.replace('_', ' ')}" for name, value in means.items())
        log(INFO, "Round %s: measured by %s boards: %s", number, len(found), told)
        return MetricRecord(whole)


def _measurement(number: int, message: Message) -> dict[str, Any]:
    """What a board measured; EdgeBcsError if it is none."""
    try:
        told = message.content[METRICS]
        of_round, images = int(told["round"]), int(told["images"])
        shares = {name: float(told[name]) for name in ("accuracy", "robust_accuracy") if name in told}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise EdgeBcsError("it does not say what it measured.") from None
    _check_round(of_round, number)
    if "accuracy" not in shares or not all(0 <= share <= 1 for share in shares.values()):
        raise EdgeBcsError("what it measured are no shares.")
    if not 0 < images <= _MOST_IMAGES:
        raise EdgeBcsError(f"it measured {images} images.")
    return {"node": str(message.metadata.src_node_id), "images": images, **shares}


def _check_round(found: int, number: int) -> None:
    """Raise EdgeBcsError for what was sent in another round, and is sent again."""
    if found != number:
        raise EdgeBcsError(f"it was sent in round {found}, and is no answer in round {number}.")


@dataclass(frozen=True)
class Asked:
    """What the configuration of a run asks of the server; see the table at the top of this module."""

    artifact: str
    folder: str
    rounds: int
    timeout: float
    boards: int
    fraction: float
    length: dict[str, int]
    robust: str | None
    evaluate: float
    attack_steps: int
    images: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Asked:
        """Return what a run configuration asks; EdgeBcsError for what nobody can do."""
        for name in ("artifact", "folder"):
            if not config.get(name):
                raise EdgeBcsError(
                    f"the server does not know its {name}: flwr run --run-config '{name}=\"…\"'."
                )
        length = {name: _number(config, name, 0, 0) for name in ("steps", "epochs")}
        if all(length.values()):
            raise EdgeBcsError("give the length of a round in steps or in epochs, and 0 for the other.")
        return cls(
            artifact=str(config["artifact"]),
            folder=str(config["folder"]),
            rounds=_number(config, "num-rounds", 3, 1),
            timeout=_number(config, "timeout", 3600.0, 1.0),
            boards=_number(config, "boards", 2, 1),
            fraction=_number(config, "fraction", 1.0, 0.0, 1.0),
            length={name: count for name, count in length.items() if count},
            robust=str(config.get("robust", "")) or None,
            evaluate=_number(config, "evaluate", 0.0, 0.0, 1.0),
            attack_steps=_number(config, "attack-steps", 20, 0),
            images=_number(config, "evaluate-images", 0, 0),
        )


def _number(config: Mapping[str, Any], name: str, default: Any, least: float, most: float = 1e9) -> Any:
    """A number of a configuration, of the type of its default; EdgeBcsError for one out of range."""
    given = config.get(name, default)
    whole = isinstance(default, int)
    if isinstance(given, bool) or not isinstance(given, int if whole else (int, float)):
        raise EdgeBcsError(f"{name} must be a {'whole ' if whole else ''}number, not {given!r}.")
    if not least <= given <= most:
        raise EdgeBcsError(f"{name} must lie between {least:g} and {most:g}, and is {given}.")
    return type(default)(given)


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run rounds until there have been as many more as the configuration says."""
    try:
        asked = Asked.read(context.run_config)
        rounds = Rounds(asked.folder, "server", boards=1, robust=asked.robust)
        artifact = Artifact.read(asked.artifact)
        lock = FolderLock(rounds.folder, again=False)
    except EdgeBcsError as error:
        log(ERROR, "%s", error)  # Flower's own account of it is a traceback
        raise
    with lock:
        strategy = Merging(
            rounds,
            artifact,
            fraction_train=asked.fraction,
            min_train_nodes=min(asked.boards, 2),
            min_available_nodes=asked.boards,
            fraction_evaluate=asked.evaluate,
        )
        strategy.start(
            grid=grid,
            initial_arrays=packed(strategy.met.state),
            num_rounds=asked.rounds,
            timeout=asked.timeout,
            train_config=ConfigRecord(dict(asked.length)),
            evaluate_config=ConfigRecord({"attack-steps": asked.attack_steps, "limit": asked.images}),
        )


# A board

Handler = Callable[[Message, Context], Message]


def answering(handler: Handler) -> Handler:
    """Let a board answer with the sentence that says what is in its way, instead of ending in a traceback."""

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except EdgeBcsError as error:
            log(WARNING, "%s", error)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)

    return answer


def settings_of(context: Context) -> dict[str, Any]:
    """Return a board's settings: its node configuration. A board that Flower simulates has a number alone;
    what the others say themselves, the run's configuration says for these."""
    node = dict(context.node_config)
    if "partition-id" in node and not any(name in node for name in _OF_A_BOARD):
        run, number = context.run_config, str(node["partition-id"])
        node = {name: str(run[name]).replace("{board}", number) for name in _OF_A_BOARD if run.get(name)}
    for name in ("artifact", "data", "run"):
        if not node.get(name):
            raise EdgeBcsError(
                f"this board does not say its {name}: flower-supernode --node-config '{name}=\"…\"'."
            )
    return node


def _opened(node: Mapping[str, Any]) -> Artifact:
    """This board's artifact. If it trusts a key, that signed it, and none of a later release was accepted."""
    if not node.get("trust-key"):
        return Artifact.read(str(node["artifact"]))
    artifact = Artifact.read(str(node["artifact"]), [str(node["trust-key"])])
    release.check(artifact, Path(str(node["run"])))
    return artifact


def _machine(node: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kind(node[name]) for name, kind in (("threads", int), ("memory", str)) if node.get(name)}


@client.train()  # type: ignore[untyped-decorator]
@answering
def train(message: Message, context: Context) -> Message:
    """Train for a round, and return what was learned."""
    from edge_bcs.runtime import Trainer

    told, node = message.content[CONFIG], settings_of(context)
    number = int(told["server-round"])
    artifact, folder = _opened(node), Path(str(node["run"]))
    state = unpacked(message.content[ARRAYS], artifact)
    length: dict[str, Any] = {name: int(told[name]) for name in ("steps", "epochs") if name in told}
    began = _digest(state, {**length, "step": told["step"], "seed": told["seed"]})
    with FolderLock(folder):
        if not _is_under_way(folder, artifact, number, began):
            met = Met(state, int(told["step"]), int(told["seed"]), _names(told), {})
            begin(folder, artifact, met, number, notes={BEGAN: began})
            if node.get("trust-key"):
                release.remember(artifact, folder)
        with open_round(Trainer.resume(folder, **_machine(node))) as trainer:
            done = trainer.fit(str(node["data"]), **length, progress=False, save=folder)
            metrics: dict[str, Any] = {
                "round": number,
                "step": trainer.steps,
                "seed": trainer.seed,
                "images": trainer.images,
            }
            if "loss" in done:  # not where the round was done already
                metrics["loss"] = float(done["loss"])
            content = RecordDict(
                {
                    ARRAYS: packed(trainer.state()),
                    METRICS: MetricRecord(metrics),
                    CONFIG: ConfigRecord({"classes": list(trainer.classes or ())}),
                }
            )
    return Message(content=content, reply_to=message)


def _digest(state: Mapping[str, Numbers], asked: Mapping[str, Any]) -> str:
    """sha256 of what a board was asked to train, and how long."""
    digest = hashlib.sha256(repr(sorted(asked.items())).encode())
    for array in state.values():
        digest.update(array.tobytes())
    return digest.hexdigest()


def _is_under_way(folder: Path, artifact: Artifact, number: int, began: str) -> bool:
    """Whether the run of this board is in that round already, and began with the same: it was cut off, and
    goes on."""
    try:
        if not is_run_of(folder, artifact):
            return False
        saved = read_slot(Artifact.read(folder)).metadata
        return round_of(saved) == number and saved.get(BEGAN) == began
    except EdgeBcsError:
        return False


@client.evaluate()  # type: ignore[untyped-decorator]
@answering
def evaluate(message: Message, context: Context) -> Message:
    """Measure what a round became on the board's test images."""
    from edge_bcs.runtime import Trainer

    told, node = message.content[CONFIG], settings_of(context)
    artifact = _opened(node)
    state = unpacked(message.content[ARRAYS], artifact)

    def fill(buffers: dict[str, Numbers]) -> None:
        for name, array in state.items():
            buffers[name][...] = array

    names = _names(told) if artifact.classes is None else None
    with Trainer(artifact, class_names=names, **_machine(node)) as trainer:
        trainer.replace_state(fill)
        limit = int(told["limit"]) or None
        found = trainer.evaluate(str(node["data"]), int(told["attack-steps"]), limit=limit)
    shares = {name: found[name] for name in ("accuracy", "robust_accuracy") if found.get(name) is not None}
    metrics = MetricRecord({"round": int(told["server-round"]), "images": int(found["samples"]), **shares})
    return Message(content=RecordDict({METRICS: metrics}), reply_to=message)
