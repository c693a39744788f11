"""An axis is identified by its atoms: rules that copy axis arrays give the same result as rules that do not."""

from __future__ import annotations

import numpy as np
import pytest

from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.rules import RULES, Op, Tensor
from cpd_onnx.rules.api import Rule
from cpd_onnx.testing import mask_oracle, permutation_oracle, widen_oracle
from tests.rules.test_rules import NAMES, TABLE, model_of


def copied(tensor: Tensor) -> Tensor:
    axes = tensor.axes and [np.array(axis) for axis in tensor.axes]
    return Tensor(tensor.value, axes, tensor.elements and [copied(each) for each in tensor.elements])


def on_copies(rule: Rule) -> Rule:
    """Return a rule that reads and sets copies of the axis arrays."""

    def copying(op: Op) -> None:
        op.inputs = [tensor and copied(tensor) for tensor in op.inputs]
        rule(op)
        for tensor in op.outputs:
            copy = copied(tensor)
            tensor.axes, tensor.elements = copy.axes, copy.elements

    return copying


def product_of_copies(op: Op) -> None:
    """A matrix product as one would write it who knows nothing of who holds which array."""
    a, b = op.input(0), op.input(1)
    op.unite(np.array(a[-1]), np.array(b[-2]))
    op.multiply_and_sum((a, -1), (b, -2))
    out = [*map(np.array, (a.axes or [])[:-1]), np.array(b[-1])]
    op.set(out)
    op.cost(1.0, *out, np.array(a[-1]))


def summary_of(combed: Combed) -> list[object]:
    """All that a user sees of the channels."""
    members = [(m.weight.name, m.axis, m.indices) for group in combed.groups for m in combed.members(group)]
    return [[(g.name, g.kind, len(g)) for g in combed.groups], members, combed.frozen(), combed.unaccounted]


@pytest.fixture
def copying_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, rule in list(RULES.items()):
        monkeypatch.setitem(RULES, key, on_copies(rule))


def test_a_product_of_copies_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("layer norm")
    wanted = summary_of(comb(model))
    monkeypatch.setitem(RULES, ("", "MatMul"), product_of_copies)
    assert summary_of(comb(model)) == wanted
    for outcome in (mask_oracle(model), permutation_oracle(model), widen_oracle(model)):
        assert outcome.passed
        assert outcome.groups > 0


@pytest.mark.parametrize("name", NAMES)
def test_copies_change_nothing(name: str, request: pytest.FixtureRequest) -> None:
    model = model_of(name)
    wanted = summary_of(comb(model))
    request.getfixturevalue("copying_rules")
    assert summary_of(comb(model)) == wanted


@pytest.mark.usefixtures("copying_rules")
@pytest.mark.parametrize("name", [n for n in NAMES if TABLE[NAMES.index(n)][3] and n != "broadcast old"])
def test_what_is_pruned_on_copies_is_proven(name: str) -> None:  # onnxruntime has no Add of opset 6
    outcome = mask_oracle(model_of(name))
    assert outcome.passed
    assert outcome.groups > 0
