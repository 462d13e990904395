"""The cells of `make zoo`, on networks without torchvision or timm; and the comparison that they rest on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.networks import EveryLayer, sparse_of
from torch import nn

import edge_bcs
from edge_bcs.bench import zoo
from edge_bcs.bench.gradients import Batch, by_artifact, compare
from edge_bcs.bench.zoo_page import page


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """Left as they were: a cell sets them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@pytest.mark.parametrize("tensor", ["loss", "image", "wide.weight", "norm.bias"])
def test_a_tensor_that_is_wrong_is_named(tensor: str, tmp_path: Path) -> None:
    sparse = sparse_of(EveryLayer())
    artifact = edge_bcs.export(
        sparse,
        tmp_path / "artifact",
        objective="trades",
        input_shape=(2, 13, 13),
        memory=edge_bcs.Memory(micro_batch=3),
        validate=False,
    )
    batch = Batch.random(artifact, 5)  # in two runs, the second with an empty place
    found = by_artifact(artifact, sparse, batch, 1)
    assert compare(artifact, sparse, batch, found).worst[1] < 1e-5

    off = 1 + 3e-4
    if tensor == "loss":
        found = replace(found, loss=found.loss * off)
    elif tensor == "image":
        found = replace(found, image=found.image * np.float32(off))
    else:
        found.parameters[tensor] = found.parameters[tensor] * np.float32(off)
    assert set(compare(artifact, sparse, batch, found).excess) == {tensor}


def test_a_kink_that_rounding_crosses_is_allowed_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    sparse = edge_bcs.sparsify(module, 0.2, 0, "uniform", dense=["0"], start="new")
    with torch.no_grad():
        sparse.network.get_parameter("0.weight").fill_(1)
        sparse.network.get_parameter("0.bias").fill_(-0.5)
    memory = edge_bcs.Memory(micro_batch=2)
    artifact = edge_bcs.export(sparse, tmp_path / "artifact", "natural", (1, 3, 3), memory=memory)
    batch = Batch.random(artifact, 2)
    batch.images[:, 0, 1, 1] = 0.5  # where ReLU has its kink; float32 is on the side of float64
    above = batch.images.copy()
    above[:, 0, 1, 1] = np.nextafter(np.float32(0.5), np.float32(1))
    found = by_artifact(artifact, sparse, replace(batch, images=above, adversarial=above), 1)

    difference = compare(artifact, sparse, batch, found)
    assert max(difference.float32.values()) < 1e-6 < 1e-2 < difference.worst[1]
    assert not difference.excess
    found.parameters["3.weight"] = found.parameters["3.weight"] * np.float32(1 + 3e-4)
    assert set(compare(artifact, sparse, batch, found).excess) == {"3.weight"}


def test_a_cell_is_made_once_and_after_a_refusal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = {"resnet18": network(), "resnet50": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus())}
    monkeypatch.setattr(zoo, "created", networks.__getitem__)
    cells = [cell for cell in zoo.cells([96]) if cell.name in ("96-at-batch-3of5", "96-natural-frozen-2of4")]
    for name in networks:
        zoo.one_network(name, cells, tmp_path, 1, again=False)

    good = json.loads((tmp_path / "resnet18" / "96-at-batch-3of5.json").read_text())
    assert not good["excess"] and good["same_bits"]
    assert good["predicted_peak_bytes"] == good["measured_peak_bytes"] > 0
    bad = json.loads((tmp_path / "resnet50" / "96-at-batch-3of5.json").read_text())
    assert "Softplus" in bad["refused"]
    rows = {line.split(" | ")[0]: line for line in page(tmp_path).splitlines() if line.startswith("| resnet")}
    assert "2 of 2 | 2 of 2 | 2 of 2 | 2 of 2" in page(tmp_path)
    assert set(rows) == {"| resnet18", "| resnet50"}

    capsys.readouterr()
    for name in networks:
        zoo.one_network(name, cells, tmp_path, 1, again=False)
    said = capsys.readouterr().out
    assert "resnet18" not in said and said.count("resnet50") == 2


def test_a_time_is_that_of_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo, "created", lambda name: network())
    options = ["--networks", "resnet18", "--sizes", "96", "160", "--times", "--threads", "1", "--here"]
    monkeypatch.setattr("sys.argv", ["zoo", str(tmp_path), str(tmp_path / "page.md"), *options])
    zoo.main()
    assert {path.name for path in (tmp_path / "resnet18").iterdir()} == {"96-time.json", "160-time.json"}
    small, large = (
        json.loads((tmp_path / "resnet18" / f"{size}-time.json").read_text()) for size in (96, 160)
    )
    assert "at" not in large
    for found in (small["natural"], small["at"], large["natural"]):
        assert len(found["ours_seconds"]) == len(found["dense_seconds"]) == zoo.REPETITIONS
        assert f"({found['ratio']:.1f}×)" in page(tmp_path)


def test_what_is_aimed_at_is_met_not_met_or_not_measured(tmp_path: Path) -> None:
    found = {
        **dict.fromkeys(("command", "processor", "isa", "date"), "some"),
        "images": 16,
        "threads": 2,
        "mobilenet_v2, natural": {"ratio": 2.04},
        "mobilenet_v2, at": {"ratio": 1.94, "depthwise": {"attack.DenseConv": {"share": 0.51}}},
        "working_set": {"measured_peak_bytes": 5 << 20, "dense_pytorch_bytes": {"1": 1 << 27, "16": 1 << 28}},
    }
    (tmp_path / "aims.json").write_text(json.dumps(found))
    rows = [line.split(" | ")[-2:] for line in page(tmp_path).splitlines() if "| ≥" in line or "| ≤" in line]
    assert rows == [
        ["2.0×", "met |"],
        ["1.9×", "**not met** |"],
        ["not measured", "– |"],
        ["not measured", "– |"],
        ["51 %", "met |"],
        ["5,242,880 bytes; dense PyTorch 128 MiB on one image, 256 MiB on 16", "met |"],
    ]
