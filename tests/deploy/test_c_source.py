"""C source: its outputs are the model's, its memory is the predicted one, and no name in a file becomes code."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import subprocess
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.memory import MemoryModel
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.main import main
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.deploy import c_source as generated
from cpd_onnx.deploy import compiled
from cpd_onnx.deploy import quantize as quantising
from cpd_onnx.deploy.c_source import CSource, c_source
from cpd_onnx.deploy.quantize import Quantization, quantize
from cpd_onnx.deploy.steps import c_difference, c_measured, fix_batch, fold_constants
from cpd_onnx.errors import ProofError, TargetError, UnsupportedError
from cpd_onnx.ir.model import Model, load
from cpd_onnx.runtime.sessions import Feed, working_feeds
from cpd_onnx.runtime.sessions import open_model as opened
from cpd_onnx.shapes.inference import fold
from cpd_onnx.workflow.evidence.repeating import pinned
from tests.support.models import from_text

MODELS = Path(__file__).parents[2] / "models"
EXAMPLE, TRAIN = MODELS / "digits.onnx", MODELS / "digits_train.npz"
has_compiler = pytest.mark.skipif(not compiled.compiler(), reason="there is no C compiler")

RESIDUAL = (
    "(float[1,3,8,8] x, float[6,3,3,3] w, float[6] b, float[6,6,1,1] v, float[24,5] m, float[5] n) "
    "=> (float[1,5] y, float[1,6,8,8] s) "
    "{ h = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(h) c = Conv(r, v) s = Add(c, r) k = Constant<value_ints=[1,24]>() "
    "p = AveragePool<kernel_shape=[4,4],strides=[4,4]>(s) f = Reshape(p, k) y = Gemm(f, m, n) }"
)


TEMPLATES: dict[str, Any] = {}


def environment(**options: Any) -> Any:
    """Return the one environment of jinja2 for all runs, which holds the compiled templates."""
    if not TEMPLATES:
        TEMPLATES["all"] = import_module("jinja2").Environment(**options)
    return TEMPLATES["all"]


@pytest.fixture
def own_process() -> None:
    """For tests of the generator as users run it."""


@pytest.fixture(autouse=True)
def generator_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the generator in this process, which keeps its templates: to import and compile them takes three seconds."""
    if "own_process" in request.fixturenames:
        return
    real = subprocess.run

    def run_here(command: Sequence[str], **options: Any) -> Any:
        if list(command[1:3]) != ["-m", generated._GENERATOR]:
            return real(command, **options)
        emitter = import_module(f"{generated._GENERATOR}.codegen.c_emitter")
        monkeypatch.setattr(emitter, "Environment", environment)
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            code = import_module(f"{generated._GENERATOR}.cli").main(command[3:])
        return subprocess.CompletedProcess(command, code, said.getvalue(), "")

    monkeypatch.setattr(generated.subprocess, "run", run_here)


def feeds_of(model: Model, count: int = 2) -> list[Feed]:
    return list(working_feeds(fold(model), opened(model), count))


def require_equal(model: Model, name: str = "net") -> CSource:
    """Return the source of a model after comparing its outputs with those of onnxruntime."""
    source = c_source(model, name)
    difference = c_difference(model, source, feeds_of(model))
    assert difference is not None
    assert difference.largest < 1e-4
    return source


@has_compiler
@pytest.mark.usefixtures("own_process")
def test_the_program_gives_the_outputs_of_the_model_in_the_predicted_memory() -> None:
    model = load(from_text(RESIDUAL))
    source = require_equal(model)
    combed = comb(model)
    assert source.arena == MemoryModel(combed).arena(KeepMask(combed.atoms))
    assert source.constants == sum(4 * np.prod(t.dims) for t in model.graph.initializer)
    assert [port.name for port in source.inputs] == ["x"]
    assert [port.name for port in source.outputs] == ["y", "s"]
    assert "malloc" not in source.text


@has_compiler
def test_average_pooling_is_right_at_all_levels_of_optimisation() -> None:
    # GCC 12 at -O2 gave zeros where it knew the addresses of both tensors
    text = "(float[1,10,16,32] x) => (float[1,10,8,16] y) { y = AveragePool<kernel_shape=[2,2],strides=[2,2]>(x) }"
    require_equal(load(from_text(text)))


@has_compiler
def test_integers_and_several_inputs() -> None:
    require_equal(
        load(
            from_text(
                "(int64[1,4] xi, float[1,4] x, float[9,4] table) => (float[1,4,4] y) "
                "{ e = Gather(table, xi) a = Constant<value_ints=[2]>() u = Unsqueeze(x, a) y = Mul(e, u) }"
            )
        )
    )


