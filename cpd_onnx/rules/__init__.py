"""How channels flow through each operator: the only place in the project that knows operators by name.

A rule is a small function that takes an `Op`, unites the atoms that the operator's arithmetic forces to go together
and sets the atoms of its outputs. `RULES` maps (domain, operator) to its rule; importing this package fills it.
"""

from onnx import defs

from cpd_onnx.ops.traits import operators_with
from cpd_onnx.rules import attention, elementwise, extent, indexing, linear, norm, quant, recurrent, reduce, shape
from cpd_onnx.rules.api import FLOATS, RULES, Cost, GiveUp, Keep, Op, Recorder, SizeUse, Tensor, rule
from cpd_onnx.rules.reduce import POSITION_USERS

__all__ = [
    "FLOATS",
    "POSITION_USERS",
    "RULES",
    "Cost",
    "GiveUp",
    "Keep",
    "Op",
    "Recorder",
    "SizeUse",
    "Tensor",
    "rule",
    "supported_operators",
    "unsupported_operators",
]

LATEST_OPSET = 26
"""The newest standard opset that was looked at; newer operators and versions have no rule on purpose."""
_ENTERED = operators_with("has_bodies") | operators_with("is_constant")
"""Combing itself knows these: it takes the value, or goes into the subgraphs."""
_FAMILIES = (attention, elementwise, extent, indexing, linear, norm, quant, recurrent, reduce, shape)


def supported_operators() -> list[str]:
    """All operators with a rule, as `Name` or `domain::Name`, sorted."""
    assert _FAMILIES
    return sorted(name if not domain else f"{domain}::{name}" for domain, name in RULES)


def unsupported_operators() -> list[str]:
    """Standard operators, up to `LATEST_OPSET`, whose channels are kept for want of a rule; sorted."""
    schemas = [s for s in defs.get_all_schemas_with_history() if not s.domain and s.since_version <= LATEST_OPSET]
    return sorted({s.name for s in schemas} - {name for domain, name in RULES if not domain} - _ENTERED)
