"""The native engine: our own runner over `program.bin`, beside ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Artifact, BudgetExceeded, Trainer
from edge_bcs.runtime.state import read_state
from helpers.commands import run

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import OBJECTIVES

Array = np.ndarray[Any, Any]
Make = Callable[..., Path]
Batch = tuple[Array, Array]


def trained(path: Path, batch: Batch, engine: str, steps: int = 6, threads: int = 1) -> dict[str, bytes]:
    """The state after so many steps, and what the network answers then."""
    with Trainer(path, engine=engine, threads=threads) as trainer:
        told = [json.dumps(trainer.step(*batch)) for _ in range(steps)]
        found = {name: array.tobytes() for name, array in trainer.state().items()}
        found["logits"] = trainer.logits(batch[0]).tobytes()
        found["told"] = "\n".join(told).encode()
        found["measured"] = json.dumps(trainer.evaluate(batch, attack_steps=2)).encode()
    return found


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_gives_the_bits_of_onnx_runtime(
    tiny_artifact: Make, batch: Batch, objective: str, batch_norm: str
) -> None:
    path = tiny_artifact(objective=objective, batch_norm=batch_norm)
    expected = trained(path, batch, "onnxruntime")
    assert trained(path, batch, "native") == expected
    assert trained(path, batch, "native", threads=2) == expected


@pytest.mark.parametrize(("first", "second"), [("native", "onnxruntime"), ("onnxruntime", "native")])
def test_each_goes_on_from_the_others_run(
    tiny_artifact: Make, digits: Path, tmp_path: Path, first: str, second: str
) -> None:
    path = tiny_artifact(batch_norm="batch")
    with Trainer(path, engine=first) as trainer:
        trainer.fit(str(digits), steps=9, progress=False)
        expected = {name: array.copy() for name, array in trainer.state().items()}

    class Enough(Exception):  # noqa: N818 (it is no error)
        pass

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 5:
            raise Enough

    with Trainer(path, engine=first) as trainer, pytest.raises(Enough):
        trainer.fit(
            str(digits),
            steps=9,
            progress=False,
            on_step=stop,
            save=tmp_path / "run",
            save_steps=1,
            max_writes=None,
        )
    with Trainer.resume(tmp_path / "run", engine=second) as trainer:
        trainer.fit(str(digits), progress=False)
        found = trainer.state()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_several_live_side_by_side(tiny_artifact: Make, batch: Batch) -> None:
    path, other = tiny_artifact(), tiny_artifact(objective="trades")
    expected = [trained(path, batch, "native"), trained(other, batch, "native")]
    with (
        Trainer(path, engine="native") as one,
        Trainer(other, engine="native") as two,
        Trainer(path, engine="onnxruntime") as three,
    ):
        for _ in range(6):
            for trainer in (one, two, three):
                trainer.step(*batch)
        for trainer, state in ((one, expected[0]), (two, expected[1]), (three, expected[0])):
            assert all(array.tobytes() == state[name] for name, array in trainer.state().items())


def test_its_working_set_is_the_arena(tiny_artifact: Make, batch: Batch) -> None:
    path = tiny_artifact()
    with Trainer(path, engine="native") as trainer:
        trainer.step(*batch)
        arena = trainer.peak_bytes
        assert arena == trainer.placed_peak_bytes == trainer.memory()["current_bytes"]
        assert trainer.artifact.predicted_peak_bytes == arena
    with Trainer(path, memory=arena, engine="native") as trainer:
        trainer.step(*batch)
    with pytest.raises(BudgetExceeded, match=f"allow {arena} bytes or more"):
        Trainer(path, memory=arena - 1, engine="native")


def test_it_needs_no_onnx_runtime(tiny_artifact: Make, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["onnxruntime"] = None
from importlib import util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
import numpy as np
from edge_bcs.runtime import Trainer
with Trainer({str(tiny_artifact())!r}) as trainer:
    trainer.step(np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, np.int64))
    trainer.save({str(tmp_path / "run")!r})
print(*(name in sys.modules for name in ("torch", "onnx", "_hashlib")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3  # _hashlib brings OpenSSL, 3 MiB
    with Trainer(tmp_path / "run", engine="onnxruntime") as trainer:
        assert trainer.steps == 1


def test_the_commands_of_a_board_need_no_onnx_runtime(tiny_artifact: Make, tmp_path: Path) -> None:
    """With numpy and Pillow alone: the same runs and answers, and the doctor finds nothing missing."""
    image = pytest.importorskip("PIL.Image").new("L", (9, 9), 99)
    image.save(tmp_path / "image.png")
    given = ["--data", "digits", "--steps", "2", "--eval-samples", "8", "--eval-steps", "1", "--threads", "1"]
    lines = [
        ["doctor", "--json"],
        ["finetune", str(tiny_artifact()), *given, "-o", "run", "--json"],
        ["evaluate", "run", "--data", "digits", "--limit", "9", "--attack-steps", "2", "--json"],
        ["predict", "run", "image.png", "--json"],
        ["inspect", "run", "--json"],
        ["run-ort-artifact", "run", "--data", "digits"],
    ]
    code = f"""