@has_compiler
def test_an_absent_input_may_be_an_empty_tensor() -> None:
    sizes = numpy_helper.from_array(np.array([1, 2, 8, 8], np.int64), "sizes")
    empty = [numpy_helper.from_array(np.zeros(0, np.float32), name) for name in ("roi", "scales")]
    node = helper.make_node("Resize", ["x", "roi", "scales", "sizes"], ["y"], mode="nearest")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2, s, s]) for n, s in (("x", 4), ("y", 8))]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], [*empty, sizes])
    require_equal(load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)))


NAMES = (
    "*/ int main(void) { return 1; } /*",
    "a" * 300,
    "1 + 1",
    "int",
    'x"\n#include </etc/passwd>',
    "ü",
    "u",
    "U",
    "_n7",
)


@has_compiler
def test_no_name_becomes_code() -> None:
    tensors = ["x y", *NAMES]
    weights = [numpy_helper.from_array(np.full(3, 2, np.float32), f"w {name}") for name in NAMES]
    nodes = [
        helper.make_node("Mul", [source, f"w {name}"], [name], name=f"{name} ", doc_string=name)
        for source, name in itertools.pairwise(tensors)
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in (tensors[0], *tensors[-2:])]
    graph = helper.make_graph(nodes, NAMES[0], ports[:1], ports[1:], weights, doc_string=NAMES[0])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name=NAMES[0])
    helper.set_model_props(proto, {"note": NAMES[0]})
    for prefix in (NAMES[0], "ü", "7"):
        source = require_equal(load(proto), prefix)
        defined = [source.name, *(port.variable for port in (*source.inputs, *source.outputs))]
        assert all(re.fullmatch(r"[A-Za-z_]\w{0,62}", word, re.ASCII) for word in defined)
        assert "passwd" not in re.sub(r"\w*etc_passwd\w*", "", source.text)


@pytest.mark.parametrize("place", ["attribute", "domain", "constant", "tensor"])
def test_no_other_text_becomes_code(place: str) -> None:
    text = "*/ int main(void) { return 1; } /*"
    proto = from_text("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    if place == "attribute":
        proto.graph.node[0].attribute.append(helper.make_attribute("mode", text))
    elif place == "domain":
        proto.opset_import.append(helper.make_opsetid(text, 1))
    elif place == "tensor":
        number = helper.make_tensor(text, TensorProto.FLOAT, [1], [0.0])
        shape = numpy_helper.from_array(np.array([2, 3], np.int64), "shape")
        proto.graph.node.insert(0, helper.make_node("Constant", [], ["shape"], value=shape))
        proto.graph.node.insert(1, helper.make_node("ConstantOfShape", ["shape"], ["unused"], value=number))
    else:
        words = helper.make_tensor("words", TensorProto.STRING, [1], [text.encode()])
        proto.graph.node.insert(0, helper.make_node("Constant", [], ["words"], value=words))
    with pytest.raises(UnsupportedError, match="C source cannot hold the text"):
        c_source(load(proto), "net")


def test_the_same_model_gives_the_same_bytes() -> None:
    model = load(from_text(RESIDUAL))
    assert c_source(model, "net") == c_source(model, "net")


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (
            "(float[N,3] x, float[3,4] w) => (float[N,4] y) { y = MatMul(x, w) }",
            TargetError,
            "C source needs fixed sizes, and input 'x' has none: give --batch 1 or --fix",
        ),
        (
            "(float[4] x) => (int64[1,M] y) { y = NonZero(x) }",
            TargetError,
            "C source needs fixed sizes, and tensor 'y' has none",
        ),
        (
            "(float16[4] x) => (float16[4] y) { y = Relu(x) }",
            UnsupportedError,
            "C source cannot have inputs and outputs of type float16: 'x'",
        ),
    ],
)
def test_what_cannot_be_written_as_c(text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)):
        c_source(load(from_text(text)), "net")


def test_an_operator_that_the_generator_does_not_know_is_told_in_one_line() -> None:
    node = helper.make_node("Fancy", ["x"], ["y"], domain="my.domain")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("x", "y")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.domain", 1)]
    model = load(helper.make_model(helper.make_graph([node], "g", ports[:1], ports[1:]), opset_imports=opsets))
    with pytest.raises((TargetError, UnsupportedError)) as caught:
        c_source(model, "net")
    assert "\n" not in str(caught.value)


def test_a_missing_generator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match=re.escape("pip install 'cpd-onnx[c]'")):
        c_source(load(from_text(RESIDUAL)), "net")


