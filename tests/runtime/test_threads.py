"""A Trainer in the hands of several threads: one at a time, the others are told so, and nothing crashes.

Each case runs in a process of its own, where a crash is a failure and not the end of the tests.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Make = Callable[..., Path]
COMMON = """
import hashlib, sys, threading, time
import numpy as np
from edge_bcs.data import ArrayDataset
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.runtime import Trainer

path, run = sys.argv[1:3]
chance = np.random.default_rng(0)
x, y = chance.random((12, 1, 8, 8), np.float32), np.arange(12) % 10
data = ArrayDataset(x, y)
IN_USE = "in use by another thread"

def digest(trainer):
    return hashlib.sha256(b"".join(array.tobytes() for array in trainer.state().values())).hexdigest()

def refused(call):
    try:
        call()
    except EdgeBcsError as error:
        assert IN_USE in str(error) and "\\n" not in str(error), error
        return True
    return False

def together(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""
CASES = {
    "steps": """
with Trainer(path, threads=1) as trainer:
    results, barrier = [], threading.Barrier(4)

    def work():
        barrier.wait()
        for _ in range(60):
            results.append(refused(lambda: trainer.step(x, y)))

    together(*[work] * 4)
    done, found = trainer.steps, digest(trainer)
assert len(results) == 240 and results.count(False) == done > 0, (results.count(False), done)
with Trainer(path, threads=1) as trainer:
    for _ in range(done):
        trainer.step(x, y)
    assert digest(trainer) == found
""",
    "everything else during a training": """
with Trainer(path, threads=1) as trainer:
    whole = trainer.fit(data, steps=20, batch_size=6, progress=False)
    expected = digest(trainer)
trainer = Trainer(path, threads=1)
go, wait, results = threading.Event(), threading.Event(), []

def on_step(record):
    # The thread that trains may measure, look and save between its steps.
    if record["step"] == 10:
        assert trainer.evaluate(data, 1)["samples"] == 12 and trainer.predict(x).shape == (12,)
        assert trainer.save(run) > 0 and len(trainer.state()) == 7
        go.set()
        wait.wait()

def fit():
    results.append(trainer.fit(data, steps=20, batch_size=6, progress=False, on_step=on_step))

thread = threading.Thread(target=fit)
thread.start()
go.wait()
for call in (
    lambda: trainer.step(x, y),
    lambda: trainer.fit(data, steps=1, progress=False),
    lambda: trainer.evaluate(data, 0),
    lambda: trainer.logits(x),
    lambda: trainer.predict(x),
    lambda: trainer.state(),
    lambda: trainer.save(run),
    lambda: trainer.run_optimizer_only(),
):
    assert refused(call)
assert trainer.memory()["peak_bytes"] > 0 and trainer.steps == 10
wait.set()
thread.join()
assert results[0]["step"] == 20 and digest(trainer) == expected
trainer.close()
with Trainer.resume(run, threads=1) as trainer:
    assert trainer.steps == 10
""",
    "closing during a step": """
for seconds in np.linspace(0, 0.02, 12):
    trainer, told = Trainer(path, threads=1), []

    def work():
        try:
            while True:
                trainer.step(x, y)
        except EdgeBcsError as error:
            told.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(seconds)
    trainer.close()
    thread.join()
    assert told == ["this Trainer is closed."], told
    done, found = trainer.steps, digest(trainer)
    with Trainer(path, threads=1) as other:
        for _ in range(done):
            other.step(x, y)
        assert digest(other) == found
""",
    "leaving while a thread trains": """
trainer = Trainer(path, threads=1)

def fit():
    try:
        trainer.fit(data, steps=10**9, progress=False)
    except EdgeBcsError:  # it is closed
        pass

threading.Thread(target=fit, daemon=True).start()
while trainer.steps < 3:
    time.sleep(0.001)
""",
    "a training in another thread than the main one": """
with Trainer(path, threads=1) as trainer:
    together(lambda: trainer.fit(data, steps=5, batch_size=6, progress=False))
    found = digest(trainer)
with Trainer(path, threads=1) as trainer:
    trainer.fit(data, steps=5, batch_size=6, progress=False)
    assert digest(trainer) == found
""",
}


@pytest.mark.parametrize("case", CASES)
def test_threads(tiny_artifact: Make, tmp_path: Path, case: str) -> None:
    path = tiny_artifact(batch_norm="batch", attack_steps=1)
    command = [sys.executable, "-c", COMMON + CASES[case], str(path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
