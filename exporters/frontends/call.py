"""One operator that a network calls, as the rows of the front end see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from edge_bcs.core.errors import EdgeBcsError

from ..layers import Input, Layer, shown
from .found import Constant, Ending, Pixels, Place, Refused, Shaped

if TYPE_CHECKING:
    from .trace import Trace


class Call:
    """One operator that the network calls: what rows look at, and add layers through.

    Attributes:
        operator: its name, without namespace, overload and the underscore of forms in place.
        arguments: by the names of its schema, defaults filled in.
        place: where it was called. called: the operator that the network called, of which this one is a part.
        name: a name for the layer that it becomes.
    """

    def __init__(
        self, trace: Trace, operator: str, overload: Any, arguments: dict[str, Any], place: Place
    ) -> None:
        self._trace = trace
        self.overload = overload
        self.operator, self.arguments, self.place = operator, arguments, place
        self.called = trace.called(operator)
        self._name = ""

    @property
    def name(self) -> str:
        """The name of the layer; taken when it is first asked for."""
        if not self._name:
            leaf = self.place.leaf and self.place.module
            self._name = self._trace.new_name(self.place.module if leaf else self.called)
        return self._name

    @property
    def module(self) -> str:
        """The operator and its place, for the beginning of a sentence."""
        return self.place.names(self.called)

    def layer(self, argument: str) -> Layer:
        """The layer whose output is this argument; EdgeBcsError if it is none."""
        found = self.shaped(argument)
        if isinstance(found, Shaped):
            raise EdgeBcsError(found.refusal)
        return found

    def shaped(self, argument: str) -> Layer | Shaped:
        """Like ``layer``, but its numbers may be in another shape."""
        return self._shaped(self.arguments.get(argument))

    def all_shaped(self, argument: str) -> list[Layer | Shaped]:
        """Like ``shaped``, of an argument that is a list of tensors."""
        return [self._shaped(value) for value in self.arguments[argument]]

    def _shaped(self, value: Any) -> Layer | Shaped:
        found = self._trace.found(value) if isinstance(value, Tensor) else None
        if isinstance(found, Refused):
            raise EdgeBcsError(found.sentence)
        if isinstance(found, Ending):
            raise EdgeBcsError(found.refusal)
        if isinstance(found, Shaped):
            return found
        if isinstance(found, Pixels | Input):
            return self._trace.read(found)
        if not isinstance(found, Layer):
            held = isinstance(found, Constant) and found.name
            what = (
                f"the tensor '{held}' directly" if held else "something that is not a tensor of the network"
            )
            raise EdgeBcsError(f"{self.module} takes {what}; {self._trace.supported}")
        return found

    def map(self, argument: str, what: str) -> Layer:
        """Like ``layer``, of an argument that must be a feature map (C, H, W)."""
        found = self.layer(argument)
        if len(found.shape) != 3:
            raise EdgeBcsError(
                f"{what} '{self.name}' needs a feature map (C, H, W) but gets {shown(found.shape)}"
            )
        return found

    def pixels(self, argument: str) -> Pixels | None:
        """The image, normalised so far, if this argument is it."""
        value = self.arguments.get(argument)
        found = self._trace.found(value) if isinstance(value, Tensor) else None
        return (
            Pixels(found, (), ())
            if isinstance(found, Input)
            else found
            if isinstance(found, Pixels)
            else None
        )

    def numbers(self, argument: str, count: int) -> tuple[float, ...] | None:
        """This argument as a number for each of so many channels; None if it is none, or would be trained."""
        value = self.arguments.get(argument)
        if isinstance(value, (int, float)):
            return (float(value),) * count
        if not isinstance(value, Tensor) or value.is_meta:
            return None
        found = self._trace.found(value)
        if not isinstance(found, Constant):
            return None
        if any(name in self._trace.trained for name in (found.name, *found.computed_from)):
            return None
        if value.numel() == 1:
            return (float(value),) * count
        if value.shape not in ((count, 1, 1), (1, count, 1, 1)):
            return None
        return tuple(value.detach().double().flatten().tolist())

    def transposed(self, argument: str) -> str:
        """The qualified name of the parameter whose transpose this argument is, "" if it is none."""
        value = self.arguments.get(argument)
        if not isinstance(value, Tensor):
            return ""
        found = self._trace.found(value)
        if not isinstance(found, Constant) or len(found.computed_from) != 1:
            return ""
        parameter = self._trace.trained.get(found.computed_from[0])
        if parameter is None or value.data_ptr() != parameter.data_ptr() or value.ndim != 2:
            return ""
        if value.stride() != parameter.stride()[::-1]:
            return ""
        self._trace.taken.add(found.computed_from[0])
        return found.computed_from[0]

    def vector(self, argument: str) -> str:
        """The qualified name of the parameter, a number for each channel, that this argument is in whatever
        shape, "" if it is none."""
        value = self.arguments.get(argument)
        found = self._trace.found(value) if isinstance(value, Tensor) else None
        if not isinstance(value, Tensor) or not isinstance(found, Constant):
            return ""
        name = found.name or next(iter(found.computed_from), "")
        parameter = self._trace.trained.get(name)
        if parameter is None or len(found.computed_from) > 1 or value.data_ptr() != parameter.data_ptr():
            return ""
        if value.numel() != parameter.numel() or sum(extent > 1 for extent in value.shape) > 1:
            return ""
        self._trace.taken.add(name)
        return name

    def parameter(self, argument: str) -> str:
        """The qualified name of the parameter or buffer that this argument is, "" for None.

        Raises:
            EdgeBcsError: it is computed, or no parameter or buffer of the network.
        """
        value = self.arguments.get(argument)
        if value is None:
            return ""
        found = self._trace.found(value)
        if isinstance(found, Constant) and found.name:
            self._trace.taken.add(found.name)
            return found.name
        if isinstance(found, Constant) and found.computed_from:
            raise EdgeBcsError(
                f"the {argument.replace('_', ' ')} of {self.module} is computed from "
                f"{', '.join(map(repr, found.computed_from))} by '{found.operator}'; only what the network "
                "holds can be trained: make it a parameter first, as remove_weight_norm and "
                "remove_parametrizations of torch.nn.utils do"
            )
        if isinstance(found, Refused):
            raise EdgeBcsError(found.sentence)
        raise EdgeBcsError(
            f"the {argument.replace('_', ' ')} of {self.module} is not a parameter of the network"
        )

    def owner(self, *arguments: str) -> str:
        """The qualified name of the module that holds these parameters, each under the argument's own name.

        Raises:
            EdgeBcsError: one of them is missing where it must be, has another name, or was used before.
        """
        return self.owner_of({argument: self.parameter(argument) for argument in arguments})

    def owner_of(self, names: Mapping[str, str]) -> str:
        """Like ``owner``, of parameters by their qualified names ("" for one that is not there)."""
        first = next(argument for argument in names if names[argument])
        module = names[first].removesuffix(first).removesuffix(".")
        for argument, name in names.items():
            wanted = f"{module}.{argument}".removeprefix(".")
            if name and name != wanted:
                raise EdgeBcsError(
                    f"{self.module} takes '{name}' as its {argument.replace('_', ' ')}; the parameters of a "
                    f"layer must belong to one module and be called {' and '.join(names)}, as in torch.nn"
                )
        if module in self._trace.used:
            raise EdgeBcsError(f"module '{module}' is used twice; every layer must have weights of its own")
        self._trace.used.add(module)
        return module

    def held_by(self, module: str) -> nn.Module:
        """The module of that qualified name."""
        return self._trace.root.get_submodule(module)

    def read_by(self, layer: Layer) -> Layer:
        """The layer whose output ``layer`` reads first."""
        return self._trace.graph[layer.inputs[0]]

    def add(self, layer: Layer) -> Layer:
        """Append ``layer`` to the graph; a next one gets another name."""
        if layer.name == self._name:
            self._name = ""
        self._trace.graph.layers.append(layer)
        return layer

    def result(self) -> Tensor:
        """An outline of what torch returns here: its shape, with ``BATCH`` images, and its type of number.

        Raises:
            EdgeBcsError: torch refuses the call.
        """
        result: Tensor = self._trace.run(self.overload, self.arguments, self.place)
        return result

    def computed(self, arguments: Mapping[str, Any]) -> Any:
        """What torch makes of other arguments."""
        return self.overload(**arguments)

    @property
    def unsupported(self) -> str:
        """The sentence that refuses what nothing here takes."""
        used = f" (it uses '{self.called}')" if self.place.leaf else ""
        return f"{self.module} is not supported{used}; {self._trace.supported}"


Row = Callable[[Call], Any]
"""From a call to the layer that its result is, a list of layers (None for what is none) where it has several
results, or an `Ending`. EdgeBcsError refuses it."""
