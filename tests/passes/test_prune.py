"""What the rewrite mends, and that it leaves all else alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import comb
from cpd_onnx.ir.model import attributes_of
from cpd_onnx.passes.prune import apply
from cpd_onnx.pipeline.state import State
from cpd_onnx.proof.proving import verify
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.testing import mask_oracle
from tests.rules.test_rules import NAMES, TABLE, model_of
from tests.support.models import from_text

PRUNED = "comb, score, allocate{channels=0.5}, prune, verify"
PRUNABLE = [n for n in NAMES if TABLE[NAMES.index(n)][3] and n != "broadcast old"]
DATA = Path(os.environ.get("CPD_DATA", Path(__file__).parents[3] / "shared" / "data")) / "onnx"
CONVS = "(float[2, 3, 8] x, {kind}[8, 3, 1] w, {kind}[8] b, {kind}[5, 8, 1] v) => (float[2, 5, 8] y) {{ {before} h = Conv(i, w, b) o = Conv(h, v) {after} }}"


def pruned(model: ModelProto | Path) -> State:
    return cpd.run(PRUNED, model)


def initializers(model: ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def shapes(state: State) -> dict[str, list[int]]:
    return {t.name: list(t.dims) for t in state.model.graph.initializer}


WRONGLY_INFERRED = {"STFT"}
"""Operators of which onnx 1.23 infers another shape than onnxruntime computes: one-sided spectra have half of the bins."""


@pytest.mark.parametrize("name", PRUNABLE)
def test_what_is_not_in_the_edit_log_is_unchanged(name: str) -> None:
    model = model_of(name)
    state = pruned(model)
    after = state.model.complete_proto()
    is_inferred = all(n.domain != "com.microsoft" and n.op_type not in WRONGLY_INFERRED for n in model.graph.node)
    onnx.checker.check_model(after, full_check=is_inferred)
    assert [(n.op_type, n.name, list(n.output)) for n in after.graph.node] == [
        (n.op_type, n.name, list(n.output)) for n in model.graph.node
    ]
    assert (after.opset_import, after.ir_version) == (model.opset_import, model.ir_version)
    assert [entry for entry in after.metadata_props if not entry.key.startswith("cpd-onnx.")] == model.metadata_props
    assert after.graph.input == model.graph.input
    assert after.graph.output == model.graph.output
    logged = " ".join(edit.where for edit in state.edits) + " ".join(edit.change for edit in state.edits)
    for old, new in zip(model.graph.node, after.graph.node, strict=True):
        if old != new:
            assert old.output[0] in logged or any(edit.what == "copy" for edit in state.edits)
        sizes = {
            "then_branch",
            "else_branch",
            "group",
            "num_groups",
            "hidden_size",
            "num_heads",
            "q_num_heads",
            "kv_num_heads",
            "scale",
            "axes",
            "starts",
            "ends",
            "num_outputs",
            "qkv_hidden_sizes",
        }
        assert {k: v for k, v in attributes_of(old).items() if k not in sizes} == {
            k: v for k, v in attributes_of(new).items() if k not in sizes
        }


@pytest.mark.parametrize("name", ["conv grouped", "heads", "shape arithmetic", "if"])
def test_same_bytes_in_every_run(name: str, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(model_of(name), source)
    script = (
        f"import hashlib; import cpd_onnx as cpd; s = cpd.run({PRUNED!r}, {str(source)!r}); print(hash('x')); "
        "print(hashlib.sha256(s.model.serialize() + s.plan.dumps().encode()).hexdigest())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert outputs[0][0] != outputs[1][0]
    assert outputs[0][1] == outputs[1][1]


@pytest.mark.parametrize("name", PRUNABLE)
def test_plan_replays_bit_for_bit(name: str) -> None:
    model = model_of(name)
    state = pruned(model)
    assert state.plan is not None
    assert apply(model, state.plan).model.serialize() == state.model.serialize()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float16", TensorProto.FLOAT16), ("double", TensorProto.DOUBLE), ("bfloat16", TensorProto.BFLOAT16)],
)
def test_other_float_types(kind: str, dtype: int) -> None:
    text = CONVS.format(kind="float", before=f"i = Cast <to = {dtype}>(x)", after="y = Cast <to = 1>(o)")
    model = from_text(text, opset=22, ir=10)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(dtype))
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    try:
        state = pruned(model)
    except cpd.UnsupportedError:  # onnxruntime has no such convolution on the CPU: shapes alone are checked
        assert kind != "float16"
        state = cpd.run(PRUNED.removesuffix(", verify"), model)
    assert shapes(state) == {"w": [4, 3, 1], "b": [4], "v": [5, 4, 1]}
    assert {t.data_type for t in state.model.graph.initializer} == {dtype}


def test_typed_fields_hold_the_data() -> None:
    model = from_text(CONVS.format(kind="float", before="i = Identity(x)", after="y = Identity(o)"))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).ravel().tolist()
        tensor.ClearField("raw_data")
        tensor.float_data.extend(values)
    assert shapes(pruned(model)) == {"w": [4, 3, 1], "b": [4], "v": [5, 4, 1]}


def test_before_ir_4_initializers_are_inputs_too() -> None:
    model = from_text(
        "(float[2, 6] x, float[6, 8] w, float[8] b, float[8, 5] v, float[5] c) => (float[2, 5] y) { h = Gemm(x, w, b) y = Gemm(h, v, c) }",
        opset=8,
        ir=3,
    )
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    state = pruned(model)
    described = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in state.model.graph.input}
    assert described == {"x": [2, 6], "w": [6, 4], "b": [4], "v": [4, 5], "c": [5]}


def test_weights_in_constant_nodes() -> None:
    model = from_text(CONVS.format(kind="float", before="i = Identity(x)", after="y = Identity(o)"))
    made = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    made[1] = helper.make_node(
        "Constant", [], ["b"], value_floats=numpy_helper.to_array(model.graph.initializer[1]).tolist()
    )
    nodes = [*made, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    state = pruned(model)
    constants = {n.output[0]: attributes_of(n) for n in state.model.graph.node if n.op_type == "Constant"}
    assert list(constants["w"]["value"].dims) == [4, 3, 1]
    assert len(constants["b"]["value_floats"]) == 4


def test_shared_bias_is_cloned_where_its_users_part() -> None:
    model = model_of("conv shared bias")
    state = pruned(model)
    copies = [edit for edit in state.edits if edit.what == "copy"]
    assert len(copies) == 1
    used = [n.input[2] for n in state.model.graph.node if len(n.input) > 2]
    assert used[0] == "b"
    assert used[1] != "b"
    original = initializers(model)["b"]
    assert all(np.isin(initializers(state.model.complete_proto())[name], original).all() for name in used)


def test_shared_integers_are_cloned_where_their_roles_part() -> None:
    text = (
        "(float[2, 4, 8] x, float[8, 8] w, float[8, 5] v, int64[1] eight, int64[1] zero, int64[1] last, int64[3] back) "
        "=> (float[2, 4, 5] y) "
        "{ s = Slice(x, zero, eight, last) h = MatMul(s, w) f = Concat <axis = 0>(zero, zero, eight) r = Reshape(h, f) "
        "y = MatMul(r, v) }"
    )
    state = pruned(from_text(text, values={"eight": 8, "zero": 0, "last": 2, "back": [0, 0, 0]}))
    values = initializers(state.model.complete_proto())
    nodes = {n.output[0]: n for n in state.model.graph.node}
    assert values[nodes["s"].input[2]] == [8]
    assert values[nodes["r"].input[1]].tolist() == [0, 0, 4]


def test_scale_from_a_pruned_size_stays() -> None:
    text = """(float[2, 4, 6] x, float[6, 8] w, float[6, 8] u, float[6, 8] z, float[8, 5] v, int64 two) => (float[2, 4, 5] y) {
        a = MatMul(x, w) b = MatMul(x, u) c = MatMul(x, z) s = Shape(a) d = Gather(s, two) f = Cast <to = 1>(d) r = Sqrt(f)
        k = Transpose <perm = [0, 2, 1]>(b) m = MatMul(a, k) n = Div(m, r) p = Softmax(n) o = MatMul(p, c) y = MatMul(o, v) }"""
    state = pruned(from_text(text, values={"two": 2}))
    division = next(n for n in state.model.graph.node if n.op_type == "Div")
    assert initializers(state.model.complete_proto())[division.input[1]] == pytest.approx(np.sqrt(8))


def test_attention_without_a_scale_gets_the_old_one() -> None:
    state = cpd.run("comb, score, allocate{channels=0.3}, prune, verify", model_of("attention 4d"))
    attention = next(n for n in state.model.graph.node if n.op_type == "Attention")
    assert attributes_of(attention)["scale"] == pytest.approx(0.5)


def test_batch_times_heads() -> None:
    text = """(float[N, 4, 6] x, float[6, 8] w, float[6, 8] u, float[8, 5] v, int64 zero, int64 heads, int64[1] one,
        int64[1] seq, int64[1] dim, int64[1] width, int64[1] four) => (float[N, 4, 5] y) {
        a = MatMul(x, w) b = MatMul(x, u) s = Shape(x) n = Gather(s, zero) bh = Mul(n, heads)
        n1 = Unsqueeze(n, zero1) bh1 = Unsqueeze(bh, zero1)
        p = Concat <axis = 0>(n1, seq, four, dim) q = Concat <axis = 0>(bh1, seq, dim) r = Concat <axis = 0>(n1, seq, width)
        c = Reshape(a, p) d = Transpose <perm = [0, 2, 1, 3]>(c) e = Reshape(d, q)
        f = Reshape(b, p) g = Transpose <perm = [0, 2, 1, 3]>(f) h = Reshape(g, q)
        t = Add(e, h) back = Concat <axis = 0>(n1, four, seq, dim) i = Reshape(t, back)
        j = Transpose <perm = [0, 2, 1, 3]>(i) k = Reshape(j, r) y = MatMul(k, v) }"""
    text = text.replace("int64[1] one", "int64[1] zero1")
    model = from_text(text, values={"zero": 0, "heads": 4, "zero1": 0, "seq": 4, "dim": 2, "width": 8, "four": 4})
    state = pruned(model)
    values = initializers(state.model.complete_proto())
    product = next(n for n in state.model.graph.node if n.op_type == "Mul")
    assert values[product.input[1]] == 2


def test_layers_that_share_a_computed_shape_keep_as_many_channels() -> None:
    """Exporters compute a shape once for all layers; the axis that it divides is heads times their dimension."""
    layer = """{h}p = MatMul({x}, {w}) {h}q = Reshape({h}p, cut) {h}t = Transpose <perm=[2, 0, 1, 3]>({h}q)
        {h}i = Gather <axis=0>({h}t, one) {h}j = Gather <axis=0>({h}t, two)
        {h}e = Concat <axis=0>(size, heads, dims) {h}a = Reshape({h}i, {h}e) {h}b = Reshape({h}j, {h}e)
        {h}c = Transpose <perm=[0, 2, 1, 3]>({h}a) {h}d = Transpose <perm=[0, 2, 3, 1]>({h}b)
        {h}s = MatMul({h}c, {h}d) {h}m = MatMul({h}s, {h}c) {h}o = Transpose <perm=[0, 2, 1, 3]>({h}m)
        {h}f = Reshape({h}o, whole) {h} = MatMul({h}f, {v})"""
    model = from_text(
        "(float[n, t, 5] x, float[5, 24] w, float[12, 7] v, float[7, 24] u, float[12, 4] k, int64[1] two_, int64[1] heads,"
        " int64[1] dims, int64[1] both, int64 one, int64 two) => (float[n, t, 4] h2) {"
        "size = Shape <end=2>(x) cut = Concat <axis=0>(size, two_, both) whole = Concat <axis=0>(size, both)"
        + layer.format(h="h1", x="x", w="w", v="v")
        + layer.format(h="h2", x="h1", w="u", v="k")
        + "}",
        values={"two_": [2], "heads": [3], "dims": [4], "both": [12], "one": 0, "two": 1},
    )
    combed = comb(model)
    assert combed.groups
    for group in combed.groups:
        kept = KeepMask(combed.atoms, group.channels[:1])
        assert verify(combed, kept, rewrite(combed, kept).model).passed


@pytest.mark.parametrize("other", ["b", "one", "c"])
def test_the_size_of_a_broadcast_follows_the_heads(other: str) -> None:
    """The larger of the sizes of two tensors: of both factors, of a tensor that is broadcast, or of another part."""
    model = from_text(
        "(float[n, 6, 5] x, float[5, 12] w, float[5, 12] u, float[5, 12] z, float[12, 7] v, int64[4] cut, int64[3] flat,"
        " int64[2] pixels, int64[3] whole, float[1, 1, 6, 4] bias) => (float[n, 6, 7] y) {"
        " p = MatMul(x, w) q = MatMul(x, u) r = MatMul(x, z)"
        " p4 = Reshape(p, cut) q4 = Reshape(q, cut) r4 = Reshape(r, cut)"
        " a = Transpose <perm=[0, 2, 1, 3]>(p4) b = Transpose <perm=[0, 2, 1, 3]>(q4) c = Transpose <perm=[0, 2, 1, 3]>(r4)"
        " one = Sin(bias) sa = Shape <end=2>(a) sb = Shape <end=2>(OTHER) most = Max(sa, sb)"
        " a3 = Reshape(a, flat) b3 = Reshape(b, flat) bt = Transpose <perm=[0, 2, 1]>(b3) m = MatMul(a3, bt)"
        " size = Concat <axis=0>(most, pixels) m4 = Reshape(m, size) o = MatMul(m4, c) e = Add(o, one)"
        " t = Transpose <perm=[0, 2, 1, 3]>(e) f = Reshape(t, whole) y = MatMul(f, v) }".replace("OTHER", other),
        values={"cut": [0, 6, 3, 4], "flat": [-1, 6, 4], "pixels": [6, 6], "whole": [0, 6, 12]},
    )
    combed = comb(model)
    assert {3, 4} <= {len(group) for group in combed.groups}
    for group in combed.groups:
        kept = KeepMask(combed.atoms, group.channels[:1])
        assert verify(combed, kept, rewrite(combed, kept).model).passed


def test_the_larger_of_two_sizes_that_differ_is_not_followed() -> None:
    model = from_text(
        "(float[n, 6, 5] x, float[5, 12] w, float[5, 9] u, float[12, 7] v, float[9, 7] k)"
        " => (float[n, 6, 7] y) { p = MatMul(x, w) q = MatMul(x, u) sp = Shape(p) sq = Shape(q) most = Max(sp, sq)"
        " a = Reshape(p, most) b = MatMul(a, v) c = MatMul(q, k) y = Add(b, c) }"
    )
    combed = comb(model)
    assert [len(group) for group in combed.groups] == [9]
    kept = KeepMask(combed.atoms, combed.groups[0].channels[:4])
    assert verify(combed, kept, rewrite(combed, kept).model).passed


def test_a_product_that_follows_its_channels_keeps_its_factor() -> None:
    """The batch times a size that is read from the pruned tensor, times a stored number of windows."""
    text = """(float[N, 3, 8] x, float[8, 3, 1] w, float[5, 8, 1] v, int64 zero, int64 one, int64 four, int64[1] at, int64[1] two)
        => (float[N, 5, 8] y) { c = Conv(x, w) s = Shape(c) n = Gather(s, zero) m = Gather(s, one) nm = Mul(n, m)
        p = Mul(nm, four) q = Unsqueeze(p, at) t = Concat <axis = 0>(q, two) r = Reshape(c, t) a = Relu(r)
        n1 = Unsqueeze(n, at) m1 = Unsqueeze(m, at) minus = Constant <value = int64[1] {-1}>()
        b = Concat <axis = 0>(n1, m1, minus) d = Reshape(a, b) y = Conv(d, v) }"""
    model = from_text(text, values={"zero": 0, "one": 1, "four": 4, "at": 0, "two": 2})
    state = pruned(model)
    values = initializers(state.model.complete_proto())
    assert values["w"].shape == (4, 3, 1)
    assert values["four"] == 4


def test_value_info_follows() -> None:
    model = onnx.shape_inference.infer_shapes(model_of("conv depthwise"))
    model.graph.value_info.append(helper.make_tensor_value_info("h_wrong_rank", TensorProto.FLOAT, [1]))
    next(v for v in model.graph.value_info if v.name == "a").type.tensor_type.shape.dim.add().dim_value = 3
    state = pruned(model)
    described = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in state.model.graph.value_info}
    assert described["h"] == [2, 4, 8, 8]
    assert described["a"] == [0, 4, 0, 0]  # it had another number of axes: open, but for the channels
    assert described["h_wrong_rank"] == [1]


def test_captured_and_own_weights_of_subgraphs() -> None:
    text = """(float[2, 4] x, float[4, 6] w, float[6, 6] u, float[6] b, float[6, 3] v, bool[1] c) => (float[2, 3] y) {
        h = MatMul(x, w) s = ReduceMax <keepdims = 0>(h) zero = Constant <value_float = 0.0>() q = Greater(s, zero)
        a = If(q) <then_branch = t () => (float[2, 6] p) { m = MatMul(h, u) p = Add(m, b) },
            else_branch = e () => (float[2, 6] r) {
                k = Constant <value = float[6] {1, 2, 3, 4, 5, 6}>() r = Mul(h, k) }>
        y = MatMul(a, v) }"""
    state = pruned(from_text(text))
    assert shapes(state)["u"] == [3, 3]
    branch = next(
        a.g for n in state.model.graph.node if n.op_type == "If" for a in n.attribute if a.name == "else_branch"
    )
    assert list(branch.node[0].attribute[0].t.dims) == [3]


def test_loop_carries_channels() -> None:
    body = "body = l (int64 i, bool k, float[2, 6] s) => (bool k2, float[2, 6] t) { k2 = Identity(k) m = MatMul(s, u) t = Tanh(m) }"
    text = (
        "(float[2, 4] x, float[4, 6] w, float[6, 6] u, float[6, 3] v, int64 n, bool k) => (float[2, 3] y) "
        f"{{ h = MatMul(x, w) a = Loop(n, k, h) <{body}> y = MatMul(a, v) }}"
    )
    state = pruned(from_text(text, values={"n": 3, "k": True}))
    assert shapes(state)["u"] == [3, 3]


def test_functions_are_entered() -> None:
    function = '<domain: "local", opset_import: ["": 17]> twice (a, s) => (b) { c = Mul(a, s) b = Relu(c) }'
    text = "(float[2, 4, 6] x, float[6, 12] w, float[12] s, float[12, 5] v) => (float[2, 4, 5] y) { h = MatMul(x, w) a = local.twice(h, s) y = MatMul(a, v) }"
    state = pruned(from_text(text, functions=function))
    assert shapes(state) == {"w": [6, 6], "s": [6], "v": [6, 5]}


def test_where_a_file_comes_from_is_in_its_metadata() -> None:
    model = model_of("conv")
    model.metadata_props.add(key="cpd-onnx.tool", value="of an earlier run")
    state = pruned(model)
    assert state.plan is not None
    found = {entry.key: entry.value for entry in state.model.proto.metadata_props}
    assert len(found) == len(state.model.proto.metadata_props)
    assert found == {
        "cpd-onnx.tool": f"cpd-onnx {cpd.__version__}",
        "cpd-onnx.source.sha256": hashlib.sha256(model.SerializeToString()).hexdigest(),
        "cpd-onnx.plan.sha256": hashlib.sha256(state.plan.dumps(1).encode()).hexdigest(),
    }


@pytest.mark.parametrize(
    "branch",
    [
        "(float[1, 6] r) { k = Constant <value = float[1, 6] {1, 2, 3, 4, 5, 6}>() s = Add(h, k) r = Identity(k) }",
        "(float[1, 6] r) { r = Add(outer, outer) }",
        "(float[1, 2, 6] r) { axes = Constant <value = int64[1] {0}>() r = Unsqueeze(h, axes) }",
    ],
)
def test_a_branch_that_never_runs_goes_along_whatever_its_shape(branch: str) -> None:
    """onnxruntime joins the shapes of both branches as it loads a model, whichever runs."""
    text = f"""(float[2, 4] x, float[4, 6] w, float[6, 3] v, float[1, 6] outer) => (float[2, 3] y) {{ h = MatMul(x, w) q = Constant <value = bool {{1}}>()
        a = If(q) <then_branch = t () => (float[2, 6] p) {{ p = Relu(h) }}, else_branch = e () => {branch}> y = MatMul(a, v) }}"""
    model = from_text(text)
    assert shapes(pruned(model))["w"] == [4, 3]
    assert mask_oracle(model).passed


def test_a_weight_in_a_branch_that_never_runs_and_has_no_shapes_keeps_what_it_meets() -> None:
    text = """(float[2, 4] x, float[4, 6] w, float[6, 3] v) => (float[2, 3] y) { h = MatMul(x, w) q = Constant <value = bool {1}>()
        a = If(q) <then_branch = t () => (float[2, 6] p) { p = Relu(h) }, else_branch = e () => (r)
        { k = Constant <value = float[1, 6] {1, 2, 3, 4, 5, 6}>() s = Add(h, k)
        axes = Constant <value = int64[1] {1}>() r = Squeeze(s, axes) }> y = MatMul(a, v) }"""
    combed = comb(from_text(text))
    assert combed.groups == []
    assert any("branch of an If that never runs" in reason for f in combed.frozen() for reason in f.reasons)


def test_an_operator_whose_rule_fails_is_kept() -> None:
    text = "(float[2, 4] x, float[4, 8] u, float[8, 3] v) => (float[2, 3] y) { h = MatMul(x, u) n = Softmax <axis = 9223372036854775807> (h) y = MatMul(n, v) }"
    combed = comb(from_text(text))
    assert combed.groups == []
    assert any("which is out of range" in reason for f in combed.frozen() for reason in f.reasons)
    swapped = "(float[3, 2, 4] x, float[1, 5, 4] w, float[1, 5, 5] r, float[5, 3] v) => (y) { s, l = RNN <hidden_size = 5> (x, w, v, r) y = MatMul(s, v) }"
    combed = comb(from_text(swapped))
    assert combed.unaccounted
    assert combed.groups == []


def test_external_data(tmp_path: Path) -> None:
    model = from_text(
        "(float[2, 40] x, float[40, 80] w, float[80, 50] v) => (float[2, 50] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    )
    source, target = tmp_path / "big.onnx", tmp_path / "small.onnx"
    onnx.save_model(model, source, save_as_external_data=True, location="big.data", size_threshold=0)
    state = pruned(source)
    state.save(target)
    (data,) = tmp_path.glob("small.onnx.*.data")
    assert data.stat().st_size < (tmp_path / "big.data").stat().st_size
    onnx.checker.check_model(target, full_check=True)
    assert initializers(onnx.load(target))["w"].shape == (40, 40)


def test_nothing_left_out_of_a_model_that_is_kept_whole() -> None:
    model = model_of("conv")
    state = cpd.run("comb, score, allocate{channels=1.0}, prune", model)
    assert state.model.serialize() == model.SerializeToString()
    assert state.edits == ()


def test_squeeze_without_axes_keeps_channels_that_shrink_to_one() -> None:
    text = (
        "(float[2, 3, 4, 4] x, float[2, 3, 1, 1] w, float[2, 5] v) => (float[2, 5] y) "
        "{ h = Conv(x, w) p = GlobalAveragePool(h) s = Squeeze(p) y = MatMul(s, v) }"
    )
    state = pruned(from_text(text))
    assert shapes(state)["w"] == [1, 3, 1, 1]


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real models is not there")
@pytest.mark.parametrize(
    "name",
    [
        "vit_cifar10_smmk47",
        "enet_davidtvs_default_camvid",
        "silero_vad_op15",
        "twinlitenet_qdq_int8",
        "tf_bert_tiny_qa",
        "yolox_nano",
    ],
)
def test_real_files(name: str) -> None:
    state = pruned(DATA / f"{name}.onnx")
    assert state.verification is not None
    assert state.verification.passed
    assert state.combed is not None
    assert state.combed.unaccounted == []


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real models is not there")
def test_real_files_stay_as_prunable_as_they_were() -> None:
    """What guards against files that make no sense may not take channels from those that exporters write."""
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "breadth.jsonl"
    measured = {
        entry["model"]: entry.get("fraction", 0.0) for entry in map(json.loads, results.read_text().splitlines())
    }
    paths = [path for path in sorted(DATA.glob("*.onnx")) if f"onnx/{path.name}" in measured]
    found = {path.name: comb(path).prunable_fraction() for path in paths}
    assert {name: share for name, share in found.items() if share < measured[f"onnx/{name}"] - 1e-3} == {}
    assert len(found) > 20
