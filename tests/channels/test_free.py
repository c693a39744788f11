"""Dead, constant and duplicate channels: planted ones are found, near misses are not, and removal changes no output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.free import ALWAYS_ZERO, UNREAD, free_channels, removable
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.errors import CpdError
from cpd_onnx.pipeline.state import State
from cpd_onnx.runtime.sessions import execute, open_model, working_feeds
from cpd_onnx.scores.registry import score
from tests.support.graphs import seeded
from tests.support.models import from_text

CONV = "Conv <pads = [1, 1, 1, 1]>"
HEAD = "(float[2, 3, 6, 6] x, float[8, 3, 3, 3] w, float[8] b, float[5, 8, 3, 3] v"
OUT = "=> (float[2, 5, 6, 6] y)"
NORM = "float[8] g, float[8] s, float[8] m, float[8] n"
MLP = "(float[2, 4, 6] x, float[6, 12] w, float[12] b, float[12, 5] v) => (float[2, 4, 5] y)"
ATTENTION = (
    "(float[2, 5, 6] x, float[6, 8] q, float[6, 8] k, float[6, 8] u, float[8, 3] o, int64[4] split, int64[3] merge) "
    "=> (float[2, 5, 3] y) { "
    + " ".join(
        f"{t}1 = MatMul(x, {t}) {t}2 = Reshape({t}1, split) {t}3 = Transpose <perm = [{perm}]>({t}2)"
        for t, perm in (("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("u", "0, 2, 1, 3"))
    )
    + " a = MatMul(q3, k3) p = Softmax <axis = -1>(a) c = MatMul(p, u3) t = Transpose <perm = [0, 2, 1, 3]>(c) "
    "r = Reshape(t, merge) y = MatMul(r, o) }"
)
EINSUM = (  # as Keras writes the projections of attention
    "(float[2, 4, 6] x, float[6, 3, 5] w, float[3, 5, 7] v) => (float[2, 4, 7] y) "
    '{ h = Einsum <equation = "bsd,dhk->bshk">(x, w) r = Relu(h) y = Einsum <equation = "...hk,hko->...o">(r, v) }'
)
SIZES = {"split": [2, 5, 2, 4], "merge": [2, 5, 8]}
Plants = dict[str, tuple[Any, float | None]]
"""An index of a weight, and the number that is written there; None negates what is there."""
ROW: Plants = {"w": (2, 0.0)}
RELU = f"{HEAD}) {OUT} {{ h = {CONV}(x, w, b) r = Relu(h) y = {CONV}(r, v) }}"
MATRIX = f"{MLP} {{ h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = MatMul(r, v) }}"
BATCH_NORM = f"{HEAD}, {NORM}) {OUT} {{ c = {CONV}(x, w, b) h = BatchNormalization(c, g, s, m, n) r = Relu(h) y = {CONV}(r, v) }}"

# name, graph, what is planted, the weight and axis whose dead indices are asked for, and these indices
DEAD: list[tuple[str, str, Plants, tuple[str, int], list[int]]] = [
    ("zero row and bias", f"{HEAD}) {OUT} {{ h = {CONV}(x, w, b) y = {CONV}(h, v) }}", {**ROW, "b": (2, 0.0)}, ("w", 0), [2]),
    ("negative bias before Relu", RELU, {**ROW, "b": (2, -1.0)}, ("w", 0), [2]),
    ("negligible row", RELU, {"w": (2, 1e-40), "b": (2, -1.0)}, ("w", 0), [2]),
    ("unread", RELU, {"v": ((slice(None), 5), 0.0)}, ("w", 0), [5]),
    ("several", RELU, {**ROW, "b": (2, 0.0), "v": ((slice(None), [4, 5]), 0.0)}, ("w", 0), [2, 4, 5]),
    ("scale zero", BATCH_NORM, {"g": (1, 0.0), "s": (1, -0.5)}, ("w", 0), [1]),
    ("scale and shift zero", BATCH_NORM.replace("Relu", "Tanh"), {"g": (1, 0.0), "s": (1, 0.0)}, ("w", 0), [1]),
    ("zero row before BatchNormalization", BATCH_NORM, {**ROW, "b": (2, 0.0), "m": (2, 9.0), "s": (2, 0.0)}, ("w", 0), [2]),
    ("matrix", MATRIX, {"w": ((slice(None), 7), 0.0), "b": (7, -1.0)}, ("w", 1), [7]),
    (
        "Gemm",
        "(float[2, 6] x, float[12, 6] w, float[12] b, float[12, 5] v) => (float[2, 5] y) "
        "{ h = Gemm <transB = 1>(x, w, b) r = HardSwish(h) y = Gemm(r, v) }",
        {"w": (3, 0.0), "b": (3, -4.0)}, ("w", 0), [3],
    ),
    ("Einsum over two axes", EINSUM, {"v": (1, 0.0)}, ("w", 1), [1]),
    (
        "through another layer",
        f"{HEAD}, float[8, 8, 3, 3] u) {OUT} {{ h = {CONV}(x, w, b) r = Relu(h) k = {CONV}(r, u) z = Relu(k) y = {CONV}(z, v) }}",
        {"v": ((slice(None), [1, 6]), 0.0), "u": ((slice(2, 6), 3), 0.0), "u.": ((slice(7, 8), 3), 0.0), "u..": ((0, 3), 0.0)},
        ("w", 0), [3],
    ),
    (
        "residual",
        f"{HEAD}, float[8, 8, 3, 3] u, float[8] c) {OUT} {{ h = {CONV}(x, w, b) k = {CONV}(h, u, c) a = Add(h, k) r = Relu(a) y = {CONV}(r, v) }}",
        {**ROW, "b": (2, 0.0), "u": (2, 0.0), "c": (2, -1.0)}, ("w", 0), [2],
    ),
    (
        "concatenation",
        "(float[2, 3, 6, 6] x, float[4, 3, 3, 3] w, float[4] b, float[4, 3, 3, 3] u, float[5, 8, 3, 3] v) "
        f"{OUT} "
        f"{{ h = {CONV}(x, w, b) k = {CONV}(x, u) c = Concat <axis = 1>(h, k) r = Relu(c) "
        f"p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(r) y = {CONV}(p, v) }}",
        {"w": (1, 0.0), "b": (1, -1.0), "u": (3, 0.0)}, ("v", 1), [1, 7],
    ),
    (
        "depthwise",
        f"{HEAD}, float[8, 1, 3, 3] d, float[8] e) {OUT} "
        f"{{ h = {CONV}(x, w, b) r = Relu(h) k = Conv <pads = [1, 1, 1, 1], group = 8>(r, d, e) z = Relu(k) y = {CONV}(z, v) }}",
        {**ROW, "b": (2, -1.0), "e": (2, 0.0), "d": (6, 0.0), "e.": (6, -1.0)}, ("w", 0), [2, 6],
    ),
    (
        "gate",
        f"{HEAD}, float[8, 3, 1, 1] u) {OUT} "
        f"{{ h = {CONV}(x, w, b) q = GlobalAveragePool(x) k = Conv(q, u) s = Sigmoid(k) z = Mul(h, s) y = {CONV}(z, v) }}",
        {**ROW, "b": (2, 0.0)}, ("w", 0), [2],
    ),
    ("head not read", ATTENTION, {"o": (slice(4, 8), 0.0)}, ("q", 1), [4, 5, 6, 7]),
    ("value of a head is zero", ATTENTION, {"u": ((slice(None), slice(0, 4)), 0.0)}, ("o", 0), [0, 1, 2, 3]),
    ("dimension of all queries is zero", ATTENTION, {"q": ((slice(None), [1, 5]), 0.0)}, ("k", 1), [1, 5]),
    ("dimension of all keys is zero", ATTENTION, {"k": ((slice(None), [1, 5]), 0.0)}, ("q", 1), [1, 5]),
]  # fmt: skip  # a table

# the same without indices: nothing may be removed
ALIVE: list[tuple[str, str, Plants]] = [
    ("Einsum over two axes", EINSUM, {"v": ((1, slice(0, 4)), 0.0)}),
    ("positive bias before Relu", RELU, {**ROW, "b": (2, 0.5)}),
    ("small number", RELU, {"w": (2, 1e-12), "b": (2, -1.0)}),
    ("Sigmoid of zero", RELU.replace("Relu", "Sigmoid"), {**ROW, "b": (2, 0.0)}),
    ("negative bias, no Relu", RELU.replace("Relu", "LeakyRelu"), {**ROW, "b": (2, -1.0)}),
    ("Softmax over the channels", RELU.replace("Relu", "Softmax <axis = 1>"), {**ROW, "b": (2, 0.0)}),
    ("output channels", RELU, {"v": (2, 0.0)}),
    ("shift above zero", BATCH_NORM, {"g": (1, 0.0), "s": (1, 0.5)}),
    (
        "a second reader",
        f"{HEAD}, float[5, 8, 3, 3] u) {OUT} {{ h = {CONV}(x, w, b) r = Relu(h) k = {CONV}(r, v) l = {CONV}(r, u) y = Add(k, l) }}",
        {"v": ((slice(None), 5), 0.0)},
    ),
    (
        "LayerNormalization over the channels",
        "(float[2, 4, 6] x, float[6, 12] w, float[12] g, float[12, 5] v) => (float[2, 4, 5] y) "
        "{ h = MatMul(x, w) a = LayerNormalization(h, g) y = MatMul(a, v) }",
        {"w": ((slice(None), 7), 0.0), "v": (7, 0.0)},
    ),
    (
        "mean over the channels",
        f"{HEAD}) {OUT} {{ h = {CONV}(x, w, b) q = ReduceMean <axes = [1], keepdims = 1>(h) z = Add(h, q) y = {CONV}(z, v) }}",
        {**ROW, "b": (2, 0.0), "v": ((slice(None), 2), 0.0)},
    ),
    (
        "depthwise with a bias above zero",
        f"{HEAD}, float[8, 1, 3, 3] d, float[8] e) {OUT} "
        f"{{ h = {CONV}(x, w, b) r = Relu(h) k = Conv <pads = [1, 1, 1, 1], group = 8>(r, d, e) y = {CONV}(k, v) }}",
        {**ROW, "b": (2, 0.0), "e": (2, 0.5)},
    ),
    (
        "filled with a number by Pad",
        f"{HEAD}, int64[8] pads, float filling) => (float[2, 5, 8, 8] y) {{ h = {CONV}(x, w, b) p = Pad(h, pads, filling) y = {CONV}(p, v) }}",
        {**ROW, "b": (2, 0.0)},
    ),
    (
        "residual with a bias above zero",
        f"{HEAD}, float[8, 8, 3, 3] u, float[8] c) {OUT} {{ h = {CONV}(x, w, b) k = {CONV}(h, u, c) a = Add(h, k) r = Relu(a) y = {CONV}(r, v) }}",
        {**ROW, "b": (2, 0.0), "u": (2, 0.0), "c": (2, 0.5)},
    ),
    ("value of one dimension of a head", ATTENTION, {"u": ((slice(None), 1), 0.0)}),
]  # fmt: skip  # a table


def planted(graph: str, plants: Plants) -> ModelProto:
    model = from_text(graph, values={**SIZES, "pads": [0, 0, 1, 1, 0, 0, 1, 1], "filling": 1.0})
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        for name, (index, number) in plants.items():
            if name.rstrip(".") == tensor.name:
                array[index] = number
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def differences(state: State) -> list[float]:
    """Return the differences of the outputs, relative to the largest, on inputs that the model runs on."""
    original, pruned = (open_model(model, threads=1, optimise=False) for model in (state.original, state.model))
    pairs = [
        (before, after)
        for feed in working_feeds(state.need("folded", "comb"), original)
        for before, after in zip(execute(original, feed), execute(pruned, feed), strict=True)
    ]
    return [float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-30)) for a, b in pairs]


def removed_indices(state: State, weight: str, axis: int) -> list[int]:
    combed, allocation = state.need("combed", "comb"), state.need("allocation", "lossless")
    axes = next(w.axes[0] for w in combed.weights if w.name == weight)
    return np.flatnonzero(~allocation.keep_mask(combed).mask(axes[axis])).tolist()


@pytest.mark.parametrize(
    ("graph", "plants", "where", "dead"), [case[1:] for case in DEAD], ids=[case[0] for case in DEAD]
)
def test_what_is_dead_is_found_and_its_removal_changes_no_output(
    graph: str, plants: Plants, where: tuple[str, int], dead: list[int]
) -> None:
    state = cpd.run("comb, lossless, prune, verify{allow_inconclusive=True}", planted(graph, plants))
    assert removed_indices(state, *where) == dead
    assert max(differences(state)) < 1e-6
    assert state.verification is not None
    assert state.verification.verdict != "wrong"


@pytest.mark.parametrize(("graph", "plants"), [case[1:] for case in ALIVE], ids=[case[0] for case in ALIVE])
def test_what_may_matter_stays(graph: str, plants: Plants) -> None:
    combed = comb(planted(graph, plants))
    assert [group for group, free in zip(combed.groups, free_channels(combed), strict=True) if free.dead] == []


def test_reasons_constants_and_duplicates() -> None:
    model = planted(RELU, {**ROW, "b": (2, -1.0), "v": ((slice(None), 5), 0.0), "w.": ([3, 4], 0.0), "b.": (4, 0.0)})
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in ("w", "b"):
        array = numpy_helper.to_array(by_name[name]).copy()
        array[7] = array[6]
        by_name[name].CopyFrom(numpy_helper.from_array(array, name))
    (free,) = free_channels(comb(model))
    assert (free.zero, free.unread, free.dead) == ((2, 4), (5,), (2, 4, 5))
    assert [free.reason(position) for position in free.dead] == [ALWAYS_ZERO, ALWAYS_ZERO, UNREAD]
    assert free.constant == (3,)
    assert free.duplicate == (7,)


def test_a_group_that_is_dead_altogether_keeps_a_channel() -> None:
    combed = comb(planted(RELU, {"w": (slice(None), 0.0), "b": (slice(None), -1.0)}))
    free = free_channels(combed)
    assert free[0].dead == tuple(range(8))
    assert removable(combed, free) == [[1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("kind", ["l2", "random", "reconstruction"])
def test_they_are_the_first_to_go_in_any_run(kind: str) -> None:
    """A rectifier that is never open, and channels of which no weight that reads them is left."""
    model = planted(RELU, {"w": (2, 0.0), "b": (2, -1e4), "v": ((slice(None), [4, 5]), 0.0)})
    values = np.random.default_rng(0).standard_normal((16, 3, 6, 6)).astype(np.float32)
    combed = comb(model)
    (scores,) = score(combed, kind, data=ArraySource({"x": values}))
    assert sorted(np.argsort(scores)[:3].tolist()) == [2, 4, 5]
    free = allocate(combed, [scores], Budget("channels", 5 / 8, "optimal"), is_loss=kind == "reconstruction")
    assert [sorted(gone) for gone in free.removed] == [[2, 4, 5]]


def test_a_group_that_is_free_altogether_is_known_by_its_last_channel() -> None:
    combed = comb(planted(RELU, {"w": (slice(None), 0.0), "b": (slice(None), -1.0)}))
    (scores,) = score(combed, "random")
    assert np.flatnonzero(scores).tolist() == [0]


def test_the_same_file_and_plan_again() -> None:
    model = planted(RELU, {**ROW, "b": (2, -1.0)})
    first, second = (cpd.run("comb, lossless, prune", model) for _ in range(2))
    assert first.model.serialize() == second.model.serialize()
    assert first.plan is not None
    assert second.plan is not None
    assert first.plan.content == second.plan.content
    assert first.plan.content["budget"] == {"kind": "lossless"}
    assert "lossless" in str(first.plan.summary())


def thinned(seed: int) -> ModelProto:
    """Return a random graph in whose weights random rows are zero, and some vectors negative."""
    model, rng = seeded(seed), np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if array.dtype != np.float32 or not array.ndim:
            continue
        for axis in range(min(2, array.ndim)):
            rows = rng.random(array.shape[axis]) < rng.choice([0.0, 0.3, 0.6])
            index = (slice(None),) * axis + (rows,)
            array[index] = -np.abs(array[index]) if array.ndim == 1 and rng.random() < 0.5 else 0.0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def test_nothing_changes_in_random_graphs() -> None:
    removed = 0
    for seed in range(int(os.environ.get("CPD_SEEDS", "40"))):
        try:
            state = cpd.run("comb, lossless, prune", thinned(seed))
            gone = sum(map(len, state.need("allocation", "lossless").removed))
            assert not gone or max(differences(state), default=0.0) < 1e-5, seed
        except CpdError:  # the zeros made an operand invalid
            continue
        removed += gone
    assert removed > 50


@pytest.mark.skipif("CPD_DATA" not in os.environ, reason="needs trained models")
def test_trained_models_have_dead_channels() -> None:
    path = Path(os.environ["CPD_DATA"]) / "onnx" / "twinlitenet.onnx"
    if not path.is_file():
        pytest.skip("needs this model")
    combed = comb(path)
    assert sum(map(len, removable(combed, free_channels(combed)))) == 97
