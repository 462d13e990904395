"""The zoo: its checkpoints are what was measured, and every command takes them by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import run, succeed
from helpers.training_commands import SMALL, write_digits

import edge_bcs
from edge_bcs import zoo
from edge_bcs.core.errors import EdgeBcsError

ROOT = Path(__file__).parents[1]
CIFAR10 = Path(os.environ.get("EDGE_BCS_CIFAR10", ROOT.parent / "shared" / "data" / "cifar10"))
DATA = {"digits": "digits", "cifar10": str(CIFAR10)}
NAME = "resnet18-tiny-80-at"


@pytest.mark.parametrize("card", zoo.read_cards(), ids=lambda card: card.name)
def test_a_checkpoint_of_the_zoo_is_as_accurate_as_its_card_says(card: zoo.Card) -> None:
    torch = pytest.importorskip("torch")
    from edge_bcs.data import open_data

    if card.data == "cifar10" and not CIFAR10.exists():
        pytest.skip(f"no CIFAR-10 images in {CIFAR10}; EDGE_BCS_CIFAR10 names another folder")
    file = zoo.FOLDER / card.file
    assert file.stat().st_size == card.bytes and zoo.sha256_of(file) == card.sha256
    sparse = edge_bcs.pretrained(card.name)
    weights = [parameter for name, parameter in sparse.network.named_parameters() if parameter.ndim > 1]
    assert sum(weight.numel() for weight in weights) == card.size
    assert sum(int(weight.count_nonzero()) for weight in weights) == card.kappa
    assert card.kappa == int(card.size * (100 - round(100 * float(card.sparsity))) // 100)
    channels, height, width = card.input_shape
    data = open_data(DATA[card.data], "test", (channels, height, width))
    images, labels = data.read(data.order(0, 0, shuffle=True)[: card.subset["samples"]])
    with torch.no_grad():
        answers = sparse(torch.from_numpy(images)).argmax(1).numpy()
    # An image on the edge may fall to the other side where torch rounds in another order.
    assert abs(int((answers == labels).sum()) - card.subset["right"]) <= 1
    assert set(card.accuracies) == set(card.measured) == set(zoo.MEASURES)
    for measure, share in card.accuracies.items():
        assert (share is None) == (card.measured[measure] is None)


def test_the_page_has_the_numbers_of_the_cards() -> None:
    def told(share: float | None, found: Any) -> str:
        return "–" if share is None else f"{100 * share:.1f} % of {found['samples']:,}"

    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", (ROOT / "docs/zoo.md").read_text(), re.M)
    page = {name: cells.split(" | ") for name, cells in rows if name in {c.name for c in zoo.read_cards()}}
    assert page == {
        card.name: [
            f"{card.kappa:,} of {card.size:,}",
            *(told(card.accuracies[measure], card.measured[measure]) for measure in zoo.MEASURES),
            f"{card.bytes:,}",
        ]
        for card in zoo.read_cards()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a tiny network, the digits that it was trained on, and a zoo that has one of them."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("trained")
    write_digits(folder / "digits.npz")
    for steps in (4, 2):
        command = ("train", "--model", "resnet18", "--data", folder / "digits.npz", "--batch-size", 16)
        succeed(*command, *SMALL, "--steps", steps, "-o", folder / f"run{steps}")
    from edge_bcs.bench.pretrained import publish

    data = str(folder / "digits.npz")
    publish(folder / "run4", NAME, data, folder=folder / "zoo", steps=3, restarts=2, limit=20)
    return folder


@pytest.fixture
def small_zoo(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo with one tiny network, in the place of the one that comes with edge-bcs."""
    folder = tmp_path / "zoo"
    shutil.copytree(trained / "zoo", folder)
    monkeypatch.setattr(zoo, "FOLDER", folder)
    return folder


