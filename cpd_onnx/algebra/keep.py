"""What stays once it is decided which channels go."""

from __future__ import annotations

import numpy as np

from cpd_onnx.algebra.atoms import Atoms, Axis, Fingerprint, Mask, fingerprint, is_uniform


class Kept:
    """Keep-masks of axes, given the primitive atoms that go.

    Each axis is looked up once. Do not write into the masks.
    """

    def __init__(self, atoms: Atoms, gone: Axis | None = None) -> None:
        """Take the primitive atoms that go; without any, everything stays."""
        self._atoms = atoms
        self._gone: Mask = np.zeros(len(atoms), np.bool_)
        if gone is not None:
            self._gone[gone] = True
        self._masks: dict[Fingerprint, Mask] = {}

    def stays(self, parts: Axis) -> Mask:
        """True where an index stays that is deleted by the primitives in its row of `parts`."""
        if parts.shape[1] == 1:
            return np.asarray(~self._gone[parts[:, 0]])
        return np.asarray(~self._gone[parts].any(axis=1))

    def mask(self, axis: Axis) -> Mask:
        """True where the index stays."""
        key = fingerprint(axis)
        if key not in self._masks:
            parts = self._atoms.parts(axis)
            mask = self.stays(parts[:1] if is_uniform(axis) else parts)
            self._masks[key] = np.broadcast_to(mask, len(axis))
        return self._masks[key]

    def count(self, axis: Axis) -> int:
        """Number of indices that stay."""
        return int(np.count_nonzero(self.mask(axis)))

    def touches(self, axis: Axis) -> bool:
        """Whether some index goes."""
        return self.count(axis) < len(axis)
