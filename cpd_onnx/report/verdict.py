"""The verdict of a run: is the model faster, as good, smaller and proved; what was asked for, and what came of it.

It is computed from the measurements in a report, of which those of earlier versions lack some. Its code is the exit
code of the command.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from cpd_onnx.budget.allocation import FASTER
from cpd_onnx.data.agreement import LEAST_SKILL
from cpd_onnx.data.metrics import lower_is_better
from cpd_onnx.proof.comparison import INCONCLUSIVE, WRONG
from cpd_onnx.report.words import BUSY, LABELS, cost_text, costs_of, proof_of
from cpd_onnx.runtime.providers import label

Content: TypeAlias = Mapping[str, Any]
YesNo: TypeAlias = Literal["yes", "no", "unknown"]

NOT_FASTER, NOT_AS_GOOD, WRONG_RESULT, TARGET_MISSED = 3, 4, 5, 6
"""Codes of verdicts that are no success; 0 is success."""
_GRAVEST_FIRST = (WRONG_RESULT, NOT_AS_GOOD, NOT_FASTER, TARGET_MISSED)
USUAL_LOSS = {"labels": 0.05, "original": 0.1}
"""Loss beyond which a model is not as good where no bound is given: of the metric, and of the answers that differ from
the original's, most of which are equally right or wrong (heuristic)."""
_JUDGED_BY = {"task", "measure", "value", "low", "high", "chance", "confidence", "samples", "interval", "is_held_out"}
"""Entries of an agreement that an answer takes."""
_MANY, _FEW = 30, 10
"""Numbers of samples from which a loss counts as shown though chance could explain it, and from which equal answers to
all of them are no chance (heuristics)."""


@dataclass(frozen=True)
class Answer:
    """The answer to one of the questions "faster", "as good", "smaller" and "proved".

    Attributes:
        question: The question.
        answer: "yes", "no" or "unknown".
        text: What was measured, in one sentence.
        code: Exit code that the answer demands; 0 for none.
    """

    question: str
    answer: YesNo
    text: str
    code: int = 0

    def line(self) -> str:
        """Return the answer as a line of text.

        >>> Answer("faster", "no", "it takes 103 % of the time").line()
        'NOT FASTER: it takes 103 % of the time'
        """
        heads = {"yes": self.question, "no": f"not {self.question}".upper(), "unknown": f"{self.question}? unknown"}
        return f"{heads[self.answer]}: {self.text}"


def answers(content: Content) -> list[Answer]:
    """Return the answers that the measurements of a run give."""
    return [_faster(content), _as_good(content), _smaller(content), _proved(content)]


def verdict(content: Content) -> dict[str, Any]:
    """Return the verdict of a run as plain values: its code, the answers, and the targets asked for and reached."""
    found, asked = answers(content), [dict(row) for row in content.get("asked") or ()]
    is_missed = any(not row["is_met"] for row in asked) and not content.get("is_bounded")
    codes = {answer.code for answer in found} | ({TARGET_MISSED} if is_missed else set())
    return {
        "code": next((code for code in _GRAVEST_FIRST if code in codes), 0),
        "answers": as_entries(found),
        "asked": asked,
    }


def as_entries(found: Sequence[Answer]) -> list[dict[str, str]]:
    """Return answers as plain values."""
    return [{"question": each.question, "answer": each.answer, "text": each.text} for each in found]


def verdict_of_many(
    verdicts: Mapping[str, Mapping[str, Any]], picked: str | None = None, max_loss: float | None = None
) -> dict[str, Any]:
    """Return the verdict of several models of one original, by their names; it has answers only if it is no success.

    It is that of the picked model or, where none was to be picked, of the best one. If one was to be picked that loses
    at most `max_loss`, and there is none, the answer is that.
    """
    if max_loss is not None and math.isfinite(max_loss) and picked is None:
        none = Answer("as good", "no", f"no model was found that loses at most {max_loss:g}")
        return {"code": NOT_AS_GOOD, "answers": as_entries([none]), "asked": []}
    best = picked or max(verdicts, key=lambda name: _rank(int(verdicts[name]["code"])))
    found = verdicts[best]
    said = [
        {**entry, "text": f"{best}, the best: {entry['text']}" if picked is None else f"{best}: {entry['text']}"}
        for entry in found["answers"]
        if entry["answer"] == "no"
    ]
    is_missed = found["code"] == TARGET_MISSED
    return {
        "code": found["code"],
        "answers": said if found["code"] else [],
        "asked": list(found["asked"]) if is_missed else [],
    }


