"""edge-bcs-run with --unlabelled, and the C interface: Python's labels, bits, reports and sentences."""

from __future__ import annotations

import base64
import ctypes
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.course import packed
from edge_bcs.runtime.manifest import STATE
from edge_bcs.runtime.state import read_state, write_run
from edge_bcs.runtime.unlabelled import answers
from helpers import board_program as board
from helpers import commands
from helpers.c_interface import POINTER, CError, Network, StepResult, batch_of
from helpers.unlabelled import Array, digits, written_photographs

from edge_bcs.data.photographs import open_photographs

Image = pytest.importorskip("PIL.Image")
Make = Callable[..., Path]
Folders = tuple[Path, Path]
OPTIONS = ("--threads", 1, "--eval-samples", 4, "--eval-steps", 1, "--max-writes", "none", "--batch-size", 8)
PYTHON = ("--engine", "native")


@pytest.fixture
def photos(tmp_path: Path) -> Folders:
    folders = written_photographs(tmp_path, ("png", "jpg"))
    (folders[1] / ".hidden.png").write_text("none either")
    shutil.copytree(folders[1], tmp_path / "elsewhere")
    (folders[1] / "link").symlink_to(tmp_path / "elsewhere")  # nor what a link to a folder leads to
    return folders


def middling(artifact: Path, folder: Path) -> float:
    """The confidence that the network has of half of the photographs at the beginning."""
    with Trainer(artifact, engine="native") as trainer:
        images = open_photographs(folder, trainer.artifact.input_shape).read(np.arange(12))[0]
        return float(np.median(trainer.probabilities(images).max(axis=1)))


def given_to(artifact: Path, photos: Folders, *words: object) -> tuple[object, ...]:
    return ("finetune", artifact, "--data", photos[0], "--unlabelled", photos[1], *OPTIONS, *words)


def said(text: str, of: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if of in line]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("rst", ("--unlabelled-share", 0.25, "--unlabelled-weight", 2)),
        ("at", ("--augment", "photo", "--balance")),
        ("mart", ("--validation", 0.2)),
        ("natural", ("--confidence", 1)),
    ],
)
def test_a_training_is_pythons(
    tiny_artifact: Make, tmp_path: Path, photos: Folders, objective: str, words: tuple[object, ...]
) -> None:
    artifact = tiny_artifact(objective=objective)
    words = ("--confidence", middling(artifact, photos[1]), *words, "--epochs", 3)
    given = given_to(artifact, photos, *words, "--learning-rate", 0.05)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    report = board.succeed(*given, "-o", ours)
    wanted = commands.succeed(*given, *PYTHON, "-o", theirs)
    assert board.states(ours) == board.states(theirs)
    assert board.metrics(ours) == board.metrics(theirs)
    del report["run"], wanted["run"]
    assert board.timeless(report) == board.timeless(wanted)
    assert list(report["training"]) == list(wanted["training"])
    used = report["training"]["unlabelled"]
    assert used["images"] == 12 and (used["labelled"] > 0) == (objective != "natural")
    assert {line["unlabelled"] for line in board.metrics(ours)} != {0} or objective == "natural"


def test_what_is_said_is_what_python_says(tiny_artifact: Make, tmp_path: Path, photos: Folders) -> None:
    for confidence in (0.1, 1):
        artifact = tiny_artifact(objective="trades")
        given = given_to(artifact, photos, "--confidence", confidence, "--epochs", 1)
        ours = board.run(*given, "-o", tmp_path / f"ours{confidence}")
        theirs = commands.run(*given, *PYTHON, "-o", tmp_path / f"theirs{confidence}")
        lines = said(ours.stderr, "unlabelled images: ")
        assert lines and lines == said(theirs.stderr, "unlabelled images: ")
        (line,) = said(ours.stdout, "unlabelled images")
        assert line in " ".join(theirs.stdout.split())


