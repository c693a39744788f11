"""Repair, the pieces that it is made of, and the score that looks ahead to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.main import main
from cpd_onnx.data.sources import ArraySource, FunctionSource, inputs_of
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import DataError
from cpd_onnx.fitting.problem import Block, Problem
from cpd_onnx.fitting.units import units_of
from cpd_onnx.ir.model import Model, load
from cpd_onnx.ops.matrix_view import bounds_of, linear_of
from cpd_onnx.passes import repair as repairs
from cpd_onnx.passes.prune import prune
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.passes.sensitivity import SensitivityOptions, measured_curves, sensitivity
from cpd_onnx.pipeline.pipeline import run
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.runtime.shards import Divided
from cpd_onnx.runtime.stepwise import Stepwise
from cpd_onnx.scores.registry import score
from tests.support.models import from_text
from tests.support.runs import plain


def model_of(text: str, **weights: np.ndarray) -> Model:
    """A model from ONNX text, with initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    return load(proto)


def made(model: Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    return execute(open_model(model), feed)[0]


LINEAR = {
    "conv": ("Conv", (6, 4, 3, 3), {}, (2, 4, 7, 8)),
    "strided, padded, dilated": ("Conv", (6, 4, 3, 2), {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}, (2, 4, 9, 8)),
    "grouped": ("Conv", (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}, (2, 4, 7, 8)),
    "depthwise": ("Conv", (4, 1, 3, 3), {"group": 4}, (2, 4, 7, 8)),
    "same upper": ("Conv", (6, 4, 3, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}, (2, 4, 7, 8)),
    "same lower": ("Conv", (6, 4, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}, (2, 4, 7, 8)),
    "one axis": ("Conv", (6, 4, 3), {"pads": [2, 1]}, (2, 4, 9)),
    "three axes": ("Conv", (3, 2, 1, 2, 2), {}, (2, 2, 3, 4, 4)),
    "transposed": ("ConvTranspose", (4, 6, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, (2, 4, 5, 6)),
    "transposed, cut": ("ConvTranspose", (4, 6, 2, 2), {"strides": [2, 2], "pads": [2, 1, 1, 2]}, (2, 4, 5, 6)),
    "transposed, grouped, dilated": ("ConvTranspose", (4, 3, 3, 2), {"group": 2, "dilations": [2, 1], "strides": [1, 3]}, (2, 4, 5, 6)),
    "gemm": ("Gemm", (5, 6), {}, (7, 5)),
    "gemm, both turned": ("Gemm", (6, 5), {"transA": 1, "transB": 1}, (5, 7)),
    "matmul": ("MatMul", (5, 6), {}, (2, 3, 7, 5)),
}  # fmt: skip  # a table


@pytest.mark.parametrize("case", LINEAR)
def test_a_linear_operator_is_rows_times_its_matrix(case):
    operator, shape, attributes, data = LINEAR[case]
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal(s).astype(np.float32) for s in (shape, data))
    node = helper.make_node(operator, ["x", "w"], ["y"], **attributes)
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph([node], "g", info[:1], info[1:], [numpy_helper.from_array(weight, "w")])
    y = made(load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)), {"x": x})
    linear = linear_of(node, shape)
    places = np.arange(linear.count(y.shape))[::2]
    got = linear.rows(x, places) @ linear.matrix(weight)
    np.testing.assert_allclose(got, linear.targets(y, places), atol=1e-4)
    np.testing.assert_array_equal(linear.weight(linear.matrix(weight)), weight)


RESIDUAL = """g (float[N, 3, 6, 6] x) => (float[N, 5] y)
{
  a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
  r = Relu(a)
  c = Conv <pads = [1, 1, 1, 1]> (r, w1)
  n = BatchNormalization(c, s, t, m, v)
  d = Relu(n)
  e = Conv (d, w2, b2)
  f = Add(e, r)
  h = Relu(f)
  p = GlobalAveragePool(h)
  q = Flatten(p)
  wt = Transpose <perm = [1, 0]> (w3)
  z = MatMul(q, wt)
  y = Add(z, b3)
}"""


