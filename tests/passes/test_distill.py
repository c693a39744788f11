"""Distillation brings a pruned model back to what the original says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, helper, numpy_helper

pytest.importorskip("torch")

import torch  # after the check for it

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import LABELS, ArraySource, Batch, FunctionSource, inputs_of
from cpd_onnx.errors import CpdError, DataError, ModelError, UnsupportedError
from cpd_onnx.passes.distill import DistillOptions, Progress, distill
from cpd_onnx.torch import import_model, read_weights, write_weights
from cpd_onnx.training.feed import Augmentation, augment
from cpd_onnx.training.loop import cosine
from cpd_onnx.training.losses import class_axis, divergence, is_distribution, kind_of, label_loss, relative_error
from tests.support.models import from_text

Array = npt.NDArray[Any]
Weights = dict[str, Array]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from more threads, and a busy machine makes them wait for each other."""
    torch.set_num_threads(1)


def weights_of(width: int = 16, classes: int = 4, dtype: Any = np.float32) -> Weights:
    generator = np.random.default_rng(3)
    shapes = {"conv.w": (width, 2, 3, 3), "conv.b": (width,), "fc.w": (classes, width), "fc.b": (classes,)}
    return {name: (generator.normal(size=shape) * 0.6).astype(dtype) for name, shape in shapes.items()}


