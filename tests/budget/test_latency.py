"""Cost tables: what is found out by measuring, on a machine that is made up, and how it is used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget import latency
from cpd_onnx.budget.allocation import POLICIES
from cpd_onnx.budget.choosing import Chooser
from cpd_onnx.budget.latency import CostTable, load_table
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.groups import Combed
from cpd_onnx.cli.main import main
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.scores.registry import score
from tests.support.machine import STACK, MadeUp, stack
from tests.support.models import from_text
from tests.support.runs import plain


def test_fast_widths_are_found(table: CostTable) -> None:
    assert {group.name: group.multiple for group in table.groups} == {"w": 16, "u": 16, "t": 16}
    slowdown = table.groups[1].slowdown
    assert slowdown[1] > 2
    assert 1.06 * slowdown[16] < slowdown[4] < 2
    assert 0.9 < slowdown[16] < 1.2


def test_kernels_are_told_by_the_axes_they_follow(table: CostTable) -> None:
    axes = {k.name: {axis for _, places in k.terms for axis in places} for k in table.kernels}
    assert axes == {
        "kernel of w": {("", "a", 1)},
        "kernel of u": {("", "a", 1), ("", "b", 1)},
        "kernel of t": {("", "b", 1), ("", "c", 1)},
    }
    assert max(kernel.error for kernel in table.kernels) < 0.01


def test_the_table_says_what_other_widths_take(combed: Combed, table: CostTable) -> None:
    probe = MadeUp(combed, Setting())
    gone = np.concatenate([group.channels[:32] for group in combed.groups])
    said = CostModel(combed, {"latency": table.terms(combed)}).cost("latency", KeepMask(combed.atoms, gone))
    assert said == pytest.approx(probe.profile(probe.pruned(gone))[1], rel=0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_target_by_the_table(combed: Combed, table: CostTable, policy: str) -> None:
    chosen = Chooser(Allocate(latency=0.5, policy=policy).budget, table)(combed, score(combed))
    assert chosen.latency["predicted"] == pytest.approx(0.5, abs=0.1)
    assert all((len(g) - len(r)) % 16 == 0 for g, r in zip(combed.groups, chosen.removed, strict=True))
    assert any("not measured here" in note for note in chosen.notes)


def test_the_clock_corrects_the_table(combed: Combed, table: CostTable) -> None:
    budget = Allocate(latency=0.6).budget
    assert budget.policy == "optimal"
    probe, scores = MadeUp(combed, Setting()), score(combed)
    blind, seeing = (Chooser(budget, table, watch)(combed, scores) for watch in (None, probe))
    missed = abs(probe.ratio(blind.channels(combed)) - 0.6)
    assert abs(seeing.latency["measured"] - 0.6) <= missed
    assert seeing.latency["measured"] == pytest.approx(0.6, abs=0.03)
    assert seeing.latency["measured"] == probe.ratio(seeing.channels(combed))


def test_a_target_out_of_reach(combed: Combed, table: CostTable) -> None:
    with pytest.raises(cpd.TargetError, match=r"latency=0.001 cannot be reached"):
        Chooser(Allocate(latency=0.001).budget, table)(combed, score(combed))


def test_finer_widths_where_the_fast_ones_do_not_go_that_low(combed: Combed, table: CostTable) -> None:
    least = CostModel(combed, {"latency": table.terms(combed)}).in_widths("latency")(np.asarray([[16, 16, 16]]))[0]
    chosen = Chooser(Allocate(latency=0.85 * least / table.ms).budget, table)(combed, score(combed))
    widths = [len(g) - len(r) for g, r in zip(combed.groups, chosen.removed, strict=True)]
    assert min(widths) < 16
    assert all(width % 2 == 0 for width in widths)
    assert any("finer widths" in note for note in chosen.notes)


def test_the_clock_tries_what_the_table_takes_to_be_out_of_reach(combed: Combed, table: CostTable) -> None:
    slow = replace(table, rest=0.4 * table.ms)
    probe, scores, budget = MadeUp(combed, Setting()), score(combed), Allocate(latency=0.4).budget
    with pytest.raises(cpd.TargetError, match="cannot be reached"):
        Chooser(budget, slow)(combed, scores)
    assert Chooser(budget, slow, probe)(combed, scores).latency["measured"] == pytest.approx(0.4, abs=0.04)
    with pytest.raises(cpd.TargetError, match=r"latency=0.05 cannot be reached"):
        Chooser(Allocate(latency=0.05).budget, slow, probe)(combed, scores)


def test_what_the_table_takes_to_be_fixed_is_corrected(combed: Combed, table: CostTable) -> None:
    """A kernel that no width seems to change: the first choice that is in reach takes less than predicted, so more is."""
    blind = tuple(
        replace(kernel, terms=((kernel.ms, ()),)) if kernel.name == "kernel of t" else kernel
        for kernel in table.kernels
    )
    wish = Allocate(latency=0.5, min_ratio=0.5).budget
    found = Chooser(wish, replace(table, kernels=blind), MadeUp(combed, Setting()))(combed, score(combed))
    assert found.latency["measured"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("fixed", [2.0, 5.0, 20.0])
def test_a_table_from_a_busy_machine_misses_no_target(combed: Combed, table: CostTable, fixed: float) -> None:
    """Its smallest model is said to take nearly the original's time, and takes far less: the target lies between."""
    busy = replace(table, rest=fixed * table.ms, ms=(1 + fixed) * table.ms)
    budget = Allocate(latency=0.5).budget
    found = Chooser(budget, busy, MadeUp(combed, Setting()), nearest=True)(combed, score(combed))
    assert found.latency["measured"] == pytest.approx(0.5, abs=0.03)


