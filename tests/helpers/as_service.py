"""Runs the command of a systemd unit as systemd would, without systemd: for tests, as root, on Linux.

    python tests/helpers/as_service.py UNIT

Of the section [Service] it does what restricts the process: the user, the file systems (ProtectSystem=strict,
ReadWritePaths, CacheDirectory, PrivateTmp, ProtectKernelTunables), the network, the privileges and the
environment, all in namespaces of its own. A setting that it does not know is refused, so that none is
forgotten. PYTHONPATH is passed on, by which the tests choose the sources.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shlex
import sys
from pathlib import Path

NEEDS_CAPABILITY = 21  # CAP_SYS_ADMIN
_NEW_MOUNTS, _NEW_NETWORK = 0x00020000, 0x40000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_KEPT = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "relatime": 1 << 21}
_NO_NEW_PRIVILEGES = 38
_API = ("/dev", "/proc", "/sys")  # which ProtectSystem=strict leaves as they are
# How it is started, stopped and scheduled; or (RestrictSUIDSGID) a kind of file that nothing here makes.
_WITHOUT_EFFECT = {
    "Type", "SuccessExitStatus", "Restart", "RestartSec", "TimeoutStopSec", "Nice", "IOSchedulingClass",
    "MemorySwapMax", "RestrictSUIDSGID",
}  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


def possible() -> bool:
    """Whether this process may make such namespaces."""
    if sys.platform != "linux":
        return False
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(status["CapEff"], 16) >> NEEDS_CAPABILITY & 1)


def settings(unit: str) -> dict[str, list[str]]:
    """Name → values of the section [Service]."""
    found: dict[str, list[str]] = {}
    section = unit.split("[Service]", 1)[1].split("\n[", 1)[0]
    for line in section.splitlines():
        if line and line[0] not in "#;":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def words(value: str) -> list[str]:
    """The words of a value, as systemd reads them."""
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(value)]


def _checked(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: {what}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (text.encode() or None for text in (source, target, kind))
    _checked(_libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None), f"{kind} {target}")


def _mounts() -> list[tuple[str, int]]:
    """(mount point, flags) of all that is mounted; a later one may hide an earlier one."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        place = fields[4].encode().decode("unicode_escape")
        found.append((place, sum(_KEPT.get(option, 0) for option in fields[5].split(","))))
    return found


def _below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def confine(service: dict[str, list[str]]) -> dict[str, str]:
    """Confine this process as the settings say, and return the environment of its command."""
    (name,) = service.pop("User")
    user = pwd.getpwnam(name)
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
        "LANG": "C.UTF-8",
        "HOME": user.pw_dir,
        "USER": name,
        "LOGNAME": name,
    }
    environment |= dict(
        word.split("=", 1) for value in service.pop("Environment", []) for word in words(value)
    )
    private_network = service.pop("PrivateNetwork", []) == ["yes"]
    _checked(_libc.unshare(_NEW_MOUNTS | (_NEW_NETWORK if private_network else 0)), "unshare")
    _mount("", "/", "", _RECURSIVE | _PRIVATE)
    writable = [word for value in service.pop("ReadWritePaths", []) for word in words(value)]
    if service.pop("PrivateTmp", []) == ["yes"]:
        for folder in ("/tmp", "/var/tmp"):
            _mount("tmpfs", folder, "tmpfs", 0, "mode=1777")
            writable.append(folder)
    for folder in service.pop("CacheDirectory", []):
        _mount("tmpfs", "/var/cache", "tmpfs", 0, "mode=755")
        writable.append(f"/var/cache/{folder}")
        os.mkdir(writable[-1])
        os.chown(writable[-1], user.pw_uid, user.pw_gid)
    for folder in writable:
        _mount(folder, folder, "", _BIND | _RECURSIVE)
    if service.pop("ProtectSystem", []) == ["strict"]:
        for place, flags in _mounts():
            if not _below(place, [*_API, *writable]):
                _mount("", place, "", _REMOUNT | _BIND | _READ_ONLY | flags)
    if service.pop("ProtectKernelTunables", []) == ["yes"]:
        for place in ("/proc/sys", "/sys"):
            _mount(place, place, "", _BIND | _RECURSIVE)
            _mount("", place, "", _REMOUNT | _BIND | _READ_ONLY)
    if service.pop("NoNewPrivileges", []) == ["yes"]:
        _checked(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    if user.pw_uid != os.getuid():
        os.initgroups(name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    return environment


def main(unit: str) -> None:
    """Run the command of the unit in place of this process."""
    service = settings(Path(unit).read_text())
    (start,) = service.pop("ExecStart")
    environment = confine(service)
    unknown = service.keys() - _WITHOUT_EFFECT
    if unknown:
        raise SystemExit(f"these settings are not known here: {', '.join(sorted(unknown))}")
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    os.chdir("/")
    command = words(start)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main(sys.argv[1])
