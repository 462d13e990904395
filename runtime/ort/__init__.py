"""Artifacts and checkpoints of ONNX Runtime's own training tools, run on the stock runtime."""
