"""Files that commands are told to write: what they wrote earlier is replaced, anything else stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from helpers import DENSE
from helpers.commands import run

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import write_atomically, write_json
from edge_bcs.core.outputs import check_output, check_outputs, containing, json_with
from edge_bcs.data import open_data

Make = Callable[..., Path]


def refused(result: Result) -> str:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("Error: ") and "Traceback" not in result.output
    return sentence


def mine(file: Path, content: bytes = b"mine") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


OTHERS = {
    "text": b"my thesis", "JSON": b'{"name": "app"}', "list": b"[1, 2]", "PNG": b"\x89PNG\r\n\x1a\n mine",
    "page": b"<!doctype html><title>mine</title>", "trace": b'{"traceEvents": [], "otherData": {}}',
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_simulate_and_evaluate(tiny_artifact: Make, tmp_path: Path, digits: Path, other: bytes) -> None:
    simulate = ("simulate", tiny_artifact(), "--no-run")
    evaluate = ("evaluate", tiny_artifact(), "--data", digits, "--attack", "none")
    for number, (words, kind) in enumerate(
        ((simulate, "html"), (simulate, "trace"), (simulate, "json"), (evaluate, "json"))
    ):
        file = mine(tmp_path / f"{number}.{kind}", other)
        assert "so it stays: name another file" in refused(run(*words, f"--{kind}", file))
        assert file.read_bytes() == other
        assert f"{tmp_path} is a folder" in refused(run(*words, f"--{kind}", tmp_path))
        file.write_bytes(b"")  # as mktemp makes it
        for _ in range(2):
            result = run(*words, f"--{kind}", file)
            assert result.exit_code == 0 and file.stat().st_size > 100, result.output


def test_reports_do_not_replace_artifacts_or_each_other(
    tiny_artifact: Make, tmp_path: Path, digits: Path
) -> None:
    simulate = ("simulate", tiny_artifact(), "--no-run")
    assert run(*simulate, "--json", tmp_path / "s.json").exit_code == 0
    before = (tmp_path / "s.json").read_bytes()
    evaluate = ("evaluate", tiny_artifact(), "--data", digits, "--attack", "none")
    for file in (tmp_path / "s.json", digits, tiny_artifact() / "manifest.json"):
        assert "is not a report of `edge-bcs evaluate`" in refused(run(*evaluate, "--json", file))
    for kind in ("html", "trace", "json"):
        refused(run(*simulate, f"--{kind}", tiny_artifact() / "manifest.json"))
        refused(run(*simulate, f"--{kind}", tiny_artifact() / "eval_model.onnx"))
    assert (tmp_path / "s.json").read_bytes() == before
    assert run("inspect", tiny_artifact()).exit_code == 0


def test_counts_of_an_evaluation(tiny_artifact: Make, tmp_path: Path, digits: Path) -> None:
    """--resume names a file of counts, which goes when they are complete; a checkpoint named there stays."""
    pytest.importorskip("torch")
    from helpers.artifacts import tiny_network

    import edge_bcs
    from edge_bcs.evaluation import measures as evaluation

    sparse, (x, y) = (
        edge_bcs.sparsify(tiny_network(), 0.5),
        open_data(digits, "test", (1, 8, 8)).read(np.arange(8)),
    )
    file = mine(tmp_path / "last.safetensors", b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(EdgeBcsError, match="is not the counts of an interrupted evaluation, so it stays"):
        evaluation.evaluate(sparse, [(x, y)], attack="none", resume=file, progress=False)
    assert file.read_bytes() == b"\x10\0\0\0\0\0\0\0{}"
    counts = mine(tmp_path / "counts.json", b'{"asked": {}, "counts": {}}')
    with pytest.raises(EdgeBcsError, match="keeps the counts of another evaluation"):
        evaluation.evaluate(sparse, [(x, y)], attack="none", resume=counts, progress=False)
    assert counts.exists()


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = {
        "path": "run",
        "attack": "square",
        "accuracy": 0.7,
        "queries": 500,
        "adv_acc": 0.5,
        "samples": 9,
    }
    write_json(tmp_path / "square.json", report)
    plot = ("plot", tmp_path / "square.json", "-o", tmp_path / "plots")
    for _ in range(2):
        assert run(*plot).exit_code == 0
    file = tmp_path / "plots" / "queries.png"
    drawn = file.read_bytes()
    from matplotlib import pyplot

    figure = pyplot.figure()
    figure.savefig(file)  # drawn by matplotlib, too, but not by us
    pyplot.close(figure)
    before = file.read_bytes()
    assert "queries.png is there and is not a figure of edge-bcs" in refused(run(*plot))
    assert file.read_bytes() == before != drawn


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured; what is recognised by bench.json is replaced, with the files beside it."""
    pytest.importorskip("torch")
    from edge_bcs.bench import report, suite

    monkeypatch.setattr(suite, "run", lambda *_: None)
    for name in ("README.md", "bench.json", "layers.png", "scaling.png"):
        folder = mine(tmp_path / name / name).parent
        assert f"has a {name} that belongs to no report" in refused(run("bench", "--all", folder))
        assert (folder / name).read_bytes() == b"mine"
    mine(tmp_path / "notes" / "notes.txt")
    earlier = tmp_path / "earlier"
    write_json(mine(earlier / "bench.json"), {"machine": {}, "repetitions": 1, "steps": {}, "stacks": {}})
    mine(earlier / "README.md")
    for folder in (tmp_path / "new", tmp_path / "notes", earlier):
        report.check(folder)
        assert run("bench", "--all", folder).exit_code == 0


