"""What a network answered: counted against numbers by hand, and as a page that a browser shows."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import run

from edge_bcs.cli.answers_page import page, png
from edge_bcs.core.answers import Answers, Batch, softmax

Make = Callable[..., Path]
Image = pytest.importorskip("PIL.Image")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
REPORT = {"path": "run", "data": "photos", "split": "test", "attack": "pgd", "steps": 20, "eps": 8 / 255,
          "accuracy": 0.5, "robust_accuracy": 0.25, "samples": 6}  # fmt: skip


def test_softmax_against_its_definition() -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, -1000.0], [-5.0, -5.0]], np.float32)
    np.testing.assert_allclose(softmax(logits), np.array([[0.25, 0.75], [1, 0], [0.5, 0.5]]), rtol=1e-6)
    assert softmax(logits).dtype == np.float32


def counted(names: tuple[str, ...] = ("ant", "bee", "cat"), keep: int = 2) -> Answers:
    """Six images in two batches: ants 2 of 3 right, the bee wrong, cats 1 of 2 right; one robust each."""
    answers = Answers(names, keep)
    labels = np.array([0, 0, 0, 1, 2, 2])
    logits = np.log(
        np.array([[8, 1, 1], [6, 2, 2], [3, 4, 3], [7, 1, 2], [1, 1, 8], [1, 8, 1]], np.float32) / 10
    )
    images = np.arange(6, dtype=np.float32)[:, None, None, None] * np.full((3, 4, 5), 0.1, np.float32)
    robust = np.array([True, False, False, False, True, False])
    for part in (slice(0, 4), slice(4, 6)):
        places = 10 + np.arange(6)[part]
        answers.add(Batch(places, images[part], labels[part], logits[part], robust[part]))
    return answers


def test_counts_against_numbers_by_hand() -> None:
    answers = counted()
    assert answers.confusion.tolist() == [[2, 1, 0], [1, 0, 0], [0, 1, 1]]
    assert answers.per_class() == [
        {"class": "ant", "samples": 3, "accuracy": 2 / 3, "robust_accuracy": 1 / 3},
        {"class": "bee", "samples": 1, "accuracy": 0.0, "robust_accuracy": 0.0},
        {"class": "cat", "samples": 2, "accuracy": 0.5, "robust_accuracy": 0.5},
    ]
    assert [tuple(pair.values()) for pair in answers.confused()] == [
        ("ant", "bee", 1), ("bee", "ant", 1), ("cat", "bee", 1),
    ]  # fmt: skip
    # Two of the three mistakes are kept: the bee and the cat, whose own classes got a tenth each.
    assert [(one.place, one.label, one.answer) for one in answers.worst] == [(13, 1, 0), (15, 2, 1)]
    assert answers.worst[0].share == pytest.approx(0.1) and answers.worst[1].wrong_share == pytest.approx(0.8)
    assert float(answers.worst[1].image[0, 0, 0]) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_none(value: float) -> None:
    """Not the first class: of two ants one is without an answer, and so is the bee."""
    answers = Answers(("ant", "bee"))
    logits = np.array([[2, 1], [value, 0], [0, value]], np.float32)
    robust = np.array([True, False, False])
    answers.add(Batch(np.arange(3), np.zeros((3, 3, 4, 5), np.float32), np.array([0, 0, 1]), logits, robust))
    assert [(one["class"], one["samples"], one["accuracy"]) for one in answers.per_class()] == [
        ("ant", 2, 0.5), ("bee", 1, 0.0),
    ]  # fmt: skip
    assert answers.confused() == []
    found = Page(page(REPORT, answers, "{}.jpg".format))
    assert found.captions == ["ant, without an answer1.jpg", "bee, without an answer2.jpg"]
    assert found.rows["matrix"][1:] == [["ant", "1", "0"], ["bee", "0", "0"]]


def test_a_picture_is_a_png_with_these_pixels() -> None:
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        image = rng.random((channels, 7, 5), np.float32)
        found = np.asarray(Image.open(io.BytesIO(png(image))))
        expected = np.rint(image * 255).astype(np.uint8)
        assert (found == (expected[0] if channels == 1 else expected.transpose(1, 2, 0))).all()


class Page(HTMLParser):
    """Texts of cells by the class of their table, captions, pictures, and whatever would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.pictures: list[bytes] = []
        self.loaded: list[str] = []
        self.captions: list[str] = []
        self.open: list[str] = []
        self._table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = dict(attrs)
        if tag == "table":
            self._table = fields["class"] or ""
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            self.rows[self._table][-1].append("")
        elif tag == "figcaption":
            self.captions.append("")
        for name in ("src", "href", "srcset", "action"):
            value = fields.get(name) or ""
            if value.startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode(value.split(",")[1]))
            elif value:
                self.loaded.append(value)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[self._table][-1][-1] += data
        if "figcaption" in self.open:
            self.captions[-1] += data


