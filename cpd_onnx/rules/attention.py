"""Fused attention: heads and head dimensions are separate channels.

Queries have `groups x repeats` heads for `groups` key and value heads. Queries and keys share a head dimension, values
and the output share another. The scale that an operator derives from the head dimension is part of the function: once
the dimension shrinks, the original scale is stored as an attribute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.rules.api import ANGLES, GiveUp, Op, Tensor, rule
from cpd_onnx.rules.elementwise import MICROSOFT, freeze_rest, per_channel
from cpd_onnx.rules.linear import stands_for

_GROUPED_INPUTS = 12
"""Number of inputs of GroupQueryAttention that its rule handles: up to the head sinks (onnxruntime's operator docs)."""
_PAIRS = 8
"""Number of pairs of dimensions that onnxruntime's rotation in GroupQueryAttention requires multiples of (measured)."""


@dataclass(frozen=True)
class _Heads:
    """The channels of one attention operator.

    Attributes:
        groups: Key and value heads.
        queries: Query heads.
        dim: Head dimension of queries and keys.
        value_dim: Head dimension of values and the output.

    """

    groups: Axis
    queries: Axis
    dim: Axis
    value_dim: Axis


def _heads(op: Op, counts: tuple[int, int], dim: int, value_dim: int | None = None, block: int = 1) -> _Heads:
    """Return fresh channels for (query heads, key/value heads); one head dimension for all if `value_dim` is None.

    The head dimension shrinks by blocks of `block` where the operator requires multiples of it.
    """
    queries, groups = counts
    if not queries or not groups or queries % groups:
        raise GiveUp(f"{op.name} has {queries} query heads for {groups} key heads")
    shared = op.atoms.fresh(groups)
    if dim % block:
        raise GiveUp(f"{op.name} has heads of {dim}, not a multiple of {block}")
    size = op.atoms.repeated(op.atoms.fresh(dim // block), block)
    heads = op.atoms.product(shared, op.atoms.fresh(queries // groups))
    found = _Heads(shared, heads, size, size if value_dim is None else op.atoms.fresh(value_dim))
    op.label(found.groups, "heads")
    op.label(found.dim, "head_dim")
    op.label(found.value_dim, "head_dim")
    return found


def _scale(op: Op, heads: _Heads) -> None:
    """Store the default scale as an attribute once the head dimension shrinks."""
    if not op.get("scale", 0.0):
        op.pin_attribute("scale", float(1 / np.sqrt(len(heads.dim))), heads.dim)


def _scores(op: Op, heads: _Heads, queries: Tensor, *keys: Tensor) -> None:
    """Record the product of queries and keys (which may be packed with them) over the head dimension, and its scale."""
    _scale(op, heads)
    op.freeze(queries[0], "masks and caches share this axis")
    op.mask_input(queries, -1)
    op.product((queries, -1), *((tensor, -1) for tensor in keys))


def _sequence(op: Op, tensor: Tensor, axis: int) -> Axis:
    op.freeze(tensor[axis], "attends along this axis")
    return tensor[axis]


def _mask(op: Op, slot: int, heads: _Heads) -> None:
    """Unite or freeze the axes of a bias on the scores: (batch, heads, query, key), broadcast from the right."""
    for back, axis in enumerate(reversed(op.axes(slot)), start=1):
        if back == 3 and len(axis) == len(heads.queries):
            op.unite(axis, heads.queries)
        if back != 3 or len(axis) not in (1, len(heads.queries)):
            op.freeze(axis, "attends along this axis")
        op.accounted.append(axis)


def _cost(op: Op, heads: _Heads, batch: int, query: int, key: int) -> None:
    op.cost(float(batch * query * key), heads.queries, heads.dim)
    op.cost(float(batch * query * key), heads.queries, heads.value_dim)


@rule("Attention")
def attention(op: Op) -> None:
    """Scaled dot product attention on (batch, heads, sequence, dim) or (batch, sequence, heads x dim)."""
    q, k, v = op.input(0), op.input(1), op.input(2)
    if q.rank == 4:
        heads = _heads(op, (q.shape[1], k.shape[1]), q.shape[3], v.shape[3])
        for tensor, head, dim in (
            (q, heads.queries, heads.dim),
            (k, heads.groups, heads.dim),
            (v, heads.groups, heads.value_dim),
        ):
            op.unite(tensor[1], head)
            op.unite(tensor[3], dim)
        out = [q[0], heads.queries, _sequence(op, q, 2), heads.value_dim]
        key, query = k[2], q[2]
    else:
        counts = (op.get("q_num_heads", 0), op.get("kv_num_heads", 0))
        if not all(counts):
            raise GiveUp(f"{op.name} has no attribute with its number of heads")
        heads = _heads(op, counts, q.shape[2] // counts[0], v.shape[2] // counts[1])
        _merged(op, q, heads.queries, heads.dim)
        _merged(op, k, heads.groups, heads.dim)
        _merged(op, v, heads.groups, heads.value_dim)
        op.attribute_size("q_num_heads", heads.queries)
        op.attribute_size("kv_num_heads", heads.groups)
        out = [q[0], _sequence(op, q, 1), op.atoms.product(heads.queries, heads.value_dim)]
        key, query = k[1], q[1]
    for other in (k, v):
        op.unite(other[0], q[0])
        op.freeze(other[2 if q.rank == 4 else 1], "attends along this axis")
    _scores(op, heads, q, k)
    _mask(op, 3, heads)
    _caches(op, heads, (4, 5), (1, 2), q[0])
    if op.has(6):
        op.freeze(op.input(6)[0], "takes sequence lengths per sample")
    op.set(out)
    scores = op.outputs[3].value.shape if len(op.outputs) > 3 else None
    if scores is not None:
        op.set([q[0], heads.queries, query, op.frozen(scores[3], "attends along this axis")], 3)
    _cost(op, heads, len(q[0]), len(query), len(key))


def _no_scores(op: Op) -> None:
    """Raise GiveUp for an attention operator of onnxruntime that returns its scores."""
    if any(tensor.value.name for tensor in op.outputs[3:]):
        raise GiveUp(f"{op.name} returns its scores")


def _merged(op: Op, tensor: Tensor, heads: Axis, dim: Axis) -> None:
    op.unite(tensor[-1], op.atoms.product(heads, dim))


def _caches(op: Op, heads: _Heads, slots: tuple[int, int], outputs: tuple[int, int], batch: Axis) -> None:
    """Follow past and present keys and values: (batch, heads, sequence, dim)."""
    for slot, output, dim in zip(slots, outputs, (heads.dim, heads.value_dim), strict=True):
        if op.has(slot):
            past = op.input(slot)
            for axis, wanted in ((past[0], batch), (past[1], heads.groups), (past[3], dim)):
                op.unite(axis, wanted)
            op.freeze(past[2], "attends along this axis")
        shape = op.outputs[output].value.shape if output < len(op.outputs) else None
        if shape is not None:
            op.set([batch, heads.groups, op.frozen(shape[2], "attends along this axis"), dim], output)
        elif output < len(op.outputs) and op.outputs[output].value.name:
            op.freeze_all((heads.groups, dim), "writes a cache of unknown shape")


@rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(op: Op) -> None:
    """As Attention on (batch, sequence, heads x dim); keys and values may be (batch, heads, sequence, dim)."""
    q, count = op.input(0), op.get("num_heads")
    if q.rank != 3 or not op.has(1) or not op.has(2):
        raise GiveUp(f"{op.name} takes packed queries, keys and values")
    _no_scores(op)
    k, v = op.input(1), op.input(2)
    heads = _heads(op, (count, count), q.shape[2] // count, v.shape[3] if v.rank == 4 else v.shape[2] // count)
    _merged(op, q, heads.groups, heads.dim)
    for tensor, dim in ((k, heads.dim), (v, heads.value_dim)):
        op.unite(tensor[0], q[0])
        _sequence(op, tensor, 2 if tensor.rank == 4 else 1)
        if tensor.rank == 4:
            op.unite(tensor[1], heads.groups)
            op.unite(tensor[3], dim)
        else:
            _merged(op, tensor, heads.groups, dim)
    if op.has(3):
        sizes = [op.atoms.product(heads.groups, dim) for dim in (heads.dim, heads.dim, heads.value_dim)]
        op.unite(op.input(3)[0], op.atoms.joined(sizes))
        op.mask_input(op.input(3), 0)
    freeze_rest(op, 4, but=(5, 6, 7))
    _mask(op, 5, heads)
    _caches(op, heads, (6, 7), (1, 2), q[0])
    _scores(op, heads, q, k)
    op.attribute_size("num_heads", heads.groups)
    op.set([q[0], _sequence(op, q, 1), op.atoms.product(heads.groups, heads.value_dim)])
    _cost(op, heads, len(q[0]), q.shape[1], k.shape[2 if k.rank == 4 else 1])


@rule("Attention", domain=MICROSOFT)
def packed_attention(op: Op) -> None:
    """Attention of an input that is projected with one packed matrix (in, q + k + v)."""
    w, count = op.input(1), op.get("num_heads")
    sizes = op.get("qkv_hidden_sizes") or [w.shape[1] // 3] * 3
    heads = _heads(op, (count, count), sizes[0] // count, sizes[2] // count)
    parts = _projected(op, heads, past=4)
    freeze_rest(op, 3, but=(5,))
    _mask(op, 5, heads)

    def hidden_sizes(keep: Any, old: Any) -> Any:
        counts = [keep.count(part) for part in parts]
        return None if old is None and len(set(counts)) == 1 else counts

    op.use_size("qkv_hidden_sizes", parts, hidden_sizes)


@rule("QAttention", domain=MICROSOFT)
def quantized_attention(op: Op) -> None:
    """Attention of a quantised input and matrix, whose scale and zero point may be per column."""
    w, count = op.input(1), op.get("num_heads")
    _projected(op, _heads(op, (count, count), w.shape[1] // 3 // count), past=8)
    per_channel(op, w[1], filter(op.has, (4, 7)))
    freeze_rest(op, 3, but=(4, 7))
    stands_for(op, w, 4, 7, 1)


def _projected(op: Op, heads: _Heads, *, past: int) -> list[Axis]:
    """Follow attention of an input that is projected with a packed matrix and bias; return the axes of its parts."""
    x, w = op.input(0), op.input(1)
    if op.get("do_rotary", 0):
        raise GiveUp(f"{op.name} rotates its queries")
    if op.has(past) or (len(op.outputs) > 1 and op.outputs[1].value.name):
        raise GiveUp(f"{op.name} has a packed cache")
    parts = [op.atoms.product(heads.groups, dim) for dim in (heads.dim, heads.dim, heads.value_dim)]
    op.contract(x, 2, w, 0)
    op.unite(w[1], op.atoms.joined(parts))
    if op.has(2):
        op.unite(op.input(2)[0], w[1])
    _scale(op, heads)
    op.freeze(x[0], "masks and caches share this axis")
    op.reduce(heads.dim)
    op.attribute_size("num_heads", heads.groups)
    op.set([x[0], _sequence(op, x, 1), parts[2]])
    op.cost(float(len(x[0]) * x.shape[1]), w[0], w[1])
    _cost(op, heads, len(x[0]), x.shape[1], x.shape[1])
    return parts


@rule("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(op: Op) -> None:
    """Attention with fewer key heads and one head dimension; input 0 may pack queries, keys and values."""
    q, counts = op.input(0), (op.get("num_heads"), op.get("kv_num_heads"))
    packed = not op.has(1)
    _no_scores(op)
    if len(op.inputs) > _GROUPED_INPUTS or packed == op.has(2):
        raise GiveUp(f"{op.name} has inputs that its rule does not handle")
    dim = q.shape[2] // (counts[0] + 2 * counts[1] if packed else counts[0])
    heads = _heads(op, counts, dim, block=8)
    if op.get("do_rotary", 0):
        _rotated(op, heads, dim)
    shared, query = op.atoms.product(heads.groups, heads.dim), op.atoms.product(heads.queries, heads.dim)
    op.unite(q[2], op.atoms.joined([query, shared, shared]) if packed else query)
    for slot in (1, 2):
        if op.has(slot):
            tensor = op.input(slot)
            op.unite(tensor[0], q[0])
            _sequence(op, tensor, 1)
            op.unite(tensor[2], shared)
    _caches(op, heads, (3, 4), (1, 2), q[0])
    for slot in (7, 8):
        op.freeze_all(op.axes(slot)[: -1 if op.get("do_rotary", 0) else None], ANGLES)
    freeze_rest(op, 5, but=(7, 8, 10, 11))
    _mask(op, 10, heads)
    if op.has(11):
        op.unite(op.input(11)[0], heads.queries)
    _scores(op, heads, q)
    op.attribute_size("num_heads", heads.queries)
    op.attribute_size("kv_num_heads", heads.groups)
    op.set([q[0], _sequence(op, q, 1), query])
    _cost(op, heads, len(q[0]), q.shape[1], q.shape[1])


def _rotated(op: Op, heads: _Heads, dim: int) -> None:
    """Couple the dimensions that queries and keys are rotated in with each other and with their angles.

    onnxruntime's kernel requires multiples of 8 pairs and of 16 dimensions.
    """
    width = op.input(7).shape[-1] if op.has(7) and op.has(8) else 0
    if not width or width % _PAIRS or dim % (2 * _PAIRS) or 2 * width > dim:
        op.freeze(heads.dim, "rotates this axis")
        op.freeze_all([axis for slot in (7, 8) for axis in op.axes(slot)], ANGLES)
        return
    pairs = op.atoms.repeated(op.atoms.fresh(width // _PAIRS), _PAIRS)
    turned = op.atoms.repeated(pairs, 2) if op.get("rotary_interleaved", 0) else op.atoms.joined([pairs, pairs])
    rest = op.atoms.repeated(op.atoms.fresh((dim - 2 * width) // (2 * _PAIRS)), 2 * _PAIRS)
    op.unite(heads.dim, op.atoms.joined([turned, rest]) if len(rest) else turned)
    for slot in (7, 8):
        op.unite(op.input(slot)[-1], pairs)


@rule("RotaryEmbedding")
def rotary(op: Op) -> None:
    """Rotate pairs of a head's dimensions; inputs are X, cosines, sines, positions."""
    _rotary(op, (1, 2), 3)


@rule("RotaryEmbedding", domain=MICROSOFT)
def rotary_contrib(op: Op) -> None:
    """RotaryEmbedding with the positions as second input."""
    _rotary(op, (2, 3), 1)


@rule("MRotaryEmbedding", domain=MICROSOFT)
def rotary_of_three_positions(op: Op) -> None:
    """RotaryEmbedding by three positions, each of which turns some pairs: these stay, the heads are separate."""
    x, count = op.input(0), op.get("num_heads", 0)
    freeze_rest(op, 1)
    if x.rank == 4:
        op.freeze(x[3], "rotates this axis")
    else:
        dim = x.shape[2] // count if count else 2 * op.input(2).shape[-1]
        heads = op.atoms.fresh(x.shape[2] // dim)
        op.unite(x[2], op.atoms.product(heads, op.frozen(dim, "rotates this axis")))
        op.label(heads, "heads")
        if count:
            op.attribute_size("num_heads", heads)
    op.freeze(x[0], "shares this axis with its angles")
    op.freeze(x[2 if x.rank == 4 else 1], "shares this axis with its angles")
    op.set(x.axes or [])


def _rotary(op: Op, tables: tuple[int, int], positions: int) -> None:
    x, width = op.input(0), op.input(tables[0]).shape[-1]
    count = op.get("num_heads", 0)
    dim = x.shape[3] if x.rank == 4 else x.shape[2] // count if count else 2 * width
    turned = op.get("rotary_embedding_dim", 0) or dim
    pairs = op.atoms.fresh(turned // 2)
    axis = op.atoms.repeated(pairs, 2) if op.get("interleaved", 0) else op.atoms.joined([pairs, pairs])
    axis = op.atoms.joined([axis, op.atoms.fresh(dim - turned)])
    if x.rank == 4:
        op.unite(x[3], axis)
    else:
        heads = op.atoms.fresh(x.shape[2] // dim)
        op.unite(x[2], op.atoms.product(heads, axis))
        if count:
            op.attribute_size("num_heads", heads)
    if op.get("rotary_embedding_dim", 0):
        op.attribute_size("rotary_embedding_dim", op.atoms.joined([pairs, pairs]))
    op.freeze(x[0], "shares this axis with its angles")
    op.freeze(x[2 if x.rank == 4 else 1], "shares this axis with its angles")
    for slot in tables:
        table = op.input(slot)
        op.freeze_all((table.axes or [])[:-1], ANGLES)
        if len(table[-1]) == len(pairs):
            op.unite(table[-1], pairs)
        else:
            op.freeze(table[-1], "uses a part of its angles")
            op.freeze(pairs, "uses a part of its angles")
    op.freeze_all(op.axes(positions), "holds positions")
    op.label(axis, "head_dim")
    op.set(x.axes or [])
