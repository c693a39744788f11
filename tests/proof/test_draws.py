"""Models that draw random numbers: what the proof compares in their place."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import cpd_onnx as cpd
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.proof import proving
from cpd_onnx.proof.comparison import INCONCLUSIVE, VERIFIED
from cpd_onnx.proof.replayed import measured
from cpd_onnx.report.tables import proof_line
from cpd_onnx.runtime.draws import NOTE, draws, with_fixed_draws
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.shapes.inference import fold
from tests.proof.test_verdicts import proof
from tests.support.models import from_text

WEIGHTS = "float[8, 3, 1, 1] w, float[4, 8, 1, 1] v, int64[1] two, int64[1] three, int64[1] zero, int64[3] flat"


def opened(operator: str, opset: int, kind: str) -> Model:
    argument = "" if "shape" in operator else "x"
    signature = f"(float[N, M] x) => ({kind}[A, B] y, float[N, M] z)"
    return cpd.load(from_text(f"{signature} {{ y = {operator} ({argument}) z = Identity(x) }}", opset=opset))


def once(model: Model, x: Array) -> Array:
    return execute(open_model(model, optimise=False), {"x": x})[0]


@pytest.mark.parametrize("opset", [9, 13, 18])
@pytest.mark.parametrize(
    ("operator", "mean", "deviation"),
    [
        ("RandomNormalLike <mean = 3.0, scale = 2.0>", 3, 2),
        ("RandomNormal <shape = [4, 500]>", 0, 1),
        ("RandomUniformLike <low = -1.0, high = 3.0>", 1, 2 / math.sqrt(3)),
        ("RandomUniform <shape = [4, 500]>", 0.5, 1 / math.sqrt(12)),
    ],
)
def test_fixed_numbers_are_spread_as_those_drawn(operator: str, mean: float, deviation: float, opset: int) -> None:
    model, x = opened(operator, opset, "float"), np.zeros((4, 500), np.float32)
    fixed = with_fixed_draws(model)
    assert draws(model)
    assert not draws(fixed)
    found, drawn = once(fixed, x), once(model, x)
    assert (found.shape, found.dtype) == (drawn.shape, drawn.dtype)
    assert np.array_equal(found, once(fixed, x))
    assert abs(found.mean() - mean) < 0.1
    assert abs(found.std() - deviation) < 0.1


def test_samples_are_spread_as_their_probabilities() -> None:
    model = opened("Multinomial <sample_size = 1000, dtype = 7>", 13, "int64")
    x = np.log(np.asarray([[0.1, 0.2, 0.7], [0.7, 0.2, 0.1]], np.float32))
    found = once(with_fixed_draws(model), x)
    assert (found.shape, found.dtype) == ((2, 1000), np.int64)
    shares = np.stack([np.bincount(row, minlength=3) / 1000 for row in found])
    assert np.abs(shares - np.exp(x)).max() < 0.05


def test_trials_succeed_as_often_as_their_probability_says() -> None:
    found = once(with_fixed_draws(opened("Bernoulli", 15, "float")), np.full((4, 500), 0.3, np.float32))
    assert abs(found.mean() - 0.3) < 0.05


@pytest.mark.parametrize(("flag", "is_drawn"), [("{1}", True), ("{0}", False)])
def test_dropout_draws_in_training_mode_only(flag: str, is_drawn: bool) -> None:
    text = "(float[N, M] x) => (float[N, M] y) <float r = {0.5}, bool t = " + flag + "> { y = Dropout(x, r, t) }"
    model, x = cpd.load(from_text(text)), np.ones((4, 50), np.float32)
    assert draws(model) is is_drawn
    assert np.array_equal(once(with_fixed_draws(model), x), x)


def test_numbers_drawn_inside_a_branch_are_fixed_too() -> None:
    text = (
        "(float[N, M] x) => (float[N, M] y) <float zero = {0}> { s = ReduceSum <keepdims = 0> (x) c = Greater(s, zero)"
        " y = If (c) <then_branch = then () => (a) { a = RandomUniformLike(x) },"
        " else_branch = other () => (b) { b = Identity(x) }> }"
    )
    fixed, x = with_fixed_draws(cpd.load(from_text(text))), np.ones((4, 50), np.float32)
    assert not draws(fixed)
    assert np.array_equal(once(fixed, x), once(fixed, x))
    assert once(fixed, x).std() > 0.1


def test_a_model_of_which_drawn_numbers_set_sizes_is_proved() -> None:
    text = (
        f"(float[1, 3, 4, 4] x, {WEIGHTS}) => (float[1, 4, L] y) {{ a = Conv(x, w) b = Relu(a) c = Conv(b, v)"
        " n = RandomNormalLike(c) d = Add(c, n) e = Relu(d) i = NonZero(e) j = Slice(i, two, three, zero)"
        " k = Squeeze(j, zero) f = Reshape(c, flat) y = Gather <axis = 2> (f, k) }"
    )
    constants = {"two": [2], "three": [3], "zero": [0], "flat": [1, 4, -1]}
    found = proof(from_text(text, values=constants))
    assert found.verdict == VERIFIED
    assert NOTE in found.notes


def test_a_refitted_model_may_have_outputs_of_other_sizes_where_values_decide_them() -> None:
    text = (
        "(float[N, 3] x, float[3] w, int64[1] flat, int64[1] first, float[1, 1, 3] v) => (float[1, 1, L] y)"
        " { a = Mul(x, w) s = Reshape(a, flat) f = Relu(s) i = NonZero(f) k = Squeeze(i, first) g = Gather(s, k)"
        " u = Unsqueeze(g, first) n = RandomNormalLike(u) d = Add(u, n) e = Unsqueeze(d, first)"
        " y = Conv <pads = [1, 1]> (e, v) }"
    )
    model = cpd.load(from_text(text, values={"w": [1, 1, 1], "flat": [-1], "first": [0]}))
    other, x = model.copy(), np.asarray([[1, 2, -3], [4, -5, -6]], np.float32)
    other.set_array("w", -model.array("w"))
    found = measured(fold(model), other, [{"x": np.concatenate([x, -np.abs(x)])}], open_model)
    assert found.largest == math.inf


def test_an_effect_on_sizes_is_said_in_words() -> None:
    found = {"allowed": 1e-4, "effect": math.inf, "difference": 1e-6, "runs": 3, "tolerance": 1e-4}
    assert "masking changes sizes of outputs, or which of their values are finite, before" in proof_line(found)


def test_a_model_that_does_not_repeat_itself_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of operator sets before version 9 are not fixed, and here they decide a size."""
    text = (
        "(float[1, 3, 4, 4] x, float[8, 3, 1, 1] w, float[4, 8, 1, 1] v, float k, int64[3] one) => (float[1, 4, 4, L] y)"
        " { a = Conv(x, w) b = Relu(a) c = Conv(b, v) n = RandomNormalLike(c) m = ReduceMax <keepdims = 0> (n)"
        " s = Mul(m, k) i = Cast <to = 7> (s) u = Unsqueeze <axes = [0]> (i) t = Concat <axis = 0> (one, u)"
        " e = ReduceMean <axes = [3]> (c) y = Expand(e, t) }"
    )
    model = from_text(text, values={"k": 1000, "one": [1, 1, 1]}, opset=8)
    runs = itertools.count()

    def opened_before(model: Model, **options: Any) -> Any:
        """Return a session that has drawn other numbers than the one before it."""
        session = open_model(model, **options)
        for _ in range(next(runs)):
            session.run(None, {"x": np.zeros((1, 3, 4, 4), np.float32)})
        return session

    monkeypatch.setattr(proving, "open_model", opened_before)
    found = proof(model)
    assert found.verdict == INCONCLUSIVE
    assert any(note.startswith("the original does not repeat itself") for note in found.notes)
