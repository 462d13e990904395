"""The trained state on disk: seven tensors, written so that a power cut at any moment loses at most one save.

A saved run is a complete artifact folder (graphs and manifest copied) whose state lies in two slots:

| file | what |
| --- | --- |
| `state.safetensors` | the newest state |
| `state.previous.safetensors` | the one before; used if the newest is missing or damaged |
| `state.best.safetensors` | that of the best epoch, where a training holds images out to know it |

A save writes `state.safetensors.partial`, flushes it to the medium (fsync), renames the newest slot to the
previous one, renames the partial file to the newest and flushes the folder. A cut between the two renames
leaves a complete partial file, which the reader therefore tries first: one intact state exists at every
moment. The next save ends the one that was cut before it begins, so that what was read once is never lost.
Each slot carries the sha256 of its tensors and metadata in its own safetensors header; in the
exported artifact the state has none of its own and is checked against the manifest instead.

The best state is saved as the newest first and then linked, so that it costs no bytes and no cut loses it: a
newest slot that says of itself that it is the best is linked again where a training goes on.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from edge_bcs.runtime.archive import Folder
from edge_bcs.runtime.artifact import Artifact, check_is_run_of, sha256_of
from edge_bcs.runtime.manifest import MANIFEST, STATE, compiled_files

from edge_bcs.core.digest import sha256
from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.core.files import PARTIAL_SUFFIX, cause_of, put, read_small, replacing, sync_folder
from edge_bcs.core.metadata import counters, parse_object
from edge_bcs.core.state import FORMAT, VERSION, Parts, is_state, state_fault, state_layout
from edge_bcs.core.tensor_file import TensorFile, write_tensors
from edge_bcs.data.classes import check_names, may_become, shown

PREVIOUS = "state.previous.safetensors"
BEST = "state.best.safetensors"
PARTIAL = STATE + PARTIAL_SUFFIX
_HEADER_BYTES = 1 << 10
Arrays = Mapping[str, np.ndarray[Any, Any]]


def layout_of(artifact: Artifact) -> dict[str, tuple[str, int]]:
    """Name → (element type, length) of the tensors of an artifact's state, in order."""
    trained = artifact.trained.kappa, artifact.trained.dense_size
    return state_layout(artifact.kappa, artifact.dense_size, artifact.statistics_size, trained)


@dataclass(frozen=True)
class Slot:
    """An intact state, and where it lies.

    Attributes:
        name: of its file. sha256: of its tensors and metadata; of the file, in an exported artifact.
        tensors, metadata: see `read_state`.
    """

    name: str
    sha256: str
    tensors: dict[str, np.ndarray[Any, Any]]
    metadata: dict[str, str]


