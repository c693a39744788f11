"""Between the pruner and the target: profiles, fixed sizes, operator sets, int8, half floats, .ort."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from cpd_onnx.cli.main import main
from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import ArraySource, inputs_of, open_source
from cpd_onnx.deploy import float16 as halves
from cpd_onnx.deploy import steps
from cpd_onnx.deploy.float16 import to_half
from cpd_onnx.deploy.profiles import Profile, load_profile, problems, profile_names
from cpd_onnx.deploy.quantize import CALIBRATIONS, Quantization, quantize, quantize_recorded
from cpd_onnx.deploy.steps import (
    Deployment,
    convert_opset,
    deploy,
    fix_batch,
    fix_shapes,
    lower_ir,
    ort_bytes,
    redo,
    save_ort,
)
from cpd_onnx.errors import CpdError, DataError, ModelError, ProofError, TargetError, UnsupportedError
from cpd_onnx.ir.model import Model, load
from cpd_onnx.proof import comparison
from cpd_onnx.runtime.sessions import execute, open_model
from tests.support.models import from_text
from tests.support.runs import plain

MODELS = Path(__file__).parents[2] / "models"
EXAMPLE = MODELS / "digits.onnx"
TRAIN, TEST = MODELS / "digits_train.npz", MODELS / "digits_test.npz"
REAL = Path(os.environ.get("CPD_DATA", Path(__file__).parents[3] / "shared" / "data")) / "onnx"

CONV = (
    "(float[N,3,H,W] x, float[8,3,3,3] w, float[8] b, float[4,8,1,1] v) => (float[N,4,H2,W2] y) "
    "{ h = Conv<kernel_shape=[3,3],pads=[1,1,1,1]>(x, w, b) r = Relu(h) y = Conv(r, v) }"
)


@pytest.fixture
def digits() -> Model:
    return load(EXAMPLE)


@pytest.fixture
def data(digits: Model) -> Any:
    return open_source(TRAIN, digits.proto)


def accuracy(model: Model) -> float:
    return evaluate(model.complete_proto(), open_source(TEST, load(EXAMPLE).proto), "top1")


def outputs(model: Model | Path, feed: dict[str, Any]) -> list[Any]:
    return execute(open_model(model), feed)


def kinds(model: Model) -> set[str]:
    return {TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}


def operators(model: Model) -> list[str]:
    return [node.op_type for node in model.graph.node]


# Profiles.


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_says_where_its_values_come_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.multiple > 1
    assert "measured" in profile.note
    assert isinstance(problems(load(EXAMPLE), profile), list)


def test_there_are_profiles_for_the_usual_targets() -> None:
    assert load_profile("avx512").multiple == 16
    assert load_profile("avx2").multiple == 8
    assert {"arm-neon", "cuda-tensorcore", "tensorrt", "openvino", "ort-mobile"} <= set(profile_names())


def test_the_profiles_are_installed_with_the_package() -> None:
    project = tomllib.loads((MODELS.parent / "pyproject.toml").read_text())
    assert "profiles.toml" in project["tool"]["setuptools"]["package-data"]["cpd_onnx.deploy"]


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "ecu.toml"
    path.write_text('multiple = 4\nopset = 19\nir = 8\nallows = ["Conv", "Relu"]\nnote = "read"\n')
    assert load_profile(path) == Profile("ecu", 4, 19, 8, ("Conv", "Relu"), note="read")
    path.write_text('name = "my ecu"\n')
    assert load_profile(str(path)).name == "my ecu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("width = 4", "has a key 'width'"),
        ("multiple = 'four'", "integer of at least 1"),
        ("multiple = 0", "integer of at least 1"),
        ("multiple = true", "integer of at least 1"),
        ("fixed_shapes = 1", "true or false"),
        ("lacks = 'Conv'", "list of operators"),
        ("lacks = [1]", "list of operators"),
        ("note = 3", "must be a string"),
        ("name = 3", "must be a string"),
        ("dtype = 'float64'", "must be one of float32"),
        ("opset = ", "not a TOML"),
    ],
)
def test_what_is_no_profile_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(TargetError, match=said):
        load_profile(path)


def test_there_is_no_such_profile(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"choose avx512.* or give a \.toml file"):
        load_profile("avx1024")
    with pytest.raises(TargetError, match="cannot read"):
        load_profile(tmp_path / "none.toml")


def test_problems_name_the_node_and_the_value() -> None:
    body = "{ c = Conv<pads=[1,1,1,1]>(x, w) y = local.f(c) }"
    function = '<opset_import: ["": 17], domain: "local"> f (a) => (d) { d = Relu(a) }'
    model = load(from_text(f"(float[N,3,8,8] x, float[4,3,3,3] w) => (float[N,4,8,8] y) {body}", functions=function))
    model.graph.node[0].name = "first"
    profile = Profile("ecu", opset=16, ir=7, lacks=("Conv", "Rel?"), batch=1, fixed_shapes=True, dtype="int8")
    found = problems(model, profile)
    assert found == [
        "opset 17 is newer than 16, the newest of ecu",
        "IR version 8 is newer than 7, the newest of ecu",
        "ecu has no operator Conv: node 'first'",
        "ecu has no operator Relu: node 'd'",
        "input 'x' is float32[N,3,8,8]: ecu requires static sizes",
        "most weights are float32, ecu is designed for int8",
    ]
    assert problems(model, Profile("ecu", allows=("Conv", "Relu"))) == []
    assert problems(model, Profile("ecu", allows=("Relu",))) == ["ecu has no operator Conv: node 'first'"]
    assert problems(fix_batch(model, 2), Profile("ecu", batch=1)) == ["the model has batch size 2, ecu requires 1"]


def test_problems_look_into_subgraphs() -> None:
    text = """(float[2,4] x, bool c) => (float[2,4] y) {
        y = If(c) <then_branch = a () => (float[2,4] t) { t = Det(x) }, else_branch = b () => (float[2,4] e) { e = Relu(x) }>
    }"""
    found = problems(load(from_text(text)), load_profile("tensorrt"))
    assert any("has no operator Det: node 't'" in sentence for sentence in found)
    assert not any("Relu" in sentence for sentence in found)


def test_problems_see_how_a_model_is_quantised(digits: Model, data: Any) -> None:
    rt = load_profile("tensorrt")
    found = problems(quantize(digits, data, Quantization(samples=16)), rt)
    assert [sentence.split()[-1] for sentence in found] == ["int8", "symmetrically", "float"]
    made = quantize(digits, data, Quantization(samples=16, activations="int8", symmetric=True, quantized_bias=False))
    assert problems(made, rt) == []


# Sizes.


def test_sizes_are_fixed_by_the_name_of_a_symbol() -> None:
    model = load(from_text(CONV))
    fixed = fix_shapes(model, {"N": 2, "H": 8, "W": 9})
    assert str(inputs_of(fixed.proto)[0]) == "float32[2,3,8,9]"
    assert [dim.dim_value for dim in fixed.graph.output[0].type.tensor_type.shape.dim] == [2, 4, 8, 9]
    assert str(inputs_of(model.proto)[0]) == "float32[N,3,H,W]"
    assert fixed.defect() is None


def test_sizes_are_fixed_by_the_shape_of_an_input() -> None:
    fixed = fix_shapes(load(from_text(CONV)), {"x": (1, 3, 6, 6)})
    assert str(inputs_of(fixed.proto)[0]) == "float32[1,3,6,6]"


def test_some_sizes_may_stay_open() -> None:
    fixed = fix_shapes(load(from_text(CONV)), {"N": 2})
    assert str(inputs_of(fixed.proto)[0]) == "float32[2,3,H,W]"
    assert [dim.dim_value for dim in fixed.graph.output[0].type.tensor_type.shape.dim] == [2, 4, 0, 0]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"x": (1, 4, 8, 8)}, "cannot become"),
        ({"x": (1, 3, 8)}, "cannot become"),
        ({"K": 4}, "no input or symbolic size 'K': it has 'x', 'H', 'N', 'W'"),
        ({"N": 0}, "must be at least 1, got 0"),
        ({"N": (1, 2)}, "no input or symbolic size"),
        ({"x": (1, 3, 8, 8), "N": 2}, "no input or symbolic size 'N'"),
        ({"N": 2, "x": (1, 3, 8, 8)}, "cannot become"),
    ],
)
def test_sizes_that_cannot_be_fixed(sizes: Any, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        fix_shapes(load(from_text(CONV)), sizes)


def test_one_symbol_has_one_size() -> None:
    model = load(from_text("(float[N,N] x) => (float[N,N] y) { y = Relu(x) }"))
    with pytest.raises(TargetError, match="cannot become"):
        fix_shapes(model, {"x": (2, 3)})
    assert str(inputs_of(fix_shapes(model, {"x": (3, 3)}).proto)[0]) == "float32[3,3]"


def test_a_batch_is_fixed_in_all_inputs() -> None:
    model = load(from_text("(float[N,4] x, float[N,4] x2, float[?,4] x3) => (float[N,4] y) { y = Sum(x, x2, x3) }"))
    fixed = fix_batch(model, 3)
    assert [entry.shape for entry in inputs_of(fixed.proto)] == [(3, 4)] * 3
    assert fix_batch(fixed, 3) is fixed
    with pytest.raises(TargetError, match="cannot become 2"):
        fix_batch(fixed, 2)


# Versions.


def test_a_model_that_lists_its_weights_as_inputs_is_converted() -> None:
    """As up to IR version 3. The converter adds an initializer for the pads, which it does not list."""
    model = from_text(
        "(float[1, 2, 4, 4] x, float[3, 2, 3, 3] w) => (float[1, 3, 4, 4] y) "
        "{ p = Pad <pads = [0, 0, 1, 1, 0, 0, 1, 1]> (x) y = Conv (p, w) }",
        opset=10, ir=3,
    )  # fmt: skip  # a model
    weight = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    made = convert_opset(load(model), 17)
    assert made.opset == 17
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)
    found, wanted = (open_model(each).run(None, {"x": x})[0] for each in (made, load(model)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_an_operator_set_is_converted_and_all_else_stays(digits: Model) -> None:
    digits.proto.metadata_props.add(key="who", value="me")
    made = convert_opset(digits, 21)
    assert made.opset == 21
    assert made.proto.ir_version == digits.proto.ir_version
    assert list(made.graph.value_info) == list(digits.graph.value_info)
    assert list(made.proto.metadata_props) == list(digits.proto.metadata_props)
    assert [n.name for n in made.graph.node if n.name] == [n.name for n in digits.graph.node]
    assert convert_opset(digits, 17) is digits
    assert digits.opset == 17


def test_what_cannot_be_converted_is_told(digits: Model) -> None:
    with pytest.raises(UnsupportedError, match="opset 17 to 13: No Adapter From Version"):
        convert_opset(digits, 13)


def test_an_ir_version_is_lowered_where_nothing_needs_it(digits: Model) -> None:
    digits.proto.ir_version = 13
    lower = lower_ir(digits, 10)
    assert (lower.proto.ir_version, digits.proto.ir_version) == (10, 13)
    assert lower_ir(lower, 11) is lower
    with pytest.raises(UnsupportedError, match="needs IR version 8"):
        lower_ir(digits, 7)


def test_a_profile_converts_what_it_can_and_says_what_it_cannot(digits: Model) -> None:
    made = deploy(digits, Deployment(profile=Profile("old", opset=16, ir=8, batch=4)))
    assert (made.model.opset, made.problems) == (16, ())
    assert [step.name for step in made.steps] == ["fix", "opset"]
    made = deploy(digits, Deployment(profile=Profile("older", opset=13)))
    assert made.model is digits
    assert made.steps[0].notes[0].startswith("skipped: onnx cannot convert opset 17 to 13")
    assert made.problems == ("opset 17 is newer than 13, the newest of older",)


# Eight bits.


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_the_example_keeps_its_accuracy_in_eight_bits(digits: Model, data: Any, method: str) -> None:
    samples = 4 if method == "entropy" else 64  # it tries many thresholds
    made = deploy(digits, Deployment(int8=Quantization(method, samples=samples)), data)
    (step,) = made.steps
    assert step.difference is not None
    assert step.difference.agreement is not None
    assert step.difference.agreement > 0.9
    assert 0 < step.difference.typical < 0.1
    assert step.difference.samples == 64
    assert accuracy(made.model) > accuracy(digits) - 0.01
    assert step.bytes < 0.4 * digits.data_bytes()
    assert {"INT8", "INT32"} <= kinds(made.model)
    assert made.model.defect() is None


def test_a_scale_for_each_channel_or_one(digits: Model, data: Any) -> None:
    def most(per_channel: bool) -> int:
        made = quantize(digits, data, Quantization(samples=16, per_channel=per_channel))
        scales = [made.array(n.input[1]).size for n in made.graph.node if n.op_type == "DequantizeLinear"]
        return max(scales)

    assert most(False) == 1
    assert most(True) == max(t.dims[0] for t in digits.graph.initializer)


def test_what_is_excluded_stays_float(digits: Model, data: Any) -> None:
    plain = quantize(digits, data, Quantization(samples=16))
    made = quantize(digits, data, Quantization(samples=16, exclude=("head.*", "Add")))
    assert plain.tensor("head.weight_quantized").data_type == TensorProto.INT8
    assert made.tensor("head.weight").data_type == TensorProto.FLOAT
    assert operators(made).count("DequantizeLinear") < operators(plain).count("DequantizeLinear")
    with pytest.raises(TargetError, match="matches no node"):
        quantize(digits, data, Quantization(exclude=("nothing*",)))


def test_tools_are_quiet_and_their_logging_is_as_before(
    digits: Model, data: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    handlers = list(logging.getLogger().handlers)
    quantize(digits, data, Quantization("percentile", samples=16))
    to_half(digits)
    assert logging.getLogger().handlers == handlers
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_model_keeps_what_describes_it(digits: Model, data: Any) -> None:
    digits.proto.metadata_props.add(key="who", value="me")
    for made in (quantize(digits, data, Quantization(samples=16)), to_half(digits)):
        assert [(entry.key, entry.value) for entry in made.proto.metadata_props] == [("who", "me")]
        assert list(made.proto.opset_import) == list(digits.proto.opset_import)
        assert (made.proto.producer_name, made.graph.name) == (digits.proto.producer_name, digits.graph.name)
        assert list(made.graph.input) == list(digits.graph.input)
        assert [o.name for o in made.graph.output] == [o.name for o in digits.graph.output]


def test_what_is_quantised_already_is_refused(digits: Model, data: Any) -> None:
    made = quantize(digits, data, Quantization(samples=16))
    with pytest.raises(UnsupportedError, match="quantised already"):
        quantize(made, data)
    with pytest.raises(UnsupportedError, match="16-bit floats"):
        quantize(to_half(digits), data)


def test_old_operator_sets_are_converted_first() -> None:
    model = load(from_text(CONV.replace("H2,W2", "H,W"), opset=11))
    source = ArraySource({"x": np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32)})
    with pytest.raises(UnsupportedError, match="need opset 13 and the model has 11"):
        quantize(model, source)
    made = deploy(model, Deployment(int8=Quantization()), source)
    assert next(step.what.split(":")[0] for step in made.steps) == "11 -> 13"
    assert "QuantizeLinear" in operators(made.model)


def test_a_fixed_batch_is_calibrated_batch_by_batch(digits: Model, data: Any) -> None:
    made = deploy(digits, Deployment(batch=8, int8=Quantization(samples=24)), data)
    assert inputs_of(made.model.proto)[0].shape == (8, 1, 8, 8)
    assert made.steps[-1].difference is not None
    assert accuracy(made.model) > 0.98


def test_masks_do_not_take_the_range_of_what_they_are_added_to() -> None:
    values = {"m": np.triu(np.full((4, 4), -1e9), 1)}
    text = "(float[N,4,4] x, float[4,4] w, float[4,4] m) => (float[N,4,4] y) { h = MatMul(x, w) y = Add(h, m) }"
    model = load(from_text(text, values=values))
    source = ArraySource({"x": np.random.default_rng(0).standard_normal((8, 4, 4)).astype(np.float32)})
    notes: list[str] = []
    made = quantize(model, source, Quantization(), notes.append)
    assert any("exceed 5000" in note for note in notes)
    feed = {"x": next(source.batches(8))["x"]}
    plain, found = (outputs(m, feed)[0] for m in (model, made))
    assert np.abs(plain - found)[plain > -1e6].max() < 0.1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(float[N,4] x) => (float[N,4] y) { y = Exp(x) }", "no node to quantise"),
        ("(float[2] w) => (float[2] y) { y = Relu(w) }", "no inputs"),
    ],
)
def test_what_cannot_be_quantised(text: str, said: str) -> None:
    source = ArraySource({"x": np.ones((4, 4), np.float32)})
    with pytest.raises(UnsupportedError, match=said):
        quantize(load(from_text(text)), source)


def test_weights_that_old_files_call_inputs_are_none_afterwards() -> None:
    proto = from_text(CONV.replace("N,3,H,W", "2,3,6,6").replace("N,4,H2,W2", "2,4,6,6"), opset=13, ir=3)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    source = ArraySource({"x": np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32)})
    for made in (quantize(load(proto), source), to_half(load(proto))):
        assert [entry.name for entry in made.graph.input] == ["x"]
        assert made.defect() is None
        assert len(outputs(made, {"x": np.ones((2, 3, 6, 6), np.float32)})) == 1


@pytest.mark.parametrize(
    "wrong", [{"calibration": "guess"}, {"activations": "int4"}, {"samples": 0}], ids=lambda wrong: next(iter(wrong))
)
def test_options_of_quantising_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(TargetError):
        Quantization(**wrong)


def test_quantising_needs_data_that_fits(digits: Model) -> None:
    with pytest.raises(DataError, match="needs calibration samples"):
        deploy(digits, Deployment(int8=Quantization()))
    with pytest.raises(DataError, match="image"):
        quantize(digits, ArraySource({"image": np.ones((4, 1, 9, 9), np.float32)}))


# Sixteen bits.


def test_half_floats_are_computed_with(digits: Model) -> None:
    made = deploy(digits, Deployment(half="float16")).model
    assert kinds(made) >= {"FLOAT16"}
    assert "FLOAT" not in kinds(made)
    assert accuracy(made) > 0.99
    assert inputs_of(made.proto)[0].dtype == np.float32
    inner = to_half(digits, keep_io=False)
    assert inputs_of(inner.proto)[0].dtype == np.float16
    found = deploy(digits, Deployment(half="float16", keep_io=False)).steps[0].difference
    assert found is not None
    assert found.largest < 0.01


@pytest.mark.parametrize(("kind", "most"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_floats_are_stored(digits: Model, kind: str, most: float) -> None:
    notes: list[str] = []
    made = to_half(digits, kind, storage_only=True, notify=notes.append)
    before = len(digits.graph.node)
    assert operators(made)[: len(made.graph.node) - before].count("Cast") == len(made.graph.node) - before
    assert [n.name for n in made.graph.node][-before:] == [n.name for n in digits.graph.node]
    assert kind.upper() in kinds(made)
    assert made.data_bytes() < 0.6 * digits.data_bytes()
    step = deploy(digits, Deployment(half=kind, storage_only=True)).steps[0]
    assert step.difference is not None
    assert 0 < step.difference.largest < most
    assert not notes


def test_what_is_too_large_for_half_a_float_is_told() -> None:
    values = {"w": np.full((4, 4), 3e4), "v": np.full((4, 4), 3e4)}
    text = "(float[2,4] x, float[4,4] w, float[4,4] v) => (float[2,4] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    source = ArraySource({"x": np.ones((2, 4), np.float32)})
    (step,) = deploy(load(from_text(text, values=values)), Deployment(half="float16"), source).steps
    assert step.notes[-1] == "2 tensors exceed 65504, the largest float16, like 'h': infinite on a GPU"
    (step,) = deploy(load(EXAMPLE), Deployment(half="float16")).steps
    assert len(step.notes) == 1


def test_a_tensor_may_go_to_several_nodes_that_stay_float() -> None:
    text = "(float[N,4] x, float[4,4] w) => (float[N,4] y) { h = MatMul(x, w) a = Max(h) b = Min(h) y = Add(a, b) }"
    model = load(from_text(text))
    made = to_half(model)
    feed = {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}
    assert made.tensor("w").data_type == TensorProto.FLOAT16
    assert np.allclose(outputs(made, feed)[0], outputs(model, feed)[0], atol=1e-2)


def test_a_model_that_onnxruntime_dies_of_is_refused(digits: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "_OPEN", "import os; os.abort()")
    with pytest.raises(UnsupportedError, match="onnxruntime crashes"):
        to_half(digits)


def test_weights_of_constants_and_subgraphs_are_stored_too() -> None:
    text = """(float[N,20] x, bool c) => (float[N,20] y) {
        y = If(c) <then_branch = a () => (float[N,20] t) { t = MatMul(x, u) },
                   else_branch = b () => (float[N,20] e) { k = Constant<value_float = 1.0>() e = Mul(x, k) }>
    }"""
    proto = from_text(text, values={"c": True})
    branches = [attribute.g for attribute in proto.graph.node[0].attribute]
    values = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    branches[0].initializer.append(numpy_helper.from_array(values, "u"))
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(values, "k"))
    branches[1].node[0].CopyFrom(constant)
    branches[1].node[1].op_type = "MatMul"
    for taken in (True, False):
        model = load(proto)
        model.set_array("c", np.array(taken))
        made = to_half(model, storage_only=True)
        feed = {"x": np.ones((2, 20), np.float32)}
        assert np.allclose(outputs(made, feed)[0], outputs(model, feed)[0], atol=0.02)
        assert len(made.serialize()) < 0.65 * len(model.serialize())


def test_bfloat16_is_said_to_be_stored_only(digits: Model) -> None:
    (step,) = deploy(digits, Deployment(half="bfloat16")).steps
    assert step.what == "bfloat16, storage only"
    assert "no bfloat16 kernels" in step.notes[0]


def test_what_does_not_fit_into_half_a_float_stays() -> None:
    large = np.full((20, 20), 1e5, np.float32)
    text = "(float[N,20] x, float[20,20] w, float[20,20] v) => (float[N,20] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    model, notes = load(from_text(text, values={"w": large})), list[str]()
    made = to_half(model, storage_only=True, notify=notes.append)
    assert made.tensor("w").data_type == TensorProto.FLOAT
    assert made.tensor("v_float16").data_type == TensorProto.FLOAT16
    assert notes == ["1 weights do not fit into float16 and stay float32, like 'w'"]


def test_what_has_no_half(digits: Model) -> None:
    with pytest.raises(UnsupportedError, match="nothing to convert"):
        to_half(load(from_text("(float[N] x) => (float[N] y) { y = Relu(x) }")))
    with pytest.raises(UnsupportedError, match="nothing to store"):
        to_half(load(from_text(CONV)), storage_only=True)
    with pytest.raises(UnsupportedError, match="opset 13"):
        to_half(load(from_text(CONV, opset=11)), "bfloat16")
    with pytest.raises(TargetError, match="must be one of float16, bfloat16"):
        to_half(digits, "float8")
    with pytest.raises(TargetError, match="not both"):
        Deployment(half="float16", int8=Quantization())


# The format of onnxruntime.


def test_an_ort_file_gives_equal_outputs(digits: Model, data: Any, tmp_path: Path) -> None:
    feed = {"image": next(data.batches(16))["image"]}
    for name, model in {"float": digits, "int8": quantize(digits, data, Quantization(samples=16))}.items():
        path = tmp_path / f"{name}.ort"
        assert save_ort(model, path) == path.stat().st_size
        assert path.read_bytes()[4:8] == b"ORTM"
        assert np.allclose(outputs(path, feed)[0], outputs(model, feed)[0], atol=1e-4)
        with pytest.raises(ModelError, match="exists"):
            save_ort(model, path)
        save_ort(model, path, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"float.ort", "int8.ort"}


def test_levels_and_providers_of_ort_files(digits: Model) -> None:
    assert ort_bytes(digits, "disable") != ort_bytes(digits, "extended")
    with pytest.raises(TargetError, match="must be one of disable"):
        ort_bytes(digits, "most")
    with pytest.raises(UnsupportedError, match="no provider"):
        ort_bytes(digits, provider="Abacus")


# The proof.


def damaged(model: Model, *_: Any) -> Model:
    proto = model.complete_proto()
    tensor = next(t for t in proto.graph.initializer if t.name == "head.weight")
    tensor.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(tensor), tensor.name))
    return load(proto)


def test_a_step_that_should_only_round_must_not_do_more(digits: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "convert_opset", damaged)
    with pytest.raises(ProofError, match="the step 'opset' changes the outputs by"):
        deploy(digits, Deployment(opset=18))


def test_a_step_after_which_a_model_does_not_run(digits: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Model, opset: int) -> Model:
        made = model.copy()
        made.graph.node[0].domain = "nowhere"
        made.proto.opset_import.add(domain="nowhere", version=1)
        return made

    monkeypatch.setattr(steps, "convert_opset", broken)
    with pytest.raises(ProofError, match="runs before the step 'opset' but not after it"):
        deploy(digits, Deployment(opset=18))


def test_sizes_at_which_a_model_does_not_run() -> None:
    model = load(from_text("(float[N,M] x, float[4,4] w) => (float[N,4] y) { y = MatMul(x, w) }"))
    with pytest.raises(CpdError, match="onnxruntime"):
        deploy(model, Deployment(sizes={"M": 5}))


# The same bytes.

TWICE = """
import hashlib, sys
from cpd_onnx.data.sources import open_source
from cpd_onnx.deploy.steps import Deployment, deploy
from cpd_onnx.ir.model import load
from cpd_onnx.deploy.quantize import Quantization
from tests.support.runs import plain

