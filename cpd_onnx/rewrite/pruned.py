"""A pruned model, and how it differs from the original."""

from __future__ import annotations

from dataclasses import dataclass

from cpd_onnx.ir.model import Model


@dataclass(frozen=True)
class Edit:
    """One difference between the original and the pruned file.

    Attributes:
        what: Kind of the edit: "weight", "copy" (a constant whose uses need different versions), "operand",
            "attribute", "shape" (a value_info, or the graph input of an initializer), "evaluated" (a weight that the
            graph computed from others, now an initializer), "constant" (what is left of a branch, now an initializer)
            or "gone" (a node or tensor that is not used any more).
        where: Name of the tensor, or node and slot.
        change: Description of the change, for reports.

    """

    what: str
    where: str
    change: str


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned model.

    Attributes:
        model: The model.
        edits: All differences from the original.

    """

    model: Model
    edits: tuple[Edit, ...]

    def __repr__(self) -> str:
        """Return the model and the number of edits."""
        return f"Pruned({self.model!r}, {len(self.edits)} edits)"
