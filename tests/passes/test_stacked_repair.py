"""Repair of weights that are stacks of matrices, inside recurrent operators or attention, or put together by the graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import comb
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.deploy.weight_bits import WeightBits, rounded
from cpd_onnx.fitting.units import SHARED, units_of
from cpd_onnx.ir.model import Array, Model, load
from cpd_onnx.ops.matrix_view import linear_of
from cpd_onnx.ops.recurrent_view import gates_of
from cpd_onnx.passes.repair import Repaired, repair
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.scores.registry import score
from cpd_onnx.shapes.inference import fold

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FEATURES, HIDDEN, STEPS = 6, 8, 5


def model_of(text: str, **weights: Array) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    return load(proto)


def redundant(operator: str, directions: int = 1) -> dict[str, Array]:
    """Weights of a recurrent operator of which the last three hidden units do what the first three do."""
    rng, gates = np.random.default_rng(0), GATES[operator]
    w = 0.8 * rng.standard_normal((directions, gates, HIDDEN, FEATURES))
    r = 0.5 * rng.standard_normal((directions, gates, HIDDEN, HIDDEN))
    b = 0.3 * rng.standard_normal((directions, 2, gates, HIDDEN))
    for array in (w, r):
        array[:, :, 5:] = array[:, :, :3]
    b[..., 5:] = b[..., :3]
    return {
        "w": w.reshape(directions, -1, FEATURES),
        "r": r.reshape(directions, -1, HIDDEN),
        "b": b.reshape(directions, -1),
        "o": rng.standard_normal((directions * HIDDEN, 4)),
    }


def recurrent(operator: str, attributes: str = "", directions: int = 1, first: str = "") -> Model:
    """A recurrent operator over the second axis of its input, and a matrix product behind it."""
    more = "linear_before_reset = 1," if operator == "GRU" else ""
    head = f"float[N, {STEPS}, {FEATURES}] x" + (f", float[N, {HIDDEN}] h" if first else "")
    states = "q = MatMul (h, p)\n h0 = Unsqueeze (q, zero)\n" if first else ""
    text = f"""g ({head}) => (float[N, {STEPS}, 4] y)
    {{
      t = Transpose <perm = [1, 0, 2]> (x)
      {states}
      s, last = {operator} <{more} {attributes} hidden_size = {HIDDEN}> (t, w, r, b{", , h0" if first else ""})
      u = Transpose <perm = [2, 0, 1, 3]> (s)
      v = Reshape (u, shape)
      y = MatMul (v, o)
    }}"""
    weights = redundant(operator, directions)
    model = model_of(text, **weights, **({"p": weights["r"][0, :HIDDEN].T} if first else {}))
    model.add_initializer("zero", np.array([0]))
    model.add_initializer("shape", np.array([0, 0, directions * HIDDEN]))
    return model


def sequences(count: int = 64, seed: int = 1, **shapes: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (STEPS, FEATURES), **shapes}
    return {name: rng.standard_normal((count, *shape)).astype(np.float32) for name, shape in shapes.items()}


def narrowed(model: Model, size: int, places: list[int], feed: dict[str, Array]) -> tuple[Model, Repaired]:
    """The model without some channels of its group of a size, and its repair."""
    combed = comb(model)
    group = next(group for group in combed.groups if len(group) == size)
    kept = KeepMask(combed.atoms, group.channels[places])
    small = rewrite(combed, kept).model
    return small, repair(combed, kept, small, ArraySource(feed))


def error(original: Model, model: Model, feed: dict[str, Array]) -> float:
    """The mean square error of the output, relative to its variance."""
    want, got = (execute(open_model(each), feed)[0] for each in (original, model))
    return float(np.square(got - want).mean() / want.var())


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_states_of_a_plain_layer_are_what_its_products_give(direction: str, batch_first: bool) -> None:
    rng, directions, batch = np.random.default_rng(0), 1 + (direction == "bidirectional"), 3
    shapes = (
        (STEPS, batch, FEATURES),
        (directions, HIDDEN, FEATURES),
        (directions, HIDDEN, HIDDEN),
        (directions, batch, HIDDEN),
    )
    x, w, r, first = (0.5 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    node = helper.make_node("RNN", ["x", "w", "r", "", "", "h"], ["s"], hidden_size=HIDDEN, direction=direction)
    infos = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "h", "s")]
    parameters = [numpy_helper.from_array(array, name) for array, name in ((w, "w"), (r, "r"))]
    graph = helper.make_graph([node], "g", infos[:2], infos[2:], parameters)
    states = execute(open_model(load(helper.make_model(graph, ir_version=8))), {"x": x, "h": first})[0]
    if batch_first:  # which onnxruntime does not run
        node.attribute.append(helper.make_attribute("layout", 1))
        x, first, states = x.swapaxes(0, 1), first.swapaxes(0, 1), states.transpose(2, 0, 1, 3)
    inputs, before = gates_of(node)
    places = np.arange(inputs.count(states.shape))[::2]
    assert len(places) == -(-STEPS * batch // 2)
    made = inputs.rows(x, places) @ inputs.matrix(w)
    made = made + before.rows(before.before(states, first), places) @ before.matrix(r)
    np.testing.assert_allclose(np.tanh(made), inputs.targets(states, places), atol=1e-5)
    np.testing.assert_array_equal(inputs.weight(inputs.matrix(w)), w)


@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_hidden_units_that_others_can_make_up_for_cost_nothing(operator: str, direction: str) -> None:
    model = recurrent(operator, f'direction = "{direction}",', 1 + (direction == "bidirectional"))
    assert not units_of(comb(model).folded).left
    feed, unseen = sequences(), sequences(seed=2)
    small, made = narrowed(model, HIDDEN, [5, 6, 7], feed)
    assert {fit.weight for fit in made.fits} >= {"r", "o"}
    assert error(model, small, unseen) > 0.1
    assert error(model, made.model, unseen) < 1e-4
    values = score(comb(model), "reconstruction", data=ArraySource(feed))
    hidden = next(v for group, v in zip(comb(model).groups, values, strict=True) if len(group) == HIDDEN)
    assert np.sort(hidden)[2] < 0.01 * np.sort(hidden)[3]


@pytest.mark.parametrize("operator", GATES)
def test_inputs_that_others_can_make_up_for_cost_nothing(operator: str) -> None:
    """The last features of the input are sums of others, with an offset that the bias takes."""
    model = recurrent(operator)
    proto = model.complete_proto()
    mix = np.eye(FEATURES, dtype=np.float32)
    mix[:, 4:] = np.random.default_rng(4).standard_normal((FEATURES, 2))
    mix[4:, 4:] = 0
    proto.graph.node.insert(0, helper.make_node("MatMul", ["x", "mix"], ["mixed"]))
    proto.graph.node.insert(1, helper.make_node("Add", ["mixed", "offset"], ["shifted"]))
    node = proto.graph.node[2]
    node.input[0] = "shifted"
    offset = np.r_[np.zeros(4), 0.7, -0.5].astype(np.float32)
    proto.graph.initializer.extend([numpy_helper.from_array(mix, "mix"), numpy_helper.from_array(offset, "offset")])
    model = load(proto)
    small, made = narrowed(model, FEATURES, [4, 5], sequences())
    assert {"w"} <= {fit.weight for fit in made.fits}
    assert error(model, small, sequences(seed=2)) > 0.1
    assert error(model, made.model, sequences(seed=2)) < 1e-4


def test_first_states_that_the_model_is_given_are_features_too() -> None:
    model = recurrent("LSTM", first="h")
    unit = next(unit for unit in units_of(comb(model).folded).found if unit.weight == "r")
    assert (unit.first, unit.taken) == ("h0", ("s", "h0"))
    feed, unseen = (sequences(seed=seed, h=(HIDDEN,)) for seed in (1, 2))
    small, made = narrowed(model, HIDDEN, [5, 6, 7], feed)
    assert {fit.weight for fit in made.fits} >= {"r", "o"}
    assert error(model, made.model, unseen) < 1e-4 < error(model, small, unseen)


def test_weights_inside_a_recurrent_operator_that_cannot_be_fitted_are_left() -> None:
    late = recurrent("GRU").complete_proto()
    for node in late.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "linear_before_reset"]
        del node.attribute[:]
        node.attribute.extend(kept)
    found = units_of(comb(load(late)).folded)
    assert [unit.weight for unit in found.found] == ["w", "o"]
    unnamed = recurrent("LSTM").complete_proto()
    unnamed.graph.node[1].output[0] = ""
    del unnamed.graph.node[2:]
    unnamed.graph.node.append(helper.make_node("Identity", ["last"], ["y"]))
    unnamed.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    unnamed.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "N"
    unnamed.graph.output[0].type.tensor_type.shape.dim[2].dim_value = HIDDEN
    found = units_of(comb(load(unnamed)).folded)
    assert found.left == dict.fromkeys(("w", "r"), "all states of its operator are no tensor of the graph")


STACK = """g (float[N, 6] x) => (float[3, N, 4] y)
{
  m = MatMul (x, w0)
  a = Add (m, b0)
  r = Relu (a)
  n = MatMul (r, w1)
  y = Add (n, b1)
}"""


def stack() -> Model:
    """Three networks of one hidden layer on the same data, whose last two hidden units do what the first two do."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (3, 6, 7), "b0": (3, 1, 7), "w1": (3, 7, 4), "b1": (3, 1, 4)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    weights["w0"][..., 5:], weights["b0"][..., 5:] = weights["w0"][..., :2], weights["b0"][..., :2]
    return model_of(STACK, **weights)


