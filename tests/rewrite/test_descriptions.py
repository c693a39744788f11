"""Sizes of inner tensors that a file states wrongly: onnxruntime tolerates those of an original, not of a pruned model."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

import cpd_onnx as cpd
from cpd_onnx.ir.model import Model, load
from cpd_onnx.runtime.sessions import open_model
from tests.support.models import from_text

BLOCK = (
    "(float[N,3,32,32] x, float[16,3,3,3] w0, float[16,16,3,3] w1, float[32,16,3,3] w2, float[32,16,1,1] w3, "
    "float[32,32,3,3] w5, float[5,32,1,1] w4) => (float[N,5,16,16] y) { a = Conv<pads=[1,1,1,1]>(x, w0) b = Relu(a) "
    "c = Conv<pads=[1,1,1,1]>(b, w1) d = Relu(c) e = Conv<pads=[1,1,1,1],strides=[2,2]>(d, w2) "
    "f = Conv<strides=[2,2]>(b, w3) g = Relu(e) h = Conv<pads=[1,1,1,1]>(g, w5) s = Add(h, f) y = Conv(s, w4) }"
)
WRONG = {"b": ("N", 32, 32, 16), "d": ("N", 32, 32, 16), "g": ("N", 16, 16, 32)}
"""As if channels came last."""
RIGHT = {"e": ("N", 32, 16, 16), "f": ("N", 32, 16, 16), "h": ("N", 32, 16, 16), "s": ("N", 32, "H", "W")}


def described() -> Model:
    model = from_text(BLOCK)
    for name, sizes in {**WRONG, **RIGHT}.items():
        model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes))
    return load(model)


def shapes(model: Model) -> dict[str, list[int | str] | None]:
    return {
        info.name: [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
        if info.type.tensor_type.HasField("shape")
        else None
        for info in model.graph.value_info
    }


@pytest.mark.parametrize("kept", [0.5, 0.25])
def test_wrong_sizes_are_removed_and_right_ones_updated(kept: float) -> None:
    original = described()
    open_model(original)
    state = cpd.run(f"comb, score{{kind='l2'}}, allocate{{channels={kept}}}, prune, verify", original)
    open_model(state.model)
    found = shapes(state.model)
    assert all(found[name] is None for name in WRONG)
    assert found["e"] == ["N", round(32 * kept), 16, 16]
    assert found["s"] == ["N", round(32 * kept), "H", "W"]
    assert shapes(original)["b"] == ["N", 32, 32, 16]
