"""onnxruntime: sessions, inputs, runs in pieces, timing."""
