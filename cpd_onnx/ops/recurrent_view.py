"""Recurrent operators as matrix products: what the gates take of the inputs, and of the states of the step before.

Both are products as in `matrix_view`, with the weights of all gates of a direction as one matrix:

    rows [directions, steps x batch, features]  x  matrix [directions, features, gates x hidden]

No tensor of a graph holds these products, since the gates add them up and limit them at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from cpd_onnx.ir.model import Array, attributes_of
from cpd_onnx.ops.matrix_view import Key, Window, key_of

_OPERATORS: frozenset[Key] = frozenset({("", "LSTM"), ("", "GRU"), ("", "RNN")})
INPUT, INPUT_WEIGHT, STATE_WEIGHT, BIAS, FIRST_STATE = 0, 1, 2, 3, 5
"""Input slots of these operators."""


@dataclass(frozen=True)
class Gates:
    """The products by one of the two weights [directions, gates x hidden, features] of a recurrent operator.

    Attributes:
        reverse: Whether each direction runs from the last step to the first.
        batch_first: Whether the batch is the first axis of inputs and states, and not the second.
        is_state: Whether the features are the states of the step before, and not the inputs.
    """

    reverse: tuple[bool, ...]
    batch_first: bool
    is_state: bool
    windows: tuple[Window, ...] = ()
    keeps_pads: bool = True
    in_axis: int = -1
    out_axis: int = -1
    weight_axis: int = 1
    taps: int = 1
    is_stacked: bool = True
    stack: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        """Number of directions."""
        return len(self.reverse)

    def resized(self, channels: tuple[int, int, int], kernel: tuple[int, ...]) -> Gates:
        """Return the products themselves, which depend on no number of channels."""
        return self

    def count(self, out: Sequence[int]) -> int:
        """Return the number of steps of all samples, from the shape of all states."""
        return math.prod(out) // max(1, out[-1] * self.groups)

    def rows(self, data: Array, places: Array) -> Array:
        """Return the features at some steps: of the inputs, or of what `before` returns."""
        if self.is_state:
            return np.asarray(data[:, places])
        flat = data.reshape(-1, data.shape[-1])[places]
        return np.broadcast_to(flat, (self.groups, *flat.shape))

    def before(self, states: Array, first: Array | None) -> Array:
        """Return the states before each step [directions, steps x batch, hidden].

        Args:
            states: States after each step, as the operator returns them.
            first: States before the first step; None for zeros.
        """
        found = []
        for direction, is_reverse in enumerate(self.reverse):
            own = np.moveaxis(states, 2 if self.batch_first else 1, 0)[direction]
            start = np.zeros_like(own[:, :1] if self.batch_first else own[:1])
            if first is not None:
                given = first[:, direction, None] if self.batch_first else first[direction, None]
                start = np.asarray(given, own.dtype)
            steps = 1 if self.batch_first else 0
            count = own.shape[steps]
            kept = np.take(own, range(1, count) if is_reverse else range(count - 1), axis=steps)
            found.append(np.concatenate([kept, start] if is_reverse else [start, kept], axis=steps))
        return np.stack(found).reshape(self.groups, -1, states.shape[-1])

    def targets(self, out: Array, places: Array) -> Array:
        """Return the states after some steps [directions, rows, hidden]."""
        states = np.moveaxis(out, 2 if self.batch_first else 1, 0)
        return states.reshape(self.groups, -1, out.shape[-1])[:, places]

    def matrix(self, weight: Array) -> Array:
        """Return a weight as a matrix [directions, features, gates x hidden]."""
        return np.asarray(weight.transpose(0, 2, 1))

    def weight(self, matrix: Array) -> Array:
        """Return a matrix as a weight."""
        return np.asarray(matrix.transpose(0, 2, 1))


def gates_of(node: NodeProto) -> tuple[Gates, ...]:
    """Return the products by the weights of the inputs and of the states; none for other operators.

    Those by the states of a GRU that resets states before the product are left out, since it takes them as they are.
    """
    if key_of(node) not in _OPERATORS:
        return ()
    given = attributes_of(node)
    direction = given.get("direction", "forward")
    reverse = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}.get(direction)
    if reverse is None:
        return ()
    found = [Gates(reverse, bool(given.get("layout", 0)), is_state) for is_state in (False, True)]
    return tuple(found if node.op_type != "GRU" or given.get("linear_before_reset", 0) else found[:1])
