"""Classes go by name on the host, and from there to the board and back."""

# mypy: disable-error-code="arg-type, call-overload, comparison-overlap, var-annotated"

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from helpers import DENSE
from helpers.classes import ANIMALS, Array, arrays, folders, pictures
from helpers.commands import run

from edge_bcs import Attack, Compute, Feed, Output, Schedule
from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning


@pytest.fixture
def network() -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 4))


SHORT: dict[str, Any] = {
    "objective": "natural",
    "batch_size": 8,
    "progress": False,
    "compute": Compute(device="cpu"),
    "feed": Feed(augment=False),
}


def test_names_go_from_host_to_board_and_back(network: Any, tmp_path: Path) -> None:
    import edge_bcs

    sparse = edge_bcs.sparsify(network, 0.5, 0, "uniform")
    report = edge_bcs.train(
        sparse, arrays(ANIMALS), schedule=Schedule(steps=30), output=tmp_path / "host", **SHORT
    )
    names = (*ANIMALS, "class 3")
    assert sparse.classes == names and report["classes"] == list(names)
    loaded = edge_bcs.load(tmp_path / "host", network)
    assert loaded.classes == names
    options: dict[str, Any] = {
        "objective": "natural",
        "input_shape": (1, 8, 8),
        "validate": False,
        "step": 30,
    }
    edge_bcs.export(loaded, tmp_path / "a.tar", **options)
    assert Artifact.read(tmp_path / "a.tar").classes == names
    with Trainer(tmp_path / "a.tar") as trainer:
        trainer.fit(arrays(("cat", "bee")), steps=1, augment=False, progress=False)
        trainer.save(tmp_path / "board")
        on_board = trainer.evaluate(arrays(("cat", "bee")), 0)["accuracy"]
    back = edge_bcs.load(tmp_path / "board", network)
    assert back.classes == names
    from edge_bcs.evaluation.measures import evaluate

    measured = evaluate(back, arrays(("cat", "bee")), attack="none")
    assert measured["clean_acc"] == on_board > 0.9 and measured["missing_classes"] == ["ant"]
    edge_bcs.export(back, tmp_path / "again", **options)
    assert Artifact.read(tmp_path / "again").classes == names
    with pytest.raises(EdgeBcsError, match="does not know the data's class dog"):
        evaluate(back, arrays(("bee", "dog")), attack="none")


def test_torch_datasets_and_loaders_are_matched_by_name(network: Any) -> None:
    from torch.utils.data import DataLoader

    import edge_bcs
    from edge_bcs.evaluation.measures import evaluate

    images, labels = arrays(("cat", "bee")).read(np.arange(24))

    class Photos:
        classes = ("cat", "bee")

        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, place: int) -> tuple[Array, int]:
            return images[place], int(labels[place])

    photos: Any = Photos()
    sparse = edge_bcs.sparsify(network, 0.5, 0, "uniform")
    edge_bcs.train(sparse, arrays(ANIMALS), schedule=Schedule(steps=30), **SHORT)
    for data in (photos, DataLoader(photos, batch_size=5)):
        measured = evaluate(sparse, data, attack="none")
        assert measured["clean_acc"] > 0.9 and measured["missing_classes"] == ["ant"]
    photos.classes = ("cow", "bee")
    for data in (photos, DataLoader(photos, batch_size=5)):
        with pytest.raises(EdgeBcsError, match="does not know the data's class cow"):
            evaluate(sparse, data, attack="none")
    unnamed = DataLoader([(image, [2, 1][label]) for image, label in zip(images, labels, strict=True)])
    assert evaluate(sparse, unnamed, attack="none")["clean_acc"] == measured["clean_acc"]


