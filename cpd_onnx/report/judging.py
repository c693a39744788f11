"""The top of a report: one verdict over speed, accuracy, size and proof, and what was asked for against what came out.

The verdict is that of the content or, for a report that was written before there were verdicts, of its measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpd_onnx.report.parts import BAD, DOUBT, GOOD, Answer, Card, Judgement, Sheet
from cpd_onnx.report.verdict import TARGET_MISSED, WRONG_RESULT, answers, as_entries
from cpd_onnx.report.words import (
    LABELS,
    MISSING,
    Content,
    compared_with,
    conditions,
    cost_text,
    costs_of,
    faster,
    is_of_many,
    joined,
    number,
    of,
    percent,
    plain,
    samples_text,
    score,
    scores_of,
    sentence,
    shapes_text,
    speed_of,
)

FASTER, AS_GOOD, SMALLER, PROVED = "faster", "as good", "smaller", "proved"
"""The questions of a verdict, as the content names them."""
YES, NO, UNKNOWN = "yes", "no", "unknown"
"""The answers of a verdict, as the content names them."""
TONES = {YES: GOOD, NO: BAD, UNKNOWN: DOUBT}
"""Tone of each answer."""
_TITLES = {FASTER: "Faster?", AS_GOOD: "As good?", SMALLER: "Smaller?", PROVED: "Structure proved?"}
_CLAUSES = {
    FASTER: ("faster", "not faster", "whether it is faster"),
    AS_GOOD: ("as good as the original", "not as good as the original", "whether it is as good as the original"),
    SMALLER: ("smaller", "not smaller", "whether it is smaller"),
    PROVED: ("its structure is proved", "its structure is not proved", "whether its structure is right"),
}  # a clause for yes, no and unknown
_CARDS = {"MACs": "MACs", "parameters": "Parameters", "file": "File"}
"""Costs that have a card, and its label."""
_MET = {"True": "✓ yes", "False": "✗ no"}


def judgement(content: Content) -> Judgement | None:
    """Return the verdict of a report; None for a report on several models that has none."""
    given = of(content, "verdict")
    if not given.get("answers") and is_of_many(content):
        return None
    listed = given.get("answers") or as_entries(answers(content))
    rows = tuple(_answer(content, entry, listed) for entry in listed)
    asked = asked_table(given.get("asked") or ())
    tone, headline = _headline(int(given.get("code") or 0), listed)
    return Judgement(tone, headline, rows, asked)


def _answer(content: Content, entry: Mapping[str, Any], listed: Sequence[Mapping[str, Any]]) -> Answer:
    question, answer = str(entry["question"]), _known(entry.get("answer"))
    is_good = any(each["question"] == AS_GOOD and each.get("answer") == YES for each in listed)
    value = _VALUES[question](content) if question in _VALUES else ""
    return Answer(
        _TITLES.get(question, f"{question[:1].upper()}{question[1:]}?"),
        TONES[answer],
        answer.capitalize(),
        value,
        str(entry.get("text") or "").replace("->", "→"),
        is_plain=question == PROVED and answer == YES and not is_good,  # alone it says nothing of the model's worth
    )


def _known(answer: Any) -> str:
    return answer if answer in TONES else UNKNOWN


def _headline(code: int, listed: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return tone and text of the verdict in one line."""
    by = {answer: [str(e["question"]) for e in listed if _known(e.get("answer")) == answer] for answer in TONES}
    clauses = {
        answer: [_CLAUSES.get(name, (name, f"not {name}", f"whether it is {name}"))[place] for name in by[answer]]
        for place, answer in enumerate(TONES)
    }
    if code == WRONG_RESULT or PROVED in by[NO]:
        return BAD, "Do not use this file: it does not compute what its plan says."
    parts = [sentence(joined(clauses[NO]))] if clauses[NO] else []
    parts += ["A target was not reached; this is the nearest result."] if code == TARGET_MISSED else []
    parts += [f"Not known: {joined(clauses[UNKNOWN])}."] if clauses[UNKNOWN] else []
    if not code and by[NO] == [FASTER] and AS_GOOD in by[YES]:  # speed was not asked for, and nothing is lost
        return DOUBT, " ".join([sentence(joined(clauses[YES])), *parts])
    if by[NO] or code == TARGET_MISSED:
        return BAD, " ".join(parts)
    return (DOUBT, " ".join(parts)) if parts else (GOOD, sentence(joined(clauses[YES])))


