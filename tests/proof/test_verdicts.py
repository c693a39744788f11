"""Verdicts of the proof: what each output may differ by, and when nothing is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.main import main
from cpd_onnx.ir.model import Array
from cpd_onnx.passes.prune import prune
from cpd_onnx.proof.comparison import (
    DISCRETE,
    INCONCLUSIVE,
    SATURATING,
    VERIFIED,
    WRONG,
    ComparedTensor,
    Comparison,
    Runs,
    judge,
)
from cpd_onnx.proof.observing import compared_tensors
from cpd_onnx.proof.proving import verify
from cpd_onnx.proof.unrounded import rounding_of, single, unrounded
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.scores.registry import score
from cpd_onnx.shapes.inference import fold
from cpd_onnx.testing import mask_oracle, permutation_oracle
from tests.support.models import from_text
from tests.support.planted import network, verdict_of
from tests.support.runs import plain

MLP = "float[4, 12] x, float[12, 16] w, float[16, 5] v"


def proof(model: ModelProto, kind: str = "random", feeds: Any = None) -> Comparison:
    combed = comb(cpd.load(model))
    chosen = allocate(combed, score(combed, kind), Budget("channels", 0.5))
    keep = chosen.keep_mask(combed)
    return verify(combed, keep, prune(combed, chosen).model, feeds)


def judged(plain: Array, masked: Array, pruned: Array, **changes: Any) -> Comparison:
    """What is said of one tensor, with noise that is nothing unless it is given."""
    kind, nudged = changes.pop("kind", "values"), changes.pop("nudged", masked)
    one = ComparedTensor("y", "y", kind, is_affected=True, is_behind=True)
    return judge([one], Runs([[plain]], [[masked]], [[pruned]], lambda number: [[nudged]], **changes), 1e-4)


def numbers(*values: float) -> Array:
    return np.asarray([1.0, *values], np.float32)


# One tensor.


def test_a_difference_within_a_hundredth_of_the_effect_is_verified() -> None:
    found = judged(numbers(0.5), numbers(0.4), numbers(0.4 + 5e-5))
    assert found.verdict == VERIFIED
    assert found.allowed == pytest.approx(1e-4)
    assert found.effect == pytest.approx(0.1)


def test_a_difference_above_the_tolerance_is_wrong_however_large_the_effect() -> None:
    assert judged(numbers(0.5), numbers(-0.5), numbers(-0.5 + 1e-3)).verdict == WRONG


def test_values_near_zero_of_a_function_with_an_offset_are_rounded_as_the_offset_is() -> None:
    plain, pruned = (np.asarray(values, np.float32) for values in ([1.2e-7, 3e-7], [1.8e-7, 3e-7]))
    runs = Runs([[plain * 2]], [[plain]], [[pruned]], lambda number: [[plain]])
    for offset, verdict in ((0.0, WRONG), (1.0, VERIFIED)):
        one = ComparedTensor("y", "y", SATURATING, is_affected=True, is_behind=True, offset=offset)
        assert judge([one], runs, 1e-4).verdict == verdict


def test_a_moved_sigmoid_has_an_offset_and_what_is_computed_from_it_has_none() -> None:
    tail = "a = MatMul(h, v) s = Sigmoid(a) y = Transpose<perm=[1, 0]>(s) t = Mul(s, s) z = Tanh(a)"
    combed = comb(
        cpd.load(from_text(f"({MLP}) => (float[A, B] y, float[C, D] t, float[E, F] z) {{ h = MatMul(x, w) {tail} }}"))
    )
    keep = KeepMask(combed.atoms, combed.groups[0].channels[:2])
    assert {one.name: one.offset for one in compared_tensors(combed, keep)} == {"y": 1.0, "t": 0.0, "z": 0.0, "a": 0.0}


def test_a_wrong_value_before_a_sigmoid_shows_although_its_output_is_near_zero() -> None:
    near_zero = numbers(0.5)[1:] * np.float32(1e-7)
    found = ComparedTensor("y", "y", SATURATING, is_affected=True, is_behind=True, offset=1.0)
    before = ComparedTensor("a", "y", is_affected=True, is_behind=True)
    runs = [[near_zero, numbers(-15.0)]], [[near_zero * 2, numbers(-14.0)]], [[near_zero * 3, numbers(-13.9)]]
    verdict = judge([found, before], Runs(*runs, lambda number: [[near_zero * 2, numbers(-14.0)]]), 1e-4)
    assert [one.verdict for one in verdict.outputs] == [VERIFIED, WRONG]


def test_a_difference_within_the_tolerance_but_not_small_against_the_effect_is_inconclusive() -> None:
    found = judged(numbers(0.5), numbers(0.5 - 1e-3), numbers(0.5 - 1e-3 + 5e-5))
    assert found.verdict == INCONCLUSIVE
    assert found.allowed == pytest.approx(1e-5, rel=1e-3)
    assert "less than a hundred times that" in found.notes[0]


def test_what_rounding_explains_is_allowed_up_to_a_hundredth_of_the_effect() -> None:
    masked, pruned = numbers(0.2), numbers(0.2 + 1e-3)
    assert judged(numbers(0.5), masked, pruned, nudged=numbers(0.2 + 5e-4)).verdict == VERIFIED
    assert judged(numbers(0.25), masked, pruned, nudged=numbers(0.2 + 5e-4)).verdict == INCONCLUSIVE


def test_where_removal_changes_nothing_other_channels_show_whether_an_error_would() -> None:
    same = numbers(0.5)
    assert judged(same, same, same, decoy=lambda: [[numbers(0.3)]]).verdict == VERIFIED
    assert judged(same, same, same, decoy=lambda: [[same]]).verdict == INCONCLUSIVE
    assert judged(same, same, same).verdict == INCONCLUSIVE


def test_saturated_outputs_must_change_with_the_inputs() -> None:
    dead = np.zeros(4, np.float32)
    assert judged(dead, dead, dead, kind=SATURATING).verdict == INCONCLUSIVE
    assert judged(numbers(0.0), numbers(0.0), numbers(0.0), kind=SATURATING).verdict == VERIFIED


def test_decisions_count_by_the_share_that_differs() -> None:
    plain = np.arange(4000)
    few, many = plain.copy(), plain.copy()
    few[:2], many[:400] = 0, 0
    assert judged(plain, plain, few, kind=DISCRETE).verdict == VERIFIED
    assert judged(plain, plain, many, kind=DISCRETE).verdict == WRONG
    assert judged(plain, plain, many, kind=DISCRETE, nudged=many).verdict == VERIFIED


def test_a_tie_that_only_some_changes_of_the_inputs_turn_counts_as_rounding() -> None:
    plain, turned = np.arange(300), np.arange(300)
    turned[[99, 100]] = turned[[100, 99]]
    one = ComparedTensor("y", "y", DISCRETE, is_affected=True, is_behind=True)
    for turns, verdict in (({5}, VERIFIED), (set[int](), WRONG)):
        changed = lambda number, turns=turns: [[turned if number in turns else plain]]  # noqa: E731
        assert judge([one], Runs([[plain * 2]], [[plain]], [[turned]], changed), 1e-4).verdict == verdict


def test_a_tolerance_belongs_to_one_output() -> None:
    """What one chaotic output may do is not allowed to the others."""
    observed = [ComparedTensor(name, name, is_affected=True, is_behind=True) for name in "ab"]
    plain, masked = [numbers(0.9), numbers(0.9)], [numbers(0.1), numbers(0.1)]
    pruned, nudged = [numbers(0.6), numbers(0.11)], [numbers(0.6), numbers(0.1)]
    found = judge(observed, Runs([plain], [masked], [pruned], lambda number: [nudged]), 1e-4)
    assert [one.verdict for one in found.outputs] == [INCONCLUSIVE, WRONG]
    assert found.verdict == WRONG


def test_doubts_make_it_inconclusive_but_not_right() -> None:
    assert Comparison(0.0, 1e-4, 0.0, 2).doubted().verdict == VERIFIED
    doubted = Comparison(0.0, 1e-4, 0.0, 2).doubted("a branch was not reached")
    assert (doubted.verdict, doubted.notes) == (INCONCLUSIVE, ("a branch was not reached",))
    assert Comparison(1.0, 1e-4, 0.0, 2, verdict=WRONG).doubted("x").verdict == WRONG


# Models.


def test_filters_that_are_zero_do_not_make_a_right_model_inconclusive() -> None:
    model = from_text(f"({MLP}) => (float[4, 5] y) {{ h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }}")
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        array[(slice(None), slice(8, None)) if tensor.name == "w" else slice(8, None)] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    found = proof(model, "l2")
    assert (found.verdict, found.effect) == (VERIFIED, 0.0)
    assert found.outputs[0].power is not None
    assert found.outputs[0].power > 0.01


def test_channels_that_nobody_reads_need_show_nothing() -> None:
    text = f"({MLP.replace('16, 5', '4, 5')}, int64[4] i) => (float[4, 5] y) {{ h = MatMul(x, w) a = Gather <axis = 1>(h, i) y = MatMul(a, v) }}"
    combed = comb(cpd.load(from_text(text, values={"i": [3, 1, 7, 5]})))
    unread = next(group for group in combed.groups if len(group) == 12)
    keep = KeepMask(combed.atoms, unread.channels[:6])
    from cpd_onnx.rewrite.rewriter import rewrite

    assert verify(combed, keep, rewrite(combed, keep).model).verdict == VERIFIED


@pytest.mark.parametrize("ending", ["Relu", "Sigmoid"])
def test_a_dead_or_saturated_output_is_inconclusive_and_data_decide(ending: str) -> None:
    text = f"({MLP}, float huge) => (float[4, 5] y) {{ h = MatMul(x, w) o = MatMul(h, v) s = Sub(o, huge) y = {ending}(s) }}"
    model = from_text(text, values={"huge": 1e4})
    found = proof(model)
    assert found.verdict == INCONCLUSIVE
    assert "'y'" in found.notes[0]
    assert "--data" in found.notes[0]
    rng = np.random.default_rng(0)
    feeds = [{"x": (1e3 * rng.standard_normal((4, 12))).astype(np.float32)} for _ in range(2)]
    assert proof(model, feeds=feeds).verdict == VERIFIED


def test_an_empty_output_shows_nothing_and_need_not() -> None:
    text = f"({MLP}, int64[1] a, int64[1] b) => (float[4, 5] y, float[0, 5] z) {{ h = MatMul(x, w) y = MatMul(h, v) z = Slice(y, a, a, b) }}"
    assert proof(from_text(text, values={"a": 0, "b": 0})).verdict == VERIFIED


def test_an_empty_part_of_an_output_shows_nothing_and_need_not() -> None:
    """Exporters append what rotary embeddings leave as it is, which may be nothing."""
    text = f"({MLP}, int64[1] a, int64[1] b) => (float[4, 5] y) {{ h = MatMul(x, w) p = MatMul(h, v) e = Slice(p, a, a, b) y = Concat <axis = 0> (p, e) }}"
    assert proof(from_text(text, values={"a": 0, "b": 0})).verdict == VERIFIED


def test_an_output_that_takes_only_a_size_from_pruned_channels_need_not_change() -> None:
    """The keys of an encoder's outputs have the batch size of the decoder's channels, and none of their values."""
    text = f"""({MLP}, float[4, 12] xe, float[12, 6] k, int64[1] at, int64[2] parts) => (float[4, 5] y, float[4, 3, 2] key) {{
        h = MatMul(x, w) y = MatMul(h, v) s = Shape(h) n = Gather(s, at)
        t = Concat <axis = 0> (n, parts) p = MatMul(xe, k) key = Reshape(p, t)
    }}"""
    found = proof(from_text(text, values={"at": 0, "parts": [3, 2]}))
    assert found.verdict == VERIFIED
    assert [one.effect > 0 for one in found.outputs] == [True, False]


def test_large_maps_of_decisions_are_verified() -> None:
    text = (
        "(float[1, 3, 96, 96] x, float[16, 3, 3, 3] w, float[21, 16, 3, 3] v) => (int64[1, 96, 96] y) {"
        "c = Conv <pads = [1, 1, 1, 1]>(x, w) r = Relu(c) l = Conv <pads = [1, 1, 1, 1]>(r, v) y = ArgMax <axis = 1, keepdims = 0>(l) }"
    )
    found = proof(from_text(text))
    assert found.verdict == VERIFIED
    assert [(one.tensor, one.kind) for one in found.outputs] == [("y", DISCRETE), ("l", "values")]
    assert found.allowed <= found.effect / 100


def test_models_that_run_piece_by_piece_show_what_is_in_front_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpd_onnx.proof.proving._PIECEWISE_BYTES", 0)
    for name in ("argmax", "sigmoid", "int8, QDQ"):
        assert verdict_of(name) == VERIFIED
        assert verdict_of(name, "one filter a tenth larger") == WRONG


# Models that round.


def run(model: Any, feed: dict[str, Array]) -> Array:
    from cpd_onnx.runtime.sessions import execute, open_model

    return execute(open_model(model, optimise=False), feed)[0]


def test_what_follows_a_branch_of_a_constant_condition_rounds() -> None:
    """A body uses tensors that its node does not name, so that its outputs are no constants."""
    text = """(float[N, 4] x, bool c, float s, uint8 z) => (uint8[N, 4] y) {
        a = If (c) <
            then_branch = one () => (float[N, 4] t) { t = Relu (x) },
            else_branch = two () => (float[N, 4] e) { e = Neg (x) }
        >
        y = QuantizeLinear (a, s, z)
    }"""
    assert rounding_of(cpd.load(from_text(text, values={"c": True, "s": 0.1, "z": 0}))).has_integers


@pytest.mark.parametrize("name", ["int8, QDQ", "int8, operators", "int8, dynamic"])
def test_without_rounding_a_quantised_model_gives_nearly_the_same(name: str) -> None:
    model = cpd.load(network(name))
    assert rounding_of(model).has_integers
    plain, floating = unrounded(model, fold(model))
    assert not rounding_of(plain).has_integers
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    ours, theirs = run(plain, feed), run(model, feed).astype(np.float32)
    assert ours.dtype == np.float32
    assert ("y" in floating) == (name == "int8, operators")
    assert np.abs(ours - theirs).mean() < 0.1 * np.abs(theirs).mean()


def test_half_floats_become_float32_wherever_they_are_named() -> None:
    text = (
        "(float16[4, 12] x, float16[12, 5] w) => (float16[4, 5] y) { h = Cast <to = 1>(x) g = Cast <to = 10>(h) "
        "m = Mul(g, one) y = MatMul(m, w) }"
    )
    proto = from_text(text)
    one = numpy_helper.from_array(np.ones(1, np.float16))
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["one"], value=one))
    model = cpd.load(proto)
    plain = single(model)
    assert not rounding_of(plain)
    assert run(plain, {"x": np.ones((4, 12), np.float32)}).dtype == np.float32
    assert rounding_of(model).has_halves


def test_a_half_float_that_is_computed_from_sizes_is_rounded_in_both_models() -> None:
    text = (
        "(float16[4, 12] x, float16[12, 7] w, float16[7, 5] v) => (float16[4, 5] y) { h = MatMul(x, w) "
        "s = Shape <start = 1>(h) f = Cast <to = 1>(s) r = Sqrt(f) g = Cast <to = 10>(r) n = Div(h, g) y = MatMul(n, v) }"
    )
    found = mask_oracle(from_text(text))
    assert found.verdict == VERIFIED
    assert found.difference < 1e-5  # the square root of 7 changes by 3e-4 of its value when it is rounded


def test_a_quantised_weight_that_is_transposed_is_masked_at_its_zero_point() -> None:
    text = (
        "(float[4, 12] x, uint8[16, 12] w, uint8[16, 5] v, uint8 z, float s) => (float[4, 5] y) {"
        "q, qs, qz = DynamicQuantizeLinear(x) t = Transpose <perm = [1, 0]>(w) i = MatMulInteger(q, t, qz, z) "
        "f = Cast <to = 1>(i) g = Mul(f, s) h = Mul(g, qs) y = com.microsoft.DynamicQuantizeMatMul(h, v, s, z) }"
    )
    rng = np.random.default_rng(0)
    values = {"w": rng.integers(0, 256, (16, 12)), "v": rng.integers(0, 256, (16, 5)), "z": 136, "s": 0.01}
    assert mask_oracle(from_text(text, values=values)).verdict == VERIFIED


def test_oracles_pass_only_if_they_show_something() -> None:
    text = (
        f"({MLP}, float huge) => (float[4, 5] y) {{ h = MatMul(x, w) o = MatMul(h, v) s = Sub(o, huge) y = Relu(s) }}"
    )
    model = from_text(text, values={"huge": 1e9})
    for outcome in (mask_oracle(model), permutation_oracle(model)):
        assert (outcome.passed, outcome.verdict) == (False, INCONCLUSIVE)
        assert outcome.notes


# The command line.


@pytest.fixture
def blind(tmp_path: Path) -> Path:
    text = (
        f"({MLP}, float huge) => (float[4, 5] y) {{ h = MatMul(x, w) o = MatMul(h, v) s = Sub(o, huge) y = Relu(s) }}"
    )
    onnx.save(from_text(text, values={"huge": 1e9}), tmp_path / "blind.onnx")
    return tmp_path / "blind.onnx"


@pytest.mark.parametrize("command", ["prune", "compress", "sweep"])
def test_what_is_inconclusive_is_not_written_unless_that_is_allowed(
    blind: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    line = {
        "prune": [command, blind, "-o", blind.parent / "out.onnx"],
        "compress": [command, blind, "-o", blind.parent / "out.onnx", "--no-report"],
        "sweep": [command, blind, "-o", blind.parent / "out", "--targets", "channels=0.5", "--jobs", "1"],
    }[command]
    line += ["--log-level", "quiet"]
    assert main(plain(line)) == 4
    said = capfd.readouterr().err
    assert "error: inconclusive: output 'y'" in said
    assert len(said.splitlines()) == 1
    assert list(blind.parent.glob("**/*.onnx")) == [blind]
    assert main(plain([*line, "--force", "--allow-inconclusive"])) == 0
    assert len(list(blind.parent.glob("**/*.onnx"))) == 2


def test_verify_ends_in_a_code_of_its_own(blind: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = blind.parent / "out.onnx"
    assert main(plain(["prune", str(blind), "-o", str(out), "--allow-inconclusive"])) == 0
    assert "inconclusive: output 'y'" in capsys.readouterr().out
    assert main(plain(["verify", str(blind), str(out), "--json", str(blind.parent / "found.json")])) == 4
    assert "inconclusive" in capsys.readouterr().err
    assert '"verdict": "inconclusive"' in (blind.parent / "found.json").read_text()


def test_a_mask_that_hides_all_is_not_tried_where_it_gives_nan() -> None:
    model = from_text(
        "(float[n, 4, 6] x, bool[n, 4] xmask, float[6, 16] w, float[16, 5] v, float low, float zero, int64[1] axes) "
        "=> (float[n, 4, 5] y) { s = Where(xmask, zero, low) wide = Unsqueeze(s, axes) p = Softmax(wide) "
        "h = MatMul(x, w) a = MatMul(p, h) b = Mul(h, a) y = MatMul(b, v) }",
        values={"low": -np.inf, "zero": 0.0, "axes": [1]},
    )
    assert proof(model).verdict == VERIFIED


# Sizes that operators seem to require.


def hard_coded() -> ModelProto:
    """A model whose Reshape seems to require images of 8 x 8, but takes one of 16 x 8 as two where broadcasting lets it."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3, h, w] x) => (float[n, 3, h, w] y)
        {
          c = Conv <pads = [1, 1, 1, 1]> (x, k)
          r = Reshape (c, shape)
          m = GlobalAveragePool (r)
          s = Mul (c, m)
          y = Conv (s, l)
        }"""
    )
    weights = {"k": rng.standard_normal((2, 3, 3, 3)), "l": rng.standard_normal((3, 2, 1, 1))}
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items())
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 2, 8, 8]), "shape"))
    return model


def of_half(sizes: dict[str, tuple[int, ...]] | None = None) -> Comparison:
    """The verdict on the hard-coded model with one of its two channels, at the given sizes."""
    combed = comb(cpd.load(hard_coded()), sizes)
    keep = KeepMask(combed.atoms, combed.groups[0].channels[[1]])
    return verify(combed, keep, rewrite(combed, keep).model)


def test_sizes_that_operators_only_seem_to_require_are_tried() -> None:
    assert comb(cpd.load(hard_coded())).folded.solved == {"h": 8, "w": 8}
    found = of_half()
    assert found.verdict == INCONCLUSIVE
    assert "the original runs with x [1, 3, 16, 8] too" in " ".join(found.notes)
    assert of_half({"x": (2, 3, 8, 8)}).verdict == VERIFIED


def test_sizes_that_operators_do_require_are_no_doubt() -> None:
    model = hard_coded()
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.array([0, 2, 8, 8]), "shape"))
    assert comb(cpd.load(model)).folded.solved == {"h": 8, "w": 8}
    assert proof(model).verdict == VERIFIED