@pytest.mark.parametrize("objective", ["rst", "at"])
def test_a_training_that_is_killed_ends_with_the_same_bits(
    tiny_artifact: Make, tmp_path: Path, photos: Folders, objective: str
) -> None:
    """In turns with Python; each goes on with the labels that the other made, kills fall anywhere."""
    artifact = tiny_artifact(objective=objective)
    words = ("--confidence", middling(artifact, photos[1]), "--unlabelled-weight", 0.5, "--save-steps", 1)
    begun = given_to(artifact, photos, *words, "--epochs", 8, "--eval-samples", 0)
    board.succeed(*begun, "-o", tmp_path / "whole")
    draws, run = np.random.default_rng(3), tmp_path / "parts"
    commands.run(*begun, *PYTHON, "-o", run, "--max-hours", 3e-6)
    given = given_to(artifact, photos, "--save-steps", 1, "--eval-samples", 0, "-o", run, "--resume")
    for attempt in range(3):
        line = [str(board.program()), *map(str, given)]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(float(draws.uniform(0.02, 0.08)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM if attempt % 2 else signal.SIGKILL)
            process.wait()
        commands.run(*given, *PYTHON, "--max-hours", 3e-6)
    board.succeed(*given)
    states = [board.states(folder)["state.safetensors"] for folder in (tmp_path / "whole", run)]
    assert states[0] == states[1]
    assert board.metrics(tmp_path / "whole") == board.metrics(run)


def test_photographs_that_are_labelled_too_are_left_out(
    tiny_artifact: Make, tmp_path: Path, photos: Folders
) -> None:
    labelled = sorted(photos[0].rglob("*.*"))
    for number, file in enumerate(labelled[:5]):
        shutil.copy(file, photos[1] / f"copy-{number}{file.suffix}")
    given = given_to(tiny_artifact(), photos, "--steps", 2)
    ours = board.run(*given, "-o", tmp_path / "ours")
    theirs = commands.run(*given, *PYTHON, "-o", tmp_path / "theirs")
    lines = said(ours.stderr, "the same file as")
    assert lines and "of the labelled data, and 4 more, are left out" in lines[0]
    assert lines[0] in " ".join(theirs.stderr.split())
    assert board.states(tmp_path / "ours") == board.states(tmp_path / "theirs")
    alone = given_to(tiny_artifact(), (photos[0], photos[0]), "--steps", 1)
    told = board.refused(*alone, "-o", tmp_path / "all")
    assert "all 20 unlabelled images are among the labelled ones, too" in told
    assert told in " ".join(commands.run(*alone, "-o", tmp_path / "them").output.split())


def test_photographs_that_cannot_be_used(tiny_artifact: Make, tmp_path: Path, photos: Folders) -> None:
    """They are refused, or left out for good: what is removed since keeps its place."""
    bad = photos[1] / "a" / "b" / "00.png"
    bad.write_bytes(b"no photograph")
    given = given_to(tiny_artifact(), photos, "--epochs", 2, "--save-steps", 1)
    assert f"the image {bad} " in board.refused(*given, "-o", tmp_path / "run")
    given += ("--on-bad", "skip")
    for name, program, extra in (("ours", board.run, ()), ("theirs", commands.run, PYTHON)):
        bad.write_bytes(b"no photograph")
        begun = program(*given, *extra, "-o", tmp_path / name, "--max-hours", 1e-9)
        assert "1 of 13 images (unlabelled) are left out" in begun.stderr
        bad.unlink()
        program(*given, *extra, "-o", tmp_path / name, "--resume")
        left_out = json.loads((tmp_path / name / "report.json").read_text())["left_out"]["images"]
        assert [(one["split"], one["image"]) for one in left_out] == [("unlabelled", "a/b/00.png")]
    assert board.states(tmp_path / "ours") == board.states(tmp_path / "theirs")


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: None,
        lambda folder: folder.write_text(""),
        lambda folder: (folder / "a").mkdir(parents=True),
        lambda folder: (folder.mkdir(), (folder / "a.png").symlink_to("/etc/hostname")),
    ],
)
def test_folders_without_photographs_are_refused_alike(
    tiny_artifact: Make, tmp_path: Path, photos: Folders, make: Callable[[Path], Any]
) -> None:
    make(tmp_path / "given")
    given = given_to(tiny_artifact(), (photos[0], tmp_path / "given"), "-o", tmp_path / "run")
    told = board.refused(*given)
    assert told in " ".join(commands.run(*given).output.split())
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--confidence", 0.5),
        ("--unlabelled-share", 0.5),
        ("--unlabelled-weight", 2),
        ("--unlabelled", "x", "--confidence", 90),
        ("--unlabelled", "x", "--unlabelled-share", 1),
        ("--unlabelled", "x", "--unlabelled-weight", 0),
    ],
)
def test_options_that_cannot_be_meant_are_refused_alike(
    tiny_artifact: Make, tmp_path: Path, words: tuple[object, ...]
) -> None:
    given = ("finetune", tiny_artifact(), "--data", "digits", *words, "-o", tmp_path / "run")
    ours, theirs = board.run(*given), commands.run(*given)
    assert ours.returncode == theirs.exit_code != 0
    assert ours.stderr.splitlines()[-1] == theirs.stderr.splitlines()[-1]


