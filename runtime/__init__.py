"""What runs on the board: numpy, ONNX Runtime and the operator library."""
