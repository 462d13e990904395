"""examples/hands.py: the whole of it, with a small network and photographs that are made here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import commands

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
SOURCE = Path(__file__).resolve().parents[1] / "examples" / "hands.py"
COLOURS = {"paper": (230, 40, 40), "rock": (40, 230, 40), "scissors": (40, 40, 230)}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hands", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Each class has a colour, and every photograph noise."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "photographs" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(random.normal(colour, 25, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photographs"


def small() -> object:
    """A network that has learnt a thousand classes, as far as its shape says."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 1, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 1000),
    ).eval()  # fmt: skip


def test_from_a_dense_network_to_names_on_photographs(
    example: ModuleType, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "pretrained", small)
    monkeypatch.setattr(example, "STAGES", ((0, 0, 10, 0.01), (1, 1, 2, 0.01)))
    options = ["--size", "16", "--host-epochs", "100", "--memory", "2MiB", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(example.main, [str(photographs), *options], catch_exceptions=False)
    assert result.exit_code == 0 and "12 photographs under test/" in result.output
    shown = Image.open(tmp_path / "out" / "predictions.png")
    assert shown.width > 800 and len(shown.convert("RGB").getcolors(1 << 20)) > 100
    # The command that it names at its end names the colours, too.
    said = commands.run("predict", tmp_path / "out" / "run-1", photographs / "test", "--top", "1")
    lines = [line for line in said.output.splitlines() if "test" in line]
    right = [name for line in lines for name in COLOURS if f"/{name}/" in line and f": {name} " in line]
    assert len(lines) == 12 and len(right) >= 10