def test_a_training_goes_on_with_the_photographs_that_it_began_with(
    tiny_artifact: Make, tmp_path: Path, photos: Folders
) -> None:
    artifact, run = tiny_artifact(), tmp_path / "run"
    board.succeed(*given_to(artifact, photos, "--steps", 2), "-o", run)
    (tmp_path / "fewer").mkdir()
    shutil.copy(next(photos[1].glob("*.png")), tmp_path / "fewer")
    without = ("finetune", artifact, "--data", photos[0], *OPTIONS)
    for given, sentence in (
        (without, "the saved training used 12 unlabelled images, too: resume it with them (--unlabelled)"),
        (given_to(artifact, (photos[0], tmp_path / "fewer")), "12 unlabelled images, not 1; resume it"),
        (given_to(artifact, photos, "--unlabelled-share", 0.25), "filled 0.5 of a batch with unlabelled"),
    ):
        told = board.refused(*given, "--steps", 4, "-o", run, "--resume")
        assert sentence in told
        theirs = commands.run(*given, *PYTHON, "--steps", 4, "-o", run, "--resume")
        assert told in " ".join(theirs.output.split())


def test_the_service_finds_them(tiny_artifact: Make, photos: Folders, tmp_path: Path) -> None:
    result = board.run(*given_to(tiny_artifact(), photos), "-o", tmp_path / "run", "--print-service")
    words = result.stdout.split()
    assert words[words.index("--unlabelled") + 1] == str(photos[1].resolve())
    needed = next(line for line in result.stdout.splitlines() if line.startswith("RequiresMountsFor"))
    assert str(photos[1].resolve()) in needed


# The C interface


@pytest.fixture
def more() -> Array:
    return digits(8, 31)[0]


def test_the_c_interface_labels_as_python_does(tiny_artifact: Make, tmp_path: Path, more: Array) -> None:
    artifact, (x, y) = tiny_artifact(objective="rst"), digits(0, 8)
    with Trainer(artifact, engine="native") as trainer:
        labels, sure = answers(trainer, more)
    confidence = float(np.sort(sure)[10])
    wanted = np.where(sure >= np.float32(confidence), labels, -1)
    found = np.empty(len(more), np.int64)
    place = (POINTER(found.ctypes.data), ctypes.c_size_t(len(more)))
    with Network(artifact) as network:
        network.begin(images=8, batch_size=6, unlabelled=23, confidence=confidence, has_confidence=1)
        assert network.position.label == 1 and network.position.labelled_epoch == -1
        assert (network.position.count, network.position.unlabelled_count) == (3, 3)
        assert network.position.steps_per_epoch == 8 and network.position.keeps_all == 1
        with pytest.raises(CError, match="let the network label the unlabelled images, by edge_bcs_label"):
            network.call("train", batch_of(x[:6], y[:6]), StepResult())
        with pytest.raises(CError, match="no image was labelled"):
            network.call("pseudo_labels", *place)
        with pytest.raises(CError, match="has 23 unlabelled images, not 8"):
            network.call("label", batch_of(x))
        network.call("label", batch_of(more))
        with pytest.raises(CError, match="nothing is to be labelled now"):
            network.call("label", batch_of(more))
        network.call("pseudo_labels", *place)
        assert np.array_equal(found, wanted)
        with pytest.raises(CError, match="the next step has 6 images, not 2"):
            network.call("train", batch_of(x[:2], y[:2]), StepResult())
        mixed = np.concatenate([x[:3], more[:3]]), np.concatenate([y[:3], found[:3]])
        network.call("train", batch_of(*mixed), StepResult())
        assert len(network.state_written()) <= network.info.state_bytes
        network.call("save_into", str(tmp_path / "run").encode())
        network.save()
    _, metadata = read_state(Artifact.read(tmp_path / "run"))
    with Trainer.resume(tmp_path / "run", engine="native") as trainer:
        trainer.fit((x, y), unlabelled=more, progress=False, save=tmp_path / "run")
        assert trainer.steps == 8
    assert json.loads(metadata["progress"])["pseudo_epoch"] == 0


@pytest.mark.parametrize("count", [1, 2, 3, 22])
@pytest.mark.parametrize("width", ["<i1", "<i2", "<i4", "<i8"])
def test_labels_of_any_width_are_read(
    tiny_artifact: Make, tmp_path: Path, more: Array, count: int, width: str
) -> None:
    """Written again as Python writes them, whatever is left over behind threes of bytes."""
    artifact, (x, y) = tiny_artifact(), digits(0, 8)
    with Trainer(artifact, engine="native") as trainer:
        trainer.fit((x, y), unlabelled=more[:count], steps=1, batch_size=4, save=tmp_path / "run",
                    progress=False)  # fmt: skip
    read = Artifact.read(tmp_path / "run")
    tensors, metadata = read_state(read)
    labels = np.random.default_rng(count).integers(-1, 10, count)
    packed = f"{width[1:]}:{base64.b64encode(labels.astype(width).tobytes()).decode()}"
    progress = json.loads(metadata["progress"]) | {"pseudo_labels": packed}
    write_run(tmp_path / "run", read, tensors, {**metadata, "progress": json.dumps(progress, sort_keys=True)})
    found = np.empty(count, np.int64)
    with Network(tmp_path / "run") as network:
        network.begin(images=8, unlabelled=count, resume=1, steps=3)
        network.call("pseudo_labels", POINTER(found.ctypes.data), ctypes.c_size_t(count))
        network.call("save_into", str(tmp_path / "run").encode())
        network.save()
    assert np.array_equal(found, labels)
    progress |= {"pseudo_labels": f"i1:{base64.b64encode(labels.astype('i1').tobytes()).decode()}"}
    written = json.loads(read_state(Artifact.read(tmp_path / "run"))[1]["progress"])
    assert written == progress | {"total_steps": 3}


