"""Bases: where only sums and weights use channels, combinations of them take their place before some are removed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.fitting.output_error import output_error, outputs_of
from cpd_onnx.ir.model import Model, load
from cpd_onnx.passes import repair as repair_pass
from cpd_onnx.passes.distill import overlap_of
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.scores.bases import changed, combinations, confirmed_groups, first_survive, mixable_groups
from cpd_onnx.scores.registry import score
from tests.support.models import from_text


def array(*shape: int) -> np.ndarray:
    """Return normal numbers, the same for the same shape."""
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def model_of(text: str, **values: np.ndarray) -> Model:
    return load(from_text(text, values=values))


def inverted_residual(rank: int = 6) -> Model:
    """A narrow sum of three tensors, of which two wide branches with an activation take as many combinations."""
    wide = "{0} = Relu (w{0}) d{0} = Conv <pads = [1, 1, 1, 1], group = 12> ({0}, depth{0}) r{0} = Relu (d{0})"
    taken = array(rank, 6) if rank < 6 else np.eye(6)
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) / np.sqrt(shape[1])

    return model_of(
        "(float[N, 6, 8, 8] x, float[6, 6, 1, 1] stem, float[6] sb, float[12, 6, 1, 1] up1, float[12, 1, 3, 3] deptha, "
        "float[6, 12, 1, 1] down1, float[12, 6, 1, 1] up2, float[12, 1, 3, 3] depthb, float[6, 12, 1, 1] down2, "
        "float[5, 6, 3, 3] head) => (float[N, 5, 8, 8] y) { s = Conv (x, stem, sb) wa = Conv (s, up1) "
        f"{wide.format('a')} p1 = Conv (ra, down1) t = Add (s, p1) wb = Conv (t, up2) {wide.format('b')} "
        "p2 = Conv (rb, down2) u = Add (p2, t) v = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (u) "
        "y = Conv <pads = [1, 1, 1, 1]> (v, head) }",
        stem=weight(6, 6, 1, 1), sb=weight(6, 1), deptha=weight(12, 1, 3, 3), depthb=weight(12, 1, 3, 3),
        down1=weight(6, 12, 1, 1) / 4, down2=weight(6, 12, 1, 1) / 4,
        up1=(weight(12, rank) @ taken)[:, :, None, None], up2=(weight(12, rank) @ taken)[:, :, None, None],
        head=np.einsum("orkl,rc->ockl", weight(5, rank, 3, 3), taken),
    )  # fmt: skip  # the weights in order


def images(count: int) -> ArraySource:
    return ArraySource({"x": np.random.default_rng(1).normal(size=(count, 6, 8, 8)).astype(np.float32)})


def narrow_group(combed: Combed) -> int:
    (index,) = mixable_groups(combed)
    return index


def test_a_narrow_sum_is_mixable_and_a_rectified_tensor_is_not() -> None:
    combed = comb(inverted_residual())
    mixable = mixable_groups(combed)[narrow_group(combed)]
    assert len(mixable.group) == 6
    assert {side.unit.weight for side in mixable.makers} == {"stem", "down1", "down2"}
    assert {side.unit.weight for side in mixable.takers} == {"up1", "up2", "head"}
    assert len(combed.groups) == 3


def test_another_basis_leaves_the_outputs_as_they_are() -> None:
    combed = comb(inverted_residual())
    feed = next(iter(images(4).batches(4)))
    mixable = mixable_groups(combed)[narrow_group(combed)]
    model, names = changed(combed, {mixable: array(1, 6, 6)})
    assert set(names) == {"stem", "sb", "down1", "down2", "up1", "up2", "head"}
    before, after = (execute(open_model(each), feed)[0] for each in (combed.folded.model, model))
    np.testing.assert_allclose(before, after, rtol=1e-3, atol=1e-4)
    assert confirmed_groups(combed, [feed]).keys() == mixable_groups(combed).keys()


@pytest.mark.parametrize(
    "step",
    ["r = Relu (h)", "i = Identity (h) r = Mul (i, scale)", "i = Identity (h) r = Add (i, scale)", "r = Mul (h, h)"],
)
def test_what_is_not_alike_for_all_channels_is_not_mixed(step: str) -> None:
    text = f"(float[N, 4] x, float[4, 6] up, float[6] scale, float[6, 3] down) => (float[N, 3] y) {{ h = MatMul (x, up) {step} y = MatMul (r, down) }}"
    combed = comb(model_of(text, up=array(4, 6), scale=array(6), down=array(6, 3)))
    assert len(combed.groups) == 1
    assert not mixable_groups(combed)


def test_factors_and_biases_right_after_a_product_are_mixed_with_it() -> None:
    text = (
        "(float[N, 4] x, float[4, 6] up, float[6] scale, float[6] shift, float[6, 3] down) => (float[N, 3] y) "
        "{ h = MatMul (x, up) s = Mul (h, scale) r = Add (s, shift) y = MatMul (r, down) }"
    )
    combed = comb(model_of(text, up=array(4, 6), scale=1 + array(6) ** 2, shift=array(6), down=array(6, 3)))
    feed = {"x": array(2, 4)}
    assert len(confirmed_groups(combed, [feed])) == 1


@pytest.mark.parametrize(
    "step",
    [
        "r = Identity (h)",
        "r = Mul (h, half)",
        "r = Neg (h)",
        "r = Sub (h, h2)",
        "r = ReduceMean <axes = [1], keepdims = 1> (h)",
    ],
)
def test_what_is_linear_and_alike_for_all_channels_is_mixed(step: str) -> None:
    text = (
        "(float[N, 7, 4] x, float[4, 6] up, float[4, 6] up2, float half, float[6, 3] down) => (float[N, m, 3] y) "
        f"{{ h = MatMul (x, up) h2 = MatMul (x, up2) {step} t = Add (r, h2) y = MatMul (t, down) }}"
    )
    combed = comb(model_of(text, up=array(4, 6), up2=array(4, 6), half=np.float32(0.5), down=array(6, 3)))
    feed = {"x": array(2, 7, 4)}
    assert len(confirmed_groups(combed, [feed])) == 1


def test_a_constant_that_is_added_to_all_channels_is_found_by_the_outputs_only() -> None:
    """Padding with another number than zero: the traits of the operator do not tell."""
    text = (
        "(float[N, 3, 5, 5] x, float[6, 3, 1, 1] up, int64[8] pads, float fill, float[2, 6, 1, 1] down) => "
        "(float[N, 2, 7, 7] y) { h = Conv (x, up) p = Pad (h, pads, fill) y = Conv (p, down) }"
    )
    feed = {"x": array(2, 3, 5, 5)}
    for fill, expected in ((0.0, 1), (1.0, 0)):
        values = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "fill": np.float32(fill)}
        combed = comb(model_of(text, up=array(6, 3, 1, 1), down=array(2, 6, 1, 1), **values))
        assert len(mixable_groups(combed)) == 1
        assert len(confirmed_groups(combed, [feed])) == expected


def test_heads_have_combinations_of_their_own() -> None:
    text = (
        "(float[N, 5, 4] x, float[4, 12] value, float[12] vb, float[N, 3, 5, 5] xweights, int64[4] apart, "
        "int64[3] together, float[12, 4] out) => (float[N, 5, 4] y) { v = MatMul (x, value) b = Add (v, vb) "
        "s = Reshape (b, apart) h = Transpose <perm = [0, 2, 1, 3]> (s) c = MatMul (xweights, h) "
        "t = Transpose <perm = [0, 2, 1, 3]> (c) f = Reshape (t, together) y = MatMul (f, out) }"
    )
    values = {"apart": np.array([0, 5, 3, 4]), "together": np.array([0, 5, 12])}
    combed = comb(model_of(text, value=array(4, 12), vb=array(12), out=array(12, 4), **values))
    dims = [mixable for mixable in mixable_groups(combed).values() if mixable.copies == 3]
    assert [len(mixable.group) for mixable in dims] == [4]
    feed = {"x": array(2, 5, 4), "xweights": array(2, 3, 5, 5)}
    model, _ = changed(combed, {dims[0]: array(3, 4, 4)})
    before, after = (execute(open_model(each), feed)[0] for each in (combed.folded.model, model))
    np.testing.assert_allclose(before, after, rtol=1e-3, atol=1e-4)


def test_the_first_combinations_lose_least() -> None:
    """At each width no more is lost than by any choice of channels."""
    features, weight = array(400, 5) @ array(5, 5), array(5, 3).astype(float)
    gram = features.T @ features / len(features)
    basis = combinations([gram], [weight])

    def lost(rows: np.ndarray) -> float:
        made = features @ rows.T
        fitted, *_ = np.linalg.lstsq(made, features @ weight, rcond=None)
        return float(np.square(features @ weight - made @ fitted).mean())

    for width in range(1, 5):
        subsets = [lost(np.eye(5)[list(some)]) for some in _subsets(5, width)]
        assert lost(basis[:width]) <= min(subsets) * (1 + 1e-9)
    # Three outputs need three combinations.
    assert lost(basis[:3]) < 1e-9 < lost(basis[:2])


def _subsets(size: int, width: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(size), width))


def test_the_first_combinations_take_the_places_of_what_survives() -> None:
    basis = np.arange(16.0).reshape(1, 4, 4)
    found = first_survive(basis, np.array([False, True, False, True]))
    np.testing.assert_array_equal(found[0][[1, 3]], basis[0][:2])
    np.testing.assert_array_equal(found[0][[0, 2]], basis[0][2:])


def test_a_repair_with_combinations_loses_what_no_consumer_takes() -> None:
    """All consumers take two combinations of six channels, which no two channels can replace."""
    combed = comb(inverted_residual(rank=2))
    group = combed.groups[narrow_group(combed)]
    scores = score(combed, "reconstruction", data=images(128), samples=128, is_repaired=True)[group.id]
    alone = score(combed, "reconstruction", data=images(128), samples=128)[group.id]
    # Should a repair not help, the best channels survive.
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(alone))
    assert np.sort(scores)[:4].sum() < 0.1 * np.sort(alone)[:4].sum()
    kept = KeepMask(combed.atoms, group.channels[np.argsort(scores)[:4]])
    pruned = rewrite(combed, kept).model
    feeds = list(images(64).batches(64, seed=5))
    wanted = list(outputs_of(combed.folded.model, feeds))
    errors = {}
    for mixes in (False, True):
        made = repair(combed, kept, pruned, images(256), RepairOptions(samples=256, mixes=mixes)).model
        errors[mixes] = output_error(wanted, outputs_of(made, feeds))
    assert errors[True] < 0.1 * errors[False]


def test_combinations_are_dropped_if_the_outputs_are_no_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if no weight is fitted afterwards; here the combinations that matter least survive."""
    combed = comb(inverted_residual(rank=2))
    group = combed.groups[narrow_group(combed)]
    kept = KeepMask(combed.atoms, group.channels[:3])
    pruned = rewrite(combed, kept).model
    best = repair_pass.bases
    monkeypatch.setattr(
        repair_pass, "bases", lambda *of: {mixable: each[:, ::-1] for mixable, each in best(*of).items()}
    )
    monkeypatch.setattr(repair_pass._Repairer, "fit", lambda *_, **__: None)
    made = repair(combed, kept, pruned, images(64), RepairOptions(samples=64))
    assert made.fits == ()
    assert made.model.proto == pruned.proto
    assert "nothing was repaired" in made.notes[-1]


def test_combinations_are_not_compared_with_the_channels_of_the_teacher() -> None:
    combed = comb(inverted_residual())
    group = combed.groups[narrow_group(combed)]
    whole = overlap_of(combed, KeepMask(combed.atoms), hidden=4)
    narrow = overlap_of(combed, KeepMask(combed.atoms, group.channels[:2]), hidden=4)
    assert whole.features
    assert not narrow.features
    assert {"stem", "down1", "down2"} <= whole.filters.keys()
    assert narrow.filters.keys() == whole.filters.keys() - {"stem", "down1", "down2"}
    assert not {"s", "t", "u", "v"} & narrow.tensors.keys()
