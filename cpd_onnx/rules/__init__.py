"""How channels flow through each operator: the only place in the project that knows operators by name.

A rule is a small function that takes an `Op`, unites the atoms that the operator's arithmetic forces to go together
and sets the atoms of its outputs. `RULES` maps (domain, operator) to its rule; importing this package fills it.
"""

from cpd_onnx.rules import attention, elementwise, linear, norm, quant, recurrent, reduce, shape
from cpd_onnx.rules.api import RULES, Cost, Demand, GiveUp, Keep, Op, Recorder, Tensor, rule
from cpd_onnx.rules.reduce import POSITION_CARRIERS, POSITION_USERS

__all__ = [
    "POSITION_CARRIERS",
    "POSITION_USERS",
    "RULES",
    "Cost",
    "Demand",
    "GiveUp",
    "Keep",
    "Op",
    "Recorder",
    "Tensor",
    "rule",
    "supported_operators",
]

_FAMILIES = (attention, elementwise, linear, norm, quant, recurrent, reduce, shape)


def supported_operators() -> list[str]:
    """All operators with a rule, as `Name` or `domain::Name`, sorted."""
    assert _FAMILIES
    return sorted(name if not domain else f"{domain}::{name}" for domain, name in RULES)
