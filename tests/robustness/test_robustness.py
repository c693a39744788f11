"""Broken, odd and hostile files: one clear error or a valid result, nothing else."""

from __future__ import annotations

import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.weights import dequantized
from cpd_onnx.ir.model import load
from cpd_onnx.proof.comparison import QUANTIZED, tolerance
from cpd_onnx.runtime.sessions import open_model, working_feeds
from cpd_onnx.shapes.inference import fold
from tests.rules.test_rules import model_of
from tests.support.models import from_text


def attempt(source: Path | ModelProto) -> str:
    """What became of a model: an error's class, or 'pruned'."""
    try:
        cpd.run("comb, score, allocate, prune", source)
    except cpd.CpdError as error:
        return "several lines" if "\n" in str(error) else type(error).__name__
    return "pruned"


@pytest.mark.parametrize("name", ["conv grouped", "heads", "lstm", "if"])
def test_truncated_and_damaged_files(name: str, tmp_path: Path) -> None:
    content = model_of(name).SerializeToString()
    path, rng = tmp_path / "bad.onnx", random.Random(0)
    outcomes = set()
    for _ in range(60):
        path.write_bytes(content[: rng.randrange(len(content))])
        outcomes.add(attempt(path))
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(bytes(damaged))
        outcomes.add(attempt(path))
    assert {"ModelError", "pruned"} <= outcomes
    assert "several lines" not in outcomes