def test_the_page_says_what_was_counted_and_loads_nothing() -> None:
    text = page(REPORT, counted(), "b/{}.jpg".format)
    found = Page(text)
    assert found.open == [] and found.loaded == [] and "<script" not in text and "url(" not in text
    assert "default-src 'none'" in text
    head, *rows = found.rows["matrix"]
    assert head == ["", "ant", "bee", "cat"]
    assert rows == [["ant", "2", "1", "0"], ["bee", "1", "0", "0"], ["cat", "0", "1", "1"]]
    assert found.rows["list classes"] == [
        ["class", "images", "clean", "under attack"],
        ["bee", "1", "0.0 %", "0.0 %"], ["cat", "2", "50.0 %", "50.0 %"], ["ant", "3", "66.7 %", "33.3 %"],
    ]  # fmt: skip
    assert found.captions[0] == "bee 10.0 %, taken for ant 70.0 %b/13.jpg"
    assert len(found.pictures) == 2
    assert (np.asarray(Image.open(io.BytesIO(found.pictures[0]))) == round(0.3 * 255)).all()
    assert "PGD-20, ε = 8/255" in text


def test_names_of_classes_and_files_cannot_break_out_of_the_page() -> None:
    names = ("<script>alert(1)</script>", 'b"onerror="x', "c&amp;\x1b[2J")
    text = page({**REPORT, "path": "<img src=x>"}, counted(names), "<b>{}".format)
    found = Page(text)
    assert found.open == [] and found.loaded == [] and "<script" not in text and "\x1b" not in text
    assert [row[0] for row in found.rows["matrix"][1:]] == [*names[:2], "c&amp;\\x1b[2J"]


def test_many_classes_have_no_table_of_all_against_all() -> None:
    answers = Answers([f"class {n}" for n in range(50)])
    labels = np.arange(50)
    logits = np.eye(50, dtype=np.float32)[(labels + 1) % 50]
    answers.add(Batch(labels, np.zeros((50, 1, 2, 2), np.float32), labels, logits))
    found = Page(page(REPORT, answers, str))
    assert "matrix" not in found.rows and len(found.rows["list pairs"]) == 41
    assert found.rows["list classes"][0] == ["class", "images", "clean"]


