"""What a file says of its network and its training, when somebody means harm: one sentence, and no memory."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime.board.saving import MetricsFile
from edge_bcs.runtime.course import Course
from helpers.artifacts import write_artifact

from edge_bcs.cli import main
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import counters, exact_sparsity, parse_object

DEEP = "[" * 100_000
LONG_NUMBER = "9" * 5000  # more digits than int() takes


@pytest.fixture
def frugal() -> Any:
    """At most 64 MiB more than before, at any moment; what torch takes when it is first used not counted."""
    torch = pytest.importorskip("torch")
    from edge_bcs import models

    torch.ones(1)
    models.create("vgg16", width=1 / 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


# The network of a manifest or a checkpoint

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"width": 1e308}, "width multiplier"),
    ({"width": 500}, "parameters"),
    ({"width": float("nan")}, "width multiplier"),
    ({"width": float("inf")}, "width multiplier"),
    ({"width": -1.0}, "width multiplier"),
    ({"width": "1"}, "width multiplier"),
    ({"width": True}, "width multiplier"),
    ({"width": [1.0]}, "width multiplier"),
    ({"width": 10**400}, "width multiplier"),
    ({"num_classes": 10**9}, "num_classes"),
    ({"num_classes": 10**400}, "num_classes"),
    ({"num_classes": 1 << 20, "width": 8}, "parameters"),
    ({"num_classes": 10.0}, "num_classes"),
    ({"num_classes": None}, "num_classes"),
    ({"num_classes": True}, "num_classes"),
    ({"num_classes": -1}, "at least 2 classes"),
    ({"input_size": 60_000}, "parameters"),
    ({"input_size": 1 << 40}, "input_size"),
    ({"input_size": "32"}, "input_size"),
    ({"input_channels": 1 << 40}, "input_channels"),
    ({"input_channels": {}}, "input_channels"),
    ({"depth": 1000}, "takes no argument 'depth'"),
    ({"": 1}, "takes no argument ''"),
    ({"self": 1}, "takes no argument"),
    ({"name": "resnet18"}, "takes no argument 'name'"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_arguments_of_a_network(
    arguments: dict[str, Any], message: str, tmp_path: Path, frugal: None
) -> None:
    """As Python, in a checkpoint's metadata and in a manifest: the same answer."""
    from edge_bcs import models
    from edge_bcs.loading import load

    with pytest.raises(EdgeBcsError, match=message):
        models.create("vgg16", **arguments)
    described = {"name": "vgg16", "arguments": arguments}
    artifact = write_artifact(tmp_path / "artifact", lambda d: d["network"].update(described))
    for path in (artifact, checkpoint(tmp_path, network=json.dumps(described))):
        with pytest.raises(EdgeBcsError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def checkpoint(folder: Path, **metadata: str) -> Path:
    """A small network's checkpoint whose metadata says something else."""
    from safetensors.numpy import save_file

    from edge_bcs import models
    from edge_bcs.checkpoint import read_checkpoint, save_checkpoint
    from edge_bcs.method.connectivity import sparsify

    file = folder / "checkpoint.safetensors"
    save_checkpoint(file, sparsify(models.vgg16(width=1 / 16), 0.99, seed=1))
    if metadata:
        found = read_checkpoint(file)
        save_file(found.tensors, file, {**found.metadata, **metadata})
    return file


METADATA = {
    "a network that is a list": {"network": "[1]"},
    "a network without end": {"network": DEEP},
    "a name that is a list": {"network": '{"name": ["vgg16"]}'},
    "arguments that are a list": {"network": '{"name": "vgg16", "arguments": [["width", 1]]}'},
    "no name": {"network": "{}"},
    "layers that are a number": {"layers": "5"},
    "layers without shapes": {"layers": '["features.0"]'},
    "layers of text": {"layers": '[["features.0", "ab"]]'},
    "layers of another network": {"layers": '[["features.0", [4, 3, 3, 3]]]'},
    "layers without end": {"layers": DEEP},
    "a step of many digits": {"step": LONG_NUMBER},
    "a step beyond the counters": {"step": str(2**56)},
    "a step in other digits": {"step": "٣"},
    "a seed beyond 64 bits": {"seed": str(2**64)},
    "a negative seed": {"seed": "-1"},
    "a sparsity that is no number": {"sparsity": "most"},
    "a sparsity of one": {"sparsity": "1"},
    "a sparsity of NaN": {"sparsity": "nan"},
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_a_checkpoint(name: str, tmp_path: Path, frugal: None) -> None:
    from edge_bcs.loading import load

    assert load(checkpoint(tmp_path)).seed == 1
    file = checkpoint(tmp_path, **METADATA[name])
    with pytest.raises(EdgeBcsError) as caught:
        load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "change",
    [
        {"coo.value": ("float16", (5,))},
        {"coo.value": ("float32", (5, 1))},
        {"coo.index": ("float32", (5,))},
        {"dense.value": ("int32", (9,))},
        {"batchnorm.mean": ("float32", ())},
    ],
)
def test_types_of_a_checkpoint(change: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import numpy as np
    from safetensors.numpy import save_file

    from edge_bcs.checkpoint import read_checkpoint
    from edge_bcs.loading import load

    found = read_checkpoint(checkpoint(tmp_path))
    changed = {name: np.ones(shape, dtype) for name, (dtype, shape) in change.items()}
    save_file({**found.tensors, **changed}, tmp_path / "x.safetensors", found.metadata)
    with pytest.raises(EdgeBcsError, match=f"{next(iter(change))} is"):
        load(tmp_path / "x.safetensors")


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "arguments": (lambda d: d["network"].update(arguments=[]), "network.arguments"),
    "sparsity": (lambda d: d.update(sparsity="most"), "sparsity"),
    "sparsity of one": (lambda d: d.update(sparsity="1.0"), "sparsity"),
    "distribution": (lambda d: d.update(distribution=["paper"]), "distribution"),
    "choice": (lambda d: d["memory"].update(choice="bf16"), "memory.choice"),
    "rate": (lambda d: d["hyper"].update(learning_rate=10**400), "hyper.learning_rate"),
    "beyond float32": (lambda d: d["hyper"].update(noise=1e39), "hyper.noise"),
    "NaN": (lambda d: d["hyper"].update(momentum=float("nan")), "hyper.momentum"),
    "epsilon": (lambda d: d["objective"].update(epsilon=float("nan")), "objective.epsilon"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_fields_of_a_manifest(name: str, tmp_path: Path) -> None:
    from edge_bcs.runtime.artifact import Artifact

    change, message = MANIFESTS[name]
    with pytest.raises(EdgeBcsError, match=message):
        Artifact.read(write_artifact(tmp_path / "artifact", change))


# What a training left behind


@pytest.mark.parametrize("text", ["", "[]", "null", "1", DEEP, '{"a": ' + LONG_NUMBER + "}", b"\xff"])
def test_only_objects_are_objects(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_object(text)
    assert parse_object('{"a": 1}') == {"a": 1}


def test_counters_and_sparsity() -> None:
    assert counters({"step": str(2**56 - 1), "seed": str(2**64 - 1)}) == (2**56 - 1, 2**64 - 1)
    assert str(exact_sparsity(0.99)) == "0.99"


@pytest.mark.parametrize("value", ["Infinity", "1e400", "null", "[]", DEEP, LONG_NUMBER])
def test_lines_of_metrics_with_impossible_steps(value: str, tmp_path: Path) -> None:
    """They are not of the steps that were done, so a resumed training removes them."""
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{{"step": {value}}}\n')
    MetricsFile(file, resumed_at=1).close()
    assert file.read_text() == '{"step": 1}\n'


def test_a_line_of_metrics_without_end(tmp_path: Path, frugal: None) -> None:
    file = tmp_path / "metrics.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"step": 1}\n')
        stream.truncate(96 << 20)
    MetricsFile(file, resumed_at=1).close()
    assert file.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("value", [-1.0, 10**400, float("nan"), None, "0.1"])
def test_a_rate_that_none_can_be(value: Any) -> None:
    course = Course(first_step=0, first_epoch=0, batch_size=1, samples=1, total_steps=1, learning_rate=0.1)
    assert Course.parse(course.dump(), 0) == course
    with pytest.raises(EdgeBcsError, match="saved position"):
        Course.parse(json.dumps({**json.loads(course.dump()), "learning_rate": value}), 0)


@pytest.mark.parametrize(
    "report",
    [
        {"before": 5},
        {"training": {"finished": True}},
        {"training": [], "before": {"accuracy": "x", "samples": 1}},
        {"after": {"accuracy": 1.0, "samples": 1, "robust_accuracy": "x"}},
    ],
)
def test_the_report_of_a_run_that_says_nothing_of_use(
    report: dict[str, Any], tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """A finished training that is resumed prints its report again: what is damaged is measured anew."""
    from click.testing import CliRunner

    words = ["finetune", str(tiny_artifact()), "--data", "digits", "--steps", "1", "--eval-samples", "4"]
    words += ["--eval-steps", "1", "--batch-size", "8", "-o", str(tmp_path / "run")]
    words[3:4] = [str(small_data(tmp_path))]
    assert CliRunner().invoke(main, words).exit_code == 0
    file = tmp_path / "run" / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **report}))
    answer = CliRunner().invoke(main, [*words, "--resume"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(file.read_text())["before"]["samples"] == 4


def small_data(folder: Path) -> Path:
    """Images for the tiny network."""
    import numpy as np

    chance = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=chance.random((80, 1, 8, 8), np.float32), y=np.arange(80) % 10)
    return folder / "data.npz"


@pytest.mark.parametrize(
    "damage",
    [
        {"clean": -1}, {"batches": "x"}, {"warnings": [1]}, {"clean": 9},
        {"adversarial": 2}, {"adversarial": [5]}, {"adversarial": [1, 1]}, {"adversarial": "x"},
    ],
)  # fmt: skip
def test_counts_of_an_interrupted_evaluation(damage: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from edge_bcs.evaluation.measures import interrupted_counts

    counts = {"batches": 1, "samples": 4, "clean": 3, "adversarial": [2], "warnings": ["w"]}
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"asked": {}, "counts": counts}))
    assert interrupted_counts(file, {}, 1) == counts
    file.write_text(json.dumps({"asked": {}, "counts": {**counts, **damage}}))
    with pytest.raises(EdgeBcsError, match="counts of another evaluation, or damaged ones"):
        interrupted_counts(file, {}, 1)


@pytest.mark.parametrize(
    "content",
    [
        ["accuracy", "samples"],
        {"accuracy": "x", "samples": 1, "sparsity": 0.9},
        {"accuracy": 0.5, "samples": 1, "sparsity": 1},
        {"accuracy": 0.5, "samples": 1, "attack": "square"},
    ],
)
def test_reports_that_cannot_be_drawn(content: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    pytest.importorskip("matplotlib")
    (tmp_path / "report.json").write_text(json.dumps(content))
    answer = CliRunner().invoke(main, ["plot", str(tmp_path / "report.json"), "-o", str(tmp_path)])
    assert answer.exit_code == 1 and answer.output.startswith("Error: ") and answer.output.count("\n") == 1