def read_state(
    artifact: Artifact, into: Arrays | None = None
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Return (tensors, metadata) of `read_slot`."""
    slot = read_slot(artifact, into)
    return slot.tensors, slot.metadata


def read_slot(artifact: Artifact, into: Arrays | None = None) -> Slot:
    """Return the newest intact slot, read into the arrays ``into`` if they are given.

    Metadata has at least "step" and "seed". A slot that cannot be read, is torn or altered, or breaks an
    invariant (wrong length, index not strictly ascending in [0, N), a value that is 0 or not finite, a
    negative variance) is passed over; where that costs a save, an EdgeBcsWarning says which slot it was and
    from which step the run goes on. Raises EdgeBcsError if none is intact; ``into`` then holds anything.
    """
    layout = layout_of(artifact)
    sealed = STATE in artifact.manifest["files"]
    slots = [STATE] if sealed else [PARTIAL, STATE, PREVIOUS]
    faults: dict[str, str] = {}
    for slot in slots:
        try:
            if artifact.files.size(slot) is None:
                continue
            tensors, metadata, sha256 = _read_slot(artifact.files.open(slot), layout, sealed, into)
            fault = state_fault(tensors, parts_of(artifact))
        except OSError as error:  # a sector that cannot be read, a network folder that is gone, no permission
            faults[slot] = f"{slot} cannot be read: {error.strerror or error}"
            continue
        except (EdgeBcsError, ValueError) as error:
            faults[slot] = f"{slot}: {error}"
            continue
        if fault is None:
            if slot == PREVIOUS:  # a partial file that is torn is a save that never ended, and no loss
                _tell_of_fault(artifact, faults.get(STATE, f"{STATE} is missing"), int(metadata["step"]))
            return Slot(slot, sha256 or artifact.manifest["files"][STATE]["sha256"], tensors, metadata)
        faults[slot] = f"{slot}: {fault}"
    detail = f" ({'; '.join(faults.values())})" if faults else ""
    raise EdgeBcsError(f"{artifact.path} holds no intact state{detail}; copy the folder again or start anew.")


def keep_best(folder: str | Path) -> int:
    """Keep what the newest slot of a run holds as its best state, too; return the bytes that were written.

    A link, for slots are replaced and never written to; a copy where the file system has no links. Raises
    EdgeBcsError if it cannot be done; the best state before is then kept.
    """
    folder = Path(folder)
    newest, best = folder / STATE, folder / BEST
    partial = best.with_name(BEST + PARTIAL_SUFFIX)
    try:
        partial.unlink(missing_ok=True)
        try:
            os.link(newest, partial)
            os.replace(partial, best)
            size = 0
        except OSError:
            with newest.open("rb") as stream, replacing(best) as copy:
                shutil.copyfileobj(stream, copy)
                size = copy.tell()
        sync_folder(folder)
    except OSError as error:
        raise EdgeBcsError(f"the best state could not be kept in {folder}: {cause_of(error)}.") from None
    return size


def read_best(folder: str | Path, artifact: Artifact, step: int, into: Arrays) -> None:
    """Read the best state of a run into the arrays ``into``; EdgeBcsError if it is not there, not intact or
    not of this step. They then hold anything."""
    layout, files = layout_of(artifact), Folder(Path(folder))
    try:
        if files.size(BEST) is None:
            raise EdgeBcsError("it is missing")
        tensors, metadata, _ = _read_slot(files.open(BEST), layout, False, into)
        fault = state_fault(tensors, parts_of(artifact))
    except OSError as error:
        raise EdgeBcsError(f"it cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise EdgeBcsError(str(error)) from None
    if fault is None and int(metadata["step"]) != step:
        fault = f"it is of step {metadata['step']}, not {step}"
    if fault is not None:
        raise EdgeBcsError(fault)


def _tell_of_fault(artifact: Artifact, why: str, step: int) -> None:
    warnings.warn(
        f"the newest save of {artifact.path} cannot be used ({why}); the one before it is used, of step "
        f"{step}.",
        EdgeBcsWarning,
        stacklevel=1,  # told once, wherever the state is read from
    )


def _read_slot(
    file: io.RawIOBase, layout: dict[str, tuple[str, int]], sealed: bool, into: Arrays | None
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str], str]:
    """(tensors, metadata, sha256) of one slot whose checksum is right, "" if it has none of its own; else
    OSError, ValueError or EdgeBcsError."""
    with TensorFile(file) as stored:
        metadata = _metadata_of(stored, layout)
        tensors = {name: stored.read(name, None if into is None else into[name]) for name in layout}
    stated = "" if sealed else metadata.pop("sha256", "")
    if not sealed and stated != _digest(tensors.items(), metadata):
        raise EdgeBcsError("its checksum does not match (torn or altered)")
    return tensors, metadata, stated


def _metadata_of(stored: TensorFile, layout: dict[str, tuple[str, int]]) -> dict[str, str]:
    """Metadata of a file whose header is that of such a state; else ValueError or EdgeBcsError."""
    metadata = stored.metadata
    if not is_state(metadata):
        raise EdgeBcsError(f"it is not an {FORMAT} of version {VERSION}")
    differing = stored.tensors.keys() ^ layout.keys()
    if differing:
        raise EdgeBcsError(f"its tensors differ from the network's in {sorted(differing)[:4]}")
    for name, (dtype, length) in layout.items():
        found = stored.tensors[name]
        if (found.dtype, found.shape) != (np.dtype(dtype), (length,)):
            raise EdgeBcsError(f"{name} is {found} instead of {dtype}[{length}]")
    counters(metadata)
    return metadata


def parts_of(artifact: Artifact) -> Parts:
    """Which part of the network each number of a state belongs to."""

    def table(name: str) -> list[tuple[str, int]]:
        return [(str(entry.get("name", name)), entry["offset"]) for entry in artifact.manifest[name]]

    kernels = [(f"{layer.name}.weight".removeprefix("."), layer.offset) for layer in artifact.layers]
    trained = None if artifact.trained.part.everything else artifact.trained
    return Parts(artifact.size, kernels, table("dense"), table("statistics"), trained)


def _digest(tensors: Any, metadata: Mapping[str, str]) -> str:
    digest = sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name, array in tensors:
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def state_bytes(artifact: Artifact) -> int:
    """About how many bytes a saved state has."""
    layout = layout_of(artifact).values()
    return sum(length * np.dtype(dtype).itemsize for dtype, length in layout) + _HEADER_BYTES


def write_run(
    folder: str | Path,
    artifact: Artifact,
    tensors: Arrays,
    metadata: Mapping[str, str],
    classes: Sequence[str] | None = None,
    attack_precision: str | None = None,
) -> int:
    """Save a state into the run folder, creating it as a copy of ``artifact`` the first time.

    Returns the bytes of the state. ``metadata`` needs "step" and "seed". ``classes`` are the names that the
    network got since it was exported, ``attack_precision`` that of its attacks ("f32" or "half"); the run's
    manifest keeps them, the artifact stays as it is. Atomic and
    durable as the module says. Raises EdgeBcsError if the folder belongs to something else, if the medium is
    full or read-only, or if ``tensors`` are no state that could be read again (a number that is not finite);
    the earlier saves are then kept.
    """
    folder = Path(folder)
    fault = state_fault({name: tensors[name] for name in layout_of(artifact)}, parts_of(artifact))
    if fault is not None:
        raise EdgeBcsError(f"the state was not saved to {folder}: {fault}; earlier saves are kept.")
    try:
        if not is_run_of(folder, artifact):
            _create_run(folder, artifact, classes, attack_precision)
        else:
            _end_save(folder, artifact)
            if classes is not None:
                _name_classes(folder, classes)
            _say_precision(folder, attack_precision)
        return _write_slot(folder, {name: tensors[name] for name in layout_of(artifact)}, metadata)
    except OSError as error:
        raise EdgeBcsError(
            f"the state could not be saved to {folder}: {cause_of(error)}; earlier saves are kept."
        ) from None


def is_run_of(folder: str | Path, artifact: Artifact) -> bool:
    """True if ``folder`` is a run of this artifact; False if it is new, or nothing in it is in the way of
    one; EdgeBcsError if it is anything else."""
    folder = Path(folder)
    try:
        if (folder / MANIFEST).exists():
            check_is_run_of(folder, artifact)
            return True
        if folder.exists() and not folder.is_dir():
            raise EdgeBcsError(f"{folder} is a file; choose a folder for the run.")
        compiled = compiled_files(artifact.manifest)
        for name in (*compiled, STATE, PREVIOUS):
            # Graphs of this artifact are there if a power cut interrupted the making of the run.
            if (folder / name).exists() and not (name in compiled and _is_copy(folder / name, artifact)):
                raise EdgeBcsError(
                    f"{folder} holds no run, but a {name} that the run would replace; choose another folder "
                    "for the run."
                )
    except OSError as error:
        raise EdgeBcsError(f"{folder} cannot be read: {cause_of(error)}.") from None
    return False


def _is_copy(file: Path, artifact: Artifact) -> bool:
    entry = artifact.manifest["files"][file.name]
    return file.is_file() and file.stat().st_size == entry["bytes"] and sha256_of(file) == entry["sha256"]


def _create_run(
    folder: Path, artifact: Artifact, classes: Sequence[str] | None, attack_precision: str | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compiled = compiled_files(artifact.manifest)
    for name in compiled:
        with replacing(folder / name) as stream:
            stream.write(artifact.read_file(name))
    files = {name: artifact.manifest["files"][name] for name in compiled}
    manifest = {**artifact.manifest, "files": files}
    if classes is not None:
        manifest["classes"] = list(classes)
    _write_manifest(folder, _with_precision(manifest, attack_precision))
    sync_folder(folder.parent)


def _with_precision(manifest: dict[str, Any], precision: str | None) -> dict[str, Any]:
    """The manifest of a run whose attacks are in ``precision``; as it is where they have but one."""
    if precision is None or "attack_precision" not in manifest:
        return manifest
    return {**manifest, "attack_precision": precision}


def _say_precision(folder: Path, precision: str | None) -> None:
    """Note in a run what its attacks are from now on."""
    manifest = parse_object(read_small(folder / MANIFEST))
    changed = _with_precision(manifest, precision)
    if changed != manifest:
        _write_manifest(folder, changed)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    with replacing(folder / MANIFEST) as stream:
        stream.write(json.dumps(manifest, indent=1).encode())
    sync_folder(folder)


def _name_classes(folder: Path, classes: Sequence[str]) -> None:
    """Give the outputs of a run names that they had not when it was made; those they had stay."""
    manifest = parse_object(read_small(folder / MANIFEST))
    stored = manifest.get("classes")
    if stored == list(classes):
        return
    if stored is not None and not may_become(check_names(stored, f"the classes of {folder}"), tuple(classes)):
        raise EdgeBcsError(
            f"{folder} holds a run with other classes: it has {shown(stored)}; this one has "
            f"{shown(classes)}. Choose another folder for the run."
        )
    _write_manifest(folder, {**manifest, "classes": list(classes)})


def _end_save(folder: Path, artifact: Artifact) -> None:
    """Rename what a save had written whole when it was cut: it would be overwritten, and is the newest."""
    partial = folder / PARTIAL
    if not partial.exists():
        return
    layout = layout_of(artifact)
    try:
        with partial.open("rb", buffering=0) as file, TensorFile(file) as stored:
            metadata = _metadata_of(stored, layout)
            stated = metadata.pop("sha256", "")
            # One tensor after the other: a board has little memory.
            whole = stated == _digest(((name, stored.read(name)) for name in layout), metadata)
    except (EdgeBcsError, ValueError):
        whole = False
    if whole:  # else that save never ended
        put(partial, folder / STATE, folder / PREVIOUS)


def _write_slot(folder: Path, tensors: Arrays, metadata: Mapping[str, str]) -> int:
    stated = {"format": FORMAT, "version": VERSION, **metadata}
    stated["sha256"] = _digest(tensors.items(), stated)
    with replacing(folder / STATE, previous=folder / PREVIOUS) as stream:
        size = write_tensors(stream, tensors, stated)
    sync_folder(folder)
    return size
