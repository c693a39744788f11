"""Prune: rewrite the model without the channels that were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpd_onnx.groups import Combed
from cpd_onnx.kept import Kept
from cpd_onnx.passes.allocate import Allocation
from cpd_onnx.rewrite import Pruned, rewrite


def prune(combed: Combed, allocation: Allocation, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Pruned:
    """The model without the allocated channels; nothing else in it changes.

    Raises ProofError if the result's shapes are not what the channels say (a defect that is ours).
    """
    kept = Kept(combed.atoms)
    kept.remove(allocation.channels(combed))
    return rewrite(combed, kept, input_shapes)
