"""A checkpoint for other people's judges answers as ours does, and only what was measured is told."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import edge_bcs  # noqa: E402
from edge_bcs.bench import judges  # noqa: E402
from edge_bcs.checkpoint import save_checkpoint  # noqa: E402
from edge_bcs.core.errors import EdgeBcsError  # noqa: E402

PLAN = {"objective": "at", "attack_steps": 10, "rewire": "uniform"}


def trained(name: str, **arguments: Any) -> edge_bcs.SparseModel:
    """A network whose batch norms and biases are not those of a new one, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(1)
    sparse = edge_bcs.sparsify(edge_bcs.models.create(name, **arguments), "0.99", seed=0)
    with torch.no_grad():
        for key, tensor in sparse.network.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.75 * ("bias" not in key))
    return sparse.eval()


def checkpoint(folder: Path, sparse: edge_bcs.SparseModel, **plan: Any) -> Path:
    file = folder / "checkpoint.safetensors"
    save_checkpoint(file, sparse, metadata={"plan": json.dumps({**PLAN, **plan})})
    return file


def report(folder: Path, **said: Any) -> Path:
    file = folder / f"{len(list(folder.iterdir()))}.json"
    asked = {"clean_acc": 0.75, "samples": 1000, "data": "/home/me/cifar/test.tar.gz", "eps": 8 / 255}
    file.write_text(json.dumps({**asked, "attack": "autoattack", "adv_acc": 0.41, **said}))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "names"),
    [
        ("resnet18", "ResNet18", ["layer2.0.shortcut.1.running_mean", "layer4.1.bn2.bias", "linear.bias"]),
        ("vgg16", "VGG16", ["features.41.running_var", "features.0.weight", "classifier.4.bias"]),
    ],
)
def test_both_forms_have_the_same_logits(tmp_path: Path, name: str, kind: str, names: list[str]) -> None:
    """The written file beside the written state dict, which has nothing of edge-bcs, against our network."""
    sparse = trained(name)
    measured = report(tmp_path)
    judges.write(str(checkpoint(tmp_path, sparse)), tmp_path / "out", [measured])
    key = f"BCSP_Özdenizc2021Training_{'R18' if name == 'resnet18' else 'V16'}_CIFAR10_US_99"
    state = torch.load(tmp_path / "out" / f"{key}.pt", weights_only=True)
    assert (set(names) <= set(state) and "bn1.num_batches_tracked" in " ".join(state)) or name == "vgg16"
    assert sum(int(tensor.count_nonzero()) for tensor in state.values() if tensor.ndim > 1) == sparse.kappa
    source = tmp_path / "out" / "judged_networks.py"
    assert "edge_bcs" not in "".join(line for line in source.read_text().splitlines() if "import" in line)
    specification = importlib.util.spec_from_file_location("judged", source)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    theirs: nn.Module = getattr(module, kind)()
    theirs.load_state_dict(state, strict=True)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        ours, found = sparse.network.double()(x), theirs.double().eval()(x)
    torch.testing.assert_close(found, ours, rtol=1e-12, atol=1e-12 * float(ours.abs().max()))
    text = (tmp_path / "out" / "issue.md").read_text()
    assert "_Clean Accuracy:_ 75.00" in text and "(AA):_ 41.00" in text and "(HO-FMN):_ \n" in text
    assert "1,000 test images of test.tar.gz" in text and "/home" not in text
    claim = json.loads((tmp_path / "out" / "robustbench.json").read_text())
    assert (claim["clean_acc"], claim["autoattack_acc"], claim["eps"]) == ("75.00", "41.00", "8/255")
    judges.write(
        str(tmp_path / "checkpoint.safetensors"), tmp_path / "out", []
    )  # over its own, without figures
    assert "_Clean Accuracy:_ \n" in (tmp_path / "out" / "issue.md").read_text()


def test_the_entry_says_how_it_was_trained() -> None:
    entry = judges.taxonomy(PLAN)
    assert entry["D: Training step "] == "Adversarial Training (AT) PGD"
    assert entry["Pruning locality"] == "Global Pruning (G)"
    fast = judges.taxonomy({**PLAN, "attack_steps": 1, "training_attack": "fgsm-rs"})
    assert fast["D: Training step "].startswith("FAST AT")
    other = judges.taxonomy({"objective": "trades", "attack_steps": 10, "rewire": "by-layer"})
    assert other["D: Training step "] == "Adversarial Training (AT) TRADES"
    assert other["Pruning locality"] == "Local Pruning (L)"
    with pytest.raises(EdgeBcsError, match="no adversarial training"):
        judges.taxonomy({**PLAN, "objective": "natural"})


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for arguments in ({"width": 0.25}, {"width": 0.0625, "input_size": 16}):
        with pytest.raises(EdgeBcsError, match="it does not fit"):
            judges.renamed(trained("resnet18", **arguments))
    with pytest.raises(EdgeBcsError, match="ResNet-18 and VGG-16, not wrn28_2"):
        judges.renamed(trained("wrn28_2", width=0.25))
    sparse = trained("resnet18", width=0.0625)
    with pytest.raises(EdgeBcsError, match="it does not fit"):
        judges.write(str(checkpoint(tmp_path, sparse)), tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_figures_are_of_the_same_images_and_radius(tmp_path: Path) -> None:
    whole = judges.figures_of([report(tmp_path, attack="pgd"), report(tmp_path)])
    assert whole == {"clean": 0.75, "samples": 1000, "data": "test.tar.gz", "autoattack": 0.41}
    for said, sentence in (
        ({"samples": 8000}, "of other images"),
        ({"eps": 0.1}, "the judges ask for 8/255"),
        ({"clean_acc": None, "attack": None}, None),
    ):
        reports = [report(tmp_path), report(tmp_path, **said)]
        if sentence is not None:
            with pytest.raises(EdgeBcsError, match=sentence):
                judges.figures_of(reports)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(EdgeBcsError, match="is no report"):
        judges.figures_of([tmp_path / "other.json"])
