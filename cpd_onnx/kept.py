"""What stays once it is decided which channels go."""

from __future__ import annotations

import numpy as np

from cpd_onnx.atoms import Atoms, Axis, Mask


class Kept:
    """Keep-masks of axes, given the primitive atoms that go.

    Axes that are one array are looked up once; the channels that go may be changed with `remove`.
    """

    def __init__(self, atoms: Atoms) -> None:
        """Start with all channels kept."""
        self._atoms = atoms
        self._gone: Mask = np.zeros(len(atoms), np.bool_)
        self._parts: dict[int, tuple[Axis, Axis]] = {}

    def remove(self, channels: Axis) -> None:
        """Say which primitives go; replaces what was said before."""
        self._gone[:] = False
        self._gone[channels] = True

    def mask(self, axis: Axis) -> Mask:
        """True where the index stays."""
        known = self._parts.get(id(axis))
        if known is None:
            known = self._parts[id(axis)] = (axis, self._atoms.parts(axis))
        parts = known[1]
        if parts.shape[1] == 1:
            return np.asarray(~self._gone[parts[:, 0]])
        return np.asarray(~self._gone[parts].any(axis=1))

    def count(self, axis: Axis) -> int:
        """Number of indices that stay."""
        return int(self.mask(axis).sum())

    def touches(self, axis: Axis) -> bool:
        """Whether some index goes."""
        return not bool(self.mask(axis).all())
