"""Descriptions of boards: one TOML file each, checked field by field.

A board is what the planner and the simulator need to know of the hardware: how much memory an
application may use, how fast its memory is, and how much arithmetic its cores can do. A user adds a
board with a file of the same form, which may name beside it what `edge-bcs bench --calibrate` wrote there:
`calibration = "machine.toml"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_bcs.targets import cost_model
from edge_bcs.targets.cost_model import Machine

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small
from edge_bcs.core.metadata import parse_toml
from edge_bcs.core.text import check_text
from edge_bcs.core.units import parse_bytes

_FOLDER = Path(__file__).resolve().parent / "boards"
_INSTRUCTION_SETS = tuple(cost_model.VECTOR)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Cores of one kind: `flops_per_cycle` counts float32 operations of one core, a fused multiply-add
    as two."""

    core: str
    cores: int
    frequency: float
    flops_per_cycle: float

    @property
    def peak_flops(self) -> float:
        """Float32 operations per second of the whole cluster."""
        return self.cores * self.frequency * self.flops_per_cycle


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A board's graphics processor, which edge-bcs does not use; `flops`: float32 operations per second."""

    name: str
    flops: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """A board.

    Memory sizes are in bytes, `bandwidth` in bytes per second. `usable` is what a headless Linux leaves
    to one application; `default_budget` is the working set that training gets when the user names none;
    `calibration` is what was measured on it, if anything was. `gpu` is named to say what the cores are worth
    beside it.
    """

    name: str
    title: str
    total: int
    usable: int
    default_budget: int
    bandwidth: float
    isa: str
    clusters: tuple[Cluster, ...]
    sources: Mapping[str, str]
    calibration: Machine | None = None
    gpu: Gpu | None = None

    @property
    def cores(self) -> int:
        """Number of cores, of all clusters together."""
        return sum(cluster.cores for cluster in self.clusters)

    @property
    def peak_flops(self) -> float:
        """Float32 operations per second with every core busy."""
        return sum(cluster.peak_flops for cluster in self.clusters)


def names() -> list[str]:
    """Names of the boards that come with the package, in alphabetical order."""
    return names_in(_FOLDER)


