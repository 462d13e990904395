"""Faults, injected: what is not finite; a disk that is full, read-only, or cuts a write off.

Each time the training stops with a sentence, and goes on from the last good state to the end that it would
have had.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.checks import NotFiniteError
from edge_bcs.runtime.engine import GraphRun
from edge_bcs.runtime.state import read_state

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import ArrayDataset, open_data

Array = np.ndarray[Any, Any]
Make = Callable[..., Path]
OPTIONS: dict[str, Any] = {"steps": 9, "batch_size": 8, "augment": False, "progress": False}


def digits(count: int = 40) -> tuple[Array, Array]:
    return open_data("digits", "train", (1, 8, 8)).read(np.arange(count))


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def uninterrupted(path: Path, data: ArrayDataset) -> dict[str, Array]:
    with Trainer(path) as trainer:
        trainer.fit(data, **OPTIONS)
        return trainer.state()


# What is not finite


def with_a_bad_pixel(position: int, value: float) -> ArrayDataset:
    x, y = digits()
    x[position, 0, 3, 3] = value
    return ArrayDataset(x, y)


def test_a_network_that_has_diverged_answers_nothing_rightly(tiny_artifact: Make) -> None:
    """Its logits are NaN: they counted as the first class, and all images of that were right."""
    data = ArrayDataset(digits(6)[0], np.zeros(6, np.int64))
    with Trainer(tiny_artifact()) as trainer:
        assert "warnings" not in trainer.evaluate(data, 1)
        trainer.buffers["dense.value"][...] = np.nan
        found = trainer.evaluate(data, 1)
        assert (found["accuracy"], found["robust_accuracy"]) == (0.0, 0.0)
        (said,) = found["warnings"]
        assert "answers to 6 of 6 images are not finite and count as wrong: its training has div" in said


@pytest.mark.parametrize(("epsilon", "robust", "lost"), [(0.0, 1 / 6, 5), (1.0, 0.0, 6)])
def test_images_without_an_answer_do_not_keep_others_from_being_attacked(
    tiny_artifact: Make, epsilon: float, robust: float, lost: int
) -> None:
    """The first layer overflows on all images but the black one, until the attack adds something to it."""
    x, y = digits(6)
    x[4] = 0
    with Trainer(tiny_artifact()) as trainer:
        first = trainer.buffers["coo.index"] < trainer.artifact.layers[1].offset
        trainer.buffers["coo.value"][first] = 3e38
        y[4] = trainer.predict(x[4:5])[0]
        found = trainer.evaluate(ArrayDataset(x, y), 2, epsilon=epsilon)
    assert (found["accuracy"], found["robust_accuracy"]) == (1 / 6, robust)
    assert f"answers to {lost} of 6 images" in found["warnings"][0]


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_pixel_stops_the_training_and_is_named(
    tiny_artifact: Make, tmp_path: Path, value: float, batch_norm: str
) -> None:
    """The state before it is saved; once the image is repaired, the run ends as if it had never been bad."""
    path, run = tiny_artifact(batch_norm=batch_norm), tmp_path / "run"
    with Trainer(path) as trainer:
        position = int(with_a_bad_pixel(0, 0.5).order(trainer.seed, 0)[3 * 8 + 5])  # the sixth of step 4
        with pytest.raises(NotFiniteError, match=rf"in step 4, image {position} of the data has a pixel"):
            trainer.fit(with_a_bad_pixel(position, value), save=run, save_seconds=1e6, **OPTIONS)
        assert trainer.steps == 3
    repaired = with_a_bad_pixel(position, 0.5)
    with Trainer.resume(run) as trainer:
        assert trainer.steps == 3
        trainer.fit(repaired, **OPTIONS)
        state = trainer.state()
    assert same(state, uninterrupted(path, repaired))


def test_a_bad_pixel_among_the_held_out_images_is_named(tiny_artifact: Make) -> None:
    with Trainer(tiny_artifact()) as trainer, pytest.raises(NotFiniteError, match="image 13 of the data has"):
        trainer.evaluate(with_a_bad_pixel(13, np.nan), 0)


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_a_bad_batch_is_left_out_if_asked_to(tiny_artifact: Make, tmp_path: Path, batch_norm: str) -> None:
    """In five batches an epoch, one is bad: of nine steps two are skipped. The others are those of a training
    that took no step at that place; resumed in between, it is the same."""
    path = tiny_artifact(batch_norm=batch_norm)
    data = with_a_bad_pixel(7, np.nan)
    records: list[dict[str, Any]] = []
    with Trainer(path) as trainer:
        result = trainer.fit(data, on_nan="skip", on_step=records.append, **OPTIONS)
        skipped = trainer.state()
    assert result["skipped"] == 2 and result["step"] == 9 and np.isfinite(result["loss"])
    assert [("skipped" in record) for record in records].count(True) == 2
    assert all("image 7 of the data" in record["skipped"] for record in records if "skipped" in record)
    bad = [record["step"] for record in records if "skipped" in record]

    with Trainer(path) as trainer:
        clean = with_a_bad_pixel(7, 0.5)
        update = trainer.run_optimizer_only

        def idle() -> None:
            if trainer.steps + 1 in bad:
                trainer.steps += 1
            else:
                update()

        trainer.run_optimizer_only = idle  # type: ignore[method-assign]
        if batch_norm == "frozen":  # else the skipped batch's statistics would count here
            trainer.fit(clean, **OPTIONS)
            assert same(trainer.state(), skipped)

    with Trainer(path) as trainer:
        result = trainer.fit(data, on_nan="skip", save=tmp_path / "run", **{**OPTIONS, "steps": 6})
    with Trainer.resume(tmp_path / "run") as trainer:
        result = trainer.fit(data, on_nan="skip", **OPTIONS)
        assert result["skipped"] == 2 and result["steps"] == 3


def test_a_training_that_would_skip_everything_stops(tiny_artifact: Make) -> None:
    x, y = digits()
    data = ArrayDataset(np.full_like(x, np.nan), y)
    with Trainer(tiny_artifact()) as trainer:
        before = trainer.state()
        with pytest.raises(NotFiniteError, match="every batch of an epoch was skipped"):
            trainer.fit(data, on_nan="skip", **{**OPTIONS, "steps": 50})
        assert same(trainer.state(), before) and trainer.steps == 4


@pytest.mark.parametrize("objective", ["natural", "at", "trades"])
@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_a_loss_that_is_not_finite_is_refused(tiny_artifact: Make, objective: str, batch_norm: str) -> None:
    """Weights of the last layer so large that logits overflow where the image has anything in it."""
    x, y = digits(12)
    with Trainer(tiny_artifact(objective=objective, batch_norm=batch_norm)) as trainer:
        arrays = trainer.buffers
        arrays["dense.value"][...] *= np.float32(1e38)
        arrays["coo.value"][...] *= np.float32(1e30)
        before = trainer.state()
        with pytest.raises(NotFiniteError, match=r"in step 1, .*finite.*image 0 of the batch.*learning rate"):
            trainer.step(x, y)
        assert same(trainer.state(), before) and trainer.steps == 0


def test_only_the_images_at_fault_are_named(tiny_artifact: Make) -> None:
    """A weight that overflows where a pixel is bright; all other images are black."""
    x, y = digits(8)
    x[...] = 0
    x[6] = 1
    with Trainer(tiny_artifact(objective="natural")) as trainer:
        arrays, layers = trainer.buffers, trainer.artifact.layers
        first = arrays["coo.index"] < layers[0].size
        arrays["coo.value"][first] = np.float32(3e38)
        with pytest.raises(NotFiniteError, match=r"\(image 6 of the batch\)"):
            trainer.step(x, y)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e31])
@pytest.mark.parametrize("kind", ["coo", "dense"])
def test_a_gradient_that_is_not_finite_names_its_layer(
    tiny_artifact: Make, batch: tuple[Array, Array], kind: str, value: float
) -> None:
    with Trainer(tiny_artifact(batch_norm="batch")) as trainer:
        arrays = trainer.buffers
        gradient = arrays[f"{kind}.value_grad.accumulation.buffer"]
        if kind == "coo":
            layer = trainer.artifact.layers[1]
            place = int(np.searchsorted(arrays["coo.index"], layer.offset + layer.size // 2))
            expected = layer.name + ".weight"
        else:
            entry = trainer.artifact.manifest["dense"][2]
            place, expected = entry["offset"], entry["name"]

        def spoil(run: GraphRun) -> None:
            if run.graph == "training":
                gradient[place] = value

        before = trainer.state()
        trainer.on_run = spoil
        with pytest.raises(NotFiniteError, match=f"in step 1, the gradient of {expected} is"):
            trainer.step(*batch)
        assert same(trainer.state(), before) and trainer.steps == 0


GRADIENTS = tuple(f"{kind}.value_grad.accumulation.buffer" for kind in ("coo", "dense"))


def spoil(trainer: Trainer, what: str, step: int) -> None:
    """Make the loss or the gradients of one step NaN, once."""
    left = [what]

    def on_run(run: GraphRun) -> None:
        if run.graph == "training" and left and trainer.steps + 1 == step:
            trainer.buffers[left.pop()][...] = np.nan

    trainer.on_run = on_run


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("what", ["loss", *GRADIENTS])
def test_a_step_that_is_not_finite_stops_the_training(
    tiny_artifact: Make, tmp_path: Path, what: str, batch_norm: str
) -> None:
    """The state before it is saved, and resumed it ends as if nothing had been."""
    path, data = tiny_artifact(batch_norm=batch_norm), ArrayDataset(*digits())
    with Trainer(path) as trainer:
        spoil(trainer, what, 4)
        with pytest.raises(NotFiniteError, match=r"in step 4, the (loss|gradient of \S+) is nan"):
            trainer.fit(data, save=tmp_path / "run", save_seconds=1e6, **OPTIONS)
    with Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.steps == 3
        trainer.fit(data, **OPTIONS)
        state = trainer.state()
    assert same(state, uninterrupted(path, data))


@pytest.mark.parametrize("what", ["loss", *GRADIENTS])
def test_a_step_that_is_not_finite_is_left_out_if_asked_to(tiny_artifact: Make, what: str) -> None:
    """The training is one whose optimizer did nothing then."""
    data = ArrayDataset(*digits())
    with Trainer(tiny_artifact()) as trainer:
        spoil(trainer, what, 4)
        assert trainer.fit(data, on_nan="skip", **OPTIONS)["skipped"] == 1
        skipped = trainer.state()
    with Trainer(tiny_artifact()) as trainer:
        update = trainer.run_optimizer_only

        def idle() -> None:
            if trainer.steps == 3:
                trainer.steps += 1
            else:
                update()

        trainer.run_optimizer_only = idle  # type: ignore[method-assign]
        trainer.fit(data, **OPTIONS)
        assert same(trainer.state(), skipped)
    assert not same(skipped, uninterrupted(tiny_artifact(), data))


@pytest.mark.parametrize("name", ["learning_rate", "noise"])
def test_an_update_that_would_overflow_changes_nothing(
    tiny_artifact: Make, batch: tuple[Array, Array], name: str
) -> None:
    """Neither the connections nor, after them, the dense parameters."""
    with Trainer(tiny_artifact()) as trainer:
        before = trainer.state()
        setattr(trainer, name, 1e38)
        with pytest.raises(NotFiniteError, match="would overflow; lower the learning rate"):
            trainer.step(*batch)
        assert same(trainer.state(), before) and trainer.steps == 0


def test_statistics_that_overflow_stop_the_step(tiny_artifact: Make) -> None:
    """The loss sees activations divided by their deviation, and is finite; their variance is not."""
    x, y = digits(12)
    with Trainer(tiny_artifact(batch_norm="batch", objective="natural", micro_batch=16)) as trainer:
        first = trainer.buffers["coo.index"] < trainer.artifact.layers[0].size
        trainer.buffers["coo.value"][first] *= np.float32(3e20)
        before = trainer.state()
        with pytest.raises(NotFiniteError, match=r"step 1, the running variance of norm is inf \(.*rate"):
            trainer.step(x, y)
        assert same(trainer.state(), before) and trainer.steps == 0
        skipped = trainer.fit(ArrayDataset(x, y), on_nan="skip", **{**OPTIONS, "steps": 1, "batch_size": 4})
        assert skipped["skipped"] == 1 and same(trainer.state(), before)


def poison(trainer: Trainer, tensor: str = "batchnorm.variance") -> None:
    """A number that no step makes: a flipped bit."""
    trainer.buffers[tensor][3] = np.inf


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_state_that_is_not_finite_ends_the_training_and_overwrites_nothing(
    tiny_artifact: Make, tmp_path: Path, on_nan: str
) -> None:
    path, data, run = tiny_artifact(), ArrayDataset(*digits()), tmp_path / "run"

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            poison(trainer)

    options = {**OPTIONS, "save": run, "save_steps": 1, "max_writes": None, "on_nan": on_nan}
    with Trainer(path) as trainer:
        with pytest.raises(
            EdgeBcsError, match=r"batchnorm\.variance of norm holds inf.*saves are kept"
        ) as caught:
            trainer.fit(data, on_step=on_step, **options)
        assert "\n" not in str(caught.value) and not isinstance(caught.value, NotFiniteError)
        for _ in range(2):
            with pytest.raises(EdgeBcsError, match="earlier saves are kept"):
                trainer.save(run)
    (run / "state.safetensors").rename(tmp_path / "newest")
    assert read_state(Artifact.read(run))[1]["step"] == "2"  # both slots are whole
    (tmp_path / "newest").rename(run / "state.safetensors")
    with Trainer.resume(run) as trainer:
        assert trainer.steps == 3
        trainer.fit(data, **OPTIONS)
        state = trainer.state()
    assert same(state, uninterrupted(path, data))


def test_a_step_that_stops_where_nothing_can_be_saved_says_both(tiny_artifact: Make, tmp_path: Path) -> None:
    data, run = ArrayDataset(*digits()), tmp_path / "run"

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            poison(trainer, "coo.momentum")
            spoil(trainer, "loss", 4)

    with Trainer(tiny_artifact(objective="natural")) as trainer:
        trainer.save(run)
        with pytest.raises(
            EdgeBcsError, match=r"in step 4, .* And the state was not saved .* coo.momentum of first"
        ) as caught:
            trainer.fit(data, save=run, save_seconds=1e6, on_step=on_step, **OPTIONS)
    assert not isinstance(caught.value, NotFiniteError)
    assert read_state(Artifact.read(run))[1]["step"] == "0"


# Disks


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.999])
def test_a_torn_save_loses_a_step_and_nothing_else(tiny_artifact: Make, tmp_path: Path, share: float) -> None:
    """Cut off in the header, the metadata or the numbers, newest state or the one being written: it ends as
    the training that nothing happened to."""
    path, data, run = tiny_artifact(batch_norm="batch"), ArrayDataset(*digits()), tmp_path / "run"

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 6:
            raise InterruptedError

    options = {**OPTIONS, "save": run, "save_steps": 1, "max_writes": None}
    with Trainer(path) as trainer, pytest.raises(InterruptedError):
        trainer.fit(data, on_step=stop, **options)
    for torn in (run / "state.safetensors", run / "state.safetensors.partial"):
        whole = (run / "state.safetensors").read_bytes()
        torn.write_bytes(whole[: int(share * len(whole))])
    with Trainer.resume(run) as trainer:
        assert trainer.steps == 4  # 5 was the newest
        trainer.fit(data, **OPTIONS)
        state = trainer.state()
    assert same(state, uninterrupted(path, data))


def interrupted_by_its_disk(
    path: Path, run: Path, data: ArrayDataset, fault: Callable[[], object], message: str
) -> None:
    """Train, with the fault in the disk from the fourth step on; every step is saved."""

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            fault()

    options = {**OPTIONS, "save": run, "save_steps": 1, "max_writes": None}
    with Trainer(path) as trainer, pytest.raises(EdgeBcsError, match=message) as caught:
        trainer.fit(data, on_step=on_step, metrics=run.parent / "metrics.jsonl", **options)
    assert "\n" not in str(caught.value)


def assert_it_ends_the_same(path: Path, run: Path, data: ArrayDataset, step: int) -> None:
    with Trainer.resume(run) as trainer:
        assert trainer.steps == step
        trainer.fit(data, save=run, metrics=run.parent / "metrics.jsonl", **OPTIONS)
    state, metadata = read_state(Artifact.read(run))
    assert int(metadata["step"]) == 9 and same(state, uninterrupted(path, data))
    assert len((run.parent / "metrics.jsonl").read_text().splitlines()) == 9


def test_a_full_disk(tiny_artifact: Make, small_disk: Path) -> None:
    path, data = tiny_artifact(), ArrayDataset(*digits())

    def fill() -> None:
        with (small_disk / "filler").open("wb", buffering=0) as stream:
            while True:
                try:
                    stream.write(b"\0" * 4096)
                except OSError:
                    return

    interrupted_by_its_disk(path, small_disk / "run", data, fill, "full|No space left")
    (small_disk / "filler").unlink()
    assert_it_ends_the_same(path, small_disk / "run", data, 3)


@pytest.mark.parametrize("free", [1, 4096])
def test_a_disk_that_gets_full_in_the_middle_of_a_save(
    tiny_artifact: Make, small_disk: Path, free: int
) -> None:
    path, data = tiny_artifact(), ArrayDataset(*digits())

    def fill() -> None:
        left = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(b"\0" * max(0, left.f_bavail * left.f_frsize - free))

    # A state is about 6 kB, of which this many bytes still fit.
    interrupted_by_its_disk(path, small_disk / "run", data, fill, "disk is full")
    (small_disk / "filler").unlink()
    with Trainer.resume(small_disk / "run") as trainer:
        saved = trainer.steps
    assert saved >= 3
    assert_it_ends_the_same(path, small_disk / "run", data, saved)


def test_a_disk_that_becomes_read_only(tiny_artifact: Make, small_disk: Path) -> None:
    """As the kernel does to a card that fails."""
    path, data, run = tiny_artifact(), ArrayDataset(*digits()), small_disk / "run"

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    options = {**OPTIONS, "save": run, "save_steps": 1, "max_writes": None}

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            remount("ro")

    with Trainer(path) as trainer, pytest.raises(EdgeBcsError, match="disk is read-only; earlier saves"):
        trainer.fit(data, on_step=on_step, **options)
    with Trainer.resume(run) as trainer:  # it can be read there
        assert trainer.steps == 3
        with pytest.raises(EdgeBcsError, match="Read-only"):
            trainer.fit(data, metrics=run / "metrics.jsonl", **options)
    remount("rw")
    with Trainer.resume(run) as trainer:
        trainer.fit(data, **options)
        assert trainer.steps == 9
    assert same(read_state(Artifact.read(run))[0], uninterrupted(path, data))


LIMITED = """
import resource, sys
from edge_bcs.data import open_data
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.runtime import Trainer
artifact, run, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])

