"""From targets to an allocation: several limits, widths for the processor, what cannot be reached, and what is timed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

import cpd_onnx as cpd
from cpd_onnx.budget import host
from cpd_onnx.budget.allocation import Budget, Prices, UnreachableError, loss_curves
from cpd_onnx.budget.choosing import Chooser
from cpd_onnx.budget.latency import CostTable, LatencyProbe
from cpd_onnx.budget.speed import SpeedCheck
from cpd_onnx.budget.targets import parse
from cpd_onnx.budget.widths import Limits
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.groups import Combed
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.scores.registry import score
from tests.support.machine import MadeUp, stack
from tests.support.models import from_text

DIGITS = Path(cpd.__file__).parent / "models" / "digits.onnx"
SMALL = (
    "(float[1, 4] x, float[4, 6] w, float[6, 5] u, float[5, 7] t, float[7, 3] v) => (float[1, 3] y) "
    "{ a = MatMul(x, w) b = Relu(a) c = MatMul(b, u) d = Relu(c) e = MatMul(d, t) f = Relu(e) y = MatMul(f, v) }"
)


class Fake(MadeUp):
    """A machine on which the ratios are given one after another; the last one is repeated."""

    def __init__(self, combed: Combed, ratios: Sequence[float]) -> None:
        super().__init__(combed, Setting())
        self.ratios, self.opened = list(ratios), 0

    def ratio(self, channels: np.ndarray, seconds: float = 2.0) -> float:
        return self.ratios.pop(0) if len(self.ratios) > 1 else self.ratios[0]

    def reopen(self) -> None:
        self.opened += 1


def small() -> ModelProto:
    return from_text(SMALL)


def widths(combed: Combed, chosen: cpd.passes.allocate.Allocation) -> list[int]:  # type: ignore[name-defined]
    return [len(g) - len(r) for g, r in zip(combed.groups, chosen.removed, strict=True)]


# Several limits.


@pytest.mark.parametrize("policy", ["optimal", "uniform", "global"])
@pytest.mark.parametrize(
    "text", ["macs=0.5,params=0.7", "macs<=90,ram=444B", "flash=0.99,channels=0.6", "ram=436B,params=0.5"]
)
def test_all_limits_are_met(text: str, policy: str) -> None:
    combed = comb(small())
    chosen = Allocate(target=text, policy=policy).chooser(combed)(combed, score(combed))
    assert [asked.kind for asked in chosen.asked] == [target.kind for target in parse(text)]
    assert all(asked.is_met and asked.got <= asked.asked * (1 + 1e-9) for asked in chosen.asked)
    assert not chosen.is_nearest


@pytest.mark.parametrize("text", ["macs=0.5,params=0.6", "macs=0.6,channels=0.7", "params=60,macs=0.8"])
def test_several_limits_lose_little_more_than_the_best_of_all_widths(text: str) -> None:
    combed = comb(small())
    scores = score(combed)
    curves = loss_curves(scores, is_loss=True).loss
    chosen = Allocate(target=text).chooser(combed)(combed, scores, is_loss=True)
    costs = CostModel(combed)
    sizes = [len(group) for group in combed.groups]
    rows = np.asarray(list(itertools.product(*(range(1, size + 1) for size in sizes))))
    fits = np.ones(len(rows), bool)
    for target in parse(text):
        values = costs.in_widths(target.kind)(rows)
        full = values[-1]
        fits &= values <= target.fraction_of(full) * full * (1 + 1e-9)
    losses = np.asarray([sum(c[n - w] for c, n, w in zip(curves, sizes, row, strict=True)) for row in rows.tolist()])
    lost = sum(c[len(r)] for c, r in zip(curves, chosen.removed, strict=True))
    assert lost <= 1.15 * losses[fits].min()


def test_what_the_original_meets_is_no_target() -> None:
    combed = comb(small())
    with pytest.raises(cpd.TargetError, match=r"the original meets macs=1M already: it has macs="):
        Allocate(target="macs=1M").chooser(combed)(combed, score(combed))


def test_a_limit_that_the_original_meets_does_not_bind() -> None:
    combed = comb(small())
    chosen = Allocate(target="macs=0.5,params=1M").chooser(combed)(combed, score(combed))
    assert chosen.asked[1].is_met
    assert chosen.after.macs <= 0.5 * chosen.before.macs


def test_the_deployed_type_counts() -> None:
    combed = comb(stack())
    full, half = (
        Allocate(target="flash=250kB", deploy_as=kind).chooser(combed)(combed, score(combed))
        for kind in (None, "float16")
    )
    assert half.after.params > 1.5 * full.after.params
    assert half.budget["stored_as"] == "float16"


def test_the_plan_records_the_targets() -> None:
    combed = comb(small())
    words = Allocate(target="macs<=90,ram=444B").chooser(combed)(combed, score(combed)).budget
    assert words["asked"] == ["macs=90", "ram=444B"]
    assert words["kind"] == "macs"
    assert list(words["also"]) == ["ram"]
    assert words["policy"] == "optimal"
    plain = Allocate(macs=0.5).chooser(combed)(combed, score(combed)).budget
    assert plain == {"kind": "macs", "target": 0.5, "policy": "uniform", "round_to": 1, "keep": []}


# What cannot be reached.


def test_an_error_names_what_was_asked_and_what_can_be_reached() -> None:
    combed = comb(small())
    with pytest.raises(
        UnreachableError, match=r"target macs=2,params=0.9 cannot be reached: .* macs=9 \(asked for 2\)"
    ):
        Allocate(target="macs=2,params=0.9").chooser(combed)(combed, score(combed))


def test_the_nearest_is_returned_if_wanted() -> None:
    combed = comb(stack())
    chosen = Allocate(macs=0.001, min_ratio=0.5, nearest=True).chooser(combed)(combed, score(combed))
    (asked,) = chosen.asked
    assert chosen.is_nearest
    assert asked.asked == 0.001
    assert asked.got == pytest.approx(chosen.after.macs / chosen.before.macs)
    assert asked.got < 0.32
    assert any("macs=0.001 cannot be reached" in note for note in chosen.notes)


def test_limits_that_can_be_reached_hold_beside_one_that_cannot() -> None:
    combed = comb(small())
    chosen = Allocate(target="ram=4B,params=0.5", nearest=True).chooser(combed)(combed, score(combed))
    assert [asked.is_met for asked in chosen.asked] == [False, True]


@pytest.mark.parametrize("text", ["ram=0.25", "flash=0.3,ram=0.3"])
def test_ram_takes_no_channels_that_it_does_not_need(text: str) -> None:
    """The planner's arena jumps with the widths, most of all where they are whole blocks."""
    combed = comb(cpd.load(DIGITS))
    target = Allocate(target=text, round_to=8)
    chosen = target.chooser(combed)(combed, score(combed))
    assert all(asked.is_met for asked in chosen.asked)
    prices = Prices(combed, [asked.kind for asked in chosen.asked])
    for index, gone in enumerate(chosen.removed):
        removed = [own if place != index else gone[8:] for place, own in enumerate(chosen.removed)]
        kept = replace(chosen, removed=removed).keep_mask(combed)
        costs = {each.kind: prices.cost(each.kind, kept) / prices.full(each.kind) for each in chosen.asked}
        assert not gone or any(costs[each.kind] > max(each.asked, each.got) for each in chosen.asked), combed.groups[
            index
        ].name


