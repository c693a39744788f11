"""A small classifier of digits, for tests that look at what a run does, not at how much of a real model it removes.

It has two groups of channels where `models/digits.onnx` has ten: a run takes a third to a fifth of the time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime as ort
from onnx import ModelProto, ValueInfoProto, numpy_helper

MODELS = Path(__file__).parents[2] / "models"
WIDTHS = (16, 32)
_GRAPH = """<ir_version: 8, opset_import: ["": 17]>
digits (float[batch, 1, 8, 8] image) => (float[batch, 10] scores) {
    first = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, "stem.0.weight")
    scaled = BatchNormalization (first, "stem.1.weight", "stem.1.bias", "stem.1.mean", "stem.1.var")
    sparse = Relu (scaled)
    second = Conv <pads = [1, 1, 1, 1]> (sparse, "block1.conv1.0.weight")
    normal = BatchNormalization (second, "block1.conv1.1.weight", "block1.conv1.1.bias", "block1.conv1.1.mean", "block1.conv1.1.var")
    positive = Relu (normal)
    flat = Flatten (positive)
    scores = Gemm <transB = 1> (flat, "head.weight", "head.bias")
}"""


@functools.cache
def small_digits() -> ModelProto:
    """Return the model: random convolutions, their statistics, and a linear fit; 96 of 100 answers are right."""
    rng = np.random.default_rng(0)
    first, second = WIDTHS
    weights = {
        "stem.0.weight": rng.standard_normal((first, 1, 3, 3)) / 2,
        "block1.conv1.0.weight": rng.standard_normal((second, first, 3, 3)) / 8,
        "head.weight": np.zeros((10, 16 * second)),
        "head.bias": np.zeros(10),
    }
    for name, width in (("stem.1", first), ("block1.conv1.1", second)):
        scale = rng.permutation(np.geomspace(1, 0.01, width))  # some channels matter little, as those of trained models
        weights |= {f"{name}.weight": scale, f"{name}.bias": 0.3 * scale * rng.standard_normal(width)}
        weights |= {f"{name}.mean": np.zeros(width), f"{name}.var": np.ones(width)}
    with np.load(MODELS / "digits_train.npz") as arrays:
        images, labels = arrays["image"], arrays["labels"]
    for tensor, name in (("first", "stem.1"), ("second", "block1.conv1.1")):
        values = _computed(weights, tensor, images)
        weights |= {f"{name}.mean": values.mean((0, 2, 3)), f"{name}.var": values.var((0, 2, 3))}
    features = np.c_[_computed(weights, "flat", images), np.ones(len(images))].astype(np.float64)
    wanted = 10.0 * np.eye(10)[labels] - 5.0
    moments = features.T @ features + 0.1 * np.eye(features.shape[1])
    fitted = np.linalg.solve(moments, features.T @ wanted).T
    weights |= {"head.weight": fitted[:, :-1], "head.bias": fitted[:, -1]}
    return _made(weights)


def _made(weights: dict[str, np.ndarray]) -> ModelProto:
    model = onnx.parser.parse_model(_GRAPH)
    model.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()
    )
    return model


def _computed(weights: dict[str, np.ndarray], name: str, images: np.ndarray) -> np.ndarray:
    model = _made(weights)
    model.graph.output.append(ValueInfoProto(name=name))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run([name], {"image": images})
    return np.asarray(found)
