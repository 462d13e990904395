"""`python -m edge_bcs.bench.endurance`: what a very long training does to κ and to memory.

A million times the optimizer graph (RewireStep, DenseStep and the lists, as a training runs them) on random
gradients, then whole robust steps with saves and metrics. A hundred times on the way everything that must
hold of the connections is checked, the step is compared with the plain numpy reference to the bit, and
memory is read. Writes `endurance.json` and a README with the figures to the folder named with -o. Without
--artifact a small network is exported first, which needs the host's compiler.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import write_atomically, write_json
from edge_bcs.core.outputs import check_outputs, json_with
from edge_bcs.method.rewiring import check_buffers, rewire_step
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.board.process import private_now

CHECKS = 100
_BANK = 61  # gradients that take turns; prime, so that they meet other numbers of noise each time
_GROWTH_ALLOWED = 1 << 20


def rewire(artifact: str | Path, steps: int) -> dict[str, Any]:
    """Run ``steps`` optimizer steps; EdgeBcsError if κ, the order or a bit is not what it must be."""
    with Trainer(artifact, threads=1) as trainer:
        buffers, size, kappa = trainer.buffers, trainer.artifact.size, trainer.artifact.kappa
        gradients = np.random.default_rng(0).normal(size=(_BANK, kappa)).astype(np.float32)
        first = trainer.state()["coo.index"]
        memory: list[dict[str, int]] = []
        replaced = 0
        began = time.perf_counter()
        for step in range(steps):
            gradient = gradients[step % _BANK]
            buffers["coo.value_grad.accumulation.buffer"][...] = gradient
            buffers["dense.value_grad.accumulation.buffer"][...] = gradient[0]
            if step % max(1, steps // CHECKS):
                trainer.run_optimizer_only()
                continue
            before = trainer.state()
            expected = _reference(trainer, before, gradient)
            trainer.run_optimizer_only()
            state = trainer.state()
            for name, array in expected.items():
                if not np.array_equal(state[name], array):
                    raise EdgeBcsError(f"after step {trainer.steps}, {name} is not that of the reference.")
            check_connections(state, kappa, size)
            replaced += kappa - len(np.intersect1d(before["coo.index"], state["coo.index"]))
            memory.append({"step": step, "private_bytes": private_now(), "budget_bytes": _in_use(trainer)})
            if len(memory) % 10 == 0:
                print(f"step {step:,} of {steps:,}", file=sys.stderr, flush=True)
        check_connections(trainer.state(), kappa, size)
        memory.append({"step": steps, "private_bytes": private_now(), "budget_bytes": _in_use(trainer)})
        kept = len(np.intersect1d(first, trainer.state()["coo.index"]))
        return {
            "steps": steps,
            "connections": kappa,
            "positions": size,
            "microseconds_per_step": 1e6 * (time.perf_counter() - began) / steps,
            "replaced_per_step": replaced / (len(memory) - 1),
            "first_connections_left": kept,
            "checks": len(memory) - 1,
            **growth_of(memory),
            "memory": memory,
        }


def train(artifact: str | Path, steps: int) -> dict[str, Any]:
    """Run ``steps`` whole training steps on the embedded digits, saving every tenth and writing metrics."""
    from edge_bcs.data import open_data

    with Trainer(artifact, threads=1) as trainer, tempfile.TemporaryDirectory() as folder:
        data = open_data("digits", "train", trainer.artifact.input_shape)
        memory: list[dict[str, int]] = []

        def on_step(record: dict[str, Any]) -> None:
            if record["done"] % max(1, steps // CHECKS) == 0:
                memory.append(
                    {"step": record["done"], "private_bytes": private_now(), "budget_bytes": _in_use(trainer)}
                )

        result = trainer.fit(
            data,
            steps=steps,
            progress=False,
            on_step=on_step,
            metrics=Path(folder) / "metrics.jsonl",
            save=Path(folder) / "run",
            save_steps=10,
            max_writes=None,
        )
        check_connections(trainer.state(), trainer.artifact.kappa, trainer.artifact.size)
        return {
            "steps": steps,
            "milliseconds_per_step": result["milliseconds_per_step"],
            "saves": result["writes"]["saves"],
            **growth_of(memory),
            "memory": memory,
        }


def _reference(
    trainer: Trainer, state: dict[str, Any], gradient: np.ndarray[Any, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    value, index, momentum = rewire_step(
        state["coo.value"],
        state["coo.index"],
        state["coo.momentum"],
        gradient,
        size=trainer.artifact.size,
        seed=trainer.seed,
        step=trainer.steps,
        learning_rate=trainer.learning_rate,
        weight_decay=trainer.weight_decay,
        momentum_factor=trainer.momentum,
        noise=trainer.noise,
    )
    return {"coo.value": value, "coo.index": index, "coo.momentum": momentum}


def check_connections(state: dict[str, Any], kappa: int, size: int) -> None:
    """Raise EdgeBcsError unless a state has exactly κ connections, in order, within N positions."""
    value, index, momentum = (state[f"coo.{name}"] for name in ("value", "index", "momentum"))
    check_buffers(value, index, momentum, momentum, size=size)
    if len(np.unique(index)) != kappa:
        raise EdgeBcsError(f"there are {len(np.unique(index))} connections instead of {kappa}.")


def _in_use(trainer: Trainer) -> int:
    return int(trainer.memory()["current_bytes"] or 0)


def growth_of(memory: list[dict[str, int]]) -> dict[str, int]:
    """How memory grew after the first tenth, in which caches fill; EdgeBcsError if by more than 1 MiB.

    A leak would rise from reading to reading; what the checks between the steps take rises once or twice.
    """
    settled = memory[len(memory) // 10 :]
    growth = settled[-1]["private_bytes"] - settled[0]["private_bytes"]
    counted = max(entry["budget_bytes"] for entry in memory) - min(entry["budget_bytes"] for entry in memory)
    if growth > _GROWTH_ALLOWED or counted:
        raise EdgeBcsError(
            f"memory grew: private memory by {growth} bytes, what the budget counts by {counted}."
        )
    rises = [later["private_bytes"] - entry["private_bytes"] for entry, later in pairwise(settled)]
    return {
        "growth_bytes": growth,
        "readings": len(rises),
        "readings_that_rose": sum(rise > 0 for rise in rises),
        "largest_rise_bytes": max(rises, default=0),
        "budget_growth_bytes": counted,
    }


def _export(folder: Path) -> Path:
    from edge_bcs import Attack, Memory, export, models
    from edge_bcs.method import connectivity

    model = models.create("resnet18", width=0.0625, input_channels=1, input_size=8)
    sparse = connectivity.sparsify(model, sparsity=0.99, seed=0)
    export(
        sparse,
        folder,
        "at",
        (1, 8, 8),
        memory=Memory(micro_batch=8),
        attack=Attack(steps=2),
        batch_size=16,
        validate=False,
    )
    return folder


_README = """# A very long training