def test_there_is_room_for_the_labels_of_a_run_that_is_written_as_it_was(
    tiny_artifact: Make, tmp_path: Path, more: Array
) -> None:
    artifact, data, run = tiny_artifact(), digits(0, 8), tmp_path / "run"
    with Trainer(artifact, engine="native") as trainer:
        trainer.fit(data, unlabelled=more, steps=1, batch_size=4, save=run, progress=False)
    read = Artifact.read(run)
    tensors, metadata = read_state(read)
    labels = base64.b64encode(bytes(20_000)).decode()
    progress = json.dumps(json.loads(metadata["progress"]) | {"pseudo_labels": f"i1:{labels}"})
    write_run(run, read, tensors, {**metadata, "progress": progress})
    with Network(run) as network:
        network.call("save_into", str(run).encode())
        written = network.state_written()
    (run / STATE).write_bytes(written)
    assert read_state(Artifact.read(run))[1]["progress"] == progress


def test_labels_of_many_classes(tmp_path: Path) -> None:
    """Two bytes each, from 129 classes on."""
    torch = pytest.importorskip("torch")
    from edge_bcs.exporters import export

    from edge_bcs import Memory
    from edge_bcs.method.connectivity import sparsify

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 200))
    artifact, run = tmp_path / "artifact", tmp_path / "run"
    memory = Memory(None, micro_batch=4)
    export(sparsify(model, 0.5, seed=0), artifact, input_shape=(1, 8, 8), memory=memory, validate=False)
    more = np.random.default_rng(0).random((40, 1, 8, 8), np.float32)
    with Trainer(artifact, engine="native") as trainer:
        labels, _ = answers(trainer, more)
    assert labels.max() > 127
    with Network(artifact) as network:
        network.begin(images=8, batch_size=4, unlabelled=40, has_confidence=1)
        network.call("label", batch_of(more))
        assert len(network.state_written()) <= network.info.state_bytes
        network.call("save_into", str(run).encode())
        network.save()
    progress = json.loads(read_state(Artifact.read(run))[1]["progress"])
    assert progress["pseudo_labels"] == packed(labels) and progress["confidence"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"pseudo_labels": "i1:AAA="},  # fewer than there are images
        {"pseudo_labels": "i1:AAAAAAA"},  # cut
        {"pseudo_labels": "i1:AA=AAAA="},
        {"pseudo_labels": "i1:AAA*AA=="},
        {"pseudo_labels": "i3:AAAAAA=="},
        {"pseudo_labels": "i1:/v///w=="},  # −2
        {"pseudo_labels": "i1:CgAAAA=="},  # class 10 of ten
        {"pseudo_labels": 3},
        {"pseudo_labels": None},
        {"pseudo_epoch": -2},
        {"confidence": 1.5},
        {"unlabelled_share": 1},
        {"unlabelled_weight": 0},
        {"unlabelled": 5},
        {"batch_size": 1},
    ],
)
def test_a_damaged_position_is_refused(
    tiny_artifact: Make, tmp_path: Path, more: Array, change: dict[str, Any]
) -> None:
    artifact, data = tiny_artifact(), digits(0, 8)
    with Trainer(artifact, engine="native") as trainer:
        wishes: dict[str, Any] = {"unlabelled": more[:4], "steps": 1, "batch_size": 4, "progress": False}
        trainer.fit(data, save=tmp_path / "run", **wishes)
    read = Artifact.read(tmp_path / "run")
    tensors, metadata = read_state(read)
    progress = {**json.loads(metadata["progress"]), **change}
    write_run(tmp_path / "run", read, tensors, {**metadata, "progress": json.dumps(progress)})
    told = pytest.raises(CError, match="the saved position of the training is damaged")
    with Network(tmp_path / "run") as network, told:
        network.begin(images=8, unlabelled=4, resume=1, steps=3)
