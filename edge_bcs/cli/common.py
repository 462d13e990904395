"""What several commands share: output, options, numbers as people write them."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import OBJECTIVES, WEIGHTED
from edge_bcs.core.progress import is_terminal
from edge_bcs.core.settings import ATTACKS, AUGMENTATIONS, KINDS, PRECISIONS, Attack
from edge_bcs.core.text import shown
from edge_bcs.runtime.signature import TRUSTED

if TYPE_CHECKING:
    from edge_bcs.runtime.artifact import Artifact

_NARROW = 16  # columns, in which a value is still read with ease
# A path or a number is taken by hand from what is printed: never broken.
_WRAPPED: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


class Seed(click.types.IntParamType):
    """A seed that numpy, torch and the board's random numbers all take."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number that the text is."""
        text = str(value)
        if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 1 << 63):
            self.fail(f"{text} is not a seed: a whole number of at least 0 and below 2^63.", param, ctx)
        return int(text)


objective_option = click.option(
    "--objective",
    type=click.Choice(list(OBJECTIVES)),
    default="at",
    show_default=True,
    help="The loss that training lowers; natural trains without an attack.",
)
train_option = click.option(
    "--train",
    metavar="PART",
    default="all",
    show_default=True,
    help="What is trained: all; head, the last layer with weights; last:N, the last N of them, with their "
    "norms and biases; norm, the scales and shifts of norms; bias. Less of it needs less memory.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON object.")
json_file_option = click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the answer as JSON, to standard output if no file is named.",
)
data_option = click.option(
    "--data",
    "data_spec",
    metavar="PATH|digits",
    required=True,
    help="A folder or .tar[.gz] with a folder of images for each class, CIFAR-10/100 (python version), SVHN "
    ".mat, .npz, or digits, which comes with edge-bcs.",
)
class_names_option = click.option(
    "--class-names",
    metavar="A,B,…|FILE",
    help="Names of the network's outputs in the order of the labels, or a file with one name a line; "
    "default: those it has, or those of the first data it is trained on. Data is matched with them by name.",
)
on_bad_option = click.option(
    "--on-bad",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What an image file that cannot be used does: stop ends the command before it begins; skip leaves "
    "the image out and lists it.",
)
_augment_option = click.option(
    "--augment",
    type=click.Choice(AUGMENTATIONS),
    help="shift: by ±10 %, and flip; photo: crop, flip, and change brightness, contrast and saturation; "
    "zoom: the same, from nearer or farther; mix: zoom, and chains of small changes of tones and shape, for "
    "cameras and light that no image here has; mirror: flip alone. Default: shift, which --augment alone "
    "is, too.",
)
_no_augment_option = click.option("--no-augment", is_flag=True, help="Short for --augment none.")
balance_option = click.option(
    "--balance", is_flag=True, help="Draw images so that the classes come up evenly, however many each has."
)
schedule_option = click.option(
    "--schedule",
    type=click.Choice(KINDS),
    help="How the learning rate changes; steps (the default): divided by 10 at 50 % and again at 75 % of the "
    "steps; cosine: falls to 0; one-cycle: rises in the first 30 % from a 25th, then falls.",
)
warmup_option = click.option(
    "--warmup",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="Of the steps, such as 0.05, in which the learning rate rises to its highest.",
)
seed_option = click.option(
    "--seed", type=Seed(), default=0, show_default=True, help="Of the connections and of all randomness."
)
beta_option = click.option(
    "--beta", type=float, help="Weight of the robust term; default: 6 for trades and rst, 4 for mart."
)
memory_option = click.option(
    "--memory",
    metavar="SIZE",
    help="Most bytes that tensors and buffers may take at once, such as 6MiB; default: the artifact's "
    "budget.",
)
_trust_key_option = click.option(
    "--trust-key",
    "trust_keys",
    type=click.Path(),
    multiple=True,
    envvar=TRUSTED,
    show_envvar=True,
    metavar="FILE",
    help="Public key (Ed25519, PEM): refuse an artifact that was not signed with it. May be repeated: one of "
    "them must fit.",
)
_min_release_option = click.option(
    "--min-release",
    type=click.IntRange(1),
    metavar="N",
    help="With --trust-key: refuse an artifact with a lower release number (see `export --release`) or none.",
)
THREADS = click.IntRange(1, 1024)  # what the runtime takes; torch crashes, or hardly moves, with many more
threads_option = click.option(
    "--threads", type=THREADS, help="Threads that compute; default: one for each processor."
)

