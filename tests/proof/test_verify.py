"""`verify` reads every value of the file that it is given, and follows what was deployed back to the original."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.cli.main import main
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.errors import InconclusiveError, PlanError, ProofError
from cpd_onnx.ir.model import Model, load
from cpd_onnx.ir.tensors import changed_values, stored_tensors, values_sha256
from cpd_onnx.passes.prune import apply
from cpd_onnx.proof.files import verify_files
from cpd_onnx.report import manifest
from cpd_onnx.rewrite.plan import Plan, schema
from cpd_onnx.workflow.evidence.chain import manifest_of, verify_deployed
from tests.support.edits import edited, nested, other_value
from tests.support.models import from_text
from tests.support.runs import plain

CASES = Path(os.environ.get("CPD_DATA", Path(__file__).parents[3] / "shared" / "data")).parent / "cases" / "verify"
PRUNED = "comb, score, allocate{channels=0.5}, prune"
Edit = Callable[[ModelProto], Any]


@pytest.fixture(scope="module")
def pruned() -> tuple[Model, ModelProto, Plan]:
    """A model with weights in all places, what is left of it, and the plan."""
    original = load(nested())
    state = cpd.run(PRUNED, original)
    return original, state.model.complete_proto(), state.plan


def complaint(original: Model, proto: ModelProto | Path, plan: Plan) -> str:
    """What `verify` has against a file."""
    with pytest.raises(ProofError) as caught:
        verify_files(original, load(proto), plan)
    return str(caught.value)


def changed(proto: ModelProto, edit: Edit) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(proto)
    edit(made)
    return made


# Edits that must be named.


def node(proto: ModelProto, kind: str) -> Any:
    return next(n for n in proto.graph.node if n.op_type == kind)


def branch(proto: ModelProto, name: str) -> Any:
    return next(a.g for a in node(proto, "If").attribute if a.name == name)


def tensor(proto: ModelProto, name: str) -> Any:
    return next(t for t in proto.graph.initializer if t.name == name)


def stored(target: Any, function: Callable[[Any], Any]) -> None:
    """Give a tensor other values."""
    array = numpy_helper.to_array(target)
    made = np.asarray(function(array.copy()), array.dtype).reshape(array.shape)
    target.CopyFrom(numpy_helper.from_array(made, target.name))


def with_element(value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array.reshape(-1)[-1] = value
        return array

    return change


def swapped(entries: Any) -> None:
    first, second = (type(entries[0])() for _ in range(2))
    first.CopyFrom(entries[0])
    second.CopyFrom(entries[1])
    entries[0].CopyFrom(second)
    entries[1].CopyFrom(first)


def stored_twice(proto: ModelProto) -> None:
    target = tensor(proto, "w")
    target.float_data.extend(-numpy_helper.to_array(target).ravel())


def unknown_field(proto: ModelProto) -> None:
    target = node(proto, "MatMul")
    target.ParseFromString(target.SerializeToString() + b"\xfa\x3f\x03abc")  # field 1023
    assert b"abc" in target.SerializeToString()


EDITS: dict[str, tuple[Edit, str]] = {
    "permuted": (lambda m: stored(tensor(m, "w"), lambda a: a[::-1]), r"initializer 'w' \(input 1 of MatMul 'h'\)"),
    "zeroed": (lambda m: stored(tensor(m, "v"), lambda a: 0 * a), r"initializer 'v' .* values differ"),
    "one nan": (lambda m: stored(tensor(m, "w"), with_element(np.nan)), r"'w'.* -> nan at \[5, 3\]; 1 of 24"),
    "the sign of a zero": (lambda m: stored(node(m, "Constant").attribute[0].t, lambda a: -a), r"'zero'.*: 0.0 -> -0.0"),
    "a bound": (lambda m: stored(tensor(m, "limit"), lambda a: 0 * a), r"'limit' \(input 2 of Clip 'k'\): 6.0 -> 0.0"),
    "a number of a Constant": (
        lambda m: setattr(next(n for n in m.graph.node if "low" in n.output).attribute[0], "f", 1.0),
        r"constant 'low' of 'low' \(input 1 of Clip 'k'\), .*-2.0 -> 1.0",
    ),
    "a branch": (lambda m: stored(tensor_in(branch(m, "then_branch"), "wa"), lambda a: -7 * a), r"/o.then_branch: .*'wa'"),
    "a Constant in a branch": (
        lambda m: stored(branch(m, "else_branch").node[0].attribute[0].t, lambda a: 0 * a), r"in /o.else_branch: .*'wb'",
    ),
    "an attribute in a branch": (
        lambda m: setattr(branch(m, "else_branch").node[2].attribute[0], "f", 0.5),
        r"in /o.else_branch: node LeakyRelu 'e', attribute 'alpha', f: 0.25 -> 0.5",
    ),
    "a function's constant": (
        lambda m: stored(m.functions[0].node[0].attribute[0].t, lambda a: 3 * a),
        r"in function local::gated: node Constant 'half', .*0.5 -> 1.5",
    ),
    "a function's attribute": (
        lambda m: setattr(m.functions[0].node[2].attribute[0], "f", 0.5),
        r"in function local::gated: node LeakyRelu 'b', attribute 'alpha', f: 0.125 -> 0.5",
    ),
    "an attribute": (lambda m: setattr(node(m, "ReduceSum").attribute[0], "i", 1), r"ReduceSum 's', attribute 'keepdims'"),
    "an attribute that is new": (
        lambda m: node(m, "Clip").attribute.append(helper.make_attribute("extra", 1)), r"Clip 'k', attribute 'extra'",
    ),
    "a second value in an attribute": (
        lambda m: setattr(node(m, "ReduceSum").attribute[0], "f", 1.0), r"ReduceSum 's', attribute 'keepdims', f",
    ),
    "an operator": (lambda m: setattr(node(m, "Clip"), "op_type", "Max"), r"node Clip 'k', op_type: 'Clip' -> 'Max'"),
    "a domain": (lambda m: setattr(node(m, "Clip"), "domain", "other"), r"node Clip 'k', domain: .*'other'"),
    "an input": (lambda m: m.graph.node[-1].input.__setitem__(1, "w"), r"node MatMul 'y', input\[1\]: 'v' -> 'w'"),
    "a node's name": (lambda m: setattr(node(m, "Clip"), "name", "mine"), r"node Clip 'k', name: absent -> 'mine'"),
    "a node more": (lambda m: m.graph.node.append(helper.make_node("Identity", ["y"], ["z"])), r"Identity 'z'"),
    "the order of nodes": (lambda m: swapped(m.graph.node), r"node MatMul 'h'"),
    "the order of initializers": (lambda m: swapped(m.graph.initializer), r"initializer 'v': at another position"),
    "an initializer more": (
        lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros(3), "more")), r"initializer 'more'",
    ),
    "an initializer twice": (
        lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros((6, 4), np.float32), "w")),
        r"initializer 'w': occurs 1 times -> 2 times",
    ),
    "a sparse initializer": (
        lambda m: m.graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, np.int64)), [4]
            )
        ),
        r"sparse initializer 's'",
    ),
    "an element type": (
        lambda m: stored_as(tensor(m, "limit"), np.float64), r"initializer 'limit' .*, data_type: 1 -> 11",
    ),
    "dims": (lambda m: tensor(m, "v").dims.__setitem__(slice(None), [3, 5]), r"initializer 'v' .*, dims\[0\]: 5 -> 3"),
    "values in two fields": (stored_twice, r"initializer 'w' .*its values are stored in float_data and raw_data"),
    "an unknown field": (unknown_field, r"node MatMul 'h': it has fields that ONNX does not define"),
    "an input's size": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 7), r"input 'x', .*: 6 -> 7",
    ),
    "an output's type": (lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 10), r"output 'y', .*1 -> 10"),
    "a described shape": (
        lambda m: m.graph.value_info.append(helper.make_tensor_value_info("h", 1, [1, 4])), r"described shape 'h'",
    ),
    "an opset": (lambda m: setattr(m.opset_import[0], "version", 18), r"opset_import .*, version: 17 -> 18"),
    "a function's opset": (
        lambda m: setattr(m.functions[0].opset_import[0], "version", 18), r"function local::gated, opset_import",
    ),
    "the IR version": (lambda m: setattr(m, "ir_version", 9), r"ir_version: 8 -> 9"),
    "a description": (lambda m: setattr(m.graph, "doc_string", "mine"), r"graph, doc_string: absent -> 'mine'"),
    "metadata": (lambda m: m.metadata_props.add(key="k", value="v"), r"metadata_props: 3 entries -> 4 entries"),
    "our own metadata": (
        lambda m: setattr(m.metadata_props[1], "value", "0" * 64), r"metadata_props 'cpd-onnx.source.sha256', value",
    ),
    "a tensor's description": (lambda m: setattr(tensor(m, "w"), "doc_string", "mine"), r"'w' .*doc_string"),
}  # fmt: skip  # a table


def tensor_in(graph: Any, name: str) -> Any:
    return next(t for t in graph.initializer if t.name == name)


def stored_as(target: Any, dtype: Any) -> None:
    target.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(target).astype(dtype), target.name))


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_named(name: str, pruned: tuple[Model, ModelProto, Plan]) -> None:
    original, proto, plan = pruned
    edit, words = EDITS[name]
    said = complaint(original, changed(proto, edit), plan)
    assert said.startswith("the file is not what the plan makes of the original: ")
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said)


def test_random_edits_are_named(pruned: tuple[Model, ModelProto, Plan]) -> None:
    """A short run; `benchmarks/robustness/edited.py` has the long one."""
    original, proto, plan = pruned
    silent = []
    for seed in range(40):
        made, place = edited(proto, seed) or pytest.fail("there is nothing to edit")
        if f"'{place.name}'" not in complaint(original, made, plan):
            silent.append((seed, place.kind, place.name))
    assert silent == []


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of models to edit is not there")
@pytest.mark.parametrize("name", ["initializers", "constants", "subgraph"])
def test_edits_of_models_of_others_are_named(name: str) -> None:
    """Weights in initializers, in Constant nodes, in the branches of an If."""
    original = cpd.load(CASES / f"{name}.onnx")
    state = cpd.run("comb, score, allocate{channels=0.5}, prune", original)
    assert state.plan is not None
    assert verify_files(original, state.model, state.plan).is_replay
    missed = []
    for seed in range(40):
        found = edited(state.model.complete_proto(), seed)
        assert found is not None
        try:
            verify_files(original, cpd.load(found[0]), state.plan)
        except cpd.ProofError as error:
            if found[1].name in str(error):
                continue
        missed.append((seed, found[1]))
    assert missed == []


def test_the_file_as_it_was_written_passes(pruned: tuple[Model, ModelProto, Plan], tmp_path: Path) -> None:
    original, proto, plan = pruned
    found = verify_files(original, load(proto), plan)
    assert (found.is_replay, found.trained, found.measured) == (True, (), None)
    apply(original, plan).model.save(tmp_path / "small.onnx")
    assert verify_files(original, load(tmp_path / "small.onnx"), plan).same_bytes


def test_values_may_be_stored_in_another_way(pruned: tuple[Model, ModelProto, Plan], tmp_path: Path) -> None:
    """In another field, or in a file of their own: but then the bytes are others, and that is said."""
    original, proto, plan = pruned

    def typed(made: ModelProto) -> None:
        target = tensor(made, "w")
        values = numpy_helper.to_array(target).ravel().tolist()
        target.ClearField("raw_data")
        target.float_data.extend(values)

    found = verify_files(original, load(changed(proto, typed)), plan)
    assert found.is_replay
    assert not found.same_bytes
    path = tmp_path / "apart.onnx"
    onnx.save_model(
        changed(proto, lambda _: None), path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    found = verify_files(original, load(path), plan)
    assert found.is_replay
    assert not found.same_bytes
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[1] ^= 1
    (tmp_path / "w.bin").write_bytes(data)
    assert "1 of" in complaint(original, path, plan)


def test_what_is_not_finite_in_the_original_stays_so() -> None:
    text = (
        "(float[2, 6] x, float[6, 8] w, float[8] mask, float[8, 3] v) => (float[2, 3] y) "
        "{ h = MatMul(x, w) r = Relu(h) m = Where(b, r, mask) y = MatMul(r, v) }"
    )
    text = text.replace("m = Where(b, r, mask) ", "")
    original = load(from_text(text, values={"mask": [np.nan, -np.inf, np.inf, 0, -0.0, 1, 2, 3]}))
    state = cpd.run(PRUNED, original)
    proto = state.model.complete_proto()
    assert verify_files(original, load(proto), state.plan).is_replay
    made = changed(proto, lambda m: stored(tensor(m, "mask"), lambda a: np.where(np.isnan(a), -np.inf, a)))
    assert "'mask'" in complaint(original, made, state.plan)


def test_constants_that_are_no_weights_are_read_too() -> None:
    """Strings, booleans, sizes of zero and of rank 0, and four-bit integers."""
    text = "(float[2, 6] x, float[6, 8] w, float[8, 3] v) => (float[2, 3] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    proto = from_text(text, opset=21, ir=10)
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [2], [b"one", b"two"]))
    proto.graph.initializer.append(helper.make_tensor("flags", TensorProto.BOOL, [2], [True, False]))
    proto.graph.initializer.append(helper.make_tensor("none", TensorProto.FLOAT, [0, 4], []))
    proto.graph.initializer.append(helper.make_tensor("nibbles", TensorProto.INT4, [3], [1, -2, 3]))
    original = load(proto)
    state = cpd.run(PRUNED, original)
    small = state.model.complete_proto()
    assert verify_files(original, load(small), state.plan).is_replay
    edits: dict[str, Edit] = {
        "'words': b'two' -> b'ten' at [1]": lambda m: tensor(m, "words").string_data.__setitem__(1, b"ten"),
        "'flags': True -> False": lambda m: stored(tensor(m, "flags"), lambda a: a & False),
        "'none'": lambda m: tensor(m, "none").dims.__setitem__(1, 5),
        "'nibbles': 1 -> 2 at [0]; 1 of 3": lambda m: tensor(m, "nibbles").CopyFrom(
            helper.make_tensor("nibbles", TensorProto.INT4, [3], [2, -2, 3])
        ),
    }
    for words, edit in edits.items():
        assert words in complaint(original, changed(small, edit), state.plan)


# Weights that were refitted or trained.


@pytest.fixture(scope="module")
def repaired() -> cpd.State:
    text = (
        "(float[N, 6] x, float[6, 16] w, float[16] b, float[16, 12] u, float[12, 3] v) => (float[N, 3] y) "
        "{ h = MatMul(x, w) a = Add(h, b) r = Relu(a) g = MatMul(r, u) s = Relu(g) y = MatMul(s, v) }"
    )
    rng = np.random.default_rng(0)
    data = ArraySource({"x": rng.standard_normal((64, 6)).astype(np.float32)})
    return cpd.run(f"{PRUNED}, verify, repair", load(from_text(text)), data=data)


def test_the_plan_names_what_was_refitted(repaired: cpd.State) -> None:
    plan = repaired.plan
    assert plan is not None
    assert set(plan.values) == set(changed_values(apply(repaired.original, plan).model, repaired.model)) != set()
    assert {fit["weight"] for fit in repaired.repaired["fitted"]} <= set(plan.values)  # type: ignore[index]
    assert plan.values["u"] == values_sha256(TensorProto.FLOAT, repaired.model.array("u"))
    jsonschema.validate(json.loads(plan.dumps()), schema())
    found = verify_files(repaired.original, repaired.model, plan)
    assert found.trained == tuple(plan.values)
    assert not found.is_replay
    assert found.measured is not None
    assert 0 < found.measured.largest < 1


def test_a_plan_says_the_same_of_the_removal_before_and_after_a_repair(repaired: cpd.State) -> None:
    before = cpd.run(PRUNED, repaired.original).plan
    assert before is not None
    assert repaired.plan is not None
    assert repaired.plan.without_values().dumps() == before.dumps()
    assert repaired.model.proto.metadata_props == apply(repaired.original, before).model.proto.metadata_props
    assert before.with_values(repaired.model, repaired.model) is before


def test_an_edit_of_a_refitted_weight_is_named(repaired: cpd.State) -> None:
    assert repaired.plan is not None
    proto, plan = repaired.model.complete_proto(), repaired.plan
    made = changed(proto, lambda m: stored(tensor(m, "u"), with_element(3.0)))
    assert "weight 'u' (input 1 of MatMul 'g'): it has other values" in complaint(repaired.original, made, plan)
    replay = apply(repaired.original, plan).model
    made = changed(proto, lambda m: stored(tensor(m, "u"), lambda _: replay.array("u")))
    said = complaint(repaired.original, made, plan)
    assert "weight 'u' (input 1 of MatMul 'g'): it has the values from before the repair or training" in said
    assert "more differences" in complaint(repaired.original, replay.complete_proto(), plan)
    made = changed(proto, lambda m: stored(tensor(m, "u"), with_element(np.nan)))
    named = Plan({**plan.content, "values": plan.values | changed_values(load(proto), load(made))})
    assert "'g'): it was refitted or trained to values that are not finite" in complaint(repaired.original, made, named)


def test_values_that_no_plan_names_are_refused(repaired: cpd.State) -> None:
    assert repaired.plan is not None
    said = complaint(repaired.original, repaired.model.complete_proto(), repaired.plan.without_values())
    assert "initializer 'u' (input 1 of MatMul 'g')" in said
    assert "the plan names no refitted or trained weights" in said
    more = Plan({**repaired.plan.content, "values": {**repaired.plan.values, "gone": "0" * 64}})
    said = complaint(repaired.original, repaired.model.complete_proto(), more)
    assert "weight 'gone': the plan names it as refitted or trained, but the file does not have it" in said


def test_a_file_that_does_not_run_is_not_verified(repaired: cpd.State) -> None:
    """What was refitted or trained has the right SHA-256, but the outputs are not finite."""
    assert repaired.plan is not None
    made = changed(repaired.model.complete_proto(), lambda m: stored(tensor(m, "v"), lambda a: 3e38 * np.ones_like(a)))
    changes = changed_values(repaired.model, load(made))
    named = Plan({**repaired.plan.content, "values": repaired.plan.values | changes})
    assert "output 'y' of the file is not finite where the original's is" in complaint(repaired.original, made, named)


def test_a_refitted_file_is_compared_where_indices_fit_into_an_open_axis() -> None:
    # index 1 is beyond one of the sizes at which x would be accepted by its shape
    text = (
        "(float[n, 6] x, int64[m] xi, float[6, 16] w, float[16, 12] u, float[12, 3] v) => (float[m, 3] y) "
        "{ h = MatMul(x, w) g = Gather(h, xi) a = MatMul(g, u) r = Relu(a) y = MatMul(r, v) }"
    )
    state = cpd.run(PRUNED, load(from_text(text)))
    assert state.plan is not None
    refitted = state.model.copy()
    refitted.set_array("v", 2 * refitted.array("v"))
    found = verify_files(state.original, refitted, state.plan.with_values(state.model, refitted))
    assert found.measured is not None
    assert found.measured.samples > 0


@pytest.mark.parametrize("values", [["w"], {"w": 3}, {"w": "abc"}, {"w": "Z" * 64}])
def test_a_plan_with_other_values_is_refused(values: Any, repaired: cpd.State, tmp_path: Path) -> None:
    assert repaired.plan is not None
    (tmp_path / "plan.json").write_text(json.dumps({**repaired.plan.content, "values": values}))
    with pytest.raises(PlanError, match="'values' must map names of weights to SHA-256"):
        cpd.load_plan(tmp_path / "plan.json")


def test_tensors_have_names_of_their_own() -> None:
    proto = nested()
    extra = branch(proto, "then_branch").initializer.add()
    extra.CopyFrom(tensor_in(branch(proto, "then_branch"), "wa"))
    names = list(stored_tensors(load(proto)))
    assert {"w", "zero", "low", "/o.then_branch:wa", "/o.then_branch:wa#2", "/o.else_branch:wb"} <= set(names)
    assert len(set(names)) == len(names)


def test_every_bit_of_a_value_counts() -> None:
    for value in (np.float32(0), np.float32(np.nan), np.int8(3), np.bool_(True), np.float16(1)):
        for seed in range(20):
            assert other_value(value, random.Random(seed)).tobytes() != value.tobytes()


def test_distill_writes_a_plan_that_names_the_trained_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    model, small, out = (tmp_path / f"{name}.onnx" for name in ("model", "small", "out"))
    onnx.save(nested(), model)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32))
    assert run("prune", model, "-o", small) == 0
    training = ["--data", tmp_path / "data.npz", "--steps", 3, "--threads", 1, "--freeze", "v"]
    assert run("distill", model, small, "-o", out, *training) == 0
    capsys.readouterr()
    plan = cpd.load_plan(tmp_path / "out.onnx.plan.json")
    assert plan.without_values().dumps() == cpd.load_plan(tmp_path / "small.onnx.plan.json").dumps()
    assert plan.values == changed_values(load(small), load(out))
    assert "w" in plan.values
    assert "/o.else_branch:wb" in plan.values
    assert not {"v", "limit", "zero"} & set(plan.values)
    assert run("verify", model, out) == 0
    assert f"except for {len(plan.values)} refitted or trained weights" in capsys.readouterr().out
    assert run("verify", model, out, "--plan", tmp_path / "small.onnx.plan.json") > 0
    assert "the plan names no refitted or trained weights" in capsys.readouterr().err
    constant = branch(trained := onnx.load(out), "else_branch").node[0].attribute[0].t
    stored(constant, lambda a: -7 * a)
    onnx.save(trained, out)
    assert run("verify", model, out) > 0
    assert "in /o.else_branch: weight 'wb' (input 1 of MatMul 'e1'): it has other values" in capsys.readouterr().err


# Deployed files.


TEXT = (
    "(float[N, 3, 8, 8] x, float[32, 3, 3, 3] w, float[32] b, float[8, 32, 1, 1] v) => (float[N, 8, 8, 8] y) "
    "{ h = Conv<kernel_shape=[3,3],pads=[1,1,1,1]>(x, w, b) r = Relu(h) y = Conv(r, v) }"
)
STEPS: dict[str, list[Any]] = {
    "fix": ["--batch", 2],
    "opset": ["--opset", 18],
    "half": ["--half", "float16"],
    "stored": ["--half", "float16", "--storage-only"],
    "int8": ["--int8", "--data", "data.npz", "--samples", 8],
    "percentile": ["--int8", "--data", "data.npz", "--samples", 8, "--calibration", "percentile", "--per-tensor"],
}


def run(*arguments: object) -> int:
    return main(plain([str(argument) for argument in arguments]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, what is left of it, and samples."""
    monkeypatch.chdir(tmp_path)
    onnx.save(from_text(TEXT), "model.onnx")
    np.savez("data.npz", x=np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32))
    assert run("prune", "model.onnx", "-o", "small.onnx") == 0
    return tmp_path


