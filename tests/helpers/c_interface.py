"""The C interface (runtime/native/include/edge_bcs.h) for tests, called as a program in C does."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edge_bcs.core.library import library_path

Array = np.ndarray[Any, Any]
OK, ERROR, NOT_FINITE, NO_MEMORY, BUSY, STOPPED = range(6)
U32, U64, REAL, TEXT, POINTER = (
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_double,
    ctypes.c_char_p,
    ctypes.c_void_p,
)
Reader = ctypes.CFUNCTYPE(
    ctypes.c_int, POINTER, U64, U64, ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int64)
)
Progress = ctypes.CFUNCTYPE(ctypes.c_int, POINTER, U64, U64)


def _of(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Sized(ctypes.Structure):
    """A struct that begins with its size."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(ctypes.sizeof(self), **fields)


class Options(Sized):
    _fields_ = [
        *_of(U32, "size threads"),
        ("arena", POINTER),
        *_of(U64, "arena_bytes seed"),
        *_of(U32, "seeded reserved"),
        ("trusted_keys", POINTER),
        *_of(U64, "trusted_count min_release"),
        ("attack_precision", TEXT),
    ]


class File(ctypes.Structure):
    _fields_ = [("name", TEXT), ("data", TEXT), ("size", ctypes.c_size_t)]


class Info(Sized):
    _fields_ = [
        *_of(U32, "size channels height width classes named micro_batch batch_size threads attack_steps"),
        *_of(
            U64, "connections positions working_set_bytes arena_bytes budget_bytes state_bytes release seed"
        ),
        *_of(REAL, "epsilon step_size"),
        *_of(TEXT, "name objective batch_norm sparsity resize trained instruction_set"),
        ("bound_bytes", U64),
        *_of(TEXT, "attack_precision attack"),
        ("attack_micro_batch", U32),
    ]


class Batch(Sized):
    _fields_ = [
        *_of(U32, "size reserved"),
        ("count", U64),
        *_of(POINTER, "bytes floats labels"),
        ("read", Reader),
        *_of(POINTER, "user weights"),
    ]


class StepResult(Sized):
    _fields_ = [
        *_of(U32, "size reserved"),
        *_of(U64, "step labelled"),
        *_of(REAL, "loss accuracy robust_accuracy"),
    ]


class Rates(Sized):
    _fields_ = [*_of(U32, "size reserved"), *_of(REAL, "learning_rate weight_decay momentum noise")]


class Measure(Sized):
    _fields_ = [*_of(U32, "size attack_steps restarts fgsm"), ("epsilon", REAL)]


class Measured(Sized):
    _fields_ = [*_of(U32, "size reserved"), *_of(U64, "images right robust_right unanswered")]


class Tensor(Sized):
    _fields_ = [*_of(U32, "size integers"), ("count", U64), ("data", POINTER)]


class Training(Sized):
    _fields_ = [
        *_of(U32, "size resume"),
        *_of(U64, "images epochs steps batch_size"),
        ("learning_rate", REAL),
        *_of(TEXT, "schedule augment"),
        ("warmup", REAL),
        *_of(U32, "has_warmup balance"),
        ("validation", REAL),
        ("patience", U64),
        *_of(U32, "has_validation has_confidence"),
        ("unlabelled", U64),
        *_of(REAL, "confidence unlabelled_share unlabelled_weight"),
    ]


class Position(Sized):
    _fields_ = [
        *_of(U32, "size finished"),
        *_of(U64, "done total epoch first count skipped"),
        ("learning_rate", REAL),
        ("augment", TEXT),
        *_of(U32, "balance measure"),
        *_of(U64, "steps_per_epoch samples"),
        ("validation", REAL),
        ("best_step", U64),
        ("best_score", REAL),
        ("attack", TEXT),
        *_of(U32, "watch watched"),
        ("fell_back", ctypes.c_int64),
        *_of(U64, "unlabelled unlabelled_first unlabelled_count"),
        *_of(REAL, "unlabelled_weight confidence"),
        ("labelled_epoch", ctypes.c_int64),
        *_of(U32, "label keeps_all"),
    ]


class Watched(Sized):
    _fields_ = [*_of(U32, "size collapsed"), *_of(REAL, "own pgd")]


