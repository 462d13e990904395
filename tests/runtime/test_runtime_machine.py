"""What is read of a machine, from copies of the files of boards; pausing for heat; the doctor's advice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.board.thermostat import Thermostat
from edge_bcs.runtime.engine import available_threads

from edge_bcs.cli.doctor import Finding, machine_findings
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.machine import ThisMachine
from edge_bcs.data import open_data

Make = Callable[..., Path]

# As read on the boards.
RASPBERRY_PI_4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "83256\n",
    "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
    "sys/class/hwmon/hwmon0/temp1_input": "83256\n",
    "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand\n",
    "proc/meminfo": "MemTotal:        1892948 kB\nMemFree: 100000 kB\nMemAvailable:      91234 kB\n"
    "SwapTotal:        102396 kB\n",
    "etc/dphys-swapfile": "CONF_SWAPSIZE=100\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/var/swap file\t\t102396\t0\t-2\n",
}
JETSON_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
    "sys/class/thermal/thermal_zone0/type": "AO-therm\n",
    "sys/class/thermal/thermal_zone0/temp": "45000\n",
    "sys/class/thermal/thermal_zone1/type": "CPU-therm\n",
    "sys/class/thermal/thermal_zone1/temp": "38500\n",
    "sys/class/thermal/thermal_zone2/type": "PMIC-Die\n",
    "sys/class/thermal/thermal_zone2/temp": "100000\n",
    "sys/class/thermal/thermal_zone3/type": "off\n",
    "sys/class/thermal/thermal_zone3/temp": "-256000\n",
    "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/class/thermal/cooling_device1/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device1/cur_state": "2\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "powersave\n",
    "proc/meminfo": "MemTotal: 4059000 kB\nMemAvailable: 3000000 kB\nSwapTotal: 2029500 kB\n",
    "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 507372 0 5\n",
}
# A Raspberry Pi 5 with OS 13, whose compressed swap is written back to the card, and a Jetson with JetPack 6.
RASPBERRY_PI_5 = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "56150\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "1\n",
    "sys/class/hwmon/hwmon2/name": "rp1_adc\n",
    "sys/class/hwmon/hwmon2/temp1_input": "57483\n",
    "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "0\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand\n",
    "proc/meminfo": "MemTotal: 8256000 kB\nMemAvailable: 7400000 kB\nSwapTotal: 2097136 kB\n",
    "etc/rpi/swap.conf": "#[Main]\n",
    "sys/block/zram0/backing_dev": "/dev/loop0\n",
    "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 2097136 0 100\n",
}
JETSON_ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48125\n",
    "sys/class/thermal/thermal_zone8/type": "tj-thermal\n",
    "sys/class/thermal/thermal_zone8/temp": "49843\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
    "proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable: 6400000 kB\nSwapTotal: 3900000 kB\n",
    "sys/block/zram0/backing_dev": "none\n",
    "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 650000 0 5\n",
}
LAPTOP = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: A processor\nprocessor\t: 1\nmodel name\t: A processor\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_driver": "intel_pstate\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "powersave\n",
    "sys/class/hwmon/hwmon0/name": "nvme\n",
    "sys/class/hwmon/hwmon0/temp1_input": "95850\n",
    "sys/class/hwmon/hwmon1/name": "coretemp\n",
    "sys/class/hwmon/hwmon1/temp1_input": "51000\n",
    "sys/class/hwmon/hwmon1/temp1_label": "Package id 0\n",
    "sys/class/hwmon/hwmon1/temp2_input": "what?\n",
    "proc/swaps": "Filename Type Size Used Priority\n",
}


def machine(root: Path, files: dict[str, str]) -> ThisMachine:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return ThisMachine(root)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (RASPBERRY_PI_4, {"cpu-thermal": 83.256, "cpu_thermal": 83.256}),
        (JETSON_NANO, {"AO-therm": 45.0, "CPU-therm": 38.5}),  # neither the constant nor the absurd one
        (LAPTOP, {"coretemp Package id 0": 51.0}),  # not the disk's
        ({}, {}),
    ],
)
def test_temperatures(tmp_path: Path, files: dict[str, str], expected: dict[str, float]) -> None:
    sensors = machine(tmp_path, files).temperatures()
    assert {sensor.name: sensor.celsius for sensor in sensors} == expected


def test_a_zone_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    board = machine(tmp_path, JETSON_NANO)
    zone = tmp_path / "sys/class/thermal/thermal_zone1/temp"
    zone.unlink()
    zone.mkdir()  # reading gives an OSError, as from an engine that is switched off
    assert [sensor.name for sensor in board.temperatures()] == ["AO-therm"]


def test_throttling(tmp_path: Path) -> None:
    raspberry = machine(tmp_path / "a", RASPBERRY_PI_4).throttling()
    assert raspberry == [
        "the supply voltage is too low", "the clock is throttled",
        "the supply voltage was too low", "the clock was throttled",
    ]  # fmt: skip
    assert machine(tmp_path / "b", JETSON_NANO).throttling() == [
        "thermal-cpufreq-0 holds the clock down (state 3)"
    ]
    assert machine(tmp_path / "c", LAPTOP).throttling() == []


def test_governors(tmp_path: Path) -> None:
    assert machine(tmp_path / "a", RASPBERRY_PI_4).governors() == ["ondemand"]
    assert machine(tmp_path / "b", JETSON_NANO).governors() == ["powersave"]
    assert machine(tmp_path / "c", LAPTOP).governors() == []  # there it holds nothing down


def of_group(folder: str, most: object, taken: int, cached: int = 0) -> dict[str, str]:
    """The files of a control group, in the kernel's present form."""
    numbers = {
        "memory.max": most,
        "memory.current": taken,
        "memory.stat": f"anon 9\ninactive_file {cached}\n",
    }
    return {f"sys/fs/cgroup/{folder}{name}": str(number) for name, number in numbers.items()}


