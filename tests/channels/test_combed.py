"""The result of combing: complete and immutable, a one-line repr, and reasons with their kind and node."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.channels.combing import comb
from cpd_onnx.report.tables import frozen_reasons, prunable_line
from tests.support.models import from_text

CONV = "(float[1, 3, 4, 4] x, float[8, 3, 3, 3] w, float[5, 8, 1, 1] v) => (float[1, 5, 2, 2] y)"
PACKED = "(float[2, 16] x, float[16, 64] w, uint8[8, 2, 16] q, float[16] s) => (float[2, 8] y)"


def test_what_is_combed_is_frozen_and_says_in_a_line_what_it_is() -> None:
    combed = comb(from_text(f"{CONV} {{ h = Conv(x, w) y = Conv(h, v) }}"))
    assert "\n" not in repr(combed)
    assert "groups: 1, channels: 8" in repr(combed)
    for thing, field in ((combed, "groups"), (combed, "unaccounted"), (combed.weights[0], "uses")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, field, ())


def test_reasons_say_what_they_are_about() -> None:
    combed = comb(from_text(f"{CONV} {{ h = Conv(x, w) g = local.Strange(h) y = Conv(g, v) }}"))
    found = {str(reason): (reason.kind, reason.node) for frozen in combed.frozen() for reason in frozen.reasons}
    assert found == {
        "operator local::Strange has no rule": ("no rule", "operator local::Strange"),
        "graph input 'x'": ("interface", ""),
        "extent of a kernel": ("no channels", ""),
        "the output shape of Strange 'g' is not known": ("operator", ""),
    }


def test_axes_without_channels_are_told_last() -> None:
    text = "{ h = MatMul(x, w) y = com.microsoft.MatMulNBits<K = 64, N = 8, bits = 4, block_size = 32>(h, q, s) }"
    reasons = [entry["reason"] for entry in frozen_reasons(comb(from_text(f"{PACKED} {text}")))]
    assert reasons[-1] == "bytes of a block of numbers"
    assert [reason.kind for reason in reasons].count("no channels") == 1


def test_a_copy_of_a_reason_knows_as_much() -> None:
    reason = Reason("operator", "Conv 'a'", "slides over this axis")
    for other in (copy.deepcopy(reason), pickle.loads(pickle.dumps(reason))):
        assert (other, other.kind, other.node) == ("Conv 'a' slides over this axis", "operator", "Conv 'a'")


@pytest.mark.parametrize(("direction", "count"), [("forward", 1), ("bidirectional", 2)])
def test_recurrent_weights_that_states_alone_fix_are_told_apart_in_both_directions(direction: str, count: int) -> None:
    model = from_text(
        f"(float[3, 2, 4] x, float[{count}, 2, 5] xh, float[{count}, 15, 4] w, float[{count}, 15, 5] r, float[{5 * count}, 6] v, "
        "float[6, 7] u, int64[3] p) => (float[3, 2, 7] y) "
        f'{{ h = GRU <hidden_size = 5, direction = "{direction}">(x, w, r, "", "", xh) t = Transpose <perm = [0, 2, 1, 3]>(h) '
        "a = Reshape(t, p) b = MatMul(a, v) y = MatMul(b, u) }",
        values={"p": [0, 0, -1]},
    )
    combed = comb(model)
    weights = {weight.value.name: weight.size for weight in combed.weights}
    fixed = weights["w"] + weights["r"]
    assert combed.prunable_fraction() == 1.0
    assert combed.interface_fraction() == pytest.approx(fixed / (fixed + weights["v"] + weights["u"]))


def test_what_inputs_and_outputs_fix_is_said_beside_what_is_prunable() -> None:
    assert (
        prunable_line({"prunable_fraction": 1.0, "interface_fraction": 0.0}, "shrink")
        == "100.0 % of the weights shrink"
    )
    line = prunable_line({"prunable_fraction": 0.5, "interface_fraction": 0.25}, "shrink")
    assert line == "50.0 % of the weights shrink, not counting the 25.0 % that inputs and outputs alone fix"


MASKED = (
    "(float[n, 3, h, w] x, float[8, 3, 1, 1] k, float[6, 8, 1, 1] u, float[1, 1, 64, 64] m, int64[2] s) => (float[] y) { "
    "a = Conv(x, k) d = Shape <start = 2>(a) t = Concat <axis = 0>(s, d) "
    'e = Resize <mode = "nearest">(m, "", "", t) '
)
VALUES = {"m": np.ones((1, 1, 64, 64)), "s": [1, 1]}


def test_a_mask_that_is_resized_is_no_weight() -> None:
    """The mask of the pixels of a DETR, which is stored as floating-point numbers."""
    rest = "b = Cast <to = 9>(e) z = Sub(a, a) w = Where(b, a, z) r = Relu(w) y = Conv(r, u)"
    combed = comb(from_text(f"{MASKED} {rest} }}", values=VALUES))
    assert combed.prunable_fraction() == 1
    assert "m" not in {frozen.tensor for frozen in combed.frozen()}


@pytest.mark.parametrize(
    "rest",
    [
        "w = Mul(a, e)",
        "c = Greater(a, e) z = Sub(a, a) w = Where(c, a, z)",
        "b = Cast <to = 9>(e) z = Sub(a, a) v = Where(b, a, z) w = Add(v, e)",
    ],
)
def test_numbers_that_are_used_otherwise_are_weights(rest: str) -> None:
    text = f"{MASKED} {rest} r = Relu(w) y = Conv(r, u) }}"
    combed = comb(from_text(text, values=VALUES))
    assert combed.prunable_fraction() < 0.1
    assert "m" in {frozen.tensor for frozen in combed.frozen()}
