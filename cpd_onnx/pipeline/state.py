"""The state that passes exchange."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpd_onnx.ir.model import Model
from cpd_onnx.summary import Summarised, Summary, count

if TYPE_CHECKING:
    from cpd_onnx.budget.allocation import Allocation, LossCurves
    from cpd_onnx.channels.groups import Combed
    from cpd_onnx.data.sources import Source
    from cpd_onnx.proof.comparison import Comparison
    from cpd_onnx.rewrite.plan import Plan
    from cpd_onnx.rewrite.pruned import Edit
    from cpd_onnx.shapes.values import Folded


@dataclass(frozen=True, repr=False)
class State(Summarised):
    """State of a model in a pipeline; each pass returns a new state with more attributes set.

    Attributes:
        model: The model after the passes so far.
        original: The model as it was read.
        input_shapes: Sizes of dynamic input axes, by name of the input, for the passes that fold; afterwards those of
            `folded` apply.
        data: Source of samples, if there is one.
        converted: Returns the form in which a model is deployed, whose latency counts; None for the model itself.
        folded: Inferred shapes and values of shape arithmetic.
        combed: Coupled channels of `original`.
        score: Name of the score, and its seed.
        scores: Scores of the channels, one array per group.
        curves: Measured loss curves; None means those that the scores imply.
        budget: The budget as the entries of a plan.
        allocation: The channels to remove.
        edits: Differences between the original and the pruned model.
        plan: Record of the removal.
        verification: Result of the proof.
        repaired: Summary of the repair, if there was one.
        distilled: Summary of the training, if there was one.

    """

    model: Model
    original: Model
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    data: Source | None = None
    converted: Callable[[Model], Model] | None = None
    folded: Folded | None = None
    combed: Combed | None = None
    score: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[Any] | None = None
    curves: LossCurves | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)
    allocation: Allocation | None = None
    edits: tuple[Edit, ...] = ()
    plan: Plan | None = None
    verification: Comparison | None = None
    repaired: Mapping[str, Any] | None = None
    distilled: Mapping[str, Any] | None = None

    def need(self, attribute: str, maker: str) -> Any:
        """Return an attribute that an earlier pass fills in; raises ValueError, which names the pass, if it is None."""
        value = getattr(self, attribute)
        if value is None:
            raise ValueError(f"run the pass {maker!r} first: it makes {attribute!r}")
        return value

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the current model; raises ModelError if the file exists and `overwrite` is not set."""
        self.model.save(path, overwrite=overwrite)

    def summary(self) -> Summary:
        """Return the results of the passes so far as a table."""
        values = {"model": str(self.original.path or self.original.graph.name)}
        if self.combed is not None:
            values["groups"] = str(len(self.combed.groups))
        if self.allocation is not None:
            before, after = self.allocation.before, self.allocation.after
            values["MACs"] = f"{count(before.macs)} -> {count(after.macs)}"
            values["parameters"] = f"{count(before.params)} -> {count(after.params)}"
        if self.plan is not None:
            values["edits"] = str(len(self.edits))
            values["proof"] = "not verified" if self.verification is None else self.verification.verdict
        if self.repaired is not None:
            values["repair"] = f"{len(self.repaired['fitted'])} weights fitted to the original"
        if self.distilled is not None:
            values["training"] = f"{self.distilled['steps']} steps"
        return Summary.of(values)
