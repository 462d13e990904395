"""edge-bcs-run beside `edge-bcs`: the same runs to the bit, the same reports."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from helpers import board_program as board
from helpers import commands

Image = pytest.importorskip("PIL.Image")
Make = Callable[..., Path]
OPTIONS = ("--threads", 1, "--eval-samples", 12, "--eval-steps", 2, "--max-writes", "none")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Class folders of image files of several kinds and sizes; the classes are uneven."""
    draws = np.random.default_rng(0)
    for label, (name, count) in enumerate({"ant": 14, "bee": 31, "Wasp": 11, "zebra-é": 12}.items()):
        folder = tmp_path / "photographs" / name
        folder.mkdir(parents=True)
        for number in range(count):
            size = tuple(draws.integers(8, 60, 2).tolist())
            pixels = draws.integers(0, 256, (*size, 3)).astype(np.uint8) // 4 + 50 * label
            image = Image.fromarray(pixels)
            exif = Image.Exif()
            exif[0x0112] = int(draws.integers(1, 9))
            kind = ("jpg", "png", "JPEG")[number % 3]
            image.save(folder / f"photo {number}.{kind}", exif=exif.tobytes())
    return tmp_path / "photographs"


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """An .npz of u8 images, channels last, whose split is not named."""
    draws = np.random.default_rng(1)
    images, labels = draws.integers(0, 256, (70, 8, 8, 1)).astype(np.uint8), draws.integers(0, 10, 70)
    np.savez(tmp_path / "images.npz", x=images, y=labels)
    return tmp_path / "images.npz"


def trained_by_both(
    artifact: Path, data: object, folder: Path, *options: object, engine: str = "native"
) -> None:
    """Train with both programs and compare everything that they leave."""
    ours, theirs = folder / "ours", folder / "theirs"
    given = ("finetune", artifact, "--data", data, *OPTIONS, *options)
    report = board.succeed(*given, "-o", ours)
    wanted = commands.succeed(*given, "-o", theirs, "--engine", engine)
    assert board.states(ours) == board.states(theirs)
    manifests = [json.loads((run / "manifest.json").read_text()) for run in (ours, theirs)]
    assert manifests[0] == manifests[1]
    found, expected = board.metrics(ours), board.metrics(theirs)
    if engine == "native":
        assert found == expected
        for one in (report, wanted):
            one.pop("run")
        assert board.timeless(report) == board.timeless(wanted)
        assert list(report) == list(wanted) and list(report["training"]) == list(wanted["training"])
    else:  # whose working set is another
        assert [line | {"peak_bytes": 0} for line in found] == [line | {"peak_bytes": 0} for line in expected]


@pytest.mark.parametrize("augment", ["none", "shift", "photo", "zoom", "mix", "mirror"])
def test_a_training_has_the_bits_of_python(tiny_artifact: Make, tmp_path: Path, augment: str) -> None:
    options = ("--steps", 9, "--save-steps", 4, "--augment", augment)
    trained_by_both(tiny_artifact(), "digits", tmp_path, *options)


def test_a_training_has_the_bits_of_onnx_runtime(tiny_artifact: Make, tmp_path: Path) -> None:
    options = ("--epochs", 1, "--batch-size", 200, "--schedule", "one-cycle")
    trained_by_both(tiny_artifact(), "digits", tmp_path, *options, engine="onnxruntime")


def test_photographs_are_seen_as_by_python(tiny_artifact: Make, photographs: Path, tmp_path: Path) -> None:
    options = ("--epochs", 2, "--balance", "--schedule", "cosine", "--warmup", 0.1, "--learning-rate", 0.02)
    trained_by_both(tiny_artifact(), photographs, tmp_path, *options)


@pytest.mark.parametrize("program", ["ours", "Python"])
def test_a_run_cut_off_after_its_last_step_is_finished(
    tiny_artifact: Make, tmp_path: Path, program: str
) -> None:
    """The state is that of the end, the report that of a stop before: nothing is left to do."""
    run = tmp_path / "run"
    given = ("finetune", tiny_artifact(), "--data", "digits", "--eval-samples", 0, "--threads", 1, "-o", run)
    board.succeed(*given, "--steps", 4, "--save-steps", 1)
    report = json.loads((run / "report.json").read_text())
    report["training"] |= {"step": 3, "done": 3, "finished": False}
    (run / "report.json").write_text(json.dumps(report))
    again = (board if program == "ours" else commands).succeed(*given, "--resume")
    assert again["training"]["finished"] is True and "stopped" not in again
    assert again["training"]["done"] == again["training"]["step"] == 4


