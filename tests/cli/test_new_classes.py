"""From trained weights with other classes to a run that knows the new ones by name, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import run

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
Image = pytest.importorskip("PIL.Image")
from edge_bcs.exporters.frontends.onnx import from_onnx  # noqa: E402
from torch import nn  # noqa: E402

import edge_bcs  # noqa: E402
from edge_bcs.checkpoint import read_checkpoint, save_checkpoint  # noqa: E402
from edge_bcs.core.errors import EdgeBcsError  # noqa: E402
from edge_bcs.core.resizing import Resize  # noqa: E402
from edge_bcs.core.tensor_file import write_tensors  # noqa: E402
from edge_bcs.data.photographs import read_image  # noqa: E402

NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.pool(self.body(x)).flatten(1))

def fixed():
    return Net(20)

def open(num_classes=20):
    return Net(num_classes)
"""
NAMES = ("ant", "bee", "cat")
SHORT = ("--batch-size", 8, "--attack-steps", 1, "--no-augment")
SIZE = ("--input-shape", "3,8,8")


def succeed(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return {**content, "told": result.stderr}


def network_of_20() -> Any:
    network: Any = {}
    exec(NETS, network)
    return network["fixed"]()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of a network of 20 classes, and photographs of three, of which each is a colour."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        for split, count in (("train", 8), ("test", 3)):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for photo in range(count):
                pixels = rng.integers(0, 100, (10, 9, 3), np.uint8)
                pixels[:, :, number] += 120
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{photo}.png")
    torch.manual_seed(3)
    module = network_of_20()
    torch.save(module.state_dict(), tmp_path / "dense.pt")
    return tmp_path


@pytest.mark.parametrize("factory", ["fixed", "open"])
def test_new_classes_by_name_from_export_to_export(place: Path, factory: str) -> None:
    """The factory makes 20 outputs, or as many as it is asked for: in either case three, which have names."""
    model = ("--model", f"nets.py:{factory}")
    exported = succeed("export", *model, "--weights", "dense.pt", *SIZE, "--class-names", ",".join(NAMES),
                       "--sparsity", 0.5, *SHORT[:4], "--no-validate", "-o", "out")  # fmt: skip
    assert "The last layer, head (20 → 3 outputs), is new." in exported["told"]
    assert exported["classes"] == list(NAMES)
    tuned = succeed("finetune", "out", "--data", "photos", "--steps", 3, "--no-augment", "--eval-steps", 1,
                    "-o", "run")  # fmt: skip
    assert tuned["classes"] == list(NAMES) and tuned["matched_by"] == "name"
    measured = succeed("evaluate", "run", "--data", "photos", "--attack", "none")
    assert [one["class"] for one in measured["per_class"]] == list(NAMES)
    answered = succeed("predict", "run", "photos/test/bee")
    assert {one["name"] for image in answered["images"] for one in image["classes"]} == set(NAMES)
    # The module that the factory makes has 20 outputs again: the run says what it became.
    again = succeed("export", "--checkpoint", "run", *model, "--no-validate", "-o", "out2")
    assert again["classes"] == list(NAMES)
    in_torch = succeed(
        "evaluate", "out2", *model, "--data", "photos", "--attack", "none", "--engine", "torch"
    )
    assert in_torch["accuracy"] == measured["accuracy"]
    with edge_bcs.runtime.Trainer("out2") as trainer:
        assert trainer.predict_names(np.zeros((1, 3, 8, 8), np.float32))[0] in NAMES
    # Other classes than the manifest's are one sentence.
    (place / "photos" / "train" / "cat").rename(place / "photos" / "train" / "cow")
    wrong = run("finetune", "out2", "--data", "photos", "--steps", 1, "-o", "run2")
    (told,) = [line for line in wrong.stderr.splitlines() if line.startswith("Error: ")]
    assert wrong.exit_code == 1 and "does not know the data's class cow" in told
    assert "The network has: ant, bee, cat" in told


def test_training_takes_the_classes_of_the_folders(place: Path) -> None:
    model = ("--model", "nets.py:fixed")
    trained = ("train", *model, "--weights", "dense.pt", *SIZE, "--data", "photos", "--sparsity", 0.5,
               "--steps", 2, "--learning-rate", 1e-3, "--device", "cpu", *SHORT, "--validation", 0.2,
               "-o", "runs")  # fmt: skip
    report = succeed(*trained)
    assert "The last layer, head (20 → 3 outputs), is new." in report["told"]
    assert report["classes"] == list(NAMES)
    stored = read_checkpoint("runs/checkpoint.safetensors")
    assert stored.network()["head"] == {"layer": "head", "classes": 3}
    assert succeed(*trained, "--resume")["step"] == 2
    measured = succeed("evaluate", "runs", *model, "--data", "photos", "--attack", "none")
    assert [one["class"] for one in measured["per_class"]] == list(NAMES)
    # A trained sparse network gets other classes in the same way, and its file knows.
    exported = succeed(
        "export", "--checkpoint", "runs", *model, "--classes", 5, "--no-validate", "-o", "five"
    )
    assert "The last layer, head (3 → 5 outputs), is new." in exported["told"]
    assert exported["classes"] is None and edge_bcs.load("five", network_of_20()).step == 0
    body = edge_bcs.load("five", network_of_20()).network.get_parameter("body.0.weight")
    assert torch.equal(body, edge_bcs.load("runs", network_of_20()).network.get_parameter("body.0.weight"))
    # --classes 20 keeps what the weights know.
    report = succeed(*trained[:-1], "kept", "--classes", 20)
    assert "is new" not in report["told"] and len(report["classes"]) == 20
    # What cannot be told apart stays as it was: numbers are places among the outputs that there are.
    images = np.zeros((24, 3, 8, 8), np.uint8)
    np.savez("numbers.npz", x=images, y=np.arange(24) % 3)
    report = succeed(*[word if word != "photos" else "numbers.npz" for word in trained[:-1]], "numbers")
    assert "is new" not in report["told"] and len(report["classes"]) == 20


def test_a_measured_file_may_have_classes_of_its_own(place: Path) -> None:
    state = torch.load("dense.pt")
    state = {name: tensor[:3] if name.startswith("head") else tensor for name, tensor in state.items()}
    torch.save(state, "three.pt")
    measured = succeed("evaluate", "--model", "nets.py:fixed", "--weights", "three.pt", "--input-size", 8,
                       "--data", "photos", "--class-names", ",".join(NAMES), "--attack", "none")  # fmt: skip
    assert [one["class"] for one in measured["per_class"]] == list(NAMES)


def test_an_onnx_file_gets_new_classes(place: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=216 + 8 + 160 + 20).astype(np.float32)
    shapes = {"body.weight": (8, 3, 3, 3), "body.bias": (8,), "head.weight": (20, 8), "head.bias": (20,)}
    arrays = dict(zip(shapes, np.split(numbers, [216, 224, 384]), strict=True))
    helper = onnx.helper
    nodes = [
        helper.make_node("Conv", ["x", "body.weight", "body.bias"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    sides = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 3, 8, 8]), ("y", ["n", 20]))
    ]
    constants = [onnx.numpy_helper.from_array(arrays[name].reshape(shapes[name]), name) for name in shapes]
    graph = helper.make_graph(nodes, "net", sides[:1], sides[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "net.onnx")
    # As it is it can be measured: the first three of its outputs have names.
    measured = succeed("evaluate", "--model", "net.onnx", "--data", "photos", "--attack", "none",
                       "--class-names", ",".join(NAMES), "--normalize", "0.5:0.5",
                       "--resize", "crop")  # fmt: skip
    network = from_onnx("net.onnx")
    right = []
    for photo in sorted(Path("photos/test").glob("*/*.png")):
        x = torch.from_numpy(read_image(photo, (3, 8, 8), Resize.parse("crop")))
        with torch.no_grad():
            right.append(int(network((x[None] - 0.5) / 0.5).argmax()) == NAMES.index(photo.parent.name))
    assert measured["samples"] == len(right) == 9 and measured["accuracy"] == sum(right) / 9
    refused = run("evaluate", "somewhere", "--data", "photos", "--normalize", "imagenet")
    assert "--normalize belongs to a dense network of yours" in refused.stderr
    common = ("--sparsity", 0, "--no-validate")
    exported = succeed("export", "--model", "net.onnx", "--classes", 3, *common, "-o", "out")
    assert "The last layer, head (20 → 3 outputs), is new." in exported["told"]
    loaded = edge_bcs.load("out", from_onnx("net.onnx"))
    assert loaded(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    kernel = loaded.network.get_parameter("body.weight").detach().numpy()
    assert np.array_equal(kernel.ravel(), arrays["body.weight"])


def test_what_a_file_says_of_the_last_layer_is_not_believed(place: Path) -> None:
    module: nn.Module = network_of_20()
    sparse = edge_bcs.sparsify(module, 0.5, start="magnitude", classes=3)
    for head, message in (
        ({"layer": "head", "classes": 1 << 40}, "describes the last layer"),
        ({"layer": "head", "classes": True}, "describes the last layer"),
        ({"layer": 7, "classes": 3}, "describes the last layer"),
        ([], "describes the last layer"),
        ({"layer": "body.0", "classes": 3}, "belongs to another network"),
        ({"layer": "nothing", "classes": 3}, "belongs to another network"),
        ({"layer": "head", "classes": 99_999}, "belongs to another network"),
    ):
        save_checkpoint("saved.safetensors", sparse)
        stored = read_checkpoint("saved.safetensors")
        record = {**stored.network(), "head": head}
        with open("saved.safetensors", "wb") as stream:
            write_tensors(stream, stored.tensors, {**stored.metadata, "network": json.dumps(record)})
        with pytest.raises(EdgeBcsError, match=message):
            edge_bcs.load("saved.safetensors", module)
