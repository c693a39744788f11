"""The verdict of a run: what is said to be faster, as good, smaller and proved, and the exit code."""

from __future__ import annotations

from typing import Any

import pytest

from cpd_onnx.report.verdict import answers, asked_text, lines, verdict, verdict_of_many

_COSTS = {"before": {"macs": 100, "params": 80}, "after": {"macs": 50, "params": 40}}
_PROVED = {"verdict": "verified", "difference": 1e-7}


def _timing(ms: float, ratio: float, p90: float | None = None) -> dict[str, Any]:
    setting = {"provider": "CPUExecutionProvider", "threads": 1, "batch": None}
    return {"p50": ms, "p90": ms if p90 is None else p90, "ratio": ratio, "setting": setting}


def _content(ratio: float = 0.5, **more: Any) -> dict[str, Any]:
    timings = [_timing(2.0, 1.0), _timing(2.0 * ratio, ratio)]
    return {**_COSTS, "bench": {"timings": timings}, "verification": _PROVED, **more}


def _agreement(value: float, *, chance: float = 0.1, held_out: bool = True, samples: int = 512) -> dict[str, Any]:
    return {
        "task": "classification", "measure": "same answer", "value": value, "low": value - 0.02, "high": min(1.0, value + 0.02),
        "chance": chance, "samples": samples, "interval": "Clopper-Pearson",
        "confidence": 0.95, "is_held_out": held_out,
    }  # fmt: skip  # a table


def _labels(first: float, last: float, **more: Any) -> dict[str, Any]:
    return {"metric": "top1", "on": "labels", "samples": 500, "values": {"original": first, "pruned": last}} | more


@pytest.mark.parametrize(
    ("ratio", "answer", "code"), [(0.5, "yes", 0), (0.95, "yes", 0), (0.96, "no", 3), (1.4, "no", 3)]
)
def test_less_than_five_percent_faster_is_not_faster(ratio: float, answer: str, code: int) -> None:
    found = verdict(_content(ratio, agreement=_agreement(0.98), slow_because="narrow kernels"))
    assert (found["answers"][0]["answer"], found["code"]) == (answer, code)
    assert ("narrow kernels" in found["answers"][0]["text"]) == (code == 3)


def test_a_run_that_was_told_not_to_check_the_speed_does_not_fail_for_it() -> None:
    found = verdict(_content(1.4, agreement=_agreement(0.98), checks_speed=False))
    assert (found["answers"][0]["answer"], found["code"]) == ("no", 0)


def test_a_busy_machine_is_named() -> None:
    content = _content()
    content["bench"]["timings"][0]["p90"] = 4.0
    assert "busy" in answers(content)[0].text


@pytest.mark.parametrize(
    ("first", "last", "bound", "answer"),
    [
        (0.987, 0.058, None, "no"),
        (0.9, 0.86, None, "yes"),
        (0.9, 0.84, None, "no"),
        (0.9, 0.895, 0.01, "yes"),
        (0.9, 0.88, 0.01, "no"),
    ],
)
def test_labels_decide_whether_it_is_as_good(first: float, last: float, bound: float | None, answer: str) -> None:
    found = verdict(_content(accuracy=_labels(first, last), agreement=_agreement(0.999), max_loss=bound))
    assert found["answers"][1]["answer"] == answer
    assert found["code"] == (0 if answer == "yes" else 4)


def test_a_score_near_chance_is_a_failure_whatever_the_bound() -> None:
    found = verdict(_content(accuracy=_labels(0.9, 0.11, chance=0.1), max_loss=0.9))
    assert found["code"] == 4
    assert "near chance" in found["answers"][1]["text"]


@pytest.mark.parametrize(
    ("value", "chance", "answer"), [(0.98, 0.1, "yes"), (0.7, 0.1, "no"), (0.98, 0.979, "no"), (1.0, 1.0, "unknown")]
)
def test_without_labels_agreement_decides(value: float, chance: float, answer: str) -> None:
    assert verdict(_content(agreement=_agreement(value, chance=chance)))["answers"][1]["answer"] == answer


def test_agreement_on_samples_that_were_fitted_to_proves_nothing() -> None:
    found = verdict(_content(agreement=_agreement(0.99, held_out=False)))
    assert found["answers"][1]["answer"] == "unknown"
    assert "fitted" in found["answers"][1]["text"]


def test_agreement_names_its_bound() -> None:
    text = verdict(_content(agreement=_agreement(0.981)))["answers"][1]["text"]
    assert text.startswith("answers like the original on at least 96.1 % of such inputs (95 % confidence, n = 512)")