def test_a_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from edge_bcs.bench import calibrate

    monkeypatch.setenv("EDGE_BCS_CONFIG", str(tmp_path))
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("measured first"))
    file = mine(tmp_path / "machine.toml", b"[mine]\n")
    assert "is not a calibration of edge-bcs" in refused(run("bench", "--calibrate"))
    assert file.read_bytes() == b"[mine]\n"


def test_a_trained_checkpoint_of_onnx_runtime(tmp_path: Path) -> None:
    """Written over if the training went on from it, or with --force."""
    import onnxruntime

    if hasattr(onnxruntime.capi._pybind_state, "save_checkpoint"):
        pytest.skip("a training build of onnxruntime runs such artifacts itself")
    folder = DENSE / "mobile"
    if not (folder / "checkpoint").is_file():
        pytest.skip("no artifact of ONNX Runtime's tools here")
    from edge_bcs.cli.run_ort_artifact import check_checkpoint

    file = mine(tmp_path / "trained.checkpoint")
    words = ("run-ort-artifact", folder, "--data", "digits", "-o")
    for output in (file, folder / "checkpoint"):
        before = output.read_bytes()
        assert "--force replaces it all the same" in refused(run(*words, output))
        assert output.read_bytes() == before
    (tmp_path / "link").symlink_to(file)
    check_checkpoint(str(file), str(tmp_path / "link"), False)
    check_checkpoint(str(file), None, True)
    check_checkpoint(str(tmp_path / "new"), None, False)
    check_checkpoint(None, None, False)


def test_files_of_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from edge_bcs.bench import endurance, trade_off

    file = mine(tmp_path / "README.md")
    with pytest.raises(EdgeBcsError, match="is not that of `make trade-off`"):
        trade_off.Folder(tmp_path, "all")
    monkeypatch.setattr(sys, "argv", ["endurance", "--artifact", str(tmp_path / "a"), "-o", str(tmp_path)])
    monkeypatch.setattr(endurance, "rewire", lambda *_: pytest.fail("measured first"))
    with pytest.raises(SystemExit, match=r"Error: .* has a README\.md that belongs to no measurement"):
        endurance.main()
    assert file.read_bytes() == b"mine"


# Runs and trainings


