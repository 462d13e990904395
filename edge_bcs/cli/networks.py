"""Which network a command works with: one of `edge_bcs.models` by its name, or one of the user's own.

A network of one's own is named by what makes it, PACKAGE.MODULE:FACTORY or FILE.py:FACTORY: a callable
that returns a torch module. It is called without arguments, but for --classes where it has a parameter of
that name or num_classes. The current folder is looked in first, as `python -m` does, or
the file's. Only what the command line names is ever imported: a checkpoint or an artifact says which factory
its network came from, but nothing follows it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_bcs.cli.common import given
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.normalization import Normalization
from edge_bcs.core.progress import say

if TYPE_CHECKING:
    from torch import nn

    from edge_bcs.method.heads import NewHead
    from edge_bcs.method.sparse_model import SparseModel

Shape = tuple[int, int, int]

_OWN = "PACKAGE.MODULE:FACTORY, FILE.py:FACTORY or FILE.onnx"
_LONGEST = 200
# Where there is no code of the user's.
_INSTALLED = (
    *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")},
    str(Path(__file__).resolve().parents[1]),
)

model_option = click.option(
    "--model",
    default="vgg16",
    show_default=True,
    metavar="NAME|MODULE:FACTORY",
    help="vgg16, resnet18, resnet34, resnet50, wrn28_2, wrn28_4, wrn28_10 or wrn34_10; or a function of "
    "yours "
    f"that returns a torch module: {_OWN}.",
)
own_model_option = click.option(
    "--model",
    metavar="MODULE:FACTORY",
    help=f"For a network of your own, the function that returns its torch module: {_OWN}.",
)


def _sides(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Return (height, width) of "96" or "96x160"."""
    if value is None:
        return None
    sides = value.replace("×", "x").split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise click.BadParameter(
            f"{value!r} is neither a number of pixels, such as 96, nor HEIGHTxWIDTH, such as 96x160."
        )
    return int(sides[0]), int(sides[-1])


input_size_option = click.option(
    "--input-size",
    metavar="N|HxW",
    callback=_sides,
    help="Pixels of the images, 96 or 96x160 (height x width); default: what the network has seen, or 32.",
)
channels_option = click.option(
    "--channels",
    type=click.IntRange(1),
    help="Channels of the images; default: what the network has seen, or 3.",
)
normalize_option = click.option(
    "--normalize",
    metavar="imagenet|MEAN:STD",
    help="What the first layer expects: (x − MEAN) / STD, each a number or one a channel with commas, such "
    "as 0.5:0.5. It becomes part of the network; images and the attack's radius stay in [0, 1].",
)
input_shape_option = click.option(
    "--input-shape",
    metavar="C,H,W",
    help="Channels, height and width of the images, such as 3,32,32; needed once for a network of your own.",
)
dense_option = click.option(
    "--dense",
    "dense_patterns",
    multiple=True,
    metavar="PATTERN",
    help="Layers whose kernels stay dense and are not counted by --sparsity: names, with *, ? and [] as in a "
    "shell; may be repeated; none: every kernel is sparse. Default: of a network of your own depthwise "
    "layers, and the first and the last one where it has less than 1 % of the weights.",
)
distribution_option = click.option(
    "--distribution",
    type=click.Choice(["paper", "uniform", "erk", "global"]),
    help="How connections are first spread over the layers; default: paper; where trained weights are kept, "
    "and with --gradual, global: the largest weights of the whole network.",
)
start_option = click.option(
    "--start",
    type=click.Choice(["new", "magnitude"]),
    help="magnitude: keep the largest weights of a trained network of your own, the default for an ONNX "
    "file and --weights; new: begin with random weights even where it looks trained.",
)
weights_option = click.option(
    "--weights",
    type=click.Path(),
    metavar="FILE",
    help="A file of yours with trained weights of the network: a state dict, .pt, .pth or .safetensors.",
)

classes_option = click.option(
    "--classes",
    type=click.IntRange(2),
    metavar="N",
    help="Number of classes. Where a network of your own, --weights or --checkpoint has another one, the "
    "last layer is made anew, and everything else kept. Default: as many as --class-names; in `train` with "
    "--weights as many as --data has names of.",
)
resize_option = click.option(
    "--resize",
    metavar="HOW",
    help="How image files are brought to the network's size: squash (both sides; the default), crop (the "
    "largest part in the middle with its proportions) or crop:0.875 (of that a share, as torchvision's "
    "networks are evaluated). Kept with the network.",
)


def normalization(options: dict[str, Any]) -> Normalization | None:
    """Return what --normalize says; None without it."""
    text = options["normalize"]
    return None if text is None else Normalization.parse(text)


def dense_patterns(options: dict[str, Any]) -> list[str] | None:
    """Return what --dense says, for `sparsify`; None without it."""
    patterns: tuple[str, ...] = options["dense_patterns"]
    if "none" in patterns and len(patterns) > 1:
        raise EdgeBcsError("--dense none says that no kernel stays dense: leave the other --dense out.")
    return [] if patterns == ("none",) else list(patterns) or None