def simple(
    nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def info(name: str, shape: list[int | str] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.mark.parametrize(
    "model",
    [
        simple([helper.make_node("Relu", ["x"], ["y"])], [info("x", None)], [info("y", None)]),
        simple([helper.make_node("Relu", ["x"], ["y"])], [info("x", [])], [info("y", [])]),
        simple(
            [helper.make_node("Identity", ["x"], ["y"])],
            [info("x", [2], TensorProto.STRING)],
            [info("y", [2], TensorProto.STRING)],
        ),
        simple([helper.make_node("Relu", ["x"], ["y"])], [info("x", [0, 3])], [info("y", [0, 3])]),
        simple([helper.make_node("Strange", ["x"], ["y"], domain="no.such")], [info("x", [2])], [info("y", [2])]),
        simple(
            [helper.make_node("SequenceConstruct", ["x"], ["s"]), helper.make_node("SequenceLength", ["s"], ["y"])],
            [info("x", [2])],
            [info("y", [], TensorProto.INT64)],
        ),
    ],
    ids=["unknown rank", "scalar", "strings", "empty axis", "unknown operator", "sequences"],
)
def test_models_without_channels_are_refused(model: ModelProto) -> None:
    assert attempt(model) == "TargetError"


def test_the_operator_without_a_rule_is_named() -> None:
    with pytest.raises(cpd.TargetError, match=r"no\.such::Strange"):
        cpd.run(
            "comb, score, allocate",
            simple([helper.make_node("Strange", ["x"], ["y"], domain="no.such")], [info("x", [2])], [info("y", [2])]),
        )


def test_weights_that_are_not_numbers() -> None:
    model = model_of("conv")
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(np.full((8, 3, 3, 3), np.nan, np.float32), "w"))
    state = cpd.run("comb, score, allocate, prune", model)
    assert state.allocation is not None


def test_a_huge_constant_is_not_made() -> None:
    text = "(float[2] x, int64[2] n) => (float[2] y) { a = ConstantOfShape(n) s = ReduceSum(a) y = Add(x, s) }"
    folded = fold(load(from_text(text, values={"n": [1 << 20, 1 << 20]})))
    assert folded.scope.values["a"].value is None


def test_dims_that_do_not_fit_the_data() -> None:
    model = model_of("conv")
    model.graph.initializer[0].dims[0] = 1 << 40
    assert attempt(model) == "ModelError"


def test_unsorted_nodes_are_followed() -> None:
    model = model_of("conv")
    nodes = [model.graph.node[1], model.graph.node[0]]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    state = cpd.run("comb, score, allocate, prune", model)
    assert [n.op_type for n in state.model.graph.node] == [n.op_type for n in copies]
    assert list(state.model.graph.initializer[0].dims) == [4, 3, 3, 3]


def test_recursive_function() -> None:
    function = '<domain: "local", opset_import: ["": 17, "local": 1]> again (a) => (b) { b = fold_again(local, a) }'
    text = "(float[2, 4] x, float[4, 6] w, float[6, 3] v) => (float[2, 3] y) { h = MatMul(x, w) a = fold_again(local, h) y = MatMul(a, v) }"
    assert attempt(from_text(text, functions=function)) == "ModelError"


@pytest.mark.parametrize("name", ["conv", "heads", "lstm", "if", "rotary", "attention grouped 3d"])
def test_a_model_that_is_only_read_is_written_back_as_it_was(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.metadata_props.add(key="k", value="v")
    model.doc_string = "said"
    model.graph.doc_string = "about"
    model.graph.node[0].doc_string = "a node"
    model.graph.value_info.append(info("nowhere", [1, 2]))
    model.graph.quantization_annotation.add(tensor_name="w")
    big = np.arange(4000, dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(big, "unused"))
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    source.write_bytes(model.SerializeToString())
    load(source).save(target)
    assert target.read_bytes() == source.read_bytes()


def test_external_file_that_is_too_short(tmp_path: Path) -> None:
    model = model_of("conv")
    path = tmp_path / "m.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").write_bytes(b"short")
    with pytest.raises(cpd.ModelError, match="needs"):
        load(path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    onnx.save_model(
        model_of("conv"), inside / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    (inside / "m.data").rename(outside / "m.data")
    (inside / "m.data").symlink_to(outside / "m.data")
    with pytest.raises(cpd.ModelError, match="links out"):
        load(inside / "m.onnx")


def test_axes_that_are_too_long_to_follow_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file merged two axes to so many places that the machine ran out of memory."""
    text = (
        "(float[2, 3] x, float[3, 24] w, float[24, 5] v) => (float[2, 5] y) <int64[3] s = {2, 6, 4}, int64[2] f = {2, 24}>"
        " { a = MatMul(x, w) b = Reshape(a, s) c = Transpose <perm = [0, 2, 1]> (b) d = Reshape(c, f) y = MatMul(d, v) }"
    )
    assert comb(from_text(text)).groups
    monkeypatch.setattr("cpd_onnx.algebra.atoms._MOST_BYTES", 10_000)
    combed = comb(from_text(text))
    assert not combed.groups
    assert any("an axis of 24 indices" in reason for frozen in combed.frozen() for reason in frozen.reasons)


MATRICES = "float[4, 8] w, float[8, 4] v"
KERNELS = "float[8, 4, 1] w, float[4, 8, 1] v"
LONG = {
    "rows": f"(float[N, 4] x, {MATRICES}) => (float[N, 4] y) {{ a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }}",
    "pixels": f"(float[1, 4, N] x, {KERNELS}) => (float[1, 4, N] y) {{ a = Conv(x, w) b = Relu(a) y = Conv(b, v) }}",
    "merged": "(float[1, 4, H, H] x, float[8, 4, 1, 1] w, float[4, 8, 1] v) => (float[1, 4, N] y)"
    " <int64[3] s = {0, 0, -1}> { a = Conv(x, w) b = Reshape(a, s) y = Conv(b, v) }",
    "divided": f"(float[N, 4] x, {MATRICES}) => (float[H, H, 4] y) <int64[3] s = {{H, H, 4}}>"
    " { a = MatMul(x, w) b = MatMul(a, v) y = Reshape(b, s) }",
    "joined": f"(float[M, 4] x, {MATRICES}) => (float[N, 4] y)"
    " { a = MatMul(x, w) b = Concat <axis = 0> (a, a, a, a) y = MatMul(b, v) }",
    "padded": f"(float[M, 4] x, {MATRICES}) => (float[q, 4] y) <int64[4] s = {{0, 0, M, 0}}>"
    " { a = MatMul(x, w) b = Pad(a, s) y = MatMul(b, v) }",
    "sliced": f"(float[N, 4] x, {MATRICES}) => (float[q, 4] y) <int64[1] s = {{1}}, int64[1] e = {{M}}, int64[1] k = {{0}}>"
    " { a = MatMul(x, w) b = Slice(a, s, e, k) y = MatMul(b, v) }",
    "stretched": f"(float[1, 4] x, {MATRICES}) => (float[N, 4] y) <int64[2] s = {{N, 8}}>"
    " { a = MatMul(x, w) b = Expand(a, s) y = MatMul(b, v) }",
    "flattened": f"(float[1, 4, M] x, {KERNELS}) => (float[1, q] y) {{ a = Conv(x, w) b = Conv(a, v) y = Flatten(b) }}",
}


@pytest.mark.parametrize("name", LONG)
def test_axes_of_a_quarter_of_a_billion_indices_take_no_memory(name: str) -> None:
    """Each index of an axis took some hundred bytes, and some of the time each."""
    text = LONG[name]
    for letter, size in {"N": 1 << 28, "M": 1 << 26, "H": 1 << 14}.items():
        text = re.sub(rf"\b{letter}\b", str(size), text)
    model = from_text(text)
    tracemalloc.start()
    try:
        done = cpd.run("comb, score{kind='l1'}, allocate, prune", model)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    weight = next(tensor for tensor in done.model.proto.graph.initializer if tensor.name == "w")
    assert weight.dims[0 if "Conv" in text else 1] < 8


def test_inputs_of_gigabytes_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file of three open sizes was given sixteen thousand of each."""
    model = from_text("(float[N, 3, H, W] x) => (float[N, 3, a, b] y) <int64[4] s = {1, 3, 1, 1}> { y = Expand(x, s) }")
    tried: list[int] = []

    def refuse(session: object, feed: dict[str, np.ndarray]) -> None:
        tried.append(feed["x"].size)
        raise cpd.UnsupportedError("no")

    monkeypatch.setattr("cpd_onnx.runtime.sessions.execute", refuse)
    with pytest.raises(cpd.UnsupportedError, match="--input-shape"):
        next(working_feeds(fold(load(model)), open_model(load(model))))
    assert len(tried) > 5
    assert max(tried) < 1 << 26


MANY = 900_000_000_000
ATTENTION = {
    "packed": f"y = com.microsoft.Attention<num_heads = {MANY}>(a, p)",
    "packed in odd sizes": f"y = com.microsoft.Attention<num_heads = 1, qkv_hidden_sizes = [{MANY}, {MANY}, 16]>(a, p)",
    "apart": f"y = com.microsoft.MultiHeadAttention<num_heads = {MANY}>(a, a, a)",
    "grouped": f"y = com.microsoft.GroupQueryAttention<num_heads = {MANY}, kv_num_heads = 1>(a, a, a)",
    "a fraction": "y = com.microsoft.MultiHeadAttention<num_heads = 1e-30>(a, a, a)",
    "rotated": f"y = com.microsoft.RotaryEmbedding<num_heads = 2, rotary_embedding_dim = {MANY}>(a, k, c, c)",
    "rotated beyond the heads": "y = com.microsoft.RotaryEmbedding<num_heads = 2, rotary_embedding_dim = 12>(a, k, c, c)",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_that_no_tensor_has(name: str) -> None:
    """Room was made for each, or less than none was, so that other axes got the atoms of these."""
    weights = "float[16, 16] w, float[16, 48] p, float[4, 8] c, int64[4] k"
    combed = comb(
        from_text(f"(float[1, 4, 16] x, {weights}) => (float[1, 4, 16] y) {{ a = MatMul(x, w) {ATTENTION[name]} }}")
    )
    assert not combed.groups
    assert any("joins axes of" in r or "cannot handle" in r for frozen in combed.frozen() for r in frozen.reasons)


def test_a_description_with_other_axes_is_opened() -> None:
    """That of an input which names a weight was looked for among the inner tensors."""
    text = "(float[2, 4] x, float[4, 8] w, float[8, 3] v) => (float[2, 3] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    model = from_text(text)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 8, 1]))
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 8, 1]))
    pruned = cpd.run("comb, score, allocate, prune", model).model.proto
    described = {info.name: info.type.tensor_type.shape.dim for info in (*pruned.graph.input, *pruned.graph.value_info)}
    assert [dim.dim_value for dim in described["w"]] == list(pruned.graph.initializer[0].dims)
    assert len(described["h"]) == 2
    onnx.checker.check_model(pruned)


def test_only_one_keeps_reduced_axes() -> None:
    """Runtimes drop the axis for any other number; the columns of a square would then be divided by those of others."""
    text = (
        "(float[2, 3] x, float[3, 2] w, float[2, 4] v) => (float[2, 4] y)"
        " { a = MatMul(x, w) b = ReduceL2<axes = [1], keepdims = 7>(a) c = Div(a, b) y = MatMul(c, v) }"
    )
    with pytest.raises(cpd.TargetError, match="graph input 'x'"):
        cpd.run("comb, score, allocate, prune, verify", from_text(text))


@pytest.mark.parametrize("batch", ["n", "2"])
def test_a_count_of_elements_stays_what_it_was(batch: str) -> None:
    """Divided by, it is part of the function: written down where it is known, else what it counts is kept."""
    text = (
        f"(float[{batch}, 4] x, float[4, 8] w, float[8, 3] v) => (float[{batch}, 3] y)"
        " { a = MatMul(x, w) s = Size(a) t = Cast<to = 1>(s) b = Div(a, t) y = MatMul(b, v) }"
    )
    if batch == "n":
        with pytest.raises(cpd.TargetError, match="computes with a number derived from this size"):
            cpd.run("comb, score, allocate, prune, verify", from_text(text))
    else:
        done = cpd.run("comb, score, allocate, prune, verify", from_text(text)).verification
        assert done is not None
        assert done.passed


def test_weights_scaled_in_blocks_are_scored() -> None:
    """The scales, one for two rows, were laid along the axis as if there were one for each row."""
    text = (
        "(float[2, 4] x, int8[4, 6] q, float[2, 6] s, float[6, 3] v) => (float[2, 3] y)"
        " { w = DequantizeLinear<axis = 0, block_size = 2>(q, s) a = MatMul(x, w) y = MatMul(a, v) }"
    )
    combed = comb(from_text(text, opset=21))
    weight = next(w for w in combed.weights if w.name == "q")
    arrays = {t.name: numpy_helper.to_array(t) for t in combed.folded.model.graph.initializer}
    assert np.array_equal(dequantized(combed, weight), arrays["q"] * np.repeat(arrays["s"], 2, axis=0))
    assert cpd.run("comb, score, allocate, prune, verify", from_text(text, opset=21)).verification


@pytest.mark.parametrize(
    "graph",
    [
        "(float[2, 16] x, uint8[8, 1, 8] q, float[8] s) => (float[2, 8] y)"
        " { y = com.microsoft.MatMulNBits<K = 16, N = 8, bits = 4, block_size = 16, accuracy_level = 4>(x, q, s) }",
        "(float[2, 4] x, uint8[4, 8] q, float[8] s) => (float[2, 8] y) { y = com.microsoft.DynamicQuantizeMatMul(x, q, s) }",
    ],
)
def test_operators_that_round_inside_are_compared_like_quantised_ones(graph: str) -> None:
    """Nothing in the graph is of integers, but sums in another order may round to the other side."""
    assert tolerance(comb(from_text(graph))) == QUANTIZED


def test_a_scan_is_as_long_as_the_axis_that_it_goes_along() -> None:
    """Its length was taken from the first axis, and stood for unknown everywhere."""
    body = from_text(
        "(float[4] x_state, float[4] x_token) => (float[4] x_next, float[4] out)"
        " { x_next = Add(x_state, x_token) out = Tanh(x_next) }"
    ).graph
    model = from_text(
        "(float[5, 3, 6] x, float[6, 4] w, float[4, 2] v, float[3, 4] z) => (float[5, 3, 2] y)"
        " { a = MatMul(x, w) y = MatMul(a, v) }"
    )
    scan = helper.make_node(
        "Scan", ["z", "a"], ["last", "c"], body=body, num_scan_inputs=1, scan_input_axes=[0], scan_output_axes=[0]
    )
    turned = helper.make_node("Transpose", ["a"], ["u"], perm=[1, 0, 2])
    along = helper.make_node(
        "Scan", ["z", "u"], ["end", "d"], body=body, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1]
    )
    for at, node in enumerate((scan, turned, along), start=1):
        model.graph.node.insert(at, node)
    values = fold(load(model)).scope.values
    assert [values[name].shape for name in ("c", "d")] == [(5, 3, 4), (3, 5, 4)]
    assert not values["d"].has_placeholder


