"""Random valid ONNX graphs: operators with rules in random topologies, as exporters would write them.

`build` makes a model from choices. They come from hypothesis, which can make a failing graph smaller (`models`), or
from a seed (`seeded`), which is fast.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from cpd_onnx.ir.model import Model, load
from tests.support.builder import (
    ALL_OPSETS,
    BATCH,
    BLOCKS,
    MICROSOFT,
    NEWER,
    OPSETS,
    RARE,
    Block,
    Builder,
    Choices,
    Drawn,
    Seeded,
    Shape,
)

from . import blocks, newer_blocks, rare_blocks  # noqa: F401  # they enter themselves


def build(choices: Choices, *, is_common: bool = False, among: dict[int, list[Block]] = RARE) -> ModelProto:
    """Return a model with one input and one or two outputs, of common operators and, unless it is common, of others."""
    b = Builder(choices, OPSETS if is_common else ALL_OPSETS)
    rank = choices.pick((2, 3, 4, 4))
    shape: Shape = {2: (BATCH, 6), 3: (BATCH, 5, 6), 4: (BATCH, 3, 8, 8)}[rank]
    b.shapes["x"] = shape
    last = b.conv("x", b.width(), kernel=3) if rank == 4 else b.matmul("x", b.width())
    del b.shapes["x"]
    for _ in range(choices.integer(2, 14)):
        source = last if choices.integer(0, 2) else choices.pick([n for n, s in b.shapes.items() if len(s) in BLOCKS])
        drawn = BLOCKS if is_common or choices.integer(0, 1) else among
        found = choices.pick(drawn[len(b.shapes[source])])(b, source)
        if found is not None and len(b.shapes[found]) in BLOCKS and math.prod(b.shapes[found]) <= 20_000:
            last = found
    ends = [last]
    if choices.integer(0, 2) == 0:
        ends.append(choices.pick([n for n, s in b.shapes.items() if len(s) in BLOCKS]))
    outputs = []
    for end in ends:
        out = b.conv(end, 3) if len(b.shapes[end]) == 4 else b.matmul(end, 3)
        if choices.integer(0, 7) == 0:
            out = end  # shown as it is, so that its channels stay
        if out not in [o.name for o in outputs]:
            outputs.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, [None] * len(b.shapes[out])))
    first = "n" if b.is_open else BATCH
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [first, *shape[1:]])]
    graph = helper.make_graph(b.nodes, "random", inputs, outputs, b.tensors)
    opsets = [helper.make_opsetid("", b.opset)] + ([] if is_common else [helper.make_opsetid(MICROSOFT, 1)])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8 if b.opset < 23 else 10)


def newer(seed: int) -> ModelProto:
    """Return the model of a seed with operators that the models of `seeded` do not have."""
    return build(Seeded(seed), among=NEWER)


_FREED = 0.6
"""Part of the inputs and outputs that may lose channels."""


def seeded(seed: int, *, is_common: bool = False) -> ModelProto:
    """Return the model of a seed."""
    return build(Seeded(seed), is_common=is_common)


def freed(model: ModelProto, seed: int) -> Model:
    """Return a model of whose inputs and outputs more than half, at random, may lose channels."""
    rng, loaded = random.Random(seed), load(model)
    names = sorted({info.name for info in (*model.graph.input, *model.graph.output) if not loaded.has(info.name)})
    return loaded.with_free_io(name for name in names if rng.random() < _FREED)


@st.composite
def models(draw: Callable[..., Any]) -> ModelProto:
    """Strategy of models for hypothesis."""
    return build(Drawn(draw))