def test_a_published_network_is_that_of_the_run_without_momentum(small_zoo: Path, trained: Path) -> None:
    """Its card has what `edge-bcs evaluate` measures of the run, and nothing that was not measured."""
    run_state, state = edge_bcs.load(trained / "run4").state(), edge_bcs.pretrained(NAME).state()
    for name, array in run_state.items():
        if name.endswith(".momentum"):
            assert array.any() and not state[name].any()
        else:
            np.testing.assert_array_equal(state[name], array)
    (card,) = zoo.read_cards()
    whole = (trained / "run4" / "checkpoint.safetensors").stat().st_size
    assert card.bytes == (small_zoo / card.file).stat().st_size < 0.9 * whole
    command = ("evaluate", trained / "run4", "--data", trained / "digits.npz", "--limit", 20)
    report = succeed(*command, "--attack-steps", 3, "--restarts", 2, "--seed", 0)
    assert card.accuracies["clean"] == report["clean_acc"]
    assert card.accuracies["autoattack"] is card.accuracies["corruption"] is None
    assert card.measured["pgd"] == {"samples": 20, "steps": 3, "restarts": 2, "eps": 8 / 255}
    assert (card.recipe["steps"], card.recipe["method"], card.seed, card.kappa) == (
        4,
        "bcs",
        0,
        report["kappa"],
    )


def test_publishing_again_keeps_what_is_not_measured_anew(small_zoo: Path, trained: Path) -> None:
    from edge_bcs.bench.pretrained import publish
    from edge_bcs.data import open_data
    from edge_bcs.evaluation.measures import evaluate

    data = str(trained / "digits.npz")
    index = small_zoo / zoo.INDEX
    (record,) = json.loads(index.read_text())
    record["accuracies"]["autoattack"], record["measured"]["autoattack"] = 0.25, {"samples": 8}
    index.write_text(json.dumps([record]))
    again = publish(trained / "run4", NAME, data, folder=small_zoo, steps=0)
    assert json.loads(json.dumps(again.record())) == record
    corrupt = publish(trained / "run4", NAME, data, folder=small_zoo, steps=0, corruptions=4)
    assert corrupt.measured["corruption"] == {"samples": 4}
    loaded, images = edge_bcs.load(trained / "run4"), open_data(data, "test", (1, 8, 8))
    expected = evaluate(loaded, images, attack="none", samples=4, corruptions=True)["mean_corruption_acc"]
    assert corrupt.accuracies == {**again.accuracies, "corruption": expected}
    publish(trained / "run2", "another", data, folder=small_zoo, steps=0)
    assert [card.name for card in zoo.read_cards()] == ["another", NAME]
    for source, name, sentence in (
        (trained / "run2", NAME, f"has another checkpoint {NAME}"),
        (small_zoo / record["file"], "../x", "is no name for a checkpoint"),
        (trained / "nothing", "x", "there is no checkpoint file"),
    ):
        with pytest.raises(EdgeBcsError, match=re.escape(sentence)):
            publish(source, name, data, folder=small_zoo, steps=0)
    assert len(zoo.read_cards()) == 2


def test_a_damaged_zoo_is_told(small_zoo: Path) -> None:
    (card,) = zoo.read_cards()
    file = small_zoo / card.file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EdgeBcsError, match="its sha256 differs; install edge-bcs anew"):
        edge_bcs.pretrained(NAME)
    file.unlink()
    with pytest.raises(EdgeBcsError, match="cannot be read"):
        edge_bcs.pretrained(NAME)
    index = small_zoo / zoo.INDEX
    stored = json.loads(index.read_text())
    for content in ("[", "{}", "[3]", json.dumps([{**stored[0], "more": 1}]), None):
        index.unlink() if content is None else index.write_text(content)
        result = run("zoo")
        assert result.exit_code == 1 and "the index of the zoo" in result.stderr, content


