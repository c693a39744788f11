"""Widths at which the kernels of this computer's processor are fast, known without a measurement.

onnxruntime computes convolutions in blocks of channels, as many as the floats of a vector register: 16 with AVX-512, 8
with AVX2 (and with AVX, whose registers are as wide), 4 with NEON. A channel more than a multiple costs a whole block.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

from cpd_onnx.budget.widths import is_width
from cpd_onnx.channels.groups import Combed, Group

AUTO = "auto"
"""Value of `round_to` that stands for the blocks of the processor; `auto16` for blocks of 16."""
_CPUINFO = Path("/proc/cpuinfo")
_BLOCKS = {"avx512f": 16, "avx2": 8, "avx": 8, "asimd": 4, "neon": 4}
"""Number of floats of a vector register, by the flag of the processor in /proc/cpuinfo, widest first."""
_BY_MACHINE = {"x86_64": 8, "amd64": 8, "arm64": 4, "aarch64": 4}
"""The same by the type of machine, where the flags are not known."""
_LEAST_BLOCKS = 4
"""Number of blocks that a group must have at least; smaller blocks are used for smaller groups (heuristic)."""


@cache
def vector_block() -> int:
    """Return the number of channels in a block of this processor; 1 if it is not known."""
    return _block_of(_flags())


def _flags() -> frozenset[str]:
    """Return the flags of the processor; empty if the system does not list them."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(":") for line in lines)
    return next(
        (frozenset(flags.split()) for name, _, flags in listed if name.strip() in ("flags", "Features")), frozenset()
    )


def _block_of(flags: frozenset[str]) -> int:
    known = next((block for flag, block in _BLOCKS.items() if flag in flags), None)
    return _BY_MACHINE.get(platform.machine().lower(), 1) if known is None else known


def multiples(combed: Combed, block: int) -> dict[int, int]:
    """Return, for each group by id, the number of which its widths should be multiples.

    That is the block or, for groups of few blocks, the half, quarter and so on; 1 for heads and groups of several
    channels, whose number is no width. A depthwise convolution has the channels of its input.
    """
    return {group.id: _multiple(combed, group, block) for group in combed.groups}


def _multiple(combed: Combed, group: Group, block: int) -> int:
    if not is_width(combed, group):
        return 1
    while block > 1 and len(group) < _LEAST_BLOCKS * block:
        block //= 2
    return max(1, block)