def _rank(code: int) -> int:
    """Return a number that is larger for a better verdict."""
    return _GRAVEST_FIRST.index(code) if code else len(_GRAVEST_FIRST)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield a verdict as lines of text, with the targets that were missed or gave way to the bound of the loss."""
    for entry in found["answers"]:
        yield Answer(entry["question"], entry["answer"], entry["text"]).line()
    for row in found["asked"]:
        if not row["is_met"]:
            head = "TARGET MISSED" if found["code"] == TARGET_MISSED else "target not reached"
            yield f"{head}: {asked_text(row)}"


def asked_text(row: Mapping[str, Any]) -> str:
    """Return one row of the targets as text.

    >>> asked_text({"kind": "latency", "asked": 0.5, "got": 0.7, "unit": "of the original", "is_met": False})
    'latency: asked for 0.5, got 0.7 of the original'
    """
    return f"{row['kind']}: asked for {row['asked']:.4g}, got {row['got']:.4g} {row['unit']}".rstrip()


# Faster?


def _faster(content: Content) -> Answer:
    pair = _timings_of(content)
    if pair is not None:
        return _of_ratio(pair[1]["ratio"], _timing_text(*pair), content)
    measured = (content.get("latency") or {}).get("measured")
    if measured is not None:
        return _of_ratio(measured, f"it takes {100 * measured:.1f} % of the original's time", content)
    return Answer("faster", "unknown", "the latency was not measured")


def _timings_of(content: Content) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Return the timings of the original and of the result under the first setting; None if not measured."""
    timings = list((content.get("bench") or {}).get("timings") or ())
    first, *others = [entry for entry in timings if entry["setting"] == timings[0]["setting"]] or [None]
    if first is None or not others:
        return None
    file = (content.get("output") or {}).get("file") if isinstance(content.get("output"), Mapping) else None
    return first, next((entry for entry in others if entry.get("model") == file), others[-1])


def _of_ratio(ratio: float, text: str, content: Content) -> Answer:
    if ratio <= FASTER:
        return Answer("faster", "yes", f"{1 / ratio:.2f} times as fast as the original; {text}")
    why = content.get("slow_because")
    is_failure = content.get("checks_speed", True) and (content.get("aims_at_speed", True) or ratio >= 1 / FASTER)
    code = NOT_FASTER if is_failure else 0
    return Answer("faster", "no", f"{text}{f': {why}' if why else ''}", code)