ALL = 400 * 1024
OLDER = "sys/fs/cgroup/memory/a/memory"
GROUPS: dict[str, tuple[str, dict[str, str], int]] = {
    "none": ("", {}, ALL),
    "systemd's MemoryMax": ("0::/system.slice/x\n", of_group("system.slice/x/", 200, 150, 30), 80),
    "of a group above": ("0::/a/b\n", of_group("a/b/", "max", 5) | of_group("a/", 100, 90), 10),
    # A container's own group lies at the top, whatever its name is outside.
    "of a container": ("0::/docker/1\n", of_group("", 90, 20), 70),
    "more than there is": ("0::/\n", of_group("", 900_000, 20), ALL),
    "used up": ("0::/\n", of_group("", 90, 95), 0),
    "of the older kind": (
        "9:name=systemd:/\n4:cpu,memory:/a\n0::/\n",
        {
            f"{OLDER}.limit_in_bytes": "300",
            f"{OLDER}.usage_in_bytes": "100",
            f"{OLDER}.stat": "cache 9\ntotal_inactive_file 50\n",
        },
        250,
    ),
    "damaged": ("what\n0::\n::\n", of_group("", "x", 0), ALL),
}


@pytest.mark.parametrize("group", GROUPS)
def test_what_a_process_may_still_take(tmp_path: Path, group: str) -> None:
    """Bytes; 400 KiB are available on the whole machine."""
    line, files, expected = GROUPS[group]
    files = {"proc/meminfo": "MemAvailable: 400 kB\n", "proc/self/cgroup": line, **files}
    board = machine(tmp_path, files)
    assert board.free_memory() == expected


def test_a_machine_that_does_not_tell_what_is_free(tmp_path: Path) -> None:
    assert machine(tmp_path, {}).free_memory() is None


def mounted(
    root: Path, folder: Path, *, kind: str = "ext4", disk: dict[str, str] | None = None
) -> ThisMachine:
    """A machine that says that ``folder`` lies on the disk mmcblk0, with these files of it."""
    number = os.stat(folder).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    table = f"24 1 {device} / /data rw,noatime shared:1 - {kind} /dev/root rw\n"
    files = {"proc/self/mountinfo": table}
    if disk:
        real = "sys/devices/disk"
        (root / "sys/dev/block").mkdir(parents=True)
        (root / real / disk["name"] / "part").mkdir(parents=True)
        (root / "sys/dev/block" / device).symlink_to(root / real / disk["name"] / "part")
        files |= {f"{real}/{disk['name']}/part/partition": "2\n"}
        files |= {f"{real}/{disk['name']}/{file}": text for file, text in disk.items() if "/" in file}
    return machine(root, files)


@pytest.mark.parametrize(
    ("kind", "disk", "expected"),
    [
        ("ext4", {"name": "mmcblk0", "device/type": "SD\n"}, "SD card"),
        ("f2fs", {"name": "mmcblk0", "device/type": "MMC\n"}, "eMMC"),
        ("ext4", {"name": "nvme0n1"}, "NVMe SSD"),
        ("ext4", {"name": "sda", "queue/rotational": "1\n"}, "hard disk"),
        ("ext4", {"name": "sda", "queue/rotational": "0\n"}, "SSD or USB stick"),
        ("tmpfs", None, "memory"),
        ("nfs4", None, "network or host folder"),
        ("overlay", None, "unknown medium"),
    ],
)
def test_media(tmp_path: Path, kind: str, disk: dict[str, str] | None, expected: str) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    medium = mounted(tmp_path / "root", folder, kind=kind, disk=disk).medium(folder / "not" / "yet")
    assert (medium.kind, medium.filesystem, medium.mount) == (expected, kind, "/data")
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    assert medium.free == pytest.approx(free, rel=0.05)  # others write meanwhile
    assert medium.writable and not medium.read_only


