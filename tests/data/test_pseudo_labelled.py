"""The second data set of RST: read whole, from .npz, or from a pickle that can do no harm."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import open_data
from edge_bcs.data.pseudo_labelled import open_pseudo_labelled

SHAPE = (3, 4, 4)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
LABELS = np.arange(40) % 4


def test_nothing_is_held_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "more.npz", x=IMAGES, y=LABELS)
    assert len(open_data(tmp_path / "more.npz", "train", SHAPE)) == 36  # a tenth of each class is kept apart
    data = open_pseudo_labelled(tmp_path / "more.npz", SHAPE)
    images, labels = data.read(np.arange(40))
    assert np.array_equal(labels, LABELS)
    assert np.array_equal(images, (IMAGES / np.float32(255)).astype(np.float32).transpose(0, 3, 1, 2))


def test_images_meant_for_testing_are_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "more.npz", x_train=IMAGES[:30], y_train=LABELS[:30], x_test=IMAGES, y_test=LABELS)
    assert len(open_pseudo_labelled(tmp_path / "more.npz", SHAPE)) == 30


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_authors_pickle_only_if_told(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "ti_500K_pseudo_labeled.pickle"
    file.write_bytes(pickle.dumps({"data": IMAGES, "extrapolated_targets": LABELS}, protocol))
    with pytest.raises(EdgeBcsError, match="--trust-pickle"):
        open_pseudo_labelled(file, SHAPE)
    data = open_pseudo_labelled(file, SHAPE, trust_pickle=True)
    assert np.array_equal(data.labels, LABELS)
    assert np.array_equal(np.rint(data.read(np.array([7]))[0] * 255)[0], IMAGES[7].transpose(2, 0, 1))


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


def test_a_pickle_cannot_run_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pickle").write_bytes(pickle.dumps({"data": _Harmful()}))
    with pytest.raises(EdgeBcsError, match=r"asks for (posix|nt)\.system"):
        open_pseudo_labelled("bad.pickle", SHAPE, trust_pickle=True)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": IMAGES}, "lacks data"),
        ({"data": IMAGES, "targets": LABELS[:3]}, "one label"),
        ({"data": IMAGES[:, :3], "targets": LABELS}, "the network takes"),
        ([1, 2], "no dictionary"),
    ],
)
def test_one_sentence_for_what_is_wrong(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "bad.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(EdgeBcsError, match=message):
        open_pseudo_labelled(tmp_path / "bad.pickle", SHAPE, trust_pickle=True)
    (tmp_path / "torn.pickle").write_bytes(pickle.dumps({"data": IMAGES, "targets": LABELS})[:500])
    with pytest.raises(EdgeBcsError, match="not a pickle of arrays"):
        open_pseudo_labelled(tmp_path / "torn.pickle", SHAPE, trust_pickle=True)
    with pytest.raises(EdgeBcsError, match="does not exist"):
        open_pseudo_labelled(tmp_path / "none.npz", SHAPE)
