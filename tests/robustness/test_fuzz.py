"""Random graphs and random damage, a short run of each; `benchmarks/robustness/fuzz.py` has the long one."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import ModelProto

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.ir.model import load
from cpd_onnx.rules import RULES
from cpd_onnx.testing import depth_oracle, mask_oracle, permutation_oracle
from tests.support.commands import command_outcome
from tests.support.damage import damaged
from tests.support.graphs import freed, models, newer, seeded
from tests.support.models import from_text

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def is_right(model: ModelProto, seed: int = 0) -> bool:
    """Whether a valid model is not pruned wrong; where nothing can go, there is nothing to be wrong."""
    onnx.checker.check_model(model, full_check=True)
    for oracle, source in ((mask_oracle, model), (permutation_oracle, model), (mask_oracle, freed(model, seed))):
        try:
            if oracle(source, seed=seed).verdict == "wrong":
                return False
        except cpd.TargetError:
            continue
    return True


@settings(max_examples=25, deadline=None, suppress_health_check=SLOW, derandomize=True)
@given(models())
def test_drawn_graphs(model: ModelProto) -> None:
    assert is_right(model)


@pytest.mark.parametrize("start", range(0, 80, 20))
def test_seeded_graphs(start: int) -> None:
    assert [seed for seed in range(start, start + 20) if not is_right(seeded(seed), seed)] == []


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_graphs_of_newer_operators(start: int) -> None:
    assert [seed for seed in range(start, start + 20) if not is_right(newer(seed), seed)] == []


@pytest.mark.parametrize("seed", [1701, 1971, 3807, 4735])
def test_branches_go_where_inputs_and_outputs_may_lose_channels(seed: int) -> None:
    """Random numbers and tensors that are gone are not compared, and a count may be open again without its reader."""
    for source in (seeded(seed), freed(seeded(seed), seed)):
        assert depth_oracle(source, seed=seed).verdict != "wrong"


def test_many_graphs_have_groups_that_reach_inputs_and_outputs() -> None:
    counts = [
        [len(comb(model).groups) for model in (load(seeded(seed)), freed(seeded(seed), seed))] for seed in range(20)
    ]
    assert sum(free > fixed for fixed, free in counts) >= 10


@pytest.mark.parametrize("seed", [2604, 4051])
def test_channels_that_do_not_stand_alike_do_not_change_places(seed: int) -> None:
    """Padding fills up some of their places; of some the first is picked, of others the second."""
    assert is_right(seeded(seed, is_common=True), seed)


def test_ranges_that_are_computed_do_not_stop_the_oracles() -> None:
    end = "m = ReduceMax <keepdims = 1>(x) i = Cast <to = 7>(m) q = Mul(i, i) p = Add(q, one) end = Reshape(p, one)"
    text = (
        "(float[2, 4] x, float[4, 5] u, float[5, 6] w, float[6, 3] v) => (float[rows, 3] y) "
        f"{{ zero = Constant <value = int64[1] {{0}}>() one = Constant <value = int64[1] {{1}}>() {end} "
        f"g = MatMul(x, u) h = MatMul(g, w) s = Slice(h, zero, end, zero) y = MatMul(s, v) }}"
    )
    assert is_right(from_text(text))


def test_every_operator_with_a_rule_is_in_some_graph() -> None:
    """But for those that neither onnx's checker nor onnxruntime's CPU kernels take."""
    found: set[tuple[str, str]] = set()
    todo = [*(seeded(seed).graph for seed in range(1500)), *(newer(seed).graph for seed in range(700))]
    while todo:
        for node in todo.pop().node:
            found.add((node.domain, node.op_type))
            todo += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    missing = {("", "SimplifiedLayerNormalization"), ("", "Swish"), ("com.microsoft", "GroupNorm")}
    missing |= {("com.microsoft", "GatherBlockQuantized"), ("", "Det")}  # in test_rare_operands.py, in test_rules.py
    missing |= {("com.microsoft", "Inverse")}  # of random matrices it is not exact; in test_contrib.py
    missing |= {(domain, name) for domain, name in RULES if domain in ("onnx.brevitas", "qonnx.custom_op.general")}
    assert set(RULES) - found == missing


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_damaged_files(start: int, tmp_path: Path) -> None:
    """Each is refused with one line, or pruned and proved."""
    path, outcomes = tmp_path / "model.onnx", []
    for seed in range(start, start + 50):
        path.write_bytes(damaged(seeded(seed % 80).SerializeToString(), random.Random(seed)))
        try:
            cpd.run("comb, score, allocate, prune, verify", path)
        except cpd.CpdError as error:
            outcomes.append(str(error))
    assert 5 < len(outcomes) < 50
    assert not [line for line in outcomes if "error: internal error" in line]


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_damaged_files_in_all_commands(start: int, tmp_path: Path) -> None:
    """Each command succeeds, or says in one line what is wrong, and leaves nothing."""
    outcomes = [command_outcome(seeded(s).SerializeToString(), s, tmp_path) for s in range(start, start + 20)]
    assert [outcome for outcome in outcomes if outcome not in ("done", "refused")] == []
    assert set(outcomes) == {"done", "refused"}
