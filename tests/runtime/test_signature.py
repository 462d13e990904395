"""Signed artifacts: whose key is trusted is read, everything else is refused, on every command."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from edge_bcs.runtime import archive, signature
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import write_run
from helpers.artifacts import GRAPHS, manifest, seal, state, write_artifact
from helpers.commands import run as edge_bcs
from helpers.signing import make_keys, sign

from edge_bcs.core.errors import EdgeBcsError

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys `maker` and `other`, and the RSA key `rsa`."""
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(tmp_path: Path, keys: Path) -> Path:
    return sign(write_artifact(tmp_path / "signed"), keys / "maker.pem")


def test_the_trusted_key_opens_what_it_signed(signed: Path, keys: Path) -> None:
    assert Artifact.read(signed, [keys / "maker.pub.pem"]).signature == "valid"
    assert Artifact.read(signed, [keys / "other.pub.pem", keys / "maker.pub.pem"]).signature == "valid"
    assert Artifact.read(signed).signature == "unchecked"
    with pytest.raises(EdgeBcsError, match="altered or signed with another key"):
        Artifact.read(signed, [keys / "other.pub.pem"])


def test_an_artifact_without_signature_is_refused(tmp_path: Path, keys: Path) -> None:
    folder = write_artifact(tmp_path / "plain")
    assert Artifact.read(folder).signature == "none"
    with pytest.raises(EdgeBcsError, match="is not signed"):
        Artifact.read(folder, [keys / "maker.pub.pem"])
    (folder / "manifest.json.sig").write_bytes(b"")
    with pytest.raises(EdgeBcsError, match="is not signed"):
        Artifact.read(folder, [keys / "maker.pub.pem"])


def test_openssl_and_we_read_each_other(signed: Path, keys: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    file, sealed = signed / "manifest.json", signed / "manifest.json.sig"
    command: list[str | Path] = ["openssl", "pkeyutl", "-rawin", "-in", file]
    subprocess.run(
        [*command, "-verify", "-pubin", "-inkey", keys / "maker.pub.pem", "-sigfile", sealed], check=True
    )
    subprocess.run([*command, "-sign", "-inkey", keys / "other.pem", "-out", sealed], check=True)
    assert Artifact.read(signed, [keys / "other.pub.pem"]).signature == "valid"


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :]


