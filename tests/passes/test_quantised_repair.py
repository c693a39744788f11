"""Repair of models that were quantised before they are pruned: weights are fitted in the steps of their integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import removable_groups
from cpd_onnx.channels.combing import comb
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.deploy.quantize import Quantization, quantize
from cpd_onnx.errors import ProofError, UnsupportedError
from cpd_onnx.fitting.levels import levels_of
from cpd_onnx.fitting.steps import Steps
from cpd_onnx.fitting.units import units_of
from cpd_onnx.ir.model import Model, load
from cpd_onnx.ir.tensors import changed_values
from cpd_onnx.ops.quantized_view import LIMITS, Packing, pack, unpack
from cpd_onnx.passes.repair import Repaired, repair
from cpd_onnx.pipeline.pipeline import run
from cpd_onnx.proof.files import verify_files
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.scores.registry import score

CONV = """g (float[N, 3, 6, 6] x) => (float[N, 5] y)
{
  a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
  r = Relu(a)
  c = Conv <pads = [1, 1, 1, 1]> (r, w1, b1)
  d = Relu(c)
  e = Conv (d, w2, b2)
  f = Add(e, r)
  h = Relu(f)
  p = GlobalAveragePool(h)
  q = Flatten(p)
  z = MatMul(q, w3)
  y = Add(z, b3)
}"""
DENSE = """g (float[N, 16] x) => (float[N, 8] y)
{
  a = MatMul(x, w0)
  c = Add(a, b0)
  d = Relu(c)
  e = MatMul(d, w1)
  f = Add(e, b1)
  h = Relu(f)
  i = MatMul(h, w2)
  y = Add(i, b2)
}"""
SHAPES = {
    CONV: {
        "w0": (8, 3, 3, 3), "b0": (8,), "w1": (12, 8, 3, 3), "b1": (12,), "w2": (8, 12, 1, 1), "b2": (8,), "w3": (8, 5), "b3": (5,),
    },
    DENSE: {"w0": (16, 64), "b0": (64,), "w1": (64, 64), "b1": (64,), "w2": (64, 8), "b2": (8,)},
}  # fmt: skip  # a table


def model_of(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in weights.items())
    return proto


def plain(text: str, opset: int = 17) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in SHAPES[text].items()}
    return model_of(text, opset, **weights)


def inputs(text: str, count: int = 256, seed: int = 1) -> dict[str, np.ndarray]:
    shape = (3, 6, 6) if text == CONV else (16,)
    return {"x": np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)}


def outputs(model: Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    return execute(open_model(model), feed)[0]


def static(text: str = CONV, **options: object) -> Model:
    return quantize(load(plain(text)), ArraySource(inputs(text)), Quantization(**options))


def dynamic(folder: Path, **options: object) -> Model:
    onnx.save(plain(DENSE), folder / "plain.onnx")
    quantize_dynamic(folder / "plain.onnx", folder / "dynamic.onnx", **options)
    return load(onnx.load(folder / "dynamic.onnx"))


def halved(model: Model) -> tuple:
    """Every group without half of its channels."""
    combed = comb(model)
    scores = score(combed, "l2")
    gone = [group.channels[np.argsort(s)[: len(group) // 2]] for group, s in zip(combed.groups, scores, strict=True)]
    kept = KeepMask(combed.atoms, np.concatenate(gone))
    return combed, kept, rewrite(combed, kept).model


def repaired(model: Model, text: str) -> tuple[Model, Repaired, float]:
    """The pruned model, the repair, and the remaining fraction of the error of the outputs on other inputs."""
    combed, kept, small = halved(model)
    found = repair(combed, kept, small, ArraySource(inputs(text)))
    other = inputs(text, 128, 2)
    before, after = (
        float(np.square(outputs(each, other) - outputs(model, other)).mean()) for each in (small, found.model)
    )
    return small, found, after / before


def levels(model: Model) -> dict[str, np.ndarray]:
    """Scales and zero points of the activations."""
    ranges = {
        "QuantizeLinear": (1, 2),
        "QLinearConv": (1, 2, 6, 7),
        "QLinearMatMul": (1, 2, 6, 7),
        "QGemm": (1, 2, 7, 8),
    }
    nodes = [node for node in model.graph.node if node.op_type in ranges]
    return {node.input[slot]: model.array(node.input[slot]) for node in nodes for slot in ranges[node.op_type]}


STATIC = {
    "per channel": {},
    "per tensor": {"per_channel": False},
    "seven bits": {"reduce_range": True},
    "symmetric int8": {"activations": "int8", "symmetric": True},
    "float biases": {"quantized_bias": False},
    "operators": {"form": "qoperator"},
    "operators per tensor": {"form": "qoperator", "per_channel": False},
}


@pytest.mark.parametrize("text", [CONV, DENSE], ids=["conv", "dense"])
@pytest.mark.parametrize("case", STATIC)
def test_a_repair_lowers_the_error_of_a_quantised_model(case: str, text: str) -> None:
    model = static(text, **STATIC[case])
    small, found, left = repaired(model, text)
    assert left < 0.5
    assert found.left == {}
    kinds = {tensor.name: tensor.data_type for tensor in small.graph.initializer}
    fitted = {fit.weight for fit in found.fits}
    assert {kinds[name] for name in fitted} == {TensorProto.INT8}
    for name, before in levels(small).items():
        np.testing.assert_array_equal(found.model.array(name), before)


def test_seven_bits_stay_seven_bits() -> None:
    _, found, _ = repaired(static(reduce_range=True), CONV)
    assert found.fits
    assert all(np.abs(found.model.array(fit.weight).astype(int)).max() <= 64 for fit in found.fits)


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_scale_of_a_bias_remains_the_product_of_those_of_data_and_weight(per_channel: bool) -> None:
    small, found, _ = repaired(static(per_channel=per_channel), CONV)
    changed, model = changed_values(small, found.model), found.model
    makers = {node.output[0]: node for node in model.graph.node}
    seen = 0
    for node in (n for n in model.graph.node if n.op_type == "Conv"):
        data, weight, bias = (makers[name] for name in node.input)
        product = model.array(data.input[1]) * model.array(weight.input[1])
        np.testing.assert_allclose(model.array(bias.input[1]), product, rtol=1e-6)
        seen += bias.input[1] in changed
    assert seen == 2


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_that_meet_data_quantised_by_its_own_range(tmp_path: Path, kind: QuantType, per_channel: bool) -> None:
    model = dynamic(tmp_path, weight_type=kind, per_channel=per_channel)
    assert "MatMulInteger" in {node.op_type for node in model.graph.node}
    small, found, left = repaired(model, DENSE)
    assert left < 0.6
    # The input of the first weight is as it was, so that there is nothing to make up for.
    assert [fit.weight for fit in found.fits] == ["w1_quantized", "w2_quantized"]
    assert "w0_scale" not in changed_values(small, found.model)


def fused(operator: str) -> Model:
    """The dense model with onnxruntime's operators for products of floats or of quantised data by integers."""
    rng, text = np.random.default_rng(0), ["g (float[N, 16] x) => (float[N, 8] y) {"]
    weights, data = {}, "x"
    for number, (size, width) in enumerate([(16, 32), (32, 32), (32, 8)]):
        matrix = rng.standard_normal((size, width)) * 0.3
        scale = np.abs(matrix).max(0) / 127
        weights[f"w{number}"] = np.rint(matrix / scale).astype(np.int8)
        weights[f"s{number}"], weights[f"z{number}"] = scale.astype(np.float32), np.zeros(width, np.int8)
        weights[f"b{number}"] = (rng.standard_normal(width) * 0.3).astype(np.float32)
        own = f"w{number}, s{number}, z{number}, b{number}"
        out = "y" if number == 2 else f"p{number}"
        if operator == "MatMulIntegerToFloat":
            text.append(f"q{number}, t{number}, u{number} = DynamicQuantizeLinear({data})")
            text.append(
                f"{out} = com.microsoft.{operator}(q{number}, w{number}, t{number}, s{number}, u{number}, z{number}, b{number})"
            )
        else:
            text.append(f"{out} = com.microsoft.{operator}({data}, {own})")
        if number < 2:
            text.append(f"h{number} = Relu({out})")
        data = f"h{number}"
    return load(model_of("\n".join([*text, "}"]), **weights))


