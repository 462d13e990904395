"""ONNX Runtime's own training tools: its gradient builder, and its checkpoints."""