`make endurance`, {date}, one thread of {machine}, numpy {numpy}, onnxruntime {onnxruntime}.
A ResNet-18 of a sixteenth of the width at 99 % sparsity: {connections:,} connections of {positions:,}.

| | rewiring steps | whole robust steps |
| --- | ---: | ---: |
| steps | {steps:,} | {train_steps:,} |
| time a step | {microseconds:.0f} µs | {milliseconds:.1f} ms |
| κ at the end, distinct and in order | {connections:,} | {connections:,} |
| steps equal to the numpy reference to the bit | {checks} of {checks} compared | |
| connections replaced, a step | {replaced:.2f} | |
| of the first connections still there | {kept} | |
| growth of what the budget counts | {budget} bytes | {train_budget} bytes |
| growth of private memory, from a tenth of the way to the end | {rss:,} bytes | {train_rss:,} bytes |
| readings on that way at which it had risen | {rises} of {readings} | {train_rises} of {train_readings} |
| the largest rise between two readings | {largest:,} bytes | {train_largest:,} bytes |
| saves | | {saves:,} |
"""


def main() -> None:
    """Measure, print and write; exit status 1 if something drifted."""
    parser = argparse.ArgumentParser(description="What a very long training does to κ and to memory.")
    parser.add_argument("--artifact", help="a folder; default: a small network that is exported first")
    parser.add_argument("--steps", type=int, default=1_000_000, help="rewiring steps")
    parser.add_argument("--training-steps", type=int, default=3000, help="whole robust steps")
    parser.add_argument("-o", "--output", help="folder for the figures")
    arguments = parser.parse_args()
    if arguments.output:
        ours = json_with("rewiring", "training")
        try:
            check_outputs(
                arguments.output, ("README.md",), "endurance.json", ours, "measurement of this kind"
            )
        except EdgeBcsError as error:
            sys.exit(f"Error: {error}")
    with tempfile.TemporaryDirectory() as folder:
        artifact = arguments.artifact or _export(Path(folder) / "artifact")
        try:
            result = {
                "rewiring": rewire(artifact, arguments.steps),
                "training": train(artifact, arguments.training_steps),
            }
        except EdgeBcsError as error:
            sys.exit(f"Error: {error}")
    print(json.dumps({name: {**part, "memory": len(part["memory"])} for name, part in result.items()}))
    if arguments.output:
        output = Path(arguments.output)
        write_json(output / "endurance.json", result, make_folder=True)
        write_atomically(output / "README.md", _readme(result).encode())


def _readme(result: dict[str, Any]) -> str:
    import onnxruntime

    rewiring, training = result["rewiring"], result["training"]
    return _README.format(
        date=date.today(),
        machine=platform.machine(),
        numpy=np.__version__,
        onnxruntime=onnxruntime.__version__,
        connections=rewiring["connections"],
        positions=rewiring["positions"],
        steps=rewiring["steps"],
        train_steps=training["steps"],
        microseconds=rewiring["microseconds_per_step"],
        milliseconds=training["milliseconds_per_step"],
        checks=rewiring["checks"],
        replaced=rewiring["replaced_per_step"],
        kept=rewiring["first_connections_left"],
        budget=rewiring["budget_growth_bytes"],
        train_budget=training["budget_growth_bytes"],
        rss=rewiring["growth_bytes"],
        rises=rewiring["readings_that_rose"],
        train_rises=training["readings_that_rose"],
        readings=rewiring["readings"],
        train_readings=training["readings"],
        largest=rewiring["largest_rise_bytes"],
        train_largest=training["largest_rise_bytes"],
        train_rss=training["growth_bytes"],
        saves=training["saves"],
    )


if __name__ == "__main__":
    main()
