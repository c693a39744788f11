"""onnxruntime: sessions, inputs, partial runs, benchmarks."""