def test_images_decoded_inside_the_arena_disturb_nothing(
    tiny_artifact: Make, photographs: Path, tmp_path: Path
) -> None:
    """A plan of more than a MiB, in whose idle part images are decoded between the graphs of a step."""
    artifact = tiny_artifact(micro_batch=300, batch_size=20)
    trained_by_both(artifact, photographs, tmp_path, "--steps", 4)
    memory = json.loads((tmp_path / "ours" / "report.json").read_text())["memory"]
    assert memory["placed_bytes"] - memory["bound_bytes"] > 1 << 20


def test_splits_that_are_folders_are_those_of_python(
    tiny_artifact: Make, photographs: Path, tmp_path: Path
) -> None:
    train = photographs.rename(tmp_path / "train")
    (tmp_path / "split").mkdir()
    train = train.rename(tmp_path / "split" / "train")
    shutil.copytree(train, tmp_path / "split" / "VAL")
    shutil.rmtree(tmp_path / "split" / "VAL" / "bee")
    trained_by_both(tiny_artifact(), tmp_path / "split", tmp_path, "--steps", 3)


def test_arrays_are_seen_as_by_python(tiny_artifact: Make, arrays: Path, tmp_path: Path) -> None:
    trained_by_both(tiny_artifact(), arrays, tmp_path, "--epochs", 2)


def test_arrays_of_two_splits_are_seen_as_by_python(
    tiny_artifact: Make, arrays: Path, tmp_path: Path
) -> None:
    with np.load(arrays) as stored:
        x, y = stored["x"], stored["y"]
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "train.npz", images=x[:50, :, :, 0], labels=y[:50].astype(np.uint8))
    np.savez(tmp_path / "data" / "test.npz", images=x[50:, :, :, 0], labels=y[50:].astype(np.int16))
    trained_by_both(tiny_artifact(), tmp_path / "data", tmp_path, "--steps", 3)


