"""A checkpoint as other people's judges take it: AdversarialPruningBenchmark and RobustBench.

    python -m edge_bcs.bench.judges runs/vgg16 --report aa.json -o out/judges
    python -m edge_bcs.bench.judges NAME_OF_THE_ZOO -o out/judges

What is written into the folder:

| file | what |
| --- | --- |
| `KEY.pt` | a state dict that AdversarialPruningBenchmark's base_resnet18 or base_vgg16 loads strictly |
| `judged_networks.py` | both networks by these names, for a judge that has none of the kind |
| `issue.md` | what AdversarialPruningBenchmark's issue "New AP method" asks for |
| `taxonomy.json` | the entry of its taxonomy |
| `robustbench.json` | the claim that RobustBench asks for |

KEY is the model key there. RobustBench's ResNet-18 has the names of base_resnet18, too.

Before anything is written, the logits of both forms are compared in float64. Figures come from a card of the
zoo or from reports of `edge-bcs evaluate --json`; what nobody has measured stays empty. Both judges measure
on the 10,000 test images of CIFAR-10 as it was published: figures of other images, such as JPEG copies, are
ours alone.

How the networks differ from ours: names, and how the last map is pooled, which is the same for 32×32 pixels.
Wider or narrower networks and other images do not fit, and are refused.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import edge_bcs
from edge_bcs import zoo
from edge_bcs.bench import judged_networks
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically, write_json
from edge_bcs.core.metadata import parse_object
from edge_bcs.core.objectives import PSEUDO_LABELLED
from edge_bcs.core.outputs import check_outputs, json_with
from edge_bcs.method.sparse_model import SparseModel

AP_KEY = "BCSP_Özdenizc2021Training"
PAPER = "https://proceedings.mlr.press/v139/ozdenizci21a/ozdenizci21a.pdf"
TITLE = "Training Adversarially Robust Sparse Networks via Bayesian Connectivity Sampling"
SHAPE = (3, 32, 32)
AGREEMENT = 1e-9
"""How far logits of both forms may differ, of the largest of them, in float64."""
_KINDS = {
    "resnet18": ("R18", "ResNet-18", judged_networks.ResNet18),
    "vgg16": ("V16", "VGG-16", judged_networks.VGG16),
}
_TRAININGS = {"at": "PGD", "trades": "TRADES", "mart": "MART", "rst": "RST"}
_SINGLE_STEP = {
    "fgsm-rs": "FAST AT https://arxiv.org/pdf/2001.03994.pdf",
    "n-fgsm": "N-FGSM https://arxiv.org/pdf/2202.01181.pdf",
}
_RESNET = (
    (r"stage(\d)\.", r"layer\1."),
    (r"classifier\.", "linear."),
)
_FILES = ("judged_networks.py", "issue.md", "taxonomy.json", "robustbench.json")


def renamed(sparse: SparseModel) -> dict[str, Tensor]:
    """Return the state dict of a network by the judges' names, dense, with its zeros.

    Raises:
        EdgeBcsError: neither ResNet-18 nor VGG-16 at full width, images other than 3×32×32, or a network that
            normalises pixels itself, for which the judges' networks have no layer.
    """
    name, arguments = str(sparse.record["name"]), sparse.record.get("arguments", {})
    if sparse.own or name not in _KINDS:
        raise EdgeBcsError(f"the judges have ResNet-18 and VGG-16, not {name[:60]}.")
    if arguments.get("width", 1.0) != 1.0 or sparse.input_shape != SHAPE:
        shape = "×".join(map(str, sparse.input_shape or ()))
        raise EdgeBcsError(
            f"the judges' {name} has width 1 and takes images of 3×32×32, this one has width "
            f"{arguments.get('width', 1.0):g} and takes {shape}: it does not fit."
        )
    if sparse.normalize is not None:
        raise EdgeBcsError("the judges' networks take pixels as they are, and this one normalises them.")
    names = _RESNET if name == "resnet18" else ()
    found = {}
    for key, tensor in sparse.network.state_dict().items():
        for pattern, instead in names:
            key = re.sub(f"^{pattern}", instead, key)
        found[key] = tensor.detach().clone()
    return found


def judged(sparse: SparseModel) -> nn.Module:
    """Return the network in the judges' form, once its logits are those of ours.

    Raises:
        EdgeBcsError: it does not fit.
    """
    state = renamed(sparse)
    last = [tensor for name, tensor in state.items() if name.endswith("bias")][-1]
    network = _KINDS[str(sparse.record["name"])][2](len(last))
    network.load_state_dict(state, strict=True)
    network.eval()
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ours = copy.deepcopy(sparse.network).double().eval()(images)
        theirs = copy.deepcopy(network).double()(images)
    far = float((ours - theirs).abs().max() / ours.abs().max())
    if not far <= AGREEMENT:
        raise EdgeBcsError(f"the logits of both forms differ by {far:.1e}; nothing was written.")
    return network


def model_key(sparse: SparseModel) -> str:
    """Return AdversarialPruningBenchmark's key of a model for CIFAR-10."""
    kind = _KINDS[str(sparse.record["name"])][0]
    return f"{AP_KEY}_{kind}_CIFAR10_US_{100 * float(sparse.sparsity):g}"


