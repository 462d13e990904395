"""Reading an artifact folder, and refusing one that is damaged.

An artifact is a folder with `manifest.json`, five ONNX graphs and `state.safetensors`, or that folder in one
file (see runtime/archive.py). A saved run has the same form (see runtime/state.py), so everything that reads
an artifact reads a run. Nothing here executes what it reads: JSON, safetensors and sha256 only, no pickle.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from edge_bcs.runtime import archive
from edge_bcs.runtime.archive import LARGEST_MANIFEST, LARGEST_SIGNATURE, SIGNATURE, Archive, Folder
from edge_bcs.runtime.differences import difference
from edge_bcs.runtime.manifest import (
    MANIFEST,
    STATE,
    Described,
    compiled_files,
    describe,
    graph_file,
    listed_files,
    parse_manifest,
)

from edge_bcs.core.digest import of_stream, sha256
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import reading

_CHECKPOINT = "checkpoint.safetensors"  # of a training on the host
REPLACED = "replaced"
"""Where an export moves what it replaces, in a folder .NAME.… beside it, if folders cannot be exchanged."""


@dataclass(frozen=True)
class Artifact(Described):
    """A verified artifact (or saved run): what its manifest says (see `Described`), and where it lies.

    Attributes:
        path: the folder or the archive. files: what is in it.
        signature: "none", "unchecked" (there is one, and no trusted key was given) or "valid".
    """

    path: Path
    files: Folder | Archive = field(repr=False, compare=False)
    signature: str = "none"

    def graph(self, graph: str) -> Path:
        """Path of one of GRAPHS, where the artifact is a folder."""
        return self.path / graph_file(graph)

    def read_graph(self, graph: str) -> bytes:
        """The file of one of GRAPHS; EdgeBcsError if it cannot be read or is not what was verified."""
        return self.read_file(graph_file(graph))

    def read_file(self, name: str) -> bytes:
        """A file that the manifest lists; EdgeBcsError if it cannot be read or is not what was verified."""
        entry = self.manifest["files"][name]
        with reading(self.path / name), self.files.open(name) as stream:
            content = io.BufferedReader(stream).read(entry["bytes"] + 1)
        if sha256(content).hexdigest() != entry["sha256"]:
            raise EdgeBcsError(
                f"{self.path / name} was altered while it was in use; copy the artifact again."
            )
        return content

    @classmethod
    def read(
        cls, path: str | Path, trust_keys: Sequence[str | Path] = (), min_release: int | None = None
    ) -> Artifact:
        """Read and verify the folder or archive ``path``: every field of the manifest, sha256 and size of
        every file, and, if there are ``trust_keys`` (PEM files of Ed25519 public keys), that one of them
        signed the manifest, and that it is of release ``min_release`` or a later one.

        The state is verified where it is read (runtime/state.py). Raises EdgeBcsError with one sentence for a
        missing folder, a damaged manifest, a missing, truncated or altered file, a newer format, a missing
        or wrong signature, or an older release.
        """
        if min_release is not None and not trust_keys:
            raise EdgeBcsError(
                "--min-release needs --trust-key: anybody can change a number that is not signed."
            )
        path = Path(path)
        files, content = open_files(path)
        signature = _check_signature(files, content, trust_keys)
        manifest = parse_manifest(path, content)
        artifact = cls(**vars(describe(manifest)), path=files.path, files=files, signature=signature)
        verify_files(files, manifest)
        if trust_keys and STATE not in manifest["files"]:
            raise EdgeBcsError(f"the signed manifest of {path} does not list {STATE}.")
        if min_release is not None and (artifact.release or 0) < min_release:
            raise EdgeBcsError(
                f"{path} is {artifact.release_text}, and release {min_release} or a later one is required."
            )
        return artifact


def open_files(path: Path) -> tuple[Folder | Archive, bytes]:
    """Return the files of the folder or archive ``path`` and its manifest, none of it verified; EdgeBcsError
    if it is no artifact."""
    with reading(path):
        archived = archive.is_archive(path)
    files = Archive(path) if archived else _folder(path)
    with reading(path / MANIFEST):
        return files, files.read_small(MANIFEST, LARGEST_MANIFEST)


def _check_signature(files: Folder | Archive, content: bytes, trust_keys: Sequence[str | Path]) -> str:
    """Return Artifact.signature; EdgeBcsError if keys are trusted and none of them signed ``content``."""
    shown = files.path
    signature = b""
    with reading(shown / SIGNATURE):
        there = files.size(SIGNATURE) is not None
        if not trust_keys:
            return "unchecked" if there else "none"
        if there:
            signature = files.read_small(SIGNATURE, LARGEST_SIGNATURE)
    from edge_bcs.runtime.signature import how_to_trust_none, verify

    signed = verify(content, signature, trust_keys)  # a key that cannot be used is the first thing to say
    if not signature:
        raise EdgeBcsError(
            f"{shown} is not signed, and a trusted key was given: export it with --sign-key. (Runs of "
            f"`edge-bcs finetune` are never signed; for one that was made here {how_to_trust_none()}.)"
        )
    if not signed:
        raise EdgeBcsError(
            f"{shown} was altered or signed with another key: the signature of its manifest is not that of "
            f"{' or '.join(map(str, trust_keys))}."
        )
    return "valid"


def _folder(folder: Path) -> Folder:
    """The folder of an artifact, which has a manifest."""
    with reading(folder):
        if not folder.is_dir():
            left = next(folder.parent.glob(f".{escape(folder.name)}.*/{REPLACED}"), None)
            if left is not None and not folder.exists():
                raise EdgeBcsError(
                    f"the artifact {folder} does not exist: its export was killed, and what it was to "
                    f"replace is {left}; move that back, or export again."
                )
            raise EdgeBcsError(_instead(folder))
    with reading(folder / MANIFEST):
        if not (folder / MANIFEST).is_file():
            raise EdgeBcsError(_instead(folder))
    return Folder(folder)


def _instead(path: Path) -> str:
    """What ``path`` is, which is not an artifact, and what to do."""
    quoted = shlex.quote(str(path))
    if not path.exists():
        return f"the artifact {path} does not exist; create one with `edge-bcs export -o {quoted}`."
    if (path / _CHECKPOINT).is_file() or path.suffix == Path(_CHECKPOINT).suffix:
        kind = "holds a checkpoint of `edge-bcs train`" if path.is_dir() else "is a checkpoint"
        return f"{path} {kind}, not an artifact: compile it with `edge-bcs export --checkpoint {quoted}`."
    if path.is_dir():
        return f"{path} holds no {MANIFEST}, so it is not an edge-bcs artifact."
    if (path.parent / MANIFEST).is_file():
        return f"{path} is a file of an artifact: give the folder, {path.parent}."
    return f"{path} is a file, and an artifact is a folder or a .tar, such as `edge-bcs export` makes."


def check_is_run_of(run: str | Path, artifact: Artifact) -> None:
    """Raise EdgeBcsError, with a sentence that says what differs, unless the folder ``run`` holds a run of
    ``artifact``: its graphs and settings, with a state that training wrote.

    Manifests are compared, whole but for which version wrote them and for names that outputs got in one of
    them alone; that the files are those of the manifest is verified where they are read.
    """
    folder = Path(run)
    with reading(folder / MANIFEST):
        content = _folder(folder).read_small(MANIFEST, LARGEST_MANIFEST)
    manifest = parse_manifest(folder, content)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise EdgeBcsError(f"{folder / MANIFEST} lists no files; choose another output folder.")
    if STATE in files:
        raise EdgeBcsError(
            f"{folder} is an exported artifact, which stays as it is; choose another output folder."
        )
    compiled = {name: artifact.manifest["files"].get(name) for name in compiled_files(artifact.manifest)}
    try:
        found = difference(manifest, {**artifact.manifest, "files": compiled})
    except RecursionError:
        raise EdgeBcsError(f"{folder / MANIFEST} is nested too deeply.") from None
    if found:
        raise EdgeBcsError(
            f"{folder} holds a run of another artifact: {found}; choose another output folder."
        )


def sha256_of(file: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces of 1 MiB; EdgeBcsError if it cannot be read."""
    with reading(file), file.open("rb") as stream:
        return of_stream(stream)


def verify_files(files: Folder | Archive, manifest: dict[str, Any], only: str | None = None) -> None:
    """Raise EdgeBcsError unless the files that a manifest lists, or ``only`` one, are as it says."""
    for name, size, digest in listed_files(manifest):
        if only not in (None, name):
            continue
        file = files.path / name
        with reading(file):
            found = files.size(name)
        if found is None:
            raise EdgeBcsError(f"{files.path} lacks {name}; copy or export the artifact again.")
        if found != size:
            cause = "truncated" if found < size else "altered"
            raise EdgeBcsError(
                f"{file} is {cause}: {found} bytes instead of {size}; copy the artifact again."
            )
        with reading(file), files.open(name) as stream:
            same = of_stream(stream) == digest
        if not same:
            raise EdgeBcsError(
                f"{file} was altered: its sha256 is not the manifest's; copy the artifact again."
            )
