"""Rules of mixtures of experts: the router's output has one number for each expert, which is a channel of its own.

A token takes the `k` experts with the largest numbers. The mask check therefore computes the operator on the surviving
experts alone; of fewer than `k` experts, all are taken. The inner width is the same in all experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.rules.api import BLOCK_BYTES, GiveUp, Op, rule
from cpd_onnx.rules.elementwise import MICROSOFT

_FUSED = {0: 1, 1: 2, 2: 2}
"""Number of rows of the first matrix for each inner channel, by the attribute `swiglu_fusion`."""


@dataclass(frozen=True)
class _Mixture:
    """The channels of a mixture of experts.

    Attributes:
        experts: Experts.
        inner: Inner channels of every expert.
        rows: Rows of the first matrix: inner channels, or gates and values of them.

    """

    experts: Axis
    inner: Axis
    rows: Axis


def _mixture(op: Op, experts: int, inner: Axis) -> _Mixture:
    """Follow tokens and router, and return the channels of the operator."""
    x, router = op.input(0), op.input(1)
    fusion = op.get("swiglu_fusion", 0) if op.get("activation_type", "relu") in ("swiglu", "geglu") else 0
    rows = op.atoms.repeated(inner, 2) if fusion == 1 else op.atoms.stretched(inner, len(inner) * _FUSED[fusion])
    found = _Mixture(op.atoms.fresh(experts), inner, rows)
    op.unite(router[1], found.experts)
    tokens = (x.axes or [])[:-1]
    op.unite(router[0], tokens[0] if len(tokens) == 1 else op.atoms.product(*tokens))
    if op.get("use_sparse_mixer", 0):
        op.freeze(found.experts, "chooses its experts in pairs")
    op.reduce(found.experts)
    op.use_size("k", [found.experts], lambda keep, old: min(old or 1, keep.count(found.experts)))
    op.label(found.experts, "experts")
    op.set(x.axes or [])
    op.cost(float(math.prod(x.shape[:-1]) * op.get("k", 1)), rows, x[-1])
    op.cost(float(math.prod(x.shape[:-1]) * op.get("k", 1)), inner, x[-1])
    return found


@rule("MoE", domain=MICROSOFT)
def mixture(op: Op) -> None:
    """Mix experts of two matrices (experts, rows, in) and (experts, out, inner), with biases."""
    if op.has(6) or op.has(7):
        raise GiveUp(f"{op.name} has a third matrix, which onnxruntime computes on GPUs only")
    x, first, second = op.input(0), op.input(2), op.input(4)
    found = _mixture(op, first.shape[0], op.atoms.fresh(second.shape[2]))
    op.unite(first[0], found.experts)
    op.unite(second[0], found.experts)
    op.unite(first[1], found.rows)
    op.unite(second[1], x[-1])
    op.contract(x, -1, first, 2)
    op.unite(second[2], found.inner)
    op.multiply_and_sum((second, 2))
    for slot, size in ((3, found.rows), (5, x[-1])):
        if op.has(slot):
            op.unite(op.input(slot)[0], found.experts)
            op.unite(op.input(slot)[1], size)


_PACKED = "packs its weights in blocks along this axis"
"""Reason for freezing an axis of quantised experts."""


@rule("QMoE", domain=MICROSOFT)
def quantized_mixture(op: Op) -> None:
    """Mix experts of packed matrices, whose rows shrink one by one and whose columns by bytes, or by blocks."""
    if any(op.has(slot) for slot in (8, 9, 10)):
        raise GiveUp(f"{op.name} has a third matrix")
    if op.get("quant_type", "int") != "int" or any(op.has(slot) for slot in range(14, len(op.inputs))):
        raise GiveUp(f"{op.name} has a form that its rule does not handle")
    x, first, second = op.input(0), op.input(2), op.input(5)
    bits = [
        op.get(name, 0) or op.get("expert_weight_bits", 4)
        for name in ("fc1_expert_weight_bits", "fc2_expert_weight_bits")
    ]
    if not set(bits) <= {2, 4, 8}:
        raise GiveUp(f"{op.name} has numbers of {max(bits)} bits")
    each = [8 // count for count in bits]
    block = max(op.get("block_size", 0), 1)
    inner = second.shape[2] * each[1]
    units = op.atoms.fresh(x.shape[-1] // max(block, *each)), op.atoms.fresh(inner // max(block, *each))
    size = max(block, *each)
    if inner % size or x.shape[-1] % size:
        raise GiveUp(f"{op.name} has blocks that are not full")
    hidden, middle = (op.atoms.repeated(unit, size) for unit in units)
    op.unite(x[-1], hidden)
    found = _mixture(op, first.shape[0], middle)
    for slot, rows, columns, count in ((2, found.rows, units[0], each[0]), (5, hidden, units[1], each[1])):
        _matrix(op, slot, found.experts, (rows, columns), size // count)
    if op.get("weights_prepacked", -1):
        op.freeze_all((hidden, middle), "may hold its weights in the layout of one processor")
    op.recorder.is_rounding |= op.get("accuracy_level", 0) == 4 or (block > 1 and 8 in bits)


def _matrix(op: Op, slot: int, experts: Axis, axes: tuple[Axis, Axis], width: int) -> None:
    """Follow a packed matrix, its scales and bias: rows, and columns in units of `width` bytes."""
    rows, columns = axes
    packed = op.input(slot)
    for number in (slot, slot + 1, slot + 2):
        if op.has(number):
            op.unite(op.input(number)[0], experts)
            op.unite(op.input(number)[1], rows)
    op.unite(packed[2], op.atoms.repeated(columns, width))
    for axis in op.axes(slot + 1)[2:]:
        op.unite(axis, columns)
    points = op.given(11 if slot == 2 else 12)
    if points is not None:
        op.unite(points[0], experts)
        op.freeze_all((points.axes or [])[1:], BLOCK_BYTES)
        op.freeze_all((rows, columns), _PACKED)
