"""The measured half of the simulator: runs an artifact in a process of its own and tells what it took.

`python -m edge_bcs.targets.host_run` reads one JSON request from standard input and writes one JSON
answer. A fresh process, because resident memory is only meaningful where nothing else has run.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edge_bcs.runtime.board.process import resident_now, resident_peak, waited_for_cores

if TYPE_CHECKING:
    from edge_bcs.runtime.engine import GraphRun

    from edge_bcs.data import Dataset


_OF_A_TRAINING = (
    "edge_bcs.cli.finetune",
    "edge_bcs.data",
    "edge_bcs.runtime.trainer",
    "edge_bcs.runtime.sessions",
    "rich.progress",
    "PIL.Image",
)
"""What `edge-bcs finetune` imports: on the board it is a part of the process. The last is needed for images
in files alone."""


def _noise(count: int, shape: tuple[int, int, int], classes: int) -> Dataset:
    """Images that take as much memory as those of a folder, decoded: bytes until they are read."""
    import numpy as np

    from edge_bcs.core import random
    from edge_bcs.data.dataset import Dataset

    class Noise(Dataset):
        def __init__(self) -> None:
            self.classes = tuple(map(str, range(classes)))
            self.shape = shape
            self.labels = np.arange(count) % classes
            self._pixels = np.empty((count, *shape), np.uint8)
            for number, image in enumerate(self._pixels):  # one by one: drawing takes memory
                words = random.words(-(-image.size // 4), seed=0, step=number, purpose=random.EVALUATION)
                image.reshape(-1)[:] = words.view(np.uint8)[: image.size]

        def images(self, positions: Any) -> Any:
            return np.divide(self._pixels[positions], np.float32(255), dtype=np.float32)

    return Noise()


def measure(path: str, memory: int | None, threads: int, seconds: float) -> dict[str, Any]:
    """Train for at least two steps on noise and return peaks and times.

    Args:
        path: the artifact. memory: cap on the working set in bytes. threads: of each graph.
        seconds: about how long to train; a step that takes longer is timed on a part of its micro-batches.
    """
    import numpy as np
    from edge_bcs.runtime import Trainer
    from edge_bcs.runtime.budget import isa

    from edge_bcs.core.signals import HeldSignals

    from .roofline import step_runs

    for module in _OF_A_TRAINING:
        with suppress(ImportError):
            importlib.import_module(module)
    isa()
    libraries, before = resident_peak(), resident_now()
    with Trainer(path, memory=memory, threads=threads) as trainer:
        # Noise teaches nothing: steps of length zero measure the same memory and cannot diverge.
        trainer.learning_rate = trainer.weight_decay = 0.0
        artifact = trainer.artifact
        peaks = {"lists": trainer.peak_bytes}
        placed, engine = trainer.placed_peak_bytes, ""
        taken: dict[str, list[float]] = {}

        def record(run: GraphRun) -> None:
            taken.setdefault(run.graph, []).append(run.seconds)
            peaks[run.graph] = max(peaks.get(run.graph, 0), trainer.peak_bytes)
            nonlocal placed, engine
            engine = run.engine
            placed = max(placed, trainer.placed_peak_bytes)
            trainer.reset_peak()

        trainer.reset_peak()
        trainer.on_run = record

        held = artifact.attack_micro_batch
        size = min(held, artifact.batch_size)
        data = _noise(size, artifact.input_shape, artifact.num_classes)
        places = np.arange(size)

        def step(count: int) -> Any:
            """Of so many images, which come one micro-batch at a time, as they do in a training."""
            with HeldSignals() as signals:
                return trainer.step_reading(
                    signals, lambda first, end: data.read(places[: end - first]), count
                )

        parts = -(-artifact.batch_size // held)
        trainer.logits(data.images(places))
        began = time.perf_counter()
        # Not counted: memory is touched and threads are started here. Images are read and changed as they are
        # in a training, so that as much lies in memory beside the working set.
        trainer.step(*data.read(places, augment=True))
        once = time.perf_counter() - began
        timed = max(1, min(parts, int(seconds / max(once, 1e-6))))
        steps = max(1, min(3, int(seconds / max(once * timed, 1e-6))))
        taken.clear()
        began, waited = time.perf_counter(), waited_for_cores()
        for _ in range(steps):
            metrics = step(min(artifact.batch_size, timed * held))
        elapsed, waited = time.perf_counter() - began, waited_for_cores() - waited
        runs = {graph: len(each) // steps for graph, each in taken.items()}
        if timed < parts:
            runs |= step_runs(artifact)
        # The median, because other work on the machine takes a core away for a while now and then.
        spent = {graph: runs[graph] * statistics.median(each) for graph, each in taken.items()}
        beside = (elapsed - sum(map(sum, taken.values()))) / steps * parts / timed
        after = resident_now()
        # The kernel's own mark may be older than a part of the pages on machines with many cores.
        resident = max(resident_peak(), after.total if after else 0)
        return {
            "peak_bytes": max(peaks.values()),
            "placed_peak_bytes": placed,
            "phases": {
                graph: {
                    "peak_bytes": peak,
                    "seconds_per_step": spent.get(graph, 0.0),
                    "runs_per_step": runs.get(graph, 0),
                }
                for graph, peak in peaks.items()
            },
            "seconds_per_step": sum(spent.values()) + beside,
            "cores_share": max(0.0, 1 - waited / elapsed / trainer.threads),
            "timed_micro_batches": timed,
            "micro_batches_per_step": parts,
            "steps": steps,
            "loss": metrics["loss"],
            "threads": trainer.threads,
            "isa": isa(),
            "engine": engine,
            "exact": trainer.memory()["exact"],
            "rss_libraries_bytes": libraries,
            # Pages of libraries come when they are first used, so those that the sessions touch count too.
            "libraries_bytes": before.own + after.files if before and after else libraries,
            "rss_peak_bytes": resident,
        }


def main() -> None:
    """Serve one request; an error is an answer too."""
    from edge_bcs.runtime.budget import BudgetExceeded

    from edge_bcs.core.errors import EdgeBcsError

    request = json.loads(sys.stdin.read())
    try:
        answer = measure(**request)
    except BudgetExceeded as error:
        answer = {"refused": str(error), "rss_peak_bytes": resident_peak()}
    except EdgeBcsError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {
            "refused": "the process reached the memory limit of the board",
            "rss_peak_bytes": resident_peak(),
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
