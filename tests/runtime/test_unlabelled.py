"""Robust self-training on the board: what images without labels are taken for, and what they do to a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime import unlabelled as self_training
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.course import Course, packed, unpacked
from edge_bcs.runtime.unlabelled import Laps
from helpers.unlabelled import Array, answering, bits, digits, middling

from edge_bcs import EdgeBcsError, Unlabelled
from edge_bcs.data.dataset import ArrayDataset

Make = Callable[..., Path]
QUIET: dict[str, Any] = {"progress": False, "augment": False}


class Seen(ArrayDataset):
    """Images that remember in which pass which of them were read to be trained on."""

    def __init__(self, images: Array, labels: Array | None = None) -> None:
        super().__init__(images, np.zeros(len(images), np.int64) if labels is None else labels)
        self.read_in: list[tuple[int, int]] = []

    def read(self, positions: Array, **how: Any) -> Any:
        if how:
            self.read_in += [(how["epoch"], int(position)) for position in positions]
        return super().read(positions, **how)


# One step


def log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


@pytest.mark.parametrize("objective", ["trades", "rst"])
def test_an_image_without_a_label_takes_part_in_the_second_term_alone(
    tiny_artifact: Make, objective: str
) -> None:
    x, y = digits(0, 4)
    y[1::2] = -1
    adversarial = np.empty_like(x)

    def keep(ran: Any) -> None:
        if ran.graph == "training":
            adversarial[...] = trainer.buffers["adversarial"]

    with Trainer(tiny_artifact(objective=objective), seed=3) as trainer:
        trainer.learning_rate = trainer.weight_decay = 0.0
        trainer.on_run = keep
        found = trainer.step(x, y)
        one, other = log_softmax(trainer.logits(x)), log_softmax(trainer.logits(adversarial))
        beta = trainer.artifact.objective.beta
    kl = (np.exp(one) * (one - other)).sum(axis=1)
    assert beta == 6 and kl.min() > 1e-6
    loss = (beta * kl.sum() - one[0, y[0]] - one[2, y[2]]) / 4
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy"] == (one[::2].argmax(axis=1) == y[::2]).mean()
    assert found["robust_accuracy"] == (other[::2].argmax(axis=1) == y[::2]).mean()


def test_a_batch_without_labels_has_no_accuracy(tiny_artifact: Make) -> None:
    with Trainer(tiny_artifact(objective="trades"), seed=3) as trainer:
        found = trainer.step(digits(0, 4)[0], np.full(4, -1))
    assert set(found) == {"loss"}


@pytest.mark.parametrize("objective", ["natural", "at", "mixed", "mart"])
def test_losses_with_labels_alone_refuse_an_image_without(tiny_artifact: Make, objective: str) -> None:
    with Trainer(tiny_artifact(objective=objective)) as trainer:
        before = bits(trainer.state())
        with pytest.raises(EdgeBcsError, match=r"label -1 is out of range \(image 2 of the batch\)"):
            trainer.step(digits(0, 3)[0], np.array([0, 1, -1]))
        assert bits(trainer.state()) == before


def test_nothing_is_measured_on_images_without_labels(tiny_artifact: Make) -> None:
    class Bare(ArrayDataset):
        def read(self, positions: Array, **how: Any) -> Any:
            return super().read(positions, **how)[0], np.full(len(positions), -1)

    with Trainer(tiny_artifact(objective="trades")) as trainer, pytest.raises(EdgeBcsError, match="label -1"):
        trainer.evaluate(Bare(*digits(0, 4)), attack_steps=0)


# What an epoch is


def test_both_kinds_come_up_evenly(tiny_artifact: Make) -> None:
    """Eight labelled and 24 unlabelled images, four of each in a batch: six steps, in which every unlabelled
    image is seen once and every labelled one in three passes; in the second epoch in three others."""
    labelled, unlabelled = Seen(*digits(0, 8)), Seen(digits(8, 32)[0])
    lines: list[dict[str, Any]] = []
    with Trainer(tiny_artifact(objective="trades"), seed=3) as trainer:
        found = trainer.fit(
            labelled, epochs=2, batch_size=8, unlabelled=unlabelled, on_step=lines.append, **QUIET
        )
    assert found["steps"] == 12 and [line["epoch"] for line in lines] == [0] * 6 + [1] * 6
    assert sorted(labelled.read_in) == [(lap, place) for lap in range(6) for place in range(8)]
    assert sorted(unlabelled.read_in) == [(lap, place) for lap in range(2) for place in range(24)]
    assert unlabelled.read_in[:24] != sorted(unlabelled.read_in[:24])
    assert [line["unlabelled"] for line in lines] == [4] * 12
    assert ["pseudo_labels" in line for line in lines] == ([True] + [False] * 5) * 2


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "batch", "share", "steps", "places"),
    [
        (64, 64, 16, 0.5, 8, 8),
        (64, 8, 16, 0.5, 8, 8),  # a pass over the labelled ones
        (8, 64, 16, 0.25, 16, 4),
        (9, 64, 16, 0.75, 6, 12),
        (64, 3, 16, 0.5, 5, 3),  # fewer than there are places
        (64, 64, 2, 0.01, 64, 1),  # at least one place
        (64, 64, 2, 0.99, 64, 1),  # but never all
        (64, 0, 16, 0.5, 4, 0),
    ],
)
def test_the_places_of_a_batch_and_the_steps_of_an_epoch(
    labelled: int, unlabelled: int, batch: int, share: float, steps: int, places: int
) -> None:
    course = Course(0, 0, batch, labelled, 1, 0.1, unlabelled=unlabelled, unlabelled_share=share)
    assert (course.steps_per_epoch, course.unlabelled_places) == (steps, places)


def test_passes_are_shuffled_anew_and_split_by_nothing() -> None:
    laps = Laps(ArrayDataset(np.zeros((7, 1, 2, 2), np.float32), np.zeros(7, np.int64)), 3)
    whole = laps.items(0, 21)
    assert whole[0].tolist() == [0] * 7 + [1] * 7 + [2] * 7
    orders = whole[1].reshape(3, 7).tolist()
    assert all(sorted(order) == list(range(7)) for order in orders) and orders[0] != orders[1] != orders[2]
    parts = [laps.items(first, 3) for first in range(0, 21, 3)]
    for number in (0, 1):
        np.testing.assert_array_equal(np.concatenate([part[number] for part in parts]), whole[number])


def test_both_kinds_are_spread_over_the_micro_batches(tiny_artifact: Make) -> None:
    """Statistics of a micro-batch are then of both."""
    labelled, unlabelled = Seen(*digits(0, 6)), Seen(digits(8, 14)[0])
    sizes: list[tuple[int, int]] = []

    def note(ran: Any) -> None:
        if ran.graph == "training":
            sizes.append((len(labelled.read_in), len(unlabelled.read_in)))

    with Trainer(tiny_artifact(objective="trades"), seed=3) as trainer:
        trainer.on_run = note
        trainer.fit(labelled, steps=1, batch_size=12, unlabelled=unlabelled, **QUIET)
    assert sizes == [(2, 2), (4, 4), (6, 6)]


# What they are taken for


def test_only_sure_answers_are_labels(tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight images every other one is answered with exactly the confidence, as the class of its place."""
    answering(monkeypatch, lambda n: (n % 8, 0.75 if n % 2 else 0.7499))
    labelled, unlabelled = Seen(*digits(0, 8)), Seen(digits(8, 16)[0])
    labels: list[int] = []
    lines: list[dict[str, Any]] = []

    def note(ran: Any) -> None:
        if ran.graph == "training":
            labels.extend(trainer.buffers["labels"][: ran.images].tolist())

    with Trainer(tiny_artifact(objective="natural"), seed=3) as trainer:
        trainer.on_run = note
        more = Unlabelled(unlabelled, confidence=0.75)
        found = trainer.fit(labelled, epochs=1, batch_size=8, unlabelled=more, on_step=lines.append, **QUIET)
    assert sorted(place for _, place in unlabelled.read_in) == [1, 3, 5, 7]  # the others are never read
    assert sorted(labels) == sorted([*labelled.labels.tolist(), 1, 3, 5, 7])
    assert sum(line["pseudo_labelled"] for line in lines) == 4 == sum(line["unlabelled"] for line in lines)
    summary = {"images": 8, "labelled": 4, "classes": {"1": 1, "3": 1, "5": 1, "7": 1}}
    assert lines[0]["pseudo_labels"] == summary and found["unlabelled"] == {**summary, "epoch": 0}


