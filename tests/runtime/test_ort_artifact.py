"""Artifacts of ONNX Runtime's own tools on a stock build: what 1.19.2 computed is in expected.json.

The artifacts and the numbers were made by tests/ort_training/dense_artifacts.py with onnxruntime-training
1.19.2 (whose own environment checks that they are still what it computes).
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from edge_bcs.runtime.ort.checkpoint import is_ort_checkpoint, read_ort_checkpoint
from helpers import DENSE

from edge_bcs.cli import main
from edge_bcs.core.errors import EdgeBcsError

if hasattr(onnxruntime.capi._pybind_state, "save_checkpoint"):
    pytest.skip("this is a training build, which runs its artifacts itself", allow_module_level=True)

from edge_bcs.runtime.onnx_file import decode, encode, read_model
from edge_bcs.runtime.ort.artifact import OrtArtifact, for_stock

NAMES = ("residual", "mobile")
RATE = 0.02


def batches() -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """As in dense_artifacts.py, which imports torch and is not needed here."""
    random = np.random.default_rng(0)
    return [(random.random((4, 1, 9, 9), np.float32), random.integers(0, 10, 4)) for _ in range(6)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_six_steps_are_those_of_the_training_build(name: str, threads: int) -> None:
    expected = json.loads((DENSE / name / "expected.json").read_text())
    with OrtArtifact(DENSE / name, learning_rate=RATE, threads=threads) as training:
        for i, (x, y) in enumerate(batches()):
            assert training.step(x, y)["loss"] == pytest.approx(expected["loss"][i], rel=1e-5)
            if i == 0:
                for key, values in expected["gradient"].items():
                    # A bias in front of a batch norm has the gradient 0, up to rounding.
                    assert np.allclose(training.gradient(key).ravel(), values, rtol=1e-4, atol=1e-6), key
            assert training.evaluate(x, y)["loss"] == pytest.approx(expected["evaluation"][i], rel=1e-5)
        assert training.steps == 6
        for key, values in expected["parameters"].items():  # running statistics too
            assert np.allclose(training.parameters[key].ravel(), values, rtol=1e-4, atol=1e-6), key


def test_the_artifacts_use_what_is_supplied() -> None:
    used = set()
    for name in NAMES:
        model = for_stock(read_model((DENSE / name / "training_model.onnx").read_bytes(), name))
        used |= {node.operator for node in model.nodes if node.domain == "com.microsoft"}
    assert used >= {
        "ConvGrad", "BatchNormInternal", "BatchNormalizationGrad", "MaxPoolGrad", "AveragePoolGrad",
        "ReluGrad", "LeakyReluGrad", "SigmoidGrad", "TanhGrad", "SoftmaxCrossEntropyLossGrad",
        "InPlaceAccumulatorV2",
    }  # fmt: skip


def test_gradients_accumulate_until_reset() -> None:
    with OrtArtifact(DENSE / "mobile") as training:
        x, y = batches()[0]
        training.accumulate(x, y, reset=True)
        once = training.gradient("head.weight")
        training.accumulate(x, y)
        assert np.allclose(training.gradient("head.weight"), 2 * once, rtol=1e-6)
        training.accumulate(x, y, reset=True)
        assert np.array_equal(training.gradient("head.weight"), once)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_is_not_finite_is_not_saved(name: str, tmp_path: Path) -> None:
    with OrtArtifact(DENSE / name, learning_rate=RATE) as training:
        training.step(*batches()[0])
        training.save_checkpoint(tmp_path / "saved")
        content = (tmp_path / "saved").read_bytes()
        for array in (training.parameters["head.weight"], training.moments["head.weight"][0]):
            before = array.copy()
            array.reshape(-1)[1] = np.inf
            with pytest.raises(EdgeBcsError, match=r"parameter head\.weight .* not finite; an earlier one"):
                training.save_checkpoint(tmp_path / "saved")
            array[...] = before
        assert (tmp_path / "saved").read_bytes() == content
        training.save_checkpoint(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_checkpoint_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    data = batches()
    with OrtArtifact(DENSE / name, learning_rate=RATE) as training:
        for x, y in data[:3]:
            training.step(x, y)
        training.save_checkpoint(tmp_path / "saved")
        training.save_checkpoint(tmp_path / "bare", include_optimizer_state=False)
        expected = [training.step(x, y)["loss"] for x, y in data[3:]]
    assert is_ort_checkpoint(tmp_path / "saved")
    with OrtArtifact(DENSE / name, checkpoint=tmp_path / "saved", learning_rate=RATE) as training:
        assert training.steps == 3
        assert [training.step(x, y)["loss"] for x, y in data[3:]] == expected
        assert training.steps == 6
    with OrtArtifact(DENSE / name, checkpoint=tmp_path / "bare", learning_rate=RATE) as training:
        assert training.steps == 0
        forgetful = [training.step(x, y)["loss"] for x, y in data[3:]]
    # SGD has nothing to forget; AdamW's moments show from the second loss on.
    assert forgetful[0] == expected[0] and (forgetful == expected) == (name == "residual")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_the_training_build_goes_on(name: str) -> None:
    expected = json.loads((DENSE / name / "expected.json").read_text())["loss"][3:]
    with OrtArtifact(DENSE / name, checkpoint=DENSE / name / "half_way", learning_rate=RATE) as training:
        assert training.steps == 3
        losses = [training.step(x, y)["loss"] for x, y in batches()[3:]]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_the_optimizer_state_of_another_network_is_refused(tmp_path: Path) -> None:
    held = read_ort_checkpoint(DENSE / "mobile" / "half_way")
    assert held.optimizer is not None
    first = sorted(held.optimizer.moments)[0]
    for moments in (
        {key: value for key, value in held.optimizer.moments.items() if key != first},
        {**held.optimizer.moments, first: held.optimizer.moments[first][:1]},
        {**held.optimizer.moments, first: [moment[:1] for moment in held.optimizer.moments[first]]},
    ):
        changed = replace(held, optimizer=replace(held.optimizer, moments=moments))
        (tmp_path / "changed").write_bytes(changed.serialize())
        with pytest.raises(EdgeBcsError, match="optimizer state belongs to another network"):
            OrtArtifact(DENSE / "mobile", checkpoint=tmp_path / "changed")


def test_the_command_trains_and_saves(tmp_path: Path) -> None:
    images = np.random.default_rng(1).random((120, 1, 9, 9), np.float32) * 0.5
    labels = np.arange(120) % 2
    images[labels == 1, :, :4] += 0.5
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    output = tmp_path / "trained"
    arguments = ["run-ort-artifact", str(DENSE / "mobile"), "--data", str(tmp_path / "data.npz"), "--json"]
    arguments += ["--epochs", "4", "--learning-rate", "0.02", "--eval-samples", "12", "-o", str(output)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["steps"] == len(report["losses"]) == 4 * 27
    assert np.mean(report["losses"][-10:]) < 0.6 * np.mean(report["losses"][:10])
    assert report["after"]["accuracy"] > report["before"]["accuracy"]
    before, after = read_ort_checkpoint(DENSE / "mobile" / "checkpoint"), read_ort_checkpoint(output)
    assert before.trainable.keys() == after.trainable.keys()
    assert not np.array_equal(before.trainable["head.weight"], after.trainable["head.weight"])
    result = CliRunner().invoke(main, [*arguments, "--checkpoint", str(output)])  # and on from there
    again = json.loads(result.stdout)
    assert (again["steps_before"], again["steps"], len(again["losses"])) == (4 * 27, 4 * 27, 4 * 27)
    assert again["before"] == report["after"]
    assert np.mean(again["losses"]) < np.mean(report["losses"])


def test_the_command_leaves_out_images_that_cannot_be_used(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image").new("L", (9, 9))
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            image.save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "ant" / "2.png").write_bytes(b"no image")
    arguments = [
        "run-ort-artifact",
        str(DENSE / "mobile"),
        "--data",
        str(tmp_path / "photos"),
        "--steps",
        "1",
    ]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 1 and "ant/2.png" in result.stderr and "--on-bad skip" in result.stderr
    result = CliRunner().invoke(main, [*arguments, "--json", "--on-bad", "skip"])
    assert result.exit_code == 0, result.output
    left_out = json.loads(result.stdout)["left_out"]
    assert (left_out["count"], left_out["images"][0]["image"]) == (1, "ant/2.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "checkpoint").unlink(), "checkpoint.* cannot be read"),
        (lambda f: (f / "checkpoint").write_bytes(b"what is this?"), "not a checkpoint of ONNX Runtime"),
        (lambda f: (f / "training_model.onnx").unlink(), "training_model.onnx cannot be read"),
        (lambda f: (f / "training_model.onnx").write_bytes(b"\x3a\xff"), "not an ONNX model"),
        (lambda f: shutil.copy(f / "eval_model.onnx", f / "optimizer_model.onnx"), "SGDOptimizerV2 or AdamW"),
        (lambda f: shutil.copy(f / "eval_model.onnx", f / "training_model.onnx"), None),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, change: Any, message: str | None) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(DENSE / "mobile", folder)
    change(folder)
    if message is None:  # a model without gradients trains nothing, but is a model: the step says so or works
        OrtArtifact(folder)
        return
    with pytest.raises(EdgeBcsError, match=message):
        OrtArtifact(folder)


def test_a_checkpoint_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = (DENSE / "mobile" / "half_way").read_bytes()
    file = tmp_path / "cut"
    for length in range(0, len(content) - 3, 7):
        file.write_bytes(content[:length])
        with pytest.raises(EdgeBcsError):
            read_ort_checkpoint(file)


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_checkpoint_altered_anywhere_is_read_or_refused(step: int, tmp_path: Path) -> None:
    content = (DENSE / "mobile" / "half_way").read_bytes()
    file = tmp_path / "altered"
    refused = 0
    for position in range(0, len(content), step):
        altered = bytearray(content)
        altered[position] ^= 0xFF
        file.write_bytes(altered)
        try:
            read_ort_checkpoint(file)
        except EdgeBcsError:
            refused += 1
    assert refused > 100 // step


def test_wrong_images_and_labels_are_refused() -> None:
    with OrtArtifact(DENSE / "mobile") as training:
        x, y = batches()[0]
        before = training.parameters["head.weight"].copy()
        for images, labels, message in (
            (x[:2], y[:2], r"\[4, 1, 9, 9\]"),
            (x, y[:3], r"labels must have the shape \[4\]"),
            (np.full_like(x, np.nan), y, "not a finite number"),
            (x, np.full_like(y, 10), "the model refused its input"),
        ):
            with pytest.raises(EdgeBcsError, match=message):
                training.step(images, labels)
        assert np.array_equal(training.parameters["head.weight"], before)
        assert training.steps == 0


def test_ordinary_sessions_do_not_get_the_training_operators() -> None:
    from edge_bcs.runtime import library

    OrtArtifact(DENSE / "mobile")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    library.register(options)
    with pytest.raises(Exception, match="not a registered function/op"):
        onnxruntime.InferenceSession(str(DENSE / "mobile" / "training_model.onnx"), options)


@pytest.mark.parametrize("name", NAMES)
def test_protobuf_survives_the_round_trip(name: str) -> None:
    onnx = pytest.importorskip("onnx")
    content = (DENSE / name / "training_model.onnx").read_bytes()
    assert encode(decode(content)) == content
    again = onnx.load_from_string(read_model(content, name).serialize())
    original = onnx.load_from_string(content)
    assert len(again.graph.node) == len(original.graph.node) > 20
    for one, other in zip(again.graph.node, original.graph.node, strict=True):
        for key in ("op_type", "domain", "name", "input", "output", "attribute"):
            assert getattr(one, key) == getattr(other, key)
    assert again.graph.initializer == original.graph.initializer
    assert again.graph.input == original.graph.input


def test_the_module_imports_no_onnx() -> None:
    import subprocess

    code = (
        "import sys; from edge_bcs.runtime.ort.artifact import OrtArtifact; "
        f"OrtArtifact({str(DENSE / 'mobile')!r}); assert not {{'onnx', 'torch', 'google'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
