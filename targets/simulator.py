"""Does an artifact fit a board? Predict, run it here under the board's limits, and say what to change if
not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.budget import isa
from edge_bcs.runtime.engine import available_threads
from edge_bcs.runtime.program import arena_bytes
from edge_bcs.targets.cost_model import TYPICAL_BOARD

from edge_bcs import __file__ as package_file
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.progress import note
from edge_bcs.core.units import format_bytes, parse_bytes

from . import boards, roofline
from .advice import Advice, Place, Recompiled, advise, images_of
from .boards import Target
from .confinement import confinement
from .outside import THREAD_BYTES, Outside, predicted_outside
from .plans import MemoryPlan, plan_of
from .roofline import StepTime, beside_gpu, step_runs, step_time

FITS, TIGHT, DOES_NOT_FIT = "fits", "tight", "does not fit"
TIGHT_SHARE = 0.9
"""Share of a limit from which fitting is called tight."""
UNDISTURBED = 0.8
"""Share of its threads' time that a run spent on a core, from which it counts as undisturbed."""
MARGIN = 0.25
"""Share of what lies outside the budget that a board is asked to have beside it: its libraries are built for
another processor than this host's, in other versions, and its pages may be larger."""


@dataclass(frozen=True)
class Measurement:
    """What a run on this host took.

    Attributes:
        peak_bytes: the working set's peak by the allocator's count, None if the run did not finish;
            placed_peak_bytes: the most memory that was taken for it, more where tensors have no places.
        outside: the rest of rss_peak_bytes, None if the run did not finish.
        phases: graph → {"peak_bytes", "seconds_per_step", "runs_per_step"}.
        rss_peak_bytes: resident memory of the whole process; rss_libraries_bytes: before the artifact
            was opened.
        seconds_per_step: of one optimizer step over a whole batch.
        refused: why memory did not suffice, else "".
        exact: whether the allocator counted every tensor.
        details: steps and micro-batches that were timed, share of the cores' time that the run had, kernels,
            loss, and which engine ran the graphs.
    """

    confinement: str
    threads: int
    peak_bytes: int | None
    placed_peak_bytes: int | None
    outside: Outside | None
    phases: Mapping[str, Mapping[str, float]]
    rss_peak_bytes: int | None
    rss_libraries_bytes: int | None
    seconds_per_step: float | None
    refused: str
    exact: bool
    details: Mapping[str, Any]

    @property
    def disturbed(self) -> bool:
        """Whether other work took so much of the cores' time that the measured times say little."""
        return bool(self.details.get("cores_share", 1.0) < UNDISTURBED)


