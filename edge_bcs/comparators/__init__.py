"""The methods that the paper compares with: a dense robust network is trained first, then pruned.

| method | phases |
| --- | --- |
| `lwm` | dense robust pretraining, least magnitudes pruned, fine-tuning (Sehwag et al., 2019) |
| `hydra` | pretraining, importance scores learnt, fine-tuning (Sehwag et al., 2020) |
| `admm` | pretraining, alternating direction method of multipliers, masked retraining (Ye et al., 2019) |

Each ends with exactly κ connections, every layer with the same density, in a checkpoint like any other.
"""

from __future__ import annotations

from edge_bcs.comparators import admm, hydra, lwm
from edge_bcs.comparators.phases import Phases, PhaseSettings

__all__ = ["METHODS", "PhaseSettings", "Phases"]

METHODS = {"lwm": lwm.train, "hydra": hydra.train, "admm": admm.train}