@pytest.mark.parametrize("operator", ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
def test_weights_of_fused_operators(operator: str) -> None:
    _, found, left = repaired(fused(operator), DENSE)
    assert left < 0.6
    assert [fit.weight for fit in found.fits] == ["w1", "w2"]


def packed(bits: int, *, symmetric: bool) -> Model:
    """The dense model with weights packed in blocks of 16, as onnxruntime packs them."""
    proto = plain(DENSE)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in [n for n in proto.graph.node if n.op_type == "MatMul"]:
        name, matrix = node.input[1], values[node.input[1]]
        (rows, columns), high = matrix.shape, (1 << bits) - 1
        blocks = matrix.T.reshape(columns, -1, 16)
        least, most = (np.zeros(1), np.abs(blocks).max(2)) if symmetric else (blocks.min(2), blocks.max(2))
        scale = (most / (high // 2) if symmetric else (most - least) / high).astype(np.float32)
        zero = np.full(scale.shape, 1 << (bits - 1)) if symmetric else np.rint(-least / scale).clip(0, high).astype(int)
        numbers = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, high)
        stored = {"Q": pack(numbers.reshape(-1), bits).reshape(columns, -1, 16 * bits // 8), "s": scale}
        whole = np.pad(zero, ((0, 0), (0, -zero.shape[1] % (8 // bits))))  # each column has whole bytes
        stored |= {} if symmetric else {"z": pack(whole.reshape(-1), bits).reshape(columns, -1)}
        proto.graph.initializer.extend(numpy_helper.from_array(array, name + kind) for kind, array in stored.items())
        node.op_type, node.domain = "MatMulNBits", "com.microsoft"
        node.attribute.extend(
            helper.make_attribute(*each) for each in (("K", rows), ("N", columns), ("bits", bits), ("block_size", 16))
        )
        node.input[:] = [node.input[0], *(name + kind for kind in stored)]
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in ("w0", "w1", "w2")]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return load(proto)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_in_blocks(bits: int, symmetric: bool) -> None:
    model = packed(bits, symmetric=symmetric)
    unit = units_of(comb(model).folded).found[1]
    data = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    part = helper.make_graph(
        [next(n for n in model.graph.node if unit.weight in n.input)], "g",
        [helper.make_tensor_value_info("d", TensorProto.FLOAT, None)], [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
        list(model.complete_proto().graph.initializer),
    )  # fmt: skip  # what and how
    alone = helper.make_model(
        part, ir_version=10, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    )
    np.testing.assert_allclose(
        outputs(load(alone), {"d": data}), data @ unit.matrix(model)[0].astype(np.float32), atol=1e-4
    )
    _, found, left = repaired(model, DENSE)
    assert left < (0.7 if bits == 4 else 0.6)
    assert [fit.weight for fit in found.fits] == ["w1Q", "w2Q"]


def test_numbers_of_fewer_than_eight_bits_are_packed_as_they_were() -> None:
    rng = np.random.default_rng(0)
    for bits in (2, 4, 8):
        numbers = rng.integers(0, 1 << bits, 3 * 2 * 16).astype(np.uint8)
        np.testing.assert_array_equal(unpack(pack(numbers, bits), bits), numbers)
        packing, stored = Packing(bits, 16, 20, 3), pack(numbers, bits)
        matrix = packing.unpacked(stored)
        assert matrix.shape == (20, 3)
        np.testing.assert_array_equal(packing.packed(matrix, stored), stored)


BLOCKED = """g (float[N, 16] x) => (float[N, 8] y)
{
  a = MatMul(x, w0)
  d = Relu(a)
  e = MatMul(d, w1)
  h = Relu(e)
  w2 = DequantizeLinear <axis = 0, block_size = 8> (q, s, z)
  y = MatMul(h, w2)
}"""


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT8"])
def test_a_weight_dequantised_in_blocks(kind: str) -> None:
    """Its inputs are frozen, but what they hold changes with the weights before."""
    rng = np.random.default_rng(0)
    low, high = LIMITS[TensorProto.DataType.Value(kind)]
    integers = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind))
    scale = np.full((4, 8), 2.0 / (high - low), np.float32)
    zero = np.full((4, 8), 8 if kind == "UINT4" else 0)
    weights = {
        "w0": (rng.standard_normal((16, 24)) * 0.3).astype(np.float32),
        "w1": (rng.standard_normal((24, 32)) * 0.3).astype(np.float32),
        "q": rng.integers(low, high + 1, (32, 8)).astype(integers), "s": scale, "z": zero.astype(integers),
    }  # fmt: skip  # a table
    model = load(model_of(BLOCKED, 21, **weights))
    small, found, left = repaired(model, DENSE)
    assert left < 0.9
    assert [fit.weight for fit in found.fits] == ["w1", "q"]
    assert {"q", "s"} <= changed_values(small, found.model).keys()


FAKE = """g (float[N, 16] x) => (float[N, 8] y)
{
  a = MatMul(x, w0)
  d = Relu(a)
  n = QuantizeLinear <axis = 1> (w1, s, z)
  m = DequantizeLinear <axis = 1> (n, s, z)
  y = MatMul(d, m)
}"""


def fake() -> Model:
    rng = np.random.default_rng(0)
    w0, w1 = ((rng.standard_normal(shape) * 0.3).astype(np.float32) for shape in ((16, 32), (32, 8)))
    scale = (np.abs(w1).max(0) / 127).astype(np.float32)
    return load(model_of(FAKE, w0=w0, w1=w1, s=scale, z=np.zeros(8, np.int8)))


def test_a_float_weight_that_the_graph_rounds() -> None:
    """As exported after training with simulated quantisation: it is fitted to what the graph makes of it."""
    small, found, left = repaired(fake(), DENSE)
    assert left < 0.8
    assert list(changed_values(small, found.model)) == ["w1", "s"]
    steps = found.model.array("w1") / found.model.array("s")
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    assert np.abs(steps).max() < 127.5


SHARED = """g (float[N, 16] x) => (float[N, 8] y, float[N, 4] t)
{
  v0 = DequantizeLinear(w0, s, z)
  a = MatMul(x, v0)
  d = Relu(a)
  v1 = DequantizeLinear(w1, s, z)
  y = MatMul(d, v1)
  v2 = DequantizeLinear(w2, s, z)
  t = MatMul(x, v2)
}"""


def test_a_scale_that_other_weights_use_is_not_changed() -> None:
    rng = np.random.default_rng(0)
    shapes = {"w0": (16, 32), "w1": (32, 8), "w2": (16, 4)}
    weights = {name: rng.integers(-127, 128, shape).astype(np.int8) for name, shape in shapes.items()}
    model = load(model_of(SHARED, **weights, s=np.float32(0.01), z=np.int8(0)))
    small, found, left = repaired(model, DENSE)
    assert left < 0.9
    assert list(changed_values(small, found.model)) == ["w1"]
    assert {found.model.array("w1").min(), found.model.array("w1").max()} <= set(range(-128, 128))


def test_a_weight_with_scales_of_another_type_is_left() -> None:
    halves = {"w0": np.ones((16, 8), np.int8), "s": np.float16(0.1), "z": np.int8(0)}
    text = "g (float16[N, 16] x) => (float16[N, 8] y) { v = DequantizeLinear(w0, s, z) y = MatMul(x, v) }"
    found = units_of(comb(load(model_of(text, **halves))).folded)
    assert (found.found, found.left) == (
        [],
        {"v": "neither in half, single or double precision nor integers with constant scales in float32"},
    )


def test_rounding_is_made_up_for_by_what_is_rounded_later() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2000, 6)) @ rng.standard_normal((6, 24)) + 0.1 * rng.standard_normal((2000, 24))
    moments = (rows.T @ rows / len(rows))[None]
    matrix = rng.standard_normal((1, 24, 6))
    steps = Steps(np.broadcast_to(np.arange(6), (1, 24, 6)), np.full(6, 0.4), np.zeros(1), (-8, 7), is_free=False)
    found, scales = steps.rounded(matrix, moments)
    np.testing.assert_array_equal(scales, steps.scales)
    np.testing.assert_allclose(found / 0.4, np.rint(found / 0.4), atol=1e-9)

    def error(made: np.ndarray) -> float:
        return float(np.square(rows @ (made - matrix)[0]).mean())

    assert error(found) < 0.5 * error(np.clip(np.rint(matrix / 0.4), -8, 7) * 0.4)


def test_scales_are_as_small_as_the_values_allow() -> None:
    matrix = np.array([[[1.27, -0.5], [-0.2, 2.54]]])
    cells = np.broadcast_to(np.arange(2), (1, 2, 2))
    steps = Steps(cells, np.full(2, 0.1), np.zeros(1), (-127, 127), is_free=True)
    np.testing.assert_allclose(steps.fitting(matrix), [0.01, 0.02], rtol=1e-6)
    assert (steps.fitting(0 * matrix) > 0).all()  # the bias of a dead output remains within 32 bits
    negative = Steps(cells, np.array([-1.0, 1.0]), np.full(1, 8.0), (0, 15), is_free=True)
    np.testing.assert_allclose(negative.fitting(np.array([[[8.0, 0], [-7.0, 0]]]))[0], -1)


def test_scores_of_a_model_do_not_depend_on_the_form_of_its_integers() -> None:
    """Integer operators clip their outputs, and their data has a zero point."""
    source = ArraySource(inputs(CONV))
    both = [comb(static(form=form)) for form in ("qdq", "qoperator")]
    whole = removable_groups(both[0])  # integer operators need a channel, whose score is high
    for kind in ("activation", "wanda", "variance", "reconstruction"):
        scores = [score(combed, kind, data=source) for combed in both]
        last = [int(np.argmax(own)) for own in scores[1]]
        found = [
            np.concatenate([np.delete(own, last[i]) if i in whole else own for i, own in enumerate(each)])
            for each in scores
        ]
        np.testing.assert_allclose(*found, rtol=0.1, atol=0.02 * found[0].max())


def test_scores_by_gradients_refuse_operators_on_integers() -> None:
    pytest.importorskip("torch")
    with pytest.raises(UnsupportedError, match="no output has a gradient"):
        score(comb(static(form="qoperator")), "curvature", data=ArraySource(inputs(CONV)))


def test_levels_are_those_of_activations_alone() -> None:
    model = static(form="qoperator")
    folded = comb(model).folded
    found = levels_of(folded)
    assert not any(model.has(name) for name in found)
    assert {folded.scope.values[name].dtype for name in found} == {TensorProto.UINT8}


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_the_plan_names_refitted_integers_and_scales(form: str) -> None:
    """Other values of a weight, a scale or a bias are found, and the same inputs give the same bytes."""
    model, source = static(form=form), ArraySource(inputs(CONV))
    line = "comb, score{kind='reconstruction'}, allocate{channels=0.5}, prune, verify, repair"
    state = run(line, model, data=source)
    assert state.plan is not None
    assert state.repaired is not None
    names = state.plan.values
    weight = state.repaired["fitted"][0]["weight"]
    assert {weight, weight.replace("_quantized", "_scale")} <= names.keys()
    verified = verify_files(model, state.model, state.plan)
    assert set(verified.trained) == set(names)
    again = run(line, static(form=form), data=source)
    assert again.model.serialize() == state.model.serialize()
    for name in (weight, weight.replace("_quantized", "_scale")):
        other = state.model.copy()
        array = other.array(name).copy()
        array.flat[0] = array.flat[0] * 2 if array.dtype.kind == "f" else array.flat[0] ^ 1
        other.set_array(name, array)
        with pytest.raises(ProofError):
            verify_files(model, other, state.plan)


def as_torch_exports(model: Model) -> Model:
    """The model with its numbers in Constant nodes, zero points that are computed, and casts that change nothing."""
    proto, nodes = model.complete_proto(), []
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        for slot, name in enumerate(node.input):
            if name in values and values[name].data_type != TensorProto.INT64:
                own = f"{name}_{len(nodes)}"
                array = numpy_helper.to_array(values[name])
                if array.ndim and not array.any():
                    nodes.append(helper.make_node("Constant", [], [f"{own}_size"], value_ints=array.shape))
                    nodes.append(helper.make_node("ConstantOfShape", [f"{own}_size"], [f"{own}_zeros"]))
                    nodes.append(helper.make_node("Cast", [f"{own}_zeros"], [own], to=values[name].data_type))
                else:
                    nodes.append(helper.make_node("Constant", [], [own], value=values[name]))
                node.input[slot] = own
        if node.op_type == "QuantizeLinear":
            name = node.output[0]
            node.output[0] = f"{name}_before"
            nodes += [node, helper.make_node("Cast", [f"{name}_before"], [name], to=TensorProto.UINT8)]
        else:
            nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(tensor for tensor in values.values() if tensor.data_type == TensorProto.INT64)
    return load(proto)


def test_integers_in_constant_nodes() -> None:
    model = as_torch_exports(static())
    units = units_of(comb(model).folded).found
    assert [unit.other is not None for unit in units] == [False, False, True, False]
    small, found, left = repaired(model, CONV)
    assert left < 0.5
    assert len(found.fits) == 3
    changed = changed_values(small, found.model)
    assert len(changed) == 12  # a weight, a bias and their scales each
    assert {fit.weight for fit in found.fits} < changed.keys()
    assert not any(found.model.has(name) for name in changed)
    state = run(
        "comb, score{kind='reconstruction'}, allocate{channels=0.5}, prune, verify, repair",
        model,
        data=ArraySource(inputs(CONV)),
    )
    assert state.plan is not None
    assert verify_files(model, state.model, state.plan).trained


def test_packed_weights_in_another_order_are_left() -> None:
    model = packed(4, symmetric=True).copy()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(helper.make_attribute("weight_prepacked", 1))
    found = units_of(comb(model).folded)
    assert found.found == []
    assert set(found.left) == {"w0Q", "w1Q", "w2Q"}


def test_what_is_no_number_is_not_rounded() -> None:
    cells = np.broadcast_to(np.arange(2), (1, 3, 2))
    steps = Steps(cells, np.ones(2), np.zeros(1), (-127, 127), is_free=True)
    found, scales = steps.rounded(np.full((1, 3, 2), np.nan), np.full((1, 3, 3), np.nan))
    assert np.isnan(found).all()
    np.testing.assert_array_equal(scales, steps.scales)
