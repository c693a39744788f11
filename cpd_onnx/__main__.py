"""The `cpd-onnx` command, also `python -m cpd_onnx`."""

import os
import sys


def entry() -> None:
    """The `cpd-onnx` command."""
    os.environ["PYTHONSAFEPATH"] = "1"  # child processes import nothing from the current folder
    try:
        from cpd_onnx.cli.loading import Start
        from cpd_onnx.cli.supervise import supervised
        from cpd_onnx.io.streams import open_closed_streams, print_error

        open_closed_streams()
        start = Start()
        code = supervised(start.run)
    except (ImportError, MemoryError, OSError) as error:  # too little memory even for these, or no child process
        sys.exit(f"error: cannot start: {' '.join(str(error).split()) or 'not enough memory'}")
    if code and not start.is_done:  # a library ended the process without a message
        print_error(start.MESSAGE)
    sys.exit(code)


if __name__ == "__main__":
    entry()
