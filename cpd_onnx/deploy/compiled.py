"""C source compiled for this computer, so that its outputs can be compared with those of onnxruntime."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpd_onnx.deploy.c_source import CSource, Port
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.interface import Interface
from cpd_onnx.ir.model import Array

_COMPILERS = ("cc", "gcc", "clang")
"""Compilers that are looked for if the variable CC names none."""
_SECONDS = 900
"""Time after which the compiler or a run is stopped."""
_MAIN = """#include <stdio.h>
#include "{name}.h"

int main(void) {{
    for (;;) {{
{reads}
        {name}_run();
{writes}
        fflush(stdout);
    }}
}}
"""


def compiler() -> list[str]:
    """Return the command of the C compiler, that of the variable CC or the first one found; empty if there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    found = named if named and shutil.which(named[0]) else [name for name in _COMPILERS if shutil.which(name)][:1]
    return list(found)


class CompiledModel:
    """The program of a model, as a runner with the interface of a session of onnxruntime."""

    def __init__(self, source: CSource, folder: Path) -> None:
        """Compile the source in an existing folder.

        Raises UnsupportedError if there is no compiler, or it rejects the source.
        """
        self._source, self._program = source, folder / "program"
        command = compiler()
        if not command:
            raise UnsupportedError("no C compiler was found: install one, or name it in the variable CC")
        files = {f"{source.name}.c": source.text, f"{source.name}.h": source.header, "main.c": _main(source)}
        for name, text in files.items():
            (folder / name).write_text(text)
        sources = [str(folder / name) for name in files if name.endswith(".c")]
        options = ["-std=c11", "-O2", "-w", "-ffp-contract=off", "-o", str(self._program), *sources, "-lm"]
        done = _run([*command, *options])
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise UnsupportedError(f"the C compiler rejects the source: {said[0][:200]}")

    @property
    def interface(self) -> Interface:
        """The real numbers that the integers of inputs and outputs stand for."""
        ports = (*self._source.inputs, *self._source.outputs)
        return Interface(integers={port.name: port.integers for port in ports if port.integers is not None})

    def get_outputs(self) -> Sequence[Port]:
        """Return the outputs."""
        return self._source.outputs

    def run(self, names: None, feed: Mapping[str, Array], limits: Any = None, /) -> Sequence[Array]:
        """Return all outputs for one input of each name.

        Raises UnsupportedError if the program fails.
        """
        given = b"".join(_bytes(port, feed[port.name]) for port in self._source.inputs)
        done = _run([str(self._program)], given)
        sizes = [math.prod(port.shape) * port.numpy_dtype.itemsize for port in self._source.outputs]
        if done.returncode != 0 or len(done.stdout) != sum(sizes):
            raise UnsupportedError(f"the compiled program failed with exit code {done.returncode}")
        ends = np.cumsum(sizes).tolist()
        pieces = (done.stdout[end - size : end] for size, end in zip(sizes, ends, strict=True))
        ports = self._source.outputs
        return [np.frombuffer(p, port.numpy_dtype).reshape(port.shape) for p, port in zip(pieces, ports, strict=True)]


def _run(command: Sequence[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, input=given, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(f"{Path(command[0]).name} did not end within {_SECONDS} s") from error
    except OSError as error:
        raise UnsupportedError(f"{command[0]} cannot be run: {error.strerror}") from error


def _main(source: CSource) -> str:
    """Return a program that reads inputs from standard input until it ends, and writes the outputs of each."""
    size = "sizeof *{0} * {1}_SIZE"
    reads = "\n".join(
        f"        if (fread({v}, 1, {size.format(v, v.upper())}, stdin) != {size.format(v, v.upper())}) return 0;"
        for v in (port.variable for port in source.inputs)
    )
    writes = "\n".join(
        f"        fwrite({v}, sizeof *{v}, {v.upper()}_SIZE, stdout);" for v in (p.variable for p in source.outputs)
    )
    return _MAIN.format(name=source.name, reads=reads, writes=writes)


def _bytes(port: Port, array: Array) -> bytes:
    if tuple(array.shape) != port.shape:
        raise UnsupportedError(f"input {port.name!r} of the program is {list(port.shape)}, got {list(array.shape)}")
    return np.ascontiguousarray(array, port.numpy_dtype).tobytes()