@dataclass(frozen=True)
class Simulation:
    """The answer.

    Attributes:
        verdict: FITS, TIGHT (at least 90 % of the budget, or of the board's usable memory with the whole
            process) or DOES_NOT_FIT; reasons: sentences; failure: those that say why it does not fit,
            else "".
        budget: cap on the working set in bytes, None for none; budget_source: where it comes from.
        usable: what the board leaves to the process, None without a board.
        outside: what the process occupies beside its working set, measured here for as many threads as are
            asked for, or predicted if it was not run; margin_bytes: what a board is asked to have beyond
            that, 0 without a board; process_bytes: resident memory of the whole process, without the margin.
        expected: time of a step on the board by roofline; calibrated: the same, corrected by how this host's
            measured time differs from this host's roofline; None where unknown.
    """

    artifact: Artifact
    plan: MemoryPlan
    target: Target | None
    threads: int
    budget: int | None
    budget_source: str
    usable: int | None
    verdict: str
    reasons: tuple[str, ...]
    failure: str
    outside: Outside
    margin_bytes: int
    expected: StepTime | None
    calibrated_seconds: float | None
    measured: Measurement | None
    advice: Advice

    @property
    def fits(self) -> bool:
        """Whether training fits, tightly or not."""
        return self.verdict != DOES_NOT_FIT

    @property
    def exceeded(self) -> bool:
        """Whether the run needed more than was predicted, which would be a defect."""
        predicted: int | None = self.predicted_peak_bytes
        if self.measured is not None and self.measured.details.get("engine") == "native":
            predicted = self.arena_bytes  # which is our own engine's working set, holes included
        return (self.measured_peak_bytes or 0) > (predicted or 0)

    @property
    def process_bytes(self) -> int:
        """Resident memory of the whole process."""
        return self.plan.peak_bytes + self.outside.total

    @property
    def placed_peak_bytes(self) -> int | None:
        """The most memory that was taken for the working set; more where tensors have no places."""
        return self.measured.placed_peak_bytes if self.measured else None

    @cached_property
    def arena_bytes(self) -> int | None:
        """The arena in which a training lies; None if the artifact has no program."""
        return arena_bytes(self.artifact)

    @property
    def predicted_peak_bytes(self) -> int:
        """The working set that the compiler predicted."""
        return self.plan.peak_bytes

    @property
    def measured_peak_bytes(self) -> int | None:
        """The working set up to the highest place that was given."""
        return self.measured.peak_bytes if self.measured else None

    def to_json(self) -> dict[str, Any]:
        """One JSON object; sizes in bytes, times in seconds."""
        artifact, measured = self.artifact, self.measured
        runs = measured.phases if measured else {}
        return {
            "artifact": str(artifact.path),
            "network": artifact.network,
            "sparsity": artifact.sparsity,
            "kappa": artifact.kappa,
            "objective": artifact.objective.name,
            "batch_norm": artifact.batch_norm,
            "train": artifact.trained.part.text,
            "untrained_bytes": artifact.untrained_bytes,
            "micro_batch": artifact.micro_batch,
            "attack_micro_batch": artifact.attack_micro_batch,
            "batch_size": artifact.batch_size,
            "target": self.target.name if self.target else None,
            "threads": self.threads,
            "verdict": self.verdict,
            "fits": self.fits,
            "reasons": list(self.reasons),
            "budget_bytes": self.budget,
            "budget_source": self.budget_source,
            "usable_bytes": self.usable,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "placed_peak_bytes": self.placed_peak_bytes,
            "arena_bytes": self.arena_bytes,
            "outside_bytes": self.outside.total,
            "outside": self.outside.to_json(),
            "margin_bytes": self.margin_bytes,
            "process_bytes": self.process_bytes,
            "bound_bytes": self.plan.bound_bytes,
            "peak_phase": self.plan.peak_phase.name,
            "categories": dict(self.plan.peak_phase.categories),
            "phases": {
                name: {
                    "predicted_peak_bytes": phase.peak_bytes,
                    "measured_peak_bytes": runs.get(name, {}).get("peak_bytes"),
                    "peak_node": phase.peak_node,
                    "categories": dict(phase.categories),
                    "expected_seconds": self.expected.phases.get(name) if self.expected else None,
                    "measured_seconds": runs.get(name, {}).get("seconds_per_step"),
                    "runs_per_step": step_runs(artifact).get(name, 0),
                }
                for name, phase in self.plan.phases.items()
            },
            "expected_step": asdict(self.expected) if self.expected else None,
            "calibrated_step_seconds": self.calibrated_seconds,
            "measurement": {**asdict(measured), "disturbed": measured.disturbed} if measured else None,
            "changes": [asdict(change) for change in self.advice.changes],
            "trade_off": [asdict(point) for point in self.advice.curve],
            "figures_of_changes": self.advice.source,
        }


