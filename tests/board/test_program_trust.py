"""edge-bcs-run with --trust-key and --min-release: what Python takes and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import board_program as board
from helpers import commands
from helpers.signing import make_keys, sign

pytest.importorskip("cryptography")
Make = Callable[..., Path]
OPTIONS = ("--data", "digits", "--threads", 1, "--eval-samples", 0, "--max-writes", "none", "--no-augment")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(tiny_artifact: Make, tmp_path: Path, keys: Path) -> Path:
    return sign(Path(shutil.copytree(tiny_artifact(), tmp_path / "signed")), keys / "maker.pem")


def of_release(artifact: Path, release: int | None, key: Path) -> Path:
    """The artifact with another release number, signed anew."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest.pop("release", None)
    if release is not None:
        manifest["release"] = release
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    return sign(artifact, key)


def test_the_trusted_key_opens_what_it_signed(signed: Path, keys: Path) -> None:
    maker, other = keys / "maker.pub.pem", keys / "other.pub.pem"
    for trusted in ((maker,), (other, maker)):
        words = ("inspect", signed, *(word for key in trusted for word in ("--trust-key", key)))
        assert board.succeed(*words) == commands.succeed(*words)
        assert board.succeed(*words)["signature"] == "valid"
    assert board.succeed("inspect", signed)["signature"] == "unchecked"
    assert "signed with another key" in board.refused("inspect", signed, "--trust-key", other)
    environment = board.run("inspect", signed, EDGE_BCS_TRUST_KEY=f"{other}:{maker}")
    assert environment.returncode == 0 and "valid" in environment.stdout
    assert board.run("inspect", signed, EDGE_BCS_TRUST_KEY=str(other)).returncode == 1
    for command in ("predict", "evaluate", "finetune"):
        more = (signed / "x.png",) if command == "predict" else ("--data", "digits")
        assert "signed with another key" in board.refused(command, signed, *more, "--trust-key", other)


def test_one_changed_byte_of_the_manifest_is_seen(signed: Path, keys: Path) -> None:
    manifest, trust = signed / "manifest.json", ("--trust-key", keys / "maker.pub.pem")
    content = manifest.read_bytes()
    manifest.write_bytes(content + b" ")
    assert "signed with another key" in board.refused("inspect", signed, *trust)
    manifest.write_bytes(content)
    board.succeed("inspect", signed, *trust)
    for signature in (b"", None):
        if signature is None:
            (signed / "manifest.json.sig").unlink()
        else:
            (signed / "manifest.json.sig").write_bytes(signature)
        assert "is not signed" in board.refused("inspect", signed, *trust)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("maker.pem", "is a private key, which belongs on no board"),
        ("rsa.pub.pem", "is not an Ed25519 key"),
        ("none.pem", "the trusted key"),
        ("text.pem", "is not a public key in PEM form"),
    ],
)
def test_a_key_that_cannot_be_used_is_a_sentence(signed: Path, keys: Path, name: str, sentence: str) -> None:
    (keys / "text.pem").write_text("-----BEGIN PUBLIC KEY-----\nMCo*\n-----END PUBLIC KEY-----\n")
    message = board.refused("inspect", signed, "--trust-key", keys / name)
    assert sentence in message
    if name != "none.pem":
        assert sentence in commands.run("inspect", signed, "--trust-key", keys / name).output


def test_a_release_is_remembered_beside_the_run(signed: Path, keys: Path, tmp_path: Path) -> None:
    key, run = keys / "maker.pem", tmp_path / "run"
    given = ("finetune", signed, *OPTIONS, "--trust-key", keys / "maker.pub.pem", "-o", run)
    of_release(signed, 7, key)
    board.succeed(*given, "--steps", 1)
    assert json.loads((tmp_path / "run.release").read_text()) == {"accepted_release": 7}
    board.succeed(*given, "--steps", 2, "--resume")
    for release in (6, None):
        of_release(signed, release, key)
        for program in (board.refused, lambda *words: commands.run(*words).output):
            told = program(*given, "--steps", 3, "--resume")
            assert "release 7 was accepted here before" in told
    of_release(signed, 8, key)
    told = board.refused(*given[:-1], tmp_path / "other", "--min-release", 9)
    assert "is release 8, and release 9 or a later one is required" in told
    assert "--min-release needs --trust-key" in board.refused("inspect", signed, "--min-release", 1)


def test_a_run_goes_on_from_what_was_signed(
    signed: Path, tiny_artifact: Make, keys: Path, tmp_path: Path
) -> None:
    """What training wrote has no signature: it is a run of the signed artifact, or refused."""
    run, trust = tmp_path / "run", ("--trust-key", keys / "maker.pub.pem")
    board.succeed("finetune", signed, *OPTIONS, *trust, "--steps", 1, "-o", run)
    assert "is not signed" in board.refused("inspect", run, *trust)
    other = tmp_path / "other"
    board.succeed("finetune", tiny_artifact(objective="natural"), *OPTIONS, "--steps", 1, "-o", other)
    told = board.refused("finetune", signed, *OPTIONS, *trust, "--steps", 2, "-o", other, "--resume")
    assert "holds a run of another artifact" in told
    board.succeed("finetune", signed, *OPTIONS, *trust, "--steps", 2, "-o", run, "--resume")
