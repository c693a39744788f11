"""LSTM, GRU and RNN: gate blocks are stacked on one axis, the hidden size runs through all of them."""

from __future__ import annotations

import numpy as np

from cpd_onnx.atoms import Axis
from cpd_onnx.rules.api import Op, Tensor, rule

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule("LSTM", "GRU", "RNN")
def recurrent(op: Op) -> None:
    """Unite the hidden units of W, R, B, P, the initial states and the outputs; gates and directions stay."""
    gates = _GATES[op.scope.nodes[op.position].op_type]
    x, w, r = op.input(0), op.input(1), op.input(2)
    hidden = op.atoms.fresh(r.shape[2])
    op.contract(x, 2, w, 2)
    op.unite(r[2], hidden)
    op.multiply_and_sum([(r, r[2])])
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
    if op.has(7):
        _gated(op, op.input(7), 3, hidden)
    op.attribute_size("hidden_size", hidden)
    op.label(hidden, "hidden")
    op.set([batch, sequence, directions, hidden] if batch_first else [sequence, directions, batch, hidden])
    state = [batch, directions, hidden] if batch_first else [directions, batch, hidden]
    op.set(state, 1)
    op.set(state, 2)
    rounds = float(len(sequence) * len(batch) * w.shape[0])
    op.cost(rounds, w[1], w[2])
    op.cost(rounds, r[1], r[2])


def _gated(op: Op, tensor: Tensor, blocks: int, hidden: Axis) -> None:
    op.freeze(tensor[0], "has this many directions")
    op.unite(tensor[1], np.tile(hidden, blocks))


def _state(op: Op, tensor: Tensor, batch: Axis, hidden: Axis, *, batch_first: bool) -> None:
    op.freeze(tensor[1 if batch_first else 0], "has this many directions")
    op.unite(tensor[0 if batch_first else 1], batch)
    op.unite(tensor[2], hidden)
