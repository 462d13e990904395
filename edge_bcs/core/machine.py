"""What the operating system tells of this machine: heat, throttling, clock, memory, disk.

Everything is read from files below ``root`` ("/" outside of tests), so that another machine's files can stand
in for them. What a machine does not tell is missing from the answer and never an error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PLAUSIBLE = (-40.0, 150.0)  # °C
# The power management chip of a Jetson Nano always says 100 °C.
_CONSTANT_ZONES = ("PMIC-Die",)
# Chips that are not the processor's: disks, radios, batteries.
_OTHER_CHIPS = ("nvme", "drivetemp", "iwlwifi", "ath", "mt79", "BAT", "ucsi", "AC")
# Bits of the Raspberry Pi firmware's word; those from 16 on say the same of the time since the start.
_FIRMWARE_BITS = {
    0: "the supply voltage is too low",
    1: "the clock is capped",
    2: "the clock is throttled",
    3: "the soft temperature limit is reached",
    16: "the supply voltage was too low",
    18: "the clock was throttled",
}


@dataclass(frozen=True)
class Sensor:
    """A temperature: what measures it, and °C."""

    name: str
    celsius: float


@dataclass(frozen=True)
class Medium:
    """Where a folder lies: the ``kind`` of disk ("SD card", "eMMC", "NVMe SSD", …), bytes ``free``, its
    ``mount`` point."""

    kind: str
    filesystem: str
    free: int
    writable: bool
    read_only: bool
    mount: str


class ThisMachine:
    """This machine, or one whose files lie below ``root``."""

    def __init__(self, root: str | Path = "/") -> None:
        self.root = Path(root)

    def temperatures(self) -> list[Sensor]:
        """Every plausible temperature of the processor and the board, from thermal zones and hwmon."""
        found = []
        for zone in self._glob("sys/class/thermal/thermal_zone*"):
            name = _text(zone / "type") or zone.name
            if name not in _CONSTANT_ZONES:
                found.append((name, zone / "temp"))
        for chip in self._glob("sys/class/hwmon/hwmon*"):
            name = _text(chip / "name") or chip.name
            if not name.startswith(_OTHER_CHIPS):
                for file in sorted(chip.glob("temp*_input")):
                    label = _text(file.with_name(file.name.replace("_input", "_label")))
                    found.append((f"{name} {label}".strip(), file))
        sensors = []
        for name, file in found:
            value = _number(file)  # millidegrees; an engine that is switched off has none
            if value is not None and _PLAUSIBLE[0] < value / 1000 < _PLAUSIBLE[1]:
                sensors.append(Sensor(name, value / 1000))
        return sensors

    def throttling(self) -> list[str]:
        """What slows the processor down, as sentences without their full stop."""
        causes = []
        for file in self._glob("sys/devices/platform/soc*/*firmware/get_throttled"):
            word = int(_text(file) or "0", 16)
            causes += [cause for bit, cause in _FIRMWARE_BITS.items() if word >> bit & 1]
        for device in self._glob("sys/class/thermal/cooling_device*"):
            kind, state = _text(device / "type"), _number(device / "cur_state") or 0
            if "cpu" in kind.lower() and state > 0:
                causes.append(f"{kind} holds the clock down (state {state})")
        return causes

    def governors(self) -> list[str]:
        """Names of the frequency governors in use."""
        names = set()
        for policy in self._glob("sys/devices/system/cpu/cpufreq/policy*"):
            # Where the processor chooses its clock itself, "powersave" holds nothing down.
            if _text(policy / "scaling_driver") not in ("intel_pstate", "amd-pstate-epp"):
                names.add(_text(policy / "scaling_governor"))
        return sorted(names - {""})

    def model(self) -> str:
        """Name of the board, or of the processor, or ""."""
        board = _text(self.root / "proc/device-tree/model").rstrip("\0")
        if board:
            return board
        return self._cpuinfo("model name", "Model")

    def processor(self) -> str:
        """Name of the processor, or ""."""
        return self._cpuinfo("model name")

    def _cpuinfo(self, *fields: str) -> str:
        lines = _text(self.root / "proc/cpuinfo").splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(fields)), "")

    def memory(self) -> dict[str, int]:
        """Bytes by the names of /proc/meminfo: "MemTotal", "MemAvailable", "SwapTotal"."""
        lines = _text(self.root / "proc/meminfo").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        wanted = ("MemTotal", "MemAvailable", "SwapTotal")
        return {name: 1024 * int(fields[name].split()[0]) for name in wanted if name in fields}

    def free_memory(self) -> int | None:
        """Bytes that a process may still take: what is available, or less where its control groups (systemd's
        MemoryMax, a container) allow less. None where the system does not tell."""
        available = self.memory().get("MemAvailable")
        found = [] if available is None else [available]
        for line in _text(self.root / "proc/self/cgroup").splitlines():
            _, controllers, path = [*line.split(":", 2), "none", ""][:3]
            if controllers == "":
                names = ("memory.max", "memory.current", "inactive_file")
                tops: tuple[str, ...] = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                tops = ("sys/fs/cgroup/memory",)
            else:
                continue
            for top in tops:
                group = self.root / top / path.lstrip("/")
                # A container sees its own group at the top, whatever the path says.
                for folder in (group, *group.parents):
                    found += _left_in(folder, *names)
                    if folder == self.root / top:
                        break
        return max(0, min(found)) if found else None

    def disk_swaps(self) -> list[str]:
        """Swap that lies on a disk, or in memory (zram) that is written back to one."""
        lines = _text(self.root / "proc/swaps").splitlines()[1:]
        found = []
        for device in (line.split()[0] for line in lines if line.split()):
            behind = _text(self.root / "sys/block" / Path(device).name / "backing_dev")
            if "zram" not in device:
                found.append(device)
            elif behind not in ("", "none"):
                found.append(f"{device}, written back to {behind}")
        return found

    def medium(self, folder: Path) -> Medium:
        """Where ``folder``, or the nearest folder above it that exists, lies."""
        folder = folder.resolve()
        while not folder.exists():
            folder = folder.parent
        number = os.stat(folder).st_dev
        space = os.statvfs(folder)
        device = f"{os.major(number)}:{os.minor(number)}"
        filesystem, mount, source = self._mount(device)
        return Medium(
            kind=self._kind(device, filesystem, source),
            filesystem=filesystem,
            free=space.f_bavail * space.f_frsize,
            writable=os.access(folder, os.W_OK),
            read_only=bool(space.f_flag & os.ST_RDONLY),
            mount=mount,
        )

    def _mount(self, device: str) -> tuple[str, str, str]:
        """(file system, mount point, source) of a device number."""
        for line in _text(self.root / "proc/self/mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            fields, more = before.split(), after.split()
            if len(fields) > 4 and len(more) > 1 and fields[2] == device:
                return more[0], fields[4], more[1]
        return "", "", ""

    def _kind(self, device: str, filesystem: str, source: str) -> str:
        if filesystem in ("tmpfs", "ramfs"):
            return "memory"
        if filesystem.startswith(("nfs", "cifs", "9p", "virtiofs", "fuse.")):
            return "network or host folder"
        block = (self.root / "sys/dev/block" / device).resolve()
        if not block.is_dir():
            block = (self.root / "sys/class/block" / Path(source).name).resolve()
        disk = block.parent if (block / "partition").exists() else block
        if disk.name.startswith("mmcblk"):
            return "SD card" if _text(disk / "device/type") == "SD" else "eMMC"
        if disk.name.startswith("nvme"):
            return "NVMe SSD"
        rotational = _text(disk / "queue/rotational")
        return {"0": "SSD or USB stick", "1": "hard disk"}.get(rotational, "unknown medium")

    def _glob(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(pattern))


def _left_in(group: Path, limit: str, usage: str, cached: str) -> list[int]:
    """The bytes that a control group may still take, if it is limited; files that it only caches are free."""
    most, taken = _number(group / limit), _number(group / usage)
    if most is None or taken is None:
        return []
    lines = _text(group / "memory.stat").splitlines()
    files = next((line.split()[1] for line in lines if line.split()[:1] == [cached]), "0")
    return [most - taken + int(files)]


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:
        return None
