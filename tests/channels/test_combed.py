"""The result of combing: complete and immutable, a one-line repr, and reasons with their kind and node."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest

from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.channels.combing import comb
from cpd_onnx.report.tables import frozen_reasons
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