@pytest.mark.parametrize(
    "name", ["state.safetensors", "training_model.onnx", "report.json", "metrics.jsonl", "left-out.json"]
)
def test_finetune_does_not_begin_over_files_of_others(
    tiny_artifact: Make, tmp_path: Path, digits: Path, name: str
) -> None:
    file = mine(tmp_path / "folder" / name)
    words = (
        "finetune",
        tiny_artifact(),
        "--data",
        digits,
        "--steps",
        1,
        "--eval-samples",
        0,
        "-o",
        file.parent,
    )
    for more in ((), ("--resume",)):
        assert f"holds no run, but a {name} that the run would" in refused(run(*words, *more))
    assert [path.name for path in file.parent.iterdir()] == [name] and file.read_bytes() == b"mine"


def test_finetune_beside_files_of_others(tiny_artifact: Make, tmp_path: Path, digits: Path) -> None:
    app = mine(tmp_path / "app" / "manifest.json", b'{"name": "app"}')
    words = ("finetune", tiny_artifact(), "--data", digits, "--steps", 1, "--eval-samples", 0, "-o")
    for more in ((), ("--resume",)):
        assert "does not describe an edge-bcs artifact" in refused(run(*words, app.parent, *more))
        assert "is an exported artifact, which stays" in refused(run(*words, tiny_artifact(), *more))
    assert [path.name for path in app.parent.iterdir()] == ["manifest.json"]
    notes = mine(tmp_path / "run" / "notes.txt")
    assert run(*words, notes.parent).exit_code == 0 and notes.read_bytes() == b"mine"
    assert "already holds a run" in refused(run(*words, notes.parent))


def test_finetune_goes_on_with_a_run_of_this_artifact_alone(
    tiny_artifact: Make, tmp_path: Path, digits: Path
) -> None:
    """Not with that of another one, whose settings it would have; an artifact that is gone is not asked."""
    common = ("--data", digits, "--eval-samples", 0, "-o", tmp_path / "run")
    assert run("finetune", tiny_artifact(), *common, "--steps", 1).exit_code == 0
    other = tiny_artifact(epsilon=4 / 255)
    for more in ((), ("--resume",)):
        sentence = refused(run("finetune", other, *common, "--steps", 2, *more))
        assert "its objective.epsilon is 0.031, this artifact's 0.016" in sentence
    for artifact in (tiny_artifact(), tmp_path / "gone"):
        assert run("finetune", artifact, *common, "--steps", 2, "--resume").exit_code == 0


def test_metrics_do_not_go_on_in_another_file(tiny_artifact: Make, tmp_path: Path) -> None:
    from edge_bcs.runtime import Trainer
    from edge_bcs.runtime.board.saving import MetricsFile

    file = mine(tmp_path / "thesis.txt", b"Once upon a time\nthere was a sparse network.\n")
    with pytest.raises(EdgeBcsError, match=r"thesis\.txt holds no metrics, so it stays"):
        MetricsFile(file, resumed_at=3)
    data = open_data("digits", "train", (1, 8, 8))
    with Trainer(tiny_artifact()) as trainer:
        trainer.fit(data, steps=1, progress=False, save=tmp_path / "run")
    with Trainer.resume(tmp_path / "run") as trainer, pytest.raises(EdgeBcsError, match="holds no metrics"):
        trainer.fit(data, steps=2, progress=False, metrics=file)
    assert file.read_text().startswith("Once upon")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checkpoint.safetensors", b"mine"),
        ("checkpoint.safetensors", None),
        ("last.safetensors", b"mine"),
        ("manifest.json", b"{}"),
        ("metrics.jsonl", b'{"step": 1, "loss": 2.0, "done": 1}\n'),  # of a fine-tuning
        ("metrics.jsonl", b"mine\n"),
        ("epochs.jsonl", b"mine\n"),
        (
            "epochs.jsonl",
            b'{"epoch": 0, "step": 1, "connections": {}}\n{"epoch": 1, "step": 2, "connections": {}}\n',
        ),
    ],
)
def test_train_does_not_begin_over_files_of_others(tmp_path: Path, name: str, content: bytes | None) -> None:
    pytest.importorskip("torch")
    from helpers.training import SHORT, tiny
    from helpers.training import digits as images

    import edge_bcs
    from edge_bcs.checkpoint import save_checkpoint
    from edge_bcs.training import loop as training

    file = mine(tmp_path / "run" / name, content or b"")
    if content is None:  # a state of ours, but of no training
        save_checkpoint(file, edge_bcs.sparsify(tiny(), 0.9))
    before = file.read_bytes()
    with pytest.raises(EdgeBcsError, match=r"a training (already|there)|taken for an artifact"):
        training.train(edge_bcs.sparsify(tiny(), 0.9), images(40), epochs=1, output=tmp_path / "run", **SHORT)
    assert file.read_bytes() == before and [path.name for path in file.parent.iterdir()] == [name]


