"""Before 1.23 the cap is kept by ONNX Runtime's arena. A process makes it once, so each case has its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime.training.api", reason="see make test-ort-training")

SCRIPT = """
import json, sys, warnings
import numpy as np
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.ort.training import OrtTrainer
from edge_bcs.core.errors import EdgeBcsError
kind, path, *caps = sys.argv[1:]
x, y = np.random.default_rng(0).random((6, 1, 8, 8), np.float32), np.arange(6)
for cap in caps:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with {"Trainer": Trainer, "OrtTrainer": OrtTrainer}[kind](path, memory=eval(cap)) as trainer:
                told = trainer.step(x, y)["loss"]
        except EdgeBcsError as error:
            told = str(error)
    print(json.dumps([told, [str(item.message) for item in caught]]))
"""


def outcomes(kind: str, path: Path, *caps: int | None) -> list[tuple[Any, list[str]]]:
    command = [sys.executable, "-c", SCRIPT, kind, str(path), *map(str, caps)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("kind", ["Trainer", "OrtTrainer"])
def test_enough_is_enough_and_too_little_is_refused(tiny_artifact: Callable[..., Path], kind: str) -> None:
    artifact = tiny_artifact()
    ((loss, warned),) = outcomes(kind, artifact, 8 << 20)
    assert isinstance(loss, float)
    assert any("kept by ONNX Runtime's arena" in message for message in warned)
    memory = json.loads((artifact / "manifest.json").read_text())["memory"]
    ((told, _),) = outcomes(kind, artifact, memory["predicted_peak_bytes"] // 4)
    assert "memory budget exceeded" in told


def test_a_later_trainer_is_told_what_holds(tiny_artifact: Callable[..., Path]) -> None:
    """The arena of the first cap serves no other: without a cap it limits nobody, with another it says so."""
    first, free, other = outcomes("Trainer", tiny_artifact(), 8 << 20, None, 4 << 20)
    assert first[0] == free[0] == other[0]
    assert not [message for message in free[1] if "cap" in message]
    assert any("covers the bound buffers only" in message for message in other[1])


def test_the_arena_refuses_before_the_process_dies(tiny_artifact: Callable[..., Path]) -> None:
    """More than the buffers, less than the tensors of a large micro-batch."""
    artifact = tiny_artifact(micro_batch=64, batch_size=64)
    memory = json.loads((artifact / "manifest.json").read_text())["memory"]
    ((told, _),) = outcomes("Trainer", artifact, memory["predicted_peak_bytes"] // 2)
    assert "memory budget exceeded: the operator" in told
