"""Runs a torch module on the outline of an image, and hands each ATen operator to the row that takes it.

The image is a tensor without memory. Its batch is a number of images, ``BATCH``, that no network has for
anything else, so what a module does with `x.size(0)` or `view(-1, …)` is told from its shapes. Operators are
seen as `torch.export` records them, before torch decomposes them: modules, functions and methods come out
alike. An operator that has a row (`aten`) is not run; the row says what layer it is, and so its shape. One
without a row is decomposed as torch itself does it, and the rest run on outlines. Parameters and what is
computed from them alone are the numbers they are, so a branch on them is taken as the network takes it.

What cannot become a layer is told only where the logits depend on it.

`torch.export` itself is not called: it loads torch's compiler, seconds in every process, and takes a hundred
times as long for a small network; what it would add, a graph to keep, is not needed here.
"""

from __future__ import annotations

import builtins
import contextlib
import keyword
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method import hooks

from ..layers import Input, Layer, LayerGraph
from .call import Call, Row
from .found import BATCH, Constant, Ending, Found, Pixels, Place, Refused, Shaped, said_by

_DEVICE, _IS_META = Tensor.device.__get__, Tensor.is_meta.__get__  # type: ignore[attr-defined]
_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)
_CALL = nn.Module._call_impl.__code__  # what every call of a module runs through
_ANSWERS = frozenset(
    (
        "item",
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "allclose",
        "nonzero",
        "nonzero_numpy",
        "masked_select",
    )
)
"""Operators whose answer is a number or a shape that depends on the values of a tensor."""
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite"))
_HOOKS = hooks.__name__
_HELD = "which an artifact does not when it runs"


@dataclass
class _Entry:
    """A tensor that was seen, kept so that its identity stays its own; views share a ``group``."""

    tensor: Tensor
    found: Found
    group: int