# What is written to


def test_links_devices_and_pipes(tmp_path: Path) -> None:
    """What a link points to is replaced; a device, a pipe and an open file are written to."""
    target = mine(tmp_path / "disk" / "target")
    (tmp_path / "link").symlink_to(target)
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and target.read_bytes() == b"new"
    (tmp_path / "dangling").symlink_to(tmp_path / "disk" / "later")
    write_atomically(tmp_path / "dangling", b"new")
    assert (tmp_path / "disk" / "later").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE) as reader:
        check_output(tmp_path / "pipe", lambda content: False, "ours")
        write_atomically(tmp_path / "pipe", b"new")
        assert reader.communicate()[0] == b"new"
    write_atomically(Path("/dev/null"), b"new")
    assert not Path("/dev/null").is_file() and not Path("/dev/null.partial").exists()
    code = "import sys; from pathlib import Path; from edge_bcs.core.files import write_atomically"
    code += "; print('before', flush=True); write_atomically(Path('/dev/stdout'), b'new\\n'); print('after')"
    with (tmp_path / "answer").open("wb") as stream:
        subprocess.run([sys.executable, "-c", code], stdout=stream, check=True)
    assert (tmp_path / "answer").read_bytes() == b"before\nnew\nafter\n"
    with pytest.raises(EdgeBcsError, match="cannot be written"):
        write_atomically(tmp_path / "none" / "file", b"new")


def test_how_files_are_recognised(tmp_path: Path) -> None:
    ours = json_with("a", "b")
    for content in (b'{"a": 1, "b": 2, "c": 3}', b'{"b": 1, "a": null}'):
        check_output(mine(tmp_path / "file", content), ours, "ours")
    for content in (b'{"a": 1}', b'{"a": 1, "b": 2', b"[" * 100_000, b"\xff\xfe", b"\0" * 10):
        with pytest.raises(EdgeBcsError, match="file is there and is not ours"):
            check_output(mine(tmp_path / "file", content), ours, "ours")
    check_output(mine(tmp_path / "file", b"some <mark> here"), containing("<mark>"), "ours")
    check_output(tmp_path / "none", ours, "ours")
    check_output(tmp_path / "none" / "deeper", ours, "ours")
    check_outputs(tmp_path / "none", ("x",), "y", ours, "ours")
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(EdgeBcsError, match="has a x that belongs to no ours"):
        check_outputs(tmp_path / "folder", ("x",), "y", ours, "ours")


def test_a_figure_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    from edge_bcs import plots

    file = tmp_path / "figure.png"

    def draw() -> Any:
        return pyplot.figure()

    plots.save(draw, file)
    before = file.read_bytes()
    assert plots.DRAWN(before)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EdgeBcsError, match=r"figure\.png cannot be written: No space left"):
        plots.save(draw, file)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_train_does_not_touch_a_record_of_others(tmp_path: Path, digits: Path) -> None:
    pytest.importorskip("torch")
    words = ("train", "--data", digits, "--width", 0.05, "--input-size", 8, "--channels", 1, "--steps", 1)
    file = mine(tmp_path / "run" / "left-out.json", b'{"mine": 1}')
    assert "so it stays" in refused(run(*words, "--attack-steps", 1, "-o", file.parent))
    assert [path.name for path in file.parent.iterdir()] == ["left-out.json"]
    assert file.read_bytes() == b'{"mine": 1}'