def test_little_more_than_what_is_reachable_is_left_if_it_is_little() -> None:
    combed = comb(cpd.load(DIGITS))
    found = Allocate(target="flash=20kB", nearest=True, round_to=1).chooser(combed)(combed, score(combed)).asked[0]
    assert 20 < found.got < 27


def test_latency_out_of_reach_names_the_target_and_the_measurement(combed: Combed, table: CostTable) -> None:
    budget, scores = Allocate(latency=0.05).budget, score(combed)
    with pytest.raises(cpd.TargetError, match=r"target latency=0.05 cannot be reached: .*latency=0.\d+"):
        Chooser(budget, table, MadeUp(combed, Setting()))(combed, scores)
    nearest = Chooser(budget, table, MadeUp(combed, Setting()), nearest=True)(combed, scores)
    assert nearest.asked[0].got == pytest.approx(nearest.latency["measured"])
    assert nearest.latency["measured"] > 0.07
    assert not nearest.asked[0].is_met


# Measurements that are not believed.


def test_a_measurement_far_from_its_prediction_is_repeated(combed: Combed, table: CostTable) -> None:
    probe = Fake(combed, [0.2, 0.4, 0.505, 0.9, 0.3])
    chosen = Chooser(Allocate(latency=0.5).budget, table, probe)(combed, score(combed))
    assert probe.opened == 3
    assert chosen.latency["measured"] == 0.505


def test_a_prediction_that_measurements_refute_is_not_asked_again(combed: Combed, table: CostTable) -> None:
    probe = Fake(combed, [0.8])
    with pytest.raises(cpd.TargetError):
        Chooser(Allocate(latency=0.02).budget, table, probe)(combed, score(combed))
    assert probe.opened in (3, 6)  # the first, and the one that is returned


