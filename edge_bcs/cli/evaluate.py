"""edge-bcs evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_bcs.cli.common import (
    Seed,
    class_names,
    class_names_option,
    data_option,
    examples,
    fraction,
    given,
    json_file_option,
    machine_of,
    memory_option,
    on_bad_option,
    pairs,
    percent,
    print_json,
    table,
    threads_option,
    trust_option,
    trusted,
)
from edge_bcs.cli.networks import (
    asked_shape,
    input_shape_option,
    input_size_option,
    is_onnx,
    is_own,
    normalization,
    normalize_option,
    own,
    own_model_option,
    resize_option,
    shape_of,
    weights_option,
    with_saved,
)
from edge_bcs.cli.pretrained import pretrained_option, zoo_file
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import write_json
from edge_bcs.core.outputs import check_output, containing, json_with
from edge_bcs.core.progress import Progress
from edge_bcs.core.resizing import Resize

if TYPE_CHECKING:
    from edge_bcs.core.answers import Answers, Batch

_ATTACKS = ("none", "fgsm", "pgd", "autoattack", "square", "bb")
_BOARDS = ("board", "native")
_BOARDS_ATTACKS = ("none", "fgsm", "pgd")
_TORCHS_OPTIONS = (
    *("step_size", "batch_size", "seed", "device", "resume"),
    *("model", "input_shape", "input_size", "weights", "normalize", "resize"),
)
_REPORTED = json_with("path", "data", "split", "engine")


@click.command()
@click.argument("path", type=click.Path(), required=False)
@own_model_option
@pretrained_option
@weights_option
@input_size_option
@input_shape_option
@normalize_option
@resize_option
@data_option
@class_names_option
@click.option(
    "--attack", type=click.Choice(_ATTACKS), default="pgd", show_default=True,
    help="none: clean accuracy alone; bb: Brendel & Bethge. autoattack, square and bb need edge-bcs[eval].",
)  # fmt: skip
@click.option("--attack-steps", type=click.IntRange(1), help="Steps of pgd (default 50) or bb (100).")
@click.option(
    "--restarts", type=click.IntRange(1), default=1, show_default=True, help="Random starts of pgd."
)
@click.option(
    "--step-size", help="How far one step of pgd moves a pixel, such as 2/255; default: 2.5·ε/steps."
)
@click.option(
    "--queries", type=click.IntRange(1), multiple=True,
    help="Queries of square (default 5000); repeated, one report has all.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Images at a time (torch)."
)
@click.option(
    "--seed", type=Seed(), default=0, show_default=True, help="Of the attack's random starts (torch)."
)
@click.option("--device", help="Such as cuda or cpu; default: a GPU if there is one (torch).")
@click.option(
    "--resume", type=click.Path(),
    help="File that keeps the counts after each batch: with it an interrupted evaluation goes on (torch).",
)  # fmt: skip
@click.option("--epsilon", help="How far the attack may change a pixel; default: the artifact's, or 8/255.")
@click.option(
    "--split", type=click.Choice(["train", "test"]), default="test", show_default=True,
    help="Which part of the data is measured.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Measure only so many images, drawn from all classes.")
@click.option(
    "--corruptions", is_flag=True,
    help="Also measure under the corruptions of CIFAR-10-C but frost (noise, blur, weather, JPEG, …), each "
    "in five severities and without an attack. On the host: it needs scipy and Pillow.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["board", "native", "torch", "sparse"]),
    help="board: the artifact's graphs; native: the same without ONNX Runtime; torch: PyTorch; sparse: as "
    "torch, on a CPU, but zero weights cost nothing, which makes long attacks on a large sparse network "
    "several times as fast. Default: board for artifacts and runs, unless an option needs torch.",
)  # fmt: skip
@on_bad_option
@memory_option
@threads_option
@trust_option
@click.option(
    "--html", "html_file", type=click.Path(), metavar="FILE",
    help="Write a web page with what is taken for what, the accuracy of each class, and the worst mistakes.",
)  # fmt: skip
@json_file_option
@examples("""
    edge-bcs evaluate run --data digits
    edge-bcs evaluate run --data photos/ --attack pgd --attack-steps 50 --restarts 10
    edge-bcs evaluate run --data photos/ --html answers.html
    edge-bcs evaluate run --data photos/ --attack none --corruptions
    edge-bcs evaluate runs/vgg16 --data cifar-10-batches-py --attack autoattack --engine sparse
    edge-bcs evaluate runs/mine --model nets.py:make --data photos/
    edge-bcs evaluate --pretrained resnet18-digits-16x16-99-at --data digits --attack pgd --restarts 1
    edge-bcs evaluate --model nets.py:make --weights dense.pt --data photos/ --input-size 96
    edge-bcs evaluate --model net.onnx --data photos/ --normalize imagenet --resize crop:0.875
    edge-bcs evaluate runs/vgg16 --data digits --attack square --queries 50 --queries 5000 --json square.json
