"""Planted defects of rules: each must be caught by the accounting, the shape check or an oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.rules import RULES, Op
from cpd_onnx.rules.elementwise import broadcast
from cpd_onnx.testing import Outcome, mask_oracle, permutation_oracle
from tests.rules.test_rules import model_of


def pass_first(op: Op) -> None:
    op.set(op.input(0).axes or [])


def touch_all(op: Op) -> None:
    """Silence the accounting, so that the oracles have to see it."""
    op.accounted += [axis for tensor in op.inputs if tensor for axis in tensor.axes or []]


def silent_pass_first(op: Op) -> None:
    touch_all(op)
    pass_first(op)


def conv_forgets_bias(op: Op) -> None:
    w = op.input(1)
    op.contract(op.input(0), 1, w, 1)
    touch_all(op)
    op.set([op.input(0)[0], w[0], *(op.frozen(size) for size in op.sizes()[2:])])


def conv_forgets_input(op: Op) -> None:
    w = op.input(1)
    touch_all(op)
    op.set([op.input(0)[0], w[0], *(op.frozen(size) for size in op.sizes()[2:])])


def depthwise_keeps_group(op: Op) -> None:
    RULES_BEFORE[("", "Conv")](op)
    op.recorder.size_uses[:] = [d for d in op.recorder.size_uses if d.slot != "group"]


def gemm_ignores_transposition(op: Op) -> None:
    a, b = op.input(0), op.input(1)
    touch_all(op)
    op.set([a[0], op.atoms.fresh(op.sizes()[1]) if op.get("transB", 0) else b[1]])


def concat_swapped(op: Op) -> None:
    parts = [op.input(i) for i in range(len(op.inputs))][::-1]
    touch_all(op)
    out = list(parts[0].axes or [])
    out[1] = np.concatenate([p[1] for p in parts])
    op.set(out)


def split_shifted(op: Op) -> None:
    x = op.input(0)
    touch_all(op)
    axis = np.roll(x[-1], 1)
    sizes = np.cumsum([o.value.shape[-1] for o in op.outputs if o.value.shape])[:-1]
    for number, piece in enumerate(np.split(axis, sizes)):
        op.set([*(x.axes or [])[:-1], piece], number)
    op.use_shape(1, np.split(axis, sizes))


def slice_shifted(op: Op) -> None:
    RULES_BEFORE[("", "Slice")](op)
    out = list(op.outputs[0].axes or [])
    out[-1] = np.roll(op.input(0)[-1], 1)[-len(out[-1]) :]
    op.outputs[0].axes = out


def reshape_always_fresh(op: Op) -> None:
    RULES_BEFORE[("", "Reshape")](op)
    op.outputs[0].axes = [op.atoms.fresh(size) for size in op.sizes()]


def reshape_forgets_operand(op: Op) -> None:
    RULES_BEFORE[("", "Reshape")](op)
    op.recorder.size_uses[:] = [d for d in op.recorder.size_uses if d.slot != 1]


def layer_norm_forgets_scale(op: Op) -> None:
    op.reduce(op.input(0)[-1])
    touch_all(op)
    op.set(op.input(0).axes or [])


def layer_norm_has_no_statistics(op: Op) -> None:
    x = op.input(0)
    broadcast(op, [x.axes or [], op.input(1).axes or [], op.input(2).axes or []])
    op.set(x.axes or [])


def lstm_interleaves_gates(op: Op) -> None:
    x, w, r = op.input(0), op.input(1), op.input(2)
    hidden = op.atoms.fresh(r.shape[2])
    op.contract(x, 2, w, 2)
    op.multiply_and_sum((r, 2))
    for axis, gates in ((w[1], 4), (r[1], 4), (op.input(3)[1], 8)):
        op.unite(axis, np.repeat(hidden, gates))
    op.unite(r[2], hidden)
    op.attribute_size("hidden_size", hidden)
    touch_all(op)
    op.set([x[0], op.frozen(1), x[1], hidden])


def attention_forgets_values(op: Op) -> None:
    q, k = op.input(0), op.input(1)
    op.unite(q[1], k[1])
    op.unite(q[3], k[3])
    op.reduce(q[3])
    touch_all(op)
    op.set([q[0], q[1], q[2], op.input(2)[3]])


def attention_rescales(op: Op) -> None:
    RULES_BEFORE[("", "Attention")](op)
    op.recorder.size_uses[:] = [d for d in op.recorder.size_uses if d.slot != "scale"]


def depth_to_space_strided(op: Op) -> None:
    x = op.input(0)
    channels = op.atoms.fresh(x.shape[1] // 4)
    op.unite(x[1], np.tile(channels, 4))
    touch_all(op)
    op.set([x[0], channels, *(op.frozen(size) for size in op.sizes()[2:])])


def gather_keeps_positions(op: Op) -> None:
    RULES_BEFORE[("", "Gather")](op)
    op.recorder.size_uses[:] = [d for d in op.recorder.size_uses if d.scope.nodes[d.node].op_type != "Gather"]


def columns_strided(op: Op) -> None:
    x = op.input(0)
    channels = op.atoms.fresh(op.sizes()[1])
    op.unite(x[1], np.tile(channels, len(x[1]) // len(channels)))
    touch_all(op)
    op.set([x[0], channels, *(op.frozen(size) for size in op.sizes()[2:])])


def spectrum_of_everything(op: Op) -> None:
    touch_all(op)
    op.set([op.frozen(size) for size in op.sizes()])


def loss_forgets_labels(op: Op) -> None:
    x = op.input(0)
    op.freeze(x[1], "chooses")
    touch_all(op)
    op.set([x[0], *(x.axes or [])[2:]])


def loss_sums(op: Op) -> None:
    RULES_BEFORE[("", "SoftmaxCrossEntropyLoss")](op)
    op.recorder.count_dependent.clear()


def positions_of_nothing(op: Op) -> None:
    touch_all(op)
    op.set([op.frozen(size) for size in op.sizes()])


def takes_the_first(op: Op) -> None:
    op.accounted += [axis for tensor in op.elements(0) for axis in tensor.all_axes]
    op.set(op.elements(0)[0].axes or [])


def sequence_shifted(op: Op) -> None:
    RULES_BEFORE[("", "SplitToSequence")](op)
    ends = np.cumsum([tensor.shape[-1] for tensor in op.outputs[0].elements or []])[:-1]
    for tensor, piece in zip(op.outputs[0].elements or [], np.split(np.roll(op.input(0)[-1], 1), ends), strict=True):
        tensor.axes = [*(tensor.axes or [])[:-1], piece]


def sequence_forgets_sizes(op: Op) -> None:
    RULES_BEFORE[("", "SplitToSequence")](op)
    op.recorder.size_uses[:] = [d for d in op.recorder.size_uses if d.slot != 1]


def sequence_joined_backwards(op: Op) -> None:
    parts = op.elements(0)
    out = list(parts[0].axes or [])
    out[-1] = np.concatenate([part[-1] for part in parts[::-1]])
    op.set(out)


def stack_unites_nothing(op: Op) -> None:
    touch_all(op)
    op.accounted += [axis for tensor in op.elements(0) for axis in tensor.all_axes]
    axes = list(op.elements(0)[0].axes or [])
    op.set([axes[0], op.frozen(len(op.elements(0))), *axes[1:]])


def list_forgets_one(op: Op) -> None:
    op.set_elements([op.input(0), op.input(0)])


MUTATIONS: list[tuple[str, Callable[[Op], None], str]] = [
    ("Add", pass_first, "residual"),
    ("Add", silent_pass_first, "residual"),
    ("Conv", conv_forgets_bias, "conv"),
    ("Conv", conv_forgets_input, "conv"),
    ("Conv", depthwise_keeps_group, "conv depthwise"),
    ("Gemm", gemm_ignores_transposition, "gemm"),
    ("Concat", concat_swapped, "concat"),
    ("Split", split_shifted, "split"),
    ("Slice", slice_shifted, "slice"),
    ("Reshape", reshape_always_fresh, "heads"),
    ("Reshape", reshape_forgets_operand, "heads"),
    ("LayerNormalization", layer_norm_forgets_scale, "layer norm"),
    ("LayerNormalization", layer_norm_has_no_statistics, "layer norm"),
    ("LSTM", lstm_interleaves_gates, "lstm"),
    ("Attention", attention_forgets_values, "attention 4d"),
    ("Attention", attention_rescales, "attention 4d"),
    ("DepthToSpace", depth_to_space_strided, "depth to space"),
    ("Gather", gather_keeps_positions, "gather channels"),
    ("Col2Im", columns_strided, "columns to image"),
    ("STFT", spectrum_of_everything, "spectrum of each channel"),
    ("NegativeLogLikelihoodLoss", loss_forgets_labels, "loss of each place"),
    ("SoftmaxCrossEntropyLoss", loss_sums, "mean loss and probabilities"),
    ("NonZero", positions_of_nothing, "positions"),
    ("Unique", positions_of_nothing, "distinct values"),
    ("SequenceAt", takes_the_first, "split to a sequence of equal parts"),
    ("SplitToSequence", sequence_shifted, "split to a sequence"),
    ("SplitToSequence", sequence_forgets_sizes, "split to a sequence"),
    ("ConcatFromSequence", sequence_joined_backwards, "split to a sequence"),
    ("ConcatFromSequence", stack_unites_nothing, "stacked"),
    ("SequenceConstruct", list_forgets_one, "stacked"),
]
RULES_BEFORE = dict(RULES)


def wide_mask_oracle(model: ModelProto, *, seed: int) -> Outcome:
    return mask_oracle(model, fraction=0.8, seed=seed)


def is_caught(model: ModelProto) -> bool:
    try:
        if comb(model).unaccounted:
            return True
        return not all(
            oracle(model, seed=seed).passed for oracle in (wide_mask_oracle, permutation_oracle) for seed in (0, 1, 2)
        )
    except (cpd.ProofError, cpd.UnsupportedError):
        return True


@pytest.mark.parametrize(("operator", "mutation", "model"), MUTATIONS, ids=[m[1].__name__ for m in MUTATIONS])
def test_planted_defect_is_caught(
    operator: str, mutation: Callable[[Op], None], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_caught(model_of(model))
    monkeypatch.setitem(RULES, ("", operator), mutation)
    assert is_caught(model_of(model))
