"""One compiled graph that can be run, on ONNX Runtime or TensorRT, behind one interface: engines.sessions.session."""