@functools.cache
def library() -> ctypes.CDLL:
    """The library; every function returns a status but these."""
    loaded = ctypes.CDLL(str(library_path()))
    others = _of(TEXT, "version last_error warning class_name")
    for name, result in [*others, ("steps", U64), ("close", None), ("abi_version", U32)]:
        getattr(loaded, f"edge_bcs_{name}").restype = result
    return loaded


class CError(Exception):
    """A call that failed: its status and its sentence."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(library().edge_bcs_last_error().decode())


def checked(status: int) -> None:
    if status != OK:
        raise CError(status)


def batch_of(images: Array, labels: Array | None = None, weights: Array | None = None) -> Batch:
    """Images u8 or f32 [n, C, H, W], labels i64[n] and weights f64[n] as the library takes them."""
    made = Batch(count=len(images))
    keep = [np.ascontiguousarray(images)]
    field = "bytes" if images.dtype == np.uint8 else "floats"
    setattr(made, field, keep[0].ctypes.data)
    for name, array, kind in (("labels", labels, np.int64), ("weights", weights, np.float64)):
        if array is not None:
            keep.append(np.ascontiguousarray(array, kind))
            setattr(made, name, keep[-1].ctypes.data)
    made.kept = keep
    return made


class Network:
    """An open network."""

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.handle = POINTER()
        given = Options(**options)
        checked(library().edge_bcs_open(str(path).encode(), ctypes.byref(given), ctypes.byref(self.handle)))

    @classmethod
    def of_files(cls, files: dict[str, bytes], **options: Any) -> Network:
        """Open files that lie in memory."""
        made = cls.__new__(cls)
        made.handle = POINTER()
        blocks = (File * len(files))(*(File(name.encode(), data, len(data)) for name, data in files.items()))
        given = Options(**options)
        checked(
            library().edge_bcs_open_files(blocks, len(files), ctypes.byref(given), ctypes.byref(made.handle))
        )
        return made

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        library().edge_bcs_close(self.handle)
        self.handle = POINTER()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that takes the handle first; structures are passed by their addresses."""
        passed = [ctypes.byref(each) if isinstance(each, ctypes.Structure) else each for each in arguments]
        checked(getattr(library(), f"edge_bcs_{name}")(self.handle, *passed))

    @property
    def info(self) -> Info:
        found = Info()
        self.call("get_info", found)
        return found

    @property
    def steps(self) -> int:
        return int(library().edge_bcs_steps(self.handle))

    @property
    def position(self) -> Position:
        found = Position()
        self.call("get_position", found)
        return found

    def begin(self, **training: Any) -> None:
        self.call("begin", Training(**training))

    def save(self) -> int:
        written = U64()
        self.call("save", ctypes.byref(written))
        return written.value

    def state_written(self) -> bytes:
        memory, written = ctypes.create_string_buffer(self.info.state_bytes), ctypes.c_size_t()
        self.call("state_write", memory, ctypes.c_size_t(len(memory)), ctypes.byref(written))
        return memory.raw[: written.value]

    def train(self, images: Array, labels: Array) -> StepResult:
        """The next step of the training, on its images."""
        position, result = self.position, StepResult()
        order = np.empty(len(images), np.uint32)
        self.call("order", U64(position.epoch), POINTER(order.ctypes.data), ctypes.c_size_t(len(order)))
        chosen = order[position.first : position.first + position.count]
        self.call("train", batch_of(images[chosen], labels[chosen]), result)
        return result

    def step(self, images: Array, labels: Array, weights: Array | None = None) -> StepResult:
        result = StepResult()
        self.call("step", batch_of(images, labels, weights), result)
        return result

    def predict(self, images: Array) -> Array:
        found = np.empty((len(images), self.info.classes), np.float32)
        self.call("predict", batch_of(images), POINTER(found.ctypes.data))
        return found

    def evaluate(self, images: Array, labels: Array, **how: Any) -> Measured:
        found = Measured()
        self.call("evaluate", batch_of(images, labels), Measure(**{"epsilon": -1.0, **how}), found)
        return found

    def tensor(self, name: str) -> Array:
        """A copy of a tensor of the state."""
        found = Tensor()
        self.call("get_tensor", name.encode(), found)
        kind = np.int32 if found.integers else np.float32
        return np.frombuffer(ctypes.string_at(found.data, 4 * found.count), kind).copy()

    def state(self, names: Sequence[str]) -> dict[str, Array]:
        return {name: self.tensor(name) for name in names}
