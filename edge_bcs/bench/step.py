"""Time one robust training step beside dense PyTorch, on the same cores, in one interleaved run.

Both sides do the same mathematics: PGD on the input with frozen batch-norm statistics, then loss, gradients
and the momentum update on the whole batch; ours also rewires. The dense side is what a PyTorch user has
today: the same network with all its weights, channels_last.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_bcs.bench import roofline
from edge_bcs.bench.machine import Roof
from edge_bcs.bench.profiler import operator_seconds
from edge_bcs.bench.turns import TorchStep, in_turn, seconds_of
from edge_bcs.core import random as counter_random
from edge_bcs.core.errors import EdgeBcsError

if TYPE_CHECKING:
    from edge_bcs.runtime import Artifact
    from edge_bcs.runtime.sessions import SessionEngine

# Images lie side by side in vectors of up to 16. With 16 for each thread, threads share less (VGG-16 on two
# threads of a Xeon: 0.39 s a step, 0.47 s with 16 in all); with 16 in all, more of a network stays in the
# caches (WRN-28-4 on two threads of an EPYC: 0.39 s a step, 0.49 s with 32, while they have one cache).
_IMAGES_IN_VECTORS = 16
_GRAPHS = ("attack", "training", "optimizer")


@dataclass(frozen=True, kw_only=True)
class StepComparison:
    """Seconds of one adversarial training step, ours and dense PyTorch's, and what was compared.

    The seconds hold one entry a repetition, in the order in which they ran; none for a side that was left
    out. `parts` holds median seconds of one run of each graph, and how often the step runs it; `operators`
    the median seconds of each type of operator in one run of each graph, by ONNX Runtime's profiler, and
    `rooflines` what they take at least by `roofline.sums`, if a roof was given.
    """

    model: str
    sparsity: float
    distribution: str
    batch_size: int
    micro_batch: int
    attack_steps: int
    threads: int
    isa: str
    sparse_seconds: tuple[float, ...]
    dense_seconds: tuple[float, ...]
    sparseprop_seconds: tuple[float, ...]
    optimizer_seconds: tuple[float, ...]
    parts: dict[str, tuple[float, int]]
    operators: dict[str, dict[str, float]]
    rooflines: dict[str, dict[str, dict[str, float]]]
    kappa: int
    peak_bytes: int

    @property
    def sparse_median(self) -> float:
        """Our median seconds of a step."""
        return statistics.median(self.sparse_seconds)

    @property
    def ratio(self) -> float:
        """Dense seconds over ours: the median of the ratios of neighbouring repetitions."""
        return self._over_ours(self.dense_seconds)

    @property
    def optimizer_share(self) -> float:
        """What the whole update (connections, rewiring, lists, dense parameters) takes of our step."""
        return statistics.median(self.optimizer_seconds) / self.sparse_median

    @property
    def rewiring_share(self) -> float:
        """What the operator RewireStep alone takes of our step."""
        return self.operators["optimizer"]["RewireStep"] / self.sparse_median

    def least(self, which: str = "seconds") -> float | None:
        """Seconds of a step if every operator ran at its roofline; None without a roof.

        Args:
            which: "seconds", or "in_cache_seconds": if no tensor left the caches between two operators.
        """
        if not self.rooflines:
            return None
        runs = {graph: count for graph, (_, count) in self.parts.items()} | {"optimizer": 1}
        return sum(
            count * operator[which]
            for graph, count in runs.items()
            for operator in self.rooflines[graph].values()
        )

    def _over_ours(self, seconds: tuple[float, ...]) -> float:
        pairs = zip(seconds, self.sparse_seconds, strict=True)
        return statistics.median(other / ours for other, ours in pairs)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        found = asdict(self) | {
            "sparse_median_seconds": self.sparse_median,
            "optimizer_share": self.optimizer_share,
            "rewiring_share": self.rewiring_share,
        }
        if self.rooflines:
            found |= {f"least_{which}": self.least(which) for which in ("seconds", "in_cache_seconds")}
        if self.dense_seconds:
            found |= {"ratio": self.ratio, "dense_median_seconds": statistics.median(self.dense_seconds)}
        if self.sparseprop_seconds:
            found["sparseprop_ratio"] = self._over_ours(self.sparseprop_seconds)
        return found


def compare_step(
    *,
    model: str = "vgg16",
    sparsity: float = 0.99,
    distribution: str = "uniform",
    batch_size: int = 128,
    micro_batch: int | None = None,
    attack_steps: int = 10,
    threads: int = 2,
    repetitions: int = 3,
    image_size: int = 32,
    dense: bool = True,
    roof: Roof | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> StepComparison:
    """Time whole adversarial training steps (AT, PGD, update, rewiring) against dense PyTorch.

    Args:
        model: name of a network of `edge_bcs.models`, for colour images and 10 classes.
        sparsity: fraction of weights that are dormant, in (0, 1).
        distribution: initial per-layer densities, "paper", "uniform" or "erk".
        batch_size: images a step.
        micro_batch: images our artifact holds at once; default: 16, the longest vector, and 16 for each
            thread, both timed in the same run; the faster by its median counts.
        attack_steps: PGD steps for each image.
        threads: threads of both sides.
        repetitions: timed steps of each side, interleaved; one untimed step of each comes first.
        image_size: height and width of the images.
        dense: time the other sides, too: dense PyTorch and, where it is installed, PyTorch with SparseProp's
            convolutions.
        roof: what the machine reaches at most, for the least time of every operator.
        progress: called with a sentence before each part.

    Raises:
        EdgeBcsError: an argument outside its range or an unknown network.
    """
    from edge_bcs.runtime import Trainer, budget

    if repetitions < 1 or batch_size < 1 or threads < 1:
        raise EdgeBcsError("repetitions, batch size and threads must be at least 1.")
    import torch

    torch.set_num_threads(threads)
    sizes = micro_batches(batch_size, threads) if micro_batch is None else [micro_batch]
    given = (model, sparsity, distribution, image_size)
    with contextlib.ExitStack() as stack:
        artifacts = {
            size: stack.enter_context(exported(*given, size, progress, batch_size, attack_steps))
            for size in sizes
        }
        sparse = next(iter(artifacts.values()))[1]
        images, labels = batch_of(batch_size, image_size)
        sides: dict[str, Callable[[], float]] = {}
        for size, (artifact, _) in artifacts.items():
            if len(artifacts) == 1:
                trainer = stack.enter_context(Trainer(artifact, threads=threads))
                sides[f"{size}"] = functools.partial(seconds_of, trainer.step, images, labels)
            else:
                sides[f"{size}"] = functools.partial(trainer_seconds, artifact, threads, images, labels)
        if dense:
            tensors = torch.from_numpy(images), torch.from_numpy(labels)
            for name, network in _others(model, sparse, tensors[0]).items():
                step = TorchStep(network, attack_steps, channels_last=name == "dense")
                sides[name] = functools.partial(seconds_of, step, *tensors)
        seconds = in_turn(sides, repetitions, progress)
        chosen = min(artifacts, key=lambda size: statistics.median(seconds[f"{size}"]))
        if len(artifacts) > 1:
            trainer = stack.enter_context(Trainer(artifacts[chosen][0], threads=threads))
            trainer.step(images, labels)
        update = in_turn(
            {"update": functools.partial(seconds_of, trainer.run_optimizer_only)}, repetitions, lambda _: None
        )
        peak, described = trainer.peak_bytes, trainer.artifact
        trainer.close()
        with engine_with_batch(described, threads, images, labels) as engine:
            parts = graph_medians(engine, batch_size)
            operators = {graph: operator_medians(engine, graph) for graph in _GRAPHS}
        rooflines = {
            graph: roofline.sums(roofline.graph_rooflines(described, graph, roof))
            for graph in _GRAPHS
            if roof is not None
        }
    return StepComparison(
        model=model,
        sparsity=sparsity,
        distribution=distribution,
        batch_size=batch_size,
        micro_batch=chosen,
        attack_steps=attack_steps,
        threads=threads,
        isa=budget.isa(),
        sparse_seconds=tuple(seconds[f"{chosen}"]),
        dense_seconds=tuple(seconds.get("dense", ())),
        sparseprop_seconds=tuple(seconds.get("sparseprop", ())),
        optimizer_seconds=tuple(update["update"]),
        parts=parts,
        operators=operators,
        rooflines=rooflines,
        kappa=sparse.kappa,
        peak_bytes=peak,
    )


def compare_pass(
    *,
    model: str,
    sparsity: float,
    threads: int,
    repetitions: int,
    batch_size: int = 32,
    roof: Roof | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Seconds of one forward and backward pass of a whole network (uniform density, all gradients).

    Ours takes 16 images at once, as the compiler does by itself.

    The layers follow each other, so that a layer finds its input where the layer before it left it: in the
    caches, as far as they reach. Everything between the convolutions is part of it on all sides.

    Returns:
        "seconds": side ("edge_bcs", "torch", and "sparseprop" where that is installed) → seconds as
        `operators.times` takes them; with a ``roof`` also "least_seconds" and "least_in_cache_seconds", ours
        if every operator ran at its roofline.
    """
    import torch

    from edge_bcs.bench.operators import times
    from edge_bcs.runtime import Artifact

    torch.set_num_threads(threads)
    images_at_once = min(batch_size, _IMAGES_IN_VECTORS)
    images, labels = batch_of(batch_size, 32)
    with contextlib.ExitStack() as stack:
        folder, sparse = stack.enter_context(
            exported(model, sparsity, "uniform", 32, images_at_once, progress, batch_size, 1)
        )
        artifact = Artifact.read(folder)
        engine = stack.enter_context(engine_with_batch(artifact, threads, images, labels))
        runs = -(-batch_size // artifact.micro_batch)
        given = torch.from_numpy(images), torch.from_numpy(labels)

        def ours() -> None:
            for _ in range(runs):
                engine.run("training")

        sides: dict[str, Callable[[], Any]] = {"edge_bcs": ours}
        for name, network in _others(model, sparse, given[0]).items():
            step = TorchStep(network, 0, channels_last=name == "dense")
            sides["torch" if name == "dense" else name] = functools.partial(step.gradients, *given)
        progress(f"one pass of {model}, sparsity {sparsity}")
        taken = times(list(sides.values()), repetitions)
        found: dict[str, Any] = {"seconds": dict(zip(sides, taken, strict=True))}
        if roof is not None:
            each = [item for _, item in roofline.graph_rooflines(artifact, "training", roof)]
            found["least_seconds"] = runs * sum(item.seconds for item in each)
            found["least_in_cache_seconds"] = runs * sum(item.in_cache for item in each)
        return found


def micro_batches(batch_size: int, threads: int) -> list[int]:
    """The micro-batches of which the faster counts: the longest vector, and as many for each thread."""
    return sorted({min(batch_size, images) for images in (_IMAGES_IN_VECTORS, _IMAGES_IN_VECTORS * threads)})


def batch_of(count: int, size: int) -> tuple[Any, Any]:
    """Images f32 [count, 3, size, size] and labels i64 [count]."""
    pixels = counter_random.uniform(
        count * 3 * size * size, seed=0, step=0, purpose=counter_random.EVALUATION
    )
    return pixels.reshape(count, 3, size, size), (np.arange(count) % 10).astype(np.int64)


def trainer_seconds(artifact: Path, threads: int, images: Any, labels: Any) -> float:
    """Seconds of a step of a trainer of its own, after one that is not timed: a process has one at a time."""
    from edge_bcs.runtime import Trainer

    with Trainer(artifact, threads=threads) as trainer:
        trainer.step(images, labels)
        return seconds_of(trainer.step, images, labels)


@contextlib.contextmanager
def exported(
    model: str,
    sparsity: float,
    distribution: str,
    image_size: int,
    micro_batch: int,
    progress: Callable[[str], None],
    batch_size: int,
    attack_steps: int,
) -> Iterator[tuple[Path, Any]]:
    """The artifact of our side, and the sparse network that it is exported from."""
    from edge_bcs import Attack, Memory, exporters, models
    from edge_bcs.method import connectivity

    progress(f"exporting {model} at sparsity {sparsity} ({distribution}), micro-batch {micro_batch}")
    sparse = connectivity.sparsify(
        models.create(model, num_classes=10), sparsity=sparsity, seed=0, distribution=distribution
    )
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        exporters.export(
            sparse,
            artifact,
            objective="at",
            input_shape=(3, image_size, image_size),
            memory=Memory(micro_batch=micro_batch),
            batch_norm="frozen",
            batch_size=batch_size,
            attack=Attack(steps=attack_steps),
            validate=False,
        )
        yield artifact, sparse


def _others(model: str, sparse: Any, images: Any) -> dict[str, Any]:
    """The networks beside ours: dense, and with SparseProp's layers where that is installed."""
    from edge_bcs import models

    found = {"dense": models.create(model, num_classes=10), "sparseprop": _sparseprop(sparse, images)}
    return {name: network for name, network in found.items() if network is not None}


@contextlib.contextmanager
def engine_with_batch(artifact: Artifact, threads: int, images: Any, labels: Any) -> Iterator[SessionEngine]:
    """The graphs of an artifact, with the first micro-batch of a batch, attacked, in their buffers."""
    from edge_bcs.runtime.attack import craft
    from edge_bcs.runtime.sessions import SessionEngine

    engine = SessionEngine(artifact, None, threads)
    try:
        engine.load(images[: artifact.micro_batch], labels[: artifact.micro_batch], 1.0 / len(images))
        craft(engine, 0, len(images), seed=0, step=0)
        engine.arrays["lazy_reset_grad"][0] = True
        engine.run("training")
        names = ("learning_rate", "weight_decay", "momentum", "noise")
        engine.arrays["hyper"][...] = [artifact.hyper[name] for name in names]
        yield engine
    finally:
        engine.close()


def operator_medians(engine: SessionEngine, graph: str) -> dict[str, float]:
    """Median seconds of all operators of each type in a run of a graph."""
    found: dict[str, float] = {}
    for name, seconds in node_medians(engine, graph).items():
        kind = name.split(".")[-1]
        found[kind] = found.get(kind, 0.0) + seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def node_medians(engine: SessionEngine, graph: str, runs: int = 7) -> dict[str, float]:
    """Median seconds of each node in a run of a graph, in their order; every run starts from one state."""
    import onnxruntime

    from edge_bcs.runtime.sessions import session_options

    state = {name: array.copy() for name, array in engine.arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(engine.threads)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            engine.artifact.read_graph(graph), options, providers=["CPUExecutionProvider"]
        )
        binding = engine.bind(session, graph)
        for _ in range(runs + 1):
            for name, array in state.items():
                engine.arrays[name][...] = array
            session.run_with_iobinding(binding)
        taken = operator_seconds(session)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def graph_medians(engine: SessionEngine, batch_size: int) -> dict[str, tuple[float, int]]:
    """Median seconds of a run of each graph, and its runs in a step."""
    micro_batches = -(-batch_size // engine.artifact.micro_batch)
    runs = {"attack": micro_batches * engine.artifact.objective.attack.steps_taken, "training": micro_batches}
    found = {}
    for graph, count in runs.items():
        taken = [seconds_of(engine.run, graph) for _ in range(10)]
        found[graph] = (statistics.median(taken), count)
    return found


def _sparseprop(sparse: Any, images: Any) -> Any:
    """The network with SparseProp's layers where they are the faster ones; None where it is not installed."""
    try:
        from sparseprop.utils import swap_modules_with_sparse
    except ImportError:
        return None
    import contextlib
    import copy
    import io

    model = copy.deepcopy(sparse.network).eval()
    with contextlib.redirect_stdout(io.StringIO()):
        return swap_modules_with_sparse(model, tuple(images.shape))
