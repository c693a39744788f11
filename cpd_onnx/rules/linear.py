"""Rules of operators that multiply by weights and sum: convolutions, matrix products, Einsum."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.ir.model import Array
from cpd_onnx.ops.shapes_contrib import batched_order
from cpd_onnx.rules.api import BLOCK_BYTES, FLOATS, KERNEL_EXTENT, GiveUp, Op, Quantized, Tensor, rule
from cpd_onnx.rules.elementwise import MICROSOFT, broadcast, freeze_rest, per_channel
from cpd_onnx.shapes.values import Shape, Value

_UNPADDED = ("", b"", "NOTSET", b"NOTSET", "VALID", b"VALID")
"""Values of the attribute `auto_pad` that add no padding of their own."""


@dataclass(frozen=True)
class _Slots:
    """Input slots of a variant of Conv, apart from X in slot 0; -1 where it has no such input.

    Attributes:
        w: Weight.
        bias: Bias, one number per output channel.
        per_output: Further inputs with one number per output channel, or a single one.
        scale: Scale of the weight.
        zero_point: Zero point of the weight; without one, the weight is not quantised.
        others: Further inputs that the rule of the variant handles.
        is_last: Whether the channels of X and of the output are on the last axis, instead of axis 1.
        is_moved: Whether data say where X is read, also by a kernel of a single position.

    """

    w: int = 1
    bias: int = 2
    per_output: tuple[int, ...] = ()
    scale: int = -1
    zero_point: int = -1
    others: tuple[int, ...] = ()
    is_last: bool = False
    is_moved: bool = False

    def channel(self, rank: int) -> int:
        """Return the axis of the channels of a tensor."""
        return rank - 1 if self.is_last else 1

    def spatial(self, rank: int) -> list[int]:
        """Return the axes of a tensor that the kernel slides over."""
        return [axis for axis in range(1, rank) if axis != self.channel(rank)]


@rule("Conv")
def conv(op: Op) -> None:
    """Contract X's channels with W's second axis, group by group; W's first axis is the output's channels."""
    convolution(op, _Slots())
    op.leaves(op.input(0)[1], 2, 1, is_local=_is_local(op))


@rule("FusedConv", domain=MICROSOFT)
def fused_conv(op: Op) -> None:
    """Conv with a fourth input that is added to the output (a residual)."""
    convolution(op, _Slots(others=(3,)))
    if op.has(3):
        op.outputs[0].axes = broadcast(op, [op.outputs[0].axes or [], op.input(3).axes or []])


@rule("ConvInteger")
def conv_integer(op: Op) -> None:
    """Conv on integers; the weight's zero point may be per output channel."""
    convolution(op, _Slots(bias=-1, per_output=(3,), zero_point=3))


@rule("QLinearConv")
def qlinear_conv(op: Op) -> None:
    """Conv on integers with a scale and a zero point for each tensor."""
    convolution(op, _Slots(w=3, bias=8, per_output=(4, 5), scale=4, zero_point=5))


@rule("QLinearConv", domain=MICROSOFT)
def qlinear_conv_channels_last(op: Op) -> None:
    """QLinearConv with the channels last or on axis 1; the weight is that of QLinearConv."""
    is_last = bool(op.get("channels_last", 0))
    convolution(op, _Slots(w=3, bias=8, per_output=(4, 5), scale=4, zero_point=5, is_last=is_last))


@rule("DeformConv")
def deform_conv(op: Op) -> None:
    """Conv with offsets and a mask per kernel position, independent of the channels."""
    if op.get("offset_group", 1) != 1:
        raise GiveUp(f"{op.name} has several offset groups")
    op.freeze_all([*op.axes(2), *op.axes(4)], "takes its offsets and mask as a whole")
    convolution(op, _Slots(bias=3, is_moved=True))