def network(weights: Weights, batch: int | str = "N", tail: tuple[str, ...] = ()) -> ModelProto:
    """A convolution, batch normalisation, the average and a linear layer; more operators may follow."""
    width, classes = weights["fc.w"].shape[1], len(weights["fc.b"])
    dtype = weights["conv.w"].dtype
    moments = {"bn.mean": np.zeros(width), "bn.var": np.ones(width), "bn.w": np.ones(width), "bn.b": np.zeros(width)}
    tensors = weights | {name: vector.astype(dtype) for name, vector in moments.items()}
    names = ["t0", *(f"t{place + 1}" for place in range(len(tail)))]
    nodes = [
        helper.make_node("Conv", ["x", "conv.w", "conv.b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "bn.w", "bn.b", "bn.mean", "bn.var"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "fc.w", "fc.b"], ["t0"], transB=1),
        *(helper.make_node(kind, [a], [b]) for kind, a, b in zip(tail, names, names[1:], strict=False)),
    ]
    elem = helper.np_dtype_to_tensor_dtype(dtype)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", elem, [batch, 2, 6, 6])],
        [helper.make_tensor_value_info(names[-1], elem, [batch, classes])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pruned(weights: Weights, keep: int) -> Weights:
    return weights | {
        "conv.w": weights["conv.w"][:keep],
        "conv.b": weights["conv.b"][:keep],
        "fc.w": weights["fc.w"][:, :keep],
    }


def images(count: int = 192, dtype: Any = np.float32) -> Weights:
    return {"x": np.random.default_rng(5).normal(size=(count, 2, 6, 6)).astype(dtype)}


TEACHER = network(weights_of())
STUDENT = network(pruned(weights_of(), 10))
FAST = DistillOptions(batch_norm="frozen", epochs=15, batch_size=32, lr=2e-2, temperature=2.0)


def distance(student: ModelProto, values: Weights) -> float:
    return evaluate(write_weights(student, values), ArraySource(images()), "mse", reference=TEACHER)


def test_pruned_network_recovers() -> None:
    result = distill(TEACHER, STUDENT, ArraySource(images()), replace(FAST, losses={"t0": "mse"}))
    assert distance(STUDENT, result.values) < 0.05 * distance(STUDENT, {})
    assert len(result.losses) == 15 * 6
    assert np.mean(result.losses[-6:]) < 0.1 * np.mean(result.losses[:6])
    assert set(result.values) == {"conv.w", "conv.b", "bn.w", "bn.b", "fc.w", "fc.b"}


def test_scores_are_compared_as_distributions() -> None:
    result = distill(TEACHER, STUDENT, ArraySource(images()), FAST)
    assert result.kinds == {"t0": "kl"}
    source, trained = ArraySource(images()), write_weights(STUDENT, result.values)
    agreement = [evaluate(model, source, "top1", reference=TEACHER) for model in (STUDENT, trained)]
    assert agreement[1] > max(agreement[0], 0.8)


def test_same_seed_gives_the_same_bytes() -> None:
    options = replace(FAST, epochs=1, flip=True, shift=1)
    runs = [distill(TEACHER, STUDENT, ArraySource(images()), replace(options, seed=seed)) for seed in (1, 1, 2)]
    first, again, other = ({name: value.tobytes() for name, value in run.values.items()} for run in runs)
    assert first == again
    assert first != other
    assert runs[0].losses == runs[1].losses


def test_every_pass_has_an_order_of_its_own() -> None:
    seeds: list[int | None] = []

    class Recorder(ArraySource):
        def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
            seeds.append(seed)
            return super().batches(size, seed=seed)

    distill(TEACHER, STUDENT, Recorder(images()), replace(FAST, epochs=3, seed=7))
    assert seeds[-3:] == [7, 8, 9]


def test_student_is_not_changed() -> None:
    before = STUDENT.SerializeToString()
    distill(TEACHER, STUDENT, ArraySource(images()), replace(FAST, steps=2))
    assert STUDENT.SerializeToString() == before


def test_nan_stops_and_names_the_step() -> None:
    data = images()
    data["x"][:] = np.nan
    with pytest.raises(
        CpdError, match=r"the loss became nan at step 1, first in the data; lower the learning rate \(it was"
    ):
        distill(TEACHER, STUDENT, ArraySource(data), replace(FAST, steps=3))


def test_divergence_names_the_step_it_began_at() -> None:
    with pytest.raises(CpdError, match=r"the loss became (nan|inf) at step \d+"):
        distill(TEACHER, STUDENT, ArraySource(images()), replace(FAST, optimizer="sgd", lr=1e30, clip_norm=0.0))


def test_labels_alone_teach() -> None:
    data = images()
    data[LABELS] = (data["x"][:, 0].mean((1, 2)) > 0).astype(np.int64)
    options = replace(FAST, epochs=40, label_weight=1.0)
    result = distill(TEACHER, STUDENT, ArraySource(data), options)
    trained = write_weights(STUDENT, result.values)
    assert evaluate(trained, ArraySource(data), "top1") > 0.9


def test_missing_labels_are_reported_first() -> None:
    with pytest.raises(DataError, match=r"label weight 0\.5 needs an array 'labels'"):
        distill(TEACHER, STUDENT, ArraySource(images()), replace(FAST, label_weight=0.5))


def test_fixed_batch_size_is_fed() -> None:
    teacher, student = (network(weights, batch=4) for weights in (weights_of(), pruned(weights_of(), 10)))
    result = distill(teacher, student, ArraySource(images(18)), replace(FAST, epochs=3))
    assert len(result.losses) == 3 * 4
    with pytest.raises(DataError, match="takes 4 samples at a time but the data has only 3"):
        distill(teacher, student, ArraySource(images(3)), FAST)


def test_batch_norm_statistics_move_only_if_asked() -> None:
    options = replace(FAST, steps=4)
    frozen = distill(TEACHER, STUDENT, ArraySource(images()), options)
    moving = distill(TEACHER, STUDENT, ArraySource(images()), replace(options, batch_norm="train"))
    assert {"bn.mean", "bn.var"} & set(frozen.values) == set()
    assert {"bn.mean", "bn.var"} <= set(moving.values)


@pytest.mark.parametrize(("count", "batch_size", "moves"), [(1000, 8, False), (1000, 16, True), (999, 16, False)])
def test_batch_norm_statistics_move_by_themselves_where_there_is_enough_data(
    count: int, batch_size: int, moves: bool
) -> None:
    options = replace(FAST, steps=2, batch_size=batch_size, batch_norm="auto")
    result = distill(TEACHER, STUDENT, ArraySource(images(count)), options)
    assert ("bn.mean" in result.values) == moves


@pytest.mark.parametrize(
    ("count", "batch_norm", "rate"),
    [(999, "frozen", 2e-4), (999, "train", 2e-4), (1000, "frozen", 1e-3), (1000, "train", 2e-3)],
)
def test_the_learning_rate_follows_the_samples_and_the_normalisations(count: int, batch_norm: Any, rate: float) -> None:
    options = replace(FAST, steps=3, batch_norm=batch_norm)
    usual, given = (
        distill(TEACHER, STUDENT, ArraySource(images(count)), replace(options, lr=lr)).values["fc.b"]
        for lr in (None, rate)
    )
    np.testing.assert_array_equal(usual, given)


def test_frozen_initializers_stay() -> None:
    result = distill(TEACHER, STUDENT, ArraySource(images()), replace(FAST, steps=3, freeze=("fc.w", "fc.b")))
    assert {"fc.w", "fc.b"} & set(result.values) == set()
    with pytest.raises(CpdError, match="no initializer 'nothing'"):
        distill(TEACHER, STUDENT, ArraySource(images()), replace(FAST, freeze=("nothing",)))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_train(dtype: Any) -> None:
    teacher, student = (network(weights) for weights in (weights_of(dtype=dtype), pruned(weights_of(dtype=dtype), 10)))
    result = distill(teacher, student, ArraySource(images(dtype=dtype)), replace(FAST, epochs=5))
    assert {value.dtype for value in result.values.values()} == {np.dtype(dtype)}
    assert np.mean(result.losses[-6:]) < 0.6 * np.mean(result.losses[:6])


def test_probabilities_are_taken_for_what_they_are() -> None:
    teacher, student = (network(weights, tail=("Softmax",)) for weights in (weights_of(), pruned(weights_of(), 10)))
    result = distill(teacher, student, ArraySource(images()), FAST)
    assert result.kinds == {"t1": "kl"}
    assert result.losses[0] == pytest.approx(distill(TEACHER, STUDENT, ArraySource(images()), FAST).losses[0], rel=1e-3)
    assert np.mean(result.losses[-6:]) < 0.3 * np.mean(result.losses[:6])


def test_teacher_may_hold_what_torch_cannot_run() -> None:
    teacher = network(weights_of())
    teacher.graph.node.append(helper.make_node("SampleOp", ["t0"], ["scores"], domain="com.microsoft"))
    teacher.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(UnsupportedError, match="SampleOp"):
        import_model(teacher)
    teacher.graph.output[0].name = "scores"
    student = network(pruned(weights_of(), 10))
    student.graph.node.append(helper.make_node("Identity", ["t0"], ["scores"]))
    student.graph.output[0].name = "scores"
    result = distill(teacher, student, ArraySource(images()), replace(FAST, losses={"scores": "mse"}))
    assert np.mean(result.losses[-6:]) < 0.1 * np.mean(result.losses[:6])


def test_function_data_trains_for_given_steps() -> None:
    def batches() -> Any:
        yield from ({"x": images()["x"][start : start + 7]} for start in range(0, 70, 7))

    source = FunctionSource(batches, inputs_of(STUDENT))
    assert len(distill(TEACHER, STUDENT, source, replace(FAST, steps=12)).losses) == 12
    with pytest.raises(DataError, match="give the number of steps"):
        distill(TEACHER, STUDENT, source, FAST)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_reported() -> None:
    with pytest.raises(CpdError, match="'cuda:1' was requested but torch finds no GPU"):
        distill(TEACHER, STUDENT, ArraySource(images()), replace(FAST, device="cuda:1"))


def test_progress_is_told() -> None:
    seen: list[Progress] = []
    distill(TEACHER, STUDENT, ArraySource(images()), replace(FAST, steps=25), seen.append)
    assert [(entry.step, entry.steps) for entry in seen] == [(step, 25) for step in range(1, 26)]


def test_models_of_another_signature_are_refused() -> None:
    with pytest.raises(ModelError, match="same signature"):
        distill(network(weights_of(), tail=("Softmax",)), STUDENT, ArraySource(images()), FAST)
    with pytest.raises(ModelError, match="shape"):
        distill(network(weights_of(classes=3)), STUDENT, ArraySource(images()), replace(FAST, steps=1))
    with pytest.raises(CpdError, match="'other'"):
        distill(TEACHER, STUDENT, ArraySource(images()), replace(FAST, losses={"other": "kl"}))


# The parts.


def test_divergence_vanishes_for_equal_scores_and_only_for_them() -> None:
    scores = torch.randn(4, 5, 2, 2, generator=torch.Generator().manual_seed(1))
    assert float(divergence(scores, scores + 3.0, 1, 2.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(divergence(scores, scores.flip(1), 1, 2.0)) > 0.1


def test_divergence_is_the_mean_over_pixels() -> None:
    a, b = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    p, q = b.softmax(1), a.softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    assert float(divergence(a, b, 1, 1.0)) == pytest.approx(float(expected), rel=1e-5)


def test_temperature_softens_and_keeps_the_size_of_gradients() -> None:
    a, b = (torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert float(divergence(a, b, 1, 2.0)) == pytest.approx(4 * float(divergence(a / 2, b / 2, 1, 1.0)), rel=1e-5)


def test_relative_error_has_no_scale() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5])
    assert float(relative_error(a, b)) == pytest.approx(float(relative_error(1000 * a, 1000 * b)))


def test_ignored_labels_do_not_count() -> None:
    scores = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[[0, 255], [255, 255]]])
    expected = -scores.log_softmax(1)[0, 0, 0, 0]
    assert float(label_loss(scores, labels, 1)) == pytest.approx(float(expected))
    assert float(label_loss(scores.movedim(1, 3), labels, 3)) == pytest.approx(float(expected))
    with pytest.raises(DataError, match="labels have shape"):
        label_loss(scores, labels[:, 0], 1)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.randn(4, 10), "kl"),
        (lambda: torch.randn(4, 10).softmax(1), "kl"),
        (lambda: torch.rand(4, 10), "mse"),
        (lambda: torch.randn(4, 1), "mse"),
        (lambda: torch.randn(4, 12, 30, 40), "kl"),
        (lambda: torch.randn(4, 1, 30, 40), "mse"),
        (lambda: torch.randn(4, 7, 16), "mse"),
        (lambda: torch.ones(4, 3, dtype=torch.int64), "mse"),
    ],
)
def test_kind_of_output_is_seen_from_its_values(make: Callable[[], Any], kind: str) -> None:
    torch.manual_seed(0)
    assert kind_of(make()) == kind


