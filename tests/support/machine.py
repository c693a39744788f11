"""A machine that is made up, whose kernels are fast at some widths, and a model to measure on it."""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto

from cpd_onnx.budget import latency
from cpd_onnx.budget.latency import LatencyProbe
from cpd_onnx.ir.model import Model
from tests.support.models import from_text

STACK = (
    "(float[N, 3, 16, 16] x, float[96, 3, 3, 3] w, float[128, 96, 3, 3] u, float[64, 128, 3, 3] t, float[64, 10] v) => (float[N, 10] y) "
    "{ a = Conv(x, w) b = Conv(a, u) c = Conv(b, t) p = GlobalAveragePool(c) f = Flatten(p) y = MatMul(f, v) }"
)


def stack() -> ModelProto:
    return from_text(STACK)


class MadeUp(LatencyProbe):
    """A machine whose kernels work in blocks of 16 channels, and at widths that are no multiples of 4 three times as long."""

    def profile(self, model: Model) -> tuple[dict[str, latency.KernelTime], float, float]:
        times = {}
        for name in "wut":
            out, into, *_ = sizes = model.array(name).shape
            blocks = math.ceil(out / 16) * (math.ceil(into / 16) if into > 3 else 1)
            slow = 3 if out % 4 or (into % 4 and into > 3) else 1
            times[f"kernel of {name}"] = latency.KernelTime("Conv", 0.01 + 0.002 * blocks * slow, tuple(sizes))
        total = sum(kernel.ms for kernel in times.values())
        return (
            times,
            total,
            self.profile(self.combed.folded.model)[1] if model is not self.combed.folded.model else total,
        )

    def ratio(self, channels: np.ndarray, seconds: float = 2.0) -> float:
        """The model takes 0.05 milliseconds that no kernel tells of."""
        pruned, original = (self.profile(m)[1] for m in (self.pruned(channels), self.combed.folded.model))
        return (pruned + 0.05) / (original + 0.05)