def taxonomy(plan: dict[str, Any]) -> dict[str, str]:
    """Return the entry of AdversarialPruningBenchmark's taxonomy, with the training of this checkpoint."""
    training = _TRAININGS.get(str(plan.get("objective")))
    if training is None:
        raise EdgeBcsError(
            f"it was trained with the objective {plan.get('objective')}, which is no adversarial training."
        )
    training = f"Adversarial Training (AT) {training}"
    if plan.get("attack_steps") == 1:
        training = _SINGLE_STEP.get(str(plan.get("training_attack")), "FGSM from a random start")
    return {
        "link_to_paper": PAPER,
        "ap_key": AP_KEY,
        "Type of Pipeline:": "D-Methods Pruning During Training",
        "D: Training step ": training,
        "Pruning structure": "Unstructured (US)",
        "Pruning locality": "Local Pruning (L)" if plan.get("rewire") == "by-layer" else "Global Pruning (G)",
        "Pruning criterion": "Bayesian Connectivity Sampling (BCS)",
    }


def issue(sparse: SparseModel, plan: dict[str, Any], figures: dict[str, Any]) -> str:
    """Return the text of AdversarialPruningBenchmark's issue "New AP method", for one model."""
    key = model_key(sparse)
    lines = [
        "## JSON Entry",
        "",
        "```json",
        json.dumps(taxonomy(plan), indent=2, ensure_ascii=False),
        "```",
        "",
        "## Evaluation Results of Model n°1",
        "",
        f'_Model GDrive:_ "{key}" : ["", ".pt"]',
        f'_Distances GDrive:_ "{key}" : ["", ".pickle"]',
        "",
        f"_Clean Accuracy:_ {_percent(figures.get('clean'))}",
        f"_Robust Accuracy (AA):_ {_percent(figures.get('autoattack'))}",
        "_Robust Accuracy (HO-FMN):_ ",
        "",
        "## Architecture details and normalization",
        "",
        "No normalization: pixels in [0, 1]. The checkpoint loads into the available base model, strictly.",
        f"{sparse.kappa:,} of its {sparse.size:,} weights of convolutions and linear layers are not zero,",
        "as at each step of its training. Running statistics of batch norms hold biased variances.",
    ]
    if figures:
        lines += ["", f"Figures of {figures['samples']:,} test images of {figures['data']}."]
    return "\n".join(lines) + "\n"