@pytest.mark.parametrize("wide", [2, 3])
def test_positions_in_images_of_another_size_keep_the_channels(wide: int) -> None:
    """They count through all channels: in wider images they are places of other channels."""
    pools = f"p, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h) u = MaxUnpool<kernel_shape = [2, {wide}], strides = [2, {wide}]>(p, i)"
    combed = comb(
        from_text(
            "(float[1, 3, 4, 4] x, float[6, 3, 1, 1] w, float[5, 6, 1, 1] v) => (float[1, 5, 4, q] y)"
            f" {{ h = Conv(x, w) {pools} y = Conv(u, v) }}"
        )
    )
    assert [len(group) for group in combed.groups] == ([6] if wide == 2 else [])


@pytest.mark.parametrize(
    "node",
    [
        "Attention<num_heads = 1e-30>(x, w, b)",
        "Attention<num_heads = [3, 4]>(x, w, b)",
        "Attention<num_heads = 0>(x, w, b)",
        "Attention<num_heads = 2, qkv_hidden_sizes = [0.5, 0.5, 0.5]>(x, w, b)",
        "QLinearConcat<axis = 0>(b, b, s, b, b)",
        "QLinearConcat<axis = 0.5>(b, b, x, b, b)",
        "MatMulNBits<K = 16, N = 0.5, bits = 4, block_size = 16>(x, w, b)",
        "MatMulNBits<K = 16, N = [5, 1], bits = 4, block_size = 16>(x, w, b)",
    ],
)
def test_attributes_of_other_types_are_no_shapes(node: str) -> None:
    """Sizes that were fractions or lists went on into the arithmetic of the channels."""
    text = "(float[1, 4, 16] x, float[16, 48] w, float[48] b, float s) => (float[1, 4, q] y)"
    assert not comb(from_text(f"{text} {{ y = com.microsoft.{node} }}")).groups


