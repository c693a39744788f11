"""Groups that must be equally wide, because inputs or outputs of the same shape lose their channels.

A program allocates the caches of all layers alike, by one number of heads and one width, so that inputs and outputs of
the same shape keep the same shape.
"""

from __future__ import annotations

from cpd_onnx.channels.groups import Combed


def alike_groups(combed: Combed) -> list[tuple[int, ...]]:
    """Return the ids of the groups that must keep the same ratio of their channels, two or more at a time."""
    scope, (owner, _) = combed.folded.scope, combed.owners
    found: dict[tuple[object, ...], set[int]] = {}
    for name in sorted(combed.folded.model.free_io):
        tensor, value = combed.tensors.get(("", name)), scope.values[name]
        fixed = tuple(value.has_fixed(axis) and size for axis, size in enumerate(value.shape or ()))
        for place, axis in enumerate((tensor and tensor.axes) or []):
            groups = set(owner[combed.atoms.parts(axis)].ravel().tolist())
            if len(groups) == 1:
                found.setdefault((fixed, place), set()).update(groups - {-1})
    return list(dict.fromkeys(tuple(sorted(groups)) for groups in found.values() if len(groups) > 1))