def simulate(
    artifact: str | Path | Artifact,
    target: str | Path | Target | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    run: bool = True,
    seconds: float = 10.0,
    curve: bool = False,
    recompiled: Recompiled | None = None,
) -> Simulation:
    """Predict whether ``artifact`` fits, and prove it by running it on this host under the same limits.

    Args:
        artifact: an artifact folder or a saved run.
        target: a board's name, a board file, or None for this host.
        memory: budget of the working set, such as "6MiB"; default: the one that the artifact was
            compiled for, else the board's default budget, else none.
        threads: of each graph; default: the board's cores. The run uses no more than this host has.
        run: whether to run it; without that the answer is the prediction alone.
        seconds: about how long to train while measuring.
        curve: whether to plan for several budgets too, which takes seconds.
        recompiled: the compiler, for the changes that would help (`edge_bcs.simulation` has it); without it
            their figures are scaled from the artifact's own plan.

    Raises:
        EdgeBcsError: a damaged artifact, an unknown board, a size that is none, or a run that failed for
            another reason than memory.
    """
    if not isinstance(artifact, Artifact):
        artifact = Artifact.read(artifact)
    board = boards.load(target) if isinstance(target, (str, Path)) else target
    if threads is not None and threads < 1:
        raise EdgeBcsError(f"threads must be at least 1, not {threads}.")
    plan = plan_of(artifact.manifest["memory"])
    budget, source = _budget(artifact, board, memory)
    machine = board or roofline.this_host(isa())
    threads = min(threads or machine.cores, machine.cores)
    usable = board.usable if board else None

    def expected_seconds(changed: MemoryPlan, micro_batch: int, plain: bool) -> float | None:
        runs = step_runs(artifact, micro_batch, plain, images_of(changed, artifact))
        time = step_time(changed, runs, machine, threads)
        return time.seconds if time else None

    # A command without a board plans for the typical one.
    whose = TYPICAL_BOARD if board is None else roofline.machine_of(board)
    place = Place(None if board is None else _named(target, board), whose, expected_seconds)
    expected = step_time(plan, step_runs(artifact), machine, threads)
    if expected is not None and machine.gpu is not None:
        sentence = beside_gpu(machine.gpu, plan, step_runs(artifact), artifact.layers)
        expected = replace(expected, assumptions=(*expected.assumptions, sentence))
    note("running it here" if run else "")
    measured = run_here(artifact, budget, usable, min(threads, available_threads()), seconds) if run else None
    note("looking for what would help")
    outside = predicted_outside(plan, threads)
    if measured and measured.outside:
        more = THREAD_BYTES * (threads - measured.threads)
        outside = replace(measured.outside, sessions=measured.outside.sessions + more)
    # It counts on the board, so it comes off what training may use.
    margin = 0 if board is None else round(MARGIN * outside.total)
    others = outside.total + margin
    room = [
        limit for limit in (budget, None if usable is None else max(1, usable - others)) if limit is not None
    ]
    verdict, reasons, failures = _verdict(plan, budget, usable, others, measured)
    needed = min(room) if room else None
    return Simulation(
        artifact=artifact,
        plan=plan,
        target=board,
        threads=threads,
        budget=budget,
        budget_source=source,
        usable=usable,
        verdict=verdict,
        reasons=(*failures, *reasons),
        failure="; ".join(failures),
        outside=outside,
        margin_bytes=margin,
        expected=expected,
        calibrated_seconds=calibrated_seconds(artifact, plan, expected, measured),
        measured=measured,
        advice=advise(artifact, plan, needed, place, curve, recompiled),
    )


def _named(target: str | Path | Target | None, board: Target) -> str:
    return board.name if isinstance(target, Target) else str(target)


def _budget(artifact: Artifact, board: Target | None, memory: int | str | None) -> tuple[int | None, str]:
    if memory is not None:
        return parse_bytes(memory), "as asked for"
    if artifact.budget is not None:
        return artifact.budget, "the artifact was compiled for it"
    if board is not None:
        return board.default_budget, f"the default of {board.name}"
    return None, "none was named"


