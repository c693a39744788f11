"""Tests of `data.images.crops`: random parts of images as further samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpd_onnx.data.images import crops
from cpd_onnx.data.images.crops import cropped, enlarged, image_input, windows
from cpd_onnx.data.signature import Input

IMAGE = ("N", 3, 32, 48)


def entry(name: str, shape: tuple[Any, ...] | None) -> Input:
    return Input(name, shape, np.dtype(np.float32))


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ([IMAGE], "x0"),
        ([("N", 1, None, "W")], "x0"),
        ([("N", 77), IMAGE], "x1"),
        ([IMAGE, IMAGE], None),
        ([("N", 32, 48, 3)], None),
        ([("N", 12, 32, 32)], None),
        ([("N", 1, 80, 3000)], None),
        ([("N", 3, 8, 8)], None),
        ([None], None),
    ],
)
def test_an_image_is_told_by_its_shape(shapes: list[Any], name: str | None) -> None:
    assert image_input([entry(f"x{place}", shape) for place, shape in enumerate(shapes)]) == name


def test_the_whole_is_a_part_of_itself() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 32, 48)).astype(np.float32)
    whole = np.tile([1.0, 0.0], (2, 2, 1))
    np.testing.assert_allclose(enlarged(x, whole), x, atol=1e-5)
    assert np.array_equal(enlarged((x > 0).astype(np.uint8), whole), x > 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_a_part_is_scaled_to_the_size_of_the_image(dtype: Any) -> None:
    ramp = np.broadcast_to(np.arange(32, dtype=dtype), (1, 1, 32, 32))
    place = np.array([[[1.0, 0.0], [0.5, 0.5]]])  # the right half
    found = enlarged(ramp, place)
    assert found.dtype == dtype
    expected = np.clip(15.75 + 0.5 * np.arange(32), 0, 31)
    assert np.abs(found[0, 0, 0].astype(float) - expected).max() <= (0.5 if dtype == np.uint8 else 1e-2)


def test_parts_stay_inside_the_image_and_have_the_least_area() -> None:
    scale, centre = np.moveaxis(windows(500, 0.5, np.random.default_rng(0)), 2, 0)
    assert (np.abs(centre) + scale <= 1 + 1e-9).all()
    assert 0.4 < scale.prod(axis=1).min() < 0.6


def test_more_samples_are_parts_of_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(4, 3, 32, 48)).astype(np.float32), "t": np.full((4, 2), i)} for i in range(2)]
    inputs = [entry("x", IMAGE), entry("t", ("N", 2))]
    more = cropped(feeds, inputs, 11, 0)
    assert [feed["x"].shape for feed in more] == [feeds[0]["x"].shape] * 3
    assert [int(feed["t"][0, 0]) for feed in more] == [0, 1, 0]
    assert not np.array_equal(more[0]["x"], more[2]["x"])
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(more, cropped(feeds, inputs, 11, 0), strict=True))
    monkeypatch.setattr(crops, "_NUMBERS", 13 * feeds[0]["x"][0].size)
    assert len(cropped(feeds, inputs, 11, 0)) == 2  # 8 and 5 images
    assert cropped(feeds, inputs[1:], 11, 0) == cropped(feeds, inputs, 0, 0) == []
