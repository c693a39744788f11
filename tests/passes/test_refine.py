"""Refine: allocations are compared at the outputs, on samples that nothing is fitted to."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cpd_onnx.budget.allocation import Allocation, Budget, LossCurves
from cpd_onnx.budget.choosing import Chooser
from cpd_onnx.budget.targets import OF_THE_ORIGINAL, Asked
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import Costs
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.errors import TargetError
from cpd_onnx.fitting.divergence import Divergence, is_nearer
from cpd_onnx.io import progress
from cpd_onnx.io.progress import ProgressEvent, reporting
from cpd_onnx.ir.model import Model, load
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.comb import Comb
from cpd_onnx.passes.fold import Fold
from cpd_onnx.passes.iterate import Iterate
from cpd_onnx.passes.refine import Refined, RefineOptions, _next_exponent, refined
from cpd_onnx.passes.score import Score
from cpd_onnx.pipeline.state import State
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.scores.registry import Scores, score
from tests.support.models import from_text

WIDTH = 24
FAINT = 0.02
"""Factor of the branch that hardly matters to the outputs."""


def model_of(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    return load(proto)


def two_branches() -> Model:
    """Two branches of the same kind, of which the outputs hear one a fiftieth as loud as the other."""
    rng = np.random.default_rng(3)
    text = """branches (float[N, 16] x) => (float[N, 8] y) {
        a = MatMul(x, up_a) ra = Relu(a) la = MatMul(ra, down_a) oa = Tanh(la)
        b = MatMul(x, up_b) rb = Relu(b) lb = MatMul(rb, down_b) ob = Tanh(lb)
        fb = Mul(ob, faint) y = Add(oa, fb)
    }"""
    sizes = {"up_a": (16, WIDTH), "down_a": (WIDTH, 8), "up_b": (16, WIDTH), "down_b": (WIDTH, 8)}
    weights = {name: rng.normal(size=size) for name, size in sizes.items()}
    return model_of(text, faint=np.array(FAINT), **weights)


def samples(count: int, seed: int = 0) -> ArraySource:
    return ArraySource({"x": np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)})


def scores_of(combed: Combed) -> list[Scores]:
    return score(combed, "reconstruction", samples=128, data=samples(128))


def chosen_by(effort: int) -> tuple[Refined, dict[str, int]]:
    combed = comb(two_branches())
    scores, chooser = scores_of(combed), Chooser(Budget("macs", 0.6, "optimal"))
    choose = partial(chooser.quick, combed, scores, is_loss=True)
    found = refined(combed, scores, choose, samples(256), RefineOptions(effort), is_loss=True)
    removed = choose(curves=found.curves).removed
    return found, {group.name: len(gone) for group, gone in zip(combed.groups, removed, strict=True)}


def test_what_the_outputs_hardly_hear_is_pruned_more() -> None:
    _, by_scores = chosen_by(0)
    found, by_outputs = chosen_by(3)
    quiet = next(name for name in by_outputs if "up_b" in name)
    assert found.curves is not None
    assert found.after < found.before / 2
    assert by_outputs[quiet] > by_scores[quiet]


def test_effort_is_the_number_of_allocations_and_none_compares_none() -> None:
    assert chosen_by(0)[0].tried == 0
    assert chosen_by(1)[0].notes == ()
    few, many = (chosen_by(effort)[0] for effort in (2, 6))
    assert few.tried == 2
    assert 2 <= many.tried <= 6
    assert many.after <= few.after
    assert f"{many.tried} allocations" in many.notes[0]


def test_the_same_samples_choose_the_same_channels() -> None:
    first, second = (chosen_by(6) for _ in range(2))
    assert first[1] == second[1]
    assert (first[0].before, first[0].after) == (second[0].before, second[0].after)


def test_a_source_that_cannot_be_divided_leaves_the_choice_to_the_scores() -> None:
    class Stream:
        count = None

        def batches(self, size: int, *, seed: int | None = None):  # as a source
            return samples(64).batches(size)

    combed = comb(two_branches())
    scores = scores_of(combed)
    choose = partial(Chooser(Budget("macs", 0.6, "optimal")).quick, combed, scores, is_loss=True)
    found = refined(combed, scores, choose, Stream(), RefineOptions(4), is_loss=True)
    assert (found.curves, found.tried) == (None, 0)


def test_a_run_compares_reports_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)  # each step is reported, however fast it is
    events: list[ProgressEvent] = []
    model = two_branches()
    step = Iterate(macs=0.6, effort=3, samples=64, repair_samples=64)
    with reporting(events.append):
        state = step(State(model, model, data=samples(256)))
    assert any("allocations were repaired and compared" in note for note in state.need("allocation", "iterate").notes)
    assert any("refine" in event.name and "divergence" in event.detail for event in events)


@pytest.mark.parametrize("effort", [1, 4])
def test_a_target_beyond_the_smallest_widths_is_met_without_a_branch(effort: int) -> None:
    """One channel of each branch is 0.042 of the MACs."""
    model = two_branches()
    state = State(model, model, data=samples(256))
    few = {"macs": 0.03, "effort": effort, "samples": 64, "repair_samples": 64}
    chosen = Iterate(**few)(state).need("allocation", "iterate")
    left = [len(group) - len(gone) for group, gone in zip(comb(model).groups, chosen.removed, strict=True)]
    assert sorted(left) == [0, 1]
    assert not chosen.is_nearest
    with pytest.raises(TargetError, match="cannot be reached"):
        Iterate(**few, depth=False)(state)
    step = Allocate(macs=0.03, policy="optimal", effort=effort)
    scored = Score("reconstruction", samples=64)(Comb()(Fold()(state)))
    left = [len(gone) for gone in step(scored).need("allocation", "allocate").removed]
    assert sorted(left) == [WIDTH - 1, WIDTH]


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [(0.8, 0.5, 0.5), (0.5, 0.4, 0.5), (0.2, 0.5, 0.2), (0.8, 0.79, 0.8), (None, 0.5, 0.5), (0.8, None, 0.8)],
)
def test_the_fallback_is_taken_where_it_alone_meets_the_target(
    first: float | None, second: float | None, taken: float
) -> None:
    """Both ways: one branch may be more than is to be removed, and the next less."""
    costs, curves, fallback = Costs(0, 0, 0, 0), LossCurves(()), LossCurves(())

    def choose(*, curves: LossCurves | None) -> Allocation:
        got = second if curves is fallback else first
        if got is None:
            raise TargetError("cannot be reached")
        return Allocation([], costs, costs, asked=(Asked("latency", 0.5, got, OF_THE_ORIGINAL, got <= 0.52),))

    found = Refined(curves, fallback=fallback)
    assert found.chosen(choose).asked[0].got == taken
    if first is not None:
        assert found.chosen(choose, lambda _: False).asked[0].got == first


def test_allocations_that_meet_the_target_are_compared_with_the_first_of_them() -> None:
    combed = comb(two_branches())
    scores = scores_of(combed)
    choose = partial(Chooser(Budget("macs", 0.03, "optimal")).quick, combed, scores, is_loss=True)
    found = refined(combed, scores, choose, samples(256), RefineOptions(4), is_loss=True)
    assert found.curves is not None
    assert np.isfinite(found.curves.whole).all()
    assert found.after <= found.before


def test_the_divergence_of_classes_is_that_of_kullback_and_leibler() -> None:
    rng = np.random.default_rng(0)
    head = rng.normal(size=(16, 5))
    text = "classes (float[N, 16] x) => (float[N, 5] logits) { logits = MatMul(x, head) }"
    soft = "classes (float[N, 16] x) => (float[N, 5] probs) { logits = MatMul(x, head) probs = Softmax <axis = 1> (logits) }"
    other = head + 0.1 * rng.normal(size=head.shape)
    data = samples(40)
    found = [Divergence(model_of(t, head=head), data, 40)(model_of(t, head=other)) for t in (text, soft)]
    x = np.concatenate([batch["x"] for batch in data.batches(40)]).astype(np.float64)
    first, second = (x @ h - np.log(np.exp(x @ h).sum(1, keepdims=True)) for h in (head, other))
    wanted = (np.exp(first) * (first - second)).sum(1)
    assert found[0].mean() == pytest.approx(wanted.mean(), rel=1e-3)
    assert found[1] == pytest.approx(found[0], rel=1e-2, abs=1e-5)
    assert Divergence(model_of(text, head=head), data, 40)(model_of(text, head=head)) == pytest.approx(0, abs=1e-9)


def test_numbers_diverge_by_their_squared_error() -> None:
    rng = np.random.default_rng(0)
    text, head = (
        "numbers (float[N, 16] x) => (float[N, 4] coords) { coords = MatMul(x, head) }",
        rng.normal(size=(16, 4)),
    )
    first, second = (model_of(text, head=weight) for weight in (head, head + 0.2))
    measure = Divergence(first, samples(64), 64)
    made = [np.concatenate([execute(open_model(each), feed)[0] for feed in measure.feeds]) for each in (first, second)]
    assert len(measure(second)) == 64
    assert measure(second).mean() == pytest.approx(np.square(made[0] - made[1]).mean() / made[0].var(), rel=1e-4)


def test_outputs_whose_size_depends_on_the_data_are_compared_sample_by_sample_too() -> None:
    text = """sizes (float[N, 16] x) => (float[N, 4] coords, float[K] found) {
        coords = MatMul(x, head) flat = Reshape(coords, minus) is = Greater(flat, bound) found = Compress <axis = 0> (flat, is)
    }"""
    head = np.random.default_rng(0).normal(size=(16, 4))
    first, second, third = (
        model_of(text, head=weight, bound=np.array(0.0)) for weight in (head, head + 0.2, head + 0.1)
    )
    for model in (first, second, third):
        model.proto.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "minus"))
    models = [load(model.proto) for model in (first, second, third)]
    measure = Divergence(models[0], samples(64), 64)
    near, far = measure(models[2]), measure(models[1])
    assert len(near) == len(far) == len(measure(models[0]))
    assert near.mean() < far.mean()


def test_an_output_without_elements_does_not_count() -> None:
    text = "(float[N, 6] x, float[6, 4] w, int64[1] none) => (float[N, 4] y, float[0, 4] z) "
    body = "{ y = MatMul (x, w) z = Slice (y, none, none, none) }"
    first, other = (
        load(from_text(text + body, values={"none": [0], "w": np.full((6, 4), size) * np.arange(4)})) for size in (1, 2)
    )
    source = ArraySource({"x": np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)})
    found = Divergence(first, source, 16)(other)
    assert np.isfinite(found).all()
    assert found.mean() > 0.01


def test_a_model_of_integer_outputs_is_not_compared() -> None:
    text = "best (float[N, 16] x) => (int64[N] y) { a = MatMul(x, up) r = Relu(a) l = MatMul(r, down) y = ArgMax <axis = 1, keepdims = 0> (l) }"
    rng = np.random.default_rng(0)
    combed = comb(model_of(text, up=rng.normal(size=(16, 12)), down=rng.normal(size=(12, 5))))
    scores = scores_of(combed)
    choose = partial(Chooser(Budget("macs", 0.6, "optimal")).quick, combed, scores, is_loss=True)
    found = refined(combed, scores, choose, samples(256), RefineOptions(4), is_loss=True)
    assert (found.curves, found.tried, found.notes) == (None, 0, ())


@pytest.mark.parametrize(
    ("best", "wanted"), [(2.3, [1, 2, 4, 3, 2.5, 2.75, 2.25]), (0, [1, 0.5, 0.25]), (9, [1, 2, 4, 3, 3.5, 3.75])]
)
def test_the_exponent_is_searched_until_its_neighbours_are_near(best: float, wanted: list[float]) -> None:
    """The largest is doubled while it is the best, up to 4; then the gaps beside the best are halved."""
    found, tried = {0.0: best**2}, []
    while (exponent := _next_exponent(found)) is not None:
        tried.append(exponent)
        found[exponent] = (exponent - best) ** 2
    assert tried == wanted


def test_a_difference_within_chance_does_not_count() -> None:
    rng = np.random.default_rng(0)
    first, noise = rng.random(100), rng.normal(size=100)
    assert is_nearer(first, first + 0.1 + 0.01 * noise)
    assert not is_nearer(first, first + 0.01 + noise)
    assert not is_nearer(first, first - 0.1)
    assert not is_nearer(np.full(3, np.nan), first[:3])
    assert is_nearer(first[:3], np.full(3, np.inf))
