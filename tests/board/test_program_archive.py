"""Artifacts in one file: edge-bcs-run takes and refuses what Python does, and unpacks nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edge_bcs.runtime import archive
from edge_bcs.runtime.artifact import Artifact
from helpers import board_program as board
from helpers import commands
from helpers.archives import FAULTS
from helpers.c_interface import Network
from helpers.signing import make_keys, sign

from edge_bcs.core.errors import EdgeBcsError

Make = Callable[..., Path]
OPTIONS = ("--data", "digits", "--threads", 1, "--eval-samples", 6, "--eval-steps", 1, "--max-writes", "none")


def pack(folder: Path, file: Path) -> Path:
    with file.open("wb") as stream:
        archive.pack(folder, stream, "tiny")
    return file


@pytest.fixture
def packed(tiny_artifact: Make, tmp_path: Path) -> Path:
    return pack(tiny_artifact(), tmp_path / "Tiny.tar")


def test_a_run_begins_from_an_archive_as_from_its_folder(
    packed: Path, tiny_artifact: Make, tmp_path: Path
) -> None:
    content = packed.read_bytes()
    report = board.succeed("finetune", packed, *OPTIONS, "--steps", 3)
    wanted = board.succeed("finetune", tiny_artifact(), *OPTIONS, "--steps", 3, "-o", tmp_path / "run")
    assert report.pop("run") == str(tmp_path / "Tiny-run") and wanted.pop("run")
    assert board.timeless(report) == board.timeless(wanted)
    files = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    for name in ("report.json", "metrics.jsonl"):
        del files[name]
    assert all((tmp_path / "Tiny-run" / name).read_bytes() == found for name, found in files.items())
    assert packed.read_bytes() == content
    given = ("finetune", packed, *OPTIONS, "--resume", "-o")
    board.succeed(*given, tmp_path / "Tiny-run", "--steps", 5)
    commands.succeed(*given, tmp_path / "run", "--steps", 5, "--engine", "native")
    assert board.states(tmp_path / "Tiny-run") == board.states(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Tiny-run", "Tiny.tar", "run"]


def test_a_run_of_another_archive_is_seen(packed: Path, tiny_artifact: Make, tmp_path: Path) -> None:
    other = pack(tiny_artifact(objective="natural"), tmp_path / "other.tar")
    board.succeed("finetune", packed, *OPTIONS, "--steps", 1, "-o", tmp_path / "run")
    told = board.refused("finetune", other, *OPTIONS, "--steps", 2, "-o", tmp_path / "run", "--resume")
    assert "holds a run of another artifact" in told


def test_an_archive_is_measured_and_asked_like_its_folder(
    packed: Path, tiny_artifact: Make, tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "x.png")
    assert board.succeed("inspect", packed) == commands.succeed("inspect", packed)
    for words in (
        ("evaluate", "--data", "digits", "--limit", 8, "--attack", "none"),
        ("predict", tmp_path / "x.png"),
    ):
        found, wanted = (board.succeed(words[0], path, *words[1:]) for path in (packed, tiny_artifact()))
        assert found.pop("path") == str(packed) and wanted.pop("path")
        assert board.timeless(found) == board.timeless(wanted)
    with Network(packed) as one, Network(tiny_artifact()) as other:
        assert one.info.arena_bytes == other.info.arena_bytes


def test_signatures_in_archives(tiny_artifact: Make, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    keys = make_keys(tmp_path)
    folder = sign(Path(shutil.copytree(tiny_artifact(), tmp_path / "signed")), keys / "maker.pem")
    file = pack(folder, tmp_path / "signed.tar")
    trust = ("--trust-key", keys / "maker.pub.pem")
    assert board.succeed("inspect", file, *trust) == commands.succeed("inspect", file, *trust)
    assert board.succeed("inspect", file)["signature"] == "unchecked"
    assert "signed with another key" in board.refused("inspect", file, "--trust-key", keys / "other.pub.pem")
    given = ("finetune", file, *OPTIONS, *trust, "-o", tmp_path / "run")
    board.succeed(*given, "--steps", 1)
    board.succeed(*given, "--steps", 2, "--resume")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    pack(folder, file)
    assert "signed with another key" in board.refused(*given, "--steps", 3, "--resume")
    (folder / "manifest.json.sig").unlink()
    pack(folder, file)
    assert "is not signed" in board.refused("inspect", file, *trust)


def test_hostile_archives_are_refused_in_pythons_words(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    for what, damage, message in FAULTS:
        packed.write_bytes(content)
        damage(packed)
        told = board.refused("inspect", packed)
        assert message in told, what
        with pytest.raises(EdgeBcsError) as caught:
            Artifact.read(packed)
        assert told == str(caught.value).replace("\\\\", "\\"), what
        assert [path.name for path in tmp_path.iterdir()] == ["Tiny.tar"]


def test_an_archive_that_is_altered_is_noticed(packed: Path, tmp_path: Path) -> None:
    whole, draws = packed.read_bytes(), np.random.default_rng(0)
    wanted = board.succeed("inspect", packed)
    for position in draws.integers(512, len(whole), 40).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        packed.write_bytes(damaged)
        result = board.run("inspect", packed, "--json")
        try:
            Artifact.read(packed)
        except EdgeBcsError:
            assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("Error: ")
        else:  # padding, or the manifest's own text, which a signature is for
            assert result.returncode == 1 or json.loads(result.stdout).keys() == wanted.keys()


def test_a_file_that_is_no_archive_is_one_sentence(tiny_artifact: Make, tmp_path: Path) -> None:
    file = tmp_path / "x.zip"
    file.write_bytes(b"PK")
    assert f"{file} is a file, and an artifact is a folder or a .tar" in board.refused("inspect", file)
    told = board.refused("finetune", tiny_artifact(), *OPTIONS, "-o", file)
    assert told == f"{file} is a file; choose a folder for the run." and file.read_bytes() == b"PK"
    (tmp_path / "a.tar").mkdir()
    assert "manifest.json is missing" in board.refused("inspect", tmp_path / "a.tar")
    shutil.copytree(tiny_artifact(), tmp_path / "b.tar")
    assert board.succeed("inspect", tmp_path / "b.tar")
