"""Checks of rows that say what an operator couples, or why its channels stay."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto

from cpd_onnx.channels.combing import comb
from cpd_onnx.testing import mask_oracle, permutation_oracle, widen_oracle
from tests.rules.test_rules import signature
from tests.support.models import from_text

Row = tuple[str, int, str, Any, dict[str, Any]]
"""Name, opset, graph, what is expected, values of constants."""


def built(row: Row) -> ModelProto:
    """Return the model of a row."""
    _, opset, graph, _, values = row
    return from_text(graph, opset=opset, values=values)


def assert_followed(row: Row) -> None:
    """Assert that the channels of a row are coupled as expected, and that the oracles agree."""
    model = built(row)
    combed = comb(model)
    assert signature(combed) == row[3]
    assert combed.unaccounted == []
    for outcome in (mask_oracle(model), permutation_oracle(model), widen_oracle(model)):
        assert outcome.passed
        assert outcome.groups > 0


def assert_held(row: Row) -> None:
    """Assert that the channels of a row stay, for the expected reason."""
    combed = comb(built(row))
    reasons = " ".join(reason for frozen in combed.frozen() for reason in frozen.reasons)
    assert combed.groups == []
    assert combed.unaccounted == []
    assert row[3] in reasons
