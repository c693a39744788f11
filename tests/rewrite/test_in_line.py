"""The model that a repair fits where whole branches are gone: a channel of each survives in it."""

from __future__ import annotations

import numpy as np
import pytest

import cpd_onnx as cpd
from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.channels.combing import comb
from cpd_onnx.passes.prune import prune
from cpd_onnx.rewrite.rewriter import in_line, out_of_line
from cpd_onnx.runtime.sessions import execute, open_model, random_feed
from cpd_onnx.scores.registry import score
from cpd_onnx.testing import without_branches
from tests.support.graphs import seeded


def is_restored(seed: int) -> bool:
    """Whether a random graph loses whole branches; fails if the model with a channel of each does not run and restore it."""
    model = cpd.load(seeded(seed))
    try:
        combed = comb(model)
        chosen = allocate(combed, score(combed, "random", seed=seed), Budget("channels", 0.5))
    except cpd.CpdError:
        return False
    deep, gone = without_branches(combed, chosen, 0.5, seed)
    if not gone:
        return False
    kept, small = deep.keep_mask(combed), prune(combed, deep).model
    line = in_line(combed, kept, small)
    assert [node.op_type for node in line.graph.node] == [node.op_type for node in model.graph.node]
    execute(open_model(line, optimise=False), random_feed(combed.folded, seed))
    back = out_of_line(combed, kept, line)
    assert {t.name for t in back.graph.initializer} == {t.name for t in small.graph.initializer}
    for tensor in small.graph.initializer:
        np.testing.assert_array_equal(small.array(tensor.name), back.array(tensor.name))
    return True


@pytest.mark.parametrize("start", range(50_000, 50_400, 100))
def test_random_graphs_without_branches_run_with_a_channel_of_each_and_are_restored(start: int) -> None:
    assert sum(map(is_restored, range(start, start + 100))) > 10