def convolution(op: Op, slots: _Slots) -> None:
    """Follow Conv and its variants, with W of shape (out, in/group, …)."""
    x, w, group = op.input(0), op.input(slots.w), op.get("group", 1)
    _freeze_spatial(op, slots)
    channel = slots.channel(x.rank)
    if group == 1:
        op.contract(x, channel, w, 1)
    elif _is_by_group(op):
        _by_group(op, w, x[channel])
        op.multiply_and_sum((w, 1), (x, channel))
    else:
        groups, inner = op.unmerge(x[channel], [group, w.shape[1]])
        outer = op.atoms.fresh(w.shape[0] // group)
        op.unite(w[1], inner)
        op.unite(w[0], op.atoms.product(groups, outer))
        _grouped(op, groups, (w, 1), channel)
        _note_grouped(op, w[0], channel, slots.w)
    shape = op.sizes()
    _finish(op, slots, w[0], tuple(shape[axis] for axis in slots.spatial(x.rank)))


@rule("ConvTranspose")
def conv_transpose(op: Op) -> None:
    """Conv with the first two axes of W exchanged: (in, out/group, …)."""
    _conv_transpose(op, _Slots())
    op.leaves(op.input(0)[1], 2, 1, is_local=False)


@rule("ConvTransposeWithDynamicPads", domain=MICROSOFT)
def conv_transpose_with_pads(op: Op) -> None:
    """ConvTranspose whose padding is an input."""
    if op.has(2):
        op.freeze(op.input(2)[0], "takes this as an operand")
    _conv_transpose(op, _Slots(bias=3, others=(2,)))


def _conv_transpose(op: Op, slots: _Slots) -> None:
    x, w, group = op.input(0), op.input(1), op.get("group", 1)
    _freeze_spatial(op, slots)
    if group == 1:
        op.contract(x, 1, w, 0)
        out = w[1]
    elif _is_by_group(op):
        out = op.atoms.fresh(group * w.shape[1])
        op.unite(w[0], x[1])
        _by_group(op, w, out)
        op.multiply_and_sum((w, 0), (x, 1))
    else:
        groups, _ = op.unmerge(x[1], [group, w.shape[0] // group])
        outer = op.atoms.fresh(w.shape[1])
        op.unite(w[0], x[1])
        op.unite(w[1], outer)
        out = op.atoms.product(groups, outer)
        _grouped(op, groups, (w, 0), 1)
        _note_grouped(op, out, 1, 1)
    _finish(op, slots, out, x.shape[2:])


def _is_local(op: Op) -> bool:
    """Return whether a convolution has kernels of a single position, and adds none around the image."""
    return set(op.input(1).shape[2:]) <= {1} and not any(op.get("pads", ())) and op.get("auto_pad", "") in _UNPADDED


def _grouped(op: Op, groups: Axis, weight: tuple[Tensor, int], channel: int) -> None:
    op.attribute_size("group", groups)
    op.label(groups, "groups")
    op.multiply_and_sum(weight, (op.input(0), channel))


def _note_grouped(op: Op, out: Axis, channel: int, slot: int) -> None:
    """Record a convolution whose groups could lose channels of their own, since its weight is used here alone."""
    if op.input(slot).shape[1] > 1 and op.stored_alone(slot):
        op.recorder.grouped[(op.scope.path, op.position)] = op.input(0)[channel], out, op.get("group", 1)


def _is_by_group(op: Op) -> bool:
    return (op.scope.path, op.position) in op.recorder.by_group


def _by_group(op: Op, w: Tensor, columns: Axis) -> None:
    """Let each group, a block of W's rows, lose channels of its own, but as many as the others.

    `columns` are the channels of all groups that W's second axis counts within one.
    """
    group = op.get("group", 1)
    op.balance(w[0], group)
    op.balance(columns, group)
    op.divide(w, np.split(columns, group))


def _freeze_spatial(op: Op, slots: _Slots) -> None:
    x, w = op.input(0), op.input(slots.w)
    if x.rank != w.rank:
        raise GiveUp(f"{op.name} has inputs of {x.rank} and {w.rank} axes")
    passing = _passing(op, slots)
    op.freeze_all((x[axis] for axis in slots.spatial(x.rank) if axis not in passing), "slides over this axis")
    for axis in (w.axes or [])[2:]:
        op.freeze(axis, KERNEL_EXTENT)


def _passing(op: Op, slots: _Slots) -> list[int]:
    """Return the axes of X along which the kernel has a single position at each index, so that none is mixed."""
    x, w, shape = op.input(0), op.input(slots.w), op.sizes()
    axes = slots.spatial(x.rank)
    strides = op.get("strides") or [1] * len(axes)
    if slots.is_moved or len(strides) != len(axes):
        return []
    alone = zip(axes, w.shape[2:], strides, strict=True)
    return [axis for axis, width, stride in alone if width == stride == 1 and shape[axis] == x.shape[axis]]


def _finish(op: Op, slots: _Slots, out: Axis, places: Shape) -> None:
    """Follow bias and scales, and set output axes and cost; `places` is the number of kernel positions per axis."""
    x, w = op.input(0), op.input(slots.w)
    vectors = (slots.bias, *slots.per_output)
    per_channel(op, out, filter(op.has, vectors))
    freeze_rest(op, 1, but=(slots.w, *vectors, *slots.others))
    if slots.zero_point >= 0:
        stands_for(op, w, slots.scale, slots.zero_point, 0)
    shape, axes = op.sizes(), [x[0]] * x.rank
    passing = _passing(op, slots)
    for axis in slots.spatial(x.rank):
        axes[axis] = x[axis] if axis in passing else op.along(x[axis], shape[axis], "slides over this axis")
    axes[slots.channel(x.rank)] = out
    op.set(axes)
    slid = [place for axis, place in zip(slots.spatial(x.rank), places, strict=True) if axis not in passing]
    factor = float(x.shape[0] * math.prod(w.shape[2:]) * math.prod(slid))
    op.cost(factor, w[0], w[1], *(x[axis] for axis in passing))


def stands_for(op: Op, w: Tensor, scale: int, zero_point: int, axis: int) -> None:
    """Record scale and zero point (input slots, -1 for none) of an integer weight."""
    scales, zeros = op.value(scale), op.value(zero_point)
    if w.value.weight is None:
        _moved_stands_for(op, w, scales, zeros)
        return
    means = Quantized(scales, zeros, axis % max(1, w.rank), op.get("block_size", 0))
    if not means.fits(w.shape):
        raise GiveUp(f"{op.name} has scales or zero points that do not fit weights of shape {list(w.shape)}")
    op.recorder.quantized[w.value] = means


def _moved_stands_for(op: Op, w: Tensor, scale: Value | None, zero_point: Value | None) -> None:
    """Record them for an integer weight that is transposed or reshaped before: one scale and zero point for all."""
    found = [op.scope.lookup(name) for name in w.value.constants or ()] if w.value.moved else []
    sources = [source for source in found if source is not None and source.dtype == w.value.dtype]
    if not sources or w.value.dtype in FLOATS:
        return
    scale, zero = (value if value is not None and value.shape in ((), (1,)) else None for value in (scale, zero_point))
    if zero is None and zero_point is not None and (zero_point.value is None or zero_point.value.any()):
        raise GiveUp(f"{op.name} has several zero points for a weight that is transposed or reshaped before")
    for source in sources:
        op.recorder.quantized.setdefault(source, Quantized(scale, zero, 0))


@rule("Gemm")
def gemm(op: Op) -> None:
    """A B + C with either factor transposed; C broadcasts."""
    fused_gemm(op)
    a, (is_transposed, _) = op.input(0), _transposed(op)
    op.leaves(a[0 if is_transposed else 1], 2, factor=op.get("beta", 1.0), is_local=not is_transposed)


@rule("FusedGemm", domain=MICROSOFT)
def fused_gemm(op: Op) -> None:
    """Gemm followed by an activation."""
    out = matrix_product(op, op.input(0), op.input(1), _transposed(op))
    if op.has(2):
        out = broadcast(op, [out, op.input(2).axes or []])
    op.set(out)


@rule("QGemm", domain=MICROSOFT)
def qgemm(op: Op) -> None:
    """Gemm on integers: A, its scale and zero point, B, its scales and zero points, C, output scale and zero point."""
    out = matrix_product(op, op.input(0), op.input(3), _transposed(op))
    _per_column(op, out[1], (4, 5, 6))
    stands_for(op, op.input(3), 4, 5, 0 if op.get("transB", 0) else 1)
    op.set(out)


def _transposed(op: Op) -> tuple[bool, bool]:
    return bool(op.get("transA", 0)), bool(op.get("transB", 0))


@rule("MatMul")
def matmul(op: Op) -> None:
    """Contract the last axis of A with the second to last of B; batch axes broadcast."""
    stacked_product(op, op.input(0), op.input(1))
    op.leaves(op.input(0)[-1], None, is_local=op.input(0).rank > 1)


@rule("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(op: Op) -> None:
    """MatMul with either factor transposed, and its first axis moved before the last on request."""
    a, b = op.input(0), op.input(1)
    moved = bool(op.get("transBatchA", 0)), bool(op.get("transBatchB", 0))
    if not any(moved):
        stacked_product(op, a, b, _transposed(op))
        return
    if a.is_constant or b.is_constant or min(a.rank, b.rank) < 3:
        raise GiveUp(f"{op.name} moves the first axis of a weight or of a matrix")
    (*stacked, row, summed), (*others, also_summed, column) = (
        batched_order(tensor.rank, is_moved=is_moved, is_swapped=is_swapped)
        for tensor, is_moved, is_swapped in zip((a, b), moved, _transposed(op), strict=True)
    )
    op.contract(a, summed, b, also_summed)
    out = broadcast(op, [[a[place] for place in stacked], [b[place] for place in others]])
    for axis in out:
        op.label(axis, "heads")
    op.label(a[summed], "head_dim")
    out += [a[row], b[column]]
    op.cost(1.0, *out, a[summed])
    op.set(out)


@rule("MatMulInteger")
def matmul_integer(op: Op) -> None:
    """MatMul on integers; B's zero point may be per column."""
    _integer_product(op, 1, rows=(2,), columns=(3,), scale=-1, zero_point=3)


@rule("QLinearMatMul")
def qlinear_matmul(op: Op) -> None:
    """MatMul on integers with a scale and a zero point for each tensor."""
    _integer_product(op, 3, rows=(1, 2, 6, 7), columns=(4, 5), scale=4, zero_point=5)


@rule("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(op: Op) -> None:
    """MatMul with A quantised by its range; B's scale, zero point and the bias are per column."""
    op.recorder.is_rounding = True
    for axis in op.input(0).axes or []:
        op.reduce(axis)
    _integer_product(op, 1, rows=(), columns=(2, 3, 4), scale=2, zero_point=3)


@rule("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(op: Op) -> None:
    """MatMul on integers with a float result; scales, zero point and bias of B are per column."""
    _integer_product(op, 1, rows=(2, 4), columns=(3, 5, 6), scale=3, zero_point=5)


def _integer_product(
    op: Op, slot: int, *, rows: Sequence[int], columns: Sequence[int], scale: int, zero_point: int
) -> None:
    """Follow MatMul of input 0 and the input at a slot, with numbers per row of A or column of B at other slots."""
    a, b = op.input(0), op.input(slot)
    stacked_product(op, a, b)
    _per_row(op, a, rows)
    _per_column(op, b[-1], columns)
    stands_for(op, b, scale, zero_point, -1)


@rule("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(op: Op) -> None:
    """MatMul with packed weights (N, K / block, bytes of a block): N shrinks index by index, K block by block.

    The last block may be shorter. Scales and zero points have one number per block, and rank one or two. Zero points
    may share a byte: stored ones are packed again, the blocks of others are removed together.
    """
    a, block, count = op.input(0), op.get("block_size"), -(-op.get("K") // op.get("block_size"))
    shared = _blocks_of_a_byte(op, count)
    is_repacked = shared > 1 and op.input(3).value.weight is not None
    shared = 1 if is_repacked else shared
    rows, bytes_ = op.atoms.fresh(op.get("N")), op.atoms.fresh(-(-count // (shared or count)))
    blocks = op.atoms.repeated(bytes_, shared or count)[:count]
    op.recorder.is_rounding |= op.get("accuracy_level", 0) == 4
    if not shared or len(a[-1]) != op.get("K") or op.has(4):
        op.freeze_all((blocks, a[-1]), _IN_BLOCKS)
    elif len(bytes_) == 1:
        op.freeze_all((blocks, a[-1]), IN_ONE_BLOCK if count == 1 else _IN_ONE_BYTE)
    else:
        op.unite(a[-1], op.atoms.repeated(blocks, block)[: op.get("K")])
        op.mask_input(a, -1)
        op.attribute_size("K", a[-1])
    _packed(op, op.input(1), rows, blocks)
    _packed(op, op.input(2), rows, blocks)
    if is_repacked:
        first, *rest = op.input(3).axes or []
        op.unite(first, op.atoms.repeated(rows, len(first) // len(rows)))
        op.freeze_all(rest, BLOCK_BYTES)
        op.use_size(3, (rows, blocks), partial(_repacked, rows=rows, blocks=blocks, bits=op.get("bits", 4)))
    elif op.has(3):
        _packed(op, op.input(3), rows, bytes_)
    freeze_rest(op, 4, but=(5,))
    if op.has(5):
        op.unite(op.input(5)[0], rows)
    op.attribute_size("N", rows)
    op.set([*(a.axes or [])[:-1], rows])
    op.cost(float(math.prod(a.shape[:-1])), rows, a[-1])


@rule("MatMulBnb4", domain=MICROSOFT)
def matmul_bnb4(op: Op) -> None:
    """MatMul with 4-bit weights, stored as one list in the order (N, K), and one scale for each block of K."""
    a, packed, scales = op.input(0), op.input(1), op.input(2)
    rows, columns, block = op.get("N"), op.get("K"), op.get("block_size")
    if not op.get("transB", 1) or columns % block or packed.rank != 1 or len(packed[0]) * 2 != rows * columns:
        raise GiveUp(f"{op.name} has blocks that do not end with a row of its weights")
    blocks, out = op.atoms.fresh(columns // block), op.atoms.fresh(rows)
    numbers = op.atoms.product(out, blocks)
    op.unite(a[-1], op.atoms.repeated(blocks, block))
    op.mask_input(a, -1)
    op.unite(packed[0], op.atoms.repeated(numbers, block // 2))
    op.unite(scales[0], numbers)
    op.attribute_size("K", a[-1])
    op.attribute_size("N", out)
    op.set([*(a.axes or [])[:-1], out])
    op.cost(float(math.prod(a.shape[:-1])), out, a[-1])


_IN_BLOCKS = "packs its weights in blocks along this axis"
"""Reason for freezing K where blocks cannot be removed."""
IN_ONE_BLOCK = "quantises this axis in one block"
"""Reason for freezing an axis that is a single block."""
_IN_ONE_BYTE = "quantises this axis in blocks whose zero points share one byte"
"""Reason for freezing K where its blocks go together."""


def _blocks_of_a_byte(op: Op, blocks: int) -> int:
    """Return the number of blocks along K that share a byte of the zero points; 0 if that is not known.

    The last byte of a row may hold fewer.
    """
    stored = math.prod(op.input(3).shape) // op.get("N") if op.has(3) else blocks
    shared = 1 if stored == blocks else 8 // op.get("bits", 4)
    return shared if -(-blocks // shared) == stored else 0


def _repacked(keep: KeepMask, old: Array, *, rows: Axis, blocks: Axis, bits: int) -> Array:
    """Return the zero points of the rows and blocks that survive, as many in a byte as before; the first is lowest."""
    places = (bits * np.arange(8 // bits)).astype(old.dtype)
    numbers = old.reshape(len(rows), -1, 1) >> places & old.dtype.type(2**bits - 1)
    numbers = numbers.reshape(len(rows), -1)[:, : len(blocks)][keep.mask(rows)][:, keep.mask(blocks)]
    padded = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % len(places))))
    packed: Array = np.bitwise_or.reduce(padded.reshape(len(numbers), -1, len(places)) << places, axis=2)
    return packed.reshape(-1) if old.ndim == 1 else packed


def _packed(op: Op, tensor: Tensor, rows: Axis, blocks: Axis) -> None:
    """Unite the axes of packed weights, or of their scales or zero points, with rows and blocks."""
    if tensor.shape[0] % len(rows):
        raise GiveUp(f"{op.name} has a tensor of shape {list(tensor.shape)} for {len(rows)} rows")
    each = tensor.shape[0] // len(rows)
    if each == len(blocks):
        op.unite(tensor[0], op.atoms.product(rows, blocks))
    elif each == 1 or op.atoms.all_frozen(blocks):
        op.unite(tensor[0], op.atoms.repeated(rows, each))
    else:
        raise GiveUp(f"{op.name} has {each} numbers for {len(blocks)} blocks")
    for place, axis in enumerate((tensor.axes or [])[1:], start=1):
        if place == 1 and each == 1 and len(axis) == len(blocks):
            op.unite(axis, blocks)
        else:
            op.freeze(axis, BLOCK_BYTES)


def stacked_product(op: Op, a: Tensor, b: Tensor, transposed: tuple[bool, bool] = (False, False)) -> None:
    """Follow MatMul of two tensors; the batch axes of a product of two activations, as in attention, are heads."""
    out = matrix_product(op, a, b, transposed)
    if not a.is_constant and not b.is_constant:
        for axis in out[: max(a.rank, b.rank) - 2]:
            op.label(axis, "heads")
        op.label(a[_summed(a, is_last=not transposed[0])], "head_dim")
    op.set(out)


def matrix_product(op: Op, a: Tensor, b: Tensor, transposed: tuple[bool, bool] = (False, False)) -> list[Axis]:
    """Contract the columns of A with the rows of B, by numpy's rules for vectors, and return the axes of the result."""
    if a.rank == 0 or b.rank == 0:
        raise GiveUp(f"{op.name} multiplies a scalar")
    i, j = _summed(a, is_last=not transposed[0]), _summed(b, is_last=transposed[1])
    op.contract(a, i, b, j)
    out = broadcast(op, [(a.axes or [])[:-2], (b.axes or [])[:-2]])
    out += [tensor[-3 - place] for tensor, place in ((a, i), (b, j)) if tensor.rank > 1]
    op.cost(1.0, *out, a[i])
    return out


def _summed(tensor: Tensor, *, is_last: bool) -> int:
    """Return the axis of a matrix or vector that is summed over, counted from the end."""
    return -1 if is_last or tensor.rank == 1 else -2


def _per_column(op: Op, column: Axis, slots: Sequence[int]) -> None:
    """Unite the columns of a matrix with inputs of one number per column: a vector, or (…, 1, columns)."""
    for slot in slots:
        for back, axis in enumerate(reversed(op.axes(slot))):
            _one_each(op, axis, column if back == 0 else None)


def _per_row(op: Op, a: Tensor, slots: Sequence[int]) -> None:
    """Unite the rows of a matrix with inputs of one number per row: a vector, or (…, rows, 1)."""
    for slot in slots:
        for place, axis in enumerate(axes := op.axes(slot)):
            is_row = a.rank > 1 and place == max(0, len(axes) - 2)
            _one_each(op, axis, a[-2] if is_row else None)


def _one_each(op: Op, axis: Axis, counted: Axis | None) -> None:
    """Unite an axis with another if it has one number per index of it, instead of a single one."""
    op.accounted.append(axis)
    if len(axis) > 1:
        if counted is None:
            raise GiveUp(f"{op.name} has numbers for each matrix of a batch")
        op.unite(axis, counted)


@rule("Einsum")
def einsum(op: Op) -> None:
    """Unite axes with the same letter; letters missing in the result are summed over."""
    equation = str(op.get("equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = re.sub(r"[^A-Za-z]", "", left)
        right = ("..." if "..." in left else "") + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    if "..." in left and "..." not in right:
        raise GiveUp(f"{op.name} sums over the axes of an ellipsis")
    tensors = [op.input(i) for i in range(len(terms))]
    found: dict[str, list[tuple[Tensor, int]]] = {}
    ellipses = []
    for term, tensor in zip(terms, tensors, strict=True):
        named, rest = _letters(term, tensor)
        ellipses.append(rest)
        for letter, place in named:
            found.setdefault(letter, []).append((tensor, place))
    joined = {letter: _join(op, pairs) for letter, pairs in found.items()}
    batch = broadcast(op, ellipses)
    for letter, pairs in found.items():
        if letter not in right:
            _sum_over(op, pairs)
    out: list[Axis] = []
    for piece in re.findall(r"\.\.\.|[A-Za-z]", right):
        out += batch if piece == "..." else [joined[piece]]
    op.set(out)
    op.cost(1.0, *batch, *joined.values())


def _letters(term: str, tensor: Tensor) -> tuple[list[tuple[str, int]], list[Axis]]:
    """Return (letter, number of its axis) pairs of one operand, and the axes of its ellipsis."""
    axes = tensor.axes or []
    before, dots, after = term.partition("...")
    if not dots and len(before) != len(axes):
        raise GiveUp(f"equation term {term!r} does not fit an operand of {len(axes)} axes")
    end = len(axes) - len(after)
    named = [*zip(before, range(len(axes)), strict=False), *zip(after, range(end, len(axes)), strict=False)]
    return named, axes[len(before) : end] if dots else []


def _join(op: Op, pairs: list[tuple[Tensor, int]]) -> Axis:
    axes = [tensor[place] for tensor, place in pairs]
    wide = [axis for axis in axes if len(axis) > 1] or axes[:1]
    for other in wide[1:]:
        op.unite(wide[0], other)
    return wide[0]


def _sum_over(op: Op, pairs: list[tuple[Tensor, int]]) -> None:
    """Record the sum over a letter; an operand of size one along it multiplies all indices alike."""
    wide = [(tensor, place) for tensor, place in pairs if len(tensor[place]) > 1]
    if wide:
        op.multiply_and_sum(*wide)
    op.accounted.extend(tensor[place] for tensor, place in pairs)