@pytest.mark.parametrize("wanted", [0.7, 0.5])
def test_candidates_are_as_fast_as_the_result(combed: Combed, table: CostTable, wanted: float) -> None:
    """The table knows nothing of 0.05 milliseconds of each run: candidates chosen by it alone were too slow."""
    probe, scores = MadeUp(combed, Setting()), score(combed)
    chooser = Chooser(Allocate(latency=wanted).budget, table, probe)
    misses = []
    for each in (chooser, chooser.corrected(combed, scores)):
        candidate = each.quick(combed, scores)
        misses.append(abs(probe.ratio(candidate.channels(combed)) - wanted))
        assert candidate.asked[0].is_met
        assert candidate.latency["target"] == wanted
    assert misses[1] < misses[0] / 2


def test_a_correction_needs_a_table_and_a_probe(combed: Combed, table: CostTable) -> None:
    for chooser in (Chooser(Allocate(latency=0.6).budget, table), Chooser(Allocate(macs=0.6).budget)):
        assert chooser.corrected(combed, score(combed)) is chooser


class Faster(MadeUp):
    """A machine on which one and a half times as much is saved as a cost table predicts."""

    def ratio(self, channels: np.ndarray, seconds: float = 2.0) -> float:
        pruned, original = (self.profile(model)[1] for model in (self.pruned(channels), self.combed.folded.model))
        return 1 - 1.5 * (1 - pruned / original)


def test_candidates_may_be_faster_than_the_table_predicts(combed: Combed, table: CostTable) -> None:
    probe, scores = Faster(combed, Setting()), score(combed)
    chooser = Chooser(Allocate(latency=0.1, nearest=True).budget, table, probe)
    assert not chooser.quick(combed, scores).asked[0].is_met
    candidate = chooser.corrected(combed, scores).quick(combed, scores)
    assert candidate.asked[0].is_met
    assert candidate.asked[0].got == pytest.approx(probe.ratio(candidate.channels(combed)))


def test_what_is_not_pruned_is_not_faster(combed: Combed, table: CostTable) -> None:
    """Noise made an unpruned model look faster, which then counted as pruned."""
    probe = Fake(combed, [0.76])
    chosen = Chooser(Allocate(latency=0.76).budget, table, probe)(combed, score(combed))
    assert any(chosen.removed)


def test_a_busy_machine_is_noted(combed: Combed, table: CostTable) -> None:
    probe = MadeUp(combed, Setting())
    probe.scatter = 0.8
    chosen = Chooser(Allocate(latency=0.6).budget, table, probe)(combed, score(combed))
    assert any("the machine is busy: timings of the same model scatter by 80%" in note for note in chosen.notes)


def test_absolute_latencies(combed: Combed, table: CostTable) -> None:
    targets = parse(f"latency={0.6 * table.ms:.6f}ms,params=0.9")
    chosen = Chooser(Budget("latency", 1.0, "optimal"), table, MadeUp(combed, Setting()), targets)(
        combed, score(combed)
    )
    assert chosen.asked[0].unit == "ms"
    assert chosen.asked[0].got == pytest.approx(0.6 * table.ms, rel=0.05)
    assert chosen.latency["measured"] == pytest.approx(0.6, abs=0.03)
    assert chosen.after.params <= 0.9 * chosen.before.params


# Widths for the processor.


@pytest.mark.parametrize(
    ("flags", "block"),
    [("fpu avx avx2 avx512f", 16), ("fpu avx avx2", 8), ("fp asimd evtstrm", 4), ("half thumb neon", 4)],
)
def test_blocks_of_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, block: int) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{'Features' if block == 4 else 'flags'}\t\t: {flags}\n")
    monkeypatch.setattr(host, "_CPUINFO", cpuinfo)
    host.vector_block.cache_clear()
    assert host.vector_block() == block
    host.vector_block.cache_clear()


def test_widths_follow_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "vector_block", lambda: 16)
    combed = comb(stack())
    chosen = Allocate(macs=0.4, round_to="auto").chooser(combed)(combed, score(combed))
    assert all(width % 16 == 0 for width in widths(combed, chosen))
    assert (chosen.round_to, chosen.budget["round_to"], chosen.budget["steps"]) == (16, 16, "auto")
    assert chosen.removed == Allocate(macs=0.4, round_to="auto16").chooser(combed)(combed, score(combed)).removed
    assert chosen.after.macs == pytest.approx(0.4 * chosen.before.macs, rel=0.05)


def test_small_groups_get_smaller_blocks() -> None:
    combed = comb(small())
    assert set(host.multiples(combed, 16).values()) == {1}
    assert set(host.multiples(comb(stack()), 16).values()) == {16}