engine_option = click.option(
    "--engine", type=click.Choice(["onnxruntime", "native"]),
    help="What runs the graphs: ONNX Runtime, the default where it is installed, or our own runner, which "
    "takes some 30 MiB less. Both give the same bits.",
)  # fmt: skip


def precision_option(default: str | None, said: str) -> Callable[[Any], Any]:
    """Add --attack-precision, whose default the help calls ``said``."""
    option = click.option(
        "--attack-precision", type=click.Choice(PRECISIONS), default=default,
        help="Of the training's attacks: half is two bytes a number, faster on processors that have "
        "arithmetic in it (AVX-512 BF16, ARM's FP16); auto is half on those and f32 on others. What is "
        f"learned stays float32. Default: {said}.",
    )  # fmt: skip
    return option


def machine_of(options: dict[str, Any]) -> dict[str, Any]:
    """What a Trainer is told of the machine and of the names of its classes."""
    return {
        **{name: options[name] for name in ("memory", "threads", "engine")},
        "class_names": class_names(options),
        # Where nothing is trained, an attack is a measurement, which no processor may change.
        "attack_precision": options.get("attack_precision", "f32"),
    }


class AugmentingCommand(click.Command):
    """A command with --augment, of which 0.1 had only the flag: alone it is --augment shift."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line."""
        end = args.index("--") if "--" in args else len(args)
        for number, word_given in enumerate(args[:end]):
            if word_given == "--augment" and [*args, ""][number + 1] not in AUGMENTATIONS:
                args = [*args[:number], "--augment=shift", *args[number + 1 :]]
        return super().parse_args(ctx, args)


def augment_option(function: Any) -> Any:
    """Add --augment and --no-augment, for an `AugmentingCommand`."""
    return _augment_option(_no_augment_option(function))


def augmentation(options: dict[str, Any]) -> str | None:
    """Return the augmentation that they give; None without them."""
    augment: str | None = options["augment"]
    if options["no_augment"] and augment not in (None, "none"):
        raise EdgeBcsError(f"--no-augment and --augment {augment} contradict each other: leave one out.")
    return "none" if options["no_augment"] else augment


def attack_option(least_steps: int) -> Callable[[Any], Any]:
    """Add --training-attack, --epsilon, --step-size and --attack-steps, of at least so many steps, for
    `attack_of`."""
    options = (
        click.option(
            "--training-attack", type=click.Choice(ATTACKS), default=ATTACKS[0], show_default=True,
            help="With what training attacks: PGD, or one step instead of its many: fgsm-rs (1.25 ε "
            "from a random start in the ball), n-fgsm (ε from noise of ±2 ε). Where the one step collapses, "
            "which PGD-20 on held-out images shows, training goes on with PGD and says so.",
        ),
        click.option(
            "--epsilon", default="8/255", show_default=True,
            help="How far the attack may change a pixel, in [0, 1].",
        ),
        click.option(
            "--step-size", default="2/255", show_default=True, help="How far one step of PGD moves a pixel."
        ),
        click.option(
            "--attack-steps", type=click.IntRange(least_steps), default=10, show_default=True,
            help="Steps of PGD in training.",
        ),
    )  # fmt: skip

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def trust_option(function: Any) -> Any:
    """Add --trust-key and --min-release: which artifacts are taken at all."""
    return _trust_key_option(_min_release_option(function))


def trusted(options: dict[str, Any]) -> dict[str, Any]:
    """Return what they gave, as arguments of `edge_bcs.load`."""
    return {name: options[name] for name in ("trust_keys", "min_release")}