def test_momentum_is_missed_unless_the_file_says_that_it_has_none(small_zoo: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from edge_bcs.checkpoint import read_checkpoint

    (card,) = zoo.read_cards()
    metadata = read_checkpoint(small_zoo / card.file).metadata
    tensors = load_file(small_zoo / card.file)
    assert not {name for name in tensors if name.endswith("momentum")}
    del metadata["momentum"]
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(EdgeBcsError, match=r"lacks coo\.momentum"):
        edge_bcs.load(tmp_path / "x.safetensors")


def test_the_command_lists_cards(small_zoo: Path) -> None:
    result = run("zoo", "--json")
    (listed,) = json.loads(result.stdout)
    assert listed == json.loads((small_zoo / zoo.INDEX).read_text())[0]
    assert {"name", "network", "data", "sparsity", "accuracies"} <= set(listed)
    assert NAME in run("zoo").stdout
    one = run("zoo", NAME).stdout
    assert "not measured yet" in one and listed["sha256"] in one.replace("\n", "").replace(" ", "")
    unknown = run("zoo", "resnet19")
    assert unknown.exit_code == 1 and f"has no checkpoint 'resnet19' ({NAME})" in unknown.stderr


def test_commands_take_a_network_of_the_zoo(small_zoo: Path, trained: Path, tmp_path: Path) -> None:
    """The same as the run that it came from; trained further it keeps κ, and gets other classes."""
    exported: dict[str, dict[str, Any]] = {}
    for name, source in (("a", ("--pretrained", NAME)), ("b", ("--checkpoint", trained / "run4"))):
        exported[name] = succeed("export", *source, "--no-validate", "-o", tmp_path / name)
    assert {**exported["a"], "artifact": 0} == {**exported["b"], "artifact": 0}
    data = ("--data", trained / "digits.npz")
    measured = ("evaluate", *data, "--limit", 20, "--attack", "none")
    assert (
        succeed(*measured, "--pretrained", NAME)["accuracy"]
        == succeed(*measured, trained / "run4")["accuracy"]
    )

    further = ("train", "--pretrained", NAME, *data, "--steps", 2, "--batch-size", 16, "--attack-steps", 1)
    (card,) = zoo.read_cards()
    result = succeed(*further, "-o", tmp_path / "further")
    assert sum(result["connections"].values()) == card.kappa
    after, before = edge_bcs.load(tmp_path / "further"), edge_bcs.pretrained(NAME)
    assert after.step == 2 and len(set(after.coo()[1]) & set(before.coo()[1])) > 0.5 * card.kappa
    three = run(*further, "--classes", 3, "-o", tmp_path / "three")  # which the data has ten of
    assert three.exit_code == 1 and "The last layer" in three.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("export", "--pretrained", "x"), "the zoo has no checkpoint 'x'"),
        (("export", "--pretrained", NAME, "--sparsity", "0.9"), "--sparsity belongs to a new network"),
        (("export", "--pretrained", NAME, "--checkpoint", "y"), "both name the network"),
        (("evaluate", "y", "--data", "digits", "--pretrained", NAME), "both name the network"),
        (("evaluate", "--data", "digits", "--pretrained", NAME, "--weights", "y"), "--weights belongs to"),
        (("train", "--data", "digits", "--pretrained", "."), "a file or a folder of yours is --weights"),
        (("train", "--data", "digits", "--pretrained", NAME, "--width", "1"), "--width belongs to"),
        (("train", "--data", "digits", "--pretrained", NAME, "--gradual"), "--gradual belongs to"),
        (
            ("train", "--data", "digits", "--pretrained", NAME, "--method", "dense"),
            "bcs and random can train",
        ),
        (("train", "--data", "digits", "--pretrained", NAME, "--method", "lwm"), "bcs and random can train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_does_not_go_with_a_network_of_the_zoo(
    small_zoo: Path, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    output = () if words[0] == "evaluate" else ("-o", tmp_path / "out")
    result = run(*words, *output)
    assert result.exit_code == 1 and sentence in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