def test_class_axis_is_the_shorter_one() -> None:
    shapes = [(2, 3), (2, 4, 8, 9), (2, 8, 9, 4), (2, 8, 9), (2, 8, 1), (2,)]
    assert [class_axis(torch.zeros(shape)) for shape in shapes] == [1, 1, 3, 2, None, None]


def test_three_axes_are_features_unless_they_are_a_distribution() -> None:
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    assert [kind_of(x) for x in (scores, scores.softmax(2))] == ["mse", "kl"]


def test_distribution_sums_to_one() -> None:
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    assert [is_distribution(x, 1) for x in (scores.softmax(1), scores, scores.sigmoid())] == [True, False, False]


def test_schedule_rises_and_falls() -> None:
    rates = [cosine(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == 1.0
    assert 0.0 < rates[-1] < 1e-3


def test_augmentation_moves_images_and_label_maps_alike() -> None:
    x = np.arange(6 * 25, dtype=np.float32).reshape(6, 1, 5, 5) + 1
    batch: Weights = {"x": x, LABELS: x[:, 0].astype(np.int64)}
    result = augment(batch, {"x"}, Augmentation(flip=True, shift=2), np.random.default_rng(0))
    moved, labels = result["x"][:, 0], result[LABELS]
    assert not np.array_equal(moved, x[:, 0])
    assert np.array_equal(labels == 255, moved == 0)
    assert np.array_equal(moved[moved > 0], labels[moved > 0])
    assert all(set(a[a > 0]) <= set(b.ravel()) for a, b in zip(moved, x[:, 0], strict=True))
    assert np.array_equal(batch["x"], x)


def test_a_crop_shows_the_same_part_of_images_and_label_maps() -> None:
    """The value of a pixel is its place, so that the part that is shown can be read from it."""
    size, least = 32, 0.25
    places = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"))
    x = np.repeat(places[None].astype(np.float32), 64, axis=0)
    batch: Weights = {"x": x, LABELS: np.repeat(places[:1].astype(np.int64), 64, axis=0)}
    result = augment(batch, {"x"}, Augmentation(crop=least), np.random.default_rng(0))
    shown, labels = result["x"], result[LABELS]
    assert shown.shape == x.shape
    assert labels.dtype == np.int64
    assert np.abs(shown[:, 0] - labels).max() <= 0.5 + 1e-3
    extents = [np.ptp(shown[:, axis], axis=(1, 2)) / (size - 1) for axis in (0, 1)]
    areas = extents[0] * extents[1]
    assert areas.min() > least * 0.8
    assert np.ptp(areas) > 0.4
    assert (extents[0] <= 1 + 1e-6).all()
    again = augment(batch, {"x"}, Augmentation(crop=least), np.random.default_rng(0))
    assert np.array_equal(shown, again["x"])


def test_weights_of_three_dimensional_convolutions_are_trained() -> None:
    model = from_text(
        "(float[N, 2, 4, 4, 4] x, float[3, 2, 3, 3, 3] v, float[3, 4] w) => (float[N, 4] y) "
        "{ h = Conv <pads = [1, 1, 1, 1, 1, 1]> (x, v) r = Relu (h) p = GlobalAveragePool (r) f = Flatten (p) "
        "y = MatMul (f, w) }"
    )
    data = ArraySource({"x": np.random.default_rng(0).standard_normal((32, 2, 4, 4, 4)).astype(np.float32)})
    student = write_weights(model, {"v": 0.5 * read_weights(model)["v"]})
    result = distill(model, student, data, replace(FAST, steps=20))
    assert "v" in result.values
    assert result.losses[-1] < result.losses[0]


def test_an_output_without_elements_is_not_compared() -> None:
    model = from_text(
        "(float[N, 3] x, float[3, 4] w) => (float[N, 4] y, float[0, 4] z) "
        "{ y = MatMul (x, w) z = Slice (y, starts, starts, axes) }"
        .replace("float[3, 4] w)", "float[3, 4] w, int64[1] starts, int64[1] axes)"),
        values={"starts": [0], "axes": [0]},
    )  # fmt: skip  # a model
    data = ArraySource({"x": np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)})
    student = write_weights(model, {"w": 0.5 * read_weights(model)["w"]})
    result = distill(model, student, data, replace(FAST, steps=10))
    assert np.isfinite(result.losses).all()
    assert result.losses[-1] < result.losses[0]
