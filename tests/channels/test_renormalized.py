"""Models whose batch normalizations have the statistics of generated samples, and runs without data that need them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.renormalized import Renormalized, renormalized, stores_statistics
from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import ArraySource, calibration, read_npz
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.ir.model import Model, load
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.workflow.api import CompressOptions
from cpd_onnx.workflow.quality.samples import to_fit

MODELS = Path(cpd.__file__).parent / "models"
TEXT = """g (float[N, 3, 8, 8] x) => (float[N, 2, 8, 8] out) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w0)
    b = BatchNormalization (a, scale, bias, mean, variance)
    c = Relu (b)
    out = Conv (c, w1)
}"""


def network(text: str = TEXT, **more: np.ndarray) -> Model:
    rng = np.random.default_rng(0)
    values = {
        "w0": rng.standard_normal((6, 3, 3, 3)), "w1": rng.standard_normal((2, 6, 1, 1)),
        "scale": rng.uniform(0.5, 2.0, 6), "bias": rng.standard_normal(6),
        "mean": 7 * rng.standard_normal(6), "variance": rng.uniform(2.0, 900.0, 6),
    } | more  # fmt: skip  # a table
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(
        numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items() if k in text
    )
    return load(proto)


def likened(model: Model) -> Renormalized:
    combed = comb(model)
    found = renormalized(combed, Synthetic(combed.folded))
    assert found is not None
    return found


def normalised(model: Model) -> np.ndarray:
    """Return the output of the normalization for generated inputs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None))
    feed = next(Synthetic(comb(network()).folded).batches(256, seed=5))
    return execute(open_model(load(proto)), feed)[1]


def test_generated_inputs_get_the_statistics_of_the_training_data() -> None:
    model = network()
    axes = (0, 2, 3)
    found = normalised(likened(model).combed.folded.model)
    np.testing.assert_allclose(found.mean(axes), model.array("bias"), atol=0.3)
    np.testing.assert_allclose(found.std(axes), model.array("scale"), rtol=0.3)
    before = normalised(model)
    assert np.abs(before.std(axes) / model.array("scale") - 1).max() > 0.5


@pytest.mark.parametrize(
    ("text", "is_stored"),
    [
        (TEXT, True),
        (TEXT.replace("BatchNormalization (a, scale, bias, mean, variance)", "Relu (a)"), False),
        (TEXT.replace("mean, variance)", "variance, variance)"), False),
        (TEXT.replace("BatchNormalization (a", "BatchNormalization <training_mode = 1> (a"), False),
    ],
    ids=["stored", "no normalization", "shared tensors", "of each batch"],
)
def test_which_models_store_statistics(text: str, *, is_stored: bool) -> None:
    combed = comb(network(text))
    assert stores_statistics(combed.folded) == is_stored
    assert (renormalized(combed, Synthetic(combed.folded)) is not None) == is_stored


def test_real_samples_are_taken_as_they_are() -> None:
    combed = comb(network())
    assert renormalized(combed, ArraySource({"x": np.zeros((4, 3, 8, 8), np.float32)})) is None
    assert renormalized(combed, None) is None


def test_a_pruned_model_keeps_its_own_statistics() -> None:
    model = network()
    found = likened(model)
    group = next(g for g in found.combed.groups if len(g) == 6)
    kept = KeepMask(found.combed.atoms, group.channels[[1, 4]])
    pruned = rewrite(comb(model), kept).model
    entered = found.entered(pruned, kept)
    survivors = [0, 2, 3, 5]
    np.testing.assert_array_equal(
        entered.array("mean"), found.combed.folded.model.array("mean")[survivors].astype(np.float32)
    )
    assert found.left(pruned, entered).serialize() == pruned.serialize()
    entered.set_array("w1", entered.array("w1") + 1)
    entered.set_array("bias", entered.array("bias") + 1)
    left = found.left(pruned, entered)
    np.testing.assert_array_equal(left.array("mean"), pruned.array("mean"))
    np.testing.assert_array_equal(left.array("w1"), pruned.array("w1") + 1)
    ratio = np.sqrt((entered.array("variance") + 1e-5) / (pruned.array("variance") + 1e-5))
    np.testing.assert_allclose(left.array("bias") - pruned.array("bias"), ratio, rtol=1e-4)


def test_a_run_without_data_keeps_more_of_the_accuracy_than_by_the_weights_alone() -> None:
    test = ArraySource(read_npz(MODELS / "digits_test.npz"))
    accuracies = [
        evaluate(cpd.compress(load(MODELS / "digits.onnx"), macs=0.6, blind=True, **options).complete_proto(), test, "top1")
        for options in ({"score": "l2", "repair": False}, {"samples": 64, "repair_samples": 64})
    ]  # fmt: skip  # two calls
    assert accuracies[1] > accuracies[0] + 0.1


def test_a_model_that_cannot_be_run_on_generated_inputs_is_pruned_by_its_weights() -> None:
    text = """g (float[N, 8] x, string[N] s) => (float[N, 4] y, string[N] t) {
        a = MatMul (x, w0)
        y = MatMul (a, w1)
        t = Identity (s)
    }"""
    model = network(text, w0=np.eye(8), w1=np.eye(8)[:, :4])
    assert to_fit(None, model, CompressOptions(blind=True)) is None


def test_a_model_with_large_tensors_gets_fewer_generated_samples() -> None:
    text = "g (float[N, 3, 64, 64] x) => (float[N, {0}, 64, 64] y) {{ y = Conv <pads = [1, 1, 1, 1]> (x, w) }}"
    small, large = (
        network(text.format(width), w=np.zeros((width, 3, 3, 3), np.float32)) for width in (8, 8192)
    )  # fmt: skip  # one after the other
    counts = [
        source.count
        for source in (to_fit(None, model, CompressOptions(blind=True)) for model in (small, large))
        if source
    ]
    assert counts[0] == 128
    assert 16 <= counts[1] < 128


def test_fewer_generated_samples_than_a_batch_are_a_batch() -> None:
    # large inputs get few generated samples
    combed = comb(network())
    assert renormalized(combed, Synthetic(combed.folded, 4)) is not None
    assert [len(batch["x"]) for batch in calibration(combed.folded.model, Synthetic(combed.folded, 4), 64)] == [4]
    fixed = network(TEXT.replace("N", "8"))
    assert [len(batch["x"]) for batch in calibration(fixed, Synthetic(comb(fixed).folded, 4), 64)] == [8]
