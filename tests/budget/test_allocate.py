"""Budgets, scores, multiples and what is held."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import POLICIES, Allocation, LossCurves, allocate, loss_curves
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.groups import Combed
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.scores.registry import SCORE_FUNCTIONS, ScoreFunction, score, score_function
from tests.rules.test_rules import model_of
from tests.support.models import from_text

WIDE = (
    "(float[1, 3, 16, 16] x, float[48, 3, 3, 3] w, float[64, 48, 3, 3] u, float[40, 64, 3, 3] t, float[40, 10] v) => (float[1, 10] y) "
    "{ a = Conv(x, w) b = Conv(a, u) c = Conv(b, t) p = GlobalAveragePool(c) f = Flatten(p) y = MatMul(f, v) }"
)


def wide() -> ModelProto:
    return from_text(WIDE)


def chosen(model: ModelProto, kind: str, fraction: float, **options: object) -> tuple[Combed, Allocation]:
    combed = comb(model)
    return combed, allocate(combed, score(combed), Allocate(**{kind: fraction}, **options).budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["channels", "macs", "params", "bytes"])
@pytest.mark.parametrize("fraction", [0.75, 0.5, 0.25])
def test_target_is_met_within_two_percent(kind: str, fraction: float, policy: str) -> None:
    _, allocation = chosen(wide(), kind, fraction, policy=policy)
    assert allocation.after.of(kind) / allocation.before.of(kind) == pytest.approx(fraction, abs=0.02)
    assert allocation.notes == ()


@pytest.mark.parametrize("policy", POLICIES)
def test_bounds_are_held(policy: str) -> None:
    options = {"policy": policy, "min_ratio": 0.4, "max_ratio": 0.9, "widths": [("u", (0.75, 1.0))]}
    combed, allocation = chosen(wide(), "macs", 0.5, **options)
    left = {g.name: 1 - len(r) / len(g) for g, r in zip(combed.groups, allocation.removed, strict=True)}
    assert 0.4 <= left["w"] <= 0.9
    assert 0.75 <= left["u"] <= 1
    assert 0.4 <= left["t"] <= 0.9


def test_bounds_that_cannot_be_held_are_named() -> None:
    with pytest.raises(cpd.TargetError, match="minimum ratios"):
        chosen(wide(), "macs", 0.2, min_ratio=0.8)
    with pytest.raises(cpd.TargetError, match=r"--width 'no\*' matches no group"):
        chosen(wide(), "macs", 0.5, widths=[("no*", (0.5, 1.0))])


def test_bytes_are_those_of_the_file() -> None:
    model = cpd.load(Path(__file__).parents[2] / "models" / "digits.onnx")
    state = cpd.run("comb, score, allocate{bytes=0.5}, prune", model)
    assert state.allocation is not None
    before, after = len(model.serialize()), len(state.model.serialize())
    assert state.allocation.before.bytes == pytest.approx(before, rel=0.01)
    assert state.allocation.after.bytes == pytest.approx(after, rel=0.01)
    assert after / before == pytest.approx(0.5, abs=0.02)


def loss_of(combed: Combed, allocation: Allocation) -> float:
    curves = loss_curves(score(combed), is_loss=False)
    return sum(float(c[len(r)]) for c, r in zip(curves.loss, allocation.removed, strict=True))


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_optimum_has_the_least_loss(kind: str) -> None:
    combed = comb(wide())
    scores = score(combed)
    curves = loss_curves(scores, is_loss=False)
    budgets = {policy: Allocate(**{kind: 0.4}, policy=policy).budget for policy in POLICIES}  # type: ignore[arg-type]
    found = {s: loss_of(combed, allocate(combed, scores, budget, curves=curves)) for s, budget in budgets.items()}
    assert found["optimal"] == min(found.values())
    assert found["optimal"] < 0.95 * found["uniform"]


@pytest.mark.parametrize("target", [0.3, 0.4, 0.5, 0.6, 0.7])
def test_the_optimum_is_that_of_trying_all(target: float) -> None:
    model = from_text(
        "(float[1, 3, 8, 8] x, float[7, 3, 3, 3] w, float[9, 7, 3, 3] u, float[6, 9, 1, 1] t, float[2, 6, 1, 1] v)"
        " => (float[1, 2, 4, 4] y) { a = Conv(x, w) b = Conv(a, u) c = Conv(b, t) y = Conv(c, v) }"
    )
    combed = comb(model)
    made = loss_curves(score(combed), is_loss=False)
    allocation = allocate(combed, score(combed), Allocate(macs=target, policy="optimal").budget, curves=made)
    curves = made.loss
    cost = CostModel(combed).in_widths("macs")
    every = np.array(list(itertools.product(*(range(1, len(g) + 1) for g in combed.groups))))
    loss = sum(curve[len(curve) - every[:, k]] for k, curve in enumerate(curves))
    least = loss[cost(every) <= target * allocation.before.macs].min()
    assert loss_of(combed, allocation) == pytest.approx(least)


def test_what_many_layers_share_is_not_what_goes_first() -> None:
    """Of a residual stage with blocks of its width, importances alike, the stage loses less, and no block much."""
    blocks = "".join(
        f" h{i} = Conv(s{i}, a{i}) i{i} = Relu(h{i}) j{i} = Conv(i{i}, b{i}) s{i + 1} = Add(s{i}, j{i})"
        for i in range(4)
    )
    weights = ", ".join(f"float[32, 32, 1, 1] a{i}, float[32, 32, 1, 1] b{i}" for i in range(4))
    ends = "p = GlobalAveragePool(s4) f = Flatten(p) y = MatMul(f, v)"
    text = f"(float[1, 3, 9, 9] x, float[32, 3, 3, 3] w, {weights}, float[32, 4] v) => (float[1, 4] y) {{ s0 = Conv(x, w) {blocks} {ends} }}"
    combed = comb(from_text(text))
    alike = [np.ones(len(group)) for group in combed.groups]
    allocation = allocate(combed, alike, Allocate(macs=0.5, policy="optimal").budget)
    left = [1 - len(removed) / 32 for removed in allocation.removed]
    assert len(left) == 5
    assert left[0] > max(left[1:]) > min(left[1:]) > 0.5
    assert max(left[1:]) - min(left[1:]) < 0.1


def test_costs_in_widths_are_those_of_channels() -> None:
    combed = comb(model_of("attention 4d"))
    for kind in ("macs", "params", "channels", "bytes"):
        costs = CostModel(combed)
        kept = KeepMask(combed.atoms, np.concatenate([group.channels[: len(group) // 2] for group in combed.groups]))
        widths = np.asarray([[len(group) - len(group) // 2 for group in combed.groups]])
        assert costs.in_widths(kind)(widths)[0] == pytest.approx(costs.cost(kind, kept))


def test_curves_from_outside() -> None:
    combed = comb(wide())
    steep = [np.arange(len(g)) * (100.0 if g.name == "u" else 1.0) for g in combed.groups]
    budget = Allocate(macs=0.5, policy="optimal").budget
    allocation = allocate(combed, score(combed), budget, curves=LossCurves(tuple(steep)))
    removed = {g.name: len(r) for g, r in zip(combed.groups, allocation.removed, strict=True)}
    assert removed["u"] == 0
    assert allocation.after.macs / allocation.before.macs == pytest.approx(0.5, abs=0.02)
    for wrong in (steep[:2], [curve[1:] for curve in steep], [1 + curve for curve in steep]):
        with pytest.raises(ValueError, match="loss curve"):
            allocate(combed, score(combed), budget, curves=LossCurves(tuple(wrong)))


def test_groups_that_do_the_same_compete_among_themselves() -> None:
    """Two blocks alike, one of them ten times as strong, and a group of another kind, which loses its share."""
    text = (
        "(float[1, 3, 9, 9] x, float[16, 3, 3, 3] w, float[20, 16, 1, 1] a, float[16, 20, 1, 1] b, float[20, 16, 1, 1] c,"
        " float[16, 20, 1, 1] d, float[16, 4] v) => (float[1, 4] y) { s = Conv(x, w) h = Conv(s, a) i = Relu(h)"
        " j = Conv(i, b) k = Add(s, j) l = Conv(k, c) m = Relu(l) n = Conv(m, d) o = Add(k, n)"
        " p = GlobalAveragePool(o) f = Flatten(p) y = MatMul(f, v) }"
    )
    combed = comb(from_text(text))
    by_name = {group.name: group for group in combed.groups}
    assert combed.dependency(by_name["a"]) == combed.dependency(by_name["c"]) != combed.dependency(by_name["w"])
    scores = [
        np.linspace(1, 2, len(g)) if g.name != "c" else np.r_[np.zeros(15), np.full(5, 9.0)] for g in combed.groups
    ]
    allocation = allocate(combed, scores, Allocate(channels=0.5, policy="isomorphic").budget)
    left = {g.name: 1 - len(r) / len(g) for g, r in zip(combed.groups, allocation.removed, strict=True)}
    assert left["c"] < left["a"]
    assert (left["a"] + left["c"]) / 2 == pytest.approx(left["w"], abs=0.05)


def test_a_multiple_holds_for_depthwise_convolutions() -> None:
    model = from_text(
        "(float[1, 3, 8, 8] x, float[20, 3, 3, 3] w, float[20, 1, 3, 3] d, float[2, 20, 1, 1] v) => (float[1, 2, 4, 4] y)"
        " { a = Conv(x, w) b = Conv<group=20>(a, d) y = Conv(b, v) }"
    )
    _, allocation = chosen(model, "channels", 0.6, round_to=8)
    assert [len(removed) for removed in allocation.removed] == [12]


def test_costs_are_those_of_the_pruned_file() -> None:
    state = cpd.run("comb, score, allocate{macs=0.4}, prune", wide())
    again = comb(state.model.complete_proto())
    before = allocate(again, score(again), Allocate(channels=0.9).budget).before
    assert state.allocation is not None
    assert (before.macs, before.params) == (state.allocation.after.macs, state.allocation.after.params)


def test_macs_by_hand() -> None:
    _, allocation = chosen(
        from_text(
            "(float[1, 3, 8, 8] x, float[4, 3, 3, 3] w, float[2, 4, 1, 1] v) => (float[1, 2, 6, 6] y) { a = Conv(x, w) y = Conv(a, v) }"
        ),
        "channels",
        0.5,
    )
    assert allocation.before.macs == 4 * 3 * 9 * 36 + 2 * 4 * 36
    assert allocation.after.macs == 2 * 3 * 9 * 36 + 2 * 2 * 36
    assert allocation.before.params == 4 * 27 + 8


def test_a_group_keeps_one_channel_at_least() -> None:
    combed, allocation = chosen(wide(), "params", 0.02)
    assert all(len(removed) < len(group) for group, removed in zip(combed.groups, allocation.removed, strict=True))


def test_unreachable_target_says_what_stands_in_the_way() -> None:
    with pytest.raises(cpd.TargetError, match=r"cannot be reached.*graph"):
        chosen(model_of("heads"), "params", 0.001)


def test_granularity_is_reported() -> None:
    _, allocation = chosen(model_of("lstm"), "channels", 0.5)
    assert allocation.notes
    assert "whole channels" in allocation.notes[0]


def test_heads_take_the_share_first() -> None:
    combed, allocation = chosen(model_of("attention 4d"), "channels", 0.5)
    kinds = {group.kind: len(removed) for group, removed in zip(combed.groups, allocation.removed, strict=True)}
    assert kinds == {"heads": 1, "head_dim": 0}


def test_multiple() -> None:
    combed, allocation = chosen(wide(), "macs", 0.5, round_to=8)
    assert all(
        (len(group) - len(removed)) % 8 == 0 for group, removed in zip(combed.groups, allocation.removed, strict=True)
    )


@pytest.mark.parametrize("pattern", ["w", "u*", "b"])
def test_keep(pattern: str) -> None:
    combed, allocation = chosen(wide(), "macs", 0.8, keep=(pattern,))
    held = {"w": ["w"], "u*": ["w", "u"], "b": ["w", "u"]}[pattern]
    for group, removed in zip(combed.groups, allocation.removed, strict=True):
        assert bool(removed) != (group.name in held)


def test_keep_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(cpd.TargetError, match="matches no group"):
        chosen(wide(), "macs", 0.5, keep=("nothing*",))


@pytest.mark.parametrize(
    "options",
    [
        {"macs": 0.0},
        {"macs": 1.5},
        {"macs": 0.5, "params": 0.5},
        {"min_ratio": 0.9, "max_ratio": 0.5},
        {"policy": "odd"},
        {"round_to": 0},
    ],
)
def test_senseless_budget(options: dict[str, object]) -> None:
    with pytest.raises(cpd.TargetError):
        _ = Allocate(**options).budget  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("l1", [4.0, 12.0]),
        ("l2", [np.sqrt(8.0), np.sqrt(50.0)]),
        ("lamp", [8 / 58, 1.0]),
        ("fpgm", [np.sqrt(25 + 4 + 25)] * 2),
        ("bn", [np.sqrt(8.0), np.sqrt(50.0)]),
    ],
)
def test_score_by_hand(kind: str, expected: list[float]) -> None:
    values = {"w": [[2, -3], [0, 0]], "v": [[-2, 0], [-4, -5]]}
    model = from_text(
        "(float[4, 2] x, float[2, 2] w, float[2, 2] v) => (float[4, 2] y) { a = MatMul(x, w) y = MatMul(a, v) }",
        values=values,
    )
    assert score(comb(model), kind)[0] == pytest.approx(expected)


def test_scale_of_a_normalisation() -> None:
    model = from_text(
        "(float[1, 2, 4, 4] x, float[3, 2, 1, 1] w, float[3] s, float[3] b, float[3] m, float[3] v, float[2, 3, 1, 1] u)"
        " => (float[1, 2, 4, 4] y) { a = Conv(x, w) c = BatchNormalization(a, s, b, m, v) y = Conv(c, u) }",
        values={"s": [0.5, -2.0, 0.1], "b": [9, 9, 9], "m": [9, 9, 9], "v": [9, 9, 9]},
    )
    assert score(comb(model), "bn")[0] == pytest.approx([0.5, 2.0, 0.1])


def test_scores_that_estimate_the_loss_compete_by_what_they_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups with the same scores: the one whose channels cost more loses more."""
    monkeypatch.setitem(
        SCORE_FUNCTIONS,
        "flat",
        ScoreFunction(lambda q: [1 + np.arange(len(g)) / 99 for g in q.combed.groups], "", is_loss=True),
    )
    state = cpd.run("comb, score{kind='flat'}, allocate{macs=0.6, policy='global'}", wide())
    combed, allocation = state.combed, state.allocation
    assert combed is not None
    assert allocation is not None
    left = {g.name: 1 - len(r) / len(g) for g, r in zip(combed.groups, allocation.removed, strict=True)}
    assert left["u"] < left["w"]
    assert left["u"] < left["t"]


def test_a_score_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\ndef last(question): return [np.arange(len(g)) for g in question.combed.groups]\n"
        "def wrong(question): return [np.arange(3)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    state = cpd.run("comb, score{kind='mine:last'}, allocate{channels=0.5}", wide())
    assert state.allocation is not None
    assert state.allocation.removed[0] == list(range(24))
    with pytest.raises(cpd.TargetError, match="one number per channel"):
        score(comb(wide()), "mine:wrong")
    with pytest.raises(ValueError, match="already"):
        score_function("l2", source="")


def test_random_score_follows_the_seed() -> None:
    combed = comb(wide())
    first, again, other = (score(combed, "random", seed=seed)[0] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_unknown_score() -> None:
    with pytest.raises(cpd.TargetError, match=r"l1, l2, lamp, .*module:function"):
        score(comb(wide()), "guess")


def test_least_important_channels_go() -> None:
    combed, allocation = chosen(wide(), "channels", 0.5)
    for values, removed in zip(score(combed), allocation.removed, strict=True):
        kept = np.delete(values, removed)
        assert values[removed].max() <= kept.min()
