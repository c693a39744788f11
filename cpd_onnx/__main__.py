"""The `cpd-onnx` command, also `python -m cpd_onnx`."""

import sys

from cpd_onnx.supervise import supervised


def entry() -> None:
    """The `cpd-onnx` command."""
    sys.exit(supervised(_work))


def _work() -> int:
    from cpd_onnx.cli import main  # the libraries are loaded by the process that uses them

    return main()


if __name__ == "__main__":
    entry()