def test_training_on_the_host_takes_labels_by_name(network: Any, tmp_path: Path) -> None:
    """A network with names, on data that has some of them in another order; both engines."""
    import edge_bcs

    some = arrays(("cat", "ant"), seed=0)
    images, labels = some.read(np.arange(len(some)))
    own = (images, np.array([2, 0])[labels])
    for engine in ("torch", "sparse"):
        states = []
        for data in (some, own):
            sparse = edge_bcs.sparsify(network, 0.5, 0, "uniform")
            sparse.classes = ANIMALS
            options = {
                **SHORT,
                "compute": Compute(engine, device="cpu"),
                "feed": Feed(augment=False, validation=0.2),
            }
            edge_bcs.train(sparse, data, schedule=Schedule(steps=4), **options)
            states.append(sparse.state())
            assert sparse.classes == (*ANIMALS, "class 3")
        assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    with pytest.raises(EdgeBcsError, match="does not know the data's class bee"):
        sparse.classes = ("cat", "ant", "cow", "dog")
        edge_bcs.train(sparse, arrays(ANIMALS), schedule=Schedule(steps=1), **SHORT)
    assert sparse.classes == ("cat", "ant", "cow", "dog")


def test_a_training_on_the_host_is_resumed_with_its_classes(network: Any, tmp_path: Path) -> None:
    import edge_bcs

    for number, names in enumerate((ANIMALS, ("bee", "ant", "cat"), ANIMALS)):
        sparse = edge_bcs.sparsify(network, 0.5, 0, "uniform")
        output = Output(tmp_path / "host", resume=number > 0)
        options: dict[str, Any] = {"schedule": Schedule(steps=2), "output": output, **SHORT}
        if number == 1:
            with pytest.raises(EdgeBcsError, match="begun with the classes ant, bee, cat"):
                edge_bcs.train(sparse, arrays(names), **options)
            assert sparse.classes is None
        else:
            edge_bcs.train(sparse, arrays(names), **options)


def test_pseudo_labels_are_positions_of_the_networks_classes(network: Any, tmp_path: Path) -> None:
    import edge_bcs
    from edge_bcs.data.pseudo_labelled import open_pseudo_labelled

    images, labels = pictures(("cat", "bee"))
    np.savez(tmp_path / "second.npz", x=images, y=np.array([2, 1])[labels])
    second = open_pseudo_labelled(tmp_path / "second.npz", (1, 8, 8))
    names = ("ant", "bee", "cat")
    sparse = edge_bcs.sparsify(network, 0.5, 0, "uniform")
    options: dict[str, Any] = {
        **SHORT, "objective": "rst", "schedule": Schedule(steps=2), "attack": Attack(steps=1),
    }  # fmt: skip

    def fed(second: Any) -> dict[str, Any]:
        return {**options, "feed": Feed(augment=False, pseudo_labelled=second)}

    with pytest.warns(EdgeBcsWarning, match="the pseudo-labelled data: .*0 = ant, 1 = bee, 2 = cat"):
        edge_bcs.train(sparse, arrays(names), **fed(second))
    # Data that names its pseudo-labels is matched by name, like any other.
    other = edge_bcs.sparsify(network, 0.5, 0, "uniform")
    turned = arrays(("cat", "bee"), seed=0)
    edge_bcs.train(other, arrays(names), **fed(turned))
    assert all(np.array_equal(sparse.state()[name], other.state()[name]) for name in other.state())


