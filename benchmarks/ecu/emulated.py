"""A model on an emulated Cortex-M4F: flash, memory, instructions and outputs of the program that `deploy --c-source` gives.

The program is compiled by arm-none-eabi-gcc and run by qemu-system-arm on the machine mps2-an386, whose clock advances with
each instruction. Counts of instructions are exact and repeatable; they are no cycles, as QEMU models neither the pipeline
nor the wait states of a flash memory.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cpd_onnx.deploy.c_source import CSource
from cpd_onnx.ir.model import Array

FIRMWARE = Path(__file__).parent / "firmware"
TOOLS = ("arm-none-eabi-gcc", "arm-none-eabi-size", "qemu-system-arm")
CPU = ("-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard")
OPTIONS = ("-std=c11", "-O2", "-funroll-loops", "-ffunction-sections", "-fdata-sections", "-w")
"""Unrolled loops take fewer instructions, for more code."""
MACHINE = ("-M", "mps2-an386", "-nographic", "-monitor", "none", "-serial", "none", "-icount", "shift=6,sleep=off")
_SECONDS = 3600
_CALL = re.compile(r"^(    node\d+_\w*_n(\d+)\(.*\);)$", re.MULTILINE)
"""Call of the function of a node, with its number in the model."""


@dataclass(frozen=True)
class Emulated:
    """What a program needs and gives.

    Attributes:
        flash: Bytes of code and constants in flash, without the samples.
        code: Bytes of `flash` that are no constants of the model.
        ram: Bytes of static data and of the deepest stack.
        stack: Bytes of the deepest stack.
        instructions: Instructions of one run, the mean over the samples.
        outputs: The first output for each sample, as real numbers.
        layers: Instructions of the functions that run a node, by its name; empty if not asked for.
    """

    flash: int
    code: int
    ram: int
    stack: int
    instructions: float
    outputs: list[Array]
    layers: Mapping[str, float] = field(default_factory=dict)


def missing() -> list[str]:
    """Return the tools that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def emulate(source: CSource, feeds: Sequence[Mapping[str, Array]], folder: Path, *, layers: bool = False) -> Emulated:
    """Compile a program with samples in an existing folder, run it, and return what it took.

    Raises RuntimeError if a tool fails.
    """
    text = _CALL.sub(r"    layer_starts(\2);\n\1\n    layer_ends();", source.text) if layers else source.text
    (folder / f"{source.name}.c").write_text(f"void layer_starts(unsigned), layer_ends(void);\n{text}")
    (folder / f"{source.name}.h").write_text(source.header)
    (folder / "samples.h").write_text(_samples(source, feeds))
    program = folder / "program.elf"
    parts = [FIRMWARE / "startup.c", FIRMWARE / "main.c", folder / f"{source.name}.c"]
    own = [f'-DMODEL_HEADER="{source.name}.h"', f"-I{folder}"]
    linked = [
        "-nostartfiles",
        "--specs=nano.specs",
        "--specs=nosys.specs",
        f"-T{FIRMWARE / 'mps2.ld'}",
        "-Wl,--gc-sections",
        "-lm",
    ]
    _run("arm-none-eabi-gcc", *CPU, *OPTIONS, *own, *parts, *linked, "-o", program)
    said = _run("qemu-system-arm", *MACHINE, "-semihosting", "-kernel", program)
    return _read(source, said, _sections(program))


def _read(source: CSource, said: str, sizes: Mapping[str, int]) -> Emulated:
    """Return what a program printed, with the sizes of its sections."""
    entries = [line.split(" ", 1) for line in said.splitlines() if " " in line]
    stack = max(int(value, 16) for name, value in entries if name == "stack")
    port = source.outputs[0]
    dtype = port.numpy_dtype
    outputs = [np.frombuffer(bytes.fromhex(v), dtype).reshape(port.shape) for name, v in entries if name == "output"]
    if port.integers is not None:
        outputs = [port.integers.real(output) for output in outputs]
    counts = [int(value, 16) for name, value in entries if name == "instructions"]
    taken: dict[str, list[int]] = {}
    for (name, value), (following, count) in itertools.pairwise(entries):
        if name == "layer" and following == "took":
            taken.setdefault(source.nodes[int(value, 16)], []).append(int(count, 16))
    flash = sizes.get(".text", 0) + sizes.get(".ARM.exidx", 0) + sizes.get(".data", 0)
    return Emulated(
        flash,
        flash - source.constants,
        sizes.get(".data", 0) + sizes.get(".bss", 0) + stack,
        stack,
        float(np.mean(counts)),
        outputs,
        {name: float(np.sum(each)) / len(counts) for name, each in taken.items()},
    )


def _sections(program: Path) -> dict[str, int]:
    rows = (line.split() for line in _run("arm-none-eabi-size", "-A", program).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 3 and row[1].isdigit()}


def _samples(source: CSource, feeds: Sequence[Mapping[str, Array]]) -> str:
    """Return a header with the samples, and how they are given to the program."""
    lines, gives = ["#include <string.h>", f"#define SAMPLES {len(feeds)}"], []
    for port in source.inputs:
        dtype = port.numpy_dtype
        given = [feed[port.name] for feed in feeds]
        if port.integers is not None:
            given = [port.integers.quantized(array) for array in given]
        rows = [np.ascontiguousarray(array, dtype).tobytes() for array in given]
        bytes_ = "},\n{".join(",".join(map(str, row)) for row in rows)
        name = f"samples_{port.variable}"
        lines.append(
            f'__attribute__((section(".samples"), aligned(8))) static const unsigned char {name}[][{len(rows[0])}] = '
            f"{{{{{bytes_}}}}};"
        )
        gives.append(f"memcpy({port.variable}, {name}[s], sizeof {name}[s]);")
    output = source.outputs[0]
    size = f"(sizeof *{output.variable} * {output.variable.upper()}_SIZE)"
    lines += [f"#define GIVE(s) {' '.join(gives)}", f"#define RUN {source.name}_run"]
    lines += [f"#define OUTPUT {output.variable}", f"#define OUTPUT_BYTES {size}", ""]
    return "\n".join(lines)


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout + done.stderr
