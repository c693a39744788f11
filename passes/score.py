"""Score: compute the importance of each coupled channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cpd_onnx.pipeline.state import State
from cpd_onnx.scores.registry import find_score_function, score


@dataclass(frozen=True)
class Score:
    """Compute the importance of each channel; the options are those of `ScoreContext`."""

    kind: str = "l2"
    seed: int = 0
    samples: int | None = None
    labels: bool = False
    is_repaired: bool = False
    name: ClassVar[str] = "score"
    requires: ClassVar[tuple[str, ...]] = ("combed",)
    provides: ClassVar[tuple[str, ...]] = ("scores", "score")

    def __call__(self, state: State) -> State:
        """Fill in `scores`."""
        more = {name: getattr(self, name) for name in ("samples", "labels", "seed", "is_repaired")}
        scores = score(state.need("combed", "comb"), self.kind, data=state.data, **more)
        words = {"score": self.kind, "seed": self.seed}
        if find_score_function(self.kind).needs_data:
            words |= {"samples": self.samples or find_score_function(self.kind).samples, "labels": self.labels}
        return replace(state, scores=scores, score=words)
