"""The `cpd-onnx` command, also `python -m cpd_onnx`."""

import os
import sys


def entry() -> None:
    """The `cpd-onnx` command."""
    os.environ["PYTHONSAFEPATH"] = "1"  # processes that are started import nothing from the current folder
    try:
        from cpd_onnx.streams import complain, open_closed_streams
        from cpd_onnx.supervise import supervised
    except (ImportError, MemoryError, OSError) as error:  # where even these do not fit into memory
        sys.exit(f"error: cannot start: {' '.join(str(error).split()) or 'not enough memory'}")
    open_closed_streams()
    try:
        code = supervised(_work)
    except (OSError, MemoryError) as error:
        complain(f"error: cannot start a process: {' '.join(str(error).split()) or 'not enough memory'}")
        code = 1
    sys.exit(code)


def _work() -> int:
    from cpd_onnx.loading import load_command  # the libraries are loaded by the process that uses them

    main = load_command()
    return 1 if main is None else main()


if __name__ == "__main__":
    entry()
