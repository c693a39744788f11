"""Integers as inputs and outputs: the same results, what they stand for said everywhere, and reasons where not."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.memory import MemoryModel
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.main import main
from cpd_onnx.data.sources import ArraySource, inputs_of, open_source
from cpd_onnx.deploy import compiled
from cpd_onnx.deploy.c_source import c_source
from cpd_onnx.deploy.integer_io import converted_at_border, integer_io
from cpd_onnx.deploy.quantize import Quantization, quantize_recorded
from cpd_onnx.deploy.steps import Deployment, c_difference, deploy, feeds_for, redo
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.ir.interface import INTEGER_TYPES, Integers, interface_of
from cpd_onnx.ir.model import Model, load
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.workflow.deploy import deploy as deploy_file
from cpd_onnx.workflow.requests import Deploy
from tests.support.models import from_text

PHOTOGRAPH = (
    "(float[N,8,8,3] x, float[4,3,3,3] w, float[4] b, float[256,5] m) => (float[N,5] y) "
    "{ t = Transpose<perm=[0,3,1,2]>(x) c = Conv<pads=[1,1,1,1]>(t, w, b) r = Relu(c) f = Flatten(r) y = MatMul(f, m) }"
)
LEVELS = {"s": 0.05, "z": 100, "u": 0.02, "v": -7}
ENDS = "float s, uint8 z, float u, int8 v"


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def photograph() -> Model:
    return load(from_text(PHOTOGRAPH))


@pytest.fixture
def samples() -> ArraySource:
    return ArraySource({"x": np.random.default_rng(0).normal(1.0, 1.0, (32, 8, 8, 3)).astype(np.float32)})


def converted(text: str, **values: Any) -> tuple[Model, Model, list[str]]:
    """Return a model of text, the same with integers as inputs and outputs, and what was said."""
    model, said = load(from_text(text, values=LEVELS | values)), list[str]()
    return model, integer_io(model, said.append)[0], said


def types(model: Model) -> dict[str, str]:
    infos = (*model.graph.input, *model.graph.output)
    return {info.name: TensorProto.DataType.Name(info.type.tensor_type.elem_type).lower() for info in infos}


def require_equal(before: Model, after: Model) -> None:
    feeds = feeds_for("", before, before, None)
    sessions = [open_model(model, optimise=False) for model in (before, after)]
    for feed in feeds:
        for first, second in zip(*(execute(session, feed) for session in sessions), strict=True):
            np.testing.assert_array_equal(first, second)


# What integers stand for.


@given(
    st.sampled_from(INTEGER_TYPES), st.floats(2.0**-10, 10, width=32), st.integers(0, 100), st.integers(0, 2**32 - 1)
)
def test_integers_are_rounded_as_by_onnxruntime(kind: str, scale: float, zero: int, seed: int) -> None:
    integers = Integers(kind, scale, zero)
    x = (np.random.default_rng(seed).normal(size=64) * 200 * scale).astype(np.float32)
    halves = (np.arange(-8, 8, dtype=np.float32) + np.float32(0.5)) * np.float32(scale)
    x = np.concatenate([x, halves, np.float32([np.inf, -np.inf])])
    text = f"(float[N] x, float s, {kind} z) => ({kind}[N] q, float[N] y) {{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}"
    model = from_text(text, values={"s": scale, "z": zero}, opset=21, ir=10)
    q, y = open_model(model).run(None, {"x": x})
    np.testing.assert_array_equal(integers.quantized(x), q)
    np.testing.assert_array_equal(integers.real(q), y)
    assert integers.quantized(q) is q


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int32"},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"zero_point": 256},
        {"zero_point": 0.5},
        {"more": 1},
    ],
)
def test_what_is_no_record_of_integers_is_left_out(wrong: dict[str, Any]) -> None:
    model = load(from_text("(float[4] x) => (float[4] y) { y = Relu(x) }"))
    good = asdict(Integers("uint8", 0.5, 3))
    model.proto.metadata_props.add(key="cpd-onnx.integers.a", value=json.dumps(good))
    model.proto.metadata_props.add(key="cpd-onnx.integers.x", value=json.dumps(good | wrong))
    assert interface_of(model).integers == {"a": Integers("uint8", 0.5, 3)}


# The step.


def test_inputs_and_outputs_become_integers_through_operators_that_move_elements() -> None:
    before, after, said = converted(
        f"(float[2,6,4] x, {ENDS}, int64[2] k, int64[1] i) => (float[4,12] y, int64[3] d) {{"
        " t = Transpose<perm=[2,0,1]>(x) d = Shape(x) f = Reshape(t, k) a = QuantizeLinear(f, s, z) b = QuantizeLinear(t, s, z)"
        " g = Gather<axis=0>(b, i) h = DequantizeLinear(g, s, z) p = DequantizeLinear(a, s, z) r = Relu(p)"
        " q = QuantizeLinear(r, u, v) o = DequantizeLinear(q, u, v) y = Identity(o) }",
        k=[4, 12], i=[1],
    )  # fmt: skip  # a model
    assert types(after) == {"x": "uint8", "y": "int8", "d": "int64"}
    assert interface_of(after).integers == {
        "x": Integers("uint8", float(np.float32(0.05)), 100),
        "y": Integers("int8", float(np.float32(0.02)), -7),
    }
    assert said == [
        "input 'x' is uint8, (integer - 100) * 0.05000000074505806",
        "output 'y' is int8, (integer - -7) * 0.019999999552965164",
    ]
    assert [n.op_type for n in after.graph.node if "Quant" in n.op_type] == ["QuantizeLinear"]
    require_equal(before, after)


def test_an_output_that_is_also_read_keeps_its_floats_for_that() -> None:
    before, after, _ = converted(
        f"(float[6] x, {ENDS}) => (float[6] y, float[6] w) {{ r = Relu(x) q = QuantizeLinear(r, u, v)"
        " y = DequantizeLinear(q, u, v) w = Neg(y) }"
    )
    assert types(after) == {"x": "float", "y": "int8", "w": "float"}
    require_equal(before, after)


@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        (
            "(float[6] x) => (float[6] y) { a = QuantizeLinear(x, s, z) b = QuantizeLinear(x, u, z) c = DequantizeLinear(a, s, z)"
            " d = DequantizeLinear(b, u, z) y = Add(c, d) }",
            ["input 'x' stays float32: it is quantised with several scales", "output 'y' stays float32: Add 'y' computes it as float"],
        ),
        (
            "(float[6] x) => (float[6] y) { a = QuantizeLinear(x, s, z) c = DequantizeLinear(a, s, z) y = Add(c, x) }",
            ["input 'x' stays float32: Add 'y' reads it as float", "output 'y' stays float32: Add 'y' computes it as float"],
        ),
        (
            "(float[2,3] x) => (float[2,3] y) { a = QuantizeLinear(x, e, g) c = DequantizeLinear(a, e, g) y = Identity(c) }",
            ["input 'x' stays float32: QuantizeLinear 'a' has another scale for each channel, or none that is constant",
             "output 'y' stays float32: DequantizeLinear 'c' has no constant scale and zero point of one number and at most 16 bits"],
        ),
        (
            "(float[6] x) => (uint8[6] a, float[6] y) { a = QuantizeLinear(x, s, z) y = DequantizeLinear(a, s, z) }",
            ["input 'x' stays float32: its integers, 'a', are an output or read by a subgraph",
             "output 'y' stays float32: its integers, 'a', are an input or another output, or read by a subgraph"],
        ),
        (
            "(float[6] x, bool xc) => (float[6] y) { a = QuantizeLinear(x, s, z) c = DequantizeLinear(a, s, z)"
            " y = If(xc) <then_branch = l () => (float[6] t) { t = Neg(x) }, else_branch = o () => (float[6] p) { p = Neg(c) }> }",
            ["input 'x' stays float32: 'x' is an output, or read by a subgraph", "output 'y' stays float32: If 'y' computes it as float"],
        ),
        (
            "(float[6] x, float16[6] xh) => (float[6] y, float16[6] n) { n = Neg(xh) a = QuantizeLinear(x, s, z) y = Cast<to=1>(a) }",
            ["input 'x' is uint8, (integer - 100) * 0.05000000074505806", "input 'xh' stays float16: Neg 'n' reads it as float",
             "output 'y' stays float32: Cast 'y' computes it as float", "output 'n' stays float16: Neg 'n' computes it as float"],
        ),
    ],
)  # fmt: skip  # a table
def test_what_stays_float_is_said_with_its_reason(body: str, reasons: list[str]) -> None:
    scales = ", float s, uint8 z, float u, float[3] e, uint8[3] g)"
    before, after, said = converted(body.replace(") =>", f"{scales} =>", 1), g=[1, 2, 3])
    body = body.replace("(x, e, g)", "<axis=1>(x, e, g)")
    assert said == reasons
    assert (after is before) == all("stays" in reason for reason in reasons)
    require_equal(before, after)


def test_a_model_of_floats_is_refused(photograph: Model) -> None:
    with pytest.raises(UnsupportedError, match="give --int8 as well"):
        integer_io(photograph, lambda _: None)


# Moving conversions.


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_an_input_is_quantised_before_it_is_transposed(form: str, photograph: Model, samples: ArraySource) -> None:
    options = Quantization(form=form, samples=16)
    early, ranges = quantize_recorded(photograph, samples, options)
    late, _ = quantize_recorded(photograph, ranges, Quantization(form=form, samples=16, at_border=False))
    assert [node.op_type for node in early.graph.node[:2]] == ["QuantizeLinear", "Transpose"]
    assert [node.op_type for node in late.graph.node[:2]] == ["Transpose", "QuantizeLinear"]
    require_equal(late, early)
    older = {name: value for name, value in asdict(options).items() if name != "at_border"}
    assert redo(photograph, "int8", {"quantization": older, "ranges": ranges}).serialize() == late.serialize()


def test_an_output_is_dequantised_after_it_is_transposed() -> None:
    text = (
        f"(float[2,3] x, {ENDS}) => (float[3,2,1] y) {{ r = Relu(x) q = QuantizeLinear(r, u, v) d = DequantizeLinear(q, u, v)"
        " a = Constant<value_ints=[2]>() e = Unsqueeze(d, a) y = Transpose<perm=[1,0,2]>(e) }"
    )
    before = load(from_text(text, values=LEVELS))
    after = converted_at_border(before)
    assert [node.op_type for node in after.graph.node][-2:] == ["Transpose", "DequantizeLinear"]
    require_equal(before, after)
    assert converted_at_border(after) is after


def test_an_input_that_is_quantised_twice_is_quantised_once_before() -> None:
    text = (
        f"(float[2,3] x, {ENDS}) => (float[3,2] y, float[2,3] n) {{ t = Transpose(x) a = QuantizeLinear(t, s, z)"
        " b = QuantizeLinear(t, s, z) c = DequantizeLinear(a, s, z) d = DequantizeLinear(b, s, z) y = Add(c, d) n = Neg(x) }"
    )
    before = load(from_text(text, values=LEVELS))
    after = converted_at_border(before)
    assert [node.op_type for node in after.graph.node][:3] == ["QuantizeLinear", "Transpose", "DequantizeLinear"]
    require_equal(before, after)


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, samples, and the model deployed with integers as inputs and outputs."""
    folder = tmp_path_factory.mktemp("integers")
    load(from_text(PHOTOGRAPH)).save(folder / "net.onnx")
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 1.0, (40, 8, 8, 3)).astype(np.float32)
    np.savez(folder / "data.npz", x=x)
    labels = execute(open_model(folder / "net.onnx"), {"x": x})[0].argmax(-1)
    np.savez(folder / "test.npz", x=x, labels=labels)
    wishes = ("--int8", "--integer-io", "--data", folder / "data.npz", "--samples", 16, "--batch", 1)
    files = ("--json", folder / "int8.json", "--ort", folder / "int8.ort", "--eval", folder / "test.npz")
    assert run("deploy", folder / "net.onnx", "-o", folder / "int8.onnx", *wishes, *files) == 0
    return folder