def test_a_split_without_any_sizes_gets_them_when_it_is_uneven() -> None:
    """The last piece is smaller by itself only where the count of pieces is named."""
    text = (
        "(float[2, 4] x, float[4, 6] w, float[3, 2] v, float[3, 2] u) => (float[2, 2] y, float[2, 2] z)"
        " { a = MatMul(x, w) b, c = Split<axis = 1>(a) y = MatMul(b, v) z = MatMul(c, u) }"
    )
    uneven = 0
    for seed in range(8):
        steps = f"comb, score{{kind='random', seed={seed}}}, allocate{{channels=0.6}}, prune"
        graph = cpd.run(steps, from_text(text, opset=18)).model.graph
        dims = {tensor.name: tensor.dims[0] for tensor in graph.initializer}
        split = next(node for node in graph.node if node.op_type == "Split")
        uneven += dims["u"] < dims["v"]
        assert len(split.input) == 1 + (dims["u"] != dims["v"])
    assert uneven


@pytest.mark.parametrize("operator", ["QLinearSigmoid", "QLinearLeakyRelu"])
def test_operators_without_all_that_their_table_is_made_of_are_refused(operator: str) -> None:
    """Onnxruntime ends the process when it opens the model."""
    text = f"(uint8[2, 4] x, float s, uint8 z) => (uint8[2, 4] y) {{ y = com.microsoft.{operator}(x, s, z, s) }}"
    with pytest.raises(cpd.ModelError, match="must have at least 5 inputs, got 4"):
        comb(from_text(text))
