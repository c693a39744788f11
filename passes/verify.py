"""Verify: prove that the pruned model computes what the original with the removed channels masked computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cpd_onnx.pipeline.state import State
from cpd_onnx.proof.files import data_feeds, verify_files
from cpd_onnx.proof.proving import proved, verify


@dataclass(frozen=True)
class Verify:
    """Prove that the pruned model computes what the masked original computes.

    If weights were refitted or trained since, the proof is of the plan applied to the original; the model may differ
    from that only in the weights that the plan names. The inputs are `batches` batches of the data, or random inputs
    without data. `allow_inconclusive` accepts a model that these inputs prove neither right nor wrong.
    """

    batches: int = 2
    allow_inconclusive: bool = False
    name: ClassVar[str] = "verify"
    requires: ClassVar[tuple[str, ...]] = ("combed", "allocation", "plan")
    provides: ClassVar[tuple[str, ...]] = ("verification",)

    def __call__(self, state: State) -> State:
        """Fill in `verification`; raises ProofError if the model is wrong, InconclusiveError if nothing is shown."""
        combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
        feeds = None if state.data is None else data_feeds(state.original, state.data, self.batches)
        if state.repaired is not None or state.distilled is not None:
            plan = state.need("plan", "prune")
            checked = verify_files(state.original, state.model, plan, feeds, allow_inconclusive=self.allow_inconclusive)
            return replace(state, verification=checked.comparison)
        found = verify(combed, chosen.keep_mask(combed), state.model, feeds)
        return replace(state, verification=proved(found, allow_inconclusive=self.allow_inconclusive))
