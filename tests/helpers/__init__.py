"""What several test files use: networks, artifacts, references, programs. Tests import no other test file."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DENSE = TESTS / "ort_training" / "dense"
"""Dense training artifacts that ONNX Runtime's own tools made, in folders `mobile` and `residual`."""