def test_every_flipped_byte_is_refused(tmp_path: Path, keys: Path) -> None:
    """All bytes of small files, about 200 of the larger manifest and state; as a folder and as an archive."""
    folder = write_artifact(tmp_path / "small")
    for graph in GRAPHS:
        (folder / f"{graph}_model.onnx").write_bytes(graph.encode() * 3)
    seal(folder, manifest())
    sign(folder, keys / "maker.pem")
    trusted = [keys / "maker.pub.pem"]
    assert Artifact.read(folder, trusted).signature == "valid"
    with (tmp_path / "small.tar").open("wb") as stream:
        archive.pack(folder, stream, "small")
    packed = (tmp_path / "small.tar").read_bytes()
    assert Artifact.read(tmp_path / "small.tar", trusted).signature == "valid"
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        start = packed.index(whole)
        for position in range(0, len(whole), 1 + len(whole) // 200):
            file.write_bytes(flipped(whole, position))
            with pytest.raises(EdgeBcsError):
                Artifact.read(folder, trusted)
            if position % 7 == 0:
                (tmp_path / "small.tar").write_bytes(flipped(packed, start + position))
                with pytest.raises(EdgeBcsError):
                    Artifact.read(tmp_path / "small.tar", trusted)
        file.write_bytes(whole)
    assert Artifact.read(folder, trusted).signature == "valid"


def test_a_signed_manifest_for_other_files_is_refused(tmp_path: Path, signed: Path, keys: Path) -> None:
    """Old files with a signature that was valid for newer ones, and the other way round."""
    newer = write_artifact(tmp_path / "newer", change=lambda description: description.update(seed=8))
    (newer / "eval_model.onnx").write_bytes(b"another graph")
    seal(newer, {**manifest(), "seed": 8})
    shutil.copy(signed / "manifest.json.sig", newer)
    with pytest.raises(EdgeBcsError, match="altered"):
        Artifact.read(newer, [keys / "maker.pub.pem"])
    shutil.copy(signed / "manifest.json", newer)
    with pytest.raises(EdgeBcsError, match=r"eval_model\.onnx is truncated"):
        Artifact.read(newer, [keys / "maker.pub.pem"])


def test_a_run_is_never_taken_for_what_was_signed(tmp_path: Path, signed: Path, keys: Path) -> None:
    trusted = [keys / "maker.pub.pem"]
    run = tmp_path / "run"
    write_run(run, Artifact.read(signed, trusted), state(), {"step": "1", "seed": "7"})
    with pytest.raises(EdgeBcsError, match=r"Runs of .* are never signed"):
        Artifact.read(run, trusted)
    # Not even with a manifest that the key signed: its state is not under the signature.
    sign(run, keys / "maker.pem")
    with pytest.raises(EdgeBcsError, match="does not list"):
        Artifact.read(run, trusted)


KEY_FAULTS: list[tuple[str, Callable[[Path], Path], str]] = [
    ("missing", lambda k: k / "none.pem", "cannot be read"),
    ("a folder", lambda k: k, "cannot be read"),
    ("private", lambda k: k / "maker.pem", "is a private key"),
    ("RSA", lambda k: k / "rsa.pub.pem", "not an Ed25519 key"),
    ("no PEM", lambda k: Path(__file__), "not a public key in PEM form"),
]


@pytest.mark.parametrize(("choose", "message"), [f[1:] for f in KEY_FAULTS], ids=[f[0] for f in KEY_FAULTS])
def test_keys_that_cannot_be_trusted(
    signed: Path, keys: Path, choose: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(EdgeBcsError, match=message) as caught:
        Artifact.read(signed, [choose(keys)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.pem", "cannot be read"),
        ("maker.pub.pem", "is a public key"),
        ("rsa.pem", "not an Ed25519 key"),
    ],
)
def test_keys_that_cannot_sign(keys: Path, name: str, message: str) -> None:
    with pytest.raises(EdgeBcsError, match=message):
        signature.private_key(keys / name)


# The commands


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """out.tar, signed by `maker`, of a tiny VGG-16."""
    pytest.importorskip("torch")
    file = tmp_path_factory.mktemp("exported") / "out.tar"
    result = edge_bcs(
        "export", "--width", "0.05", "--sparsity", "0.9", "--attack-steps", "1", "--batch-size", "8",
        "--micro-batch", "4", "--no-validate", "--archive", "--sign-key", keys / "maker.pem", "-o", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "signed" in result.output
    assert [path.name for path in file.parent.iterdir()] == ["out.tar"]
    return file


def commands(artifact: Path, run: Path) -> dict[str, Sequence[str | Path]]:
    shared = ["--data", "digits"]
    return {
        "inspect": ["inspect", artifact],
        "simulate": ["simulate", artifact, "--no-run"],
        "evaluate": ["evaluate", artifact, *shared, "--attack", "none", "--limit", "4"],
        "evaluate in torch": [
            "evaluate", artifact, *shared, "--engine", "torch", "--attack", "none", "--limit", "4"
        ],
        "finetune": ["finetune", artifact, *shared, "--steps", "1", "--eval-samples", "0", "-o", run],
        "export": ["export", "--checkpoint", artifact, "--no-validate", "-o", run],
    }  # fmt: skip


@pytest.mark.parametrize("command", commands(Path(), Path()))
def test_every_command_takes_an_archive_and_checks_its_signature(
    exported: Path, keys: Path, tmp_path: Path, command: str
) -> None:
    arguments = commands(exported, tmp_path / "run")[command]
    refused = edge_bcs(*arguments, "--trust-key", keys / "other.pub.pem")
    assert refused.exit_code == 1 and "another key" in refused.output
    assert not (tmp_path / "run").exists()
    result = edge_bcs(*arguments, "--trust-key", keys / "maker.pub.pem")
    assert result.exit_code == 0, result.output


def test_a_run_goes_on_under_the_key_of_its_artifact(exported: Path, keys: Path, tmp_path: Path) -> None:
    begin: list[str | Path] = [
        "finetune",
        exported,
        "--data",
        "digits",
        "--eval-samples",
        "0",
        "-o",
        tmp_path / "run",
    ]
    trust = ["--trust-key", keys / "maker.pub.pem"]
    assert edge_bcs(*begin, "--steps", "1", *trust).exit_code == 0
    result = edge_bcs(*begin, "--steps", "2", "--resume", *trust)
    assert result.exit_code == 0, result.output
    description = (tmp_path / "run" / "manifest.json").read_text()
    (tmp_path / "run" / "manifest.json").write_text(description.replace('"batch_size": 8', '"batch_size": 9'))
    result = edge_bcs(*begin, "--steps", "3", "--resume", *trust)
    assert result.exit_code == 1 and "its batch_size is 9, this artifact's 8" in result.output


def test_the_key_may_come_from_the_environment(
    exported: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_BCS_TRUST_KEY", str(keys / "maker.pub.pem"))
    assert "valid" in edge_bcs("inspect", exported).output
    monkeypatch.setenv("EDGE_BCS_TRUST_KEY", str(keys / "other.pub.pem"))
    assert edge_bcs("inspect", exported).exit_code == 1


def test_what_is_not_signed_says_where_the_key_came_from(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, key = write_artifact(tmp_path / "run"), keys / "maker.pub.pem"
    (tmp_path / "checkpoint").touch()
    for path in (run, tmp_path / "checkpoint"):
        evaluate: list[str | Path] = ["evaluate", path, "--data", "digits"]
        if path != run:
            pytest.importorskip("torch")
        told = edge_bcs(*evaluate, "--trust-key", key).output
        assert "leave --trust-key out" in told and "EDGE_BCS_TRUST_KEY" not in told
        monkeypatch.setenv("EDGE_BCS_TRUST_KEY", str(key))
        assert "leave --trust-key out and unset EDGE_BCS_TRUST_KEY" in edge_bcs(*evaluate).output
        monkeypatch.delenv("EDGE_BCS_TRUST_KEY")


def test_the_service_keeps_the_key(
    exported: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(keys)
    monkeypatch.setenv("EDGE_BCS_TRUST_KEY", "maker.pub.pem")
    begin: list[str | Path] = [
        "finetune",
        exported,
        "--data",
        "digits",
        "-o",
        tmp_path / "run",
        "--print-service",
    ]
    assert f"--trust-key {keys / 'maker.pub.pem'} " in edge_bcs(*begin).output
    monkeypatch.delenv("EDGE_BCS_TRUST_KEY")
    both = edge_bcs(*begin, "--trust-key", "maker.pub.pem", "--trust-key", "other.pub.pem").output
    assert f"--trust-key {keys / 'maker.pub.pem'} --trust-key {keys / 'other.pub.pem'} " in both
    assert "--trust-key" not in edge_bcs(*begin).output


def test_an_archive_replaces_an_archive_and_nothing_else(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "data.tar").write_bytes(b"something else")
    arguments = ["export", "--width", "0.05", "--no-validate", "--micro-batch", "2", "-o"]
    assert edge_bcs(*arguments, tmp_path / "data.tar").exit_code == 1
    assert (tmp_path / "data.tar").read_bytes() == b"something else"
    shutil.copy(exported, tmp_path / "data.tar")
    assert edge_bcs(*arguments, tmp_path / "data.tar").exit_code == 0
    assert Artifact.read(tmp_path / "data.tar").micro_batch == 2