def residual(seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    shapes = {
        "w0": (8, 3, 3, 3), "b0": (8,), "w1": (12, 8, 3, 3), "s": (12,), "t": (12,), "m": (12,), "w2": (8, 12, 1, 1),
        "b2": (8,), "w3": (5, 8), "b3": (5,),
    }  # fmt: skip  # a table
    weights = {k: rng.standard_normal(v) * 0.4 for k, v in shapes.items()}
    return model_of(RESIDUAL, **weights, v=np.full(12, 1.3))


def inputs(count: int = 64, seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((count, 3, 6, 6)).astype(np.float32)}


def pruned(model: Model, kind: str = "l2", budget: Budget | None = None, data: ArraySource | None = None):
    combed = comb(model)
    chosen = allocate(combed, score(combed, kind, data=data), budget or Budget("channels", 0.5))
    kept = chosen.keep_mask(combed)
    return combed, kept, prune(combed, chosen).model


def test_units_know_what_becomes_of_their_product():
    model = residual()
    units = {unit.weight: unit for unit in units_of(comb(model).folded).found}
    assert list(units) == ["w0", "w1", "w2", "w3"]
    assert (units["w0"].target, units["w0"].bias.name, units["w0"].bounds) == ("a", "b0", (0, np.inf))
    assert (units["w1"].target, units["w1"].bias.name, units["w1"].other) == ("n", "t", None)
    np.testing.assert_allclose(units["w1"].gain, model.array("s") / np.sqrt(1.3 + 1e-5), rtol=1e-6)
    assert (units["w2"].target, units["w2"].other, units["w2"].bounds) == ("f", "r", (0, np.inf))
    assert (units["w3"].end, units["w3"].flipped, units["w3"].bias.name) == ("y", True, "b3")


def test_a_weight_that_others_use_too_or_that_is_no_float_is_left():
    text = "g (float[N, 4] x) => (float[4, 4] y) { a = MatMul(x, w) b = Transpose(a) c = MatMul(b, a) y = Add(c, w) }"
    found = units_of(comb(model_of(text, w=np.eye(4))).folded)
    assert (found.by_weight, found.left) == ([], {"w": "used several times"})


def test_channels_that_others_can_make_up_for_cost_nothing():
    """Of twelve hidden units six are sums of two others: least squares gives the function back whole."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((4, 6))
    mixed = np.concatenate([first, first[:, :3] + first[:, 3:], first[:, [0, 2, 4]] - first[:, [1, 3, 5]]], axis=1)
    text = "g (float[N, 4] x) => (float[N, 3] y) { a = MatMul(x, w0) y = MatMul(a, w1) }"
    model = model_of(text, w0=mixed, w1=rng.standard_normal((12, 3)))
    feed = {"x": rng.standard_normal((200, 4)).astype(np.float32)}
    combed, kept, small = pruned(model, "reconstruction", data=ArraySource(feed))
    fixed = repair(combed, kept, small, ArraySource(feed), RepairOptions(ridge=1e-9))
    want = made(model, feed)
    assert np.abs(made(small, feed) - want).max() > 0.1
    np.testing.assert_allclose(made(fixed.model, feed), want, atol=2e-3)


@pytest.mark.parametrize("kind", ["l2", "reconstruction"])
def test_repair_brings_outputs_nearer_on_images_it_has_not_seen(kind):
    model, data = residual(), ArraySource(inputs())
    combed, kept, small = pruned(model, kind, data=data)
    fixed = repair(combed, kept, small, data)
    unseen = inputs(seed=2)
    errors = [float(np.square(made(m, unseen) - made(model, unseen)).mean()) for m in (small, fixed.model)]
    assert errors[1] < 0.3 * errors[0]
    assert all(fit.after < fit.before for fit in fixed.fits)
    assert {fit.weight for fit in fixed.fits} >= {"w1", "w2", "w3"}


def test_repair_changes_values_and_nothing_else():
    model, data = residual(), ArraySource(inputs())
    combed, kept, small = pruned(model)
    before = small.serialize()
    fixed = repair(combed, kept, small, data).model
    assert small.serialize() == before
    blank = []
    for each in (small, fixed):
        proto = each.complete_proto()
        for tensor in proto.graph.initializer:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
        blank.append(proto.SerializeToString())
    assert blank[0] == blank[1]
    assert fixed.serialize() == repair(combed, kept, small, data).model.serialize()


def test_a_model_that_lost_nothing_is_left_as_it_is():
    model, data = residual(), ArraySource(inputs())
    combed = comb(model)
    kept = KeepMask(combed.atoms)
    fixed = repair(combed, kept, model.copy(), data)
    assert fixed.fits == ()
    assert fixed.model.serialize() == model.serialize()


def test_the_last_branch_makes_up_for_what_the_shortcut_lacks(monkeypatch):
    text = """g (float[N, 10] x) => (float[N, 10] y)
    { a = MatMul(x, w0) b = Relu(a) r = MatMul(b, w1) c = MatMul(x, w2) d = Relu(c) e = MatMul(d, w3) y = Add(e, r) }"""
    rng = np.random.default_rng(0)
    shapes = {"w0": (10, 16), "w1": (16, 10), "w2": (10, 16), "w3": (16, 10)}
    model = model_of(text, **{k: rng.standard_normal(v) for k, v in shapes.items()})
    feed = {"x": rng.standard_normal((512, 10)).astype(np.float32)}
    combed, kept, small = pruned(model)

    def error() -> float:
        fixed = repair(combed, kept, small, ArraySource(feed)).model
        return float(np.square(made(fixed, feed) - made(model, feed)).mean())

    with_shortcut = error()
    monkeypatch.setattr("cpd_onnx.fitting.units._UnitFinder.summed", lambda finder, chain, position: (chain.end, None))
    assert with_shortcut < 0.9 * error()


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_a_model_run_piece_by_piece_gives_what_it_gives_as_a_whole(held):
    model = residual()
    folded = comb(model).folded
    feeds = [inputs(3, seed) for seed in (0, 1)]
    steps = Stepwise(folded, model, feeds, ["f"], held_bytes=held)
    for position in range(len(folded.scope.nodes)):
        steps.after(position)
    for feed, got in zip(feeds, steps.tensor("f"), strict=True):
        proto = model.complete_proto()
        proto.graph.output.append(helper.make_tensor_value_info("f", TensorProto.FLOAT, None))
        np.testing.assert_allclose(got, execute(open_model(load(proto)), feed)[1], atol=1e-5)
    steps.release("f")
    with pytest.raises(KeyError):
        steps.tensor("a")


def test_pieces_read_the_weights_when_they_run():
    model = residual()
    folded = comb(model).folded
    steps = Stepwise(folded, model, [inputs(2)])
    steps.after(1)
    model.set_array("w1", np.zeros_like(model.array("w1")))
    steps.after(2)
    assert not steps.tensor("c")[0].any()


def test_queries_and_keys_are_scored_by_what_their_product_loses():
    rng = np.random.default_rng(0)
    text = """g (float[N, 5, 6] x) => (float[N, 5, 6] y)
    { q = MatMul(x, wq) k = MatMul(x, wk) t = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, t)
      a = Softmax <axis = -1> (s) y = MatMul(a, x) }"""
    wq, wk = rng.standard_normal((6, 4)), rng.standard_normal((6, 4))
    wk[:, 2] = 0  # what meets nothing does nothing
    wq[:, 1] *= 5
    data = ArraySource({"x": rng.standard_normal((32, 5, 6)).astype(np.float32)})
    (scores,) = score(comb(model_of(text, wq=wq, wk=wk)), "reconstruction", data=data)
    assert np.argmin(scores) == 2
    assert np.argmax(scores) == 1


def test_as_passes():
    data = ArraySource(inputs())
    text = "comb, score{kind='reconstruction'}, allocate{macs=0.5,policy='global'}, prune, verify, repair"
    state = run(text, residual(), data=data)
    assert state.verification is not None
    assert state.repaired["fitted"]
    with pytest.raises(DataError, match="a repair needs samples"):
        run("comb, score, allocate, prune, repair", residual())


def test_rounds_repair_each_and_are_proved_at_the_end():
    data, model = ArraySource(inputs()), residual()
    state = run("iterate{macs=0.5,rounds=2,repair_samples=64}, verify", model, data=data)
    assert state.budget["rounds"] == 2
    assert state.verification.passed
    assert state.allocation.after.macs <= 0.55 * state.allocation.before.macs
    left = next(iter(state.model.graph.initializer)).dims[0]
    assert left == 8 - len(state.allocation.removed[0])


def test_prune_with_data_repairs_unless_told_otherwise(tmp_path, capsys):
    residual().save(tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **inputs())
    common = ["prune", str(tmp_path / "model.onnx"), "--target", "macs=0.5", "--data", str(tmp_path / "data.npz")]
    assert main(plain([*common, "-o", str(tmp_path / "fixed.onnx")])) == 0
    assert "weights fitted to the original" in capsys.readouterr().out
    assert main(plain([*common, "-o", str(tmp_path / "raw.onnx"), "--no-repair"])) == 0
    assert main(plain([*common, "-o", str(tmp_path / "twice.onnx"), "--rounds", "2"])) == 0
    unseen = inputs(seed=2)
    want = made(residual(), unseen)
    errors = [np.square(made(load(tmp_path / f"{n}.onnx"), unseen) - want).mean() for n in ("fixed", "raw", "twice")]
    assert max(errors[0], errors[2]) < 0.5 * errors[1]
    for name in ("fixed", "raw", "twice"):
        assert main(plain(["verify", str(tmp_path / "model.onnx"), str(tmp_path / f"{name}.onnx")])) == 0
    capsys.readouterr()
    assert main(plain(["prune", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "x.onnx"), "--repair"])) == 0
    assert "weights fitted to the original" in capsys.readouterr().out  # on generated inputs
    assert main(["prune", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "y.onnx"), "--repair"]) == 1
    assert "repair needs samples: give --data" in capsys.readouterr().err


def test_sensitivity_is_the_error_with_one_group_alone_pruned(tmp_path):
    model, data = residual(), ArraySource(inputs())
    combed = comb(model)
    scores = score(combed, "reconstruction", data=data)
    found = sensitivity(combed, scores, data, SensitivityOptions(ratios=(0.5, 0.0)))
    assert {name: [p.width for p in points] for name, points in found.items()} == {"w0": [8, 4, 1], "w1": [12, 6, 1]}
    for points in found.values():
        errors = [p.error for p in points]
        assert errors[0] == 0.0
        assert errors == sorted(errors)
    raw = sensitivity(combed, scores, data, SensitivityOptions(ratios=(0.5, 0.0), repair=False))
    assert raw["w1"][1].error > 1.2 * found["w1"][1].error
    curves = measured_curves(combed, found)
    curves.check(combed)
    assert curves.loss[1][6] == found["w1"][1].error


def test_measured_sensitivity_can_choose_the_widths():
    text = "comb, sensitivity, allocate{macs=0.5,policy='optimal'}, prune, verify, repair"
    state = run(text, residual(), data=ArraySource(inputs()))
    assert state.curves is not None
    assert state.repaired["fitted"]


def test_inspect_measures_and_draws_sensitivity(tmp_path, capsys):
    residual().save(tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **inputs())
    common = ["inspect", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz")]
    plot, told = tmp_path / "plot.svg", tmp_path / "told.json"
    assert main(plain([*common, "--sensitivity", "--ratios", "0.5,0", "--plot", str(plot), "--json", str(told)])) == 0
    content = json.loads(told.read_text())["sensitivity"]
    assert [entry["group"] for entry in content["groups"]] == ["w0", "w1"]
    assert "squared error" in content["error"]
    assert "w0" in plot.read_text()
    assert "at 6" in capsys.readouterr().out
    assert main(common) == 1
    assert "--sensitivity needs samples" in capsys.readouterr().err


def test_synthetic_images_look_like_normalised_ones():
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N,3,32,32] x) => (float[N,3,32,32] y) {y = Relu(x)}'
    )
    source = Synthetic(comb(load(proto)).folded)
    first, again, other = (next(source.batches(256, seed=seed))["x"] for seed in (1, 1, 2))
    assert first.shape == (256, 3, 32, 32)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert abs(first.mean()) < 0.2
    assert 0.7 < first.std() < 1.5
    neighbours = np.corrcoef(first[..., 1:].ravel(), first[..., :-1].ravel())[0, 1]
    channels = np.corrcoef(first[:, 0].ravel(), first[:, 1].ravel())[0, 1]
    assert neighbours > 0.5
    assert channels > 0.6


def test_without_data_synthetic_inputs_serve(tmp_path):
    residual().save(tmp_path / "model.onnx")
    common = ["prune", str(tmp_path / "model.onnx"), "--target", "macs=0.5", "--data", "synthetic"]
    assert main(plain([*common, "-o", str(tmp_path / "a.onnx")])) == 0
    assert main(plain([*common, "-o", str(tmp_path / "b.onnx"), "--no-repair", "--score", "l2"])) == 0
    unseen = inputs(seed=3)
    want = made(residual(), unseen)
    errors = [float(np.square(made(load(tmp_path / f"{n}.onnx"), unseen) - want).mean()) for n in "ab"]
    assert errors[0] < 0.7 * errors[1]


def test_few_samples_do_not_make_it_worse():
    """With fewer rows than features a plain fit says anything about what it has not seen."""
    text = "g (float[N, 96] x) => (float[N, 4] y) { a = MatMul(x, w0) b = Relu(a) y = MatMul(b, w1) }"
    rng = np.random.default_rng(0)
    model = model_of(text, w0=rng.standard_normal((96, 128)), w1=rng.standard_normal((128, 4)))
    few, many = ({"x": rng.standard_normal((n, 96)).astype(np.float32)} for n in (48, 1000))
    combed, kept, small = pruned(model, "l2", Budget("channels", 0.75))
    fixed = repair(combed, kept, small, ArraySource(few)).model
    errors = [float(np.square(made(m, many) - made(model, many)).mean()) for m in (small, fixed)]
    assert errors[1] <= errors[0]


def test_branches_that_can_stand_in_for_each_other_do_not_both_go():
    """Two concatenated branches compute the same: each alone may be spared, but not both."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((6, 8))
    text = """g (float[N, 6] x) => (float[N, 3] y)
    { a = MatMul(x, w0) p = Relu(a) b = MatMul(x, w1) q = Relu(b) c = Concat <axis = 1> (p, q) y = MatMul(c, w2) }"""
    mixing = rng.standard_normal((8, 8)) * 0.05 + np.eye(8)
    model = model_of(text, w0=weights, w1=weights @ mixing, w2=rng.standard_normal((16, 3)))
    data = ArraySource({"x": rng.standard_normal((400, 6)).astype(np.float32)})
    combed = comb(model)
    scores = score(combed, "reconstruction", data=data)
    chosen = allocate(combed, scores, Budget("macs", 0.5, "optimal"), is_loss=True)
    left = sum(len(group) - len(gone) for group, gone in zip(combed.groups, chosen.removed, strict=True))
    assert left == pytest.approx(8, abs=1)
    # What either branch alone could do without is nearly all of it; what both could is half.
    cheap = sum(int((values < 0.1 * np.median(np.concatenate(scores))).sum()) for values in scores)
    assert cheap <= 8
    kept = chosen.keep_mask(combed)
    fixed = repair(combed, kept, prune(combed, chosen).model, data).model
    want = made(model, data.arrays)
    assert np.square(made(fixed, data.arrays) - want).mean() < 0.05 * want.var()


