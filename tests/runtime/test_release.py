"""Releases: an artifact that its maker signed, but has replaced since, is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from edge_bcs.runtime.artifact import Artifact
from helpers.artifacts import write_artifact
from helpers.commands import run as edge_bcs
from helpers.signing import make_key, sign

from edge_bcs.core.errors import EdgeBcsError

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_key(tmp_path_factory.mktemp("keys"), "maker")


def signed(folder: Path, release: Any, keys: tuple[Path, Path]) -> Path:
    return sign(write_artifact(folder, lambda manifest: manifest.update(release=release)), keys[0])


def test_a_least_release_may_be_demanded(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = signed(tmp_path / "a", 7, keys)
    assert Artifact.read(folder).release == 7
    assert Artifact.read(folder, [keys[1]], min_release=7).release == 7
    with pytest.raises(EdgeBcsError, match="is release 7, and release 8 or a later one is required"):
        Artifact.read(folder, [keys[1]], min_release=8)
    with pytest.raises(EdgeBcsError, match="--min-release needs --trust-key"):
        Artifact.read(folder, min_release=1)
    # A number that nobody signed.
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"release": 7', '"release": 9'))
    with pytest.raises(EdgeBcsError, match="altered or signed with another key"):
        Artifact.read(folder, [keys[1]], min_release=8)
    none = sign(write_artifact(tmp_path / "b"), keys[0])
    assert Artifact.read(none, [keys[1]]).release is None
    with pytest.raises(EdgeBcsError, match="is of no release, and release 1 or"):
        Artifact.read(none, [keys[1]], min_release=1)


@pytest.mark.parametrize("release", [0, -1, 2**53, 1.5, True, "7", None, [7]])
def test_what_is_no_release(tmp_path: Path, release: Any) -> None:
    folder = write_artifact(tmp_path / "a", lambda manifest: manifest.update(release=release))
    with pytest.raises(EdgeBcsError, match="field release must be a whole number"):
        Artifact.read(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> dict[int | None, Path]:
    """Signed archives of one network in releases 3, 4 and none."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("releases")
    made = {}
    for release in (3, 4, None):
        made[release] = folder / f"{release}.tar"
        more = [] if release is None else ["--release", release]
        result = edge_bcs(
            "export", "--width", "0.05", "--sparsity", "0.9", "--attack-steps", "1", "--batch-size", "8",
            "--micro-batch", "4", "--no-validate", "--sign-key", keys[0], *more, "-o", made[release],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    return made


def test_a_board_does_not_go_back(
    exported: dict[int | None, Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    run, memory = tmp_path / "run", tmp_path / "run.release"
    trust = ("--trust-key", keys[1])

    def finetune(release: int | None, *more: object) -> Result:
        options = ("--data", "digits", "--steps", 1, "--eval-samples", 0, "-o", run, *more)
        return edge_bcs("finetune", exported[release], *options)

    # Without a key a number is not remembered: anybody could forbid all others by a high one.
    assert finetune(4).exit_code == 0 and not memory.exists()
    shutil.rmtree(run)
    assert finetune(None, *trust).exit_code == 0 and not memory.exists()
    shutil.rmtree(run)
    assert finetune(3, *trust).exit_code == 0
    assert json.loads(memory.read_text()) == {"accepted_release": 3}
    assert finetune(3, *trust, "--resume").exit_code == 0
    shutil.rmtree(run)
    assert finetune(4, *trust).exit_code == 0
    for _ in ("with the run of release 4", "without"):
        for release, said in ((3, "is release 3"), (None, "is of no release")):
            refused = finetune(release, *trust, "--resume")
            assert refused.exit_code == 1 and f"{said}, and release 4 was accepted here" in refused.output
        shutil.rmtree(run, ignore_errors=True)
        assert json.loads(memory.read_text()) == {"accepted_release": 4}
    assert finetune(4, *trust, "--min-release", 5).exit_code == 1 and not run.exists()
    assert finetune(4, "--min-release", 4, "--resume").exit_code == 1 and not run.exists()
    memory.write_text('{"accepted_release": "4"}')
    refused = finetune(4, *trust)
    assert refused.exit_code == 1 and "run.release should say" in refused.output
    memory.unlink()
    assert finetune(3, *trust).exit_code == 0  # on purpose


def test_an_artifact_that_cannot_be_used_is_not_remembered(
    exported: dict[int | None, Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """Release 4 for a run of release 3: refused, and release 3 goes on."""
    options = ("--data", "digits", "--eval-samples", 0, "--trust-key", keys[1], "-o", tmp_path / "run")
    assert edge_bcs("finetune", exported[3], "--steps", 1, *options).exit_code == 0
    assert edge_bcs("finetune", exported[4], "--steps", 2, "--resume", *options).exit_code == 1
    assert edge_bcs("finetune", exported[3], "--steps", 2, "--resume", *options).exit_code == 0


@pytest.mark.parametrize("command", ["inspect", "simulate", "evaluate", "export", "train"])
def test_every_command_takes_a_least_release(
    exported: dict[int | None, Path], keys: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    artifact = exported[4]
    words = {
        "inspect": (artifact,),
        "simulate": (artifact, "--no-run"),
        "evaluate": (artifact, "--data", "digits", "--attack", "none", "--limit", 4),
        "export": ("--checkpoint", artifact, "--no-validate", "-o", tmp_path / "out"),
        "train": ("--method", "fixed", "--counts-from", artifact, "--data", "digits", "--width", 0.05,
                  "--steps", 1, "-o", tmp_path / "out"),
    }[command]  # fmt: skip
    for release, said in ((4, ""), (5, "is release 4, and release 5 or a later one is required")):
        result = edge_bcs(command, *words, "--trust-key", keys[1], "--min-release", release)
        assert (result.exit_code == 0) == (release == 4) and said in result.output, result.output
    assert edge_bcs(command, *words, "--min-release", 4).exit_code == 1


def test_the_service_demands_it_too(exported: dict[int | None, Path], tmp_path: Path) -> None:
    words = ("finetune", exported[4], "--data", "digits", "-o", tmp_path / "run", "--min-release", 4)
    assert " --min-release 4 " in edge_bcs(*words, "--print-service").output


def test_inspect_shows_it(exported: dict[int | None, Path]) -> None:
    assert "  release         4\n" in edge_bcs("inspect", exported[4]).output
    assert json.loads(edge_bcs("inspect", exported[4], "--json").stdout)["release"] == 4
    assert "release" not in edge_bcs("inspect", exported[None]).output