def test_the_others_take_part_without_a_label_where_they_can(
    tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda n: (n % 8, 1.0 if n % 2 else 0.5))
    labels: list[int] = []

    def note(ran: Any) -> None:
        if ran.graph == "training":
            labels.extend(trainer.buffers["labels"][: ran.images].tolist())

    given = digits(0, 8)
    for beta, kept in ((6.0, [-1] * 4), (0.0, [])):  # without a second term they would do nothing
        labels.clear()
        with Trainer(tiny_artifact(objective="trades", beta=beta), seed=3) as trainer:
            trainer.on_run = note
            trainer.fit(given, epochs=1, batch_size=8, unlabelled=digits(8, 16)[0], **QUIET)
        assert sorted(labels) == sorted([*given[1].tolist(), 1, 3, 5, 7, *kept])


@pytest.mark.parametrize("objective", ["natural", "at", "mart"])
def test_where_none_is_sure_the_labelled_ones_are_left(
    tiny_artifact: Make, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled, unlabelled = Seen(*digits(0, 8)), Seen(digits(8, 16)[0])
    sizes: list[int] = []

    def note(ran: Any) -> None:
        if ran.graph == "training":
            sizes.append(ran.images)

    more = Unlabelled(unlabelled, confidence=1)
    with Trainer(tiny_artifact(objective=objective), seed=3) as trainer:
        trainer.on_run = note
        found = trainer.fit(labelled, epochs=1, batch_size=8, unlabelled=more, augment=False)
    assert sizes == [4, 4] and not unlabelled.read_in
    assert found["unlabelled"]["labelled"] == 0
    said = capsys.readouterr().err
    assert "unlabelled images: 0 of 8 (0 %) have a label, at 1 or above; all are left out of this" in said


def test_they_are_labelled_anew_before_each_epoch(tiny_artifact: Make) -> None:
    """By the network as it is then, from images as they are."""
    x, artifact = digits(8, 40)[0], tiny_artifact(objective="natural")
    confidence = middling(artifact, x)
    expected: list[dict[str, int]] = []
    lines: list[dict[str, Any]] = []

    def answer() -> None:
        shares = trainer.probabilities(x)
        sure = shares.argmax(axis=1)[shares.max(axis=1) >= np.float32(confidence)]
        expected.append({str(n): count for n, count in enumerate(np.bincount(sure)) if count})

    def note(line: dict[str, Any]) -> None:
        lines.append(line)
        if line["done"] % 4 == 0:
            answer()

    with Trainer(artifact, seed=3) as trainer:
        answer()
        more = Unlabelled(x, confidence=confidence)
        trainer.fit(digits(0, 8), epochs=3, batch_size=16, unlabelled=more, progress=False, on_step=note)
    told = [line["pseudo_labels"]["classes"] for line in lines if "pseudo_labels" in line]
    assert told == expected[:3] and sum(told[0].values()) == 16 and told[0] != told[1]


def test_an_answer_that_is_not_finite_is_sure_of_nothing(tiny_artifact: Make) -> None:
    x = digits(0, 8)[0]
    with Trainer(tiny_artifact(objective="natural")) as trainer:
        shares = trainer.probabilities(x)
        found = self_training.answers(trainer, x)
        assert found[0].tolist() == trainer.predict(x).tolist()
        np.testing.assert_array_equal(found[1], shares.max(axis=1))
        trainer.buffers["dense.value"][...] = np.nan
        assert (self_training.answers(trainer, x)[1] == -1).all()


def test_their_weight_is_theirs_alone(tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda n: (n, 1.0))
    given, more = digits(0, 4), digits(8, 12)[0]
    with Trainer(tiny_artifact(objective="natural"), seed=3) as trainer:
        own = -log_softmax(trainer.logits(given[0]))[np.arange(4), given[1]]
        pseudo = -log_softmax(trainer.logits(more))[np.arange(4), np.arange(4)]
        used = Unlabelled(more, weight=0.25)
        found = trainer.fit(given, epochs=1, batch_size=8, unlabelled=used, **QUIET)
    assert found["loss"] == pytest.approx((own.sum() + 0.25 * pseudo.sum()) / 8, rel=1e-5)


def test_of_very_many_classes_those_with_the_most_are_named(
    tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of metrics stays short enough to be read again."""
    monkeypatch.setattr(self_training, "MOST_NAMED", 2)
    answering(monkeypatch, lambda n: ((3, 5, 5, 7, 9, 9)[n], 1.0))
    with Trainer(tiny_artifact(objective="natural"), seed=3) as trainer:
        found = trainer.fit(digits(0, 8), steps=1, unlabelled=digits(8, 14)[0], **QUIET)
    assert found["unlabelled"] == {"images": 6, "labelled": 6, "classes": {"5": 2, "9": 2}, "epoch": 0}


def test_uneven_and_missing_classes_are_told(
    tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, lambda n: (1 if n < 18 else 0, 0.9))
    with Trainer(tiny_artifact(objective="natural"), seed=3) as trainer:
        trainer.fit(digits(0, 16), steps=1, unlabelled=digits(16, 36)[0], augment=False)
    said = capsys.readouterr().err
    assert "unlabelled images: 20 of 20 (100 %) have a label, at 0.9 or above; " in said
    assert "unevenly: 0 2, 1 18 images; none is 2, 3, 4, 5, 6, 7, 8, 9" in said


# The same whatever happens


@pytest.mark.parametrize("labels", [[], [-1], [9, -1], [127, -1], [128], [40_000, 0, -1]])
def test_pseudo_labels_are_kept_in_as_many_bytes_as_they_need(labels: list[int]) -> None:
    text = packed(np.array(labels, np.int64))
    assert unpacked(text).tolist() == labels
    size = 1 if max(labels, default=0) < 128 else 2 if max(labels) < 2**15 else 4
    assert text.startswith(f"i{size}:") and len(text) <= 3 + 4 * -(-size * len(labels) // 3)


@pytest.mark.parametrize("train", ["all", "head"])
def test_labelling_stays_inside_the_plan(tiny_artifact: Make, train: str) -> None:
    artifact = Artifact.read(tiny_artifact(objective="trades", train=train))
    with Trainer(artifact, memory=artifact.predicted_peak_bytes, seed=3) as trainer:
        found = trainer.fit(digits(0, 8), steps=2, unlabelled=digits(8, 40)[0], progress=False)
        assert found["peak_bytes"] == artifact.predicted_peak_bytes


def test_held_out_images_are_labelled_ones(tiny_artifact: Make, tmp_path: Path) -> None:
    given, more = digits(0, 16), digits(16, 24)[0]
    trained: list[bytes] = []

    def note(ran: Any) -> None:
        if ran.graph == "training":
            trained.extend(image.tobytes() for image in trainer.buffers["input"][: ran.images])

    with Trainer(tiny_artifact(objective="natural"), seed=3) as trainer:
        trainer.on_run = note
        trainer.fit(
            given, epochs=1, batch_size=8, validation=0.5, unlabelled=Unlabelled(more, confidence=0),
            save=tmp_path / "run", **QUIET,
        )  # fmt: skip
    assert len(set(trained) & {image.tobytes() for image in given[0]}) == 8
    assert sorted(set(trained) & {image.tobytes() for image in more}) == sorted(x.tobytes() for x in more)


# What cannot be meant


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"confidence": 1.5}, "confidence must be a number from 0 to 1, not 1.5"),
        ({"share": 0}, "the share of unlabelled images must lie between 0 and 1, not be 0"),
        ({"share": 1.0}, "the share of unlabelled images must lie between 0 and 1, not be 1.0"),
        ({"weight": 0}, "the weight of unlabelled images must be above 0"),
        ({"weight": -1}, "the weight of unlabelled images must be a number of at least 0, not -1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EdgeBcsError, match=sentence):
        Unlabelled(np.zeros((1, 1, 8, 8), np.float32), **options)


@pytest.mark.parametrize(
    ("more", "options", "sentence"),
    [
        (np.zeros((0, 1, 8, 8), np.float32), {}, "there is no unlabelled image"),
        (np.zeros((4, 3, 8, 8), np.float32), {}, r"takes \(1, 8, 8\) images; the unlabelled ones are \(3"),
        (np.zeros((4, 8, 8), np.float32), {}, r"images must be floats in \[0, 1\] or uint8"),
        (7, {}, "data must be"),
        ("nowhere", {}, "nowhere does not exist; unlabelled images are a folder of photographs"),
        (np.zeros((4, 1, 8, 8), np.float32), {"batch_size": 1}, "a batch of 1 image has no place for an unl"),
        (np.full((4, 1, 8, 8), np.nan, np.float32), {}, "the unlabelled image 0 has a pixel that is not a f"),
    ],
)
def test_images_that_cannot_be_used_are_refused(
    tiny_artifact: Make, more: Any, options: dict[str, Any], sentence: str
) -> None:
    with Trainer(tiny_artifact()) as trainer:
        with pytest.raises(EdgeBcsError, match=sentence):
            trainer.fit(digits(0, 8), steps=1, unlabelled=more, progress=False, **options)
        assert trainer.steps == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"unlabelled": -1}, {"unlabelled": 3}, {"pseudo_labels": "i1:AAA"}, {"pseudo_labels": "i1:gICA"},
        {"pseudo_labels": "f4:AAAA"}, {"pseudo_labels": 7}, {"pseudo_epoch": -2}, {"confidence": 2},
        {"unlabelled_share": 0}, {"unlabelled_weight": "1"}, {"batch_size": 1},
    ],
)  # fmt: skip
def test_what_is_no_course_is_refused(wrong: dict[str, Any]) -> None:
    good = Course(3, 1, 8, 60, 16, 0.1, unlabelled=2, pseudo_labels=packed(np.array([-1, 9])), pseudo_epoch=1)
    content = json.loads(good.dump())
    assert Course.parse(json.dumps(content), 5) == good
    with pytest.raises(EdgeBcsError, match="the saved position of the training is damaged"):
        Course.parse(json.dumps({**content, **wrong}), 5)
