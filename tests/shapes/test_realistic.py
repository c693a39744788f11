"""The sizes under which a model is judged: those of the file, and stated ones where it leaves them open."""

from __future__ import annotations

import numpy as np
import pytest

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.runtime.sessions import judged_feed, open_model
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.realistic import IMAGE, judged_inputs
from tests.support.models import from_text

CONV = "(float[N, 3, H, W] x, float[8, 3, 3, 3] w, float[4, 8, 1, 1] u) => (float[N, 4, A, B] y) { a = Conv(x, w) y = Conv(a, u) }"


def macs(text: str, shapes: dict[str, tuple[int, ...]] | None = None) -> float:
    combed = comb(from_text(text), shapes)
    return CostModel(combed).total(KeepMask(combed.atoms)).macs


def of(height: int, width: int) -> float:
    return (height - 2) * (width - 2) * (8 * 27 + 4 * 8)


def test_open_images_cost_what_realistic_ones_do() -> None:
    assert macs(CONV) == of(IMAGE, IMAGE)
    assert macs(CONV, {"x": (1, 3, 64, 100)}) == of(64, 100)
    assert macs(CONV.replace("H, W", "20, 30")) == of(20, 30)


def test_groups_cost_alike() -> None:
    combed = comb(from_text(CONV))
    kept = KeepMask(combed.atoms, combed.groups[0].channels[:4])
    costs = CostModel(combed)
    assert costs.cost("macs", kept) == of(IMAGE, IMAGE) / 2
    assert costs.in_widths("macs")(np.asarray([[4]]))[0] == of(IMAGE, IMAGE) / 2


def test_proofs_keep_small_sizes() -> None:
    assert comb(from_text(CONV)).folded.scope.values["x"].shape == (2, 3, 64, 96)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CONV, [("x", [1, 3, IMAGE, IMAGE], "float32", [0, 2, 3])]),
        (CONV.replace("N, 3, H, W", "1, 3, 20, 30"), [("x", [1, 3, 20, 30], "float32", [])]),
        (CONV.replace("N, 3, H, W", "N, 3, 20, 30"), [("x", [1, 3, 20, 30], "float32", [0])]),
        (
            "(uint8[N, H, W, 3] x) => (float[N, H, W, 3] y) { y = Cast<to=1>(x) }",
            [("x", [1, IMAGE, IMAGE, 3], "uint8", [0, 1, 2])],
        ),
        ("(float[N, T] x) => (float[N, T] y) { y = Relu(x) }", [("x", [1, 1792], "float32", [0, 1])]),
    ],
)
def test_sizes_are_stated(text: str, expected: list[tuple[object, ...]]) -> None:
    found = judged_inputs(fold(comb(from_text(text)).folded.model))
    assert [tuple(entry.values()) for entry in found] == expected


def test_sizes_that_a_model_rejects_are_not_judged_by() -> None:
    """A table of 60 x 92 positions is added, so that no other size is possible."""
    text = CONV.replace("{ a = Conv(x, w) y = Conv(a, u) }", "{ a = Conv(x, w) b = Add(a, p) y = Conv(b, u) }").replace(
        "float[4, 8, 1, 1] u", "float[4, 8, 1, 1] u, float[1, 1, 62, 94] p"
    )
    folded = fold(comb(from_text(text)).folded.model)
    assert judged_inputs(folded)[0]["shape"][2:] != [IMAGE, IMAGE]


def test_feeds_have_the_judged_sizes() -> None:
    folded = fold(comb(from_text(CONV)).folded.model)
    feed = judged_feed(folded, open_model(folded.model))
    assert {name: list(array.shape) for name, array in feed.items()} == {"x": [1, 3, IMAGE, IMAGE]}