def limited(record):
    if record["step"] == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

with (Trainer.resume if limit < 0 else Trainer)(run if limit < 0 else artifact, threads=1) as trainer:
    start, data = trainer.steps, open_data("digits", "train", (1, 8, 8))
    try:
        trainer.fit(data, steps=9, batch_size=8, progress=False, save=run, save_steps=1, max_writes=None,
                    on_step=limited if limit >= 0 else None)
    except EdgeBcsError as error:
        print(error)
    print(start, trainer.steps)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
@pytest.mark.parametrize("limit", [0, 5000])
def test_a_write_that_is_cut_off(tiny_artifact: Make, tmp_path: Path, limit: int) -> None:
    """Without rights to mount anything: no file may grow beyond so many bytes."""

    def run(folder: str, limit: int) -> str:
        command = [sys.executable, "-c", LIMITED, str(tiny_artifact()), str(tmp_path / folder), str(limit)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert "the file may not grow further; earlier saves are kept" in run("run", limit)
    assert run("run", -1).split() == ["3", "9"]
    with Trainer(tiny_artifact()) as trainer:
        trainer.fit(open_data("digits", "train", (1, 8, 8)), **{**OPTIONS, "augment": True})
        expected = trainer.state()
    assert same(read_state(Artifact.read(tmp_path / "run"))[0], expected)
