"""Deployment: fixed sizes, operator sets, 8-bit integers, 16-bit floats, onnxruntime's format, target profiles."""
