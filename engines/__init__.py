"""ONNX graphs to TensorRT engines, and the Python runtime that answers questions with them."""
