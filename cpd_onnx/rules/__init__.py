"""Rules: how channels flow through each operator.

A rule is a small function that takes an `Op`, unites the atoms that the operator's arithmetic couples, and sets the
atoms of its outputs. `RULES` maps (domain, operator) to its rule; importing this package fills it.
"""

from onnx import defs

from cpd_onnx.ops.traits import operators_with
from cpd_onnx.rules import (
    attention,
    elementwise,
    experts,
    extent,
    indexing,
    linear,
    norm,
    quant,
    recurrent,
    reduce,
    sequences,
    shape,
)
from cpd_onnx.rules.api import FLOATS, RULES, Cost, GiveUp, Op, Recorder, SizeUse, Tensor, rule
from cpd_onnx.rules.reduce import POSITION_USERS

__all__ = [
    "FLOATS",
    "POSITION_USERS",
    "RULES",
    "Cost",
    "GiveUp",
    "Op",
    "Recorder",
    "SizeUse",
    "Tensor",
    "rule",
    "supported_operators",
    "unsupported_operators",
]

LATEST_OPSET = 26
"""Newest opset of the ONNX standard that the rules were written for; newer operators have no rule on purpose."""
_ENTERED = operators_with("has_bodies") | operators_with("is_constant")
"""Operators that need no rule: combing reads constants and enters subgraphs itself."""
_FAMILIES = (
    attention, elementwise, experts, extent, indexing, linear, norm, quant, recurrent, reduce, sequences, shape,
)  # fmt: skip  # a table
"""Modules whose import registers the rules."""


def supported_operators() -> list[str]:
    """Return all operators with a rule, as `Name` or `domain::Name`, sorted."""
    assert _FAMILIES
    return sorted(name if not domain else f"{domain}::{name}" for domain, name in RULES)


def unsupported_operators() -> list[str]:
    """Return the standard operators up to `LATEST_OPSET` without a rule, whose channels are frozen; sorted."""
    schemas = [s for s in defs.get_all_schemas_with_history() if not s.domain and s.since_version <= LATEST_OPSET]
    return sorted({s.name for s in schemas} - {name for domain, name in RULES if not domain} - _ENTERED)