def test_without_a_compiler_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_COMPILERS", ())
    monkeypatch.delenv("CC", raising=False)
    assert c_measured(load(from_text(RESIDUAL)), "net")[1] is None


@has_compiler
def test_a_program_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(from_text(RESIDUAL))
    source = c_source(model, "net")
    wrong = CSource(**{**vars(source), "text": source.text.replace("a > 0.0f", "a > 0.1f")})
    assert wrong.text != source.text
    with pytest.raises(ProofError, match="the C source changes the outputs by"):
        c_difference(model, wrong, feeds_of(model))


@has_compiler
def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(from_text(RESIDUAL))
    wrong = CSource(**{**vars(c_source(model, "net")), "text": "#error no\n"})
    with pytest.raises(UnsupportedError, match="the C compiler rejects the source"):
        c_difference(model, wrong, feeds_of(model))


def test_a_program_does_not_run_on_what_onnxruntime_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "(float[1,8] x) => (float[1,8] y) { i = Constant<value=int64[1,1]{99999}>() "
        "v = Constant<value=float[1,1]{1.0}>() y = ScatterElements<axis=1>(x, i, v) }"
    )
    model = load(from_text(text))
    ran: list[Any] = []
    monkeypatch.setattr(compiled, "_run", lambda *given: ran.append(given))
    with pytest.raises(UnsupportedError):
        c_difference(model, c_source(model, "net"), [{"x": np.zeros((1, 8), np.float32)}])
    assert not ran


# Integer operators.


def test_a_quantised_model_of_integer_operators_is_pruned(small: Path, tmp_path: Path) -> None:
    float_one, place, data = tmp_path / "float.onnx", tmp_path / "net.onnx", small.parent / "data.npz"
    proto = load(small).complete_proto()
    del proto.graph.output[1]  # its channels could not be removed
    load(proto).save(float_one)
    assert run("deploy", float_one, "-o", place, "--int8", "--int8-form", "qoperator", "--data", data) == 0
    operators = {node.op_type for node in load(place).graph.node}
    assert {"QLinearConv", "QLinearAveragePool", "QLinearAdd"} <= operators
    assert "emx-onnx-cgen" not in json.loads((tmp_path / "net.onnx.manifest.json").read_text())["versions"]
    state = cpd.run("comb, score{kind='l2'}, allocate{macs=0.6}, prune, verify", place)
    assert state.verification is not None
    assert state.verification.passed
    assert state.allocation.after.macs < 0.7 * state.allocation.before.macs


def test_the_other_form_quantises_the_operators_of_onnxruntime_alone() -> None:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    known = {*QDQRegistry, *QLinearOpsRegistry}
    assert set(quantising._quantised_operators(Quantization())) <= known
    assert "Expand" in set(quantising._quantised_operators(Quantization(form="qoperator"))) - known


def test_slices_and_pads_of_integers_stay_integers() -> None:
    # two Pads share their number, which onnxruntime's quantiser replaces for both
    text = (
        "(float[1,4,8,8] x, float[4,4,1,1] w, float[4] b) => (float[1,8,4,4] y) {"
        " a = Conv(x, w, b) st = Constant<value_ints=[0,0]>() en = Constant<value_ints=[8,8]>() ax = Constant<value_ints=[2,3]>()"
        " by = Constant<value_ints=[2,2]>() s = Slice(a, st, en, ax, by) zero = Constant<value_float=0.0>()"
        " before = Constant<value_ints=[0,1,0,0,0,3,0,0]>() after = Constant<value_ints=[0,3,0,0,0,1,0,0]>()"
        " p = Pad(s, before, zero) q = Pad(s, after, zero) y = Add(p, q) }"
    )
    rng = np.random.default_rng(0)
    source = ArraySource({"x": rng.normal(size=(16, 4, 8, 8)).astype(np.float32)})
    quantised = quantize(load(from_text(text)), source, Quantization(form="qoperator", samples=16))
    assert not {node.op_type for node in quantised.graph.node[1:-1]} & {"QuantizeLinear", "DequantizeLinear"}


