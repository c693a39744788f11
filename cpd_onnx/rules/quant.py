"""Rules of quantisation: scales and zero points follow the axis they scale."""

from __future__ import annotations

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.rules.api import BLOCK_BYTES, FLOATS, TABLE_ROWS, GiveUp, Op, rule
from cpd_onnx.rules.elementwise import MICROSOFT, broadcast, freeze_rest
from cpd_onnx.rules.linear import stands_for


@rule("QuantizeLinear", "DequantizeLinear")
@rule("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
def linear(op: Op) -> None:
    """Scale by a single number, by one per index of an axis, or by one per block of an axis."""
    x = op.input(0)
    axis = op.get("axis", 1)
    for slot in (1, 2):
        if not op.has(slot):
            continue
        vector = op.input(slot)
        if vector.rank > 1:
            _blocked(op, slot, axis % x.rank)
        elif vector.rank == 1 and vector.shape[0] > 1:
            op.unite(vector[0], x[axis])
        else:
            op.accounted.extend(vector.axes or [])
    if op.outputs[0].value.dtype in FLOATS:
        stands_for(op, x, 1, 2, axis)
    op.set(x.axes or [])


def _blocked(op: Op, slot: int, axis: int) -> None:
    """Scale the indices of a block along an axis by one number: they go together, the last block may be shorter.

    The indices of a single block pass, since any number of them is one block.
    """
    x, scale, block = op.input(0), op.input(slot), op.get("block_size", 0)
    for position in range(x.rank):
        if position != axis:
            op.unite(x[position], scale[position])
        elif len(scale[axis]) == 1 and len(x[axis]) <= block:
            op.accounted.append(scale[axis])
        elif -(-len(x[axis]) // max(1, block)) == len(scale[axis]):
            op.unite(x[axis], op.atoms.repeated(scale[axis], block)[: len(x[axis])])
        else:
            op.freeze(x[axis], "quantises this axis in blocks")
            op.freeze(scale[axis], "quantises this axis in blocks")


@rule("GatherBlockQuantized", domain=MICROSOFT)
def gather_block_quantized(op: Op) -> None:
    """Look up rows of a table whose last axis is quantised in blocks, packed in bytes: it shrinks block by block.

    A single block shrinks byte by byte.
    """
    x, indices, scales = op.input(0), op.input(1), op.input(2)
    rows, axis = op.get("gather_axis", 0) % x.rank, op.get("quantize_axis", 1) % x.rank
    if (rows, axis, x.rank) != (0, 1, 2):
        raise GiveUp(f"{op.name} looks up along axis {rows} what is quantised along axis {axis}")
    block, width = op.get("block_size", 128), op.sizes()[-1]
    blocks = op.atoms.fresh(scales.shape[1])
    for table in (x, scales):
        op.freeze(table[0], TABLE_ROWS)
    op.unite(scales[1], blocks)
    if len(blocks) == 1 and width <= block:
        op.freeze_all(op.axes(3), TABLE_ROWS)
        op.set([*(indices.axes or []), op.atoms.repeated(x[1], -(-width // len(x[1])))[:width]])
        return
    stored = block * op.get("bits", 4) // 8 if len(x[1]) < width else block
    points = op.axes(3)[1:]
    shared = 8 // op.get("bits", 4) if points and len(points[0]) < len(blocks) else 1
    counts = [-(-width // block), -(-len(x[1]) // max(1, stored)), *(len(p) * shared for p in points)]
    if counts[:2] != [len(blocks)] * 2 or any(not 0 <= count - len(blocks) < shared for count in counts[2:]):
        op.freeze(blocks, "quantises this axis in blocks")
        op.freeze(x[1], "quantises this axis in blocks")
        freeze_rest(op, 3)
    else:
        _blocks_of_a_table(op, x[1], blocks, stored)
        for axis in points:
            op.unite(blocks, op.atoms.repeated(axis, shared)[: len(blocks)])
        op.freeze_all(op.axes(3)[:1], TABLE_ROWS)
    op.set([*(indices.axes or []), op.atoms.repeated(blocks, block)[:width]])


def _blocks_of_a_table(op: Op, axis: Axis, blocks: Axis, stored: int) -> None:
    """Unite the bytes of a row with its blocks, the last of which may be shorter."""
    if len(axis) % stored:
        op.unite(axis, op.atoms.repeated(blocks, stored)[: len(axis)])
        return
    parts = op.unmerge(axis, [len(blocks), stored])
    op.freeze(parts[1], BLOCK_BYTES)
    op.unite(parts[0], blocks)


@rule("DynamicQuantizeLinear")
def dynamic(op: Op) -> None:
    """Quantise with one scale, from the minimum and maximum of all elements."""
    x = op.input(0)
    for axis in x.axes or []:
        op.reduce(axis)
    op.set(x.axes or [])
    op.set([], 1)
    op.set([], 2)


@rule("Quant", "BipolarQuant", domain="onnx.brevitas")
@rule("Quant", "BipolarQuant", domain="qonnx.custom_op.general")
def brevitas(op: Op) -> None:
    """Quantise and dequantise; scale and zero point broadcast against the tensor."""
    x = op.input(0)
    if any(tensor is not None and tensor.axes is None for tensor in op.inputs):
        raise GiveUp(f"a shape of {op.name} is not known")
    op.set(broadcast(op, [x.axes or [], *(op.input(i).axes or [] for i in range(1, len(op.inputs)))]))
