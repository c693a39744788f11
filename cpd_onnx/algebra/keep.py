"""Which indices survive once it is decided which channels are removed."""

from __future__ import annotations

import numpy as np

from cpd_onnx.algebra.atoms import Atoms, Axis, Fingerprint, Mask, fingerprint, is_uniform


class KeepMask:
    """Keep masks of axes for a set of removed primitive atoms.

    The mask of each axis is computed once and shared: do not write into it.
    """

    def __init__(self, atoms: Atoms, removed: Axis | None = None) -> None:
        """Take the primitive atoms that are removed; without any, every index survives."""
        self._atoms = atoms
        self._removed: Mask = np.zeros(len(atoms), np.bool_)
        if removed is not None:
            self._removed[removed] = True
        self._masks: dict[Fingerprint, Mask] = {}

    def surviving(self, parts: Axis) -> Mask:
        """Return which rows of `parts` (primitive atoms, as `Atoms.parts` gives them) hold no removed atom."""
        if parts.shape[1] == 1:
            return np.asarray(~self._removed[parts[:, 0]])
        return np.asarray(~self._removed[parts].any(axis=1))

    def mask(self, axis: Axis) -> Mask:
        """Return a mask over the indices of an axis, true where the index survives."""
        key = fingerprint(axis)
        if key not in self._masks:
            parts = self._atoms.parts(axis)
            mask = self.surviving(parts[:1] if is_uniform(axis) else parts)
            self._masks[key] = np.broadcast_to(mask, len(axis))
        return self._masks[key]

    def count(self, axis: Axis) -> int:
        """Return the number of indices of an axis that survive."""
        return int(np.count_nonzero(self.mask(axis)))

    def shrinks(self, axis: Axis) -> bool:
        """Return whether any index of an axis is removed."""
        return self.count(axis) < len(axis)