def class_names(options: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the names that --class-names gives; None without it."""
    from edge_bcs.data.classes import given_names

    text = options["class_names"]
    return None if text is None else given_names(text)


def given(option: str) -> bool:
    """Return whether the running command was given the option of that Python name, not left its default."""
    source = click.get_current_context().get_parameter_source(option)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def check_beta(options: dict[str, Any]) -> None:
    """Refuse --beta where the objective has no second term that it could weigh."""
    if options["beta"] is not None and options["objective"] not in WEIGHTED:
        raise EdgeBcsError(f"--beta belongs to {', '.join(WEIGHTED)}, not to {options['objective']}.")


def word(value: object) -> str:
    """Return a word of a command as a shell takes it; a Path that begins with - stays one."""
    text = str(value)
    return shlex.quote(f"./{text}" if text.startswith("-") and isinstance(value, Path) else text)


def command_line(command: str, *words: object) -> str:
    """Return what to type in a shell for `edge-bcs COMMAND WORD …`."""
    return " ".join(["edge-bcs", command, *map(word, words)])


def print_json(content: dict[str, Any] | list[Any]) -> None:
    """Print one JSON object, or a list, on standard output."""
    click.echo(json.dumps(content, indent=1, default=str))


def fraction(text: str, name: str) -> float:
    """Return the number of at least 0 that "0.03" or "8/255" means."""
    try:
        above, _, below = text.partition("/")
        number = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise EdgeBcsError(f"{name} must be a number such as 0.031 or 8/255, not {text!r}.")
    return number


def attack_of(options: dict[str, Any]) -> Attack:
    """Return the training attack of --training-attack, --epsilon, --step-size and --attack-steps."""
    return Attack(
        kind=options["training_attack"],
        epsilon=fraction(options["epsilon"], "--epsilon"),
        step_size=fraction(options["step_size"], "--step-size"),
        steps=options["attack_steps"],
    )


def width() -> int | None:
    """Return the columns of standard output: what COLUMNS says, or the terminal; None where lines may be as
    long as they are (a pipe, a file)."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if is_terminal(sys.stdout):
        return shutil.get_terminal_size().columns
    return None


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; the first column is text, the others are numbers. Nothing of it is ever cut off."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edge_bcs.targets.tables import fitting, natural_width

    content = Table(
        title=Text(title), title_justify="left", title_style="bold", header_style="bold", box=None
    )
    for number, column in enumerate(columns):
        content.add_column(Text(column), justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        content.add_row(*(Text(shown(str(cell))) for cell in row))
    available, needed = width(), natural_width(content)
    console = Console(highlight=False, width=needed if available is None else available)
    console.print(fitting(content, console.width), soft_wrap=True)


def pairs(rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one pair a line; what is longer than a line goes on below its beginning."""
    listed = [(name, shown(str(value))) for name, value in rows if value is not None]
    indent = max(len(name) for name, _ in listed) + 4
    available = width()
    for name, value in listed:
        line = f"  {name:<{indent - 4}}  {value}"
        if available is None or len(line) <= available:
            click.echo(line)
        elif available - indent >= _NARROW:
            click.echo(textwrap.fill(line, available, subsequent_indent=" " * indent, **_WRAPPED))
        else:
            click.echo(f"  {name}")
            click.echo(textwrap.indent(textwrap.fill(value, max(1, available - 4), **_WRAPPED), "    "))


def counted(number: int, one: str) -> str:
    """1, "step" → "1 step"; 2, "step" → "2 steps"."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def activations(artifact: Artifact) -> str:
    """What an artifact's plan does with what the backward pass needs."""
    choice = artifact.manifest["memory"].get("choice", {})
    ways = {"recomputed": "computed a second time", "narrowed": "kept as bfloat16"}
    lists = {name: value for name, value in choice.items() if isinstance(value, list) and value}
    parts = [f"{len(lists[name])} {way}" for name, way in ways.items() if name in lists]
    if artifact.objective.two_branches and choice.get("keep_both") is False:
        parts.append("the clean branch run twice")
    return ", ".join(parts) or "all kept for the backward pass"


def dense_kernels(artifact: Artifact) -> str | None:
    """What an artifact's kernels outside its connections are; None if there are none."""
    shapes = [item["shape"] for item in artifact.manifest["dense"] if sum(n > 1 for n in item["shape"]) > 1]
    if not shapes:
        return None
    kernels = "1 kernel" if len(shapes) == 1 else f"{len(shapes)} kernels"
    return f"{kernels} of {sum(map(math.prod, shapes)):,} weights, which the sparsity does not count"


def percent(share: float | None) -> str:
    """0.5 → "50.0 %"."""
    return "–" if share is None else f"{100 * share:.1f} %"


def examples(text: str) -> Callable[[Any], Any]:
    """Append examples to a command's help, each on its own line."""

    def decorate(function: Any) -> Any:
        function.__doc__ = f"{function.__doc__}\n\n    \b\n    Examples:\n" + "\n".join(
            f"      {line.strip()}" for line in text.strip().splitlines()
        )
        return function

    return decorate