def test_a_bias_that_others_share_is_read_and_left_alone():
    """Exporters give equal constants one initializer and put an Identity before the other users."""
    text = """g (float[N, 6] x) => (float[N, 4] y)
    { s = Identity(b) a = Gemm(x, w0, b) p = Relu(a) c = Gemm(p, w1, s) q = Relu(c) y = MatMul(q, w2) }"""
    rng = np.random.default_rng(0)
    shapes = {"w0": (6, 12), "w1": (12, 12), "w2": (12, 4)}
    model = model_of(text, **{k: rng.standard_normal(v) for k, v in shapes.items()}, b=np.full(12, 0.5))
    found = units_of(comb(model).folded)
    assert ([unit.weight for unit in found.found], found.left) == (["w0", "w1", "w2"], {})
    assert [unit.bias for unit in found.found] == [None, None, None]
    np.testing.assert_array_equal(found.found[1].shift, np.full(12, 0.5))


def test_a_transposition_that_turns_nothing_is_none():
    text = "g (float[N, 6] x) => (float[N, 6] y) { t = Transpose <perm = [0, 1]> (w) y = MatMul(x, t) }"
    model = model_of(text, w=np.arange(36.0).reshape(6, 6))
    (unit,) = units_of(comb(model).folded).found
    assert not unit.flipped
    np.testing.assert_array_equal(unit.matrix(model)[0], model.array("w"))


