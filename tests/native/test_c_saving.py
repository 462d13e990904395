"""Saves of the C interface: the files of the Python runtime, each going on with the other's runs."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Artifact, Trainer
from edge_bcs.runtime.state import read_state
from helpers.c_interface import POINTER, STOPPED, CError, Network

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.state import STATE_NAMES

Array = np.ndarray[Any, Any]
Make = Callable[..., Path]
STATE, PREVIOUS = "state.safetensors", "state.previous.safetensors"
FIT: dict[str, Any] = {
    "batch_size": 16,
    "augment": "none",
    "schedule": "cosine",
    "warmup": 0.2,
    "learning_rate": 0.07,
}


@pytest.fixture
def data() -> tuple[Array, Array]:
    """56 images, three and a half batches an epoch."""
    rng = np.random.default_rng(2)
    return rng.integers(0, 256, (56, 1, 8, 8), np.uint8), rng.integers(0, 10, 56)


def fitted(trainer: Trainer, data: tuple[Array, Array], until: int, save: Path | None = None) -> None:
    """Go on with a training of ten steps, until so many are done."""

    class Enough(Exception):  # noqa: N818 (it is no error)
        pass

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["step"] == until:
            raise Enough

    saving: dict[str, Any] = {"save": save, "save_steps": 1, "max_writes": None} if save else {}
    try:
        trainer.fit(data, steps=10, progress=False, on_step=stop if until < 10 else None, **FIT, **saving)
    except Enough:
        assert save is not None
        trainer.save(save)


def begin(network: Network, data: tuple[Array, Array], **changes: Any) -> None:
    wishes = {**FIT, "schedule": b"cosine", "augment": b"none", "has_warmup": 1, "steps": 10, "resume": 1}
    network.begin(images=len(data[0]), **{**wishes, **changes})


def expected_of(path: Path, data: tuple[Array, Array], folder: Path) -> dict[str, bytes]:
    """The files of a run that was not interrupted."""
    with Trainer(path) as trainer:
        fitted(trainer, data, 10)
        trainer.save(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_a_whole_training_is_pythons(
    tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path, batch_norm: str
) -> None:
    path = tiny_artifact(batch_norm=batch_norm)
    expected = expected_of(path, data, tmp_path / "python")
    with Network(path) as network:
        begin(network, data)
        network.call("save_into", str(tmp_path / "c").encode())
        while not network.position.finished:
            network.train(*data)
        written = network.save()
        state = network.state_written()
    found = {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()}
    manifests = [json.loads(files.pop("manifest.json")) for files in (found, expected)]
    classes = manifests[1].pop("classes")  # Python names them after its data
    assert manifests[0] == manifests[1] and classes == [str(label) for label in range(10)]
    assert found == expected
    assert state == found[STATE] and len(state) == written


@pytest.mark.parametrize("first", ["c", "python"])
def test_each_goes_on_with_the_others_run(
    tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path, first: str
) -> None:
    path, run = tiny_artifact(batch_norm="batch"), tmp_path / "run"
    expected = expected_of(path, data, tmp_path / "python")[STATE]
    for until, turn in ((3, "first"), (5, "second"), (8, "first"), (10, "second")):
        source = path if until == 3 else run
        if (turn == "first") == (first == "c"):
            with Network(source) as network:
                begin(network, data)
                network.call("save_into", str(run).encode())
                while network.position.done < until:
                    network.train(*data)
                    network.save()
        else:
            with Trainer(source) if until == 3 else Trainer.resume(source) as trainer:
                fitted(trainer, data, until, save=run)
    assert (run / STATE).read_bytes() == expected


def test_another_training_after_the_first(
    tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path
) -> None:
    path = tiny_artifact()
    with Trainer(path) as trainer:
        trainer.fit(data, steps=3, progress=False, augment="none", batch_size=16)
        trainer.fit(data, epochs=1, progress=False, augment="none", batch_size=16)
        trainer.save(tmp_path / "python")
    with Network(path) as network:
        network.call("save_into", str(tmp_path / "c").encode())
        for length in ({"steps": 3}, {"epochs": 1}):
            network.begin(images=len(data[0]), augment=b"none", batch_size=16, **length)
            while not network.position.finished:
                network.train(*data)
        network.save()
    assert (tmp_path / "c" / STATE).read_bytes() == (tmp_path / "python" / STATE).read_bytes()


def test_a_skipped_step_is_counted(tiny_artifact: Make, data: tuple[Array, Array]) -> None:
    with Network(tiny_artifact()) as network:
        with pytest.raises(CError, match="no training was begun"):
            network.call("skip")
        begin(network, data)
        network.call("skip")
        assert (network.position.skipped, network.position.done, network.steps) == (1, 1, 1)
        network.call("skip")
        network.call("skip")
        with pytest.raises(CError, match="every batch of an epoch was skipped"):
            network.call("skip")


def test_the_slot_before_is_used(tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Network(tiny_artifact()) as network:
        network.call("save_into", str(run).encode())
        for _ in range(2):
            network.step(*data)
            network.save()
    with Network(run) as network:
        assert (network.steps, (run / PREVIOUS).is_file()) == (2, True)
    whole = (run / STATE).read_bytes()
    (run / STATE).write_bytes(whole[:-1])
    with Network(run) as network:
        assert network.steps == 1
    # A cut between the two renamings leaves a whole partial file.
    (run / STATE).unlink()
    (run / f"{STATE}.partial").write_bytes(whole)
    with Network(run) as network:
        assert network.steps == 2
    # A newer one lies there, whole, if the cut came just before: what was told of it is true from then on.
    with Network(run) as network:
        network.call("save_into", str(run).encode())
    assert (run / STATE).read_bytes() == whole and not (run / f"{STATE}.partial").exists()
    (run / f"{STATE}.partial").write_bytes(whole[:-1])  # a save that never ended
    with Network(run) as network:
        network.call("save_into", str(run).encode())
        assert network.steps == 2
    assert (run / STATE).read_bytes() == whole
    (run / f"{STATE}.partial").unlink()
    (run / STATE).unlink()
    (run / PREVIOUS).write_bytes(b"")
    with pytest.raises(CError, match="holds no intact state"):
        Network(run)


def test_one_writer_at_a_time(tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path) -> None:
    path, run = tiny_artifact(), tmp_path / "deep" / "run"
    with Network(path) as network:
        network.call("save_into", str(run).encode())
        with Trainer(path) as trainer, pytest.raises(EdgeBcsError, match="is being written by process"):
            trainer.claim(run)
        with Network(path) as other, pytest.raises(CError, match="is being written by process"):
            other.call("save_into", str(run).encode())
        network.step(*data)
        network.save()
    assert not (run / ".edge-bcs.lock").exists()
    with Network(run) as stale, Network(run) as network:
        network.call("save_into", str(run).encode())
        network.step(*data)
        network.save()
        network.close()
        with pytest.raises(CError, match="is at step 2 and was at 1 when it was opened here"):
            stale.call("save_into", str(run).encode())
    with Trainer(path) as trainer:
        trainer.claim(tmp_path / "other")
        with Network(path) as network, pytest.raises(CError, match="is being written by process"):
            network.call("save_into", str(tmp_path / "other").encode())


def test_what_lies_there_is_not_lost(tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path) -> None:
    path, other = tiny_artifact(), tiny_artifact(objective="trades")
    with Trainer(other) as trainer:
        trainer.save(tmp_path / "run of another")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / STATE).write_text("mine")
    shutil.copytree(path, tmp_path / "artifact")
    with Network(path) as network:
        for name, sentence in (
            ("artifact", "is an exported artifact, which stays as it is"),
            ("run of another", "holds a run of another artifact: its objective"),
            ("taken", f"holds no run, but a {STATE} that the run would replace"),
            ("file", r"cannot be made|is a file"),
        ):
            with pytest.raises(CError, match=sentence):
                network.call("save_into", str(tmp_path / name).encode())
        with pytest.raises(CError, match="no folder was named"):
            network.save()
        network.call("save_into", str(tmp_path / "left").encode())
        network.call("save_into", str(tmp_path / "new").encode())
        network.step(*data)
        network.save()
    assert (tmp_path / "taken" / STATE).read_text() == "mine"
    with Trainer(tmp_path / "new") as trainer:
        assert trainer.steps == 1


def test_a_full_disk_keeps_the_saves(
    tiny_artifact: Make, data: tuple[Array, Array], small_disk: Path
) -> None:
    run = small_disk / "run"
    with Network(tiny_artifact()) as network:
        network.call("save_into", str(run).encode())
        network.step(*data)
        network.save()
        before = (run / STATE).read_bytes()
        with (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                try:
                    filler.write(b"\0" * 4096)
                except OSError:
                    break
        network.step(*data)
        with pytest.raises(
            CError, match=r"could not be saved to .*: the disk is full; earlier saves are kept"
        ):
            network.save()
        assert (run / STATE).read_bytes() == before
        assert not (run / f"{STATE}.partial").exists()
        (small_disk / "filler").unlink()
        network.save()
    with Network(run) as network:
        assert network.steps == 2


def test_names_of_the_classes(tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path) -> None:
    names = [f'"Größe" {number}' for number in range(10)]
    given = (ctypes.c_char_p * 10)(*(name.encode() for name in names))
    with Network(tiny_artifact()) as network:
        with pytest.raises(CError, match="has 10 classes, and 9 names are given"):
            network.call("name_classes", given, ctypes.c_size_t(9))
        network.call("name_classes", given, ctypes.c_size_t(10))
        network.call("save_into", str(tmp_path / "run").encode())
        network.step(*data)
        network.save()
    assert Artifact.read(tmp_path / "run").classes == tuple(names)
    with Network(tmp_path / "run") as network:
        assert network.info.named == 1


def test_state_in_memory(tiny_artifact: Make, data: tuple[Array, Array]) -> None:
    path = tiny_artifact(batch_norm="batch")
    with Network(path) as network:
        network.step(*data)
        state = network.state_written()
        expected = network.step(*data).loss
    files = {name: (path / name).read_bytes() for name in ("manifest.json", "program.bin", STATE)}
    with Network.of_files(files) as network:
        with pytest.raises(CError, match="makes no run folders"):
            network.call("save_into", b"run")
        before = network.state(STATE_NAMES)
        for place in range(0, len(state), 97):
            damaged = bytearray(state)
            damaged[place] ^= 0x20
            with pytest.raises(CError):
                network.call("state_read", bytes(damaged), ctypes.c_size_t(len(damaged)))
        with pytest.raises(CError, match="too few for the state"):
            network.call("state_write", bytes(100), ctypes.c_size_t(100), ctypes.byref(ctypes.c_size_t()))
        assert all(np.array_equal(network.tensor(name), before[name]) for name in before)
        network.call("state_read", state, ctypes.c_size_t(len(state)))
        assert network.steps == 1
        assert network.step(*data).loss == expected


def test_a_state_part_after_part(tiny_artifact: Make, data: tuple[Array, Array]) -> None:
    with Network(tiny_artifact()) as network:
        network.step(*data)
        parts: list[bytes] = []

        def keep(user: int | None, content: int | None, size: int) -> int:
            parts.append(ctypes.string_at(content or 0, size) if size else b"")
            return int(user or 0)

        write = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(keep)
        network.call("state_stream", write, None)
        assert b"".join(parts) == network.state_written()
        assert max(map(len, parts)) < len(network.state_written())
        parts.clear()
        with pytest.raises(CError) as refused:
            network.call("state_stream", write, ctypes.c_void_p(1))
        assert refused.value.status == STOPPED and len(parts) == 1


def test_what_a_training_cannot_go_on_with(
    tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path
) -> None:
    with Trainer(tiny_artifact()) as trainer:
        trainer.fit(data, steps=2, progress=False, unlabelled=data[0][:9] / 255, save=tmp_path / "run")
    with Network(tmp_path / "run") as network:
        with pytest.raises(CError, match="used 9 unlabelled images, too: resume it with them"):
            begin(network, data)
        begin(network, data, resume=0)
        with pytest.raises(CError, match="the schedule is one of steps, cosine, one-cycle"):
            begin(network, data, resume=0, schedule=b"linear")


@pytest.mark.parametrize("schedule", ["steps", "cosine", "one-cycle"])
@pytest.mark.parametrize("warmup", [None, 0.0, 0.3])
def test_rates_are_pythons(tiny_artifact: Make, schedule: str, warmup: float | None) -> None:
    from edge_bcs.runtime.course import Course

    path = tiny_artifact()
    hyper = Artifact.read(path).hyper
    course = Course(0, 0, 16, 56, 13, 0.07, schedule=schedule, warmup=warmup)
    with Network(path) as network:
        chosen = {} if warmup is None else {"warmup": warmup, "has_warmup": 1}
        network.begin(
            images=56, steps=13, batch_size=16, learning_rate=0.07, schedule=schedule.encode(), **chosen
        )
        for done in range(13):
            if done % 4 == 2:  # lest a whole epoch is skipped
                network.train(np.zeros((56, 1, 8, 8), np.uint8), np.zeros(56, np.int64))
                continue
            assert network.position.learning_rate == course.rates(done, hyper)[0]
            network.call("skip")


def test_the_order_is_pythons(tiny_artifact: Make) -> None:
    from edge_bcs.data.dataset import ArrayDataset

    with Network(tiny_artifact()) as network:
        for count in (1, 2, 57):
            order = np.empty(count, np.uint32)
            network.call("order", ctypes.c_uint64(3), POINTER(order.ctypes.data), ctypes.c_size_t(count))
            data = ArrayDataset(np.zeros((count, 1, 1, 1), np.uint8), np.zeros(count, np.int64))
            assert np.array_equal(order, data.order(network.info.seed, 3))


def test_it_reads_what_python_saved(tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path) -> None:
    floats = data[0].astype(np.float32) / np.float32(255)
    with Trainer(tiny_artifact()) as trainer:
        trainer.step(floats, data[1])
        trainer.save(tmp_path / "run")
        expected = trainer.step(floats, data[1])["loss"]
    with Network(tmp_path / "run") as network:
        assert network.step(*data).loss == expected
    assert read_state(Artifact.read(tmp_path / "run"))[1]["step"] == "1"


def test_notes_of_a_run_stay_with_it(tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path) -> None:
    """What a round of a fleet has noted, for one; the header has room for it, however long."""
    notes = {"fleet.round": "3", "a": "1", "zoo": "é \u2028 \n" + "x" * 9000, "progress!": ""}
    with Trainer(tiny_artifact()) as trainer:
        trainer.notes = dict(notes)
        trainer.save(tmp_path / "run")
    with Trainer.resume(tmp_path / "run") as trainer:
        trainer.step(data[0] / np.float32(255), data[1])
        trainer.save(tmp_path / "python")
    with Network(tmp_path / "run") as network:
        network.step(*data)
        network.call("save_into", str(tmp_path / "run").encode())
        network.save()
        written = network.state_written()
    assert (tmp_path / "run" / STATE).read_bytes() == (tmp_path / "python" / STATE).read_bytes() == written
    with Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.notes == notes
    with Network(tiny_artifact()) as network:
        network.call("state_read", written, ctypes.c_size_t(len(written)))
        assert b"fleet.round" in network.state_written()


def test_a_run_that_is_saved_as_it_was_keeps_its_training(
    tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path
) -> None:
    """As when it is stopped by a signal before it goes on; elsewhere, or after a step, another one begins."""
    with Trainer(tiny_artifact()) as trainer:
        fitted(trainer, data, 4, tmp_path / "run")
    before = (tmp_path / "run" / "state.safetensors").read_bytes()
    with Network(tmp_path / "run") as network:
        network.call("save_into", str(tmp_path / "run").encode())
        network.save()
        assert (tmp_path / "run" / "state.safetensors").read_bytes() == before
        network.call("save_into", str(tmp_path / "other").encode())
        network.save()
    assert "progress" not in read_state(Artifact.read(tmp_path / "other"))[1]
    with Network(tmp_path / "run") as network:
        network.step(*data)
        network.call("save_into", str(tmp_path / "run").encode())
        network.save()
    assert "progress" not in read_state(Artifact.read(tmp_path / "run"))[1]