def test_what_the_integers_stand_for_is_said_everywhere(folder: Path) -> None:
    model, content = load(folder / "int8.onnx"), json.loads((folder / "int8.json").read_text())
    found = interface_of(model).integers
    assert types(model) == {"x": "uint8", "y": "uint8"}
    assert content["integers"] == {name: asdict(each) for name, each in found.items()}
    assert set(content["integers"]) == {"x", "y"}
    (step,) = [
        step
        for step in json.loads((folder / "int8.onnx.manifest.json").read_text())["steps"]
        if step["name"] == "integer-io"
    ]
    assert step["options"] == {"inputs": {"x": asdict(found["x"])}, "outputs": {"y": asdict(found["y"])}}
    assert step["difference"]["largest"] == 0
    assert step["notes"] == [f"input 'x' is {found['x']}", f"output 'y' is {found['y']}"]
    assert content["accuracy"]["after"] > 0.9


def test_the_chain_from_the_original_is_verified_and_repeated(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data in ((), ("--data", folder / "data.npz")):
        for name in ("int8.onnx", "int8.ort"):
            assert run("verify", folder / "net.onnx", folder / name, *data) == 0
    assert "equals, value for value, the result of these steps" in capsys.readouterr().out
    again = ("-o", tmp_path / "again", "--data", folder / "data.npz")
    assert run("reproduce", folder / "int8.onnx.manifest.json", *again) == 0
    assert "int8.onnx: identical" in capsys.readouterr().out
    record = json.loads((folder / "int8.onnx.manifest.json").read_text())
    (step,) = [step for step in record["steps"] if step["name"] == "integer-io"]
    step["options"]["inputs"]["x"]["scale"] *= 2
    with pytest.raises(TargetError, match="stand for other numbers"):
        redo(load(folder / "int8.onnx"), "integer-io", step["options"])


def test_a_model_of_integers_goes_on_with_samples_of_floats_or_integers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, made = load(folder / "int8.onnx"), tmp_path / "further.onnx"
    assert run("deploy", folder / "int8.onnx", "-o", made, "--opset", 18, "--data", folder / "data.npz") == 0
    assert run("verify", folder / "net.onnx", made, "--via", folder / "int8.onnx", "--via", folder / "net.onnx") == 0
    said = capsys.readouterr().out
    assert "100.0 % of the answers are the same" in said or "of the answers are the same" in said
    floats = open_source(folder / "data.npz", model.proto)
    integers = interface_of(model).integers["x"].quantized(np.load(folder / "data.npz")["x"])
    assert inputs_of(model.proto)[0].sampled_as == np.float32
    for source in (floats, ArraySource({"x": integers})):
        (feed,) = feeds_for("", model, model, source)[:1]
        assert feed["x"].dtype == np.float32
    with pytest.raises(DataError, match="is int64 but the model's input is uint8"):
        open_source(ArraySource({"x": integers.astype(np.int64)}), model.proto)
    with pytest.raises(DataError, match="is float32"):
        open_source(ArraySource({"x": integers}), load(folder / "net.onnx").proto)


def test_a_model_of_integers_is_pruned_and_verified(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.onnx"
    data = ("--data", folder / "data.npz")
    assert run("prune", folder / "int8.onnx", "-o", small, "--target", "macs=0.6", *data, "--no-check-speed") == 0
    assert run("verify", folder / "int8.onnx", small, *data) == 0
    assert "verified" in capsys.readouterr().out
    assert interface_of(load(small)).integers == interface_of(load(folder / "int8.onnx")).integers


def test_a_manifest_of_an_earlier_version_is_reproduced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PHOTOGRAPH.replace("float[256,5] m)", "float[256,5] m, float[5] s)")
    load(from_text(text.replace("y = MatMul(f, m)", "g = Gemm(f, m) y = Mul(g, s)"))).save(tmp_path / "net.onnx")
    request = Deploy(
        model=tmp_path / "net.onnx",
        output=tmp_path / "old.onnx",
        data=str(folder / "data.npz"),
        int8=True,
        fold=True,
        samples=16,
        batch=1,
    )
    deploy_file(request, habits={"affine": False, "at_border": False, "apart": False})
    assert load(tmp_path / "old.onnx").graph.node[0].op_type == "Transpose"
    place = tmp_path / "old.onnx.manifest.json"
    record = json.loads(place.read_text())
    for step in record["steps"]:
        for names in (step["options"], step["options"].get("quantization", {})):
            for habit in ("affine", "at_border", "apart"):
                names.pop(habit, None)
    place.write_text(json.dumps(record))
    assert run("reproduce", place, "-o", tmp_path / "again", "--data", folder / "data.npz") == 0
    assert "old.onnx: identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"), [((), "give --int8 as well"), (("--half", "float16"), "give --int8 as well")]
)
def test_without_integers_the_option_is_refused(
    more: tuple[str, ...], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("deploy", folder / "net.onnx", "-o", tmp_path / "out.onnx", "--integer-io", *more) == 1
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not compiled.compiler(), reason="there is no C compiler")
def test_a_program_takes_and_gives_integers(photograph: Model, samples: ArraySource) -> None:
    wish = Deployment(batch=1, int8=Quantization(form="qoperator", samples=16), integer_io=True)
    with_floats = Deployment(batch=1, int8=Quantization(form="qoperator", samples=16))
    model, other = (deploy(photograph, each, samples).model for each in (wish, with_floats))
    source = c_source(model, "net")
    feeds = feeds_for("", model, model, samples)
    difference = c_difference(model, source, feeds)
    assert difference is not None
    assert difference.largest == 0
    found = interface_of(model).integers
    assert "extern uint8_t *const net_in_x; /* [1, 8, 8, 3] */" in source.header
    assert f"#define NET_IN_X_ZERO_POINT ({found['x'].zero_point})" in source.header
    (scale,) = re.findall(r"#define NET_OUT_Y_SCALE (.*)f", source.header)
    assert np.float32(scale) == np.float32(found["y"].scale)
    combed = comb(other)
    floats = MemoryModel(combed).arena(KeepMask(combed.atoms))
    assert (source.arena, floats) == (448, 960)  # a photograph of 192 numbers, and it or 256 integers


@pytest.mark.skipif(not compiled.compiler(), reason="there is no C compiler")
def test_a_program_is_compared_without_saturated_products() -> None:
    """Where onnxruntime does not optimise, some processors add pairs of 8-bit products in 16 bits."""
    text = "(float[1,64] x, float[64,64] w) => (float[1,64] y) { y = MatMul(x, w) }"
    rng = np.random.default_rng(0)
    model = load(from_text(text, values={"w": np.sign(rng.normal(size=(64, 64))) * rng.uniform(0.9, 1, (64, 64))}))
    source = ArraySource({"x": rng.uniform(0.9, 1, (16, 64)).astype(np.float32)})
    made = quantize_recorded(model, source, Quantization(form="qoperator", samples=16, per_channel=False))[0]
    difference = c_difference(made, c_source(made, "net"), feeds_for("", made, made, source))
    assert difference is not None
    assert difference.largest < 0.01
