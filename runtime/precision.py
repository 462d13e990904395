"""In which precision this machine computes the attacks of an artifact.

The graph and its memory plan are the same in both; the operators of the attack keep their activations as
float32, or in half precision: as bfloat16 with sums in float32, or on ARM as FP16
(``runtime/native/kernels/half.h``). Everything that is learned stays float32.
"""

from __future__ import annotations

from edge_bcs.runtime.library import half_kernels
from edge_bcs.runtime.manifest import Described

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import PRECISIONS, check_choice

FULL, HALF = "f32", "half"
"""What a run says of its attacks."""


def half_attack(artifact: Described, wish: str | None = None) -> bool:
    """Whether attacks are in half precision here.

    Args:
        artifact: or a run. wish: one of `PRECISIONS`; None: what the artifact says, or a run was begun with.

    Raises EdgeBcsError if half precision is asked for where there is none.
    """
    if wish is not None:
        check_choice("attack precision", wish, PRECISIONS)
    asked = wish or artifact.attack_precision or FULL
    if asked == FULL or (asked != HALF and artifact.attack_precision is None):
        return False
    if artifact.attack_precision is None:
        raise EdgeBcsError(
            "the attack of this network has no half-precision form (or an earlier release exported it); take "
            "the attack precision f32, or export it again."
        )
    kernels = half_kernels()
    if asked == HALF and not kernels:
        raise EdgeBcsError(
            "this processor has no arithmetic in half precision (AVX-512 BF16, ARM's FP16); take the attack "
            "precision f32" + ("." if wish else ", with which the run goes on from where it stands.")
        )
    return asked == HALF or kernels == 2