def is_onnx(model: str | None) -> bool:
    """Whether --model names an ONNX file."""
    return model is not None and model.endswith(".onnx")


def is_own(model: str | None) -> bool:
    """Whether --model names a factory or an ONNX file, not a network of `edge_bcs.models`."""
    return model is not None and (":" in model or is_onnx(model))


def check_width(options: dict[str, Any]) -> None:
    """Refuse --width for a network of the user's own."""
    if is_own(options["model"]) and given("width"):
        raise EdgeBcsError("--width belongs to the networks of edge-bcs; one of your own has its own.")


def start(options: dict[str, Any]) -> str | None:
    """Return how `sparsify` shall start: weights of an ONNX file or of --weights are kept."""
    asked: str | None = options["start"]
    return asked or ("magnitude" if is_onnx(options["model"]) or options["weights"] else None)


def is_checkpoint(path: str | None) -> bool:
    """Whether a path is what `edge-bcs train` wrote, or a folder, and not a state dict."""
    from edge_bcs.core.state import is_state
    from edge_bcs.core.tensor_file import TensorFile

    if path is None or Path(path).is_dir():
        return path is not None
    try:
        with TensorFile(Path(path)) as stored:
            return is_state(stored.metadata)
    except (ValueError, TypeError, OSError, EdgeBcsError):
        return False


def prepared(
    network: nn.Module, options: dict[str, Any], classes: int | None, shape: Shape | None
) -> nn.Module:
    """Return `network` with what --weights says, and with so many outputs; a new last layer is told.

    Args:
        network: one of edge-bcs, which has so many outputs already, or one of the user's own.
        classes: None: as many outputs as it has. shape: (C, H, W) of its images, if that is known.

    Raises:
        EdgeBcsError: the weights do not fit, or are not used; or a last layer that cannot be told.
    """
    file, seed = options["weights"], options["seed"]
    if file is not None:
        _check_weights(options)
        from edge_bcs.weights import load_weights

        new = load_weights(network, file, classes, input_shape=shape, seed=seed)
    elif classes is not None and is_own(options["model"]):
        from edge_bcs.exportable import with_outputs

        new = with_outputs(network, classes, input_shape=shape, seed=seed)
    else:
        return network
    if new is not None:
        say_new(new)
    return network


def say_new(new: NewHead) -> None:
    """Tell that the last layer is new, in one line on standard error."""
    told = str(new)
    say(f"{told[0].upper()}{told[1:]}.")


def with_saved(network: nn.Module, options: dict[str, Any], shape: Shape | None) -> nn.Module:
    """Return `network` with all that --weights has, its last layer, too, whatever its number of outputs."""
    from edge_bcs.weights import load_as_saved

    _check_weights(options)
    load_as_saved(network, options["weights"], shape)
    return network


def _check_weights(options: dict[str, Any]) -> None:
    """Raise `EdgeBcsError` where --weights would not be used."""
    if is_onnx(options["model"]):
        raise EdgeBcsError("an ONNX file has weights of its own: leave --weights out.")
    if options.get("start") == "new":
        raise EdgeBcsError("--start new replaces the weights: leave --weights out.")


def asked_classes(options: dict[str, Any], names: tuple[str, ...] | None) -> int | None:
    """Return how many outputs the network shall have: what --classes says or, where weights are kept, the
    number of --class-names; None: nobody says."""
    classes: int | None = options["classes"]
    if classes is None and names is not None and start(options) == "magnitude":
        return len(names)
    return classes


def short_name(model: str) -> str:
    """Return the name of a network or of its factory, for a folder."""
    if is_onnx(model):
        return Path(model).stem
    return model.rpartition(":")[2].rpartition(".")[2] or "network"


def registered(model: str, **arguments: Any) -> nn.Module:
    """Return a new network of `edge_bcs.models`; EdgeBcsError for an unknown name or impossible arguments."""
    from edge_bcs import models

    if model not in models.FACTORIES:
        raise EdgeBcsError(
            f"there is no network named {model!r}; choose one of {', '.join(models.FACTORIES)}, or name what "
            f"makes one of your own: {_OWN}."
        )
    return models.create(model, **arguments)