model = load(sys.argv[1])
data = open_source(sys.argv[2], model.proto)
made = [
    deploy(model, wish, data).model
    for wish in (
        Deployment(int8=Quantization(samples=32)),
        Deployment(int8=Quantization("percentile", samples=32), batch=4),
        Deployment(half="float16"),
        Deployment(half="bfloat16", opset=21),
    )
]
print(*(hashlib.sha256(m.serialize()).hexdigest() for m in made))
"""


def test_the_same_bytes_in_each_process() -> None:
    def run(seed: str) -> str:
        line = [sys.executable, "-c", TWICE, str(EXAMPLE), str(TRAIN)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment, cwd=MODELS.parent)
        return done.stdout

    first = run("1")
    assert len(set(first.split())) == 4
    assert run("2") == first


# The command line.


def run(*arguments: object) -> int:
    return main(plain([str(argument) for argument in arguments]))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_quantise_prune_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, small = tmp_path / "int8.onnx", tmp_path / "small.onnx"
    assert run("deploy", EXAMPLE, "-o", made, "--int8", "--data", TRAIN, "--samples", 32) == 0
    assert run("inspect", made) == 0
    assert run("prune", made, "-o", small, "--target", "macs=0.5") == 0
    assert run("verify", made, small) == 0
    assert "verified" in capsys.readouterr().out
    assert small.stat().st_size < 0.75 * made.stat().st_size


def test_prune_then_deploy_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, made = tmp_path / "small.onnx", tmp_path / "made.onnx"
    line = ("prune", EXAMPLE, "-o", small, "--target", "macs=0.6", "--data", TRAIN, "--profile", "ort-mobile")
    assert run(*line, "--samples", 64, "--repair-samples", 64) == 0
    assert "note: profile ort-mobile: input 'image' is" in capsys.readouterr().out
    assert json.loads((tmp_path / "small.onnx.plan.json").read_text())["budget"]["round_to"] == 8
    wish = ("--profile", "ort-mobile", "--int8", "--data", TRAIN, "--ort", tmp_path / "made.ort", "--eval", TEST)
    assert run("deploy", small, "-o", made, *wish, "--json", tmp_path / "made.json") == 0
    said = capsys.readouterr().out
    assert "profile ort-mobile: no problems found" in said
    assert "top1 after: 0." in said
    content = json.loads((tmp_path / "made.json").read_text())
    assert [step["name"] for step in content["steps"]] == ["fix", "int8", "ort"]
    assert content["bytes"]["after"] == made.stat().st_size
    assert content["bytes"]["ort"] == (tmp_path / "made.ort").stat().st_size
    assert content["accuracy"]["after"] > content["accuracy"]["before"] - 0.02
    assert inputs_of(load(made).proto)[0].shape == (1, 1, 8, 8)


def test_weights_beside_the_model_stay_there(digits: Model, tmp_path: Path) -> None:
    digits.save(tmp_path / "apart.onnx", weights="beside")
    assert run("deploy", tmp_path / "apart.onnx", "-o", tmp_path / "half.onnx", "--half", "float16") == 0
    assert load(tmp_path / "half.onnx").is_external
    assert accuracy(load(tmp_path / "half.onnx")) > 0.99
    assert run("deploy", tmp_path / "apart.onnx", "-o", tmp_path / "one.onnx", "--batch", 2, "--weights", "inside") == 0
    assert not load(tmp_path / "one.onnx").is_external


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to do"),
        (("--int8",), "give --data"),
        (("--exclude", "Conv", "--half", "float16"), "give --int8 as well"),
        (("--storage-only", "--batch", 2), "give --half as well"),
        (("--int8", "--data", TRAIN, "--half", "float16"), "not both"),
        (("--profile", "abacus"), "no profile is called"),
        (("--fix", "N=3"), "no input or symbolic size 'N'"),
        (("--opset", 13), "cannot convert"),
        (("--half", "float16", "--ort", "here/there.ort"), "does not exist"),
        (("--int8", "--data", "none.npz"), "no file"),
        (("--batch", 2, "--metric", "beauty"), "unknown metric"),
    ],
)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(
    arguments: tuple[object, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("deploy", EXAMPLE, "-o", tmp_path / "out.onnx", *arguments) == 1
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1
    assert files(tmp_path) == set()


def test_nothing_is_overwritten_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.ort").write_text("mine")
    line = ("deploy", EXAMPLE, "-o", tmp_path / "out.onnx", "--half", "float16", "--ort", tmp_path / "out.ort")
    assert run(*line) == 1
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "out.ort").read_text() == "mine"
    assert files(tmp_path) == {"out.ort"}
    assert run(*line, "--force") == 0
    assert files(tmp_path) == {"out.onnx", "out.ort", "out.onnx.manifest.json"}


def test_neither_file_is_written_if_one_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise ModelError("the disk is full")

    monkeypatch.setattr(Model, "save", full)
    line = ("deploy", EXAMPLE, "-o", tmp_path / "out.onnx", "--batch", 2, "--ort", tmp_path / "out.ort")
    assert run(*line) == 1
    assert files(tmp_path) == set()


def test_what_is_not_finite_is_null_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_relative", lambda a, b: (float("inf"), 0.5, 0.25))
    line = ("deploy", EXAMPLE, "-o", tmp_path / "half.onnx", "--half", "float16", "--json", tmp_path / "half.json")
    assert run(*line) == 0
    said = capsys.readouterr().out
    assert "not finite" in said
    assert "note: the processor computes most" in said
    (step,) = json.loads((tmp_path / "half.json").read_text())["steps"]
    assert [step["difference"][name] for name in ("largest", "typical", "of_range")] == [None, 0.5, 0.25]


# Models of others.


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the trained models of others")
@pytest.mark.parametrize(
    ("name", "wish"),
    [
        ("resnet20_gtsrb", Deployment(opset=21, batch=2)),
        ("resnet20_gtsrb", Deployment(half="float16")),
        ("vit_cifar10_smmk47", Deployment(half="float16")),
        ("vit_cifar10_smmk47", Deployment(half="bfloat16")),
        ("cntk_mnist", Deployment(half="float16")),
        ("silero_vad_half", Deployment(half="float16", storage_only=True)),
    ],
)
def test_models_of_others(name: str, wish: Deployment) -> None:
    made = deploy(load(REAL / f"{name}.onnx"), wish)
    assert made.model.defect() is None
    for step in made.steps:
        assert step.difference is not None
        assert step.difference.largest < 0.02


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the trained models of others")
@pytest.mark.parametrize("name", ["resnet20_gtsrb", "vit_cifar10_smmk47", "cntk_mnist"])
def test_models_of_others_in_eight_bits(name: str) -> None:
    model = load(REAL / f"{name}.onnx")
    model = convert_opset(model, 13) if model.opset < 13 else model
    (entry,) = inputs_of(model.proto)
    assert entry.shape is not None
    images = np.random.default_rng(0).standard_normal((8, *entry.shape[1:])).astype(np.float32)
    made = deploy(model, Deployment(int8=Quantization(samples=8)), ArraySource({entry.name: images}))
    found = made.steps[0].difference
    assert found is not None
    assert found.typical < 0.3
    assert "DequantizeLinear" in operators(made.model)


ATTENTION = (
    "(float[N, 6, 16] x, float[16, 16] q, float[16, 16] k, float[16, 16] v) => (float[N, 6, 16] y) "
    "{ a = MatMul(x, q) b = MatMul(x, k) t = Transpose<perm = [0, 2, 1]>(b) s = MatMul(a, t) p = Softmax(s) "
    "c = MatMul(x, v) y = MatMul(p, c) }"
)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_what_stays_float_runs_in_float(form: str, tmp_path: Path) -> None:
    """onnxruntime replaces a Softmax between integers by QLinearSoftmax, however it is marked, if it can."""
    model = load(from_text(ATTENTION))
    samples = np.random.default_rng(0).standard_normal((64, 6, 16), np.float32)
    source = ArraySource({"x": samples})
    executed = {}
    for apart in (True, False):
        made, ranges = quantize_recorded(model, source, Quantization(form=form, apart=apart))
        session = open_model(made, profile=tmp_path / "trace")
        session.run(None, {"x": samples[:1]})
        events = json.loads(Path(session.end_profiling()).read_text())
        executed[apart] = {event["args"].get("op_name") for event in events if "args" in event}
        again = quantize_recorded(model, ranges, Quantization(form=form, apart=apart))[0]
        assert again.serialize() == made.serialize()
    assert "Softmax" in executed[True]
    assert "QLinearSoftmax" not in executed[True]
    assert "QLinearSoftmax" in executed[False]


def test_a_record_of_an_older_version_is_repeated_as_it_was() -> None:
    model = load(from_text(ATTENTION))
    source = ArraySource({"x": np.random.default_rng(0).standard_normal((64, 6, 16), np.float32)})
    older = Quantization(apart=False)
    made, ranges = quantize_recorded(model, source, older)
    recorded = {name: value for name, value in asdict(older).items() if name not in ("apart", "float_nodes")}
    assert redo(model, "int8", {"quantization": recorded, "ranges": ranges}).serialize() == made.serialize()
