"""`make fleet-learning`: what boards learn together, beside what each learns alone and other ways to merge.

    python -m edge_bcs.bench.fleet_learning results/fleet-learning --data cifar10

The training images are dealt out to simulated boards, evenly or by class (Dirichlet). In each round every
board goes once over its images with what the round before became, robustly, and what they learned is merged.
Weights, steps and updates are those of a board (`Trainer`, our own runner).

| way | which positions stay, and with what values |
| --- | --- |
| ours | the κ largest of |Σ n·w / Σ n|, an absent connection counted as 0; the mean over the holders |
| seeds | the same; but each board has a seed of its own, so that they grow in different places |
| feddst | FedDST's rule, over the whole network: the mean over the holders, and the κ largest of it |
| dense | FedAvg of dense weights, pruned: the mean over all boards, and the κ largest of it |
| alone | every board for itself, for as many rounds |

After each round the network is measured on images that are held out of training, at the end on the test
images, which choose nothing. Runs take turns, a round each; they are kept after each round in the folder of
--out and go on where they were cut off. What is there so far is written to the folder named first, as
`learning.json`, a page and a figure.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import edge_bcs
from edge_bcs.bench.fleet_learning_page import FIGURE, write_page
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import write_atomically
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.outputs import check_outputs, json_with
from edge_bcs.core.progress import say
from edge_bcs.data import open_data
from edge_bcs.data.dataset import ArrayDataset
from edge_bcs.fleet.merging import groups_of
from edge_bcs.fleet.rule import as_weights, average, merge_connections
from edge_bcs.fleet.wire import coded
from edge_bcs.runtime import Artifact, Trainer
from edge_bcs.runtime.state import layout_of, read_state

Array = np.ndarray[Any, Any]
State = dict[str, Array]
METHODS = ("ours", "feddst", "dense", "seeds", "alone")
SPLITS = ("iid", "dirichlet")
PLANNED_BOARDS = (10, 50)
RUN = "run.npz"
_AVERAGED = ("dense.value", "batchnorm.mean", "batchnorm.variance")
_HELD_OUT_SEED, _DEAL_SEED = 7, 11
FEWEST = 10
"""Images that each board gets at least, of whatever class."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; each row of the results names it.

    Attributes:
        split: "iid" or "dirichlet", with ``alpha``. rounds: each board once over its images in each.
        learning_rate, weight_decay: of the first round; they fall with the rounds as `Schedule` says.
        held_out: training images that no board gets, by which every round is measured.
        attack_steps, step_size: while training, the size of 255. measured_steps: of PGD afterwards.
        alone: boards that are trained alone, the first ones. often: rounds between two measurements of these.
    """

    boards: int = 10
    split: str = "iid"
    alpha: float = 0.3
    rounds: int = 50
    batch_size: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    width: float = 0.25
    size: int = 16
    sparsity: float = 0.99
    attack_steps: int = 1
    step_size: float = 10.0
    measured_steps: int = 20
    held_out: int = 2000
    alone: int = 10
    often: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Images:
    """What boards learn from, what rounds are measured by, and what the ends are measured by."""

    boards: Sequence[ArrayDataset]
    held_out: ArrayDataset
    test: ArrayDataset


def dealt(labels: Array, boards: int, alpha: float | None, seed: int) -> list[Array]:
    """Return the places of each board's images, which are all there are: shares of a class drawn from
    Dirichlet(alpha), drawn again until each board has `FEWEST`; None: an even deal."""
    rng = np.random.default_rng([_DEAL_SEED, seed])
    if alpha is None:
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), boards)]
    while True:
        places: list[list[Array]] = [[] for _ in range(boards)]
        for label in np.unique(labels):
            of_class = rng.permutation(np.flatnonzero(labels == label))
            bounds = np.rint(np.cumsum(rng.dirichlet([alpha] * boards)) * len(of_class)).astype(int)[:-1]
            for board, some in zip(places, np.split(of_class, bounds), strict=True):
                board.append(some)
        parts = [np.sort(np.concatenate(board)) for board in places]
        if min(map(len, parts)) >= min(FEWEST, len(labels) // boards):
            return parts


def images_of(pixels: Array, labels: Array, test: ArrayDataset, settings: Settings) -> Images:
    """Hold training images u8 [N, 3, size, size] out, and deal the others out."""
    order = np.random.default_rng([_HELD_OUT_SEED, settings.seed]).permutation(len(labels))
    held, rest = order[: settings.held_out], np.sort(order[settings.held_out :])
    alpha = settings.alpha if settings.split == "dirichlet" else None

    def of(places: Array) -> ArrayDataset:
        return ArrayDataset(pixels[places], labels[places], test.classes)

    parts = dealt(labels[rest], settings.boards, alpha, settings.seed)
    return Images([of(rest[part]) for part in parts], of(held), test)


# One round


def put(trainer: Trainer, state: State) -> None:
    """Let a Trainer go on with a state."""

    def fill(buffers: dict[str, Array]) -> None:
        for name, array in state.items():
            buffers[name][...] = array

    trainer.replace_state(fill)


def learned(
    trainer: Trainer, begins: State, data: ArrayDataset, settings: Settings, number: int, order: int
) -> tuple[State, float]:
    """Return what a board makes of a state in a round, going once over its images, and its mean loss.

    Args:
        trainer: with the step and the seed that the round has. number: of the round, from 0.
        order: seed of the order in which it sees its images.
    """
    put(trainer, begins)
    trainer.learning_rate, trainer.weight_decay = edge_bcs.Schedule().rates(
        settings.learning_rate, settings.weight_decay, number, settings.rounds
    )
    losses: list[float] = []
    for x, y in data.batches(settings.batch_size, seed=order, epoch=number, shuffle=True, augment=True):
        if len(x) < settings.batch_size and losses:
            break  # the batch norms' statistics of a few images say little
        losses.append(trainer.step(x, y)["loss"])
    return trainer.state(), float(np.mean(losses))


def together(states: Sequence[State], weights: Sequence[float], artifact: Artifact, method: str) -> State:
    """Return what states become by a way of merging, with momentum 0; see the table above."""
    seed = int(read_state(artifact)[1]["seed"])
    merged = {name: np.zeros(length, kind) for name, (kind, length) in layout_of(artifact).items()}
    if method in ("ours", "seeds"):

        def clients() -> Iterator[tuple[Array, Array, float]]:
            for state, weight in zip(states, weights, strict=True):
                yield state["coo.index"], state["coo.value"], weight

        kept = merge_connections(clients, len(states), artifact.size, groups_of(artifact), seed)
        merged["coo.index"][...], merged["coo.value"][...] = kept.index, kept.value
    else:
        sums, held = np.zeros(artifact.size), np.zeros(artifact.size)
        for state, weight in zip(states, weights, strict=True):
            sums[state["coo.index"]] += weight * state["coo.value"].astype(np.float64)
            held[state["coo.index"]] += weight
        divisor = np.maximum(held, np.finfo(float).tiny) if method == "feddst" else sum(weights)
        mean = sums / divisor
        score = np.where(held > 0, np.abs(mean), -1)
        index = np.sort(np.argsort(-score, kind="stable")[: artifact.kappa])
        merged["coo.index"][...], merged["coo.value"][...] = index, as_weights(mean[index], index, seed)
    averages = average(
        ([state[name] for name in _AVERAGED], weight) for state, weight in zip(states, weights, strict=True)
    )
    for name, array in zip(_AVERAGED, averages, strict=True):
        merged[name][...] = array
    return merged


def masks(states: Sequence[State], merged: State, size: int) -> dict[str, float]:
    """How alike positions are: the mean share that two boards have in common, of κ; and the share of the
    merged network's positions that one board alone holds."""
    holders = np.zeros(size, np.int64)
    for state in states:
        holders[state["coo.index"]] += 1
    kappa, pairs = len(merged["coo.index"]), len(states) * (len(states) - 1) / 2
    shared = float((holders * (holders - 1)).sum()) / 2
    return {
        "overlap": shared / (pairs * kappa) if pairs else 1.0,
        "alone": float(np.mean(holders[merged["coo.index"]] == 1)),
    }