def _verdict(
    plan: MemoryPlan, budget: int | None, usable: int | None, others: int, measured: Measurement | None
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The verdict, the sentences that explain it, and those that say why it does not fit."""
    peak = max(plan.peak_bytes, (measured.peak_bytes or 0) if measured else 0)
    limits = []
    if budget is not None:
        limits.append((peak, budget, "the working set", "budget"))
    if usable is not None:
        what = f"the process, with a margin of {100 * MARGIN:.0f} % of what lies outside the budget,"
        limits.append((peak + others, usable, what, "board's usable memory"))
    reasons: list[str] = []
    failures: list[str] = []
    verdict = FITS
    for size, limit, what, name in limits:
        if size > limit:
            failures.append(
                f"{what} needs {size:,} bytes, {size - limit:,} more than the {name} of {limit:,}"
            )
            continue
        if size >= TIGHT_SHARE * limit:
            verdict = TIGHT
        share = f"{100 * size / limit:.0f} %"
        reasons.append(f"{what} needs {format_bytes(size)} of the {name} of {format_bytes(limit)} ({share})")
    placed = measured.placed_peak_bytes if measured else None
    if budget is not None and placed is not None and peak <= budget < placed:
        reasons.append(
            f"ONNX Runtime's own allocator took {format_bytes(placed)} for the working set, which the budget "
            "does not count: export the artifact again to have every tensor placed"
        )
    if measured and measured.refused:
        failures.append(f"the run on this host was stopped: {measured.refused.rstrip('.')}")
    if not limits:
        reasons.append(f"the working set needs {format_bytes(peak)}, and no limit was named")
    return DOES_NOT_FIT if failures else verdict, tuple(reasons), tuple(failures)


def calibrated_seconds(
    artifact: Artifact, plan: MemoryPlan, expected: StepTime | None, measured: Measurement | None
) -> float | None:
    """The board's expected time, times measured over expected on this host; None if the run was disturbed."""
    if expected is None or measured is None or measured.seconds_per_step is None or measured.disturbed:
        return None
    here = step_time(plan, step_runs(artifact), roofline.this_host(isa()), measured.threads)
    return expected.seconds * measured.seconds_per_step / here.seconds if here and here.seconds else None


def run_here(
    artifact: Artifact, budget: int | None, usable: int | None, threads: int, seconds: float
) -> Measurement:
    """Run the artifact in a fresh process under the cap and the board's limit."""
    confined = confinement(usable)
    request = {"path": str(artifact.path), "memory": budget, "threads": threads, "seconds": seconds}
    package = str(Path(package_file).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((package, os.environ.get("PYTHONPATH", "")))}
    # Linear algebra of numpy is not used; its threads would only take address space.
    environment |= {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [*confined.prefix, sys.executable, "-m", "edge_bcs.targets.host_run"]
    try:
        process = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, env=environment, timeout=900
        )
        answer = json.loads(process.stdout.strip().rpartition("\n")[2] or "{}")
    except subprocess.TimeoutExpired:
        raise EdgeBcsError("the run on this host took longer than 15 minutes and was stopped.") from None
    except ValueError:
        answer = {}
    if "peak_bytes" not in answer and "refused" not in answer:
        lines = process.stderr.strip().splitlines()
        reason = answer.get("error") or (lines[-1] if lines else f"exit status {process.returncode}")
        if usable is None and "error" in answer:
            raise EdgeBcsError(f"the run on this host failed: {reason}")
        if usable is None:
            raise EdgeBcsError(f"the run on this host ended without an answer: {reason}")
        answer["refused"] = f"the process failed under the board's memory limit ({reason})"
    peak, resident = answer.get("peak_bytes"), answer.get("rss_peak_bytes")
    outside = None
    if peak is not None and resident is not None:
        outside = Outside.measured(resident, peak, answer["placed_peak_bytes"], answer["libraries_bytes"])
    details = ("timed_micro_batches", "micro_batches_per_step", "steps", "cores_share")
    return Measurement(
        confinement=confined.description,
        threads=int(answer.get("threads", threads)),
        peak_bytes=peak,
        placed_peak_bytes=answer.get("placed_peak_bytes"),
        outside=outside,
        phases=answer.get("phases", {}),
        rss_peak_bytes=resident,
        rss_libraries_bytes=answer.get("rss_libraries_bytes"),
        seconds_per_step=answer.get("seconds_per_step"),
        refused=answer.get("refused", ""),
        exact=bool(answer.get("exact", False)),
        details={name: answer[name] for name in (*details, "isa", "engine", "loss") if name in answer},
    )
