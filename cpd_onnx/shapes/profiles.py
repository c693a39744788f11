"""Numbers that open sizes of inputs are bound to, by what an input seems to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cpd_onnx.shapes.values import Numbers


@dataclass(frozen=True)
class Profile:
    """Numbers for batch, sequence-like, image-like dimensions and samples of sound.

    Each has a row for the first symbol of its kind, one for the second and so on; the last row is for all that follow.
    """

    batch: Sequence[Numbers]
    sequence: Sequence[Numbers]
    image: Sequence[Numbers]
    sound: Sequence[Numbers] = ((1792, 2816, 3328),)

    @cached_property
    def frames(self) -> Sequence[Numbers]:
        """What the second and third axes of three are bound to: frames of sound, points, tokens."""
        return tuple(tuple(8 * number for number in row) for row in self.sequence)

    @staticmethod
    def row(kind: Sequence[Numbers], number: int) -> Numbers:
        """What the symbol of that number is bound to."""
        return kind[min(number, len(kind) - 1)]


_BATCHES = ((2, 5, 7),)  # symbols of their own, but models that have several seldom run on different ones
_SEQUENCES = ((14, 22, 5), (15, 26, 6), (13, 21, 4), (17, 19, 3))
_IMAGES = ((64, 160, 32), (96, 224, 64))
PROFILES = (
    Profile(_BATCHES, _SEQUENCES, ((64, 161, 35), (96, 227, 67))),
    Profile(_BATCHES, _SEQUENCES, _IMAGES),
    # Differently named symbols that must be equal, images that must be square.
    Profile(_BATCHES, _SEQUENCES[:1], _IMAGES[:1]),
    Profile(_BATCHES, ((64, 96, 80),), ((224, 256, 320), (256, 320, 224))),
    Profile(_BATCHES, ((64, 96, 80),), ((224, 256, 320),)),
    Profile(_BATCHES, ((512, 768, 640),), ((512, 640, 768),)),
    Profile(_BATCHES, ((16000, 24000, 20000),), ((299, 331, 363),), ((16000, 24000, 20000),)),
    # Detectors of speech take chunks of one size only.
    Profile(_BATCHES, _SEQUENCES[:1], _IMAGES[:1], ((512, 512, 512),)),
    Profile(_BATCHES, _SEQUENCES[:1], _IMAGES[:1], ((576, 576, 576),)),
)
"""Ways to bind symbols, of which the first that leaves no shape unknown is taken; many models want images whose sides
are multiples of 32."""