def damaged(photographs: Path) -> list[str]:
    """Two images that cannot be used, and their names."""
    names = ["bee/photo 3.jpg", "ant/photo 1.png"]
    for name in names:
        content = (photographs / name).read_bytes()
        (photographs / name).write_bytes(content[: len(content) // 2])
    return names


def test_an_image_that_cannot_be_used_stops_the_command_by_name(
    tiny_artifact: Make, photographs: Path, tmp_path: Path
) -> None:
    names = damaged(photographs)
    message = board.refused(
        "finetune", tiny_artifact(), "--data", photographs, *OPTIONS, "-o", tmp_path / "run"
    )
    assert message.startswith(f"2 images of {photographs} cannot be used: ")
    assert all(name in message for name in names)
    assert message.endswith("or leave them out with --on-bad skip.")
    assert not (tmp_path / "run").exists()


def test_images_that_cannot_be_used_are_left_out_as_by_python(
    tiny_artifact: Make, photographs: Path, tmp_path: Path
) -> None:
    names = damaged(photographs)
    given = ("finetune", tiny_artifact(), "--data", photographs, *OPTIONS, "--on-bad", "skip", "--steps", 8)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    report = board.succeed(*given, "-o", ours)
    commands.succeed(*given, "-o", theirs, "--engine", "native")
    assert board.states(ours) == board.states(theirs)
    assert {image["image"] for image in report["left_out"]["images"]} == set(names)
    # The other program leaves out the same ones when it goes on, though they could be used now.
    for name in names:
        Image.new("RGB", (9, 9)).save(photographs / name)
    more = (*given[:-1], 12, "--resume")
    commands.succeed(*more, "-o", ours, "--engine", "native")
    board.succeed(*more, "-o", theirs)
    assert board.states(ours) == board.states(theirs)


class Enough(Exception):  # noqa: N818 (not an error)
    """Ends a training in Python."""


def test_a_run_that_python_began_is_finished_here(tiny_artifact: Make, tmp_path: Path) -> None:
    options = ("finetune", tiny_artifact(), "--data", "digits", *OPTIONS, "--steps", 20)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    board.succeed(*options, "-o", whole)

    def stop(record: dict[str, object]) -> None:
        if record["step"] == 7:
            raise Enough

    with Trainer(tiny_artifact(), engine="native") as trainer:
        with pytest.raises(Enough):
            trainer.fit("digits", steps=20, metrics=parts / "metrics.jsonl", save=parts, on_step=stop)
        trainer.save(parts)
    board.succeed(*options, "-o", parts, "--resume")
    assert board.states(parts)["state.safetensors"] == board.states(whole)["state.safetensors"]
    assert board.metrics(parts) == board.metrics(whole)


def started(*arguments: object) -> subprocess.Popen[str]:
    words = [str(board.program()), *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines_within(file: Path, count: int) -> None:
    """Wait until a file has so many lines."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{file} has fewer than {count} lines")


@pytest.mark.parametrize(
    ("number", "status", "engine"), [(signal.SIGINT, 130, None), (signal.SIGTERM, 143, "onnxruntime")]
)
def test_a_signal_saves_and_the_run_goes_on_to_the_bit(
    tiny_artifact: Make, tmp_path: Path, number: int, status: int, engine: str | None
) -> None:
    """Here, or in Python by ONNX Runtime."""
    options = ("finetune", tiny_artifact(), "--data", "digits", *OPTIONS, "--steps", 400)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = started(*options, "-o", parts)
    lines_within(parts / "metrics.jsonl", 3)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == status, told
    assert f"Stopped by {signal.Signals(number).name} after step" in told
    report = json.loads((parts / "report.json").read_text())
    assert 0 < report["stopped"]["step"] < 400 and "after" not in report
    if engine is None:
        board.succeed(*options, "-o", parts, "--resume")
    else:
        commands.succeed(*options, "-o", parts, "--resume", "--engine", engine)
    board.succeed(*options, "-o", whole)
    assert board.states(parts)["state.safetensors"] == board.states(whole)["state.safetensors"]
    same = [[line | {"peak_bytes": 0} for line in board.metrics(run)] for run in (parts, whole)]
    assert same[0] == same[1]


def killed_at_random(artifact: Path, folder: Path, times: int, steps: int) -> None:
    """Kill a training of so many steps so often, whatever it does; now and then Python does a part of it. It
    must end as one that nothing disturbed."""
    draws, parts = np.random.default_rng(0), folder / "parts"
    given = ("finetune", artifact, "--data", "digits", *OPTIONS, "--steps", steps, "--save-steps", 1)
    board.succeed(*given, "-o", folder / "whole")
    for attempt in range(times):
        process = started(*given, "-o", parts, "--resume")
        time.sleep(float(draws.uniform(0, 0.1)))
        process.kill()
        process.communicate()
        if attempt % 10 == 9:
            stopped = commands.run(*given, "-o", parts, "--resume", "--engine", "native", "--max-hours", 1e-5)
            assert stopped.exit_code in (0, 75), stopped.output
    board.succeed(*given, "-o", parts, "--resume")
    assert board.states(parts)["state.safetensors"] == board.states(folder / "whole")["state.safetensors"]
    assert board.metrics(parts) == board.metrics(folder / "whole")


def test_a_training_that_is_killed_goes_on_to_the_bit(tiny_artifact: Make, tmp_path: Path) -> None:
    killed_at_random(tiny_artifact(), tmp_path, 4, 40)


@pytest.mark.slow
def test_a_training_that_is_killed_a_hundred_times_goes_on_to_the_bit(
    tiny_artifact: Make, tmp_path: Path
) -> None:
    killed_at_random(tiny_artifact(), tmp_path, 100, 800)


def test_evaluate_counts_as_python_does(tiny_artifact: Make, photographs: Path, tmp_path: Path) -> None:
    artifact = tiny_artifact()
    for attack in (("pgd", "--attack-steps", 3, "--restarts", 2), ("fgsm", "--epsilon", "2/255"), ("none",)):
        options = (
            "evaluate",
            artifact,
            "--data",
            photographs,
            "--split",
            "train",
            "--limit",
            30,
            "--attack",
            *attack,
        )
        found, wanted = board.succeed(*options), commands.succeed(*options, "--engine", "native")
        assert len(wanted["per_class"]) == 4 and wanted["confused"]
        assert found == wanted and list(found) == list(wanted)
    file = tmp_path / "answer.json"
    board.run("evaluate", "--json", file, artifact, "--data", "digits", "--attack", "none", "--limit", 9)
    assert json.loads(file.read_text())["samples"] == 9
    table = board.run("evaluate", artifact, "--data", "digits", "--limit", 5, "--attack-steps", 1)
    assert table.returncode == 0 and "robust accuracy (pgd)" in table.stdout


def test_predict_answers_as_python_does(tiny_artifact: Make, photographs: Path) -> None:
    damaged(photographs)
    words = (
        "predict",
        tiny_artifact(),
        photographs / "Wasp" / "photo 0.jpg",
        photographs,
        photographs / "none.png",
    )
    found, wanted = (
        board.run(*words, "--json", "--top", 2),
        commands.run(*words, "--json", "--engine", "native", "--top", 2),
    )
    assert found.returncode == wanted.exit_code == 1  # some are damaged, one is missing
    ours, theirs = json.loads(found.stdout), json.loads(wanted.stdout)
    assert ours["images"] == theirs["images"] and len(ours["images"]) > 60
    assert [one["image"] for one in ours["failed"]] == [one["image"] for one in theirs["failed"]]
    told = board.run(*words[:3], "--top", 1)
    assert told.stdout == commands.run(*words[:3], "--top", 1, "--engine", "native").stdout


def test_inspect_says_what_python_does(tiny_artifact: Make, tmp_path: Path) -> None:
    artifact = tiny_artifact()
    assert board.succeed("inspect", artifact) == commands.succeed("inspect", artifact)
    board.succeed("finetune", artifact, "--data", "digits", *OPTIONS, "--steps", 2, "-o", tmp_path / "run")
    assert board.succeed("inspect", tmp_path / "run") == commands.succeed("inspect", tmp_path / "run")
    damaged_program = bytearray((tmp_path / "run" / "program.bin").read_bytes())
    damaged_program[len(damaged_program) // 2] ^= 1
    (tmp_path / "run" / "program.bin").write_bytes(damaged_program)
    assert "program.bin" in board.refused("inspect", tmp_path / "run")


def test_a_progressive_photograph_is_left_out_where_the_plan_has_no_memory_for_it(
    tiny_artifact: Make, photographs: Path, tmp_path: Path
) -> None:
    draws = np.random.default_rng(0)
    large = Image.fromarray(draws.integers(0, 256, (900, 1200, 3)).astype(np.uint8))
    large.save(photographs / "ant" / "large.jpg", progressive=True)
    given = (
        "finetune",
        tiny_artifact(),
        "--data",
        photographs,
        *OPTIONS,
        "--steps",
        2,
        "-o",
        tmp_path / "run",
    )
    message = board.refused(*given)
    assert "ant/large.jpg (1200×900 pixels, a progressive JPEG) takes" in message
    report = board.succeed(*given, "--on-bad", "skip")
    assert [image["image"] for image in report["left_out"]["images"]] == ["ant/large.jpg"]


def test_a_run_folder_is_not_written_over(tiny_artifact: Make, tmp_path: Path) -> None:
    given = ("finetune", tiny_artifact(), "--data", "digits", *OPTIONS, "--steps", 1, "-o", tmp_path / "run")
    board.succeed(*given)
    before = board.states(tmp_path / "run")
    assert "already holds a run: add --resume" in board.refused(*given)
    kept = "a resumed run keeps its seed, here 0: leave --seed out."
    assert kept in board.refused(*given, "--resume", "--seed", 3)
    assert kept in commands.run(*given, "--resume", "--seed", 3).stderr
    for succeed in (board.succeed, commands.succeed):  # as the unit of a service says it at every start
        assert succeed(*given, "--resume", "--seed", 0)["training"]["done"] == 1
    before = board.states(tmp_path / "run")
    other = tiny_artifact(objective="natural")
    assert "holds a run of another artifact: its objective" in board.refused(
        "finetune", other, *given[2:], "--resume"
    )
    assert board.states(tmp_path / "run") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("{}")
    assert "holds no run, but a report.json" in board.refused(*given[:-1], tmp_path / "mine")


def test_a_run_does_not_lie_among_the_class_folders(tiny_artifact: Make, photographs: Path) -> None:
    given = ("finetune", tiny_artifact(), "--data", photographs, *OPTIONS, "--steps", 1)
    assert "lies among the class folders" in board.refused(*given, "-o", photographs / "run")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--steps", 1, "--epochs", 1), "give the length in --epochs or in --steps, not both."),
        (("--boards", 2), "edge-bcs-run has no --boards: it merges nothing; let `edge-bcs merge` do so"),
        (("--engine", "onnxruntime"), "edge-bcs-run has the native engine alone; `edge-bcs` has the other."),
        (("--memory", "much"), "'much' is not a size: write it as 6MiB, 6MB, 512KiB or 6291456."),
        (("--no-augment", "--augment", "photo"), "--no-augment and --augment photo contradict each other"),
        (("--data", "missing"), "the data missing does not exist; give a folder, an .npz, or digits."),
        (("--class-names", "a,a"), "the class names must be distinct, but number 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(
    tiny_artifact: Make, tmp_path: Path, options: tuple[object, ...], sentence: str
) -> None:
    given = ("finetune", tiny_artifact(), "--data", "digits", "-o", tmp_path / "run")
    assert sentence in board.refused(*given, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("finetune", "x", "--data", "digits", "--colour"), "No such option: --colour"),
        (("finetune", "x"), "Missing option '--data'."),
        (("finetune",), "Missing argument 'ARTIFACT'."),
        (("finetune", "x", "--data", "digits", "--steps", "0"), "Invalid value for '--steps'"),
        (("finetune", "x", "--data", "digits", "--schedule", "rising"), "'rising' is not one of"),
        (("predict", "x"), "Missing argument"),
        (("learn",), "No such command 'learn'."),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(arguments: tuple[str, ...], sentence: str) -> None:
    result = board.run(*arguments)
    assert result.returncode == 2 and sentence in result.stderr and "--help" in result.stderr


def test_every_command_explains_itself() -> None:
    overview = board.run("--help").stdout
    for name in ("finetune", "evaluate", "predict", "inspect"):
        assert f"\n  {name} " in overview
        shown = board.run(name, "--help")
        assert (
            shown.returncode == 0 and f"edge-bcs-run {name} " in shown.stdout and "Options:" in shown.stdout
        )
        assert max(map(len, shown.stdout.splitlines())) <= 110
    assert board.run().returncode == 2


def test_hostile_arrays_get_a_sentence(tiny_artifact: Make, arrays: Path, tmp_path: Path) -> None:
    """Truncated, changed, and of kinds that are not read."""
    content, draws = arrays.read_bytes(), np.random.default_rng(3)
    target = tmp_path / "hostile.npz"
    given = ("finetune", tiny_artifact(), "--data", target, *OPTIONS, "--steps", 1)
    for attempt in range(40):
        changed = bytearray(content)
        if attempt % 2:
            del changed[int(draws.integers(0, len(changed))) :]
        else:
            for place in draws.integers(max(0, len(changed) - 400), len(changed), 3):
                changed[place] = int(draws.integers(0, 256))
        target.write_bytes(changed)
        result = board.run(*given, "-o", tmp_path / f"run{attempt}")
        assert result.returncode in (0, 1), result.stderr
        assert result.returncode == 0 or result.stderr.splitlines()[-1].startswith("Error: ")
    np.savez_compressed(target, x=np.zeros((4, 8, 8), np.uint8), y=np.arange(4))
    assert "is packed: save it by np.savez" in board.refused(*given)
    np.savez(target, x=np.zeros((4, 8, 8)), y=np.arange(4))
    assert "reads u8 alone" in board.refused(*given)
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((4, 9, 8), np.uint8), y=np.arange(4))
    target.write_bytes(buffer.getvalue())
    assert "another shape than the network's" in board.refused(*given)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="chroot takes root on Linux")
def test_the_program_needs_nothing_but_itself(tiny_artifact: Make, tmp_path: Path) -> None:
    """In a folder that holds the program and an artifact alone: no libraries, no /proc, no /tmp."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(board.program(), root / "edge-bcs-run")
    shutil.copytree(tiny_artifact(), root / "artifact")
    words = ["/edge-bcs-run", "finetune", "/artifact", "--data", "digits", *map(str, OPTIONS), "--steps", "3"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={}, preexec_fn=lambda: os.chroot(root)
    )
    assert done.returncode == 0, done.stderr
    commands.succeed(
        "finetune", tiny_artifact(), "--data", "digits", *OPTIONS, "--steps", 3, "-o", tmp_path / "theirs"
    )
    assert board.states(root / "artifact-run") == board.states(tmp_path / "theirs")