@pytest.mark.parametrize(
    ("stack", "data"),
    [((3,), (5, 6)), ((3,), (3, 5, 6)), ((3,), (2, 1, 5, 6)), ((1,), (2, 5, 6)), ((2, 3), (3, 5, 6)), ((2, 1), (2, 3, 5, 6)), ((3,), (6,))],
)  # fmt: skip  # a table
def test_a_product_with_a_stack_is_rows_times_matrices(stack: tuple[int, ...], data: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((*stack, 6, 4)), rng.standard_normal(data)
    linear, y = linear_of(helper.make_node("MatMul", ["x", "w"], ["y"]), weight.shape), x @ weight
    assert linear is not None
    places = np.arange(linear.count(y.shape))[::2]
    np.testing.assert_allclose(linear.rows(x, places) @ linear.matrix(weight), linear.targets(y, places), atol=1e-9)
    np.testing.assert_array_equal(linear.weight(linear.matrix(weight)), weight)
    assert len(places) == -(-y[..., 0].size // int(np.prod(stack)) // 2)


def test_weights_of_a_stack_are_fitted_with_their_biases() -> None:
    model = stack()
    units = {unit.weight: unit for unit in units_of(comb(model).folded).found}
    assert {name: unit.bias and unit.bias.name for name, unit in units.items()} == {"w0": "b0", "w1": "b1"}
    np.testing.assert_array_equal(units["w0"].shift, model.array("b0").ravel())
    feed, unseen = ({"x": 1.0 + sequences(seed=seed)["x"][:, 0]} for seed in (1, 2))
    small, made = narrowed(model, 7, [5, 6], feed)
    assert {fit.weight for fit in made.fits} == {"w1"}
    assert error(model, small, unseen) > 0.1
    assert error(model, made.model, unseen) < 1e-6


def moved_lstm(shared: bool = False) -> Model:
    """A layer whose weights are cut from matrices with the gates in another order, as torch holds them."""
    plain = recurrent("LSTM")
    arrays = {name: plain.array(name) for name in ("w", "r", "b", "o")}
    proto = plain.complete_proto()
    order = [0, 3, 1, 2]  # from input, output, forget, cell to input, forget, cell, output
    places = np.concatenate([np.arange(HIDDEN) + HIDDEN * (0, 2, 3, 1)[gate] for gate in range(4)])
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in ("w", "r")]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    ends = {f"e{gate}": np.array([gate * HIDDEN]) for gate in range(5)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in ends.items())
    nodes = []
    for name in ("w", "r"):
        proto.graph.initializer.append(numpy_helper.from_array(arrays[name][0][places], f"{name}_torch"))
        cut = [f"{name}{gate}" for gate in order]
        nodes += [
            helper.make_node("Slice", [f"{name}_torch", f"e{gate}", f"e{gate + 1}", "zero"], [f"{name}{gate}"])
            for gate in range(4)
        ]
        nodes.append(helper.make_node("Concat", cut, [f"{name}_cut"], axis=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{name}_cut", "zero"], [name]))
    if shared:
        nodes.append(helper.make_node("ReduceSum", ["r2"], ["other"]))
    nodes += proto.graph.node
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return load(proto)


def test_weights_that_the_graph_puts_together_are_fitted_in_their_parts() -> None:
    model, plain = moved_lstm(), recurrent("LSTM")
    units = {unit.weight: unit for unit in units_of(comb(model).folded).found}
    assert list(units) == ["w_torch", "r_torch", "o"]
    for name in ("w", "r"):
        unit = units[f"{name}_torch"]
        np.testing.assert_array_equal(unit.matrix(model), plain.array(name).transpose(0, 2, 1))
        changed = model.copy()
        unit.store(changed, 2 * unit.matrix(model))
        np.testing.assert_array_equal(changed.array(unit.weight), 2 * model.array(unit.weight))
    feed, unseen = sequences(), sequences(seed=2)
    small, made = narrowed(model, HIDDEN, [5, 6, 7], feed)
    assert {fit.weight for fit in made.fits} >= {"r_torch", "o"}
    assert error(model, made.model, unseen) < 1e-4 < error(model, small, unseen)
    _, alike = narrowed(plain, HIDDEN, [5, 6, 7], feed)
    np.testing.assert_allclose(*(execute(open_model(each), unseen)[0] for each in (made.model, alike.model)), atol=1e-3)


def test_parts_that_something_else_takes_too_are_left() -> None:
    found = units_of(comb(moved_lstm(shared=True)).folded)
    assert [unit.weight for unit in found.found] == ["w_torch", "o"]


def test_weights_of_stacks_stay_as_they_are_in_few_bits() -> None:
    rng = np.random.default_rng(0)
    text = "g (float[N, 64] x) => (float[3, N, 64] y) { m = MatMul (x, w0) y = MatMul (m, w1) }"
    model = model_of(text, w0=rng.standard_normal((64, 64)), w1=rng.standard_normal((3, 64, 64)))
    made = rounded(model, None, WeightBits(bits=8))
    assert list(made.integers) == ["w0"]
    assert made.left["w1"].startswith("it is a stack of matrices")


def attention(bias: bool = True) -> Model:
    """Attention that projects its input itself, whose last three features are those of the first three."""
    rng, features, heads, width = np.random.default_rng(0), 12, 4, 16
    first = rng.standard_normal((FEATURES, features))
    first[:, 9:] = first[:, :3]
    more = {"b": rng.standard_normal(3 * width)} if bias else {}
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[N, {STEPS}, {FEATURES}] x) => (float[N, {STEPS}, 4] y)
    {{
      h = MatMul (x, w0)
      r = Relu (h)
      a = com.microsoft.Attention <num_heads = {heads}> (r, w{", b" if bias else ""})
      y = MatMul (a, o)
    }}""")
    weights = {
        "w0": first, "w": rng.standard_normal((features, 3 * width)) / 3, "o": rng.standard_normal((width, 4)), **more,
    }  # fmt: skip  # a table
    proto.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    return load(proto)


@pytest.mark.parametrize("bias", [True, False])
def test_projections_inside_attention_are_fitted(bias: bool) -> None:
    model, unseen = attention(bias), sequences(seed=2)
    small, made = narrowed(model, 12, [9, 10, 11], sequences())
    assert "w" in {fit.weight for fit in made.fits}
    assert error(model, small, unseen) > 0.1
    assert error(model, made.model, unseen) < 1e-5


def test_projections_of_the_heads_that_survive_are_fitted() -> None:
    model, unseen = attention(), sequences(seed=2)
    combed = comb(model)
    sizes = {len(group): group for group in reversed(combed.groups)}  # of several with one size, the first
    gone = np.concatenate([sizes[12].channels[9:], sizes[4].channels[3:]])
    kept = KeepMask(combed.atoms, gone)
    small = rewrite(combed, kept).model
    made = repair(combed, kept, small, ArraySource(sequences())).model
    assert made.array("w").shape == (9, 36)
    assert error(model, made, unseen) < 0.5 * error(model, small, unseen)


def test_packed_projections_of_several_nodes_are_left() -> None:
    proto = attention().complete_proto()
    other = onnx.NodeProto()
    other.CopyFrom(proto.graph.node[2])
    other.output[0] = "a2"
    proto.graph.node[3].input[0] = "sum"
    nodes = [*proto.graph.node[:3], other, helper.make_node("Add", ["a", "a2"], ["sum"]), proto.graph.node[3]]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    found = units_of(comb(load(proto)).folded)
    assert found.left["w"] == SHARED
    assert {unit.weight for unit in found.found} == {"w0", "o"}


def test_a_mask_that_embeddings_count_reaches_attention_in_a_part_of_the_model() -> None:
    """It is of integers beside outputs of real numbers: onnxruntime refuses a part of the model of another type."""
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (int32[N, {STEPS}] x, int32[N, {STEPS}] m) => (float[N, {STEPS}, 4] y)
    {{
      e, mask = com.microsoft.EmbedLayerNormalization (x, , words, places, , scale, shift, m)
      h = MatMul (e, w0)
      r = Relu (h)
      a = com.microsoft.Attention <num_heads = 4> (r, w, b, mask)
      y = MatMul (a, o)
    }}""")
    rng = np.random.default_rng(0)
    shapes = {"words": (20, 8), "places": (STEPS, 8), "scale": (8,), "shift": (8,), "w0": (8, 12), "w": (12, 48)}
    shapes |= {"b": (48,), "o": (16, 4)}
    weights = {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    model = load(proto)
    feed = {"x": rng.integers(0, 20, (256, STEPS)).astype(np.int32), "m": np.ones((256, STEPS), np.int32)}
    assert fold(model).scope.values["mask"].dtype == onnx.TensorProto.INT32
    small, made = narrowed(model, 12, [9, 10, 11], feed)
    assert "w" in {fit.weight for fit in made.fits}
    assert error(model, made.model, feed) < error(model, small, feed)
    assert score(comb(model), "reconstruction", samples=32, data=ArraySource(feed))