def test_latency_needs_a_table(combed: Combed) -> None:
    with pytest.raises(ValueError, match="cost table"):
        Chooser(Allocate(latency=0.5).budget)(combed, score(combed))


def test_tables_are_kept(tmp_path: Path, combed: Combed, table: CostTable) -> None:
    table.save(tmp_path / "table.json")
    again = load_table(tmp_path / "table.json")
    assert again == table
    assert again.terms(combed) == table.terms(combed)
    again.require(combed.folded.model)
    with pytest.raises(cpd.DataError, match="belongs to another file"):
        again.require(cpd.load(from_text(STACK, opset=18)))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "cpd-onnx/plan", "version": 1}'])
def test_what_is_no_table(tmp_path: Path, content: str) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(cpd.DataError, match=r"table\.json is no"):
        load_table(tmp_path / "table.json")


def test_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a table nothing is measured: the same file each time."""
    monkeypatch.setattr(latency, "_WATCHED_SECONDS", 0.0)
    model, table = tmp_path / "model.onnx", tmp_path / "table.json"
    cpd.load(stack()).save(model)
    assert main(plain(["latency", str(model), "-o", str(table), "--latency-batch", "4"])) == 0
    assert "fast at multiples of" in capsys.readouterr().out
    content = json.loads(table.read_text())
    assert (content["format"], content["version"], content["setting"]["batch"]) == ("cpd-onnx/latency", 1, 4)
    assert sum(kernel["ms"] for kernel in content["kernels"]) > 0  # how much, a busy machine does not tell
    for name in ("one.onnx", "two.onnx"):
        options = ["--target", "latency=0.7", "--cost-table", str(table)]
        assert main(plain(["prune", str(model), "-o", str(tmp_path / name), *options])) == 0
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    plan = json.loads((tmp_path / "one.onnx.plan.json").read_text())
    assert plan["budget"]["kind"] == "latency"
    assert plan["budget"]["policy"] == "optimal"
    assert plan["budget"]["latency"]["predicted"] == pytest.approx(0.7, abs=0.2)


def test_a_name_that_is_no_text_is_no_matter(tmp_path: Path) -> None:
    """onnxruntime takes it, so it is pruned and measured like another."""
    model = from_text(
        "(float[1, 8] x, float[8, 16] w, float[16, 4] v) => (float[1, 4] y) { [first] h = MatMul(x, w) y = MatMul(h, v) }"
    )
    content = model.SerializeToString()
    assert content.count(b"first") == 1
    (tmp_path / "odd.onnx").write_bytes(content.replace(b"first", b"f\xe4rst"))
    assert main(plain(["latency", str(tmp_path / "odd.onnx"), "-o", str(tmp_path / "table.json")])) == 0
    assert load_table(tmp_path / "table.json").groups
