"""Checkpoint weights and geometry to ONNX graphs. Needs onnx and onnx_ir, not torch."""