def test_a_blind_run_says_that_the_accuracy_is_probably_lost() -> None:
    found = verdict(_content(is_blind=True))
    assert found["answers"][1] == {
        "question": "as good",
        "answer": "unknown",
        "text": "without data, the accuracy is unknown and probably lost",
    }
    assert found["code"] == 0


def test_an_unbounded_run_reports_the_loss_but_does_not_fail() -> None:
    found = verdict(_content(agreement=_agreement(0.5), is_unbounded=True))
    assert (found["answers"][1]["answer"], found["code"]) == ("no", 0)


def test_a_missed_target_has_a_code_of_its_own_unless_the_loss_was_bounded() -> None:
    row = {"kind": "latency", "asked": 0.5, "got": 0.7, "unit": "of the original", "is_met": False}
    good = {"agreement": _agreement(0.98), "asked": [row]}
    found = verdict(_content(**good))
    assert found["code"] == 6
    assert list(lines(found))[-1] == "TARGET MISSED: latency: asked for 0.5, got 0.7 of the original"
    assert verdict(_content(**good, is_bounded=True))["code"] == 0
    assert asked_text({**row, "unit": "ms"}) == "latency: asked for 0.5, got 0.7 ms"


def test_the_gravest_answer_gives_the_code() -> None:
    wrong = {"verdict": "wrong", "difference": 1.0}
    assert verdict(_content(1.5, verification=wrong, agreement=_agreement(0.2)))["code"] == 5
    assert verdict(_content(1.5, agreement=_agreement(0.2)))["code"] == 4


@pytest.mark.parametrize(
    ("value", "low", "high", "samples"), [(1.0, 0.607, 1.0, 6), (5 / 6, 0.418, 0.991, 6), (0.93, 0.874, 0.966, 102)]
)
def test_few_samples_show_neither_that_it_is_as_good_nor_that_it_is_not(
    value: float, low: float, high: float, samples: int
) -> None:
    found = verdict(_content(agreement={**_agreement(value, samples=samples), "low": low, "high": high}))
    assert (found["answers"][1]["answer"], found["code"]) == ("unknown", 0)
    assert "more samples are needed" in found["answers"][1]["text"]


def test_top1_near_that_of_a_constant_answer_is_a_failure_without_a_recorded_chance() -> None:
    compared = _agreement(0.12, chance=0.1)
    found = verdict(_content(accuracy=_labels(0.9, 0.11), agreement=compared, max_loss=0.9))
    assert found["code"] == 4
    assert "near chance" in found["answers"][1]["text"]


def _judged(**ratios: float) -> dict[str, dict[str, Any]]:
    """Verdicts of models that take these fractions of the time; those below 0.5 are bad."""
    return {
        name: verdict(_content(ratio, agreement=_agreement(0.98 if ratio >= 0.5 else 0.3)))
        for name, ratio in ratios.items()
    }


@pytest.mark.parametrize(
    ("ratios", "code"),
    [({"a": 0.99, "b": 0.7, "c": 0.2}, 0), ({"a": 0.99, "b": 0.2}, 3), ({"a": 0.3, "b": 0.2}, 4), ({"a": 0.98}, 3)],
)
def test_several_models_are_a_success_if_one_is(ratios: dict[str, float], code: int) -> None:
    found = verdict_of_many(_judged(**ratios))
    assert found["code"] == code
    assert [entry["text"].split(",")[0] for entry in found["answers"]] == (["a"] if code else [])


def test_a_model_that_was_to_be_picked_decides() -> None:
    judged = _judged(a=0.99, b=0.7)
    assert verdict_of_many(judged, "a", 0.01)["code"] == 3
    assert verdict_of_many(judged, "b", 0.01)["code"] == 0
    assert list(lines(verdict_of_many(judged, None, 0.01))) == [
        "NOT AS GOOD: no model was found that loses at most 0.01"
    ]


def test_an_output_that_shows_nothing_leaves_the_question_open_although_another_one_agrees() -> None:
    compared = {**_agreement(0.99), "output": "box", "outputs": 2, "uniform": ["face"]}
    found = verdict(_content(agreement=compared))["answers"][1]
    assert found["answer"] == "unknown"
    assert found["text"].endswith("the original answers all samples alike in output 'face', which shows nothing")
    assert verdict(_content(agreement={**compared, "uniform": []}))["answers"][1]["answer"] == "yes"


def test_a_single_sample_is_not_said_to_show_that_all_are_alike() -> None:
    compared = {**_agreement(1.0, chance=1.0, samples=1), "low": 0.05}
    assert "more samples are needed" in verdict(_content(agreement=compared))["answers"][1]["text"]
