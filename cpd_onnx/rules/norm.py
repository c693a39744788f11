"""Rules of normalisations: parameters follow the axis they scale; statistics over channels depend on their number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpd_onnx.rules.api import TABLE_ROWS, Op, Tensor, rule
from cpd_onnx.rules.elementwise import MICROSOFT, broadcast, freeze_rest, per_channel
from cpd_onnx.rules.linear import stands_for


@rule("BatchNormalization")
def batch_norm(op: Op) -> None:
    """Scale axis 1 by four vectors; before opset 9, optionally by four tensors of the shape of a sample."""
    x = op.input(0)
    if op.opset < 9 and op.get("spatial", 1) == 0:
        for slot in range(1, 5):
            for own, axis in zip(op.input(slot).axes or [], (x.axes or [])[1:], strict=True):
                op.unite(own, axis)
    else:
        per_channel(op, x[1 if x.rank > 1 else 0], range(1, 5))
        op.recorder.scales.add(op.input(1).value)
    if _is_training(op):
        for axis in [x[0], *(x.axes or [])[2:]]:
            op.reduce(axis)
    op.set(x.axes or [])
    for output in range(1, len(op.outputs)):
        op.set(op.input(1).axes or [], output)


def _is_training(op: Op) -> bool:
    """Return whether a BatchNormalization takes its statistics from the batch."""
    if op.opset >= 14:
        return bool(op.get("training_mode", 0))
    return op.get("is_test", 0) == 0 if op.opset < 7 else any(t.value.name for t in op.outputs[1:])


@rule("InstanceNormalization")
def instance_norm(op: Op) -> None:
    """Scale axis 1 by two vectors; statistics are over later axes, which may hold channels (a lowered GroupNorm)."""
    x = op.input(0)
    per_channel(op, x[1], (1, 2))
    for axis in (x.axes or [])[2:]:
        op.reduce(axis)
    op.set(x.axes or [])


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_norm(op: Op) -> None:
    """Normalise over the axes from `axis` on; scale and bias broadcast from the right."""
    x = op.input(0)
    first = op.get("axis", -1) % max(1, x.rank)
    _normalise_last(op, x, first, range(1, len(op.inputs)))
    op.set(x.axes or [])
    statistics = [*(x.axes or [])[:first], *([np.zeros(1, np.int64)] * (x.rank - first))]
    for output in range(1, len(op.outputs)):
        op.set(statistics, output)


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(op: Op) -> None:
    """LayerNormalization of the sum of two tensors; the sum is the fourth output."""
    x = op.input(0)
    axes = broadcast(op, [x.axes or [], op.input(1).axes or []])
    _normalise_last(op, x, x.rank - 1, range(2, len(op.inputs)))
    op.set(axes)
    op.set(axes, 3)


@rule("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_norm(op: Op) -> None:
    """LayerNormalization of the sum of word, position and segment embeddings."""
    ids, word = op.input(0), op.input(2)
    for slot in (2, 3, 4):
        if op.has(slot):
            op.freeze(op.input(slot)[0], TABLE_ROWS)
            op.unite(op.input(slot)[1], word[1])
    for slot in (5, 6):
        op.unite(op.input(slot)[0], word[1])
    op.reduce(word[1])
    freeze_rest(op, 0, but=(2, 3, 4, 5, 6))
    out = [*(ids.axes or []), word[1]]
    op.set(out)
    op.set(out, 2)


@rule("QEmbedLayerNormalization", domain=MICROSOFT)
def quantized_embed_layer_norm(op: Op) -> None:
    """EmbedLayerNormalization of integer tables, scale and shift, each with a scale and a zero point."""
    embed_layer_norm(op)
    for slot in range(2, 7):
        if op.has(slot):
            stands_for(op, op.input(slot), slot + 6, slot + 11, 0)


@rule("GatedRMSNorm", domain=MICROSOFT)
def gated_rms_norm(op: Op) -> None:
    """RMSNormalization of each block of the last axis, times a gate; the blocks share their scale."""
    x, scale, gate = op.input(0), op.input(1), op.input(2)
    blocks = op.atoms.fresh(x.shape[-1] // scale.shape[0])
    op.unite(x[-1], op.atoms.product(blocks, scale[0]))
    op.label(blocks, "heads")
    op.reduce(scale[0])
    op.set(broadcast(op, [x.axes or [], gate.axes or []]))


@rule("GroupNormalization")
def group_norm(op: Op) -> None:
    """Split the channels into groups; scale and bias are per group (opset 18) or per channel."""
    _group_norm(op, 1, "num_groups")


@rule("GroupNorm", domain=MICROSOFT)
def group_norm_channels_last(op: Op) -> None:
    """GroupNormalization with the channels last or on axis 1."""
    _group_norm(op, -1 if op.get("channels_last", 1) else 1, "groups")


def _group_norm(op: Op, channel: int, attribute: str) -> None:
    x, count = op.input(0), op.get(attribute)
    groups, _ = op.unmerge(x[channel], [count, x.shape[channel] // count])
    per_group = attribute == "num_groups" and op.opset < 21
    for slot in (1, 2):
        op.unite(op.input(slot)[0], groups if per_group else x[channel])
    for position in range(1, x.rank):
        op.reduce((x.axes or [])[position])
    op.attribute_size(attribute, groups)
    op.label(groups, "groups")
    op.set(x.axes or [])


@rule("LpNormalization")
def lp_norm(op: Op) -> None:
    """Divide by the norm along one axis."""
    x = op.input(0)
    op.reduce(x[op.get("axis", -1)])
    op.set(x.axes or [])


@rule("MeanVarianceNormalization")
def mean_variance(op: Op) -> None:
    """Normalise over the axes that the node names."""
    x = op.input(0)
    for axis in op.get("axes", [0, 2, 3]):
        op.reduce(x[axis])
    op.set(x.axes or [])


@rule("LRN")
def lrn(op: Op) -> None:
    """Divide each channel by the sum of its neighbours' squares, which then are those that survive."""
    x = op.input(0)
    op.reduce(x[1])
    op.set(x.axes or [])


def _normalise_last(op: Op, x: Tensor, first: int, slots: Sequence[int]) -> None:
    for axis in (x.axes or [])[first:]:
        op.reduce(axis)
    for slot in slots:
        if op.has(slot):
            broadcast(op, [x.axes or [], op.input(slot).axes or []])
