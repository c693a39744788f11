"""Prune: rewrite the model without the allocated channels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar

from cpd_onnx.budget.allocation import Allocation
from cpd_onnx.channels.groups import Combed
from cpd_onnx.ir.model import ModelSource
from cpd_onnx.pipeline.state import State
from cpd_onnx.rewrite.plan import Plan, make_plan, planned
from cpd_onnx.rewrite.pruned import Pruned
from cpd_onnx.rewrite.rewriter import rewrite


def prune(combed: Combed, allocation: Allocation) -> Pruned:
    """Return the model without the allocated channels; nothing else in it changes.

    Raises ProofError if the shapes of the result are not those that the channels imply, which is an internal error.
    """
    return rewrite(combed, allocation.keep_mask(combed))


def apply(source: ModelSource, plan: Plan) -> Pruned:
    """Return the model pruned as in a plan; raises PlanError if the plan was made for another model."""
    pruned = rewrite(*planned(source, plan))
    plan.stamp(pruned.model)
    return pruned


@dataclass(frozen=True)
class Prune:
    """Rewrite the model without the allocated channels."""

    name: ClassVar[str] = "prune"
    requires: ClassVar[tuple[str, ...]] = ("combed", "allocation")
    provides: ClassVar[tuple[str, ...]] = ("edits", "plan")

    def __call__(self, state: State) -> State:
        """Fill in `edits` and `plan`; `model` becomes the pruned one."""
        combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
        with ThreadPoolExecutor(1) as pool:
            if combed.folded.original.path is not None:
                pool.submit(combed.folded.original.sha256)  # the plan needs it; hashing releases the GIL
            pruned = prune(combed, chosen)
        plan = make_plan(combed, chosen.removed, budget=state.budget, before=chosen.before, after=chosen.after)
        plan.stamp(pruned.model)
        return replace(state, model=pruned.model, edits=pruned.edits, plan=plan)
