"""`simulate` for a microcontroller: what a project of `edge-bcs export --target` takes of its memories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_bcs.runtime.archive import LARGEST_MANIFEST
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.manifest import MANIFEST, PROGRAM, STATE
from edge_bcs.runtime.program import arena_bytes
from edge_bcs.runtime.state import state_bytes
from edge_bcs.targets.microcontrollers import CODE_BYTES, STACK_BYTES, VARIABLES, Microcontroller, pool_bytes
from edge_bcs.targets.plans import plan_of
from edge_bcs.targets.roofline import step_runs

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class SmallSimulation:
    """The answer.

    Attributes:
        ram, flash: what lies there → bytes; the code is about as large as this, whatever the network.
        state_bytes: of a saved state, which must fit into a slot.
        step_seconds: of one step over a batch if the core did nothing but arithmetic, which is a lower bound;
            None if the plan does not tell.
        faults: sentences that say what does not fit.
    """

    artifact: Artifact
    board: Microcontroller
    ram: dict[str, int]
    flash: dict[str, int]
    state_bytes: int
    step_seconds: float | None
    faults: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the project would be written, and hold its states."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """One JSON object; sizes in bytes, times in seconds."""
        return {
            "artifact": str(self.artifact.path),
            "network": self.artifact.network,
            "target": self.board.name,
            "verdict": "fits" if self.fits else "does not fit",
            "fits": self.fits,
            "reasons": list(self.faults),
            "predicted_peak_bytes": self.artifact.predicted_peak_bytes,
            "measured_peak_bytes": None,
            "arena_bytes": self.ram["arena"],
            "ram": self.ram,
            "ram_bytes": sum(self.ram.values()),
            "ram_limit_bytes": self.board.ram,
            "flash": self.flash,
            "flash_bytes": sum(self.flash.values()),
            "flash_limit_bytes": self.board.flash,
            "state_bytes": self.state_bytes,
            "slot_limit_bytes": self.board.slot_bytes,
            "least_step_seconds": self.step_seconds,
        }


def simulate(artifact: Artifact, board: Microcontroller) -> SmallSimulation:
    """Say what a training takes of a microcontroller's memories; nothing is run.

    Raises:
        EdgeBcsError: the artifact has no program for our own engine, or is a run.
    """
    arena = arena_bytes(artifact)
    if arena is None:
        raise EdgeBcsError(f"{artifact.path} has no {PROGRAM}; export it again.")
    files = artifact.manifest["files"]
    if STATE not in files:
        raise EdgeBcsError(f"{artifact.path} is a run; export it by --checkpoint first.")
    program = files[PROGRAM]["bytes"]
    manifest = len(artifact.files.read_small(MANIFEST, LARGEST_MANIFEST))
    ram = {
        "arena": arena,
        "what opening takes": pool_bytes(program, manifest),
        "variables": VARIABLES,
        "stack": STACK_BYTES,
    }
    flash = {
        "code, about": CODE_BYTES,
        "program": program,
        "manifest": manifest,
        "state": files[STATE]["bytes"],
    }
    state = state_bytes(artifact)
    faults = []
    for what, needed, there in (
        ("RAM", sum(ram.values()), board.ram),
        ("flash", sum(flash.values()), board.flash),
        ("a slot for states", state, board.slot_bytes),
    ):
        if needed > there:
            faults.append(f"{format_bytes(needed)} of {what} are needed, and there are {format_bytes(there)}")
    plan, runs, seconds = plan_of(artifact.manifest["memory"]), step_runs(artifact), None
    phases = {name: plan.phases.get(name) for name, count in runs.items() if count}
    if all(phase is not None and len(phase.flops) == len(phase.nodes) for phase in phases.values()):
        flops = sum(runs[name] * sum(phase.flops) for name, phase in phases.items() if phase is not None)
        seconds = flops / (board.frequency * board.flops_per_cycle)
    return SmallSimulation(
        artifact=artifact,
        board=board,
        ram=ram,
        flash=flash,
        state_bytes=state,
        step_seconds=seconds,
        faults=tuple(faults),
    )
