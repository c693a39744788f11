"""Reasons why indices are frozen."""

from __future__ import annotations

from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["interface", "no channels", "no rule", "operator", "structure"]
"""Kind of a reason: a graph input or output fixes the axis ("interface"); the axis holds no channels; the operator has
no rule; the operator needs the axis unchanged or cannot be followed ("operator"); the graph around it ("structure")."""


class Reason(str):
    """Reason why indices are frozen: a string for reports, the node followed by the text.

    Attributes:
        kind: Kind of the reason, for code that must not parse the string.
        node: Operator type and name of the node; empty if the reason concerns no single node.
        text: The sentence without the node.

    """

    __slots__ = ("kind", "node", "text")
    kind: Kind
    node: str
    text: str

    def __new__(cls, kind: Kind, node: str, text: str) -> Reason:
        """Create the reason from its kind, its node and its text."""
        reason = super().__new__(cls, f"{node} {text}" if node else text)
        reason.kind, reason.node, reason.text = kind, node, text
        return reason

    def __getnewargs__(self) -> tuple[Kind, str, str]:  # type: ignore[override]  # a string is made of one argument
        """Return the arguments of a copy."""
        return self.kind, self.node, self.text
