"""Agreement with the original, told from the outputs, and its bounds."""

from __future__ import annotations

from itertools import repeat

import numpy as np
import pytest

import cpd_onnx as cpd
from cpd_onnx.data.agreement import Agreement, _most_lost, _tallies, agreement, bounded_bounds, exact_low
from cpd_onnx.data.held_out import at_most, divide
from cpd_onnx.data.metrics import open_session, run
from cpd_onnx.data.sources import LABELS, ArraySource, FunctionSource, Input
from cpd_onnx.errors import DataError
from cpd_onnx.ir.model import Model
from cpd_onnx.report.verdict import agreement_text
from cpd_onnx.workflow.quality.samples import agreement_on, samples_of
from tests.support.models import from_text

_RNG = np.random.default_rng(0)


def _model(body: str, inputs: str, outputs: str, **weights: np.ndarray) -> Model:
    stored = "".join(f", float[{','.join(map(str, array.shape))}] {name}" for name, array in weights.items())
    return cpd.load(from_text(f"({inputs}{stored}) => ({outputs}) {{ {body} }}", values=weights))


def _matrix(weight: np.ndarray, tail: str = "Identity") -> Model:
    rows, columns = weight.shape
    return _model(
        f"h = MatMul(x, w) y = {tail}(h)", f"float[N,{rows}] x", f"float[N,{columns}] y", w=weight.astype(np.float32)
    )


def _found(first: Model, second: Model, x: np.ndarray, task: str | None = None) -> Agreement:
    found = agreement(first, second, ArraySource({"x": x.astype(np.float32)}), task)
    assert found is not None
    return found


def test_class_scores_agree_where_the_largest_is_the_same() -> None:
    weight = _RNG.standard_normal((8, 5))
    changed = weight.copy()
    changed[:, 0] = -9
    x = _RNG.standard_normal((200, 8))
    wanted, given = (x @ weight).argmax(1), (x @ changed).argmax(1)
    found = _found(_matrix(weight), _matrix(changed), x)
    assert (found.task, found.samples) == ("classification", 200)
    assert found.value == pytest.approx(float((wanted == given).mean()), abs=0.011)
    assert found.low == pytest.approx(exact_low(found.value * 200, 200))
    assert found.chance == pytest.approx(np.bincount(wanted).max() / 200, abs=0.011)


def test_probabilities_embeddings_and_coordinates_are_told_apart() -> None:
    weight, x = _RNG.standard_normal((8, 5)), _RNG.standard_normal((64, 8))
    soft = _matrix(weight, "Softmax")
    assert _found(soft, soft, x).task == "classification"
    wide = _matrix(_RNG.standard_normal((8, 256)))
    assert _found(wide, wide, x).task == "embedding"
    shifted = _model(
        "h = MatMul(x, w) y = Add(h, b)",
        "float[N,8] x",
        "float[N,10] y",
        w=np.full((8, 10), 0.01, np.float32),
        b=np.arange(10, dtype=np.float32),
    )
    assert _found(shifted, shifted, x).task == "regression"
    assert _found(shifted, shifted, x, "classification").task == "classification"


@pytest.mark.parametrize(("columns", "task"), [(4, "regression"), (2, "classification")])
def test_beside_probabilities_numbers_of_another_length_are_no_scores(columns: int, task: str) -> None:
    weights = {
        "w": _RNG.standard_normal((8, columns)).astype(np.float32),
        "v": _RNG.standard_normal((8, 2)).astype(np.float32),
    }
    body = "y = MatMul(x, w) h = MatMul(x, v) p = Softmax(h)"
    faces = _model(body, "float[N,8] x", f"float[N,{columns}] y, float[N,2] p", **weights)
    source = ArraySource({"x": _RNG.standard_normal((64, 8)).astype(np.float32)})
    tallies = {tally.output: tally.task for tally in _tallies(open_session(faces.complete_proto()), source, 16, None)}
    assert tallies == {"y": task, "p": "classification"}
    maps = _model("y = Conv(x, w) h = Conv(x, v) p = Softmax<axis = 1>(h)", "float[N,3,9,9] x", "float[A,B,C,D] y, float[E,F,G,H] p",
                  w=_RNG.standard_normal((columns, 3, 1, 1)), v=_RNG.standard_normal((2, 3, 1, 1)))  # fmt: skip  # text and numbers
    source = ArraySource({"x": _RNG.standard_normal((64, 3, 9, 9)).astype(np.float32)})
    tallies = {tally.output: tally.task for tally in _tallies(open_session(maps.complete_proto()), source, 16, None)}
    assert tallies == {"y": {"regression": "regression"}.get(task, "segmentation"), "p": "segmentation"}