def _timing_text(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    setting = after["setting"]
    threads = setting["threads"] or "all"
    where = f"{label(str(setting['provider']))}, threads: {threads}"
    text = f"{before['p50']:.3g} ms -> {after['p50']:.3g} ms, {100 * after['ratio']:.1f} % of the time ({where})"
    is_busy = any(row["p90"] > BUSY * row["p50"] for row in (before, after))
    return f"{text}; the machine was busy, measure again" if is_busy else text


# As good?


def _as_good(content: Content) -> Answer:
    if content.get("is_lossless"):
        return Answer("as good", "yes", "only channels that change no output, apart from rounding, were removed")
    labels, compared = _label_loss(content), content.get("agreement")
    if labels is not None or compared:
        found = _of_labels(content, *labels) if labels is not None else _of_agreement(content, compared or {})
        return replace(found, code=0) if content.get("is_unbounded") else found
    if content.get("is_blind"):
        return Answer("as good", "unknown", "without data, the accuracy is unknown and probably lost")
    steps = (content.get("deployment") or {}).get("steps") or ()
    nothing = "not measured, see what each conversion changes" if steps else "no data was given to measure it on"
    return Answer("as good", "unknown", _other_score(content) or nothing)


def _scores(content: Content) -> list[float]:
    values = ((content.get("accuracy") or {}).get("values") or {}).values()
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _other_score(content: Content) -> str:
    """Return a score that does not tell how much was lost; empty if there is none."""
    values, accuracy = _scores(content), content.get("accuracy") or {}
    if not values:
        return ""
    on = accuracy.get("on") or LABELS
    doubt = "the original's is unknown" if on == LABELS else "the accuracy is unknown"
    samples = f", {accuracy['samples']} samples" if accuracy.get("samples") else ""
    return f"{accuracy['metric']} {values[-1]:.4g} against {on}{samples}; {doubt}"


def _bound(content: Content, kind: str) -> float:
    given = content.get("max_loss")
    return USUAL_LOSS[kind] if given is None else float(given)


def _label_loss(content: Content) -> tuple[float, float, float] | None:
    """Return the metric of the original and of the model on labelled data, and the loss; None without labels."""
    accuracy = content.get("accuracy") or {}
    values = _scores(content)
    if (accuracy.get("on") or LABELS) != LABELS or len(values) < 2:
        return None
    first, last = values[0], values[-1]
    return first, last, (last - first) if lower_is_better(accuracy) else first - last


def _chance_of(content: Content) -> float | None:
    """Return the score of the best constant answer: as recorded or, for top1, as the agreement measured it."""
    accuracy, compared = content["accuracy"], content.get("agreement") or {}
    if accuracy.get("chance") is not None:
        return float(accuracy["chance"])
    is_alike = accuracy["metric"] == "top1" and compared.get("task") == "classification"
    return float(compared["chance"]) if is_alike else None


def _of_labels(content: Content, first: float, last: float, loss: float) -> Answer:
    accuracy = content["accuracy"]
    samples = f" on {accuracy['samples']} labelled samples" if accuracy.get("samples") else ""
    text = f"{accuracy['metric']} {first:.4g} -> {last:.4g}{samples}"
    bound, chance = _bound(content, "labels"), _chance_of(content)
    if chance is not None and not lower_is_better(accuracy) and last - chance < LEAST_SKILL * max(0.0, first - chance):
        return Answer("as good", "no", f"{text}, near chance ({chance:.4g})", NOT_AS_GOOD)
    # Metrics that are no fractions, such as a mean squared error, have a bound relative to the original's score.
    unit = abs(first) if lower_is_better(accuracy) and content.get("max_loss") is None else 1.0
    if loss > bound * unit + 1e-12:
        return Answer("as good", "no", f"{text}: more than {bound:g} is lost", NOT_AS_GOOD)
    return Answer("as good", "yes", f"{text}, within {bound:g}")


def _of_agreement(content: Content, found: Mapping[str, Any]) -> Answer:
    if not found.keys() >= _JUDGED_BY:
        return Answer("as good", "unknown", f"{found.get('measure', 'agreement')} {found['value']:.4g}")
    bound = _bound(content, "original")
    where = "" if found["is_held_out"] else "; nothing was held out, so the samples are those that it was fitted to"
    text = (
        f"{agreement_text(found)}, {100 * found['value']:.1f} % of {found['samples']} samples"
        if found["task"] == "classification"
        else f"{agreement_text(found)}, {found['value']:.4g} on {found['samples']} samples"
    ) + where
    skill, least = found["value"] - found["chance"], 1 - bound - 1e-12
    if found["chance"] > 1 - 1e-9 and found["samples"] >= _FEW:
        return Answer("as good", "unknown", f"{text}; the original answers all samples alike, which shows nothing")
    is_shown = found["high"] < least or found["samples"] >= _MANY
    if is_shown and skill < LEAST_SKILL * (1 - found["chance"]):
        return Answer("as good", "no", f"{text}; a constant answer reaches {found['chance']:.4g}", NOT_AS_GOOD)
    if is_shown and found["value"] < least:
        return Answer("as good", "no", f"{text}: more than {bound:g} is lost", NOT_AS_GOOD)
    if found["low"] < least:
        return Answer(
            "as good", "unknown", f"{text}; more samples are needed to tell whether at most {bound:g} is lost"
        )
    if found.get("uniform") and found["samples"] >= _FEW:
        names = ", ".join(map(repr, found["uniform"]))
        why = f"the original answers all samples alike in output {names}, which shows nothing"
        return Answer("as good", "unknown", f"{text}; {why}")
    return Answer("as good", "yes" if found["is_held_out"] else "unknown", text)


def agreement_text(found: Mapping[str, Any]) -> str:
    """Return an agreement with its bound as text, see `Agreement.as_json`."""
    several = found.get("outputs", 1)
    of_output = f"; output {found['output']!r}, the worst of {several}" if several > 1 else ""
    tail = f"({100 * found['confidence']:.0f} % confidence, n = {found['samples']}{of_output})"
    if found["task"] == "classification":
        return f"answers like the original on at least {100 * found['low']:.1f} % of such inputs {tail}"
    return f"{found['measure']} with the original of at least {found['low']:.4g} {tail}"


# Smaller?


def _smaller(content: Content) -> Answer:
    costs = {name: (before, after, left) for name, before, after, left in costs_of(content)}
    name = next((name for name in ("file", "parameters") if name in costs), None)
    if name is None:
        return Answer("smaller", "unknown", "it was not measured")
    before, after, _ = costs[name]
    left = [f"{costs[kind][2]} of the {kind}" for kind in ("MACs", "parameters") if kind in costs]
    said = f"{name} {cost_text(name, before)} -> {cost_text(name, after)}"
    text = f"{said}, {' and '.join(left)} left" if left else said
    return Answer("smaller", "yes" if after < before else "no", text)


# Proved?


def _proved(content: Content) -> Answer:
    found = content.get("verification")
    if not found:
        return Answer("proved", "unknown", "the proof was skipped")
    result = proof_of(found)
    if result == WRONG:
        return Answer("proved", "no", "it does not compute what its plan says: do not use it", WRONG_RESULT)
    if result == INCONCLUSIVE:
        return Answer("proved", "unknown", "the inputs that were tried do not show whether its structure is right")
    is_converted = bool((content.get("precision") or {}).get("file"))
    what = "the structure of the float model that it is made of" if is_converted else "its structure"
    text = f"{what} equals the original's with the removed channels masked, to {found['difference']:.1e}"
    return Answer("proved", "yes", text)