def test_heads_are_no_widths() -> None:
    text = (
        "(float[1, 5, 32] x, float[32, 32] q, float[32, 32] k, int64[4] s) => (float[1, 8, 5, 5] y) "
        "{ a = MatMul(x, q) b = Reshape(a, s) c = Transpose<perm=[0, 2, 1, 3]>(b) d = MatMul(x, k) e = Reshape(d, s) "
        "f = Transpose<perm=[0, 2, 3, 1]>(e) y = MatMul(c, f) }"
    )
    combed = comb(from_text(text))
    multiples = host.multiples(combed, 8)
    assert all(multiples[group.id] == 1 for group in combed.groups if group.kind == "heads")


def test_blocks_too_coarse_for_a_target_are_halved() -> None:
    combed = comb(stack())
    chosen = Allocate(macs=0.01, round_to="auto64").chooser(combed)(combed, score(combed))
    assert chosen.round_to < 64
    assert chosen.after.macs <= 0.03 * chosen.before.macs


@pytest.mark.parametrize("round_to", ["automatic", "auto0", "auto-3", "x"])
def test_senseless_steps(round_to: str) -> None:
    with pytest.raises(cpd.TargetError, match="whole number of at least 1 or 'auto'"):
        Allocate(macs=0.5, round_to=round_to).chooser(comb(small()))


# Speed.


def checked(combed: Combed, ratios: Sequence[float], **options: object) -> cpd.passes.allocate.Allocation:  # type: ignore[name-defined]
    chooser = Allocate(macs=0.5, check_speed=True, **options).chooser(combed)  # type: ignore[arg-type]
    assert chooser.check is not None
    check = replace(chooser.check, open_probe=lambda combed, setting: Fake(combed, ratios))
    return Chooser(chooser.budget, targets=chooser.targets, block=chooser.block, check=check)(combed, score(combed))


def test_a_faster_model_is_taken_as_it_is(combed: Combed) -> None:
    chosen = checked(combed, [0.6])
    assert chosen.removed == Allocate(macs=0.5).chooser(combed)(combed, score(combed)).removed
    assert chosen.latency == {"measured": 0.6}
    assert chosen.is_faster
    assert not chosen.slow_because
    assert "latency" not in chosen.budget


def test_other_widths_are_tried_for_a_slower_model(combed: Combed) -> None:
    """Each slow one is measured four times; the third is faster."""
    chosen = checked(combed, [*[1.2] * 4, *[1.1] * 4, 0.7])
    assert chosen.latency["measured"] == 0.7
    assert chosen.round_to == 4
    assert all(width % 4 == 0 for width in widths(combed, chosen))
    assert chosen.after.macs == pytest.approx(0.5 * chosen.before.macs, rel=0.05)


def test_a_model_that_stays_slow_says_why(combed: Combed) -> None:
    chosen = checked(combed, [1.2])
    assert chosen.is_faster is False
    assert chosen.slow_because
    assert chosen.table is not None
    assert chosen.after.macs <= 0.53 * chosen.before.macs


def test_given_steps_are_not_changed(combed: Combed) -> None:
    chosen = checked(combed, [1.2], round_to=2)
    assert chosen.removed == Allocate(macs=0.5, round_to=2).chooser(combed)(combed, score(combed)).removed
    assert chosen.slow_because


def test_tiny_models_are_not_tried_at_other_widths(combed: Combed) -> None:
    """There, the choice would be one of chance, and differ from run to run."""

    def tiny(combed: Combed, setting: Setting) -> LatencyProbe:
        probe = Fake(combed, [1.2])
        probe.ms = 0.05
        return probe

    chooser = Allocate(macs=0.5, check_speed=True).chooser(combed)
    assert chooser.check is not None
    chosen = replace(chooser, check=replace(chooser.check, open_probe=tiny))(combed, score(combed))
    assert chosen.removed == Allocate(macs=0.5).chooser(combed)(combed, score(combed)).removed
    assert chosen.is_faster is False


def test_a_measurement_that_is_too_good_is_repeated(combed: Combed) -> None:
    assert checked(combed, [0.1, 0.62, 0.6, 0.61]).latency["measured"] == 0.61


def test_what_onnxruntime_does_not_run_is_not_timed(combed: Combed) -> None:
    def refuse(combed: Combed, setting: Setting) -> LatencyProbe:
        raise cpd.errors.UnsupportedError("onnxruntime cannot run the model: no kernel")

    chooser = Chooser(Budget("macs", 0.5, limits=Limits()), check=SpeedCheck(Setting(), 1, open_probe=refuse))
    chosen = chooser(combed, score(combed))
    assert chosen.is_faster is None
    assert any("not timed: onnxruntime cannot run the model: no kernel" in note for note in chosen.notes)


def test_a_pruned_model_is_timed_here() -> None:
    combed = comb(stack())
    chosen = Allocate(macs=0.3, check_speed=True).chooser(combed)(combed, score(combed))
    assert 0 < chosen.latency["measured"] < 3
