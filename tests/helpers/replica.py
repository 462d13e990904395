"""One process of several, for test_replicas: trains and leaves its state in a file of its own."""

# mypy: disable-error-code="arg-type, assignment"

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edge_bcs
from edge_bcs import Attack, Compute, Feed, Hyper, Output, Schedule
from edge_bcs.training import loop as training
from helpers.training import digits, tiny

torch.set_num_threads(1)
output, options = Path(sys.argv[1]), json.loads(sys.argv[2])
rank = os.environ.get("RANK", "0")
more: dict[str, Any] = {"pseudo_labelled": digits(40)} if options["objective"] == "rst" else {}
objects: dict[str, Any] = {
    "schedule": Schedule(**options.pop("schedule")),
    "hyper": Hyper(**options.pop("hyper", {})),
    "output": Output(output / "run", resume=options.pop("resume", False)),
}
network = tiny()
# Whatever a process began with, the first one's network is trained.
network[4].bias.data += int(rank)
sparse = edge_bcs.sparsify(network, 0.9, 5, start="new")
report = training.train(
    sparse,
    digits(80),
    batch_size=16,
    attack=Attack(steps=2),
    feed=Feed(validation=0.2, **more),
    compute=Compute(device="cpu"),
    progress=False,
    **objects,
    **options,
)
np.savez(output / f"state-{rank}.npz", **sparse.state())
(output / f"report-{rank}.json").write_text(json.dumps(report))
