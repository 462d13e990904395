"""One row of the table in docs/onnxruntime.md: what the installed onnxruntime computes and enforces.

    python tests/ort_training/onnxruntime_versions.py ARTIFACT

ARTIFACT is an export of edge-bcs with --plain-eval and a checkpoint. Neither torch nor onnx is needed, so it
runs in an environment that holds nothing but numpy, safetensors and the onnxruntime in question. Prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import edge_bcs.runtime  # noqa: F401 (before onnxruntime, which it keeps from reporting its use)
import numpy as np
import onnxruntime
from edge_bcs.runtime import Trainer

from edge_bcs.core.errors import EdgeBcsError


def train(trainer: Any) -> tuple[str, list[float]]:
    """Two robust steps: sha256 of the state (first 16 digits) and the losses."""
    random = np.random.default_rng(0)
    n, shape = trainer.artifact.micro_batch + 1, trainer.artifact.input_shape
    x, y = random.random((n, *shape), np.float32), random.integers(0, trainer.artifact.num_classes, n)
    losses = [trainer.step(x, y)["loss"] for _ in range(2)]
    digest = hashlib.sha256()
    for _, array in sorted(trainer.state().items()):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16], losses


def refuses(folder: str, cap: int) -> bool:
    """Whether training under a cap that is too small is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Trainer(folder, memory=cap) as trainer:
                train(trainer)
    except EdgeBcsError as error:
        return "memory budget exceeded" in str(error)
    return False


def dense() -> float | str:
    """Largest difference of the losses of a dense artifact from those of onnxruntime-training 1.19.2."""
    from edge_bcs.runtime.ort.artifact import OrtArtifact

    differences = []
    for name in ("residual", "mobile"):
        folder = Path(__file__).parent / "dense" / name
        expected = json.loads((folder / "expected.json").read_text())["loss"]
        random = np.random.default_rng(0)
        try:
            training = OrtArtifact(folder, learning_rate=0.02)
        except EdgeBcsError as error:
            return str(error).split(":")[0]
        for loss in expected:
            x, y = random.random((4, 1, 9, 9), np.float32), random.integers(0, 10, 4)
            differences.append(abs(training.step(x, y)["loss"] - loss))
    return max(differences)


def main(folder: str) -> dict[str, Any]:
    row: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    with Trainer(folder) as trainer:
        row["state"], row["losses"] = train(trainer)
        memory = trainer.memory()
        row["exact"], row["peak_bytes"], row["bound_bytes"] = (
            memory["exact"], memory["peak_bytes"], memory["bound_bytes"]
        )  # fmt: skip
        images = np.random.default_rng(1).random((4, *trainer.artifact.input_shape), np.float32)
    with Trainer(folder) as trainer:
        logits = trainer.logits(images)
    predicted = trainer.artifact.predicted_peak_bytes
    row["predicted_peak_bytes"] = predicted
    row["refuses_three_quarters"] = refuses(folder, predicted * 3 // 4)
    row["refuses_one_byte_less"] = refuses(folder, predicted - 1)
    row["refuses_less_than_its_buffers"] = refuses(folder, row["bound_bytes"] - 1)
    session = onnxruntime.InferenceSession(
        str(Path(folder) / "eval_model.plain.onnx"), providers=["CPUExecutionProvider"]
    )
    row["plain_eval_difference"] = float(np.abs(session.run(None, {"input": images})[0] - logits).max())
    row["dense_artifact_difference"] = dense()
    try:
        from edge_bcs.runtime.ort.training import OrtTrainer

        with OrtTrainer(folder) as trainer:
            row["module_state"] = train(trainer)[0]
    except EdgeBcsError:
        row["module_state"] = None
    return row


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1]), indent=1))
