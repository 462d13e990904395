"""Whatever holds a user's images and labels, as a `Dataset`: what training and evaluation take besides one.

| source | what is read |
| --- | --- |
| a `Dataset`, or an object with its methods | as it is |
| (images, labels) | arrays or tensors: floats [N, C, H, W] in [0, 1], or u8 (÷ 255); whole numbers |
| "digits" or a path | what `open_data` reads |
| a map-style torch Dataset, or any sequence, of (image, label) | see `ItemDataset` |
| a torch DataLoader of one | its dataset and its batch size |

A DataLoader's order, workers and `drop_last` do not count: the order of an epoch is a function of the seed,
so that a training can be resumed. A loader that chooses or changes images (a sampler or a `collate_fn` of its
own) is refused, and so is an iterable-style dataset, in which no image can be asked for. Torch's objects are
known by what they can do; torch is never imported.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.data.dataset import (
    MOST_CLASSES,
    Array,
    ArrayDataset,
    Dataset,
    Shape,
    class_names,
)

_TAKEN = (
    'a data set of edge_bcs.data, (images, labels), "digits", a path, a map-style torch Dataset, or a '
    "DataLoader of one"
)
_WHOLE_ORDERS = ("SequentialSampler", "RandomSampler", "DistributedSampler")
_PLAIN_COLLATION = ("default_collate", "default_convert")
_GREY_MODES = ("1", "L", "LA", "La")
_DEEP_MODES = ("I", "F")  # and I;16…: more than 8 bits, which a conversion would clip


def dataset_of(
    source: Any,
    *,
    split: str = "train",
    shape: Sequence[int] | None = None,
    finite: bool = True,
    resize: Resize = SQUASH,
) -> Dataset:
    """Return `source` as a data set (see the module's table).

    Args:
        source: where images and labels are.
        split: of a path, "train" or "test".
        shape: (C, H, W) of the images of a path; None where the network does not say.
        resize: of a path, how images of other sizes are brought to ``shape``.
        finite: refuse arrays with a pixel that is not a finite number now, not when it is read.

    Raises:
        EdgeBcsError: it is nothing of the kind, or pixels or labels are out of range.
    """
    if isinstance(source, (str, PathLike)):
        from edge_bcs.data import open_data

        if shape is None:
            raise EdgeBcsError(
                f"the network does not say which images it takes: give input_shape=(C, H, W) beside {source}."
            )
        channels, height, width = shape
        return open_data(source, split, (channels, height, width), resize=resize)
    if all(hasattr(source, name) for name in ("read", "order", "classes", "shape")):
        data: Dataset = source
    elif is_pair(source):
        images, labels = source
        data = ArrayDataset(as_array(images), as_array(labels))
    else:
        data = ItemDataset(_map_style(source))
    if finite and isinstance(data, ArrayDataset):
        data.check_finite()
    return data


def batch_size_of(source: Any) -> int | None:
    """Return the batch size of a DataLoader; None for everything else."""
    size = source.batch_size if _is_loader(source) else None
    return size if isinstance(size, int) else None


def is_pair(source: Any) -> bool:
    """Whether `source` is (images, labels); a list of two (image, label) is not."""
    if isinstance(source, list) and len(source) == 2:
        return len(getattr(source[0], "shape", ())) == 4
    return isinstance(source, tuple) and len(source) == 2


def as_array(values: Any) -> Array:
    """Return an array or a tensor, of whatever device and precision, as a numpy array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if "bfloat16" in str(values.dtype):  # numpy has none
            values = values.float()
        values = values.numpy()
    return np.asarray(values)


class ItemDataset(Dataset):
    """A map-style torch Dataset, or any sequence, of (image, label).

    An image is a tensor or an array [C, H, W], floats in [0, 1] or u8 (divided by 255), or a PIL image of 8
    bits a channel, all of one size; a label is a whole number from 0. Class names are its `classes`, if it
    has them. Labels are its `targets` or `labels`, if it has them and no `target_transform`; else it is read
    once, whole, to know them.

    Images are asked for one at a time, again in every epoch. Random transforms of a Dataset therefore work,
    also on images that are held out, but no run is then the same to the bit when it is repeated or resumed;
    `augment` shifts and flips reproducibly.
    """

    varies = True

    def __init__(self, source: Any) -> None:
        self._source = source
        if len(source) == 0:
            raise EdgeBcsError("the data set is empty")
        self._kind = type(source).__name__
        first, label = self._item(0, None)
        self.shape = first.shape
        known = _stated_labels(source)
        if known is None:
            known = np.array([self._item(place, self.shape)[1] for place in range(len(source))], np.int64)
        self.classes = class_names(known, stated_classes(source))
        self.labels = known.astype(np.int64)
        self._agree(0, label)

    def images(self, positions: Array) -> Array:
        """Return the images at ``positions``."""
        result = np.empty((len(positions), *self.shape), np.float32)
        for number, position in enumerate(positions):
            result[number], label = self._item(int(position), self.shape)
            self._agree(int(position), label)
        return result

    def _agree(self, place: int, label: int) -> None:
        if label != self.labels[place]:
            raise EdgeBcsError(
                f"item {place} of the {self._kind} has the label {label}, and it was {self.labels[place]} "
                "before (or is, in its targets): a label must not change"
            )

    def _item(self, place: int, shape: Shape | None) -> tuple[Array, int]:
        """Return the image f32 [C, H, W] and the label at a place; of the first item no shape is known."""
        item, name = self._source[place], f"item {place} of the {self._kind}"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            parts = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
            raise EdgeBcsError(f"{name} is a {type(item).__name__}{parts}, and (image, label) was expected")
        image = _pixels(item[0], f"the image of {name}", shape)
        try:
            label = operator.index(item[1])
        except TypeError:
            raise EdgeBcsError(
                f"the label of {name} must be a whole number, not {str(item[1])[:40]!r} "
                f"({type(item[1]).__name__})"
            ) from None
        if not 0 <= label < MOST_CLASSES:
            raise EdgeBcsError(f"the label of {name} is {label}; labels are whole numbers from 0")
        return image, label


def _pixels(image: Any, name: str, shape: Shape | None) -> Array:
    """Return one image f32 [C, H, W]; whoever reads it checks the range of its pixels."""
    if hasattr(image, "convert") and hasattr(image, "mode"):  # of PIL
        if image.mode.split(";")[0] in _DEEP_MODES:
            raise EdgeBcsError(
                f"{name} has PIL's mode {image.mode}; convert it to 8 bits, or to a tensor in [0, 1]"
            )
        grey = image.mode in _GREY_MODES if shape is None else shape[0] == 1
        image = np.asarray(image.convert("L" if grey else "RGB"), np.uint8)
        image = image[None] if grey else image.transpose(2, 0, 1)
    elif not hasattr(image, "shape"):
        raise EdgeBcsError(f"{name} must be a tensor, an array or a PIL image, not {type(image).__name__}")
    image = as_array(image)
    if image.ndim != 3 or (image.dtype != np.uint8 and image.dtype.kind != "f"):
        raise EdgeBcsError(
            f"{name} must be [C, H, W], floats in [0, 1] or u8, not {image.dtype}{list(image.shape)}"
        )
    if shape is not None and image.shape != shape:
        raise EdgeBcsError(
            f"{name} has the shape {list(image.shape)}, the first one {list(shape)}; bring all to one size "
            "in the Dataset's transform"
        )
    pixels: Array = image.astype(np.float32)
    return pixels / np.float32(255) if image.dtype == np.uint8 else pixels


def _is_loader(source: Any) -> bool:
    return all(hasattr(source, name) for name in ("dataset", "collate_fn", "sampler", "batch_sampler"))


def _map_style(source: Any) -> Any:
    """Return what gives (image, label) by position: the source, or its loader's dataset."""
    loader = source if _is_loader(source) else None
    dataset = source if loader is None else loader.dataset
    kind = type(dataset).__name__
    if any(base.__name__ == "IterableDataset" for base in type(dataset).__mro__):
        raise EdgeBcsError(
            f"{kind} is an iterable-style dataset, in which no image can be asked for by its number; give a "
            "map-style one, with __getitem__ and __len__"
        )
    if isinstance(dataset, dict) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise EdgeBcsError(f"data must be {_TAKEN}, not {kind}")
    if loader is None:
        return dataset
    sampler, batches = loader.sampler, loader.batch_sampler
    whole = type(sampler).__name__ in _WHOLE_ORDERS and not getattr(sampler, "replacement", False)
    if type(sampler).__name__ == "RandomSampler":
        whole = whole and sampler.num_samples == len(dataset)
    if not whole or type(batches).__name__ not in ("BatchSampler", "NoneType"):
        chosen = type(batches if whole else sampler).__name__
        raise EdgeBcsError(
            f"the DataLoader chooses its images by a {chosen}, which is not used; give a Dataset of "
            "just these images, such as torch.utils.data.Subset"
        )
    if getattr(loader.collate_fn, "__name__", "") not in _PLAIN_COLLATION:
        raise EdgeBcsError(
            "the DataLoader has a collate_fn of its own, which would not be called; do that in the Dataset"
        )
    return dataset


def _stated_labels(source: Any) -> Array | None:
    """Return the labels int[N] that a Dataset of torchvision's manners knows without reading images."""
    if hasattr(source, "indices") and hasattr(source, "dataset"):  # a Subset
        of_all = _stated_labels(source.dataset)
        return None if of_all is None else of_all[np.asarray(source.indices, np.int64)]
    if getattr(source, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels"):
        stated = getattr(source, name, None)
        if isinstance(stated, (list, tuple)) or hasattr(stated, "shape"):
            labels = as_array(stated)
            if labels.shape == (len(source),) and labels.dtype.kind in "iu":
                return labels
    return None


def stated_classes(source: Any) -> tuple[str, ...] | None:
    """Return the class names that a Dataset of torchvision's manners has; None if it has none."""
    while hasattr(source, "indices") and hasattr(source, "dataset"):
        source = source.dataset
    names = getattr(source, "classes", None)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None
