"""Rules of LSTM, GRU and RNN: the blocks of all gates share the hidden units."""

from __future__ import annotations

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.rules.api import Op, Tensor, rule
from cpd_onnx.rules.elementwise import MICROSOFT
from cpd_onnx.rules.linear import stands_for

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
    directions = op.frozen(w.shape[0], "has this many directions")
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
    op.freeze(tensor[0], "has this many directions")
    op.unite(tensor[1], op.atoms.stretched(hidden, len(hidden) * blocks))


def _state(op: Op, tensor: Tensor, batch: Axis, hidden: Axis, *, batch_first: bool) -> None:
    op.freeze(tensor[1 if batch_first else 0], "has this many directions")
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
        op.freeze(tensor[0], "has this many directions")
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
    directions = op.frozen(w.shape[0], "has this many directions")
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
                op.freeze(axis, "has this many directions")
