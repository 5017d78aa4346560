"""The scoring op on TensorRT: Triton kernels, their PTX, and the plugin that embeds it in an engine."""