@pytest.mark.parametrize("engine", ["board", "torch"])
def test_evaluate_writes_it_and_the_numbers_agree(
    tiny_artifact: Make, digits: Path, tmp_path: Path, engine: str
) -> None:
    from edge_bcs import sparsify
    from edge_bcs.checkpoint import save_checkpoint

    file = tmp_path / "answers.html"
    path: Any = tiny_artifact()
    more: tuple[object, ...] = ("--attack-steps", 2)
    if engine == "torch":
        import edge_bcs

        network = edge_bcs.models.resnet18(num_classes=10, width=0.0625, input_channels=1, input_size=8)
        path = tmp_path / "checkpoint.safetensors"
        save_checkpoint(path, sparsify(network, sparsity=0.5, seed=0))
    common = ("evaluate", path, "--data", digits, *more)
    result = run(*common, "--html", file, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["engine"] == engine
    per_class = report["per_class"]
    assert sum(one["samples"] for one in per_class) == report["samples"] == 16
    for one, whole in (("accuracy", "accuracy"), ("robust_accuracy", "robust_accuracy")):
        mean = sum(each[one] * each["samples"] for each in per_class) / 16
        assert mean == pytest.approx(report[whole])
    wrong = sum(pair["images"] for pair in report["confused"])
    assert wrong == round(16 * (1 - report["accuracy"])) > 0
    found = Page(file.read_text())
    assert len(found.pictures) == len(found.captions) == min(wrong, 24)
    counts = [[int(cell) for cell in row[1:]] for row in found.rows["matrix"][1:]]
    assert sum(map(sum, counts)) == 16 and sum(counts[n][n] for n in range(len(counts))) == 16 - wrong
    assert run(*common, "--html", file).exit_code == 0  # its own page is written over
    file.write_text("somebody's notes")
    refused = run(*common, "--html", file)
    assert refused.exit_code == 1 and "is not a page of `edge-bcs evaluate --html`" in refused.stderr
    counts_file = ("--resume", tmp_path / "counts.json")
    both = run(*common, "--html", tmp_path / "b.html", *counts_file)
    assert both.exit_code == 1 and "--html needs every answer" in both.stderr


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz"])
def test_mistakes_have_the_names_of_their_files(tiny_artifact: Make, tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(0)
    for name in "0123":
        (tmp_path / "photos" / "test" / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (9, 12), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "test" / name / f"of {name}.png")
    photos = tmp_path / "photos"
    if form != "folder":
        photos = tmp_path / f"packed.{form}"
        with tarfile.open(photos, "w:gz" if form == "tar.gz" else "w") as archive:
            archive.add(tmp_path / "photos", "photos")
    file = tmp_path / "answers.html"
    names = ",".join("0123456789")
    data = ("--data", photos, "--class-names", names, "--attack", "none")
    result = run("evaluate", tiny_artifact(), *data, "--limit", 4, "--html", file)
    assert result.exit_code == 0, result.output
    captions = Page(file.read_text()).captions
    assert len(captions) >= 3  # an untrained network answers one class
    for caption in captions:
        label = caption[0]
        assert caption.endswith(f"test/{label}/of {label}.png")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to show the page with")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it(tmp_path: Path, width: int) -> None:
    assert BROWSER is not None
    names = ("a name that is long enough to need more than the width of a phone", "bee", "cat")
    (tmp_path / "page.html").write_text(page(REPORT, counted(names), "b/{}.jpg".format), encoding="utf-8")
    look = (
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "const images = [...d.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width]);"
        "const shown = e => e.checkVisibility() && e.getBoundingClientRect().height > 8;"
        "const cells = [...d.querySelectorAll('.matrix td')].filter(shown).map(e => e.innerText);"
        "document.body.append('said ' + JSON.stringify([d.documentElement.scrollWidth, images, cells,"
        "d.body.innerText]) + ' end'); }</script>"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(f"<meta charset=utf-8><iframe src='page.html' width={width} height=900></iframe>{look}")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    result = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120)
    said = re.search(r"</script>\s*said (.*?) end", result.stdout)
    assert said, result.stdout[-500:]
    scroll, images, cells, text = json.loads(html.unescape(said[1]))
    assert scroll <= width  # nothing to scroll sideways, on a phone neither
    assert len(images) == 2 and all(natural == 5 and shown > 100 for natural, shown in images)
    assert cells == ["2", "1", "0", "1", "0", "0", "0", "1", "1"]  # what is taken for what
    # What can be read, as the browser lays it out: every class, and the files of the two mistakes.
    assert all(" ".join(text.split()).count(name) >= 3 for name in names)
    assert "b/13.jpg" in text and "b/15.jpg" in text
