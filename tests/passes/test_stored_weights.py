"""Repair of weights that several nodes multiply by, that Constant nodes hold, or that are no float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.channels.combing import comb
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.deploy.float16 import to_half
from cpd_onnx.fitting.units import SHARED, units_of
from cpd_onnx.ir.model import Array, Model, load
from cpd_onnx.ir.tensors import held
from cpd_onnx.passes.repair import Repaired, repair
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.scores.registry import score
from tests.support.models import in_constants

DIGITS = Path(cpd.__file__).parent / "models" / "digits.onnx"
SHAPES = {"wp": (12, 3, 1, 1), "bp": (12,), "wq": (12, 3, 3, 3), "w0": (16, 12, 3, 3), "b0": (16,), "w1": (4, 16, 1, 1)}
HEAD = """g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] large, float[N, 4, 3, 3] small)
{
  p = Conv (x, wp, bp)
  q = Conv <strides = [2, 2]> (x, wq)
  a0 = Conv <pads = [1, 1, 1, 1]> (p, w0, b0)
  a1 = Relu(a0)
  large = Conv (a1, w1)
  c0 = Conv <pads = [1, 1, 1, 1]> (q, w0, b0)
  c1 = Relu(c0)
  small = Conv (c1, w1)
}"""
PASSED_ON = (
    HEAD.replace("{\n", "{\n  w2 = Identity(w0)\n  b2 = Identity(b0)\n  w3 = Identity(w1)\n")
    .replace("(q, w0, b0)", "(q, w2, b2)")
    .replace("(c1, w1)", "(c1, w3)")
)


def model_of(text: str, **weights: Array) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    return load(proto)


def head(text: str = HEAD) -> Model:
    """A head that is applied to feature maps of two sizes, as those of detectors are."""
    rng = np.random.default_rng(0)
    return model_of(text, **{name: 0.3 * rng.standard_normal(shape) for name, shape in SHAPES.items()})


def images(count: int = 128, seed: int = 1) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)}


def fixed(model: Model, data: ArraySource, kind: str = "l2") -> tuple[Model, Repaired]:
    """The model without a third of its channels, and its repair."""
    combed = comb(model)
    chosen = allocate(combed, score(combed, kind, data=data), Budget("channels", 0.67))
    kept = chosen.keep_mask(combed)
    small = rewrite(combed, kept).model
    return small, repair(combed, kept, small, data)


def errors(original: Model, models: Sequence[Model]) -> list[float]:
    """Mean square errors of each output of each model on images that nothing was fitted to."""
    unseen = images(seed=2)
    wanted = execute(open_model(original), unseen)
    return [
        float(np.square(got - want).mean())
        for model in models
        for got, want in zip(execute(open_model(model), unseen), wanted, strict=True)
    ]


@pytest.mark.parametrize("text", [HEAD, PASSED_ON], ids=["initializers", "identities"])
def test_a_weight_of_several_nodes_is_fitted_to_all_their_data(text: str) -> None:
    model = head(text)
    found = units_of(comb(model).folded)
    assert [tuple(unit.target for unit in units) for units in found.shared] == [("a0", "c0"), ("large", "small")]
    assert (found.shared[0][1].weight, found.shared[0][1].bias and found.shared[0][1].bias.name) == ("w0", "b0")
    assert not found.left
    small, made = fixed(model, ArraySource(images()))
    assert {"w0", "w1"} <= {fit.weight for fit in made.fits}
    before = errors(model, [small, made.model])
    assert before[2] < 0.4 * before[0]  # the large map
    assert before[3] < 0.8 * before[1]  # the small one, with a seventh of the positions


def test_channels_of_a_shared_weight_are_scored_by_its_error() -> None:
    """Six of sixteen hidden channels are sums of others, which no magnitude tells."""
    model, rng = head(), np.random.default_rng(3)
    w0, w1 = model.array("w0").copy(), rng.standard_normal((4, 16, 1, 1)).astype(np.float32)
    w0[10:] = w0[:6]
    b0 = model.array("b0").copy()
    b0[10:] = b0[:6]
    for name, array in (("w0", w0), ("w1", w1), ("b0", b0)):
        model.set_array(name, array)
    combed = comb(model)
    index = next(group.id for group in combed.groups if len(group) == 16)
    values = score(combed, "reconstruction", data=ArraySource(images()))[index]
    assert np.sort(values)[5] < 0.02 * np.sort(values)[6]


def test_a_weight_whose_uses_differ_is_left() -> None:
    scaled = HEAD.replace("c1 = Relu(c0)", "c2 = Mul(c0, s)\n  c1 = Relu(c2)")
    model = head(scaled)
    model.add_initializer("s", np.full((16, 1, 1), 2.0, np.float32))
    found = units_of(comb(model).folded)
    assert found.left == {"w0": SHARED}
    assert [units[0].weight for units in found.shared] == ["w1"]


def test_activations_of_a_shared_weight_may_differ() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }"
    ((one, other),) = units_of(comb(model_of(text, w=np.eye(4))).folded).shared
    assert one.bounds == other.bounds == (-np.inf, np.inf)


@pytest.mark.parametrize("kind", ["l2", "reconstruction"])
@pytest.mark.parametrize("data", ["real", "generated"])
def test_weights_in_constant_nodes_get_the_values_of_initializers(kind: str, data: str) -> None:
    """They were left without any repair."""
    model = load(DIGITS)
    made = []
    for each in (model, load(in_constants(model.complete_proto()))):
        combed = comb(each)
        source = Synthetic(combed.folded, 32) if data == "generated" else _digits(each)
        chosen = allocate(combed, score(combed, kind, data=source), Budget("macs", 0.5))
        kept = chosen.keep_mask(combed)
        made.append(repair(combed, kept, rewrite(combed, kept).model, source))
    assert made[0].fits == made[1].fits != ()
    for tensor in made[0].model.graph.initializer:
        values = held(made[1].model, tensor.name)
        assert values is not None
        np.testing.assert_array_equal(values, made[0].model.array(tensor.name))


def converted(model: Model, kind: type) -> Model:
    """The same model with floating-point numbers of another type."""
    proto, number = model.complete_proto(), helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), tensor.name))
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.elem_type = number
    return load(proto)


DENSE = """g (float[N, 20] x) => (float[N, 6] y)
{ a = Gemm (x, w0, b0) b = Relu(a) c = MatMul(b, w1) d = Tanh(c) y = MatMul(d, w2) }"""


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_weights_of_other_types_are_fitted_as_float32_is(kind: type) -> None:
    """Models in half precision were left without any repair."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (20, 24), "b0": (24,), "w1": (24, 24), "w2": (24, 6)}
    weights = {name: 0.3 * rng.standard_normal(shape) for name, shape in shapes.items()}
    model = converted(model_of(DENSE, **weights), kind)
    feed, unseen = ({"x": rng.standard_normal((400, 20)).astype(kind)} for _ in range(2))
    combed, data = comb(model), ArraySource(feed)
    chosen = allocate(combed, score(combed, "reconstruction", data=data), Budget("channels", 0.67))
    kept = chosen.keep_mask(combed)
    small = rewrite(combed, kept).model
    made = repair(combed, kept, small, data)
    assert {fit.weight for fit in made.fits} == {"w1", "w2"}
    wanted, *found = (execute(open_model(each), unseen)[0].astype(np.float64) for each in (model, small, made.model))
    before, after = (float(np.square(each - wanted).mean()) for each in found)
    assert after < 0.7 * before
    assert {made.model.array(name).dtype for name in weights} == {np.dtype(kind)}


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_weights_stored_in_half_precision_are_fitted_behind_their_cast(kind: str) -> None:
    model = load(DIGITS)
    data, fits = _digits(model), []
    for each in (model, to_half(model, kind, storage_only=True)):
        combed = comb(each)
        chosen = allocate(combed, score(combed, "reconstruction", data=data), Budget("macs", 0.5))
        kept = chosen.keep_mask(combed)
        made = repair(combed, kept, rewrite(combed, kept).model, data)
        fits.append({fit.weight.removesuffix(f"_{kind}") for fit in made.fits})
        assert not made.left
    assert len(fits[0] & fits[1]) >= 0.8 * len(fits[0])


def test_parts_of_a_model_in_half_precision_run_without_fusions(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime crashed while it fused nodes in a part of a vision transformer that it runs as a whole."""
    asked: list[bool] = []

    def opened(model: Model, *, optimise: bool = True, threads: int = 0) -> ort.InferenceSession:
        asked.append(optimise)
        return open_model(model, optimise=optimise, threads=threads)

    monkeypatch.setattr("cpd_onnx.runtime.stream.open_model", opened)
    data, model = images(32), head()
    fixed(model, ArraySource(data))
    assert all(asked)
    asked.clear()
    fixed(converted(model, np.float16), ArraySource({"x": data["x"].astype(np.float16)}))
    assert asked
    assert not any(asked)


def _digits(model: Model) -> ArraySource:
    (entry,) = (info for info in model.graph.input if not model.has(info.name))
    shape = [dim.dim_value or 32 for dim in entry.type.tensor_type.shape.dim]
    return ArraySource({entry.name: np.random.default_rng(0).standard_normal((32, *shape[1:])).astype(np.float32)})