def own(
    model: str, shape: Shape | None = None, classes: int | None = None, option: str = "--model"
) -> nn.Module:
    """Return the network that the factory or the ONNX file named by ``option`` makes; it knows which.

    Args:
        model: what the option says. shape: (C, H, W) of the images, for an ONNX file that leaves it open.
        classes: given to a factory that has a parameter num_classes or classes.

    Raises:
        EdgeBcsError: nothing of that name, a fault inside the factory (its last line is given), something
            that is no torch module, or an ONNX file that is not supported.
    """
    from torch import nn

    if is_onnx(model):
        from edge_bcs.exporters.frontends.onnx import from_onnx

        read = from_onnx(model, shape)
        read.edge_bcs_factory = Path(model).name  # type: ignore[assignment]
        return read

    source, _, name = model.rpartition(":")
    if not source or not name:
        raise EdgeBcsError(f"{option} {model} is neither a network of edge-bcs nor {_OWN}.")
    with _sentence(f"{option} {model}: importing {source} failed"):
        found: Any = _imported(source)
    for part in name.split("."):
        if not hasattr(found, part):
            raise EdgeBcsError(f"{option} {model}: {source} has no {name}.")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise EdgeBcsError(
            f"{option} {model}: {name} is a {type(found).__name__}, and a callable without arguments that "
            "returns the network was expected."
        )
    arguments = _counting(found, classes)
    called = ", ".join(f"{key}={value}" for key, value in arguments.items())
    with _sentence(f"{option} {model}: {name}({called}) failed"):
        network = found(**arguments)
    if not isinstance(network, nn.Module):
        raise EdgeBcsError(
            f"{option} {model}: {name}({called}) returned a {type(network).__name__}, and a torch.nn.Module "
            "was expected."
        )
    # Of a file its name: where it lies on this machine is nobody else's business.
    network.edge_bcs_factory = f"{Path(source).name}:{name}"  # type: ignore[assignment]
    return network


def _counting(factory: Any, classes: int | None) -> dict[str, int]:
    """Return the arguments that tell a factory the number of classes, if it asks for that by name."""
    if classes is None:
        return {}
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    for name in ("num_classes", "classes"):
        parameter = parameters.get(name)
        if parameter is None or parameter.kind is parameter.POSITIONAL_ONLY:
            continue
        if parameter.default is parameter.empty or type(parameter.default) is int:
            return {name: classes}
    return {}


@contextlib.contextmanager
def _sentence(what: str) -> Iterator[None]:
    """Make one sentence of whatever the user's code raises, and keep what it prints out of our output."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except EdgeBcsError as error:
        raise EdgeBcsError(f"{what}: {error}") from None
    except (Exception, SystemExit) as error:
        last = traceback.format_exception_only(error)[-1].strip()
        raise EdgeBcsError(f"{what}{_place(error)}: {last[:_LONGEST]}") from error


def _place(error: BaseException) -> str:
    """Where the user's code is at fault, within a sentence; "" if that cannot be told."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f" in line {error.lineno} of {Path(error.filename).name}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(("<", *_INSTALLED))]
    return f" in line {own[-1].lineno} of {Path(own[-1].filename).name}" if own else ""


def _imported(source: str) -> Any:
    if not source.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        importlib.invalidate_caches()
        return importlib.import_module(source)
    file = Path(source)
    if not file.is_file():
        raise EdgeBcsError(f"there is no file {file}")
    folder = str(file.resolve().parent)  # of what it imports from beside it
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"edge_bcs_model_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def given_shape(options: dict[str, Any]) -> Shape | None:
    """Return what --input-shape says; None without it."""
    text = options["input_shape"]
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise EdgeBcsError(
            f"--input-shape must be channels, height and width, such as 3,32,32, not {text!r}."
        )
    channels, height, width = map(int, parts)
    return channels, height, width


def asked_shape(options: dict[str, Any]) -> Shape | None:
    """Return (C, H, W) as --input-shape, or --channels and --input-size, ask for it; None without them.

    A network of edge-bcs is always asked for square images, of 3 channels and 32 pixels by default.
    """
    shape, size, channels = given_shape(options), options.get("input_size"), options.get("channels")
    mine = is_own(options["model"])
    if shape is None:
        if mine and size is None:
            return None
        shape = (channels or 3, *(size or (32, 32)))
    elif size is not None or channels is not None:
        raise EdgeBcsError("--input-shape says all of it: leave --input-size and --channels out.")
    if not mine and shape[1] != shape[2]:
        raise EdgeBcsError(f"{options['model']} takes square images, not {shape[1]}×{shape[2]}.")
    return shape


def shape_of(sparse: SparseModel, options: dict[str, Any]) -> Shape:
    """Return (C, H, W) of the images of a network: as asked for, else as it was made for or trained on.

    Raises:
        EdgeBcsError: a network of the user's own that does not say, and nothing that was asked for.
    """
    shape, size, channels = given_shape(options), options.get("input_size"), options.get("channels")
    if shape is not None and (size is not None or channels is not None):
        raise EdgeBcsError("--input-shape says all of it: leave --input-size and --channels out.")
    known = shape or sparse.input_shape
    if known is not None:
        return channels or known[0], *(size or known[1:])
    if size is None:
        raise unknown_shape(str(sparse.record["name"]))
    return channels or 3, *size


def unknown_shape(name: str) -> EdgeBcsError:
    """What is wrong with a network of the user's own of which nobody said what images it takes."""
    return EdgeBcsError(
        f"{name} does not say which images it takes: add --input-size N or --input-shape C,H,W."
    )
