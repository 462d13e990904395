"""Flower's own processes on loopback, with TLS and keys of nodes: a server and three boards, of which one is
killed and one stops for a while; a fourth, whose key nobody registered. And Flower's simulation, without any.

The certificates and keys are made by the commands that docs/fleets.md gives.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("FLOWER_BIN", str(Path(sys.executable).parent)))
BOARDS = ("a", "b", "c")
DEADLINE = 400.0
"""Seconds after which something has gone wrong, on any machine."""
pytestmark = pytest.mark.slow
Make = Callable[..., Path]


def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, **options
    )


def until(what: Callable[[], bool], of: str) -> None:
    """Wait until something is the case; nothing depends on how long that takes."""
    ends = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < ends, f"waited in vain: {of}"
        time.sleep(0.5)


class Place:
    """A folder with what Flower's processes need: its configuration, certificates and keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def configure(self, text: str) -> None:
        (self.folder / "home").mkdir(exist_ok=True)
        (self.folder / "home" / "config.toml").write_text(text)

    def certificates(self) -> None:
        """A CA of our own, and a certificate of the server."""
        (self.folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        for words in (
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj /CN=fleet "
            "-keyout ca.key -out ca.crt",
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=server "
            "-keyout server.key -out server.csr",
            "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile san "
            "-out server.crt",
        ):
            done = run("openssl", *words.split(), cwd=self.folder)
            assert done.returncode == 0, done.stderr

    def key(self, name: str) -> Path:
        done = run(
            "ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", self.folder / name
        )
        assert done.returncode == 0, done.stderr
        return self.folder / name

    def flwr(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return run(BIN / "flwr", *words, env=self.environment, cwd=self.folder)

    def begin(self, app: Path, connection: str, settings: str) -> str:
        """Start a run, and return its number."""
        done = self.flwr("run", app, connection, "--run-config", settings, "--format", "json")
        assert done.returncode == 0, done.stdout + done.stderr
        return str(json.loads(done.stdout)["run-id"])

    def start(self, name: str, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start a process in a group of its own, with what it says in a file."""
        with open(self.folder / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                [str(BIN / words[0]), *map(str, words[1:])],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def says(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for tool in ("openssl", "ssh-keygen"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} makes certificates and keys, and is not here")
    return Place(tmp_path)


@pytest.fixture
def ended() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def deal(digits: Path, folder: Path) -> None:
    with np.load(digits) as images:
        for number, board in enumerate(BOARDS):
            some = {
                name: images[name][number::3] if "train" in name else images[name] for name in images.files
            }
            np.savez(folder / f"{board}.npz", **some)


def runs_of(rounds: Path, number: int) -> list[str]:
    report = json.loads((rounds / f"round-{number:04}" / "merged" / "merge.json").read_text())
    return [Path(one["run"]).name for one in report["runs"]]


def test_a_server_and_three_boards(tiny_artifact: Make, digits: Path, place: Place, ended: ExitStack) -> None:
    place.certificates()
    deal(digits, place.folder)
    place.configure(
        f'[superlink.server]\naddress = "127.0.0.1:{place.port}"\n'
        f'root-certificates = "{place.folder / "ca.crt"}"\n'
    )
    shutil.copytree(tiny_artifact(), place.folder / "camera")
    server = place.start(
        "server", "flower-superlink", "--host", "127.0.0.1", "--port", f"{place.port}",
        "--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key",
        "--enable-supernode-auth", "--disable-runtime-dependency-installation",
    )  # fmt: skip
    ended.callback(server.wait)
    ended.callback(send, server, signal.SIGKILL)
    keys = {name: place.key(name) for name in (*BOARDS, "stranger")}
    nodes = {}
    for name in BOARDS:
        words = ("supernode", "register", f"{keys[name]}.pub", "server")
        until(lambda words=words: place.flwr(*words).returncode == 0, f"{words}: {place.says('server')}")
    for name, key in keys.items():
        data = place.folder / f"{name if name in BOARDS else 'a'}.npz"
        config = f'artifact="{place.folder}/camera" data="{data}" run="{place.folder}/run-{name}" threads=1'
        node = place.start(
            name, "flower-supernode", "--superlink", f"127.0.0.1:{place.port}",
            "--root-certificates", "ca.crt", "--auth-supernode-private-key", key,
            "--port", f"{free_port()}", "--node-config", config,
        )  # fmt: skip
        ended.callback(node.wait)
        ended.callback(send, node, signal.SIGKILL)
        nodes[name] = node
    rounds = place.folder / "rounds"
    settings = (
        f'artifact="{place.folder}/camera" folder="{rounds}" boards=3 num-rounds=4 steps=2 timeout=60.0 '
        "evaluate=1.0 attack-steps=1"
    )
    app = place.folder / "app"
    shutil.copytree(ROOT / "examples" / "flower", app)
    number_of_run = place.begin(app, "server", settings)

    def merged(number: int) -> bool:
        return (rounds / f"round-{number:04}" / "merged" / "merge.json").is_file()

    until(lambda: merged(1), place.says("server"))
    send(nodes["c"], signal.SIGKILL)
    send(nodes["b"], signal.SIGSTOP)
    until(lambda: merged(3), place.says("server"))
    send(nodes["b"], signal.SIGCONT)
    until(lambda: merged(4), place.says("server"))
    until(lambda: (rounds / "round-0004" / "evaluation.json").is_file(), place.says("server"))
    taking_part = [len(runs_of(rounds, number)) for number in (1, 2, 3, 4)]
    assert taking_part[0] >= 2 and all(taking_part[1:]), taking_part
    assert len({name for number in (1, 2, 3, 4) for name in runs_of(rounds, number)}) <= 3
    assert not (place.folder / "run-stranger").exists()
    said = place.flwr("log", number_of_run, "server", "--show").stdout
    assert "is left out" in " ".join(said.split()), said


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_boards_that_flower_simulates(
    tiny_artifact: Make, digits: Path, place: Place, ended: ExitStack
) -> None:
    pytest.importorskip("ray")
    deal(digits, place.folder)
    for number, board in enumerate(BOARDS):
        (place.folder / f"{board}.npz").rename(place.folder / f"board-{number}.npz")
    shutil.copytree(tiny_artifact(), place.folder / "camera")
    place.configure(
        f'[superlink.simulated]\naddress = "127.0.0.1:{place.port}"\ninsecure = true\n'
        "options.num-supernodes = 3\noptions.backend.client-resources.num-cpus = 1\n"
        "options.backend.init-args.num-cpus = 2\n"
    )
    place.environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    server = place.start(
        "server", "flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1",
        "--port", f"{place.port}", "--disable-runtime-dependency-installation",
    )  # fmt: skip
    ended.callback(server.wait)
    ended.callback(send, server, signal.SIGKILL)
    app = place.folder / "app"
    shutil.copytree(ROOT / "examples" / "flower", app)
    rounds, folder = place.folder / "rounds", place.folder
    settings = (
        f'artifact="{folder}/camera" data="{folder}/board-{{board}}.npz" run="{folder}/run-{{board}}" '
        f'folder="{rounds}" boards=3 num-rounds=2 steps=2 threads=1 evaluate=1.0 attack-steps=1'
    )
    until(lambda: place.flwr("list", "simulated").returncode == 0, place.says("server"))
    number_of_run = place.begin(app, "simulated", settings)
    until(
        lambda: (rounds / "round-0002" / "evaluation.json").is_file(),
        place.says("server") + place.flwr("log", number_of_run, "simulated", "--show").stdout,
    )
    assert [len(runs_of(rounds, number)) for number in (1, 2)] == [3, 3]
    assert sorted(path.name for path in folder.glob("run-*")) == ["run-0", "run-1", "run-2"]
