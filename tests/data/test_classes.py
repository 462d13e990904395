"""Class names: data is matched with a network by name, wherever labels flow, and names are never lost."""

# mypy: disable-error-code="arg-type, call-overload, comparison-overlap, var-annotated"

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import write_run
from helpers.artifacts import write_artifact
from helpers.classes import ANIMALS, COMPOSED, DECOMPOSED, arrays, folders, pictures
from helpers.commands import run

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.data import ArrayDataset, classes, open_data
from edge_bcs.data.classes import completed, given_names, match, named, numbers

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tiny_artifact: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows ant, bee and cat, trained on class folders by the command."""
    base = tmp_path_factory.mktemp("trained")
    data = folders(base / "data", ANIMALS)
    artifact = tiny_artifact(objective="natural", batch_norm="batch", micro_batch=16)
    options = ("--data", data, "--steps", 40, "--no-augment", "--eval-samples", 0)
    result = run("finetune", artifact, *options, "-o", base / "run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["classes"][:3] == list(ANIMALS)
    return base / "run"


# What is matched with what


def test_the_order_in_which_a_source_lists_its_classes_changes_nothing() -> None:
    data = arrays(("bee", "cat"), order=("cat", "bee"))
    matched = match(data, ANIMALS)
    assert (matched.by, matched.missing, matched.classes) == ("name", ("ant",), ANIMALS)
    assert [ANIMALS[label] for label in matched.data.labels] == ["bee"] * 12 + ["cat"] * 12
    x, y = matched.data.read(np.array([20, 3]), seed=1, epoch=2, augment=True)
    np.testing.assert_array_equal(x, data.read(np.array([20, 3]), seed=1, epoch=2, augment=True)[0])
    assert list(y) == [2, 1] and matched.data.classes == ANIMALS and matched.data.shape == (1, 8, 8)
    np.testing.assert_array_equal(matched.data.order(5, 1), data.order(5, 1))


@pytest.mark.parametrize(
    ("data", "network", "message"),
    [
        (("ant", "cow"), ANIMALS, "class cow. The data has: ant, cow. The network has: ant, bee, cat"),
        (("dog", "cow", "hen"), ANIMALS, "classes dog, cow, hen. The data has: dog, cow, hen. The network"),
        (("ant", "Bee"), ANIMALS, "'Bee' and 'bee' differ in case or spaces"),
        (("ant", " bee"), ANIMALS, "differ in case or spaces"),
        (("ant", "bee"), ("0", "1"), "name them in their order with --class-names"),
        (("ant", "dog"), ("ant", "bee", "class 2"), "name all outputs of the network with --class-names"),
        (("0", "1", "2", "3"), ANIMALS, "4 classes, the network only 3"),
        # Label 1 is not the class "1" there, nor is 0 anything.
        (("0", "1", "2"), ("1", "2", "3"), "class 0"),
        (("1", "2", "3"), ANIMALS, "classes 1, 2, 3"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_lists(
    data: tuple[str, ...], network: tuple[str, ...], message: str
) -> None:
    images = ArrayDataset(np.zeros((1, 1, 8, 8), np.float32), np.zeros(1, int), data)
    with pytest.raises(EdgeBcsError) as refused:
        match(images, network)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("count", "network", "labels", "by", "told"),
    [
        (3, ANIMALS, [0, 1, 2], "position", ["0 = ant, 1 = bee, 2 = cat"]),
        (2, ANIMALS, [0, 1], "position", ["0 = ant, 1 = bee)", "lacks 1 of the network's 3 classes: cat"]),
        (3, ("0", "1", "2"), [0, 1, 2], "name", []),
        (2, ("1", "0"), [1, 0], "name", []),  # folders may be listed like that
        # As folders 0 to 10 are, in alphabetical order:
        (3, ("0", "1", "10", "2"), [0, 1, 3], "name", ["lacks 1 of the network's 4 classes: 10"]),
        (2, ("ant", "class 1"), [0, 1], "position", ["0 = ant, 1 = class 1"]),
    ],
)
def test_label_numbers_are_positions_unless_the_network_has_them_as_names(
    count: int, network: tuple[str, ...], labels: list[int], by: str, told: list[str]
) -> None:
    data = ArrayDataset(np.zeros((count, 1, 8, 8), np.float32), np.arange(count))
    matched = match(data, network)
    assert (matched.data.labels.tolist(), matched.by) == (labels, by)
    assert len(matched.notes) == len(told)
    assert all(part in note for part, note in zip(told, matched.notes, strict=True))


def test_class_folders_with_numbers_for_names_are_not_label_numbers(tmp_path: Path) -> None:
    data = open_data(folders(tmp_path, ("0", "1")), "train", (1, 8, 8))
    with pytest.raises(EdgeBcsError, match="does not know the data's classes 0, 1"):
        match(data, ANIMALS)
    assert match(data, ("1", "0")).data.labels[0] == 1


def test_names_are_compared_in_composed_form() -> None:
    data = ArrayDataset(np.zeros((2, 1, 8, 8), np.float32), np.arange(2), ("bar", DECOMPOSED))
    assert match(data, (COMPOSED, "bar")).data.labels.tolist() == [1, 0]
    both = ArrayDataset(np.zeros((2, 1, 8, 8), np.float32), np.arange(2), (COMPOSED, DECOMPOSED))
    with pytest.raises(EdgeBcsError, match="number 0 and number 1 are both"):
        match(both, None)


def test_a_label_beyond_the_datas_classes_is_refused() -> None:
    data = arrays(("bee", "cat"))
    matched = match(data, ANIMALS)
    for wrong in (-1, 2):
        data.labels = np.full(24, wrong)
        with pytest.raises(EdgeBcsError, match=f"label {wrong} is out of range: the data has 2 classes"):
            matched.data.read(np.arange(2))


def test_outputs_that_have_no_name_get_one_later_and_others_keep_theirs() -> None:
    assert completed(("ant", "bee"), 4) == ("ant", "bee", "class 2", "class 3")
    assert completed(("0", "1"), 4) == numbers(4)
    with pytest.raises(EdgeBcsError, match="'class 3'"):
        completed(("ant", "class 3"), 4)
    assert named(("ant", "bee", "class 2"), ANIMALS) == ANIMALS
    assert named(("0", "1", "2"), ANIMALS) == ANIMALS and named(None, ("ant",), 2) == ("ant", "class 1")
    for given in (("bee", "ant"), ("ant", "cow", "cat")):
        with pytest.raises(EdgeBcsError, match="it has ant, bee, class 2; given were"):
            named(("ant", "bee", "class 2"), given)
    with pytest.raises(EdgeBcsError, match="3 classes, the network only 2"):
        named(None, ANIMALS, 2)


def test_names_of_the_command_line(tmp_path: Path) -> None:
    assert given_names("ant, bee ,cat") == ANIMALS
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffant\r\nbig, red bee\n\n".encode())
    assert given_names(str(file)) == ("ant", "big, red bee")
    file.write_text("ant\n\nbee\n")
    for text, message in (
        (str(file), "number 1 is ''"),
        ("ant,ant", "must be distinct"),
        ("ant", "there is no file ant"),
        ("a" * 5000, "there is no file"),
        ("ant,", "number 1 is ''"),
    ):
        with pytest.raises(EdgeBcsError, match=message):
            given_names(text)


# Boards


def accuracy(run_folder: Path, data: Path) -> dict[str, Any]:
    result = run("evaluate", run_folder, "--data", data, "--attack", "none", "--json")
    assert result.exit_code == 0, result.output
    return {**json.loads(result.stdout), "stderr": result.stderr}


def test_a_run_is_measured_on_some_of_its_classes(trained: Path, tmp_path: Path) -> None:
    """Without the folder of label 0, every image used to be held against the label of the class before."""
    with Trainer(trained) as trainer:
        images = [pictures([name], seed=1)[0].astype(np.float32) / 255 for name in ANIMALS]
        right = [float(np.mean(trainer.predict(x) == label)) for label, x in enumerate(images)]
    assert min(right) > 0.9
    everything = accuracy(trained, trained.parent / "data")
    assert everything["accuracy"] == pytest.approx(np.mean(right)) and "lacks" not in everything["stderr"]
    some = accuracy(trained, folders(tmp_path / "some", ("bee", "cat")))
    assert some["accuracy"] == pytest.approx(np.mean(right[1:])) and some["samples"] == 24
    assert some["missing_classes"] == ["ant"] and some["classes"][:3] == list(ANIMALS)
    assert (
        some["matched_by"] == "name" and some["stderr"].count("lacks 1 of the network's 3 classes: ant") == 1
    )
    # The same names in another order, as an archive of another maker might have them.
    with Trainer(trained) as trainer:
        turned = trainer.evaluate(arrays(ANIMALS, order=("cat", "ant", "bee")), 0)
    assert turned["accuracy"] == pytest.approx(np.mean(right))


def test_training_on_some_of_the_classes_trains_them_and_no_others(trained: Path, tmp_path: Path) -> None:
    """Beside a training on arrays of the same images with the network's own labels."""
    data = folders(tmp_path / "some", ("bee", "cat"))
    options = ("--data", data, "--steps", 3, "--no-augment", "--eval-samples", 0, "-o", tmp_path / "run")
    result = run("finetune", trained, *options)
    assert result.exit_code == 0 and result.stderr.count("lacks 1 of the network's 3 classes: ant") == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["missing_classes"] == ["ant"] and report["matched_by"] == "name"
    images, labels = pictures(("bee", "cat"), seed=0)
    own = ArrayDataset(images.astype(np.float32) / 255, labels + 1, ANIMALS)
    with Trainer(trained) as trainer:
        trainer.fit(own, steps=3, augment=False, progress=False)
        expected = trainer.state()
    with Trainer(tmp_path / "run") as trainer:
        assert all(np.array_equal(trainer.state()[name], expected[name]) for name in expected)


