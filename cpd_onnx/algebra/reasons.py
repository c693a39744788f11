"""Why indices are never deleted."""

from __future__ import annotations

from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["interface", "no channels", "no rule", "operator", "structure"]
"""What a reason is about: the model's inputs and outputs fix the axis; it holds no channels; nothing is known of the
operator; the operator needs the axis as it is, or cannot be followed; or what the graph as a whole looks like."""


class Reason(str):
    """Why indices are never deleted, in words for reports; its kind and its node are not to be read out of the words.

    Attributes:
        kind: what it is about.
        node: operator and name of the node that it is about; empty where it is about none.
        text: what of it; the reason as a string is the node and the text.

    """

    __slots__ = ("kind", "node", "text")
    kind: Kind
    node: str
    text: str

    def __new__(cls, kind: Kind, node: str, text: str) -> Reason:
        """Put the words together."""
        made = super().__new__(cls, f"{node} {text}" if node else text)
        made.kind, made.node, made.text = kind, node, text
        return made

    def __getnewargs__(self) -> tuple[Kind, str, str]:  # type: ignore[override]  # a string is made of one argument
        """What makes a copy."""
        return self.kind, self.node, self.text