def test_a_normalisation_over_tokens_is_no_scale_of_channels():
    """Its axis is the second, which is that of the channels only where there are two."""
    vectors = "s = Identity(a) n = BatchNormalization(m, s, b, c, d)"
    weights = dict(zip("abcd", (np.full(6, 2.0), np.zeros(6), np.zeros(6), np.ones(6)), strict=True))
    for shape, target in (("N, 6, 6", "m"), ("N, 6", "n")):
        text = f"g (float[{shape}] x) => (float[{shape}] y) {{ m = MatMul(x, w) {vectors} y = Relu(n) }}"
        (unit,) = units_of(comb(model_of(text, w=np.eye(6), **weights)).folded).found
        assert unit.target == target


@pytest.mark.usefixtures("all_processors")
@pytest.mark.parametrize("score", ["reconstruction", "l2"])
def test_the_same_bytes_whatever_the_threads(tmp_path: Path, score: str) -> None:
    """With data, in processes with other seeds of hashes and numbers of threads."""
    model = Path(__file__).parents[2] / "models" / "digits.onnx"
    made = []
    for threads in ("1", "2", "3"):
        out = tmp_path / f"{threads}.onnx"
        words = ["prune", model, "-o", out, "--data", "synthetic", "--samples", "64", "--repair-samples", "64"]
        line = [sys.executable, "-m", "cpd_onnx", *plain([*words, "--score", score, "--json", f"{out}.json"])]
        settings = {"PYTHONHASHSEED": threads, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        subprocess.run(line, env={**os.environ, **settings}, check=True)
        made.append((out.read_bytes(), Path(f"{out}.plan.json").read_bytes()))
    assert made[0] == made[1] == made[2]


# Few samples.


def chain(samples: int, seed: int = 0) -> tuple[Model, ArraySource]:
    """Two layers, and inputs that say little about each other."""
    rng = np.random.default_rng(seed)
    model = model_of(
        "g (float[N,24] x) => (float[N,6] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }",
        a=rng.normal(size=(24, 32)),
        b=rng.normal(size=(32, 6)),
    )
    return model, ArraySource({"x": rng.normal(size=(samples, 24)).astype(np.float32)})


def error_of(original: Model, small: Model) -> float:
    feed = {"x": np.random.default_rng(99).normal(size=(512, 24)).astype(np.float32)}
    wanted = made(original, feed)
    return float(np.square(made(small, feed) - wanted).mean() / wanted.var())


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 10, 30, 100])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_samples_never_make_the_outputs_worse(samples: int, seed: int) -> None:
    model, data = chain(samples, seed)
    combed = comb(model)
    chosen = allocate(combed, score(combed, "l2"), Budget("macs", 0.5))
    small = prune(combed, chosen).model
    fixed = repair(combed, chosen.keep_mask(combed), small, data)
    assert error_of(model, fixed.model) <= 1.1 * error_of(model, small)
    assert len(fixed.notes) == 1
    assert "samples" in fixed.notes[0]
    assert not fixed.notes[0].startswith("nothing was repaired") or fixed.fits == ()