def claim(sparse: SparseModel, plan: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Return RobustBench's claim for one model."""
    return {
        "link": PAPER,
        "name": TITLE,
        "authors": "Ozan Özdenizci, Robert Legenstein",
        "additional_data": plan.get("objective") in PSEUDO_LABELLED,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "ICML 2021",
        "architecture": f"{_KINDS[str(sparse.record['name'])][1]}, {100 * float(sparse.sparsity):g} % sparse",
        "eps": "8/255",
        "clean_acc": _percent(figures.get("clean")),
        "reported": _percent(figures.get("autoattack")),
        "autoattack_acc": _percent(figures.get("autoattack")),
    }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def figures_of(reports: list[Path]) -> dict[str, Any]:
    """Return what reports of `edge-bcs evaluate --json` say: clean accuracy, AutoAttack, of how many images.

    Raises:
        EdgeBcsError: a file that is none, another radius than 8/255, or numbers of different images.
    """
    found: dict[str, Any] = {}
    for file in reports:
        try:
            report = parse_object(read_small(file))
            said = {"clean": report["clean_acc"], "samples": report["samples"]}
            said["data"] = Path(str(report["data"])).name
            if report["attack"] == "autoattack":
                if abs(report["eps"] - 8 / 255) > 1e-9:
                    raise EdgeBcsError(f"{file} is of ε = {report['eps']:g}, and the judges ask for 8/255.")
                said["autoattack"] = report["adv_acc"]
        except EdgeBcsError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            raise EdgeBcsError(f"{file} is no report of `edge-bcs evaluate --json`.") from None
        differing = [name for name in ("samples", "data") if found.get(name, said[name]) != said[name]]
        if differing:
            raise EdgeBcsError(f"{file} is of other images than the report before it.")
        found |= said
    return found


def write(source: str, folder: Path, reports: list[Path]) -> list[str]:
    """Write all files for a checkpoint (`source`: a path, or a name of the zoo); return their names."""
    if Path(source).exists():
        path = Path(source)
        file = path / "checkpoint.safetensors" if path.is_dir() else path
        figures = figures_of(reports)
    else:
        card = zoo.card_of(source)
        file = zoo.file_of(card)
        figures = figures_of(reports) or _figures_of_card(card)
    sparse = edge_bcs.load(file)
    network = judged(sparse)
    metadata = read_checkpoint(file).metadata
    try:
        plan = parse_object(metadata.get("plan", ""))
    except ValueError:
        raise EdgeBcsError(f"{file} was not written by `edge-bcs train`: it does not say how.") from None
    texts = {"issue.md": issue(sparse, plan, figures)}
    texts["judged_networks.py"] = Path(judged_networks.__file__).read_text()
    weights = f"{model_key(sparse)}.pt"
    ours = json_with("link_to_paper", "ap_key")
    check_outputs(folder, (*_FILES, weights), "taxonomy.json", ours, "an output of `edge_bcs.bench.judges`")
    write_json(folder / "taxonomy.json", taxonomy(plan), make_folder=True)
    write_json(folder / "robustbench.json", claim(sparse, plan, figures))
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    write_atomically(folder / weights, content.getbuffer())
    return [*_FILES, weights]


def _figures_of_card(card: zoo.Card) -> dict[str, Any]:
    """What a card has of the same images."""
    clean, robust = card.measured["clean"], card.measured["autoattack"]
    if clean is None:
        return {}
    found = {"clean": card.accuracies["clean"], "samples": clean["samples"], "data": card.data}
    if robust is not None and robust["samples"] == clean["samples"]:
        found["autoattack"] = card.accuracies["autoattack"]
    return found


def main() -> None:
    """Write a checkpoint for the judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", help="a run of `edge-bcs train`, a checkpoint, or a name of `edge-bcs zoo`")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/judges"))
    parser.add_argument("--report", type=Path, action="append", default=[], help="may be repeated")
    options = parser.parse_args()
    for name in write(options.source, options.output, options.report):
        print(options.output / name)


if __name__ == "__main__":
    try:
        main()
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