""")
def command(path: str | None, json_file: str | None, html_file: str | None, **options: Any) -> None:
    """Measure the accuracy of an artifact, a run or a checkpoint (PATH, --pretrained), on clean images and
    under attack; or that of a dense network as it is: --model with --weights, or an ONNX file.

    Artifacts (folders, or a .tar) and runs are measured by their own graphs, as on the board. Attacks other
    than FGSM and PGD, and options marked (torch), load them into PyTorch. The JSON has the names of
    RobustBench: clean_acc, adv_acc, norm, eps; with --corruptions also mean_corruption_acc, and the accuracy
    under each corruption. Classes are matched by name; the data may lack some. "per_class" has the accuracy
    of each, and "confused" how many images of a class were taken for another.
    """
    from edge_bcs.cli import answers_page
    from edge_bcs.core.files import write_atomically

    _check(options)
    path = _what(path, options)
    if json_file not in (None, "-"):
        check_output(json_file, _REPORTED, "a report of `edge-bcs evaluate`")
    if html_file is not None:
        if options["resume"] is not None:
            raise EdgeBcsError(
                "--html needs every answer, and --resume keeps only their counts: leave one out."
            )
        check_output(html_file, containing(answers_page.TITLE), "a page of `edge-bcs evaluate --html`")
    counting = _Counting()
    options["engine"] = _chosen_engine(path, options)
    measure = _on_board if options["engine"] in _BOARDS else _in_torch
    with Progress(f"opening {path}"):
        result = measure(path, options, counting)
    result = {"path": path, "data": options["data_spec"], "split": options["split"], **result}
    answers = counting.answers
    if answers is not None and options["resume"] is None:
        result |= {"per_class": answers.per_class(), "confused": answers.confused()}
        if html_file is not None:
            page = answers_page.page(result, answers, counting.name)
            write_atomically(Path(html_file), page.encode(), make_folder=True)
    if json_file == "-":
        print_json(result)
        return
    if json_file is not None:
        write_json(Path(json_file), result, make_folder=True)
    rows = [
        ("engine", result["engine"]),
        ("images", result["samples"]),
        ("left out", f"{result['left_out']['count']} images" if "left_out" in result else None),
        ("clean accuracy", percent(result["accuracy"])),
    ]
    for curve in result.get("curve", []):
        rows.append((f"robust accuracy (square, {curve['queries']} queries)", percent(curve["adv_acc"])))
    if "robust_accuracy" in result and "curve" not in result:
        rows.append((f"robust accuracy ({options['attack']})", percent(result["robust_accuracy"])))
    if "mean_corruption_acc" in result:
        rows.append(("mean corruption accuracy", percent(result["mean_corruption_acc"])))
    rows.append(("page", html_file))
    pairs([*rows, *(("warning", text) for text in result.get("warnings", []))])
    if "corruptions" in result:
        click.echo()
        table(
            "Accuracy under corruptions, by severity",
            ("", "1", "2", "3", "4", "5"),
            [
                (name.replace("_", " "), *(f"{100 * share:.1f} %" for share in shares))
                for name, shares in result["corruptions"].items()
            ],
        )


class _Counting:
    """Counts answers as they come.

    Attributes:
        classes: names of the network's outputs, once they are known.
        name: of the image at a place of the data.
        answers: what was counted; None before the first one.
    """

    def __init__(self) -> None:
        self.classes: Sequence[str] | None = None
        self.name: Callable[[int], str] = "image {}".format
        self.answers: Answers | None = None

    def __call__(self, batch: Batch) -> None:
        """Count a batch."""
        from edge_bcs.core.answers import Answers
        from edge_bcs.data.classes import completed, numbers

        if self.answers is None:
            outputs = batch.logits.shape[1]
            known = self.classes
            self.answers = Answers(numbers(outputs) if known is None else completed(tuple(known), outputs))
        self.answers.add(batch)


def _check(options: dict[str, Any]) -> None:
    """Refuse settings that the attack does not have, and numbers that are none, before anything is loaded."""
    for name in ("epsilon", "step_size"):
        if options[name] is not None:
            fraction(options[name], f"--{name.replace('_', '-')}")
    if options["model"] is not None and not is_own(options["model"]):
        raise EdgeBcsError(
            f"--model FILE.py:FACTORY is for a network of your own: leave it out for {options['model']}."
        )
    attack = options["attack"]
    owners = {
        "queries": ("square",),
        "attack_steps": ("pgd", "bb"),
        "step_size": ("pgd",),
        "restarts": ("pgd",),
    }
    for name, attacks in owners.items():
        if given(name) and attack not in attacks:
            raise EdgeBcsError(
                f"--{name.replace('_', '-')} belongs to {' and '.join(attacks)}, not to {attack}."
            )


def _what(path: str | None, options: dict[str, Any]) -> str:
    """Return what is measured: PATH, or the file of --pretrained, --weights or --model, of which one must be
    there."""
    if options["pretrained"] is not None:
        if path is not None:
            raise EdgeBcsError(f"{path} and --pretrained both name the network: give one of them.")
        if options["trust_keys"] or options["min_release"]:
            raise EdgeBcsError("--trust-key checks artifacts: leave it out for a network of the zoo.")
        return str(zoo_file(options))
    weights: str | None = options["weights"]
    if path is None and weights is None and is_onnx(options["model"]):
        weights = options["model"]
    if (path is None) == (weights is None):
        raise EdgeBcsError(
            "name what is measured: an artifact, a run or a checkpoint, --pretrained NAME, or --weights FILE "
            "with --model, and only one of them."
        )
    for name in ("normalize", "resize"):
        if options[name] is not None and weights is None:
            raise EdgeBcsError(f"--{name} belongs to a dense network of yours; {path} has its own.")
    if weights is not None and options["model"] is None:
        raise EdgeBcsError("--weights needs --model FILE.py:FACTORY, which makes the network.")
    if weights is not None and (options["trust_keys"] or options["min_release"]):
        raise EdgeBcsError("--trust-key checks artifacts: leave it out for a network of your own.")
    return path or str(weights)


def _chosen_engine(path: str, options: dict[str, Any]) -> str:
    """Return the engine; refuse the board what only torch can do."""
    from edge_bcs.runtime.archive import is_artifact

    needs_torch = [f"--{name.replace('_', '-')}" for name in _TORCHS_OPTIONS if given(name)]
    if options["attack"] not in _BOARDS_ATTACKS:
        needs_torch.insert(0, f"--attack {options['attack']}")
    asked = options["engine"]
    if asked in _BOARDS and needs_torch:
        engines = "torch" if needs_torch[0] == "--device" else "torch or sparse"
        raise EdgeBcsError(f"{needs_torch[0]} needs --engine {engines}; --engine {asked} has fgsm and pgd.")
    if asked == "sparse" and given("device"):
        raise EdgeBcsError("--engine sparse computes on the CPU: leave --device out.")
    board = asked in _BOARDS or (asked is None and is_artifact(path) and not needs_torch)
    if given("memory") and not board:
        raise EdgeBcsError("--memory needs --engine board or native: other engines have no such cap.")
    return asked or ("board" if board else "torch")


def _on_board(path: str, options: dict[str, Any], counting: _Counting) -> dict[str, Any]:
    from edge_bcs.cli.reading import Reading
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.trainer import Trainer

    attack = options["attack"]
    steps = {"none": 0, "fgsm": 1}.get(attack, options["attack_steps"] or 50)
    artifact = Artifact.read(path, **trusted(options))
    engine = "native" if options["engine"] == "native" else None
    with Trainer(artifact, **machine_of({**options, "engine": engine})) as trainer:
        reading = Reading(
            options["data_spec"], artifact.input_shape, options["on_bad"], resize=artifact.resize
        )
        data = reading.open(options["split"])
        epsilon = artifact.objective.attack.epsilon
        if options["epsilon"] is not None:
            epsilon = fraction(options["epsilon"], "--epsilon")
        found = trainer.match_classes(data)
        matching = found.report()
        counting.classes, counting.name = trainer.classes, data.name_of
        with Progress("measuring" if attack == "none" else attack, unit="images") as bar:
            measured = trainer.evaluate(
                data,
                steps,
                attack="pgd" if attack == "none" else attack,
                restarts=options["restarts"],
                limit=options["limit"],
                epsilon=epsilon,
                on_batch=lambda done, total: bar.update(done, total=total),
                on_answers=counting,
            )
        report = {
            "engine": options["engine"],
            "clean_acc": measured["accuracy"],
            "adv_acc": measured.get("robust_accuracy"),
            "attack": attack,
            "norm": "Linf",
            "eps": epsilon,
            **measured,
            "sparsity": artifact.sparsity,
            "kappa": artifact.kappa,
            "size": artifact.size,
            "step": trainer.steps,
            **matching,
            "peak_bytes": trainer.memory()["peak_bytes"],
            **reading.report(),
        }
        if attack != "none":
            report |= {"steps": steps, "step_size": epsilon * (1.0 if attack == "fgsm" else 2.5 / steps)}
        if options["corruptions"]:
            from edge_bcs.core.answers import answers_of
            from edge_bcs.evaluation.corruptions import under_corruptions

            def answer(images: Any) -> Any:
                return answers_of(trainer.logits(images))

            report |= under_corruptions(
                answer, found.data, samples=options["limit"], seed=options["seed"], progress=True
            )
        return report


def _in_torch(path: str, options: dict[str, Any], counting: _Counting) -> dict[str, Any]:
    import torch

    from edge_bcs import loading
    from edge_bcs.cli.reading import Reading
    from edge_bcs.data import classes
    from edge_bcs.evaluation import measures as evaluation
    from edge_bcs.method.connectivity import sparsify
    from edge_bcs.training.devices import choose_device

    device = choose_device("cpu" if options["engine"] == "sparse" else options["device"])
    shape = None if options["model"] is None else asked_shape(options)
    network = None if options["model"] is None else own(options["model"], shape)
    if network is not None and path in (options["weights"], options["model"]):
        if options["weights"] is not None:
            network = with_saved(network, options, shape)
        sparse = sparsify(network, 0, dense=[], start="magnitude").eval()
        sparse.normalize = normalization(options)
        if options["resize"] is not None:
            sparse.resize = Resize.parse(options["resize"])
    else:
        sparse = loading.load(path, network, **trusted(options))
    names = class_names(options)
    if names is not None:
        sparse.classes = classes.named(sparse.classes, names)
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    sparse = sparse.to(device)
    reading = Reading(
        options["data_spec"], _input_shape(path, sparse, options), options["on_bad"], resize=sparse.resize
    )
    data = reading.open(options["split"])
    attack = options["attack"]
    step_size = options["step_size"]
    arguments = {
        "attack": attack,
        "epsilon": _epsilon(path, options),
        "steps": options["attack_steps"] or (100 if attack == "bb" else 50),
        "restarts": options["restarts"],
        "step_size": None if step_size is None else fraction(step_size, "--step-size"),
        "batch_size": options["batch_size"],
        "samples": options["limit"],
        "seed": options["seed"],
        "progress": True,
        "resume": options["resume"],
        "on_answers": counting,
        "corruptions": options["corruptions"],
    }
    counting.classes, counting.name = getattr(sparse, "classes", None), data.name_of
    with ExitStack() as stack:
        if options["engine"] == "sparse":
            _use_graphs(stack, sparse, data.shape, options["threads"])
        report = evaluation.evaluate(sparse, data, queries=options["queries"] or 5000, **arguments)
    named = {"accuracy": report["clean_acc"]}
    if attack != "none":
        named["robust_accuracy"] = report["adv_acc"]
    described = {
        "method": None if path in (options["weights"], options["model"]) else _method(path),
        "sparsity": sparse.sparsity,
        "kappa": sparse.kappa,
        "size": sparse.size,
        "step": sparse.step,
        **reading.report(),
    }
    return {"engine": options["engine"], "device": str(device), **named, **report, **described}


def _use_graphs(stack: ExitStack, sparse: Any, shape: Any, threads: int | None) -> None:
    from edge_bcs.exporters.passes import by_graphs

    try:
        stack.enter_context(by_graphs(sparse, shape, threads))
    except EdgeBcsError as error:
        raise EdgeBcsError(f"{error} Leave --engine sparse out, and PyTorch measures it.") from None


def _input_shape(path: str, sparse: Any, options: dict[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that a stored network takes: its artifact or its network says."""
    from edge_bcs.runtime.archive import is_artifact

    if is_artifact(path) and options["input_shape"] is None and options["input_size"] is None:
        from edge_bcs.runtime.artifact import Artifact

        channels, height, width = Artifact.read(path).input_shape
        return channels, height, width
    return shape_of(sparse, options)


def _method(path: str) -> str | None:
    """Return the method that a checkpoint says it was trained with; None for artifacts."""
    from edge_bcs.checkpoint import read_checkpoint
    from edge_bcs.core.metadata import parse_object
    from edge_bcs.runtime.archive import is_artifact

    file = Path(path) / "checkpoint.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file() or is_artifact(path):
        return None
    try:
        method = parse_object(read_checkpoint(file).metadata.get("plan", "{}")).get("method")
    except ValueError:
        return None
    return method if isinstance(method, str) else None


def _epsilon(path: str, options: dict[str, Any]) -> float:
    if options["epsilon"] is not None:
        return fraction(options["epsilon"], "--epsilon")
    from edge_bcs.runtime.archive import is_artifact

    if is_artifact(path):
        from edge_bcs.runtime.artifact import Artifact

        return float(Artifact.read(path).objective.attack.epsilon)
    return 8 / 255
