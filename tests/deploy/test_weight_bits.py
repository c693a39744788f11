"""Weights in few bits: what a file holds, that it computes the same as the rounded model, and that it can be verified."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from cpd_onnx.budget.allocation import Prices
from cpd_onnx.budget.deployed import FewBits, few_bits, flash_terms
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.main import main
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.deploy.precision import in_four_bits, narrowest
from cpd_onnx.deploy.steps import Deployment, convert_opset, deploy, redo
from cpd_onnx.deploy.weight_bits import WeightBits, in_few_bits, rounded
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.fitting.units import units_of
from cpd_onnx.ir.model import Model, load
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.shapes.inference import fold
from tests.support.digits import MODELS, small_digits
from tests.support.models import from_text, in_constants
from tests.support.runs import plain

EXAMPLE = MODELS / "digits.onnx"
KINDS = (
    "(float[N,8,10,10] x, float[32,8,3,3] w, float[32] b, float[32,8,3,3] g, float[32,6,2,2] t, float[12] tb, "
    "float[40,12] m, float[40] mb, float[24,40] v) => (float[N,24] y) "
    "{ a = Conv(x, w, b) r = Relu(a) c = Conv<group=4>(r, g) s = Sigmoid(c) d = ConvTranspose<group=2>(s, t, tb) "
    "p = GlobalAveragePool(d) f = Flatten(p) e = Gemm<transB=1>(f, m, mb) h = Relu(e) q = Transpose(v) "
    "y = MatMul(h, q) }"
)


def random_model(text: str = KINDS, opset: int = 21, **values: Any) -> Model:
    rng = np.random.default_rng(3)
    model = load(from_text(text, opset=opset, values=values))
    for tensor in model.graph.initializer:
        if tensor.name not in values:
            model.set_array(tensor.name, rng.standard_normal(tuple(tensor.dims)).astype(np.float32) / 4)
    return model


def test_weights_in_constant_nodes_become_what_initializers_do(kinds: Model, source: ArraySource) -> None:
    moved = load(in_constants(kinds.complete_proto()))
    (one, said), (other, again) = (in_few_bits(model, source, WeightBits(4)) for model in (kinds, moved))
    assert said == again
    for name in one.names():
        if one.has(name):
            np.testing.assert_array_equal(one.array(name), other.array(name))
    redone = redo(moved, "weights", again, other)
    assert redone.serialize() == other.serialize()


@pytest.fixture
def kinds() -> Model:
    return random_model()


@pytest.fixture
def source() -> ArraySource:
    """Samples whose channels depend on each other, as those of real images do."""
    rng = np.random.default_rng(4)
    few = rng.standard_normal((192, 3, 10, 10))
    mixed = np.einsum("ij,njhw->nihw", rng.standard_normal((8, 3)), few)
    return ArraySource({"x": (mixed + 0.1 * rng.standard_normal(mixed.shape)).astype(np.float32)})


def answers(model: Model, source: ArraySource, count: int = 64) -> Any:
    feed = next(iter(source.batches(count)))
    return execute(open_model(model, optimise=False), {"x": feed["x"]})[0]


def test_the_file_holds_integers_and_computes_what_was_rounded(kinds: Model, source: ArraySource) -> None:
    made = rounded(kinds, source, WeightBits())
    packed, record = in_few_bits(kinds, source)
    assert set(record["weights"]) == {"w", "g", "t", "m", "v"} == set(made.integers)
    for name, (numbers, scales) in made.integers.items():
        assert packed.tensor(f"{name}.integers").data_type == TensorProto.INT4
        values = numbers.astype(np.int8)
        assert values.min() >= -8
        assert values.max() <= 7
        np.testing.assert_array_equal(values * scales, made.model.array(name))
        assert scales.size <= {"w": 32, "g": 32, "t": 12 * 16, "m": 40, "v": 24}[name]
        assert not packed.has(name)
    np.testing.assert_array_equal(answers(packed, source), answers(made.model, source))
    assert [info.name for info in packed.graph.output] == ["y"]


def test_fitted_weights_are_nearer_than_rounded_ones(kinds: Model, source: ArraySource) -> None:
    wanted = answers(kinds, source)
    nearest = kinds.copy()
    for name, axis in (("w", 0), ("g", 0), ("t", 1), ("m", 0), ("v", 0)):
        weight = kinds.array(name)
        others = tuple(place for place in range(weight.ndim) if place != axis)
        scale = np.abs(weight).max(axis=others, keepdims=True) / 7
        nearest.set_array(name, (np.rint(weight / scale) * scale).astype(np.float32))
    lost = [np.square(answers(model, source) - wanted).mean() for model in (in_few_bits(kinds, source)[0], nearest)]
    assert lost[0] < 0.3 * lost[1]


def test_onnxruntime_computes_the_weights_once(tmp_path: Path, kinds: Model, source: ArraySource) -> None:
    in_few_bits(kinds, source)[0].save(tmp_path / "bits.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(str(tmp_path / "bits.onnx"), options, providers=["CPUExecutionProvider"])
    assert "Cast" not in {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}


def test_eight_bits_need_no_newer_opset(source: ArraySource) -> None:
    model = random_model(opset=17)
    packed, _ = in_few_bits(model, source, WeightBits(bits=8))
    assert packed.opset == 17
    wanted = answers(model, source)
    assert np.abs(answers(packed, source) - wanted).max() < 0.02 * np.ptp(wanted)
    with pytest.raises(UnsupportedError, match="need opset 21 and the model has 17"):
        in_few_bits(model, source)


def test_some_weights_have_eight_bits(kinds: Model, source: ArraySource) -> None:
    packed, _ = in_few_bits(kinds, source, WeightBits(wide=("m", "unknown")))
    found = {name: packed.tensor(f"{name}.integers").data_type for name in "wgtmv"}
    assert found == dict.fromkeys("wgtv", TensorProto.INT4) | {"m": TensorProto.INT8}


def test_the_bytes_are_the_same_each_time(kinds: Model, source: ArraySource) -> None:
    assert in_few_bits(kinds, source)[0].serialize() == in_few_bits(kinds, source)[0].serialize()


def test_what_stays_is_said() -> None:
    model = random_model(
        "(float[N,16] x, float[16,16] w, float[16,16] u, float[16,4] s) => (float[N,4] y) "
        "{ m = Cos(x) t = ReduceSum<keepdims=0, noop_with_empty_axes=0>(m) a = Gemm(x, w, t) c = MatMul(a, u) "
        "y = MatMul(c, s) }"
    )
    model.graph.input.append(onnx.helper.make_tensor_value_info("u", TensorProto.FLOAT, [16, 16]))
    rng = np.random.default_rng(0)
    samples = ArraySource({"x": rng.standard_normal((64, 16)).astype(np.float32)})
    with pytest.raises(UnsupportedError, match="no float32 weight of an operator has 256 elements or more, like"):
        in_few_bits(model, samples)
    del model.graph.input[1:]
    notes: list[str] = []
    packed, record = in_few_bits(model, samples, notify=notes.append)
    assert record["weights"] == ["u"]
    assert notes == ["weights that stay as they are: 1, like 'w': with a computed bias"]
    assert packed.has("w")
    assert packed.has("s")


TABLES = (
    "(int64[N,T] x, float[100,32] e, float[100,2] a, int64[1] one, float[1,96,32] w, float[1,96,24] r, float[24,24] u, float[24,40] v) "
    "=> (float[T,N,40] y, float[N,T,2] z) "
    "{ g = Gather(e, x) k = Cos(g) n = Gather(a, x) z = Neg(n) q = Transpose<perm=[1,0,2]>(k) "
    "l, h = LSTM<hidden_size=24>(q, w, r) o = Squeeze(l, one) i = MatMul(o, u) j = Relu(i) c = MatMul(j, u) y = MatMul(c, v) }"
)


def tables() -> tuple[Model, ArraySource]:
    """Return a model with a lookup table, an LSTM, a weight of two nodes and a list of points, and its samples."""
    samples = ArraySource({"x": np.random.default_rng(5).integers(0, 100, (96, 6))})
    return random_model(TABLES, one=np.array([1])), samples


def test_tables_gates_and_shared_weights_are_rounded_in_eight_bits() -> None:
    model, source = tables()
    notes: list[str] = []
    packed, record = in_few_bits(model, source, notify=notes.append)
    assert record["tables"] == ["u", "e", "w", "r"]
    assert record["weights"] == ["v"]
    assert set(record["values"]) == {"v.integers", "v.scale"}
    assert "like 'u'" in notes[0]
    assert packed.has("a")
    for name, shape in {"e": (100, 1), "w": (1, 96, 1), "r": (1, 96, 1), "u": (24, 1)}.items():
        assert packed.tensor(f"{name}.integers").data_type == TensorProto.INT8
        assert packed.array(f"{name}.scale").shape == shape
        step = packed.array(f"{name}.scale")
        assert np.abs(packed.array(f"{name}.integers") * step - model.array(name)).max() <= 0.51 * step.max()
    feed = next(iter(source.batches(64)))
    wide = in_few_bits(model, source, WeightBits(bits=8))[0]
    (wanted, same), (found, other) = (execute(open_model(each), {"x": feed["x"]}) for each in (model, wide))
    assert np.abs(found - wanted).max() < 0.02 * np.ptp(wanted)
    np.testing.assert_array_equal(same, other)


def test_tables_are_rounded_again_without_the_file() -> None:
    model, source = tables()
    packed, record = in_few_bits(model, source)
    again = redo(model, "weights", record, packed)
    assert again.serialize() == packed.serialize()
    edited = packed.copy()
    edited.set_array("e.integers", np.zeros_like(packed.array("e.integers")))
    assert redo(model, "weights", record, edited).serialize() == packed.serialize() != edited.serialize()
    for names in (["missing"], ["a"]):
        with pytest.raises(TargetError, match="does not have the"):
            redo(model, "weights", record | {"tables": names}, packed)


def test_a_target_of_bytes_counts_tables() -> None:
    model, source = tables()
    form = in_four_bits(model, source, WeightBits())
    assert abs(form.size_of(model) - len(form(model).serialize())) < 100
    full = Prices(comb(model), ("bytes",), stored_as=str(FewBits(form.mean, 0))).full("bytes")
    held = sum(len(tensor.raw_data) for tensor in form(model).complete_proto().graph.initializer)
    assert abs(full - held) < 0.01 * held


def test_a_file_with_tables_in_few_bits_is_combed_as_before() -> None:
    model, source = tables()
    packed = in_few_bits(model, source)[0]
    removable = [sum(len(group.channels) for group in comb(each).groups) for each in (model, packed)]
    assert removable[0] == removable[1] > 0


def test_undefined_weights_stay(kinds: Model, source: ArraySource) -> None:
    kinds.set_array("v", np.full((24, 40), np.nan, np.float32))
    assert "v" not in in_few_bits(kinds, source)[1]["weights"]


def test_weights_are_rounded_to_nearest_where_samples_give_no_numbers(kinds: Model, source: ArraySource) -> None:
    nothing = ArraySource({"x": np.full((32, 8, 10, 10), np.nan, np.float32)})
    found, wanted = rounded(kinds, nothing, WeightBits()), rounded(kinds, None, WeightBits())
    assert found.integers.keys() == wanted.integers.keys()
    for name, (numbers, scales) in wanted.integers.items():
        np.testing.assert_array_equal(found.integers[name][0].astype(np.int8), numbers.astype(np.int8))
        np.testing.assert_array_equal(found.integers[name][1], scales)
    assert set(found.errors.values()) == {np.inf}


def test_samples_and_numbers_are_checked(kinds: Model, source: ArraySource) -> None:
    with pytest.raises(TargetError, match="weights can have 4 or 8 bits, got 3"):
        WeightBits(bits=3)
    with pytest.raises(DataError, match="give data"):
        deploy(kinds, Deployment(weights=WeightBits()))
    with pytest.raises(TargetError, match="choose one"):
        Deployment(weights=WeightBits(), half="float16")
    packed = in_few_bits(kinds, source)[0]
    with pytest.raises(UnsupportedError, match="no float32 weight"):
        in_few_bits(packed, source)


# Verification.


def test_the_step_is_repeated_with_the_values_of_the_file(kinds: Model, source: ArraySource) -> None:
    made = deploy(kinds, Deployment(weights=WeightBits()), source)
    (step,) = made.steps
    assert step.name == "weights"
    assert step.options is not None
    assert redo(kinds, "weights", step.options, made.model).serialize() == made.model.serialize()
    with pytest.raises(TargetError, match="only known from the file"):
        redo(kinds, "weights", step.options)
    for name in ("w.integers", "w.scale", "b"):
        other = made.model.copy()
        other.set_array(name, np.zeros_like(other.array(name)))
        with pytest.raises(TargetError, match=f"does not hold the values of '{name}'"):
            redo(kinds, "weights", step.options, other)
    smaller = random_model(KINDS.replace("float[40,12] m", "float[40,12] other").replace("f, m, mb", "f, other, mb"))
    with pytest.raises(TargetError, match="does not have the weights"):
        redo(smaller, "weights", step.options, made.model)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(small_digits(), tmp_path / "digits.onnx")
    arrays = dict(np.load(MODELS / "digits_train.npz"))
    np.savez(tmp_path / "train.npz", **{name: array[:256] for name, array in arrays.items()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> int:
    return main(plain([*map(str, arguments)]))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_a_file_is_made_verified_and_repeated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("deploy", "digits.onnx", "-o", "bits.onnx", "--weight-bits", 4, "--data", "train.npz", "--samples", 128)
    assert run(*asked) == 0
    assert "weights stored in 4 bits, fitted to 128 samples" in said(capsys)
    assert (folder / "bits.onnx").stat().st_size < 0.25 * (folder / "digits.onnx").stat().st_size
    assert run("verify", "digits.onnx", "bits.onnx") == 0
    assert "result of these steps, except for 2 weights fitted to samples" in said(capsys)
    assert run("reproduce", "bits.onnx.manifest.json", "-o", "again") == 0
    assert (folder / "again" / "bits.onnx").read_bytes() == (folder / "bits.onnx").read_bytes()

    proto = onnx.load(folder / "bits.onnx")
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name == "head.weight.scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
    onnx.save(proto, folder / "bits.onnx")
    capsys.readouterr()
    assert run("verify", "digits.onnx", "bits.onnx") != 0
    assert "does not hold the values of 'head.weight.scale' that were recorded" in said(capsys)


def test_a_node_that_was_changed_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", "digits.onnx", "-o", "bits.onnx", "--weight-bits", 8, "--data", "train.npz") == 0
    proto = onnx.load(folder / "bits.onnx")
    next(node for node in proto.graph.node if node.op_type == "Relu").op_type = "Sigmoid"
    onnx.save(proto, folder / "bits.onnx")
    capsys.readouterr()
    assert run("verify", "digits.onnx", "bits.onnx") != 0
    assert "is not the result of the steps of its manifest" in said(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weight-bits", 3, "--data", "train.npz"), "'3' is not 4 or 8"),
        (("--weight-bits", 4), "--weight-bits needs samples that weights are fitted to"),
        (("--wide-weight", "head.weight", "--fold"), "--wide-weight has no effect without --weight-bits"),
        (("--weight-bits", 4, "--data", "train.npz", "--c-source", "m.c"), "give --int8 for these"),
        (("--weight-bits", 4, "--data", "train.npz", "--int8"), "choose one"),
    ],
)
def test_options_without_sense_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], message: str
) -> None:
    with contextlib.suppress(SystemExit):
        assert run("deploy", "digits.onnx", "-o", "bits.onnx", *words) != 0
    assert message in said(capsys)
    assert not (folder / "bits.onnx").exists()


# The choice of a form, and the bytes that it takes.


def test_weights_with_the_largest_errors_get_eight_bits_first(kinds: Model, source: ArraySource) -> None:
    seen: list[tuple[str, ...]] = []

    def loss(model: Model) -> float:
        integers = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".integers")]
        wide = [t.name.removesuffix(".integers") for t in integers if t.data_type == TensorProto.INT8]
        seen.append(tuple(wide))
        return 1.0 / (1 + len(wide))

    form = narrowest(kinds, source, WeightBits(), loss, 0.4)
    assert form is not None
    assert [len(wide) for wide in seen] == [0, 1, 2]
    assert set(form.options.wide) == set(seen[-1])
    assert form.what == "weights in 4 bits, 2 of 5 in 8"
    assert 4 < form.mean < 8
    errors = rounded(form.prepared(kinds), source, replace(form.quick, wide=())).errors
    assert set(form.options.wide) == set(sorted(errors, key=lambda name: -errors[name])[:2])
    everything = narrowest(kinds, source, WeightBits(), loss, 0.2)
    assert everything is not None
    assert (everything.options.bits, everything.options.wide, everything.mean) == (8, (), 8.0)
    assert narrowest(kinds, source, WeightBits(), loss, 0.1) is None


def test_a_target_of_bytes_counts_the_file_as_it_is_written() -> None:
    model = convert_opset(load(EXAMPLE), 21)
    rng = np.random.default_rng(0)
    samples = ArraySource({"image": rng.standard_normal((64, 1, 8, 8)).astype(np.float32)})
    form = in_four_bits(model, samples, WeightBits())
    assert form.size_of(model) == len(form(model).serialize())
    stored = FewBits(form.mean, 1234)
    assert few_bits(str(stored)) == stored
    full = Prices(comb(model), ("bytes",), stored_as=str(stored)).full("bytes")
    held = sum(len(tensor.raw_data) for tensor in form(model).complete_proto().graph.initializer)
    assert abs(full - 1234 - held) < 0.01 * held


def test_a_program_has_the_weights_as_floats(kinds: Model, source: ArraySource) -> None:
    def flash(model: Model, kind: str) -> float:
        terms = flash_terms(comb(model), kind)
        return float(sum(factor * np.prod([len(axis) for axis in axes]) for factor, axes in terms))

    packed = in_few_bits(kinds, source)[0]
    for kind in ("", "float16"):
        assert 0.9 * flash(kinds, kind) < flash(packed, kind) < 1.2 * flash(kinds, kind)


# Further uses.


def test_a_file_in_few_bits_is_pruned_and_repaired(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", "digits.onnx", "-o", "bits.onnx", "--weight-bits", 4, "--data", "train.npz", "--fold") == 0
    wanted = ("prune", "bits.onnx", "-o", "small.onnx", "--target", "macs=0.6", "--data", "train.npz", "--json", "-")
    capsys.readouterr()
    assert run(*wanted, "--keep-anyway", "--effort", 0) == 0
    content = json.loads(capsys.readouterr().out)
    fitted = {fit["weight"] for fit in content["repaired"]["fitted"]}
    assert any(name.endswith(".integers") for name in fitted)
    assert run("verify", "bits.onnx", "small.onnx") == 0


def test_only_products_by_element_scale_a_weight(source: ArraySource) -> None:
    text = (
        "(float[N,24] x, int8[24,16] w, float[16,16] s, float[16] b) => (float[N,16] y) "
        "{ c = Cast<to=1>(w) m = OP(c, s) p = MatMul(x, m) y = Add(p, b) }"
    )
    found = {}
    for operator, shape in (("Mul", "float[1,16] s"), ("MatMul", "float[16,16] s")):
        model = load(from_text(text.replace("OP", operator).replace("float[16,16] s", shape)))
        found[operator] = [unit.weight for unit in units_of(fold(model)).found]
    assert found["Mul"] == ["w"]
    assert "w" not in found["MatMul"]


@pytest.mark.parametrize("precision", ["int4", "auto"])
def test_channels_and_bits_are_chosen_for_one_size(
    folder: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    size = (folder / "digits.onnx").stat().st_size
    asked = ("--target", "bytes=0.15", "--precision", precision, "--data", "train.npz", "--json", "-", "--no-report")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *asked, "--no-distill", "--keep-anyway") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["precision"]["what"] == "weights in 4 bits"
    assert abs((folder / "small.onnx").stat().st_size - 0.15 * size) < 0.02 * size
    assert content["bytes"]["after"] == (folder / "small.onnx").stat().st_size
    assert content["after"]["macs"] > 0.5 * content["before"]["macs"]
    assert run("verify", "digits.onnx", "small.onnx") == 0


def test_a_program_has_no_weights_in_four_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--target", "flash=0.5", "--precision", "int4", "--data", "train.npz")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *asked) != 0
    assert "give a target of bytes, or --precision int8" in said(capsys)