def sent(state: State) -> int:
    """Bytes of what one board tells of a state: values, gaps between positions, other parameters and
    statistics."""
    return (
        state["coo.value"].nbytes
        + len(coded(state["coo.index"]))
        + sum(state[name].nbytes for name in _AVERAGED)
    )


# One run


class Run:
    """Boards that learn in one way, from round to round; kept in a file after each.

    Args:
        artifact: with which all boards begin. file: where the run is kept, and goes on from.

    Attributes:
        rounds: what was measured of each. test: of the end, None before it.
    """

    def __init__(self, settings: Settings, method: str, artifact: Artifact, file: Path) -> None:
        self.settings, self.method, self._artifact, self._file = settings, method, artifact, file
        self.rounds: list[dict[str, Any]] = []
        self.test: list[dict[str, Any]] | None = None
        begins = read_state(artifact)[0]
        count = min(settings.alone, settings.boards) if method == "alone" else 1
        self._states, self._steps = [begins] * count, [0] * count
        if file.is_file():
            told, arrays = kept(file)
            self.rounds, self.test, self._steps = told["rounds"], told["test"], told["steps"]
            self._states = [{name: arrays[f"{n}/{name}"] for name in begins} for n in range(count)]

    def _keep(self) -> None:
        told: dict[str, Any] = {
            "method": self.method,
            "settings": asdict(self.settings),
            "rounds": self.rounds,
        }
        told |= {"test": self.test, "steps": self._steps}
        arrays: dict[str, Any] = {
            f"{number}/{name}": array
            for number, state in enumerate(self._states)
            for name, array in state.items()
        }
        stream = io.BytesIO()
        np.savez(stream, told=np.frombuffer(json.dumps(told).encode(), np.uint8), **arrays)
        write_atomically(self._file, stream.getvalue(), make_folder=True)

    def go_on(self, images: Images) -> bool:
        """Do the next round, or measure the end after the last; False if there is nothing left to do."""
        if self.test is not None:
            return False
        with Trainer(self._artifact, threads=1, engine="native") as trainer:
            seed, began = trainer.seed, time.process_time()
            if len(self.rounds) == self.settings.rounds:
                self.test = [self._measured(trainer, seed, state, images.test) for state in self._states]
            else:
                one = self._round(trainer, seed, images)
                self.rounds.append({**one, "processor_seconds": round(time.process_time() - began, 2)})
        self._keep()
        return True

    def _round(self, trainer: Trainer, seed: int, images: Images) -> dict[str, Any]:
        number = len(self.rounds)
        alone = self.method == "alone"
        states, losses, steps = [], [], []
        for board, data in enumerate(images.boards[: len(self._states)] if alone else images.boards):
            own = board if alone else 0
            trainer.steps = self._steps[own]
            trainer.seed = seed + board + 1 if self.method == "seeds" else seed
            state, loss = learned(trainer, self._states[own], data, self.settings, number, board)
            states.append(state)
            losses.append(loss)
            steps.append(trainer.steps)
        one: dict[str, Any] = {"round": number + 1, "loss": float(np.mean(losses))}
        if alone:
            self._states, self._steps = states, steps
            if (number + 1) % self.settings.often:
                return one
        else:
            weights = [float(len(data)) for data in images.boards]
            merged = together(states, weights, self._artifact, self.method)
            self._states, self._steps = [merged], [max(steps)]
            one |= masks(states, merged, self._artifact.size)
            one |= {"sent": sum(map(sent, states)), "received": len(states) * sent(merged)}
        found = [self._measured(trainer, seed, state, images.held_out) for state in self._states]
        return one | {
            name: float(np.mean([each[name] for each in found])) for name in ("accuracy", "robust_accuracy")
        }

    def _measured(
        self, trainer: Trainer, seed: int, state: State, data: ArrayDataset
    ) -> dict[str, float | int]:
        put(trainer, state)
        trainer.seed = seed
        found = trainer.evaluate(data, self.settings.measured_steps)
        return {name: found[name] for name in ("accuracy", "robust_accuracy", "samples")}