def test_many_samples_make_it_better_without_a_note() -> None:
    model, data = chain(400)
    combed = comb(model)
    chosen = allocate(combed, score(combed, "l2"), Budget("macs", 0.5))
    small = prune(combed, chosen).model
    fixed = repair(combed, chosen.keep_mask(combed), small, data)
    assert error_of(model, fixed.model) < 0.8 * error_of(model, small)
    assert fixed.notes == ()


def test_notes_of_a_repair_are_notes_of_the_result(tmp_path: Path) -> None:
    model, data = chain(3)
    model.save(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **data.arrays)
    files = ["--data", tmp_path / "d.npz", "-o", tmp_path / "s.onnx", "--json", tmp_path / "r.json"]
    assert main(plain(["prune", tmp_path / "m.onnx", "--repair", *files])) == 0
    notes = json.loads((tmp_path / "r.json").read_text())["notes"]
    assert any("repair" in note for note in notes)


def test_features_that_say_little_are_held_back_by_a_strong_ridge() -> None:
    """As few rows as features, and targets that are mostly noise: the best strength lies far above the minimum."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((1, 64, 3))
    blocks = []
    for _ in range(4):
        rows = rng.standard_normal((1, 32, 64)).astype(np.float32)
        wanted = 0.8 * rows @ start.astype(np.float32) + 20 * rng.standard_normal((1, 32, 3)).astype(np.float32)
        blocks.append(Block(rows, wanted.astype(np.float32)))
    ones = np.ones(3)
    problem = Problem(Divided.among(blocks), 1, start, ones, 0 * ones, False, (-np.inf, np.inf), 1e-3, 0)
    moments = problem.moments()
    cross = problem.cross(moments, lambda block: block.wanted)
    errors = [problem.error(*problem.once(moments, cross, 1e-3 * 10 ** (place / 2))) for place in range(9)]
    ridge, *fit = problem.fitted()
    assert problem.error(*fit) == pytest.approx(min(errors), rel=1e-6)
    assert np.argmin(errors) > 6  # stronger than the mean square of a feature
    assert ridge == pytest.approx(1e-3 * 10 ** (np.argmin(errors) / 2))


def test_a_confirmed_fit_may_be_made_again_from_all_rows() -> None:
    rng = np.random.default_rng(0)
    true = rng.standard_normal((1, 8, 3))
    blocks = []
    for _ in range(3):
        rows = rng.standard_normal((1, 16, 8)).astype(np.float32)
        blocks.append(Block(rows, (rows @ true + rng.standard_normal((1, 16, 3))).astype(np.float32)))
    ones = np.ones(3)
    problem = Problem(Divided.among(blocks), 1, 0 * true, ones, 0 * ones, False, (-np.inf, np.inf), 1e-3, 0)
    once, again = problem.solved(), replace(problem, refits=True).solved()
    assert once is not None
    assert again is not None
    assert np.array_equal(again.matrix, replace(problem, held_out=0).at(problem.fitted()[0])[0])
    assert np.linalg.norm(again.matrix - true) < np.linalg.norm(once.matrix - true)
    assert (again.before, again.after) == (once.before, once.after)


def test_very_few_samples_are_all_used_once_a_third_has_confirmed_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[bool] = []
    plain = repairs._Repairer.run
    monkeypatch.setattr(
        repairs._Repairer, "run", lambda self, refits=False: (runs.append(refits), plain(self, refits=refits))[1]
    )
    models = Path(__file__).parents[2] / "models"
    with np.load(models / "digits_train.npz") as data:
        images = data["image"]
    combed = comb(load(models / "digits.onnx"))
    kept = allocate(combed, score(combed), Budget("macs", 0.6)).keep_mask(combed)
    pruned = rewrite(combed, kept).model
    cases = (
        (20, 512, True, [False, True]),
        (64, 512, True, [False]),
        (64, 20, True, [False]),
        (20, 512, False, [False]),
    )
    for count, most, refits, expected in cases:
        runs.clear()
        options = RepairOptions(samples=most, refits=refits)
        repair(combed, kept, pruned, ArraySource({"image": images[:count]}), options)
        assert runs == expected


# Activations that clip.

CLIPPED = """g (float[N, 16] x) => (float[N, 4] y)
{
  low = Constant <value = float {0.0}> ()
  high = Constant <value = float {1.0}> ()
  a = MatMul(x, w0)
  r = Relu(a)
  b = MatMul(r, w1)
  c = Clip(b, low, high)
  y = MatMul(c, w2)
}"""


def clipped() -> Model:
    rng = np.random.default_rng(0)
    shapes = {"w0": (16, 24), "w1": (24, 24), "w2": (24, 4)}
    return model_of(CLIPPED, **{name: rng.standard_normal(shape) for name, shape in shapes.items()})


def test_units_know_the_bounds_of_what_clips_them() -> None:
    found = {unit.weight: unit.bounds for unit in units_of(comb(clipped()).folded).found}
    assert found == {"w0": (0.0, np.inf), "w1": (0.0, 1.0), "w2": (-np.inf, np.inf)}


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "want"),
    [
        ("Relu", {}, ["x"], (0.0, np.inf)),
        ("Clip", {"min": -1.0, "max": 6.0}, ["x"], (-1.0, 6.0)),  # before opset 11
        ("Clip", {}, ["x", "", "six"], (-np.inf, 6.0)),
        ("Clip", {}, ["x", "six", "zero"], None),  # everything becomes the same number
        ("Clip", {}, ["x", "computed"], None),
        ("Sigmoid", {}, ["x"], None),
    ],
)
def test_bounds_are_those_of_the_operator(operator, attributes, inputs, want) -> None:
    known = {"six": np.float32(6), "zero": np.zeros(1, np.float32)}
    constants = {name: np.asarray(value) for name, value in known.items()}
    assert bounds_of(helper.make_node(operator, inputs, ["y"], **attributes), constants.get) == want


def test_what_an_activation_clips_is_not_fitted() -> None:
    """Beyond the bounds, the targets are far from linear in the features; within them, they are."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((1, 8, 5))
    blocks = []
    for _ in range(4):
        rows = rng.standard_normal((1, 256, 8)).astype(np.float32) / np.float32(np.sqrt(8))
        wanted = rows @ truth.astype(np.float32)
        far = np.where(wanted > 1, wanted**4, np.where(wanted < -1, -(wanted**6), wanted))
        blocks.append(Block(rows, far))
    start, ones = truth + rng.standard_normal(truth.shape), np.ones(5)

    def distance(bounds: tuple[float, float], rounds: int) -> float:
        problem = Problem(Divided.among(blocks), 1, start, ones, 0 * ones, False, bounds, 1e-6, rounds)
        solution = problem.solved()
        assert solution is not None
        return float(np.abs(solution.matrix - truth).max())

    assert distance((-1.0, 1.0), 30) < 0.1 * distance((-1.0, 1.0), 0)
    assert distance((-1.0, 1.0), 30) < 0.5 * distance((-1.0, np.inf), 30)