@has_compiler
@pytest.mark.parametrize("rank", [2, 3])
def test_a_product_of_integers_may_have_a_scale_for_each_column(rank: int) -> None:
    sizes = ",".join("24"[: rank - 1])
    text = (
        f"(float[{sizes},7] x, float[7,6] w, float[6,5] v) => (float[{sizes},5] y) "
        "{ h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    )
    rng = np.random.default_rng(0)
    model = load(from_text(text, values={"v": rng.normal(size=(6, 5)) * [0.1, 1, 3, 1, 0.01]}))
    shape = (32, *(int(size) for size in sizes.split(",")[1:]), 7)
    source = ArraySource({"x": rng.normal(size=shape).astype(np.float32)})
    quantised = quantize(model, source, Quantization(form="qoperator", samples=16))
    scales = [quantised.array(node.input[4]).size for node in quantised.graph.node if node.op_type == "QLinearMatMul"]
    assert scales == [6, 5]
    written = c_source(quantised, "net")
    difference = c_difference(quantised, written, feeds_of(quantised))
    assert difference is not None
    assert difference.largest < 1e-6
    assert (
        written.arena
        == c_source(quantize(model, source, Quantization(form="qoperator", samples=16, per_channel=False)), "net").arena
    )
    assert [name for name in written.nodes if "MatMul" in name] == [
        n.name for n in quantised.graph.node if n.op_type == "QLinearMatMul"
    ]


# Folding.


def test_pads_that_are_computed_become_constants() -> None:
    model = load(
        from_text(
            "(float[N,3,5,5] x, float[4,3,3,3] w) => (float[N,4,H,W] y) { s = Shape(x) i = Constant<value_ints=[2,3]>() "
            "hw = Gather(s, i) two = Constant<value_ints=[4,4]>() d = Sub(hw, two) z = Constant<value_ints=[0,0]>() "
            "pads = Concat<axis=0>(z, d, z, d) p = Pad(x, pads) y = Conv(p, w) }"
        )
    )
    folded = fold_constants(fix_batch(model, 1))
    assert [node.op_type for node in folded.graph.node if node.op_type not in ("Pad", "Conv")] == []
    assert {"x", "y"} == {folded.graph.input[0].name, folded.graph.output[0].name}


def test_nodes_stay_in_their_order(digits: Model) -> None:
    place = {name: number for number, node in enumerate(digits.graph.node) for name in node.output}
    folded = fold_constants(fix_batch(digits, 1))
    assert len(folded.graph.node) < len(digits.graph.node)
    places = [place[node.output[0]] for node in folded.graph.node]
    assert places == sorted(places)


@pytest.fixture
def digits() -> Model:
    return load(EXAMPLE)


# The command.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model small enough to be written as C in a second, and samples for it."""
    folder = tmp_path_factory.mktemp("small")
    path = folder / "small.onnx"
    load(from_text(RESIDUAL.replace("float[1,3,8,8] x", "float[N,3,8,8] x").replace("[1,24]", "[-1,24]"))).save(path)
    np.savez(folder / "data.npz", x=np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32))
    return path


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


@has_compiler
@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize("more", [(), ("--int8", "--samples", "32")])
def test_deploy_writes_c_and_verify_repeats_it(
    small: Path, tmp_path: Path, more: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", small.parent / "data.npz") if more else ()
    original = tmp_path / "small.onnx"
    original.write_bytes(small.read_bytes())
    place = tmp_path / "net.c"
    assert run("deploy", original, "-o", tmp_path / "net.onnx", "--batch", "1", "--c-source", place, *more, *data) == 0
    assert "net.c, " in capsys.readouterr().out
    record = json.loads((tmp_path / "net.onnx.manifest.json").read_text())
    roles = {entry["role"]: entry["file"] for entry in record["outputs"]}
    assert roles == {"model": "net.onnx", "c": "net.c", "c-header": "net.h"}
    assert any(line.startswith("emx-onnx-cgen==") for line in pinned(record["versions"]))
    assert record["steps"][-1]["difference"]["largest"] < 1e-4 if not more else True
    operators = {node.op_type for node in load(tmp_path / "net.onnx").graph.node}
    assert ("QLinearConv" in operators) == bool(more)
    assert run("verify", original, place, *data) == 0
    assert "net.c equals, byte for byte, the result of these steps" in capsys.readouterr().out
    again = ("-o", tmp_path / "again", *(("--data", data[1]) if data else ()))
    assert run("reproduce", tmp_path / "net.onnx.manifest.json", *again) == 0
    assert "net.c: identical" in capsys.readouterr().out
    place.write_text(place.read_text() + "/* more */\n")
    assert run("verify", original, place) != 0
    assert "net.c has changed since it was written" in capsys.readouterr().err


def test_an_existing_header_is_not_overwritten(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.h").write_text("mine")
    assert run("deploy", small, "-o", tmp_path / "net.onnx", "--batch", "1", "--c-source", tmp_path / "net.c") != 0
    assert "net.h" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["net.h"]