def test_outputs_with_one_answer_for_all_samples_are_named() -> None:
    weights = {"w": _RNG.standard_normal((8, 4)), "v": 0.01 * _RNG.standard_normal((8, 2)), "b": np.array([9.0, 0.0])}
    body = "y = MatMul(x, w) h = MatMul(x, v) s = Add(h, b) p = Softmax(s)"
    model = _model(body, "float[N,8] x", "float[N,4] y, float[N,2] p", **weights)
    changed = _model(body, "float[N,8] x", "float[N,4] y, float[N,2] p", **weights | {"w": 0.9 * weights["w"]})
    found = _found(model, changed, _RNG.standard_normal((64, 8)))
    assert (found.output, found.uniform) == ("y", ("p",))


@pytest.mark.parametrize("count", [48, 40, 5])
@pytest.mark.parametrize("shape", ["L,N,6", "L,M,6", ""])
def test_sequences_with_the_steps_first_are_counted_by_sample(shape: str, count: int) -> None:
    weight, x = _RNG.standard_normal((8, 6)), _RNG.standard_normal((count, 16, 8))
    models = [
        _model(
            "a = MatMul(x, w) logits = Transpose <perm = [1, 0, 2]> (a)",
            "float[N, 16, 8] x",
            f"float[{shape}] logits" if shape else "float logits",
            w=each.astype(np.float32),
        )
        for each in (weight, weight + 0.5 * _RNG.standard_normal(weight.shape))
    ]
    found = _found(*models, x)
    same = [(x @ each.array("w")).argmax(2) for each in models]
    assert (found.task, found.samples) == ("language", count)
    assert found.value == pytest.approx(float((same[0] == same[1]).mean()), abs=0.01)


def test_a_padded_batch_is_cut_along_the_axis_of_the_samples() -> None:
    model = _model("y = Transpose <perm = [1, 0, 2]> (x)", "float[4, 3, 2] x", "float[3, 4, 2] y")
    x = _RNG.standard_normal((2, 3, 2)).astype(np.float32)
    assert np.array_equal(run(open_session(model.complete_proto()), {"x": x})[0], x.swapaxes(0, 1))


def test_maps_are_compared_pixel_by_pixel() -> None:
    x = _RNG.standard_normal((12, 3, 16, 16)).astype(np.float32)
    kernel = _RNG.standard_normal((5, 3, 1, 1)).astype(np.float32)
    halved = kernel.copy()
    halved[:2] = 0
    first, second = (
        _model("y = Conv(x, w)", "float[N,3,16,16] x", "float[N,5,16,16] y", w=w) for w in (kernel, halved)
    )
    found = _found(first, second, x)
    wanted, given = (np.einsum("nchw,kc->nkhw", x, w[:, :, 0, 0]).argmax(1) for w in (kernel, halved))
    assert (found.task, found.interval) == ("segmentation", "betting")
    assert found.value == pytest.approx(float((wanted == given).mean()), abs=1e-3)
    assert found.low < found.value


def test_numbers_agree_by_the_variance_that_is_explained() -> None:
    x = _RNG.standard_normal((100, 4))
    first = _matrix(np.eye(4)[:, :1])
    assert _found(first, first, x).value == 1
    assert _found(first, _matrix(0 * np.eye(4)[:, :1]), x).value < 0.6


def test_a_constant_answer_is_near_chance() -> None:
    weight, x = _RNG.standard_normal((8, 5)), _RNG.standard_normal((200, 8))
    assert _found(_matrix(weight), _matrix(0 * weight), x).is_near_chance
    assert not _found(_matrix(weight), _matrix(weight), x).is_near_chance


def test_of_several_maps_the_one_that_agrees_least_counts_and_is_named() -> None:
    """The rare class of the first map makes its chance high, which says nothing of the second."""
    x = _RNG.standard_normal((12, 3, 16, 16)).astype(np.float32)
    rare = np.zeros((2, 3, 1, 1), np.float32)
    rare[0, 0], rare[1, 1] = 1, 0.2
    common = _RNG.standard_normal((3, 3, 1, 1)).astype(np.float32)

    def model(first: np.ndarray, second: np.ndarray) -> Model:
        bias = np.array([3, 0], np.float32)
        body, outputs = "a = Conv(x, v, b) y = Conv(x, w)", "float[N,2,16,16] a, float[N,3,16,16] y"
        return _model(body, "float[N,3,16,16] x", outputs, v=first, b=bias, w=second)

    original = model(rare, common)
    found = _found(original, model(rare, common + 0.2 * np.float32(_RNG.standard_normal(common.shape))), x)
    assert (found.output, found.outputs) == ("y", 2)
    assert "output 'y', the worst of 2" in agreement_text(found.as_json())
    blind = _found(original, model(0 * rare, common), x)
    assert (blind.output, blind.is_near_chance) == ("a", True)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(DataError, match="choose one of classification"):
        _found(_matrix(np.eye(4)), _matrix(np.eye(4)), np.zeros((4, 4)), "poetry")