def test_the_bounds_of_a_sum_are_those_of_the_sum_and_not_of_the_branch_that_is_fitted() -> None:
    """A rectifier after a residual sum lets negative values of the branch through where the shortcut is positive."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, 400, 4)).astype(np.float32)
    truth = rng.standard_normal((1, 4, 3))
    wanted, ones = rows @ truth.astype(np.float32), np.ones(3)

    def problem(other: np.ndarray | None) -> Problem:
        blocks = [
            Block(rows[:, part], wanted[:, part], None if other is None else other[:, part])
            for part in (slice(300), slice(300, None))
        ]
        return Problem(Divided.among(blocks), 1, 0 * truth, ones, 0 * ones, False, (0.0, np.inf), 1e-6, 3)

    everything, nothing = (problem(np.full_like(wanted, shift)) for shift in (100.0, -100.0))
    assert everything.error(0 * truth, np.zeros(1)) == pytest.approx(
        np.sqrt(np.square(wanted[:, 300:]).mean()), rel=1e-4
    )
    assert nothing.error(0 * truth, np.zeros(1)) == 0
    assert problem(np.zeros_like(wanted)).error(0 * truth, np.zeros(1)) == problem(None).error(0 * truth, np.zeros(1))
    solution = everything.solved()
    assert solution is not None
    np.testing.assert_allclose(solution.matrix, truth, atol=1e-3)


def test_all_affine_operators_are_part_of_what_is_fitted() -> None:
    graph = (
        "(float[N,3,4,4] x, float[4,3,1,1] w, float[4] b, float[4,1,1] s, float[4,1,1] t) => (float[N,4,4,4] y) "
        "{ h = Conv(x, w, b) i = Sub(s, h) j = Div(i, t) k = Neg(j) y = Relu(k) }"
    )
    model = load(from_text(graph))
    (unit,) = units_of(comb(model).folded).found
    b, s, t = (model.array(name).ravel().astype(np.float64) for name in "bst")
    assert unit.end == "k"
    np.testing.assert_allclose(unit.gain, 1 / t)
    np.testing.assert_allclose(unit.shift, (b - s) / t)


LENGTHS = """(float[N, 3, 6, 6] x, float[8, 3, 1, 1] w, float[8] b, float[4, 8, 1, 1] v, float[6, 4, 1] u, float[2, 6, 1] t,
int64[1] flat, int64[3] rows) => (float[1, 2, L] y)
{
  a = Conv(x, w, b)
  r = Relu(a)
  c = Conv(r, v)
  n = RandomNormalLike <scale = 0.1> (c)
  d = Add(c, n)
  two = Constant <value_ints = [0]> ()
  m = ReduceMean <axes = [1], keepdims = 0> (d)
  p = Relu(m)
  f = Reshape(p, flat)
  i = NonZero(f)
  k = Squeeze(i, two)
  turned = Transpose <perm = [1, 0, 2, 3]> (c)
  e = Reshape(turned, rows)
  g = Gather <axis = 2> (e, k)
  h = Conv(g, u)
  q = Relu(h)
  y = Conv(q, t)
}"""


def repaired_lengths(pruned_to: float) -> tuple[Model, repairs.Repaired]:
    """A model that looks up the positions at which what it computes, with noise, is positive; pruned and repaired."""
    constants = {"flat": [-1], "rows": [1, 4, -1]}
    combed = comb(load(from_text(LENGTHS, values={name: np.asarray(v) for name, v in constants.items()})))
    chosen = allocate(combed, score(combed, "l2"), Budget("channels", pruned_to))
    data = ArraySource({"x": np.random.default_rng(0).standard_normal((64, 3, 6, 6)).astype(np.float32)})
    small = prune(combed, chosen).model
    return small, repair(combed, chosen.keep_mask(combed), small, data)


def test_rows_are_not_compared_where_the_pruned_model_has_other_sizes() -> None:
    small, found = repaired_lengths(0.5)
    assert "the sizes of its input depend on values" in found.left["u"]
    assert "no error can be measured" in found.left["v"]
    assert "nothing was repaired: the sizes of the outputs depend on values" in found.notes[0]
    assert np.array_equal(found.model.array("u"), small.array("u"))


def test_the_repair_of_a_model_that_draws_numbers_repeats_itself() -> None:
    first, second = (repaired_lengths(0.5)[1].model for _ in range(2))
    assert first.sha256() == second.sha256()


SELECTED = (
    LENGTHS.replace("int64[1] flat", "float[N, 6, 6] xchoice, int64[1] flat")
    .replace("n = RandomNormalLike <scale = 0.1> (c)", "")
    .replace("d = Add(c, n)", "d = Identity(c)")
    .replace("p = Relu(m)", "chosen = Add(m, xchoice)\n  p = Relu(chosen)")
)
"""The same without noise, where another input chooses the positions unless it is small."""


@pytest.mark.parametrize(("others", "is_fitted"), [(8, True), (24, False)])
def test_batches_of_other_sizes_are_left_out_where_they_are_few(others: int, is_fitted: bool) -> None:
    constants = {"flat": [-1], "rows": [1, 4, -1]}
    combed = comb(load(from_text(SELECTED, values={name: np.asarray(v) for name, v in constants.items()})))
    kept = allocate(combed, score(combed, "l2"), Budget("channels", 0.5)).keep_mask(combed)
    rng = np.random.default_rng(0)
    choice = np.where(rng.random((64, 6, 6)) < 0.5, -100.0, 100.0).astype(np.float32)
    choice[:others] = 0.0
    given = {"x": rng.standard_normal((64, 3, 6, 6)).astype(np.float32), "xchoice": choice}
    feeds = FunctionSource(
        lambda: [{name: array[i : i + 8] for name, array in given.items()} for i in range(0, 64, 8)],
        inputs_of(combed.folded.model.proto),
    )
    found = repair(combed, kept, rewrite(combed, kept).model, feeds, RepairOptions(samples=64))
    assert ("the sizes of its input depend on values" not in found.left.get("u", "")) == is_fitted
    assert ("u" in {fit.weight for fit in found.fits}) == is_fitted


@pytest.mark.parametrize(
    ("sizes", "number"),
    [
        ([8] * 8, 1), ([8] * 8 + [1], 2), ([12] * 8 + [4], 2), ([32] * 16, 2), ([32] * 16 + [1], 3), ([1] * 9, 3),
        ([2] * 8 + [1], 3), ([5], 0), ([5, 1], 1), ([1, 5], 1), ([3, 8, 2, 8, 8, 1], 2),
    ],
)  # fmt: skip  # a table
def test_a_small_last_batch_is_not_all_that_is_held_out(sizes: list[int], number: int) -> None:
    assert repairs._held_out(sizes) == number


def test_a_reshape_counts_the_channels_of_its_own_model_where_a_branch_is_gone() -> None:
    """During the repair one channel of the branch survives, which the sizes of the pruned file do not count."""
    rng = np.random.default_rng(0)
    shapes = {"u": (6, 3, 1, 1), "v": (6, 3, 1, 1), "w": (12, 5)}
    model = cpd.load(
        from_text(
            "(float[N, 3, 4, 4] x, float[6, 3, 1, 1] u, float[6, 3, 1, 1] v, int64[3] s, int64[1] a, float[12, 5] w) "
            "=> (float[N, 5] y) { p = Conv(x, u) q = Conv(x, v) c = Concat <axis = 1> (p, q) r = Reshape(c, s) "
            "m = ReduceMean <keepdims = 0> (r, a) y = MatMul(m, w) }",
            opset=18,
            values={
                **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
                "s": np.array([-1, 12, 16]), "a": np.array([2]),
            },
        )
    )  # fmt: skip  # a graph
    combed = comb(model)
    whole, other = sorted(combed.groups, key=lambda group: group.name)
    kept = KeepMask(combed.atoms, np.concatenate([whole.channels, other.channels[:2]]))
    small = rewrite(combed, kept).model
    assert small.array("s").tolist() == [-1, 4, 16]
    data = ArraySource({"x": rng.standard_normal((64, 3, 4, 4)).astype(np.float32)})
    repaired = repair(combed, kept, small, data)
    assert [fit.weight for fit in repaired.fits]
    assert repaired.model.array("s").tolist() == [-1, 4, 16]
    assert len(made(repaired.model, {"x": data.arrays["x"]})) == 64