# The thermostat


class Board:
    """A board that heats up while it works and cools down while it sleeps, in simulated seconds."""

    def __init__(self, root: Path, celsius: float) -> None:
        self.machine = machine(root, JETSON_NANO)
        self._file, self.now, self.readings = root / "sys/class/thermal/thermal_zone1/temp", 0.0, 0
        self.celsius = celsius
        self.work(0, 0)

    def work(self, seconds: float, degrees: float) -> None:
        self.now += seconds
        self.celsius += degrees
        self._file.write_text(f"{round(1000 * self.celsius)}\n")

    def thermostat(self, limit: float) -> Thermostat:
        return Thermostat(limit, self.machine, sleep=lambda s: self.work(s, -0.5 * s), clock=lambda: self.now)


def test_it_pauses_at_the_threshold_and_goes_on_below_it(tmp_path: Path) -> None:
    board = Board(tmp_path, 60.0)
    thermostat = board.thermostat(75)
    said: list[str] = []
    while not thermostat.pauses:
        board.work(1.0, 1.0)
        thermostat.wait(said.append)
    assert said and set(said) == {"paused: CPU-therm reached 75 °C; goes on at 70 °C"}
    assert board.celsius == 70.0 and thermostat.paused_seconds == 10.0  # 5 degrees at ½ a second
    board.work(1.0, 4.0)
    thermostat.wait(said.append)  # 74 °C: between the two, it runs on
    assert thermostat.pauses == 1
    board.work(1.0, 1.0)
    thermostat.wait(said.append)
    assert thermostat.pauses == 2


def test_it_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    board = Board(tmp_path, 110.0)
    board.thermostat(40).wait(lambda sentence: None, until=30.0)
    assert board.now == 30.0


