"""Channel shuffles between grouped convolutions that deal unequal numbers of channels to the next groups."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

import cpd_onnx as cpd
from cpd_onnx.channels.balanced import balanced_sets
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.free import keep_without
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.proof.files import verify_files
from cpd_onnx.proof.proving import verify
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import open_model
from cpd_onnx.scores import SCORE_FUNCTIONS, score
from cpd_onnx.testing import mask_oracle, permutation_oracle
from tests.rules.rows import assert_followed
from tests.support.models import from_text

HEAD = "(float[2, 3, 6, 6] x, float[12, 3, 1, 1] w, float[15, 4, 1, 1] u, float[15] b, int64[5] p, int64[4] q"
STEM = "h = Conv(x, w) k = Conv <group = 3>(h, u, b) r = Relu(k)"
SHUFFLE = "d = Reshape(r, p) t = Transpose <perm = [0, 2, 1, 3, 4]>(d) s = Reshape(t, q)"
SIZES = {"p": [2, 3, 5, 6, 6], "q": [2, 15, 6, 6]}
CONV = "y = Conv(e, v) }"
KERNEL = "float[12, 5, 1, 1] g, float[5, 12, 1, 1] v"

# name, opset, graph, what is coupled, values of constants
FOLLOWED: list[tuple[str, int, str, list[str], dict[str, Any]]] = [
    (
        "shuffle of uneven groups", 17,
        f"{HEAD}, {KERNEL}) => (float[2, 5, 6, 6] y) {{ {STEM} {SHUFFLE} e = Conv <group = 3>(s, g) {CONV}",
        ["2: b.0 g.1 u.0", "4: g.0 v.1", "4: u.1 w.0"], SIZES,
    ),
    (
        "shuffle before a depthwise convolution", 17,
        f"{HEAD}, float[15, 1, 3, 3] c, {KERNEL}) => (float[2, 5, 6, 6] y) "
        f"{{ {STEM} {SHUFFLE} n = Conv <group = 15, pads = [1, 1, 1, 1]>(s, c) e = Conv <group = 3>(n, g) {CONV}",
        ["2: b.0 c.0 g.1 u.0", "4: g.0 v.1", "4: u.1 w.0"], SIZES,
    ),
    (
        "shuffle in a residual block", 17,
        f"{HEAD}, {KERNEL}) => (float[2, 5, 6, 6] y) "
        f"{{ {STEM} {SHUFFLE} m = Conv <group = 3>(s, g) e = Add(m, h) {CONV}",
        ["2: b.0 g.1 u.0", "4: g.0 u.1 v.1 w.0"], SIZES,
    ),
    (
        "sum of a shuffled tensor", 17,
        f"{HEAD}, float[15, 5, 1, 1] o, {KERNEL}) => (float[2, 5, 6, 6] y) "
        f"{{ {STEM} {SHUFFLE} n = Conv <group = 3>(s, o) a = Add(n, s) e = Conv <group = 3>(a, g) {CONV}",
        ["2: b.0 g.1 o.0 o.1 u.0", "4: g.0 v.1", "4: u.1 w.0"], SIZES,
    ),
    (
        "shuffle before a concatenation", 17,
        f"{HEAD.replace('[12, 3', '[15, 3').replace('[15, 4', '[15, 5')}, float[12, 10, 1, 1] g, float[5, 12, 1, 1] v) "
        f"=> (float[2, 5, 6, 6] y) {{ {STEM} {SHUFFLE} a = Concat <axis = 1>(s, h) e = Conv <group = 3>(a, g) {CONV}",
        ["2: b.0 g.1 u.0 u.1 w.0", "4: g.0 v.1"], SIZES,
    ),
    (
        "shuffle before a transposed convolution", 17,
        f"{HEAD}, float[15, 4, 1, 1] g, float[5, 12, 1, 1] v) => (float[2, 5, 6, 6] y) "
        f"{{ {STEM} {SHUFFLE} e = ConvTranspose <group = 3>(s, g) {CONV}",
        ["2: b.0 g.0 u.0", "4: g.1 v.1", "4: u.1 w.0"], SIZES,
    ),
    (
        "shuffle before dequantised weights", 17,
        f"{HEAD}, int8[12, 5, 1, 1] g, float[12] z, float[5, 12, 1, 1] v) => (float[2, 5, 6, 6] y) "
        f"{{ {STEM} {SHUFFLE} f = DequantizeLinear <axis = 0>(g, z) e = Conv <group = 3>(s, f) {CONV}",
        ["2: b.0 u.0", "4: u.1 w.0", "4: v.1 z.0"], SIZES,
    ),
]  # fmt: skip  # a table
NAMES = [row[0] for row in FOLLOWED]


def shuffled(groups: int, each: int, *, seed: int = 0) -> ModelProto:
    """Return a model with a shuffle of so many channels of each of so many groups, between grouped convolutions."""
    inner, wide = groups * each, groups * 4
    graph = (
        f"(float[2, 3, 4, 4] x, float[{wide}, 3, 1, 1] w, float[{inner}, 4, 1, 1] u, float[{inner}] b, int64[5] p, "
        f"int64[4] q, float[{inner}, 1, 3, 3] c, float[{wide}, {each}, 1, 1] g, float[5, {wide}, 1, 1] v) "
        f"=> (float[2, 5, 4, 4] y) {{ h = Conv(x, w) k = Conv <group = {groups}>(h, u, b) r = Relu(k) d = Reshape(r, p) "
        f"t = Transpose <perm = [0, 2, 1, 3, 4]>(d) s = Reshape(t, q) "
        f"n = Conv <group = {inner}, pads = [1, 1, 1, 1]>(s, c) e = Conv <group = {groups}>(n, g) y = Conv(e, v) }}"
    )
    return from_text(graph, values={"p": [2, groups, each, 4, 4], "q": [2, inner, 4, 4]})


@pytest.mark.parametrize("name", NAMES)
def test_the_channels_of_uneven_shuffles_are_followed(name: str) -> None:
    assert_followed(FOLLOWED[NAMES.index(name)])


@pytest.mark.parametrize(("groups", "each"), [(2, 5), (2, 7), (3, 5), (3, 7), (3, 10), (4, 6), (4, 7), (4, 10)])
def test_whichever_sets_are_removed_all_groups_stay_equal(groups: int, each: int) -> None:
    combed = comb(shuffled(groups, each))
    inner = next(group for group in combed.groups if any(m.weight.name == "c" for m in combed.members(group)))
    assert len(inner) >= each // groups
    counts = set()
    for number in range(1, 2 ** min(len(inner), 4) - 1):
        gone = [place for place in range(len(inner)) if number >> place & 1]
        if len(gone) == len(inner):
            continue
        keep = keep_without(combed, [gone if group is inner else [] for group in combed.groups])
        pruned = rewrite(combed, keep).model
        assert verify(combed, keep, pruned).passed
        rows, columns = (pruned.array(name).shape for name in ("u", "g"))
        assert rows[0] == groups * columns[1]
        counts.add(columns[1])
    assert len(counts) > 1 or len(inner) < 3


def test_fifteen_channels_of_three_groups_become_nine_or_six() -> None:
    combed = comb(shuffled(3, 5))
    group = next(group for group in combed.groups if len(group) == 2)
    rows = {m.weight.name: m.indices for m in combed.members(group) if m.axis == 0}
    assert rows["u"] == [[0, 2, 4, 5, 7, 9, 10, 12, 14], [1, 3, 6, 8, 11, 13]]
    columns = [(m.rows, m.indices) for m in combed.members(group) if m.weight.name == "g"]
    assert columns == [
        (slice(0, 4), [[0, 1, 2], [3, 4]]),
        (slice(4, 8), [[1, 2, 3], [0, 4]]),
        (slice(8, 12), [[2, 3, 4], [0, 1]]),
    ]


def test_a_shuffle_with_a_single_balanced_set_stays() -> None:
    """The channels at 4 places of 3 groups are dealt as (3, 0, 0), (1, 2, 0), (0, 2, 1) and (0, 0, 3)."""
    frozen = comb(shuffled(3, 4)).frozen()
    assert {reason for each in frozen if each.tensor == "c" and not each.axis for reason in each.reasons} == {
        "can only be removed as a whole"
    }


@pytest.mark.parametrize(("groups", "each"), list(itertools.product((2, 3, 4), range(4, 20))))
def test_as_many_sets_are_found_as_can_be(groups: int, each: int) -> None:
    """No set has fewer places of a group than there are groups, except where a place alone is dealt evenly."""
    dealt = np.zeros((each, groups), np.int64)
    for place, group in itertools.product(range(each), range(groups)):
        dealt[place, (place * groups + group) // each] += 1
    sets = balanced_sets(groups * dealt - dealt.sum(axis=1, keepdims=True))
    assert len(sets) >= each // groups
    assert sorted(place for one in sets for place in one) == list(range(each))
    assert all(len(set(dealt[one].sum(axis=0).tolist())) == 1 for one in sets)


def test_vectors_that_cannot_be_balanced_belong_to_no_set() -> None:
    assert balanced_sets(np.asarray([[1, -1], [2, -2], [0, 0]])) == [[2]]


@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_groups_are_not_permuted(seed: int) -> None:
    """An index between two convolutions with the same groups is removed with a group of either, in this order."""
    graph = (
        "(float[2, 3, 4, 4] x, float[12, 3, 1, 1] w, float[18, 4, 1, 1] u, int64[5] p, int64[4] q, "
        "float[12, 6, 1, 1] g, float[5, 12, 1, 1] v) => (float[2, 5, 4, 4] y) "
        "{ h = Conv(x, w) k = Conv <group = 3>(h, u) r = Relu(k) d = Reshape(r, p) "
        "t = Transpose <perm = [0, 2, 1, 3, 4]>(d) s = Reshape(t, q) m = Conv <group = 3>(s, g) e = Add(m, h) "
        "y = Conv(e, v) }"
    )
    model = from_text(graph, values={"p": [2, 3, 6, 4, 4], "q": [2, 18, 4, 4]})
    assert any(group.kind == "groups" for group in comb(model).groups)
    assert permutation_oracle(model, seed=seed).passed
    assert mask_oracle(model, seed=seed).passed


def test_every_score_ranks_the_sets() -> None:
    data = ArraySource({"x": np.random.default_rng(0).standard_normal((16, 3, 4, 4)).astype(np.float32)})
    combed = comb(shuffled(3, 10))
    index = next(group.id for group in combed.groups if len(group) == 3)
    for kind in SCORE_FUNCTIONS:
        values = score(combed, kind, data=data, samples=8)[index]
        assert np.isfinite(values).all(), kind
        assert len(set(values.tolist())) == 3, kind


def test_magnitudes_are_those_of_the_columns_of_each_group() -> None:
    model = shuffled(3, 5)
    combed = comb(model)
    index, group = next((i, group) for i, group in enumerate(combed.groups) if len(group) == 2)
    arrays = {i.name: combed.folded.model.array(i.name) for i in combed.folded.model.graph.initializer}
    wanted = np.zeros(2)
    for member in combed.members(group):
        values = np.moveaxis(np.abs(arrays[member.weight.name])[member.rows], member.axis, 0)
        if not member.weight.is_vector:
            wanted += [values[places].sum() for places in member.indices]
    assert np.allclose(score(combed, "l1")[index], wanted)


def test_the_reconstruction_error_is_that_of_a_fit_in_each_group() -> None:
    model = shuffled(3, 5)
    combed = comb(model)
    data = np.random.default_rng(0).standard_normal((64, 3, 4, 4)).astype(np.float32)
    index, group = next((i, group) for i, group in enumerate(combed.groups) if len(group) == 2)
    found = score(combed, "reconstruction", data=ArraySource({"x": data}), samples=64)[index]
    model.graph.output.append(helper.make_tensor_value_info("n", TensorProto.FLOAT, None))
    session = open_model(model)
    channels = np.concatenate([session.run(["n"], {"x": x})[0] for x in data.reshape(32, 2, 3, 4, 4)])
    rows = np.moveaxis(channels, 1, -1).reshape(-1, 3, 5).astype(np.float64)
    kernel = combed.folded.model.array("g").reshape(3, 4, 5)
    made = np.einsum("ngi,goi->ngo", rows, kernel)
    lost = np.zeros(2)
    for member in (m for m in combed.members(group) if m.weight.name == "g"):
        number = member.rows.start // 4
        x, y = (each[:, number] - each[:, number].mean(axis=0) for each in (rows, made))
        for place, gone in enumerate(member.indices):
            left = np.delete(x, gone, axis=1)
            lost[place] += np.square(y - left @ np.linalg.lstsq(left, y, rcond=None)[0]).sum()
    least = int(np.argmin(lost))
    assert least == int(np.argmin(found))
    assert -np.log(1 - lost[least] / (made.var() * made.size)) == pytest.approx(found[least], rel=0.05)


def test_a_shuffled_model_is_pruned_repaired_and_proved_by_its_plan(tmp_path: Path) -> None:
    source, small = tmp_path / "model.onnx", tmp_path / "small.onnx"
    cpd.load(shuffled(3, 10)).save(source)
    data = ArraySource({"x": np.random.default_rng(0).standard_normal((64, 3, 4, 4)).astype(np.float32)})
    state = cpd.run("comb, score{kind='wanda'}, allocate{channels=0.5}, prune, verify, repair", source, data=data)
    assert state.verification is not None
    assert state.verification.passed
    state.save(small)
    assert state.plan is not None
    content = state.plan.content
    schema = Path(cpd.__file__).parent / "rewrite" / "plan.schema.json"
    jsonschema.validate(content, json.loads(schema.read_text()))
    assert [len(columns) for columns in content["removed"]["g"]["1"]] == [6, 6, 6]
    assert {tuple(m["rows"]) for g in content["groups"] for m in g["members"] if "rows" in m} == {
        (0, 4),
        (4, 8),
        (8, 12),
    }
    assert verify_files(cpd.load(source), cpd.load(small), state.plan).comparison.passed


def test_dead_channels_of_a_shuffle_are_found_and_no_others() -> None:
    """A channel is read by the columns of its own group, not by those at the same place of another."""
    model = shuffled(3, 5)
    combed = comb(model)
    kernel = next(i for i in model.graph.initializer if i.name == "g")
    array = np.frombuffer(kernel.raw_data, np.float32).reshape(12, 5, 1, 1).copy()
    array[:, :3] = 0  # the columns of the first set in the first group alone
    kernel.raw_data = array.tobytes()
    state = cpd.run("comb, lossless", cpd.load(model))
    assert state.combed is not None
    assert state.allocation is not None
    group = next(index for index, each in enumerate(combed.groups) if len(each) == 2)
    assert state.allocation.removed[group] == []