import contextlib, io, json, sys
for name in ("onnxruntime", "onnx", "torch", "flatbuffers"):
    sys.modules[name] = None
from edge_bcs.cli import main
answers = []
for words in {lines!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(words)
        except SystemExit as end:
            answers.append([end.code, out.getvalue()])
print(json.dumps(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    answers = json.loads(done.stdout)
    assert [status for status, _ in answers] == [0, 0, 0, 0, 0, 1]
    assert "run `pip install onnxruntime`" in done.stderr
    assert json.loads(answers[0][1])["usable"]
    expected = tmp_path / "expected"
    assert run("finetune", tiny_artifact(), *given, "-o", expected, "--engine", "onnxruntime").exit_code == 0
    assert (expected / "state.safetensors").read_bytes() == (tmp_path / "run/state.safetensors").read_bytes()
    measured = json.loads(run("evaluate", expected, *lines[2][2:]).stdout)
    assert json.loads(answers[2][1])["adv_acc"] == measured["adv_acc"]


def test_bad_input_gets_a_sentence(tiny_artifact: Make, tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match="the engine must be one of onnxruntime, native, not 'tpu'"):
        Trainer(tiny_artifact(), engine="tpu")
    old = tmp_path / "old"
    shutil.copytree(tiny_artifact(), old)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["files"]["program.bin"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    (old / "program.bin").unlink()
    with pytest.raises(EdgeBcsError, match=r"old has no program\.bin; export it again"):
        Trainer(old, engine="native")
    with Trainer(old, engine="onnxruntime") as trainer:
        trainer.save(tmp_path / "run")
    trainer = Trainer(tiny_artifact(), engine="native")
    trainer.close()
    trainer.close()
    with pytest.raises(EdgeBcsError, match="this Trainer is closed"):
        trainer.logits(np.zeros((1, 1, 8, 8), np.float32))


def test_the_commands_take_it(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    path, states, answers = tiny_artifact(), [], []
    for engine in ("onnxruntime", "native"):
        folder = tmp_path / engine
        words = ("finetune", path, "--data", digits, "--steps", 3, "--eval-samples", 8, "-o", folder)
        assert run(*words, "--engine", engine).exit_code == 0
        states.append(read_state(Artifact.read(folder))[0])
        evaluator = "board" if engine == "onnxruntime" else engine
        measured = run("evaluate", folder, "--data", digits, "--engine", evaluator, "--json")
        answers.append(json.loads(measured.stdout))
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    assert [answer.pop("engine") for answer in answers] == ["board", "native"]
    for answer in answers:
        del answer["path"], answer["peak_bytes"]
    assert answers[0] == answers[1]
    refused = run("evaluate", folder, "--data", digits, "--engine", "native", "--attack", "autoattack")
    assert (
        "--attack autoattack needs --engine torch or sparse; --engine native has fgsm and pgd"
        in refused.stderr
    )


def test_an_operator_that_refuses_is_named(tiny_artifact: Make, batch: Batch) -> None:
    with Trainer(tiny_artifact(), engine="native") as trainer:
        before = {name: array.copy() for name, array in trainer.state().items()}
        trainer.learning_rate = float("nan")
        with pytest.raises(EdgeBcsError):
            trainer.step(*batch)
        assert all(np.array_equal(trainer.state()[name], before[name]) for name in before)
