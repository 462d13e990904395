"""Text of files and file names that would act on a terminal, and small files that are anything but small."""

from __future__ import annotations

import ast
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime import signature
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.board.saving import MetricsFile
from edge_bcs.runtime.ort.checkpoint import read_ort_checkpoint
from edge_bcs.targets import boards
from helpers.artifacts import manifest, write_artifact
from helpers.commands import run as edge_bcs

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small
from edge_bcs.core.metadata import parse_toml
from edge_bcs.core.metrics import keep_lines
from edge_bcs.core.text import check_text, shown


def acts(text: str) -> bool:
    """Whether text, but for the ends of its lines, has anything that a terminal obeys or cannot print."""
    return any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u202e" for c in text.replace("\n", ""))


ACTING = ["\ud800", "\x1b[2J", "a\x9b31mb", "\x07", "a\nb", "\r", "\u202egnp.exe", "\u2066", "\u2028", "\x7f"]
PLAIN = ["größe", "猫", "کتاب\u200cخانه", "👩\u200d🚀", "a 'b' \"c\" \\d [/e] {f}", "\u200f"]


def test_what_acts_on_a_terminal_is_shown_as_escapes() -> None:
    assert shown("\x1b[2J\ud800\u202e\n") == "\\x1b[2J\\ud800\\u202e\\n"
    for text in ACTING:
        assert not acts(shown(text)) and shown(text).encode()
        with pytest.raises(EdgeBcsError, match="could act on a terminal"):
            check_text({"a": [1, {text: None}]}, "it")
    for text in PLAIN:
        assert shown(text) == text
        check_text([text, {text: text}], "it")


PLACES: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "the network": lambda d, text: d["network"].update(name=text),
    "a layer": lambda d, text: d["layers"][0].update(name=text),
    "the version": lambda d, text: d.update(version=text),
    "an argument": lambda d, text: d["network"].update(arguments={"a": [text]}),
    "a field nobody knows": lambda d, text: d.update({text: 1}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_manifest_with_such_a_text_is_refused(tmp_path: Path, place: str) -> None:
    for number, text in enumerate(ACTING):
        folder = write_artifact(tmp_path / str(number), lambda d, text=text: PLACES[place](d, text))
        for result in (edge_bcs("inspect", folder), edge_bcs("inspect", folder, "--json")):
            assert result.exit_code == 1 and isinstance(result.exception, SystemExit), text
            assert result.output.count("\n") == 1 and not acts(result.output) and len(result.output) < 400


def test_other_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    for number, text in enumerate(PLAIN):
        folder = write_artifact(
            tmp_path / str(number),
            lambda d, text=text: (PLACES["the network"](d, text), PLACES["a layer"](d, text)),
        )
        result = edge_bcs("inspect", folder)
        assert result.exit_code == 0, result.output
        assert f"  network         {text}, " in result.output
        assert "[" not in text or text in result.output.split("Layers")[1]


def test_a_board_file_with_such_a_text_is_refused(tmp_path: Path) -> None:
    text = boards.file_of("raspberry-pi-4").read_text()
    title = next(line for line in text.splitlines() if line.startswith("title"))
    for file, changed in (("a", '"\\u001b[2J"'), ("b", '"\\u202e"')):
        (tmp_path / f"{file}.toml").write_text(text.replace(title, f"title = {changed}"))
        result = edge_bcs("targets", tmp_path / f"{file}.toml")
        assert (
            result.exit_code == 1 and "could act on a terminal" in result.output and not acts(result.output)
        )
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_toml(b"a = " + b"[" * 100_000)


def test_a_checkpoint_with_such_a_text_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from safetensors.numpy import save_file

    from edge_bcs import models
    from edge_bcs.checkpoint import read_checkpoint, save_checkpoint
    from edge_bcs.method.connectivity import sparsify

    file = tmp_path / "checkpoint.safetensors"
    save_checkpoint(file, sparsify(models.vgg16(width=1 / 16), 0.99, seed=1))
    found = read_checkpoint(file)
    network = json.dumps({**json.loads(found.metadata["network"]), "\x1b[2J": 1})
    save_file(found.tensors, file, {**found.metadata, "network": network})
    result = edge_bcs("export", "--checkpoint", file, "-o", tmp_path / "out")
    assert result.exit_code == 1 and not acts(result.output) and result.output.count("\n") == 1


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "\udcff", "a\nb", "\u202eb"])
def test_file_names_do_not_act_on_the_terminal(tmp_path: Path, name: str) -> None:
    refused = edge_bcs("inspect", tmp_path / name)
    assert refused.exit_code == 1 and not acts(refused.output) and shown(name) in refused.output
    classes = tmp_path / "photos"
    (classes / name).mkdir(parents=True)
    (classes / name / f"{name}.png").write_bytes(b"no image")
    artifact = write_artifact(tmp_path / "artifact")
    for command in (["finetune", artifact, "-o", tmp_path / "run"], ["evaluate", artifact]):
        result = edge_bcs(*command, "--data", classes)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
        assert not acts(result.output)


