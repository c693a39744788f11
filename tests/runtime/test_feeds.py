"""Random inputs keep what models assume of them."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnxruntime as ort
import pytest

from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.model import load
from cpd_onnx.runtime.sessions import execute, open_model, precisely, random_feed
from cpd_onnx.shapes.inference import fold
from tests.support.models import from_text


@pytest.mark.parametrize("hides", ["xm", "kept"])
def test_masks_leave_each_row_something(hides: str) -> None:
    """Whether True hides or keeps; a row that is hidden as a whole has a softmax of NaN."""
    model = load(
        from_text(
            f"""(float[N, 6] x, bool[N, 6] xm, float low) => (float[N, 6] y) {{
                kept = Not (xm)
                s = Where ({hides}, low, x)
                y = Softmax (s)
            }}""",
            values={"low": -np.inf},
        )
    )
    feed = random_feed(fold(model))
    assert np.isfinite(execute(open_model(model), feed)[0]).all()
    assert 0 < feed["xm"].mean() < 1


def test_masks_of_numbers_keep_something_and_flags_are_set() -> None:
    text = """(int64[N, 5] xm, bool xf, float[N, 5] x) => (float[N, 5] y) {
        m = Cast <to = 1> (xm)
        f = Cast <to = 1> (xf)
        p = Mul (x, m)
        y = Mul (p, f)
    }"""
    feed = random_feed(fold(load(from_text(text))))
    assert set(np.unique(feed["xm"])) == {0, 1}
    assert (feed["xm"].sum(-1) > 0).all()
    assert feed["xf"].all()


TABLE = "(int64[n, t] xi, float[40, 8] table, int64[1] last, int64 length, int64 zero, int64[40] every, float[2] off_on, float[40, 8] rows)"


@pytest.mark.parametrize(
    ("body", "largest"),
    [
        ("i = Gather <axis = 1>(xi, last) y = Gather(table, i)", 39),
        ("l = Less(xi, zero) c = Cast <to = 7>(l) w = Mul(c, length) i = Add(xi, w) y = Gather(table, i)", 39),
        ("u = Unsqueeze(xi, last) e = Equal(u, every) f = Cast <to = 1>(e) y = MatMul(f, rows)", 39),
        ("o = OneHot(xi, length, off_on) y = MatMul(o, rows)", 39),
        ("p = CumSum(xi, zero) m = Mul(p, xi) y = Gather(table, m)", 1),
    ],
    ids=["looked up", "negative ones", "compared with all", "one-hot", "a mask that is counted"],
)
def test_indices_are_drawn_from_the_whole_table(body: str, largest: int) -> None:
    values = {"last": [-1], "length": 40, "zero": 0, "every": list(range(40)), "off_on": [0, 1]}
    folded = fold(load(from_text(f"{TABLE} => (float[] y) {{ {body} }}", values=values)))
    drawn = [random_feed(folded, seed)["xi"] for seed in range(20)]
    assert min(int(each.min()) for each in drawn) == 0
    assert largest - 2 <= max(int(each.max()) for each in drawn) <= largest


@pytest.mark.parametrize(("shape", "drawn"), [("", {8000, 16000}), ("[1]", {8000, 16000}), ("[4]", {0, 1})])
def test_a_number_that_has_to_equal_a_constant_is_one_of_these(shape: str, drawn: set[int]) -> None:
    """Such as a sampling rate; several integers may be a mask, and a comparison with zero or one is that of a flag."""
    text = f"""(int64{shape} xi, int64{shape} xf, int64 low, int64 high, int64 none, float[1] x) => (float[] y) {{
        i = Identity (xi)
        a = Equal (i, low)
        b = Equal (high, xi)
        c = Equal (xf, none)
        d = Or (a, b)
        e = Or (c, d)
        f = Cast <to = 1> (e)
        y = Mul (x, f)
    }}"""
    source = Synthetic(fold(load(from_text(text, values={"low": 8000, "high": 16000, "none": 0}))), count=80)
    feeds = list(source.batches(4))
    assert {int(number) for feed in feeds for number in np.ravel(feed["xi"])} == drawn
    assert all(np.any(feed["xf"]) for feed in feeds)


def test_a_failed_run_is_reported_with_its_sizes_and_without_places_in_the_source_of_onnxruntime() -> None:
    model = from_text("(float[N, 4] x, int64[2] s) => (float[1, 4] y) { y = Reshape(x, s) }", values={"s": [1, 4]})
    with pytest.raises(UnsupportedError) as raised:
        execute(open_model(load(model)), {"x": np.zeros((2, 4), np.float32)})
    assert "requested shape:{1,4}" in str(raised.value)
    assert "onnxruntime_src" not in str(raised.value)
    assert "ReshapeHelper" not in str(raised.value)


@pytest.mark.parametrize("error", ["Fail", "NotImplemented"])
def test_what_cannot_be_widened_is_opened_as_it_is(error: str) -> None:
    """As of models of int8 operators, of which wider weights leave operators without a kernel."""
    tried: list[bool] = []

    def make(options: ort.SessionOptions) -> ort.InferenceSession:
        tried.append(not tried and options.get_session_config_entry("session.x64quantprecision") == "1")
        if len(tried) == 1:
            raise getattr(ort.capi.onnxruntime_pybind11_state, error)("no kernel")
        return cast("ort.InferenceSession", "opened")

    assert precisely(ort.SessionOptions, make) == "opened"
    assert tried == [True, False]
