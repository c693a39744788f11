"""Pipelines: text and objects, options, what passes need of one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cpd_onnx as cpd
from cpd_onnx.data.sources import ArraySource, open_source
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.comb import Comb
from cpd_onnx.passes.prune import Prune
from cpd_onnx.passes.score import Score
from cpd_onnx.passes.verify import Verify
from cpd_onnx.pipeline.pipeline import PASSES, make, parse
from cpd_onnx.proof.files import verify_files
from tests.rules.test_rules import model_of

TEXT = "comb, score{kind='l1'}, allocate{macs=0.5}, prune, verify"
OPTIONS = st.dictionaries(
    st.sampled_from(["a", "b", "c_d"]),
    st.one_of(
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.none(),
        st.sampled_from(["", "x, y", "'"]),
        st.tuples(st.integers()),
    ),
)


@given(st.lists(st.tuples(st.sampled_from(PASSES), OPTIONS), max_size=5))
def test_text_says_what_it_was_made_from(steps: list[tuple[str, Mapping[str, Any]]]) -> None:
    text = ", ".join(f"{name}{{{', '.join(f'{k}={v!r}' for k, v in options.items())}}}" for name, options in steps)
    assert parse(text) == steps


@pytest.mark.parametrize(
    "text",
    [
        "comb score",
        "comb{",
        "comb{kind}",
        "comb{kind=name}",
        "comb{1}",
        "comb{**{}}",
        "; comb",
        "comb,,score",
        "comb{a=__import__('os')}",
    ],
)
def test_what_is_no_pipeline_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"options|not a pipeline"):
        parse(text)


def test_unknown_passes_and_options_are_named() -> None:
    with pytest.raises(ValueError, match="unknown pass 'brush'"):
        make("brush", {})
    with pytest.raises(ValueError, match="pass 'score' has no option 'sort': it has kind, seed"):
        make("score", {"sort": 1})


@pytest.mark.parametrize("name", [p for p in PASSES if p != "distill"])
def test_passes_are_frozen_dataclasses_under_their_name(name: str) -> None:
    step = make(name, {})
    assert step.name == name
    assert dataclasses.is_dataclass(step)
    assert all(field.name != "name" for field in dataclasses.fields(step))
    with pytest.raises(AttributeError):
        step.name = "other"  # type: ignore[misc]  # that it is refused is the point


def test_text_and_objects_do_the_same() -> None:
    model = model_of("conv")
    steps = [Comb(), Score("l1"), Allocate(macs=0.5), Prune(), Verify()]
    written, made = cpd.run(TEXT, model), cpd.run(steps, model)
    assert written.model.serialize() == made.model.serialize()
    assert written.plan is not None
    assert made.plan is not None
    assert written.plan.content == made.plan.content


def test_model_may_come_in_any_form(tmp_path: Path) -> None:
    model = model_of("conv")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    sizes = {
        frozenset((t.name, tuple(t.dims)) for t in cpd.run(TEXT, source).model.graph.initializer)
        for source in (path, str(path), model, cpd.load(path), gs.import_onnx(model))
    }
    assert len(sizes) == 1


def test_the_source_is_not_changed() -> None:
    model = model_of("conv")
    before = model.SerializeToString()
    state = cpd.run(TEXT, model)
    assert model.SerializeToString() == before
    assert state.original.serialize() == before


def test_a_state_can_be_taken_further() -> None:
    model = model_of("conv")
    combed = cpd.run("comb, score{kind='l1'}", model)
    assert combed.plan is None
    further = cpd.run("allocate{macs=0.5}, prune, verify", combed)
    assert further.model.serialize() == cpd.run(TEXT, model).model.serialize()


@pytest.mark.parametrize(
    ("text", "first", "order"),
    [
        ("score", "comb", "comb, score"),
        ("comb, allocate", "score", "comb, score, allocate"),
        ("comb, score, prune", "allocate", "comb, score, allocate, prune"),
        ("verify", "comb", "comb, score, allocate, prune, verify"),
        ("prune, allocate, score, comb", "comb", "comb, score, allocate, prune"),
        ("comb, score, allocate, verify, prune", "prune", "comb, score, allocate, prune, verify"),
        ("comb, allocate, sensitivity, prune", "sensitivity", "comb, sensitivity, allocate, prune"),
        ("fold, comb, score, allocate, repair", "prune", "fold, comb, score, allocate, prune, repair"),
        ("distill, repair, iterate", "iterate", "distill, iterate, repair"),
    ],
)
def test_a_wrong_order_is_refused_before_the_model_is_opened(text: str, first: str, order: str) -> None:
    """The order that is named works."""
    with pytest.raises(ValueError, match=f"run the pass '{first}' first: .*; in order: {order}$"):
        cpd.run(text, "no such file.onnx")
    with pytest.raises(ValueError, match=f"run the pass '{first}' first: .*; in order: {order}$"):
        cpd.run([make(name, {}) for name, _ in parse(text)], "no such file.onnx")
    with pytest.raises(cpd.ModelError, match="no such file"):
        cpd.run(order, "no such file.onnx")


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_alone_names_the_one_that_is_missing(name: str) -> None:
    """What a pass says that it requires is what it asks for, of the pass that provides it."""
    step, model = make(name, {}), cpd.load(model_of("conv"))
    data = ArraySource({"x": np.zeros((2, 3, 8, 8), np.float32)})
    there: dict[str, Any] = {}
    for attribute in getattr(step, "requires", ()):
        if name == "verify" and attribute == "plan":
            continue  # by itself it takes models that were pruned without one
        if name == "repair" and attribute == "plan":
            continue
        maker = next(other for other in PASSES if attribute in made_by(other))
        with pytest.raises(ValueError, match=f"run the pass '{maker}' first: it makes '{attribute}'"):
            step(cpd.State(model, model, data=data, **there))
        there[attribute] = ()


def made_by(name: str) -> tuple[str, ...]:
    provided: tuple[str, ...] = make(name, {}).provides  # type: ignore[attr-defined]
    return provided


def test_what_a_pass_says_that_it_provides_is_there() -> None:
    state = cpd.State(model := cpd.load(model_of("conv")), model)
    for step in (make(name, {}) for name in ("fold", "comb", "score", "allocate", "prune", "verify")):
        for attribute in made_by(step.name):
            assert not getattr(state, attribute) or attribute == "folded"
        state = step(state)
        assert all(getattr(state, attribute) for attribute in made_by(step.name))


def test_what_a_state_has_counts_as_provided() -> None:
    scored = cpd.run("comb, score", model_of("conv"))
    with pytest.raises(ValueError, match=r"run the pass 'allocate' first: .*; in order: allocate, prune$"):
        cpd.run("prune", scored)
    assert cpd.run("allocate, prune", scored).plan is not None


@dataclasses.dataclass(frozen=True)
class Silent:
    """A pass of a user's own that says nothing of what it makes: even scores."""

    name: ClassVar[str] = "silent"

    def __call__(self, state: cpd.State) -> cpd.State:
        assert state.combed is not None
        return dataclasses.replace(state, scores=[np.arange(len(g), dtype=float) for g in state.combed.groups])


