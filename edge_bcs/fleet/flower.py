"""The same rounds over Flower: a ServerApp whose strategy merges by the rule, and a ClientApp over `Trainer`.

For one of Flower's apps (`flwr run`, flwr 1.42 or newer), whose module has `server` and `client` from here;
`examples/flower` is one. On the wire are values, positions, other parameters and running statistics: no
graphs, no momentum, no photographs.

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
| `steps`, `epochs` | how long a board trains in a round, one of them; 0: not said |
| `robust` | "median", or "" |

| node configuration (`flower-supernode --node-config`) | what |
| --- | --- |
| `artifact` | this board's artifact: of the same network, for its own memory |
| `data` | what it learns from |
| `run` | the folder of its own run, which stays from round to round |
| `trust-key` | public key that must have signed the artifact; "" or left out: none |
| `threads`, `memory` | as for `edge-bcs finetune` |
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.locks import FolderLock
from edge_bcs.fleet.members import round_of
from edge_bcs.fleet.rounds import Met, Rounds, begin, open_round
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import is_run_of, layout_of, read_slot

Numbers = np.ndarray[Any, Any]
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"

server = ServerApp()
client = ClientApp()


# What is on the wire


def packed(state: Mapping[str, Numbers]) -> ArrayRecord:
    """Return what of a state is sent: all but momentum."""
    sent = {name: array for name, array in state.items() if not name.endswith(".momentum")}
    return ArrayRecord({name: Array(array) for name, array in sent.items()})


def unpacked(record: ArrayRecord, artifact: Artifact) -> dict[str, Numbers]:
    """Return the state that was sent, without momentum; EdgeBcsError if it is none of this network's size."""
    state = {}
    for name, (kind, length) in layout_of(artifact).items():
        if name.endswith(".momentum"):
            state[name] = np.zeros(length, kind)
            continue
        if name not in record:
            raise EdgeBcsError(f"{name} is missing.")
        try:
            array = record[name].numpy()
        except (ValueError, TypeError, EOFError, OSError):
            raise EdgeBcsError(f"{name} cannot be read.") from None
        if array.dtype != np.dtype(kind) or array.shape != (length,):
            raise EdgeBcsError(f"{name} is {array.dtype}{list(array.shape)} instead of {kind}[{length}].")
        state[name] = array
    return state


def _names(record: ConfigRecord) -> tuple[str, ...] | None:
    """Names of classes in a message; None where they are unknown."""
    names = record.get("classes")
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None


# The server


class Merging(FedAvg):  # type: ignore[misc]
    """Flower's strategy that samples boards as FedAvg does, and merges what they learned by the rule.

    Args:
        rounds: where runs are kept. artifact: the server's. sampling: what FedAvg takes of nodes.

    Attributes:
        met: what the last round became, with which the next begins.
    """

    def __init__(self, rounds: Rounds, artifact: Artifact, **sampling: Any) -> None:
        super().__init__(fraction_evaluate=0.0, **sampling)
        self._rounds, self._artifact = rounds, artifact
        self._before = rounds.last_merged()
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
        for message in replies:
            try:
                if message.has_error():
                    raise EdgeBcsError(str(message.error.reason))
                self._keep(number, message)
            except EdgeBcsError as error:
                log(WARNING, "Round %s: node %s is left out: %s", number, message.metadata.src_node_id, error)
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
        return packed(met.state), MetricRecord({"runs": runs, "overlap": overlap, "step": met.step})

    def _keep(self, number: int, message: Message) -> None:
        """Keep what a board sent as a run; EdgeBcsError if it is none."""
        content, node = message.content, f"node-{message.metadata.src_node_id}"
        try:
            arrays, told = content[ARRAYS], content[METRICS]
            metadata = {name: str(int(told[name])) for name in ("step", "seed", "images")}
            of_round = int(told["round"])
        except (KeyError, TypeError, ValueError):
            raise EdgeBcsError("it does not say what it is.") from None
        if of_round != number:
            raise EdgeBcsError(f"it was sent in round {of_round}, and is no run of round {number}.")
        board = Rounds(self._rounds.folder, node)
        classes = _names(content[CONFIG]) if CONFIG in content else None
        board.send(number, self._artifact, unpacked(arrays, self._artifact), metadata, classes)


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run rounds until there have been as many more as the configuration says."""
    config = context.run_config
    artifact = Artifact.read(str(config["artifact"]))
    boards, folder = int(config.get("boards", 2)), Path(str(config["folder"]))
    rounds = Rounds(folder, "server", boards=1, robust=str(config.get("robust", "")) or None)
    with FolderLock(folder, again=False):
        strategy = Merging(
            rounds,
            artifact,
            fraction_train=float(config.get("fraction", 1.0)),
            min_train_nodes=min(boards, 2),
            min_available_nodes=boards,
        )
        train = {name: config[name] for name in ("steps", "epochs") if int(config.get(name, 0))}
        strategy.start(
            grid=grid,
            initial_arrays=packed(strategy.met.state),
            num_rounds=int(config.get("num-rounds", 3)),
            timeout=float(config.get("timeout", 3600.0)),
            train_config=ConfigRecord(train),
        )


# A board


@client.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train for a round, and return what was learned."""
    from edge_bcs.runtime import Trainer

    told, node = message.content[CONFIG], context.node_config
    number = int(told["server-round"])
    keys = [str(node["trust-key"])] if node.get("trust-key") else []
    artifact, folder = Artifact.read(str(node["artifact"]), keys), Path(str(node["run"]))
    state = unpacked(message.content[ARRAYS], artifact)
    length: dict[str, Any] = {name: int(told[name]) for name in ("steps", "epochs") if name in told}
    machine: dict[str, Any] = {name: node[name] for name in ("threads", "memory") if node.get(name)}
    with FolderLock(folder):
        if not _is_under_way(folder, artifact, number):
            met = Met(state, int(told["step"]), int(told["seed"]), _names(told), {})
            begin(folder, artifact, met, number)
        with open_round(Trainer.resume(folder, **machine)) as trainer:
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


def _is_under_way(folder: Path, artifact: Artifact, number: int) -> bool:
    """Whether the run of this board is in that round already: it was cut off, and goes on."""
    try:
        return is_run_of(folder, artifact) and round_of(read_slot(Artifact.read(folder)).metadata) == number
    except EdgeBcsError:
        return False