def kept(file: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """What the file of a run tells, and its arrays."""
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
        told: dict[str, Any] = json.loads(stored["told"].tobytes())
        return told, {name: stored[name] for name in stored.files if name != "told"}


def exported(settings: Settings, classes: tuple[str, ...], folder: Path) -> Artifact:
    """Return the new network that all begin with, compiled; kept in ``folder``."""
    if not (folder / "manifest.json").is_file():
        import torch

        torch.manual_seed(settings.seed)  # biases are drawn by torch
        network = edge_bcs.models.resnet18(width=settings.width, input_size=settings.size)
        sparse = edge_bcs.sparsify(network, settings.sparsity, seed=settings.seed)
        sparse.classes = classes
        edge_bcs.export(
            sparse, folder, "at", (3, settings.size, settings.size),
            memory=edge_bcs.Memory(micro_batch=settings.batch_size), batch_norm="batch",
            batch_size=settings.batch_size, validate=False,
            attack=edge_bcs.Attack(steps=settings.attack_steps, step_size=settings.step_size / 255),
            hyper=edge_bcs.Hyper(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay),
        )  # fmt: skip
    return Artifact.read(folder)


def name_of(settings: Settings, method: str) -> str:
    """Return the name of a run's folder: what it is, and a hash of its settings."""
    digest = hashlib.sha256(json.dumps([asdict(settings), method], sort_keys=True).encode()).hexdigest()
    return f"{settings.boards}-{settings.split}-{method}-{digest[:12]}"


def pixels_of(spec: str, split: str, size: int) -> tuple[Array, Array, tuple[str, ...]]:
    """Return images u8 [N, 3, size, size], labels i64[N] and names of the classes."""
    data = open_data(spec, split, (3, size, size))
    parts = [
        np.rint(data.images(np.arange(first, min(first + 1000, len(data)))) * 255).astype(np.uint8)
        for first in range(0, len(data), 1000)
    ]
    return np.concatenate(parts), data.labels, data.classes


def main() -> None:
    """Do the runs that are missing, and write what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", required=True, help="what `edge-bcs train --data` takes, such as cifar10")
    parser.add_argument("--out", type=Path, default=Path("out/fleet-learning"), help="where runs are kept")
    parser.add_argument("--boards", type=int, nargs="+", default=list(PLANNED_BOARDS))
    parser.add_argument("--splits", choices=SPLITS, nargs="+", default=list(SPLITS))
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    for name in ("rounds", "batch_size", "held_out", "measured_steps", "seed", "size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings(), name))
    parser.add_argument("--page", action="store_true", help="train nothing, and write what is there")
    parser.add_argument("--alpha", type=float, default=Settings().alpha, help="of Dirichlet's distribution")
    options = vars(parser.parse_args())
    results, spec, out = (options.pop(name) for name in ("results", "data", "out"))
    boards, splits, methods = (options.pop(name) for name in ("boards", "splits", "methods"))
    page = options.pop("page")
    try:
        files = ("README.md", FIGURE)
        check_outputs(results, files, "learning.json", json_with("runs"), "measurement of this kind")
        if page:
            write(results, out)
            return
        pixels, labels, _ = pixels_of(spec, "train", options["size"])
        test = ArrayDataset(*pixels_of(spec, "test", options["size"]))
        for count in boards:
            with ExitStack() as locks:
                runs = []
                for split in splits:
                    settings = Settings(boards=count, split=split, **options)
                    images = images_of(pixels, labels, test, settings)
                    runs += [
                        (begun(settings, method, test.classes, out, locks), images) for method in methods
                    ]
                in_turn(runs, lambda: write(results, out))
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")


def begun(settings: Settings, method: str, classes: tuple[str, ...], out: Path, locks: ExitStack) -> Run:
    """Return a run as far as it is; EdgeBcsError if it is under way in another process."""
    folder = out / name_of(settings, method)
    folder.mkdir(parents=True, exist_ok=True)
    locks.enter_context(FolderLock(folder))
    return Run(settings, method, exported(settings, classes, folder / "artifact"), folder / RUN)


def in_turn(runs: Sequence[tuple[Run, Images]], after: Callable[[], None]) -> None:
    """Do a round of one run after the other, of those first that have fewest, so that they can be compared
    wherever they are cut off; ``after`` each turn the page is written."""
    left = list(runs)
    while left:
        fewest = min(len(run.rounds) for run, _ in left)
        for run, images in list(left):
            if len(run.rounds) > fewest:
                continue
            if not run.go_on(images):
                left.remove((run, images))
                continue
            shown = " ".join(f"{name} {value:.4g}" for name, value in run.rounds[-1].items())
            say(f"{run.settings.boards} boards, {run.settings.split}, {run.method}: {shown}")
        after()


def write(results: Path, out: Path) -> None:
    """Write what the runs in a folder have measured so far."""
    rows = [kept(file)[0] for file in sorted(out.glob(f"*/{RUN}"))]
    for row in rows:
        del row["steps"]
    planned = [(boards, split, method) for boards in PLANNED_BOARDS for split in SPLITS for method in METHODS]
    write_page(results, rows, planned)


if __name__ == "__main__":
    main()
