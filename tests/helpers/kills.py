"""Kills trainings again and again, each by another engine than the one before.

    python tests/helpers/kills.py ARTIFACT RUN TIMES STEPS [PROGRAM]

A child of this process trains ARTIFACT into RUN by `edge-bcs finetune --resume`, saving after every step,
until it gets SIGKILL at a random moment; the next one goes on with the other engine, and every third time it
is PROGRAM, edge-bcs-run. A training that ends before is begun anew. Then it is finished. Prints how often
each was killed, as JSON. A script of its own, so that children are made of a process without threads.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import edge_bcs.runtime.trainer  # noqa: F401 (once, and not in every child)
import numpy as np  # noqa: F401
import onnxruntime  # noqa: F401 (after edge_bcs)

from edge_bcs.cli import main
from edge_bcs.data import open_data  # noqa: F401

OPTIONS = ["--data", "digits", "--threads", "1", "--eval-samples", "0", "--max-writes", "none", "--resume"]
ENGINES = ("onnxruntime", "native", "program")


def start(artifact: str, run: str, steps: str, engine: str, program: str | None) -> int:
    """The process that trains."""
    words = ["finetune", artifact, *OPTIONS, "--save-steps", "1", "--steps", steps, "-o", run]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if engine == "program":
        return subprocess.Popen([str(program), *words], **quiet).pid  # type: ignore[call-overload, no-any-return]
    child = os.fork()
    if child:
        return child
    told = os.open(f"{run}.told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(told, stream)
    status = 1
    try:
        main([*words, "--engine", engine])
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


def kill(
    artifact: str, run: str, times: int, steps: str, program: str | None, draws: random.Random
) -> Counter[str]:
    """Kill so many trainings; return how often each engine was killed while it trained."""
    kills: Counter[str] = Counter()
    engines = ENGINES if program else ENGINES[:2]
    for attempt in range(20 * times):
        engine = engines[attempt % len(engines)]
        process = start(artifact, run, steps, engine, program)
        time.sleep(draws.uniform(0, 0.05 if engine == "program" else 0.5))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            told = Path(f"{run}.told").read_text()
            assert os.waitstatus_to_exitcode(status) == 0, f"{engine}, after {kills}: {told}"
            shutil.rmtree(run)
            continue
        kills[engine] += 1
        if kills.total() == times:
            break
    return kills


if __name__ == "__main__":
    source, folder, count, length, *rest = sys.argv[1:]
    board = rest[0] if rest else None
    found = kill(source, folder, int(count), length, board, random.Random(0))
    _, ended = os.waitpid(start(source, folder, length, "onnxruntime", board), 0)
    assert ended == 0, ended
    print(json.dumps({"kills": found, "slots": sorted(file.name for file in Path(folder).glob("state*"))}))