@dataclasses.dataclass(frozen=True)
class Spoken(Silent):
    """The same, which says it."""

    name: ClassVar[str] = "spoken"
    requires: ClassVar[tuple[str, ...]] = ("combed",)
    provides: ClassVar[tuple[str, ...]] = ("scores",)


@dataclasses.dataclass(frozen=True)
class Asking(Silent):
    """One that wants what nobody makes."""

    name: ClassVar[str] = "asking"
    requires: ClassVar[tuple[str, ...]] = ("data",)
    provides: ClassVar[tuple[str, ...]] = ("scores",)


def test_passes_of_ones_own_need_not_say_what_they_make() -> None:
    model = model_of("conv")
    silent, spoken = (cpd.run([Comb(), own, Allocate(), Prune(), Verify()], model) for own in (Silent(), Spoken()))
    assert silent.model.serialize() == spoken.model.serialize()
    with pytest.raises(ValueError, match=r"run the pass 'allocate' first: it makes 'allocation'$"):
        cpd.run([Comb(), Silent(), Prune()], model)
    with pytest.raises(ValueError, match=r"run the pass 'comb' first: .*; in order: comb, spoken, allocate$"):
        cpd.run([Spoken(), Allocate()], model)
    with pytest.raises(ValueError, match="pass 'asking' needs 'data', which no pass provides"):
        cpd.run([Comb(), Asking(), Allocate()], model)
    asked = cpd.run([Comb(), Asking(), Allocate()], model, data=ArraySource({"x": np.zeros((2, 3, 8, 8), np.float32)}))
    assert asked.allocation is not None
    combed = cpd.run([Comb()], model)  # data may also come with a state that has none
    data = ArraySource({"x": np.zeros((2, 3, 8, 8), np.float32)})
    assert cpd.run([Asking(), Allocate()], combed, data=data).allocation is not None


def test_one_target_at_most() -> None:
    with pytest.raises(cpd.TargetError, match="one target"):
        cpd.run("comb, score, allocate{macs=0.5, params=0.5}", model_of("conv"))


def test_observers_see_each_pass_start_and_end() -> None:
    seen: list[tuple[str, str]] = []
    cpd.run("comb, score", model_of("conv"), observer=lambda name, when: seen.append((name, when)))
    assert seen == [("comb", "start"), ("comb", "end"), ("score", "start"), ("score", "end")]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    state = cpd.run(TEXT, model_of("conv"))
    state.save(tmp_path / "small.onnx")
    before = (tmp_path / "small.onnx").read_bytes()
    with pytest.raises(cpd.ModelError, match="exists"):
        cpd.run("comb", model_of("conv")).save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").read_bytes() == before


def test_distillation_is_a_pass() -> None:
    pytest.importorskip("torch")
    folder = Path(__file__).parents[2] / "models"
    source = open_source(folder / "digits_train.npz", onnx.load(folder / "digits.onnx"))
    assert isinstance(source, ArraySource)
    few = ArraySource({name: array[:128] for name, array in source.arrays.items()})
    text = "comb, score, allocate{macs=0.5}, prune, verify, distill{steps=20, lr=0.003}"
    state = cpd.run(text, folder / "digits.onnx", data=few)
    assert state.distilled is not None
    assert state.distilled["steps"] == 20
    assert state.distilled["last_loss"] < state.distilled["first_loss"]
    assert state.plan is not None
    assert len(verify_files(state.original, state.model, state.plan).trained) > 20


def test_distillation_needs_data() -> None:
    pytest.importorskip("torch")
    with pytest.raises(cpd.DataError, match="needs data"):
        cpd.run("comb, score, allocate, prune, distill", model_of("conv"))