@pytest.mark.parametrize(("right", "count", "low"), [(512, 512, 0.9942), (0, 10, 0.0), (10, 10, 0.7411)])
def test_the_exact_bound_is_that_of_clopper_and_pearson(right: int, count: int, low: float) -> None:
    assert exact_low(right, count) == pytest.approx(low, abs=1e-4)


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    holds = [exact_low(float((rng.random(200) < 0.9).sum()), 200) <= 0.9 for _ in range(400)]
    assert np.mean(holds) >= 0.93


@pytest.mark.parametrize("count", [10, 40, 200])
def test_the_bound_of_values_holds_as_often_as_it_says_though_few_of_them_are_low(count: int) -> None:
    """One in ten samples is far worse than the others, which a bootstrap of ten samples often does not see."""
    rng = np.random.default_rng(count)
    mean, missed, lows = 0.9 * 0.98 + 0.1 * 0.5, 0, []
    for _ in range(400):
        low, high = bounded_bounds(np.where(rng.random(count) < 0.1, 0.5, 0.98))
        missed += low > mean
        lows.append(low)
        assert low <= high
    assert missed <= 0.05 * 400 + 10
    assert mean - np.mean(lows) < 3.5 / count**0.5 * 0.5


def test_the_bound_of_values_is_near_if_they_are_alike() -> None:
    low, high = bounded_bounds(np.full(300, 0.98))
    assert 0.96 < low < 0.98 < high < 1
    assert bounded_bounds(np.full(20, 0.98))[0] == pytest.approx(0.83, abs=0.005)
    low, _ = bounded_bounds(np.full(300, 0.98), -1.0)
    assert 0.95 < low < 0.98
    assert bounded_bounds(np.ones(20))[0] == pytest.approx(exact_low(20, 20), abs=0.05)


def test_the_bound_by_margins_holds_and_is_lower_than_that_of_counts_of_few_samples() -> None:
    rng = np.random.default_rng(0)
    spread, repeats, count = 0.35, 60, 67

    def leads(number: int) -> np.ndarray:
        return np.abs(rng.normal(size=number)) + 0.2

    true = float((rng.normal(scale=spread, size=200_000) > leads(200_000)).mean())
    bounds = [_most_lost(leads(count), rng.normal(scale=spread, size=count)) for _ in range(repeats)]
    assert np.mean([bound >= true for bound in bounds]) >= 0.85
    assert np.mean(bounds) < 1 - exact_low(round((1 - true) * count), count)
    assert _most_lost(leads(count), np.zeros(count)) == 0.0


def test_samples_are_held_out_at_random_and_only_once() -> None:
    source = ArraySource({"x": np.arange(100, dtype=np.float32)[:, None], LABELS: np.arange(100)})
    parts = divide(source, 0.2)
    assert parts is not None
    rows = [[int(v) for b in part.batches(7) for v in b["x"].ravel()] for part in (parts.first, parts.second)]
    assert (len(rows[0]), len(rows[1])) == (80, 20)
    assert sorted(rows[0] + rows[1]) == list(range(100))
    assert rows[1] != list(range(80, 100))
    again = divide(source, 0.2)
    assert again is not None
    assert [int(v) for b in again.second.batches(7) for v in b["x"].ravel()] == rows[1]
    halves = divide(parts.second, 0.5)
    assert halves is not None
    assert halves.first.count == halves.second.count == 10
    shuffled = [int(v) for b in parts.first.batches(7, seed=1) for v in b["x"].ravel()]
    assert sorted(shuffled) == sorted(rows[0])
    assert shuffled != rows[0]


def test_what_cannot_be_divided_is_not() -> None:
    source = ArraySource({"x": np.zeros((3, 1), np.float32)})
    assert divide(source, 0.1) is None
    feeds = FunctionSource(
        lambda: iter([{"x": np.zeros((1, 1), np.float32)}]), [Input("x", (None, 1), np.dtype("float32"))]
    )
    assert divide(feeds, 0.5) is None


def test_where_nothing_is_held_out_the_samples_to_measure_on_are_limited() -> None:
    feed = {"x": np.zeros((4, 1), np.float32)}
    endless = FunctionSource(lambda: repeat(feed), [Input("x", (None, 1), np.dtype("float32"))])
    assert sum(len(batch["x"]) for batch in at_most(endless, 10).batches(4)) == 12
    source = ArraySource({"x": np.arange(100, dtype=np.float32)[:, None]})
    assert at_most(source, 100) is source
    taken = [int(v) for batch in at_most(source, 10).batches(4) for v in batch["x"].ravel()]
    assert len(set(taken)) == 10
    assert taken != list(range(10))
    model = _matrix(np.ones((1, 2)))
    judged = samples_of(endless, None, 0.2, is_search=False)
    assert not judged.is_held_out
    assert agreement_on(model, model, judged, None) is not None
