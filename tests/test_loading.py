"""Checkpoints: what they hold, that they come back, that damage is told from health."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from torch import Tensor, nn

import edge_bcs
from edge_bcs import checkpoint, models
from edge_bcs.core.errors import EdgeBcsError


class Own(nn.Module):
    """A user's module."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, hidden, 3)
        self.bn = nn.BatchNorm2d(hidden)
        self.head = nn.Linear(hidden * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.bn(self.conv(x)).relu().flatten(1))
        return out


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, edge_bcs.SparseModel]:
    sparse = edge_bcs.sparsify(models.resnet18(width=0.05, num_classes=4), 0.9, 11, "erk")
    for _ in range(3):
        sparse(torch.rand(4, 3, 8, 8))  # moves the running statistics
    sparse.momentum += 0.25
    sparse.dense_momentum -= 0.5
    sparse.step = 17
    checkpoint.save_checkpoint(tmp_path / "net.safetensors", sparse, metadata={"objective": "trades"})
    return tmp_path / "net.safetensors", sparse


def test_round_trip(saved: tuple[Path, edge_bcs.SparseModel]) -> None:
    path, sparse = saved
    loaded = edge_bcs.load(path)
    x = torch.rand(2, 3, 8, 8)
    assert not loaded.training
    assert torch.equal(loaded(x), sparse.eval()(x))
    for name, buffer in sparse.state().items():
        assert np.array_equal(loaded.state()[name], buffer), name
    assert (loaded.seed, loaded.step, loaded.sparsity, loaded.distribution) == (11, 17, "0.9", "erk")
    assert loaded.record == {
        "name": "resnet18",
        "arguments": {"num_classes": 4, "width": 0.05, "input_channels": 3, "input_size": 32},
    }


def test_file_holds_exactly_the_seven_buffers(saved: tuple[Path, edge_bcs.SparseModel]) -> None:
    path, sparse = saved
    tensors = load_file(path)
    assert {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()} == {
        "coo.value": ("float32", (sparse.kappa,)),
        "coo.index": ("int32", (sparse.kappa,)),
        "coo.momentum": ("float32", (sparse.kappa,)),
        "dense.value": ("float32", tensors["dense.momentum"].shape),
        "dense.momentum": ("float32", tensors["dense.value"].shape),
        "batchnorm.mean": ("float32", tensors["batchnorm.variance"].shape),
        "batchnorm.variance": ("float32", tensors["batchnorm.mean"].shape),
    }
    # The kernels of the file, put back by hand, are those of the network.
    dense = np.zeros(sparse.size, np.float32)
    dense[tensors["coo.index"]] = tensors["coo.value"]
    stem = sparse.network.conv1.weight.detach().numpy()
    assert np.array_equal(dense[: stem.size], stem.ravel())
    read = checkpoint.read_checkpoint(path)
    assert (read.step, read.seed, read.metadata["objective"]) == (17, 11, "trades")
    assert read.metadata["format"] == "edge-bcs-state" and read.metadata["version"] == "1"


def test_a_users_own_module(tmp_path: Path) -> None:
    sparse = edge_bcs.sparsify(Own(), 0.8, 1)
    path = tmp_path / "own.safetensors"
    checkpoint.save_checkpoint(path, sparse)
    x = torch.rand(2, 1, 4, 4)
    fresh = Own()
    before = fresh.conv.weight.clone()
    assert torch.equal(edge_bcs.load(path, model=fresh)(x), sparse.eval()(x))
    assert torch.equal(fresh.conv.weight, before)
    with pytest.raises(EdgeBcsError, match=r"'Own', which is not one of edge-bcs"):
        edge_bcs.load(path)
    with pytest.raises(EdgeBcsError, match=r"another network: it has 2 kernels \(conv \[6, 1, 3, 3\]\)"):
        edge_bcs.load(path, model=Own(hidden=7))


def test_damaged_files(saved: tuple[Path, edge_bcs.SparseModel], tmp_path: Path) -> None:
    path, _ = saved
    content = path.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for length in (0, 5, 100, len(content) - 1):
        bad.write_bytes(content[:length])
        with pytest.raises(EdgeBcsError, match="truncated or not a safetensors file"):
            edge_bcs.load(bad)
    bad.write_bytes(b"not at all a checkpoint" * 50)
    with pytest.raises(EdgeBcsError, match="truncated or not a safetensors file"):
        edge_bcs.load(bad)
    save_file({"a": np.zeros(3, np.float32)}, bad)
    with pytest.raises(EdgeBcsError, match="not a state of edge-bcs"):
        edge_bcs.load(bad)
    with pytest.raises(EdgeBcsError, match="no file or folder"):
        edge_bcs.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EdgeBcsError, match="neither an artifact"):
        edge_bcs.load(tmp_path / "empty")


