"""`python -m cpd_onnx`."""

from cpd_onnx.cli import entry

if __name__ == "__main__":
    entry()
