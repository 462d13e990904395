"""What the tests of commands that train share: a small network, and digits to train it on."""

# mypy: disable-error-code="arg-type, assignment, call-overload"

from __future__ import annotations

from pathlib import Path

SMALL = ("--width", 0.0625, "--input-size", 8, "--channels", 1, "--sparsity", 0.8, "--attack-steps", 1)


def write_digits(file: Path) -> None:
    import numpy as np

    from edge_bcs.data import open_data

    parts = {kind: open_data("digits", kind, (1, 8, 8)) for kind in ("train", "test")}
    arrays = {}
    for kind, data in parts.items():
        arrays[f"x_{kind}"], arrays[f"y_{kind}"] = data.read(np.arange(64))
    np.savez(file, **arrays)