def asked_table(entries: Sequence[Mapping[str, Any]]) -> Sheet | None:
    """Return a table of what was asked for against what was reached; None if nothing was asked for."""
    if not entries:
        return None
    rows = tuple(
        (
            str(entry.get("kind") or ""),
            _quantity(entry.get("asked"), entry.get("unit")),
            _quantity(entry.get("got"), entry.get("unit")),
            _MET.get(str(entry.get("is_met")), "? unknown"),
        )
        for entry in entries
    )
    return Sheet("", ("target", "asked", "reached", "met"), rows, words=(0, 3), is_wide=False)


def _quantity(value: Any, unit: Any) -> str:
    """Return a number with its unit; fractions of the original in percent."""
    if value is None:
        return MISSING
    if not isinstance(value, int | float):
        return str(value)
    if str(unit or "").startswith("of "):
        return f"{percent(value)} {unit}"
    return f"{plain(value)} {unit or ''}".strip()


# Figures beside the answers.


def _speed_value(content: Content) -> str:
    found = speed_of(content)
    return "" if found is None else f"{faster(found[1].ratio)} as fast"


def _good_value(content: Content) -> str:
    values = scores_of(content)
    if len(values) > 1 and compared_with(content) == LABELS:
        metric = content["accuracy"]["metric"]
        first, last = (score(metric, values[place][1]) for place in (0, -1))
        return f"{first.removesuffix(' %')} → {last}"
    found = of(content, "agreement")
    return f"{percent(found['value'])} the same" if found.get("value") is not None else ""


def _size_value(content: Content) -> str:
    left = next((left for name, *_, left in costs_of(content) if name == "file"), "")
    return f"{left} left" if left else ""


_VALUES = {FASTER: _speed_value, AS_GOOD: _good_value, SMALLER: _size_value}
"""Functions that return the key figure of a question."""


# What else is at the top.


def agreement_text(content: Content) -> str:
    """Return how often the model agrees with the original, with its bound; empty if it was not measured."""
    found = of(content, "agreement")
    if found.get("value") is None:
        return ""
    measure = str(found.get("measure") or "same answer")
    several = found.get("outputs", 1)
    where = f" in output {found['output']!r}, the worst of {several}" if several > 1 else ""
    text = f"{measure} as the original{where}: {percent(found['value'])} of {samples_text(found)}"
    if found.get("low") is None:
        return text
    exact = " (exact, Clopper-Pearson)" if found.get("interval") == "Clopper-Pearson" else ""
    exact = exact or (f" ({found['interval']})" if found.get("interval") else "")
    confidence = 100 * number(found.get("confidence") or 0.95)
    return f"{text}; with {confidence:g} % confidence at least {percent(found['low'])}{exact}"


def lead(content: Content) -> str:
    """Return what is left of the original, and the conditions under which the figures hold."""
    if is_of_many(content):
        return _sweep_lead(content)
    costs = joined([f"{left} of the {name}" for name, _, _, left in costs_of(content) if name in _CARDS])
    parts = [f"{costs} of the original are left."] if costs else []
    shapes, fast = shapes_text(content), speed_of(content)
    held = [*([f"inputs {shapes}"] if shapes else []), *([conditions(fast[1].setting)] if fast else [])]
    parts += [f"All figures hold for {', '.join(held)}."] if held else []
    return " ".join(parts)


def _sweep_lead(content: Content) -> str:
    """Return the range of the models of a sweep, and which one was chosen."""
    found = content["sweep"]
    points = [point for point in found.get("points") or () if point.get("ratio")]
    made = [point for point in points if point.get("name") != "the original"]
    if not made:
        return ""
    ratios = sorted(point["ratio"] for point in made)
    parts = [f"{len(made)} models, from {faster(ratios[-1])} to {faster(ratios[0])} as fast as the original."]
    for point in made:
        if point.get("picked"):
            metric = found.get("metric")
            known = point.get("accuracy") is not None
            scored = f", {metric} {score(metric, point['accuracy'])}" if known else ""
            parts.append(f"Chosen: {point['name']}, {faster(point['ratio'])} as fast{scored}.")
    return " ".join(parts if any(point.get("picked") for point in made) else [*parts, "None was chosen."])


def cards(content: Content) -> Iterator[Card]:
    """Yield a card for each cost."""
    for name, before, after, left in costs_of(content):
        if name in _CARDS:
            detail = f"{cost_text(name, before)} → {cost_text(name, after)}"
            yield Card(f"{_CARDS[name]} left", left, detail, after / before)