def names_in(folder: Path) -> list[str]:
    """Names of what a folder of the package describes, in alphabetical order."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def file_of(target: str | Path) -> Path:
    """The file of a board that is named as `load` takes it; see `file_in`."""
    return file_in(_FOLDER, target, "board")


def file_in(folder: Path, target: str | Path, what: str) -> Path:
    """The file of what is named as `load` takes it; a user's own need not exist.

    Args:
        folder: of the files that come with the package. target: name or file. what: they are.

    Raises:
        EdgeBcsError: none of the package has that name, and it is no .toml file.
    """
    path = Path(target)
    if path.suffix == ".toml":
        return path
    known = names_in(folder)
    if str(target) not in known:
        raise EdgeBcsError(
            f"No {what} is called {str(target)!r}: choose one of {', '.join(known)}, or give a .toml file "
            "(`edge-bcs targets NAME --toml` prints one to begin with)."
        )
    return folder / f"{target}.toml"


def load(target: str | Path) -> Target:
    """Read a board by its name (see `names`) or from a user's own TOML file.

    Raises:
        EdgeBcsError: no such board or file, or a field that is missing or makes no sense; the message
            names it.
    """
    path = file_of(target)
    return _Reader(path).target(document_of(path))


def document_of(path: Path) -> dict[str, Any]:
    """Return what a TOML file of a board says, of any kind of board.

    Raises:
        EdgeBcsError: it cannot be read, is no TOML, or has text that cannot be shown.
    """
    try:
        content = read_small(path)
    except OSError as error:
        raise EdgeBcsError(f"The board file {path} cannot be read: {error.strerror}.") from error
    try:
        document = parse_toml(content)
    except ValueError as error:
        raise EdgeBcsError(f"The board file {path} is not valid TOML: {error}.") from error
    check_text(document, f"The board file {path}")
    return document


class _Reader:
    """Turns a parsed TOML document into a `Target`, naming the field of whatever is wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def target(self, document: Mapping[str, Any]) -> Target:
        self._only(document, {"title", "memory", "cpu", "gpu", "sources", "calibration"}, "")
        memory = self._table(document, "memory")
        self._only(memory, {"total", "usable", "default_budget", "bandwidth"}, "memory.")
        cpu = self._table(document, "cpu")
        self._only(cpu, {"isa", "clusters"}, "cpu.")
        isa = self._text(cpu, "isa", "cpu.")
        if isa not in _INSTRUCTION_SETS:
            raise self._bad("cpu.isa", f"must be one of {', '.join(_INSTRUCTION_SETS)}, not {isa!r}")
        total = self._bytes(memory, "total")
        usable = self._bytes(memory, "usable")
        default_budget = self._bytes(memory, "default_budget")
        if usable > total:
            raise self._bad("memory.usable", "is more than memory.total")
        if default_budget > usable:
            raise self._bad("memory.default_budget", "is more than memory.usable")
        sources = document.get("sources", {})
        if not isinstance(sources, dict):
            raise self._bad("sources", "must be a table of sentences")
        for topic in sources:
            self._text(sources, topic, "sources.")
        return Target(
            name=self._path.stem,
            title=self._text(document, "title", ""),
            total=total,
            usable=usable,
            default_budget=default_budget,
            bandwidth=self._positive(memory, "bandwidth", "memory."),
            isa=isa,
            clusters=self._clusters(cpu),
            sources=dict(sources),
            calibration=self._calibration(document, isa),
            gpu=self._gpu(document),
        )

    def _gpu(self, document: Mapping[str, Any]) -> Gpu | None:
        if "gpu" not in document:
            return None
        gpu = self._table(document, "gpu")
        self._only(gpu, {"name", "flops"}, "gpu.")
        return Gpu(name=self._text(gpu, "name", "gpu."), flops=self._positive(gpu, "flops", "gpu."))

    def _calibration(self, document: Mapping[str, Any], isa: str) -> Machine | None:
        if "calibration" not in document:
            return None
        path = self._path.parent / self._text(document, "calibration", "")
        machine = cost_model.load(path)
        if machine is None:
            raise self._bad("calibration", f"names {path}, which is not there")
        if machine.isa != isa:
            raise self._bad("calibration", f"names a machine with {machine.isa}, not {isa}")
        return machine

    def _clusters(self, cpu: Mapping[str, Any]) -> tuple[Cluster, ...]:
        tables = cpu.get("clusters")
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise self._bad("cpu.clusters", "must be one or more [[cpu.clusters]] tables")
        clusters = []
        for number, table in enumerate(tables):
            prefix = f"cpu.clusters[{number}]."
            self._only(table, {"core", "cores", "frequency", "flops_per_cycle"}, prefix)
            cores = table.get("cores")
            if not isinstance(cores, int) or isinstance(cores, bool) or not 1 <= cores <= 1024:
                raise self._bad(f"{prefix}cores", "must be a whole number from 1 to 1024")
            clusters.append(
                Cluster(
                    core=self._text(table, "core", prefix),
                    cores=cores,
                    frequency=self._positive(table, "frequency", prefix),
                    flops_per_cycle=self._positive(table, "flops_per_cycle", prefix),
                )
            )
        return tuple(clusters)

    def _table(self, document: Mapping[str, Any], field: str) -> Mapping[str, Any]:
        table = document.get(field)
        if not isinstance(table, dict):
            raise self._bad(
                field, "must be a table" if field in document else "is missing: it must be a table"
            )
        return table

    def _text(self, table: Mapping[str, Any], field: str, prefix: str) -> str:
        text = table.get(field)
        if not isinstance(text, str) or not text.strip():
            raise self._bad(
                prefix + field, "must be text" if field in table else "is missing: it must be text"
            )
        return text

    def _positive(self, table: Mapping[str, Any], field: str, prefix: str) -> float:
        number = table.get(field)
        if number is None:
            raise self._bad(prefix + field, "is missing: it must be a positive number")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < float("inf"):
            raise self._bad(prefix + field, "must be a positive number")
        return float(number)

    def _bytes(self, memory: Mapping[str, Any], field: str) -> int:
        try:
            return parse_bytes(memory[field])
        except KeyError:
            raise self._bad(f"memory.{field}", "is missing: it must be a size such as '512MiB'") from None
        except (EdgeBcsError, TypeError) as error:
            raise self._bad(f"memory.{field}", f"is not a size: {str(error).rstrip('.')}") from None

    def _only(self, table: Mapping[str, Any], known: set[str], prefix: str) -> None:
        for field in table:
            if field not in known:
                raise self._bad(prefix + field, f"is unknown; the fields here are {', '.join(sorted(known))}")

    def _bad(self, field: str, what: str) -> EdgeBcsError:
        return EdgeBcsError(f"The board file {self._path} is refused: `{field}` {what}.")
