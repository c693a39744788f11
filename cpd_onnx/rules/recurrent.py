"""Rules of operators that carry a state along a sequence. In LSTM, GRU and RNN all gates share the hidden units."""

from __future__ import annotations

import math

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.rules.api import KERNEL_EXTENT, GiveUp, Op, Tensor, rule
from cpd_onnx.rules.elementwise import MICROSOFT
from cpd_onnx.rules.linear import stands_for

DIRECTIONS = Reason("no channels", "", "directions of a recurrent layer")
"""Reason for freezing the axes of weights and outputs that hold what runs forwards and what runs backwards."""
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Number of gates of each operator (ONNX specification): blocks on the first axis of its weights."""


@rule("LSTM", "GRU", "RNN")
def recurrent(op: Op) -> None:
    """Unite the hidden units of W, R, B, P, the initial states and the outputs; gates and directions are frozen."""
    gates = _GATES[op.scope.nodes[op.position].op_type]
    x, w, r = op.input(0), op.input(1), op.input(2)
    hidden = op.atoms.fresh(r.shape[2])
    op.contract(x, 2, w, 2)
    op.unite(r[2], hidden)
    op.multiply_and_sum((r, 2))
    _gated(op, w, gates, hidden)
    _gated(op, r, gates, hidden)
    if op.has(3):
        _gated(op, op.input(3), 2 * gates, hidden)
    if op.has(4):
        op.freeze(op.input(4)[0], "takes sequence lengths per sample")
    batch_first = op.get("layout", 0)
    sequence, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    directions = op.frozen(w.shape[0], DIRECTIONS)
    op.freeze(sequence, "runs along this axis in order")
    for slot in (5, 6):
        if op.has(slot):
            _state(op, op.input(slot), batch, hidden, batch_first=bool(batch_first))
    if op.has(4):
        op.freeze(batch, "takes sequence lengths per sample")
    if op.has(7):
        _gated(op, op.input(7), 3, hidden)
    op.attribute_size("hidden_size", hidden)
    op.label(hidden, "hidden")
    op.set([batch, sequence, directions, hidden] if batch_first else [sequence, directions, batch, hidden])
    state = [batch, directions, hidden] if batch_first else [directions, batch, hidden]
    op.set(state, 1)
    op.set(state, 2)
    steps = float(len(sequence) * len(batch) * w.shape[0])
    op.cost(steps, w[1], w[2])
    op.cost(steps, r[1], r[2])


def _gated(op: Op, tensor: Tensor, blocks: int, hidden: Axis) -> None:
    op.freeze(tensor[0], DIRECTIONS)
    op.unite(tensor[1], op.atoms.stretched(hidden, len(hidden) * blocks))


def _state(op: Op, tensor: Tensor, batch: Axis, hidden: Axis, *, batch_first: bool) -> None:
    op.freeze(tensor[1 if batch_first else 0], DIRECTIONS)
    op.unite(tensor[0 if batch_first else 1], batch)
    op.unite(tensor[2], hidden)


@rule("DynamicQuantizeLSTM", domain=MICROSOFT)
def quantized_lstm(op: Op) -> None:
    """LSTM with integer W (directions, in, 4 x hidden) and R, and scales and zero points after the peepholes."""
    x, w, r = op.input(0), op.input(1), op.input(2)
    hidden = op.atoms.fresh(r.shape[1])
    gates = op.atoms.stretched(hidden, len(hidden) * 4)
    op.contract(x, 2, w, 1)
    # X is quantised over all its elements.
    op.recorder.is_rounding = True
    op.reduce(x[2])
    op.unite(r[1], hidden)
    op.multiply_and_sum((r, 1))
    for tensor in (w, r):
        op.freeze(tensor[0], DIRECTIONS)
        op.unite(tensor[2], gates)
    for slot, blocks in ((3, 8), (7, 3)):
        if op.has(slot):
            _gated(op, op.input(slot), blocks, hidden)
    if op.has(4):
        op.freeze(op.input(4)[0], "takes sequence lengths per sample")
    for slot in (5, 6):
        if op.has(slot):
            _state(op, op.input(slot), x[1], hidden, batch_first=False)
    _scales(op, gates)
    for tensor, scale in ((w, 8), (r, 10)):
        stands_for(op, tensor, scale, scale + 1, 2)
    op.freeze(x[0], "runs along this axis in order")
    if op.has(4):
        op.freeze(x[1], "takes sequence lengths per sample")
    op.attribute_size("hidden_size", hidden)
    op.label(hidden, "hidden")
    directions = op.frozen(w.shape[0], DIRECTIONS)
    op.set([x[0], directions, x[1], hidden])
    op.set([directions, x[1], hidden], 1)
    op.set([directions, x[1], hidden], 2)
    steps = float(x.shape[0] * x.shape[1] * w.shape[0])
    op.cost(steps, w[1], w[2])
    op.cost(steps, r[1], r[2])


def _scales(op: Op, gates: Axis) -> None:
    """Unite or freeze the scales and zero points of both matrices: per direction, or per direction and column."""
    for slot in range(8, 12):
        for axis in op.axes(slot):
            if len(axis) == len(gates):
                op.unite(axis, gates)
            else:
                op.freeze(axis, DIRECTIONS)


@rule("CausalConvWithState", domain=MICROSOFT)
def causal_conv(op: Op) -> None:
    """Depthwise Conv over a sequence, with a state of the last elements; channels are on axis 1, or last."""
    x, w = op.input(0), op.input(1)
    extended = ("state_window", "state_update_capacity", "state_length", "input_channels", "input_channel_offset")
    if any(op.get(name, 0) for name in extended) or op.get("state_channels_last", -1) != -1 or x.rank != w.rank:
        raise GiveUp(f"{op.name} has a form that its rule does not handle")
    channel = x.rank - 1 if op.get("channels_last", 0) else 1
    op.unite(x[channel], w[0])
    if op.has(2):
        op.unite(op.input(2)[0], w[0])
    for axis in (w.axes or [])[1:]:
        op.freeze(axis, KERNEL_EXTENT)
    why = "slides over this axis"
    op.freeze_all((x[axis] for axis in range(1, x.rank) if axis != channel), why)
    if op.has(3):
        state = op.input(3)
        op.unite(state[0], x[0])
        op.unite(state[channel], w[0])
        op.freeze_all((state[axis] for axis in range(1, x.rank) if axis != channel), why)
    op.set(x.axes or [])
    shape = op.outputs[1].value.shape if len(op.outputs) > 1 else None
    if shape is not None:
        kept = {0: x[0], channel: w[0]}
        op.set([kept[axis] if axis in kept else op.frozen(shape[axis], why) for axis in range(x.rank)], 1)
    op.cost(float(math.prod(x.shape) / max(1, x.shape[channel]) * math.prod(w.shape[2:])), w[0])


@rule("LinearAttention", domain=MICROSOFT)
def linear_attention(op: Op) -> None:
    """Attention by a state (key dimension, value dimension) for each head, which every step of a sequence updates."""
    q, k, v = op.input(0), op.input(1), op.input(2)
    queries, groups = op.get("q_num_heads"), op.get("kv_num_heads")
    if op.get("state_window", 0) or queries % groups:
        raise GiveUp(f"{op.name} has a form that its rule does not handle")
    shared = op.atoms.fresh(groups)
    heads = op.atoms.product(shared, op.atoms.fresh(queries // groups))
    dim, value_dim = op.atoms.fresh(q.shape[2] // queries), op.atoms.fresh(v.shape[2] // groups)
    for tensor, own, size in ((q, heads, dim), (k, shared, dim), (v, shared, value_dim)):
        op.unite(tensor[2], op.atoms.product(own, size))
        op.unite(tensor[0], q[0])
        op.freeze(tensor[1], "runs along this axis in order")
    _gates(op, q[0], shared, dim)
    state = [q[0], shared, dim, value_dim]
    if op.has(3):
        for axis, wanted in zip(op.axes(3), state, strict=True):
            op.unite(axis, wanted)
    for tensor in (q, k):
        op.mask_input(tensor, -1)
    op.product((q, -1), (k, -1))
    if not op.get("scale", 0.0):
        op.pin_attribute("scale", float(len(dim) ** -0.5), dim)
    op.attribute_size("q_num_heads", heads)
    op.attribute_size("kv_num_heads", shared)
    for axis, kind in ((shared, "heads"), (dim, "head_dim"), (value_dim, "head_dim")):
        op.label(axis, kind)
    op.set([q[0], q[1], op.atoms.product(heads, value_dim)])
    op.set(state, 1)
    op.cost(2.0 * len(q[0]) * q.shape[1], heads, dim, value_dim)


def _gates(op: Op, batch: Axis, heads: Axis, dim: Axis) -> None:
    """Follow the decay, per head or per head and key dimension, and the update rate, per head or one for all."""
    for slot in (4, 5):
        if not op.has(slot):
            continue
        gate = op.input(slot)
        op.unite(gate[0], batch)
        op.freeze(gate[1], "runs along this axis in order")
        if len(gate[2]) == len(heads):
            op.unite(gate[2], heads)
        elif len(gate[2]) != 1:
            op.unite(gate[2], op.atoms.product(heads, dim))
        op.accounted.append(gate[2])