def test_names_that_do_not_fit_the_network_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import edge_bcs
    from edge_bcs.checkpoint import save_checkpoint
    from edge_bcs.models import resnet18

    sparse = edge_bcs.sparsify(resnet18(num_classes=3, width=1 / 16), 0.9)
    for names, message in ((("a", "b"), "must be 3 names, not 2"), (("a", "a", "b"), "must be distinct")):
        sparse.classes = names
        save_checkpoint(tmp_path / "bad.safetensors", sparse)
        with pytest.raises(EdgeBcsError, match=f"bad.safetensors: .*{message}"):
            edge_bcs.load(tmp_path / "bad.safetensors")
    with pytest.raises(EdgeBcsError, match="must be distinct"):
        edge_bcs.export(sparse, tmp_path / "bad")
    sparse.classes = ("a", "b", "c", "d")
    with pytest.raises(EdgeBcsError, match="4 classes, the network only 3"):
        edge_bcs.export(sparse, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_commands_on_the_host(tmp_path: Path) -> None:
    """`train` has as many outputs as names; `export` renames, where it is asked to, and says so."""
    pytest.importorskip("torch")
    data = folders(tmp_path / "data", ("bee", "cat"))
    small = ("--model", "resnet18", "--width", 1 / 16, "--channels", 1, "--input-size", 8)
    options = ("--objective", "natural", "--steps", 1, "--batch-size", 8, "--sparsity", 0.5)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(ANIMALS))
    result = run(
        "train", "--data", data, "--class-names", names, *small, *options, "-o", tmp_path / "host", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["classes"] == list(ANIMALS)
    assert json.loads(result.stdout)["missing_classes"] == ["ant"]
    evaluated = run("evaluate", tmp_path / "host", "--data", data, "--attack", "none", "--json")
    assert json.loads(evaluated.stdout)["missing_classes"] == ["ant"]
    to = ("export", "--checkpoint", tmp_path / "host", "--no-validate", "--micro-batch", 2, "-o")
    kept = run(*to, tmp_path / "kept", "--json")
    assert json.loads(kept.stdout)["classes"] == list(ANIMALS)
    renamed = run(*to, tmp_path / "renamed", "--class-names", "Ameise,Biene,Katze")
    assert "the classes ant, bee, cat are now called Ameise, Biene, Katze" in renamed.stderr
    assert Artifact.read(tmp_path / "renamed").classes == ("Ameise", "Biene", "Katze")
    new = run(
        "export", *small, "--sparsity", 0.5, "--no-validate", "--micro-batch", 2, "-o", tmp_path / "new",
        "--class-names", "ant,bee",
    )  # fmt: skip
    assert new.exit_code == 0 and Artifact.read(tmp_path / "new").num_classes == 2


def test_comparators_keep_the_names_of_what_they_prune(network: Any) -> None:
    import edge_bcs
    from edge_bcs.comparators import METHODS, Phases, PhaseSettings

    dense = edge_bcs.sparsify(network, 0)
    dense.classes = (*ANIMALS, "dog")
    few = PhaseSettings(sparsity="0.5", objective="natural", steps=1, batch_size=8, search_epochs=1)
    for train in METHODS.values():
        phases = Phases("lwm", few, arrays(("cat", "ant")), progress=False, compute=Compute(device="cpu"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sparse, report = train(network, phases, dense)
        assert sparse.classes == dense.classes and report["missing_classes"] == ["bee", "dog"]


def test_dense_artifacts_keep_names_in_their_checkpoint(tmp_path: Path) -> None:
    import onnxruntime

    if hasattr(onnxruntime.capi._pybind_state, "save_checkpoint"):
        pytest.skip("this is a training build, which runs its artifacts itself")
    from edge_bcs.runtime.ort.artifact import OrtArtifact

    dense = DENSE / "mobile"
    data = folders(tmp_path / "data", ANIMALS)
    first = run("run-ort-artifact", dense, "--data", data, "--steps", 1, "-o", tmp_path / "a", "--json")
    assert first.exit_code == 0, first.output
    names = [*ANIMALS, *(f"class {place}" for place in range(3, 10))]
    assert json.loads(first.stdout)["classes"] == names and "are class 3, class 4" in first.stderr
    shutil.rmtree(data / "train" / "ant")
    shutil.rmtree(data / "test" / "ant")
    options = ("--data", data, "--checkpoint", tmp_path / "a", "--steps", 1, "--json")
    again = run("run-ort-artifact", dense, *options, "-o", tmp_path / "b")
    assert json.loads(again.stdout)["missing_classes"] == ["ant"] and "lacks 1" in again.stderr
    with OrtArtifact(dense, checkpoint=tmp_path / "b") as training:
        assert training.classes == tuple(names) and training.outputs == 10
    (data / "train" / "bee").rename(data / "train" / "cow")
    (data / "test" / "bee").rename(data / "test" / "cow")
    assert "does not know the data's class cow" in run("run-ort-artifact", dense, *options).stderr