def test_what_is_raised_while_it_waits_ends_the_waiting(tmp_path: Path) -> None:
    board = Board(tmp_path, 90.0)
    thermostat = board.thermostat(75)

    def stop(sentence: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        thermostat.wait(stop)


def test_it_sleeps_while_it_waits(tmp_path: Path) -> None:
    """Real time: next to no processor time is spent, and the sensor is read once a second at most."""
    board = machine(tmp_path, JETSON_NANO | {"sys/class/thermal/thermal_zone1/temp": "90000"})
    readings: list[float] = []
    read = board.temperatures

    def temperatures() -> Any:
        readings.append(time.monotonic())
        if len(readings) == 4:
            (tmp_path / "sys/class/thermal/thermal_zone1/temp").write_text("60000")
        return read()

    board.temperatures = temperatures  # type: ignore[method-assign]
    thermostat = Thermostat(75, board)
    busy, began = time.process_time(), time.monotonic()
    thermostat.wait(lambda sentence: None)
    assert 1.9 < time.monotonic() - began < 20 and len(readings) == 4
    assert time.process_time() - busy < 0.2


def test_a_thermostat_needs_a_sensor_and_a_sensible_limit(tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match="shows no temperature"):
        Thermostat(75, machine(tmp_path / "none", {}))
    for limit in (0.0, 75000.0, float("nan")):
        with pytest.raises(EdgeBcsError, match="between 30 and 120 °C"):
            Thermostat(limit, machine(tmp_path / "nano", JETSON_NANO))
    board = Board(tmp_path / "failing", 90.0)
    thermostat = board.thermostat(75)
    with pytest.raises(EdgeBcsError, match="shows no temperature"):  # it disappears while it is too hot
        thermostat.wait(lambda sentence: setattr(board.machine, "root", tmp_path / "none"))


def test_a_training_pauses_and_goes_on(tiny_artifact: Make, tmp_path: Path) -> None:
    data = open_data("digits", "train", (1, 8, 8))
    with Trainer(tiny_artifact()) as trainer:
        trainer.fit(data, steps=6, progress=False)
        expected = trainer.state()
    board = Board(tmp_path, 70.0)
    thermostat = board.thermostat(75)
    said: list[str] = []
    with Trainer(tiny_artifact()) as trainer:
        result = trainer.fit(
            data, steps=6, progress=False, thermostat=thermostat, on_wait=said.append,
            on_step=lambda record: board.work(1.0, 3.0),
        )  # fmt: skip
        state = trainer.state()
    assert thermostat.pauses == 2 and said and result["finished"]
    assert result["paused_seconds"] == thermostat.paused_seconds > 0
    assert all((state[name] == expected[name]).all() for name in expected)


# The doctor


def advised(board: ThisMachine, folder: Path) -> dict[str, Finding]:
    return {finding.topic: finding for finding in machine_findings(board, folder)}


def test_advice_for_a_raspberry_pi(tmp_path: Path) -> None:
    findings = advised(machine(tmp_path / "root", RASPBERRY_PI_4), tmp_path)
    assert findings["board"].found == "Raspberry Pi 4 Model B Rev 1.4"
    assert "83 °C" in findings["temperature"].found and "--max-temp" in findings["temperature"].command
    assert "voltage" in findings["throttling"].found and "power supply" in findings["throttling"].advice
    assert "dphys-swapfile" in findings["swap"].command and "/var/swap" in findings["swap"].found
    assert "89.1 MiB of 1.8 GiB" in findings["memory"].found and "systemctl" in findings["memory"].command
    assert findings["governor"] == Finding("governor", "ondemand")


def test_advice_for_a_jetson(tmp_path: Path) -> None:
    findings = advised(machine(tmp_path / "root", JETSON_NANO), tmp_path)
    assert findings["governor"].command == "sudo jetson_clocks"
    assert findings["temperature"] == Finding("temperature", "45 °C (AO-therm)")
    assert "cpufreq" in findings["throttling"].found and findings["throttling"].command
    assert findings["swap"] == Finding("swap", "1.9 GiB, compressed in memory")  # wears nothing


def test_advice_for_the_boards_of_the_guide(tmp_path: Path) -> None:
    """Nothing but the swap of the Raspberry Pi has to be mended."""
    findings = advised(machine(tmp_path / "pi", RASPBERRY_PI_5), tmp_path)
    assert findings["temperature"] == Finding("temperature", "57 °C (rp1_adc)")
    assert findings["throttling"] == Finding("throttling", "none seen")
    assert findings["swap"].found == "2.0 GiB on /dev/zram0, written back to /dev/loop0"
    assert "Mechanism=zram\\n' | sudo tee /etc/rpi/swap.conf.d/" in findings["swap"].command
    others = [findings[topic] for topic in findings if topic not in ("swap", "disk")]
    others += advised(machine(tmp_path / "jetson", JETSON_ORIN_NANO), tmp_path).values()
    assert not any(finding.advice for finding in others)
    assert Finding("swap", "3.7 GiB, compressed in memory") in others


def test_advice_on_disks(tmp_path: Path) -> None:
    card = {"name": "mmcblk0", "device/type": "SD\n"}
    disk = advised(mounted(tmp_path / "card", tmp_path, disk=card), tmp_path)["disk"]
    assert "SD card (ext4)" in disk.found and "--max-writes" in disk.found and not disk.blocks
    memory = advised(mounted(tmp_path / "memory", tmp_path, kind="tmpfs"), tmp_path)["disk"]
    assert "lost without power" in memory.advice and not memory.blocks


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    findings = advised(machine(tmp_path / "root", {}), tmp_path)
    assert findings["board"].found == findings["memory"].found == "unknown"
    assert "no sensor" in findings["temperature"].found
    assert not any(finding.blocks for finding in findings.values())


_CROWDED = """
import hashlib, os, threading, time
from edge_bcs.runtime.board.process import waited_for_cores
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
before, began, end = waited_for_cores(), time.perf_counter(), threading.Barrier(3)
def work():
    while time.perf_counter() - began < 0.5:
        hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 20_000)
    end.wait()  # what threads that have ended waited is forgotten
    end.wait()
for _ in range(2):
    threading.Thread(target=work).start()
end.wait()
print((waited_for_cores() - before) / (time.perf_counter() - began))
end.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="no scheduler statistics here")
def test_two_threads_on_one_core_wait_for_it_in_turns() -> None:
    done = subprocess.run([sys.executable, "-c", _CROWDED], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.7  # a second of each second, and more if others want the core too


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" not in os.environ or not hasattr(os, "sched_setaffinity"),
    reason="these tests run in one process, or cores cannot be chosen here",
)
def test_a_worker_of_the_tests_has_one_core() -> None:
    """Two that computed with two threads each would wait for each other."""
    assert available_threads() == 1
    asked = "from edge_bcs.runtime.engine import available_threads; print(available_threads())"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
