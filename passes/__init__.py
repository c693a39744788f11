"""The passes, one file each; imported as `cpd_onnx.passes`."""

if __name__ != "cpd_onnx.passes":
    raise ImportError("import this package as cpd_onnx.passes, not from its folder")