def test_files_of_others_are_named(saved: tuple[Path, edge_bcs.SparseModel], tmp_path: Path) -> None:
    """Healthy files of torch are not called truncated, and nothing in them is loaded."""
    network, file = Own(), tmp_path / "dense.pt"

    def refused(kind: str) -> str:
        with pytest.raises(EdgeBcsError, match=rf"dense\.pt is {kind}.*not a state of edge-bcs") as caught:
            edge_bcs.load(file)
        assert "truncated or" not in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    torch.save(network.state_dict(), file)
    assert "load this into its module with torch" in refused(r"a file of torch\.save")
    assert 'edge_bcs.sparsify(module, start="new")' in refused(r"a file of torch\.save")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused("a truncated zip archive, such as torch.save writes")
    torch.save(network, file)
    refused(r"a file of torch\.save")
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=False)
    refused(r"a pickle of torch\.save in its old format")
    torch.jit.trace(network, torch.rand(1, 1, 4, 4)).save(str(file))
    refused("a TorchScript module")
    with file.open("wb") as stream:
        np.savez(stream, a=np.zeros(3))
    refused("a zip archive")
    file.write_bytes(b"\x80\x04N.")
    refused("a pickle")
    for dtype, kind in ((torch.float32, "F32"), (torch.bfloat16, "BF16")):
        save_torch_file({"conv.weight": torch.zeros(6, 1, 3, 3, dtype=dtype)}, file, {"format": "pt"})
        told = refused("a safetensors file")
        assert f"1 arrays, the first one 'conv.weight' {kind}[6, 1, 3, 3]" in told


def test_altered_contents(saved: tuple[Path, edge_bcs.SparseModel], tmp_path: Path) -> None:
    path, _ = saved
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    bad = tmp_path / "bad.safetensors"

    def altered(**changed: np.ndarray) -> Path:
        save_file(
            {**load_file(path), **{name.replace("_", "."): array for name, array in changed.items()}},
            bad,
            metadata,
        )
        return bad

    tensors = load_file(path)
    outside = tensors["coo.index"].copy()
    outside[-1] = 2**30
    with pytest.raises(EdgeBcsError, match="strictly ascending"):
        edge_bcs.load(altered(coo_index=outside))
    with pytest.raises(EdgeBcsError, match="finite and not zero"):
        edge_bcs.load(altered(coo_value=np.full_like(tensors["coo.value"], np.nan)))
    with pytest.raises(EdgeBcsError, match="beside its 21 kernels it has 5 parameters"):
        edge_bcs.load(altered(dense_value=tensors["dense.value"][:5]))
    with pytest.raises(EdgeBcsError, match=r"batchnorm\.mean must hold"):
        edge_bcs.load(altered(batchnorm_mean=np.full_like(tensors["batchnorm.mean"], np.inf)))
    metadata["version"] = "2"
    with pytest.raises(EdgeBcsError, match="format version 2"):
        edge_bcs.load(altered())


def test_a_failed_save_keeps_the_old_file(saved: tuple[Path, edge_bcs.SparseModel]) -> None:
    path, sparse = saved
    content = path.read_bytes()
    path.with_name(path.name + ".partial").mkdir()  # makes the write impossible, whoever runs the test
    with pytest.raises(EdgeBcsError, match="cannot be written"):
        checkpoint.save_checkpoint(path, sparse)
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO by the kernel, and by `stat`: the cause is said, and that the file is not a wrong one."""
    unreadable = Path("/proc/self/mem")
    if not unreadable.exists():
        pytest.skip("there is no file that gives EIO")
    (tmp_path / "x.safetensors").symlink_to(unreadable)
    message = r"x\.safetensors cannot be read: Input/output error"
    with pytest.raises(EdgeBcsError, match=message):
        checkpoint.read_checkpoint(tmp_path / "x.safetensors")

    def failing(self: Path) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    monkeypatch.setattr(Path, "is_file", failing)
    with pytest.raises(EdgeBcsError, match=message):
        checkpoint.read_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("weights", "coo.value of conv1.weight"),
        ("momentum", "coo.momentum of conv1.weight"),
        ("dense_value", "dense.value of bn1.weight"),
        ("dense_momentum", "dense.momentum of bn1.weight"),
        ("running_var", "batchnorm.variance of bn1"),
    ],
)
def test_a_state_that_is_not_finite_is_not_saved(
    saved: tuple[Path, edge_bcs.SparseModel], tensor: str, where: str, value: float
) -> None:
    path, sparse = saved
    content = path.read_bytes()
    with torch.no_grad():
        if tensor == "running_var":
            sparse.network.bn1.running_var[0] = value
        else:
            array = getattr(sparse, tensor)
            array[sparse.index[0] if tensor == "weights" else 0] = value
    for _ in range(2):
        with pytest.raises(EdgeBcsError, match=f"({where}) holds {value:g}, which is not finite.* is kept"):
            checkpoint.save_checkpoint(path, sparse)
    assert path.read_bytes() == content
    with pytest.raises(EdgeBcsError, match=f"cannot be exported: ({where}) holds {value:g}"):
        edge_bcs.export(sparse, path.parent / "artifact", objective="natural", input_shape=(3, 32, 32))
    assert not (path.parent / "artifact").exists()


def test_what_an_update_remembers_is_checked_too(saved: tuple[Path, edge_bcs.SparseModel]) -> None:
    path, sparse = saved
    content = path.read_bytes()
    with pytest.raises(EdgeBcsError, match=r"admm\.dual holds a number that is not finite.* is kept"):
        checkpoint.save_checkpoint(path, sparse, more={"admm.dual": np.array([1, np.nan], np.float32)})
    assert path.read_bytes() == content