@dataclass
class Trace:
    """What is known of a network while it runs.

    Attributes:
        root: the module. rows: operator → row. supported: the end of sentences that refuse something.
        graph: the layers so far. used: modules whose parameters a layer has.
        taken: the names of these parameters.
        fault: why the network is refused, once it is.
    """

    root: nn.Module
    rows: Mapping[str, Row]
    supported: str
    graph: LayerGraph = field(default_factory=LayerGraph)
    used: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)
    _entries: dict[int, _Entry] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _modules: dict[int, str] = field(default_factory=dict)
    _fresh: set[int] = field(default_factory=set)  # tensors that were made while the network ran
    _read: Pixels | None = None
    _within: list[str] = field(default_factory=list)
    # Its sentence alone: the exception would keep the frames of all callers, with what they hold.
    fault: str | None = None

    def __post_init__(self) -> None:
        for name, module in self.root.named_modules():
            self._modules[id(module)] = name
        self.trained = dict(self.root.named_parameters())
        self.device = next((tensor.device for tensor in self.root.parameters()), torch.device("cpu"))
        for name, tensor in [*self.root.named_parameters(), *self.root.named_buffers()]:
            self.remember(tensor, Constant(name))

    # What a tensor is

    def remember(self, tensor: Tensor, found: Found, like: Tensor | None = None) -> Tensor:
        """Note what ``tensor`` is; it shares its memory with ``like``, if that is given."""
        group = self._entries[id(like)].group if like is not None else id(tensor)
        self._entries[id(tensor)] = _Entry(tensor, found, group)
        return tensor

    def found(self, tensor: Tensor) -> Found:
        """What ``tensor`` is; one that was never seen is a constant without a name."""
        entry = self._entries.get(id(tensor))
        if entry is None:
            self.remember(tensor, Constant(""))
            entry = self._entries[id(tensor)]
        return entry.found

    def new_name(self, name: str) -> str:
        """A name for a layer, made of ``name``, that no other layer has."""
        name = re.sub(r"\W", "_", name)
        name = f"_{name}" if name[:1].isdigit() else name
        if not self._may_name(name):
            name = next(filter(self._may_name, (f"{name}_{number}" for number in count(1))))
        self._names.add(name)
        return name

    def _may_name(self, name: str) -> bool:
        """Whether a layer may be called ``name``: Python has no use for it, nor has another layer."""
        return not (keyword.iskeyword(name) or hasattr(builtins, name) or name in self._names)

    def read(self, found: Pixels | Input) -> Layer:
        """The image as layers read it, normalised in one way only."""
        pixels = found if isinstance(found, Pixels) else Pixels(found, (), ())
        if self._read is not None and self._read != pixels:
            raise EdgeBcsError("the network reads its image both as it is and normalised, or in two ways")
        self._read = pixels
        self.graph.layers[0] = replace(pixels.layer, scale=pixels.scale, shift=pixels.shift)
        return pixels.layer

    def called(self, operator: str) -> str:
        """The operator of the network's own call, of which torch's decomposition has made ``operator``."""
        return next(iter(self._within), operator)

    # Running

    def outputs(self, image: Input) -> Any:
        """Run the module on the outline of ``image``, and return what it returns."""
        self.graph.layers.append(image)
        with _as_it_was(self.root), torch.random.fork_rng(devices=()), torch.inference_mode():
            outline = self.remember(torch.empty((BATCH, *image.shape), device="meta"), image)
            with warnings.catch_warnings(), _Operators(self), _Attributes(self.device):
                warnings.simplefilter("ignore")  # they are told where the network runs on images
                result = self.root(outline)
        if self.fault is not None:  # which the network's own code has caught
            raise EdgeBcsError(self.fault)
        return result

    def run(self, overload: Any, arguments: Mapping[str, Any], place: Place) -> Any:
        """Run an operator on outlines.

        Raises:
            EdgeBcsError: torch refuses it.
        """
        try:
            return overload(**{name: _outlined(value) for name, value in arguments.items()})
        except Exception as error:
            raise EdgeBcsError(
                f"{place.names(_name_of(overload))} cannot be computed for such images: {said_by(error)}"
            ) from error

    def call(
        self, overload: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchDispatchMode
    ) -> Any:
        """Take one operator that the network has called, and return its result as the network sees it."""
        operator = _name_of(overload)
        schema = overload._schema
        arguments = _arguments(schema, args, kwargs)
        tensors = list(_tensors(arguments.values()))
        kinds = [self.found(tensor) for tensor in tensors]
        written = [
            value
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in _tensors([arguments.get(argument.name)])
        ]
        if all(isinstance(kind, Constant) for kind in kinds):
            return self._constant(overload, operator, arguments, tensors, written)
        place = self._place()
        if operator in _ANSWERS:
            return self._data_dependent(place)
        row = self.rows.get(operator)
        if (
            row is None
            and (decomposed := self._decomposed(overload, args, kwargs, mode)) is not NotImplemented
        ):
            return decomposed
        call = Call(self, operator, overload, arguments, place)
        result: Any = next((kind for kind in kinds if isinstance(kind, Refused)), None)
        if result is not None:
            pass  # what follows from something refused is refused for that
        elif row is None:
            result = Refused(call.unsupported)
        else:
            try:
                result = row(call)
            except EdgeBcsError as error:
                result = Refused(str(error))
        return self._result(call, result, tensors, written)

    def _constant(
        self,
        overload: Any,
        operator: str,
        arguments: Mapping[str, Any],
        tensors: list[Tensor],
        written: list[Tensor],
    ) -> Any:
        """The network computes with what it holds: that is done as it stands, but not into what it holds."""
        if written and operator == "detach":  # as torch.tensor does with what it has just made
            self._fresh.update(map(id, written))
            return written[0]
        kept = [tensor for tensor in written if id(tensor) not in self._fresh]
        if kept:
            said = f"{self._place().names(operator)} changes a tensor that the network holds, {_HELD}"
            for tensor in kept:
                self._change(tensor, Refused(said))
            return kept[0]
        views = any(returned.alias_info is not None for returned in overload._schema.returns)
        # Tensors that the network makes are ordinary ones: torch's factories take no others.
        with torch.inference_mode(False), torch.no_grad():
            if not views and any(number == BATCH for number in _numbers(arguments.values())):
                said = f"{self._place().names(operator)} makes a tensor for each image of a batch"
                there = {"device": "meta"} if "device" in arguments else {}
                result = self.run(overload, {**arguments, **there}, Place())
                return self._all(result, Refused(f"{said}; {self.supported}"))
            result = overload(**arguments)
        sources = [self.found(tensor) for tensor in tensors]
        names = [
            n for found in sources if isinstance(found, Constant) for n in (found.name, *found.computed_from)
        ]
        computed = Constant("", tuple(dict.fromkeys(filter(None, names))), operator)
        fresh = not views or all(id(tensor) in self._fresh for tensor in tensors)
        for tensor in _tensors([result]):
            if id(tensor) not in self._entries:
                self.remember(tensor, computed)
                self._fresh.update([id(tensor)] if fresh else [])
        return result

    def _all(self, result: Any, found: Found) -> Any:
        for tensor in _tensors([result]):
            self.remember(tensor, found)
        return result

    def _decomposed(
        self, overload: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchDispatchMode
    ) -> Any:
        self._within.append(_name_of(overload))
        try:
            with mode:
                return overload.decompose(*args, **kwargs)
        finally:
            self._within.pop()

    def _data_dependent(self, place: Place) -> Any:
        where = place.line or place.names("forward")
        self.fault = (
            f"the network cannot be traced: {where} decides by the values of a tensor, and the forward of a "
            "network must not depend on the data"
        )
        raise EdgeBcsError(self.fault)

    def _result(self, call: Call, result: Any, tensors: list[Tensor], written: list[Tensor]) -> Any:
        """Give the network tensors for what a row has returned."""
        if written:
            if len(written) > 1 or isinstance(result, list):
                result = Refused(f"{call.module} writes into tensors of its caller; {self.supported}")
            for tensor in written:
                self._change(tensor, result)
            return written[0]
        if isinstance(result, list):
            return tuple(self._outline(call, part, tensors) for part in result)
        if isinstance(result, Refused):
            return self._refused(call, result)
        return self._outline(call, result, tensors)

    def _outline(self, call: Call, found: Found | None, tensors: list[Tensor]) -> Tensor:
        if found is None:
            return self.remember(
                torch.empty(0, device="meta"), Refused(f"a result of {call.module} is not supported")
            )
        layer = found.layer if isinstance(found, Ending | Shaped | Pixels) else found
        assert isinstance(layer, Layer)
        shape = found.shape if isinstance(found, Shaped) else (BATCH, *layer.shape)
        outline = torch.empty(shape, device="meta")
        # What torch may return as a view of an argument, or as the argument itself, shares its memory.
        views = any(returned.alias_info is not None for returned in call.overload._schema.returns)
        shared = [tensor for tensor in tensors if self.found(tensor) is found]
        like = shared[0] if shared else tensors[0] if views and tensors else None
        return self.remember(outline, found, like)

    def _refused(self, call: Call, refused: Refused) -> Any:
        """Go on with outlines behind something that is not supported: the logits may not depend on it."""
        tensors = list(_tensors(call.arguments.values()))
        if torch.Tag.pointwise in call.overload.tags and call.operator not in _COMPARISONS:
            # Torch's own way to the shape loads its compiler, which takes seconds.
            with contextlib.suppress(RuntimeError):
                shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
                return self.remember(torch.empty(shape, device="meta"), refused)
        try:
            result = self.run(call.overload, call.arguments, call.place)
        except EdgeBcsError:
            self.fault = refused.sentence
            raise EdgeBcsError(self.fault) from None
        return self._all(result, refused)

    def _change(self, tensor: Tensor, found: Found) -> None:
        """``tensor`` was written: it is something else now, and so are those that share its memory."""
        entry = self._entries[id(tensor)]
        before = entry.found
        for other in self._entries.values():
            if other.group != entry.group or other is entry:
                continue
            if other.found is before:
                other.found = found
            elif not isinstance(other.found, Refused):
                other.found = Refused(
                    "a tensor is changed in place while the network goes on to use a view of it; "
                    "call the function that is not in place"
                )
        entry.found = found

    def _place(self) -> Place:
        frame: FrameType | None = sys._getframe(1)
        module: nn.Module | None = None
        line = ""
        while frame is not None and not (module is not None and line):
            code = frame.f_code
            if code is _CALL and module is None:
                module = frame.f_locals["self"]
            elif not line and not code.co_filename.startswith((_TORCH, _OWN, "<")):
                line = f"{Path(code.co_filename).name}:{frame.f_lineno}"
            if code is Trace.outputs.__code__:
                break
            frame = frame.f_back
        if module is None:
            return Place("", "", False, line)
        torchs = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
        return Place(self._modules.get(id(module), ""), type(module).__name__, torchs, line)