def test_a_path_that_is_no_text_is_printed(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 in the name of a folder: the command has done its work, and says so."""
    source = boards.file_of("raspberry-pi-4").read_text()
    (tmp_path / "\udcff.toml").write_text(source)
    result = edge_bcs("targets", tmp_path / "\udcff.toml", "--toml")
    assert result.exit_code == 0 and result.stdout == source
    artifact = write_artifact(tmp_path / "\udcff")
    assert edge_bcs("inspect", artifact).exit_code == 0


def test_a_report_does_not_run_what_a_manifest_says(
    tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """Tags, and the markup of the library that draws tables."""
    folder = shutil.copytree(tiny_artifact(), tmp_path / "artifact")
    file = folder / "manifest.json"
    description = json.loads(file.read_text())
    description["network"]["name"] = "</script><img src=x onerror=alert(1)>[/red]"
    changed = json.dumps(description).replace('"values"', '"[/values]<b>"')
    assert changed.count("[/values]") > 3
    file.write_text(changed)
    result = edge_bcs("simulate", folder, "--no-run", "--html", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert "[/red]" in result.output and "[/values]<b>" in result.output
    html = (tmp_path / "report.html").read_text()
    assert "<img" not in html and "<b>" not in html and html.count("</script>") == 2
    assert "\\u003cimg src=x" in html


# Sizes


@pytest.fixture
def huge(tmp_path: Path) -> Callable[[Path], Path]:
    """A function that makes a file of 1 TB that takes no room on the disk."""

    def make(file: Path) -> Path:
        file.parent.mkdir(exist_ok=True)
        with file.open("ab") as stream:
            stream.truncate(1 << 40)
        return file

    return make


@pytest.fixture(autouse=True)
def frugal() -> Any:
    """At most 100 MiB more than before, at any moment."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    if before > 200 << 10:  # torch and the like were imported before, and not by the test itself
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


Huge = Callable[[Path], Path]


def test_small_files_that_are_huge(tmp_path: Path, huge: Huge) -> None:
    assert read_small(write_artifact(tmp_path / "a") / "manifest.json")[:1] == b"{"
    with pytest.raises(EdgeBcsError, match="larger than 16 MiB"):
        read_small(huge(tmp_path / "x"))
    (tmp_path / "y").write_bytes(bytes(1025))
    assert len(read_small(tmp_path / "y", 1025)) == 1025
    with pytest.raises(EdgeBcsError, match="larger than 1 KiB"):
        read_small(tmp_path / "y", 1024)
    with pytest.raises(EdgeBcsError, match="not a regular file"):
        read_small("/dev/zero")
    with pytest.raises(OSError):
        read_small(tmp_path)


def test_a_huge_signature_or_key_is_refused(tmp_path: Path, huge: Huge) -> None:
    pytest.importorskip("cryptography")
    from helpers.signing import make_key, sign

    private, public = make_key(tmp_path, "maker")
    folder = sign(write_artifact(tmp_path / "signed"), private)
    assert Artifact.read(folder, [public]).signature == "valid"
    huge(folder / "manifest.json.sig")
    with pytest.raises(EdgeBcsError, match=r"manifest\.json\.sig is larger than 4 KiB"):
        Artifact.read(folder, [public])
    for read in (signature.public_key, signature.private_key):
        with pytest.raises(EdgeBcsError, match="in PEM form"):
            read(huge(tmp_path / "key.pem"))


@pytest.mark.parametrize("name", ["manifest.json", "eval_model.onnx", "state.safetensors"])
def test_a_huge_file_of_an_artifact_is_refused(tmp_path: Path, huge: Huge, name: str) -> None:
    """Even one whose size is that of the manifest, whose sha256 nobody could wait for."""
    folder = write_artifact(tmp_path / "artifact")
    huge(folder / name)
    if name != "manifest.json":
        description = json.loads((folder / "manifest.json").read_text())
        description["files"][name]["bytes"] = 1 << 40
        (folder / "manifest.json").write_text(json.dumps(description))
    with pytest.raises(EdgeBcsError, match=r"larger than 16 MiB|files\.\S+\.bytes must be a whole number"):
        Artifact.read(folder)


def test_huge_files_of_settings_and_counts_are_refused(tmp_path: Path, huge: Huge) -> None:
    pytest.importorskip("torch")
    from edge_bcs.targets import cost_model

    from edge_bcs import plots
    from edge_bcs.bench import report as bench_report
    from edge_bcs.cli import run_report
    from edge_bcs.evaluation import measures as evaluation

    refused: dict[str, Callable[[Path], object]] = {
        "board.toml": boards.load,
        "machine.toml": cost_model.load,
        "epochs.jsonl": lambda file: plots.read_run(file.parent),
        "evaluation.json": plots.read_report,
        "bench.json": lambda file: bench_report.read(file.parent),
        "checkpoint": read_ort_checkpoint,
        "counts.json": lambda file: evaluation.interrupted_counts(file, {}, 1),
    }
    for name, read in refused.items():
        with pytest.raises(EdgeBcsError) as caught:
            read(huge(tmp_path / "refused" / name))
        assert "\n" not in str(caught.value)
    # What only says how far something was counts as nothing.
    assert run_report.earlier_report(huge(tmp_path / "run" / "report.json").parent) == {}
    line = b'{"step": 1}\n'
    for name in ("metrics.jsonl", "steps.jsonl"):
        (tmp_path / name).write_bytes(line + b'{"step": 2}\n')
        huge(tmp_path / name)
    MetricsFile(tmp_path / "metrics.jsonl", resumed_at=1).close()
    keep_lines(tmp_path / "steps.jsonl", 1)
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert (tmp_path / name).read_bytes() == line


WHOLE = {
    "edge_bcs/bench/fleet_learning.py": "what the same bench wrote",
    "edge_bcs/bench/judges.py": "a source of the package",
    "edge_bcs/bench/order.py": "what the linker wrote beside the program",
    "edge_bcs/bench/profiler.py": "what onnxruntime wrote just now",
    "edge_bcs/bench/resident.py": "files of the kernel, and what a process that was started here says",
    "edge_bcs/cli/service.py": "the package's own template",
    "edge_bcs/data/images.py": "what the same user found out of a data set before, and as long as that",
    "edge_bcs/data/readers.py": "a member of an archive, whose header was refused if it is too long",
    "edge_bcs/data/store.py": "the end of a file",
    "exporters/artifact.py": "the manifest that was written just now",
    "exporters/microcontroller/project.py": "the package's own templates",
    "runtime/archive.py": "a member of an archive that is not too long",
    "edge_bcs/core/machine.py": "files of the kernel",
    "runtime/board/process.py": "files of the kernel",
    "targets/host_run.py": "what the parent process sends",
    "targets/report.py": "the package's own template",
    "targets/roofline.py": "files of the kernel",
}
"""Modules that read to the end whatever its size, and what."""


def test_whoever_reads_a_whole_file_asks_how_large_it_may_be() -> None:
    """By `read_small`: nothing else reads to the end of a file that somebody else may have made."""
    root = Path(__file__).parents[1]
    found = set()
    for room in ("edge_bcs", "exporters", "runtime", "targets"):
        for file in (root / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    name, limits = node.func.attr, node.args
                    if name in ("read_text", "read_bytes", "readall") or (name == "read" and not limits):
                        found.add(str(file.relative_to(root)))
    assert found == WHOLE.keys()


def test_the_manifest_of_these_tests_is_sound(tmp_path: Path) -> None:
    assert Artifact.read(write_artifact(tmp_path / "a")).network == manifest()["network"]["name"]