@pytest.mark.parametrize("name", STEPS)
def test_a_deployed_file_is_followed_back(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", "small.onnx", "-o", "out.onnx", *STEPS[name]) == 0
    (folder / "data.npz").unlink()  # nothing of it is needed
    capsys.readouterr()
    assert run("verify", "model.onnx", "out.onnx") == 0
    said = capsys.readouterr().out
    assert "small.onnx equals, byte for byte, the result of replaying the plan on the original" in said
    assert "out.onnx equals, value for value, the result of these steps" in said
    assert run("verify", "model.onnx", "out.onnx", "--json", "-") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["passed"]
    ((link,),) = [content["deployed"]["links"]]
    assert (link["file"], link["source"]) == ("out.onnx", "small.onnx")
    assert all(step["recorded"] and step["measured"] for step in link["steps"])
    whole = onnx.load("out.onnx")
    for seed in range(2):
        made, place = edited(whole, seed, ("initializer", "constant", "attribute")) or pytest.fail("no")
        onnx.save(made, "edited.onnx")
        (folder / "edited.onnx").replace("out.onnx")
        assert run("verify", "model.onnx", "out.onnx") > 0
        assert f"'{place.name}'" in capsys.readouterr().err


def test_an_ort_file_is_followed_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", "small.onnx", "-o", "out.onnx", "--batch", 2, "--ort", "out.ort") == 0
    assert run("verify", "model.onnx", "out.ort") == 0
    assert "out.ort has the SHA-256 of its manifest" in capsys.readouterr().out
    data = bytearray((folder / "out.ort").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "out.ort").write_bytes(data)
    assert run("verify", "model.onnx", "out.ort") > 0
    assert "out.ort has changed since it was written: its SHA-256 is" in capsys.readouterr().err


def test_files_that_were_deployed_twice_are_followed_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", "small.onnx", "-o", "one.onnx", "--batch", 2) == 0
    assert run("deploy", "one.onnx", "-o", "two.onnx", "--half", "float16") == 0
    assert run("verify", "model.onnx", "two.onnx", "--json", "-") == 0
    content = json.loads(capsys.readouterr().out.partition("{\n")[2].join(["{\n", ""]))
    assert [link["file"] for link in content["deployed"]["links"]] == ["one.onnx", "two.onnx"]
    onnx.save(changed(onnx.load("one.onnx"), lambda m: stored(tensor(m, "w"), with_element(5))), "one.onnx")
    assert run("verify", "model.onnx", "two.onnx") > 0
    assert "two.onnx was made from 'one.onnx' with SHA-256" in capsys.readouterr().err


def test_what_was_deployed_of_the_original_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", "model.onnx", "-o", "out.onnx", "--opset", 18) == 0
    assert run("verify", "model.onnx", "out.onnx") == 0
    assert "From model.onnx to out.onnx" in capsys.readouterr().out
    (folder / "papers").mkdir()
    assert run("deploy", "model.onnx", "-o", "papers/out.onnx", "--opset", 18) == 0
    assert run("verify", "model.onnx", "papers/out.onnx") == 0  # the original need not lie beside it
    onnx.save(from_text(TEXT.replace("Relu", "Tanh")), "other.onnx")
    assert run("verify", "other.onnx", "out.onnx") == 1
    assert "has neither a plan nor a manifest of deploy beside it" in capsys.readouterr().err


def test_the_pruned_file_may_lie_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is said; a name in a manifest leads nowhere out of its folder."""
    (folder / "papers").mkdir()
    assert run("deploy", "small.onnx", "-o", "papers/out.onnx", "--batch", 2) == 0
    assert "../small.onnx" in (folder / "papers" / "out.onnx.manifest.json").read_text()
    assert run("verify", "model.onnx", "papers/out.onnx") == 1
    assert "which is not in the folder of its manifest: name it with --via" in capsys.readouterr().err
    (folder / "papers" / "small.onnx").symlink_to(folder / "small.onnx")
    assert run("verify", "model.onnx", "papers/out.onnx") == 1
    (folder / "papers" / "small.onnx").unlink()
    assert run("verify", "model.onnx", "papers/out.onnx", "--via", "small.onnx") == 0
    (folder / "papers" / "out.onnx").rename(folder / "out.onnx")
    assert (
        run("verify", "model.onnx", "out.onnx", "--manifest", "papers/out.onnx.manifest.json", "--via", "small.onnx")
        == 0
    )
    (folder / "small.onnx").rename(folder / "papers" / "small.onnx")
    (folder / "papers" / "out.onnx.manifest.json").rename(folder / "papers" / "other.manifest.json")
    (folder / "out.onnx").rename(folder / "papers" / "out.onnx")
    capsys.readouterr()
    assert (
        run("verify", "model.onnx", "papers/out.onnx", "--plan", "small.onnx.plan.json", "--via", "papers/small.onnx")
        == 0
    )
    assert "From small.onnx to out.onnx" in capsys.readouterr().out


def test_a_step_that_gives_something_else_elsewhere_decides_nothing(folder: Path) -> None:
    """The file is that of its manifest, but what made it was another version."""
    assert run("deploy", "small.onnx", "-o", "out.onnx", "--batch", 2) == 0
    onnx.save(
        changed(onnx.load("out.onnx"), lambda m: setattr(m.graph, "doc_string", "of another version")), "out.onnx"
    )
    place = folder / "out.onnx.manifest.json"
    content = json.loads(place.read_text())
    content["outputs"][0]["sha256"] = manifest.file_entry(folder / "out.onnx", "")["sha256"]
    place.write_text(json.dumps(content))
    original, there = load("model.onnx"), manifest_of(folder / "out.onnx")
    assert there is not None
    with pytest.raises(ProofError, match=r"not the result of the steps of its manifest on .*: graph, doc_string"):
        verify_deployed(original, folder / "out.onnx", there)
    older = {**content, "versions": {**content["versions"], "onnxruntime": "1.0"}}
    with pytest.raises(InconclusiveError, match=r"the cause may be another environment: onnxruntime 1.0 then, .* now"):
        verify_deployed(original, folder / "out.onnx", replace(there, content=older))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("steps"), "names no steps"),
        (lambda c: c["steps"][0].pop("options"), "was written by a version that recorded no options"),
        (lambda c: c["steps"][0].update(options=[1]), "the options of step 'fix' must be an object"),
        (
            lambda c: c["steps"][0].update(options={"sizes": {}, "batch": "two"}),
            "recorded options of the step 'fix' are not valid",
        ),
        (
            lambda c: c["steps"][0].update(options={"sizes": 3, "more": 1}),
            "recorded options of the step 'fix' are not valid",
        ),
        (lambda c: c["steps"][0].update(name="__class__"), "got '__class__'"),
        (lambda c: c["inputs"].pop(0), "does not name the input model"),
        (lambda c: c["inputs"][0].update(file="\0"), "name it with --via"),
        (lambda c: c["inputs"][0].update(file="/dev/zero"), "name it with --via"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_one_line(
    change: Callable[[Any], Any], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("deploy", "small.onnx", "-o", "out.onnx", "--batch", 2) == 0
    place = folder / "out.onnx.manifest.json"
    content = json.loads(place.read_text())
    change(content)
    place.write_text(json.dumps(content))
    capsys.readouterr()
    assert run("verify", "model.onnx", "out.onnx") == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_fresh_plan_takes_precedence_over_an_old_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", "small.onnx", "-o", "out.onnx", "--batch", 2) == 0
    assert run("prune", "model.onnx", "-o", "out.onnx", "--target", "macs=0.7", "--force") == 0
    capsys.readouterr()
    assert run("verify", "model.onnx", "out.onnx") == 0
    assert capsys.readouterr().out.startswith("the file equals, byte for byte")