def test_a_new_class_is_refused_and_nothing_is_lost(trained: Path, tmp_path: Path) -> None:
    data = folders(tmp_path / "data", ("bee", "dog"))
    result = run("finetune", trained, "--data", data, "-o", tmp_path / "run")
    assert result.exit_code == 1
    assert "The data has: bee, dog. The network has: ant, bee, cat, class 3" in result.stderr
    assert not (tmp_path / "run").exists()
    before = (trained / "manifest.json").read_bytes()
    assert run("evaluate", trained, "--data", data).exit_code == 1
    resumed = run("finetune", trained.parent / "artifact", "--data", data, "--resume", "-o", trained)
    assert resumed.exit_code == 1 and "does not know the data's class dog" in resumed.stderr
    assert (trained / "manifest.json").read_bytes() == before


def test_the_service_of_a_board_names_the_file_of_names(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    common = ("finetune", "camera", "--data", "digits", "--print-service", "--class-names")
    assert f"--class-names {tmp_path / 'names.txt'} " in run(*common, "names.txt").stdout
    assert "--class-names ant,bee " in run(*common, "ant,bee").stdout


def test_an_output_gets_its_name_later(trained: Path, tmp_path: Path) -> None:
    data = folders(tmp_path / "data", ("bee", "dog"))
    options = ("--data", data, "--steps", 1, "--eval-samples", 0, "-o", tmp_path / "run")
    result = run("finetune", trained, *options, "--class-names", "ant,bee,cat,dog", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["missing_classes"] == ["ant", "cat"]
    named_now = Artifact.read(tmp_path / "run").classes
    assert named_now is not None and named_now[:5] == (*ANIMALS, "dog", "class 4")
    renamed = run("finetune", trained, *options[:-1], tmp_path / "other", "--class-names", "ant,dog,bee")
    assert renamed.exit_code == 1 and "the network's classes have other names" in renamed.stderr


def test_an_artifact_without_names_keeps_working_and_says_so(tiny_artifact: Make, tmp_path: Path) -> None:
    """Once. One that was trained before there were names: labels are positions, as they were."""
    x, y = pictures(ANIMALS)
    with Trainer(tiny_artifact()) as trainer:
        trainer.step(x.astype(np.float32) / 255, y)
        trainer.save(tmp_path / "old")
    assert "classes" not in json.loads((tmp_path / "old" / "manifest.json").read_text())
    data = folders(tmp_path / "data", ("bee", "cat"))
    told = "no class names stored, so labels are matched by position (0 = bee, 1 = cat)"
    measured = accuracy(tmp_path / "old", data)
    assert measured["stderr"].count(told) == 1 and measured["classes"] is None
    assert measured["matched_by"] == "position"
    given = run("evaluate", tmp_path / "old", "--data", data, "--class-names", "ant,bee,cat", "--json")
    assert json.loads(given.stdout)["missing_classes"] == ["ant"] and "stored" not in given.stderr
    options = ("--data", data, "--steps", 1, "--eval-samples", 2, "--eval-steps", 1, "-o", tmp_path / "run")
    refused = run("finetune", tmp_path / "old", *options)
    assert refused.exit_code == 1 and not (tmp_path / "run").exists()
    assert "the data has only 2 classes (bee, cat): which outputs they are is not known" in refused.stderr
    result = run("finetune", tmp_path / "old", *options, "--class-names", "ant,bee,cat")
    assert result.exit_code == 0, result.output
    assert (Artifact.read(tmp_path / "run").classes or ())[:4] == (*ANIMALS, "class 3")


def test_a_training_that_began_before_there_were_names_goes_on(tiny_artifact: Make, tmp_path: Path) -> None:
    data, manifest = arrays(("bee", "cat")), tmp_path / "old" / "manifest.json"
    with Trainer(tiny_artifact()) as trainer:
        trainer.fit(data, steps=2, progress=False, save=tmp_path / "old")
    content = json.loads(manifest.read_text())
    assert content.pop("classes")[:2] == ["bee", "cat"]
    manifest.write_text(json.dumps(content))
    told = pytest.warns(EdgeBcsWarning, match=r"matched by position \(0 = bee, 1 = cat")
    with told, Trainer.resume(tmp_path / "old") as resumed:
        assert resumed.classes is None
        assert resumed.fit(data, steps=3, progress=False)["step"] == 3
    with Trainer(tmp_path / "old") as other, pytest.raises(EdgeBcsError, match="only 2 classes"):
        other.fit(data, steps=1, progress=False)


def test_a_run_gets_its_names_when_they_are_known_and_no_others(tiny_artifact: Make, tmp_path: Path) -> None:
    with Trainer(tiny_artifact()) as trainer:
        trainer.save(tmp_path / "run")
        assert Artifact.read(tmp_path / "run").classes is None
        trainer.fit(arrays(ANIMALS), steps=1, progress=False, save=tmp_path / "run")
        assert trainer.classes is not None and trainer.classes[:3] == ANIMALS
    assert Artifact.read(tmp_path / "run").classes == trainer.classes
    with Trainer(tiny_artifact(), class_names=("cow", "dog")) as other:
        with pytest.raises(EdgeBcsError, match="a run with other classes: it has ant, bee, cat"):
            other.save(tmp_path / "run")
        with pytest.raises(EdgeBcsError, match="does not know"):
            other.fit(arrays(ANIMALS), steps=1, progress=False)
    with pytest.raises(EdgeBcsError, match="have other names"):
        Trainer(tmp_path / "run", class_names=("cow", "dog"))
    with Trainer.resume(tmp_path / "run") as resumed:
        assert resumed.classes == trainer.classes
        with pytest.raises(EdgeBcsError, match="does not know the data's class dog"):
            resumed.fit(arrays(("ant", "bee", "dog")), progress=False)


def test_a_signed_artifact_stays_as_it_is_and_its_run_has_the_names(
    tiny_artifact: Make, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    from edge_bcs.runtime import archive, signature
    from helpers.signing import make_key

    private, public = make_key(tmp_path, "maker")
    folder = tmp_path / "camera"
    shutil.copytree(tiny_artifact(), folder)
    content = (folder / "manifest.json").read_bytes()
    (folder / archive.SIGNATURE).write_bytes(signature.sign(content, signature.private_key(private)))
    file = tmp_path / "camera.tar"
    with file.open("wb") as stream:
        archive.pack(folder, stream, "camera")
    sealed = file.read_bytes()
    data = folders(tmp_path / "data", ANIMALS)
    options = ("--data", data, "--trust-key", public, "--eval-samples", 0, "-o", tmp_path / "run")
    assert run("finetune", file, *options, "--steps", 1).exit_code == 0
    assert file.read_bytes() == sealed and Artifact.read(file, [public]).classes is None
    resumed = run("finetune", file, *options, "--steps", 2, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert (Artifact.read(tmp_path / "run").classes or ())[:3] == ANIMALS


# What files say


@pytest.mark.parametrize(
    "value",
    [
        None, "ab", {}, [], ["a"], ["a", "b", "c"], ["a", 1], ["a", None], ["a", "a"], ["a", ""], ["a", " "],
        ["a", "b\n"], ["a", "\x1b[2J"], ["a", "\ud800"], ["a", "b" * 256], ["a", "\u202eb"],
        [COMPOSED, DECOMPOSED], [["a"], "b"],
    ],
)  # fmt: skip
def test_names_in_a_manifest_and_in_a_checkpoint_are_checked(value: Any, tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match=r"classes|control characters"):
        Artifact.read(write_artifact(tmp_path / "artifact", lambda d: d.update(classes=value)))
    if value not in (["a"], ["a", "b", "c"]):  # how many there must be, metadata does not say
        with pytest.raises(EdgeBcsError, match="classes"):
            classes.parse_names(json.dumps(value))
    with pytest.raises(EdgeBcsError, match="not valid JSON"):
        classes.parse_names("[" * 100_000)


def test_names_that_are_fine(tmp_path: Path) -> None:
    names = ["می\u200cخواهم", "b, c"]
    artifact = Artifact.read(write_artifact(tmp_path / "a", lambda d: d.update(classes=names)))
    assert artifact.classes == tuple(names)
    assert Artifact.read(write_artifact(tmp_path / "b")).classes is None
    shown = run("inspect", tmp_path / "a")
    assert f"classes         {names[0]}, b, c" in shown.stdout
    assert json.loads(run("inspect", tmp_path / "a", "--json").stdout)["classes"] == names
    assert json.loads(run("inspect", tmp_path / "b", "--json").stdout)["classes"] is None
    assert "matched by position" in run("inspect", tmp_path / "b").stdout


def test_a_damaged_list_in_a_run_is_not_written_over(tmp_path: Path) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    from helpers.artifacts import state

    write_run(tmp_path / "run", artifact, state(), {"step": "1", "seed": "7"})
    file = tmp_path / "run" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "classes": 3}))
    before = file.read_bytes()
    with pytest.raises(EdgeBcsError, match="must be a list of names"):
        write_run(tmp_path / "run", artifact, state(), {"step": "2", "seed": "7"}, ("a", "b"))
    assert file.read_bytes() == before