class _Attributes(TorchFunctionMode):
    """Lets an outline say that it lies where the network does, for the tensors that it makes there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE:
            return self.device
        if func == _IS_META:
            return False
        if func is Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, "device": self.device, **kwargs})
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operator to a trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch loads its whole compiler, which takes seconds, to keep it out of here.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self.trace.call(func, args, kwargs or {}, self)
        except EdgeBcsError as error:
            self.trace.fault = str(error)
            raise


@contextmanager
def _as_it_was(root: nn.Module) -> Iterator[None]:
    """Run modules in evaluation mode and uncompiled, and leave each as it was found.

    Whatever attributes their code sets meanwhile is taken back; objects that it changes stay changed.
    """
    before = []
    for module in root.modules():
        own = vars(module)
        held = {key: dict(own[key]) for key in ("_parameters", "_buffers", "_modules") if key in own}
        before.append((module, dict(own), held))
    try:
        for module, _, _ in before:
            own = vars(module)
            own["training"] = False
            own.pop("_compiled_call_impl", None)
            original = getattr(module, "_orig_mod", None)
            if original is not None:
                own["forward"] = original.__call__
            for kind in ("_forward_pre_hooks", "_forward_hooks"):
                # What edge-bcs has hung on a module (normalisation, statistics) is not the network's own.
                hung = own.get(kind, {}).items()
                if any(hook.__module__ == _HOOKS for _, hook in hung):
                    own[kind] = OrderedDict((key, hook) for key, hook in hung if hook.__module__ != _HOOKS)
        yield
    finally:
        for module, attributes, held in before:
            own = vars(module)
            own.clear()
            own.update(attributes)
            for key, items in held.items():
                if dict(own[key]) != items or list(own[key]) != list(items):
                    own[key].clear()
                    own[key].update(items)


def _name_of(overload: Any) -> str:
    name: str = overload._schema.name.partition("::")[2]
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in overload._schema.arguments)
    return name.removesuffix("_") if writes else name


def _arguments(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found.update(zip((a.name for a in schema.arguments), args, strict=False))
    found.update(kwargs)
    return found


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _numbers(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _numbers(value)
        elif isinstance(value, Tensor):
            yield from value.shape
        elif isinstance(value, int):
            yield value


def _outlined(value: Any) -> Any:
    """An argument for a run without numbers."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta") if not value.is_meta else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_outlined, value))
    return torch.device("meta") if isinstance(value, torch.device) else value
