"""What a batch and a gradient must be before they may change anything, and where a fault came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import parts_of

from edge_bcs.core.answers import DIVERGED
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import NO_LABEL
from edge_bcs.data.dataset import Data, advice

Array = np.ndarray[Any, Any]
Name = Callable[[int], str]
"""Says which image stands at a place of a batch, e.g. "image 3 of the batch"."""

_LARGEST_GRADIENT = 1e30
_LARGEST_UPDATE = 1e37  # float32 ends at 3.4e38
_MOST_NORMAL = 8.0  # no normal draw reaches so many standard deviations


class NotFiniteError(EdgeBcsError):
    """A pixel, the loss or a gradient is NaN, infinite or would overflow; nothing was changed."""


def in_batch(place: int) -> str:
    """Name of the image at a place of a batch that was given by hand."""
    return f"image {place} of the batch"


def in_data(positions: Array) -> Name:
    """Names of the images that stand at ``positions`` of a data set."""
    return lambda place: f"image {positions[place]} of the data"


def check_images(x: Array, shape: tuple[int, int, int], name: Name = in_batch) -> Array:
    """Return ``x`` as f32 [n, C, H, W] in [0, 1], or raise EdgeBcsError with what is wrong and where."""
    x = np.asarray(x)
    if x.ndim != 4 or x.shape[1:] != shape or len(x) == 0:
        raise EdgeBcsError(
            f"images must have the shape [n, {', '.join(map(str, shape))}], not {list(x.shape)}."
        )
    if x.dtype.kind != "f":
        raise EdgeBcsError(f"images must be floating-point numbers in [0, 1], not {x.dtype}: divide by 255.")
    low, high = float(x.min()), float(x.max())
    if not math.isfinite(low + high):
        place = int(np.argmin(np.isfinite(x).all(axis=(1, 2, 3))))
        raise NotFiniteError(f"{name(place)} has a pixel that is not a finite number; remove or repair it.")
    if low < 0 or high > 1:
        raise EdgeBcsError(
            f"images must lie in [0, 1], but they reach {low:g} to {high:g}: {advice(low, high)}."
        )
    return x.astype(np.float32, copy=False)


def finite(logits: Array) -> Array:
    """Return logits f32 [n, classes], or raise NotFiniteError if a number among them is not finite."""
    wrong = ~np.isfinite(logits).all(axis=1)
    if wrong.any():
        raise NotFiniteError(
            f"the network's answer to {in_batch(int(np.argmax(wrong)))} is not finite: {DIVERGED}"
        )
    return logits


def check_labels(y: Array, count: int, classes: int, name: Name = in_batch, *, lowest: int = 0) -> Array:
    """Return ``y`` as i64[count] in [lowest, classes), or raise EdgeBcsError."""
    y = np.asarray(y)
    if y.shape != (count,) or y.dtype.kind not in "iu":
        raise EdgeBcsError(f"labels must be whole numbers of shape [{count}], not {y.dtype}{list(y.shape)}.")
    wrong = (y < lowest) | (y >= classes)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise EdgeBcsError(
            f"label {y[place]} is out of range ({name(place)}): the network has {classes} classes."
        )
    return y.astype(np.int64)


def check_batch(
    artifact: Artifact, x: Array, y: Array, name: Name = in_batch, *, training: bool = False
) -> tuple[Array, Array]:
    """Return a batch for an artifact as f32 and i64, or raise EdgeBcsError with what is wrong and where.

    ``training``: an image may have no label, if the artifact's objective has a use for it.
    """
    x = check_images(x, artifact.input_shape, name)
    lowest = NO_LABEL if training and artifact.objective.kind.learns_without_labels else 0
    return x, check_labels(y, len(x), artifact.num_classes, name, lowest=lowest)


def check_data(artifact: Artifact, data: Data) -> None:
    """Raise EdgeBcsError if a data set is empty, or its images have another shape than the network's."""
    if len(data) == 0:
        raise EdgeBcsError("the data set is empty.")
    if tuple(data.shape) != artifact.input_shape:
        raise EdgeBcsError(
            f"the network takes {artifact.input_shape} images; the data has {tuple(data.shape)}."
        )


def check_update(artifact: Artifact, arrays: Mapping[str, Array], hyper: tuple[float, ...]) -> None:
    """Raise NotFiniteError, naming the layer, if the optimizer might make a number that is not finite.

    It looks at the largest magnitudes, so that the optimizer, which updates the connections and the dense
    parameters one after the other, is never asked for a step that fails half-way.

    Args:
        arrays: the bound buffers. hyper: λ, λ_w, μ, σ.
    """
    rate, decay, factor, noise = hyper
    for kind in ("coo", "dense"):
        gradient = arrays[f"{kind}.value_grad.accumulation.buffer"]
        if not gradient.size:  # nothing of this kind is trained
            continue
        if not _largest(gradient) < _LARGEST_GRADIENT:
            magnitudes = np.abs(gradient)
            place = int(np.argmax(np.where(np.isnan(magnitudes), np.inf, magnitudes)))
            raise NotFiniteError(
                f"the gradient of {_owner(artifact, arrays, f'{kind}.momentum', place)} is "
                f"{gradient[place]:g}; lower the learning rate."
            )
        value, momentum = arrays[f"{kind}.value"], arrays[f"{kind}.momentum"]
        velocity = factor * _largest(momentum) + _largest(gradient)
        reach = abs(1 - decay) * _largest(value) + rate * (velocity + _MOST_NORMAL * noise)
        if not max(velocity, reach) < _LARGEST_UPDATE:
            place = int(np.argmax(np.abs(gradient)))
            raise NotFiniteError(
                f"the update of {_owner(artifact, arrays, f'{kind}.momentum', place)} would overflow; "
                "lower the learning rate."
            )


def check_statistics(artifact: Artifact, arrays: Mapping[str, Array]) -> None:
    """Raise NotFiniteError, naming the batch norm, if a running average is not finite.

    Activations can be so large that their variance overflows while the loss, which sees them divided by it,
    stays finite.
    """
    for kind in ("mean", "variance"):
        statistics = arrays[f"batchnorm.{kind}"]
        if not math.isfinite(_largest(statistics)):
            place = int(np.argmin(np.isfinite(statistics)))
            owner = _owner(artifact, arrays, f"batchnorm.{kind}", place)
            raise NotFiniteError(f"the running {kind} of {owner} is {statistics[place]:g}")


def _largest(array: Array) -> float:
    """The largest magnitude; NaN if there is a NaN."""
    return max(-float(array.min()), float(array.max())) if array.size else 0.0


def _owner(artifact: Artifact, arrays: Mapping[str, Array], tensor: str, place: int) -> str:
    return parts_of(artifact).owner(tensor, place, arrays["coo.index"])
