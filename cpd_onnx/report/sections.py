"""The sections of a report, independent of whether it is rendered as HTML or Markdown.

Each section is a function from the report's content to parts: sentences, tables, figures. A section without parts is
omitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from cpd_onnx.data.metrics import lower_is_better
from cpd_onnx.proof.comparison import INCONCLUSIVE, VERDICTS, VERIFIED, WRONG
from cpd_onnx.report import figures as plots
from cpd_onnx.report.tables import bytes_text, cost_rows, largest_text, longest, repair_line
from cpd_onnx.rewrite.plan import current_budget
from cpd_onnx.runtime.bench import Bench, Setting, Timing
from cpd_onnx.summary import count, share

Content: TypeAlias = Mapping[str, Any]
"""A report's content, or a part of it, as `document.schema` describes it."""
Part: TypeAlias = "Sentence | Listing | Sheet | Picture | Code"
"""One element of a section."""

_MISSING = "–"  # noqa: RUF001  # a dash is meant
"""Text in place of a number that is not known."""
_FRACTIONS = ("top1", "top5", "miou")
"""Metrics that are fractions and shown in percent."""
_LABELS = "labels"
_FOLDED = 20
"""Number of rows above which a table is collapsed (heuristic)."""
_LETTERS = 26
"""Number of letters above which a word in a table may be broken (heuristic)."""
_MAX_OPERATORS = 12
"""Maximum number of operators in the table of time by operator (heuristic)."""
_MANY = 10
"""Ratio from which a factor is shown instead of a percentage (heuristic)."""
_BUSY = 1.3
"""Ratio of the 90th percentile of the run times to the median above which the machine counts as busy (heuristic)."""
_BUDGETS = {"macs": "MACs", "params": "parameters", "channels": "channels", "bytes": "file", "latency": "latency"}
"""Names of the kinds of budget."""
_COST_CARDS = {"MACs": "MACs", "parameters": "Params", "file": "File"}
"""Costs that have a card, and its label."""
_OF_BUDGET = ("kind", "target", "policy")
"""Entries of the budget that have words of their own."""
_PROOF_CARDS = {
    None: ("Not verified", "nothing shows that the file computes what its plan says", "bad"),
    WRONG: ("Wrong", "the file does not compute what its plan says: do not use it", "bad"),
    INCONCLUSIVE: ("Inconclusive", "the inputs that were tried do not show whether it is correct", "unknown"),
    VERIFIED: ("Verified", "", "good"),
}
"""Value, detail and tone of the card of the proof by its verdict; None if there is no proof."""
_PROOF_RESULTS = {
    VERIFIED: "They agree", INCONCLUSIVE: "This does not show whether the file is correct",
    WRONG: "They differ: do not use the file",
}  # fmt: skip  # a table
"""Start of the sentence on the difference by the verdict of the proof."""


@dataclass(frozen=True)
class Sentence:
    """One or more sentences; `tone` is "" or "warning"."""

    form: ClassVar[str] = "sentence"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Listing:
    """A bulleted list."""

    form: ClassVar[str] = "listing"
    title: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: Heading; may be empty.
        columns: Headings of the columns.
        rows: Cells, row by row.
        words: Indices of the columns that hold words instead of numbers.
        is_folded: Whether it is collapsed until the reader opens it.
        is_wide: Whether it takes the full width of the page.
        marked: Indices of the rows that are highlighted.

    """

    form: ClassVar[str] = "sheet"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    is_folded: bool = False
    is_wide: bool = True
    marked: tuple[int, ...] = ()

    def letters(self, column: int) -> int:
        """Return the width in letters at which a column of words breaks neither words nor short names."""
        cells = [row[column] for row in self.rows]
        words = [word for cell in cells for word in ([cell] if len(cell) <= _LETTERS else cell.split())]
        return min(_LETTERS, max(map(len, words), default=0))


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        key: Identifier within the page.
        title: Caption.
        label: Description for screen readers.
        drawing: The figure: narrow, or as wide as the page if there is another one for phones.
        on_phones: The figure for phones, if it differs.

    """

    form: ClassVar[str] = "picture"
    key: str
    title: str
    label: str
    drawing: plots.Drawing
    on_phones: plots.Drawing | None = None


@dataclass(frozen=True)
class Code:
    """Text to be copied verbatim."""

    form: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Section:
    """A section of the page: identifier, heading and content."""

    key: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Card:
    """A key result at the top of the page.

    Attributes:
        label: Name of the result.
        value: The result, in large letters.
        detail: Explanation below it, in small letters.
        tone: "good", "bad", "unknown" or "".
        left: Fraction of the original's cost that remains, on a card about a cost.

    """

    label: str
    value: str
    detail: str
    tone: str = ""
    left: float | None = None


@dataclass(frozen=True)
class Page:
    """The whole report.

    Attributes:
        title: Heading.
        files: Names of the source and the output file.
        lead: Summary in a few sentences.
        cards: Key results.
        notes: Notes of the run.
        advice: Suggestions for what to try next.
        sections: The sections.
        tool: Name and version of the program that wrote the report.
    """

    title: str
    files: str
    lead: str
    cards: tuple[Card, ...]
    notes: tuple[str, ...]
    advice: tuple[str, ...]
    sections: tuple[Section, ...]
    tool: str


def page(content: Content) -> Page:
    """Return the report on a content."""
    found = (Section(key, title, tuple(parts(content))) for key, title, parts in _SECTIONS)
    return Page(
        title=str(content.get("title") or "Report"),
        files=" → ".join(filter(None, (_of(content, "source").get("file"), _of(content, "output").get("file")))),
        lead=_lead(content),
        cards=tuple(_cards(content)),
        notes=tuple(content.get("notes") or ()),
        advice=tuple(content.get("advice") or ()),
        sections=tuple(section for section in found if section.parts),
        tool=str(_of(content, "provenance").get("tool") or "cpd-onnx"),
    )


# The top of the page.


def _lead(content: Content) -> str:
    """Return the summary: what was gained, what was lost, and what is not known."""
    fast, values = _speed(content), _scores(content)
    costs = _joined([f"{left} of the {name}" for name, _, _, left in _costs(content) if name in _COST_CARDS])
    verdict = _verdict(content.get("verification"))
    sentences = ["Do not use this file: its proof failed."] if verdict == WRONG else []
    sentences += ["Its proof is inconclusive."] if verdict == INCONCLUSIVE else []
    if fast:
        doubt = _doubt(*fast)
        speed = f"{_faster(fast[1].ratio)} as fast as the original" + f" ({doubt})" * bool(doubt)
        sentences.append(f"{speed}{', with ' * bool(costs)}{costs}.")
    elif costs:
        sentences.append(f"{costs} of the original are left.")
    is_judged = len(values) > 1 and _on(content) == _LABELS
    if is_judged:
        metric = content["accuracy"]["metric"]
        first, last = (_score(metric, values[place][1]) for place in (0, -1))
        sentences.append(f"{metric} is {last}; that of the original is {first}.")
    elif values:
        metric = content["accuracy"]["metric"]
        sentences.append(f"Against {_on(content)}: {metric} {_score(metric, values[-1][1])}.")
    unknown = [*([] if fast else ["how fast it is"]), *([] if is_judged else ["how accurate it is"])]
    unknown += [] if verdict else ["whether it computes what its plan says"]
    if unknown:
        sentences.append(f"Not known: {_joined(unknown)}.")
    return " ".join(sentences)


def _cards(content: Content) -> Iterator[Card]:
    yield _speed_card(content)
    yield _accuracy_card(content)
    yield _proof_card(content)
    for name, before, after, left in _costs(content):
        if name in _COST_CARDS:
            detail = f"{_cost(name, before)} → {_cost(name, after)}"
            yield Card(f"{_COST_CARDS[name]} left", left, detail, "", after / before)


def _speed_card(content: Content) -> Card:
    fast = _speed(content)
    if fast is None:
        return Card("Speed", "Unknown", "not measured", "unknown")
    before, after = fast
    detail = f"as fast: {_ms(before.p50)} → {_ms(after.p50)} ms a run; {_conditions(after.setting)}"
    doubt = _doubt(before, after)
    if doubt:
        return Card("Speed", _faster(after.ratio), f"{detail}; {doubt}", "unknown")
    return Card("Speed", _faster(after.ratio), detail, "good" if after.ratio < 1 else "bad")


def _doubt(before: Timing, after: Timing) -> str:
    """Return the reason why the two medians are not comparable; empty if they are."""
    if _variation((before, after)) > _BUSY:
        return "the machine was busy: measure again"
    fast, slow = sorted((before, after), key=lambda timing: timing.p50)
    return "the run times of both overlap" if fast.p90 > slow.p10 else ""


def _accuracy_card(content: Content) -> Card:
    values = _scores(content)
    if not values:
        return Card("Accuracy", "Unknown", "no data was given to measure it on", "unknown")
    metric, how_many = content["accuracy"]["metric"], _count_of(content["accuracy"])
    first, last = values[0][1], values[-1][1]
    if _on(content) != _LABELS:
        detail = f"{metric} against {_on(content)}, {how_many}; the accuracy is unknown"
        return Card("Distance from the original", _score(metric, last), detail, "unknown")
    if len(values) == 1:
        return Card(f"Accuracy, {metric}", _score(metric, last), f"the original's is unknown; {how_many}", "unknown")
    text = f"{_score(metric, first).removesuffix(' %')} → {_score(metric, last)}"
    return Card(f"Accuracy, {metric}", text, f"{_change(metric, first, last)}; {how_many} with labels")


def _verdict(found: Content | None) -> str | None:
    """Return the verdict of a proof; None if there is none.

    Reports written before there were three verdicts only say whether it passed.
    """
    if not found:
        return None
    verdict = found.get("verdict")
    return str(verdict) if verdict in VERDICTS else VERIFIED if found.get("passed", True) else WRONG


def _proof_card(content: Content) -> Card:
    found = _of(content, "verification")
    verdict = _verdict(found)
    if verdict == VERIFIED:
        detail = "equals, byte for byte, the plan applied to the original"
        if not _is_replay(found):
            detail = f"structure and removal proven; {found.get('trained')} weights have new values"
        return Card("Proof", "Verified", detail, "good")
    return Card("Proof", *_PROOF_CARDS[verdict])


def _is_replay(found: Content) -> bool:
    """Return whether the file equals the plan applied to the original, without refitted or trained weights."""
    return bool(found.get("is_replay", not found.get("trained")))


# The sections.


def _accuracy(content: Content) -> Iterator[Part]:
    values = _scores(content)
    if not values:
        yield Sentence("Not measured: that takes data, with labels or to compare the outputs on.", "warning")
    else:
        found = content["accuracy"]
        metric = found["metric"]
        rows = [
            ("the original" if name == "original" else name, _score(metric, value),
             _change(metric, values[0][1], value) if place else "")
            for place, (name, value) in enumerate(values)
        ]  # fmt: skip  # a row
        yield Sheet("", ("model", str(metric), "change"), tuple(rows), is_wide=False)
        yield Sentence(_meaning(found, [value for _, value in values]))
    if content.get("repaired"):
        line = repair_line(content["repaired"]).replace("->", "→")
        yield Sentence(f"{line[0].upper()}{line[1:]}.")


def _meaning(found: Content, values: Sequence[float]) -> str:
    """Return what the scores measure, and their statistical error."""
    samples, metric = found.get("samples"), found["metric"]
    on = found.get("on") or _LABELS
    text = f"{metric} on {_count_of(found)}, against {on}."
    if on != _LABELS:
        text += " This measures how close the model is to the original, not its accuracy, which takes labels."
    if metric in ("top1", "top5") and samples:
        error = max(1.96 * math.sqrt(max(0.0, value * (1 - value)) / samples) for value in values)
        text += f" With this number of samples, the 95 % confidence interval is at most ±{100 * error:.1f} points."
    return text


def _size(content: Content) -> Iterator[Part]:
    rows = [(name, _cost(name, before), _cost(name, after), left) for name, before, after, left in _costs(content)]
    if rows:
        yield Sheet("", ("", "before", "after", "left"), tuple(rows), is_wide=False)
    budget = current_budget(content.get("budget") or {})
    if "kind" in budget:
        kind, target = str(budget["kind"]), budget.get("target")
        asked = f"Target: {_percent(target)} of the {_BUDGETS.get(kind, kind)}"
        policy = f", allocation policy {budget['policy']}" if budget.get("policy") else ""
        more = [
            f"{name} {_plain(value)}"
            for name, value in budget.items()
            if name not in _OF_BUDGET and value not in (None, False, []) and not isinstance(value, Mapping)
        ]
        yield Sentence(
            f"{asked}{policy}{'; ' if more else ''}{', '.join(more)}. MACs are multiply-accumulate operations a sample."
        )


def _latency(content: Content) -> Iterator[Part]:
    if not content.get("bench"):
        yield Sentence("Not measured: fewer MACs do not always mean less time; use 'cpd-onnx bench'.", "warning")
        return
    found = bench_of(content["bench"])
    if found.timings:
        yield Picture(
            "latency", "Latency of one run: the dot is the median, the line spans the 10th to the 99th percentile.",
            "Median latency: " + "; ".join(
                f"{t.model} {_ms(t.p50)} ms, {_conditions(t.setting)}" for t in found.timings[:4]
            ), plots.latencies(found),
        )  # fmt: skip  # name, words and figure
    if found.memory:
        first = next(iter(found.memory.values()))
        rows = tuple((name, f"{mebibytes:.1f}", share(mebibytes, first)) for name, mebibytes in found.memory.items())
        yield Sheet("Memory of loading and running it", ("model", "peak MiB", "of the first"), rows, is_wide=False)
    yield from _timings(found)
    if found.machine:
        yield Sentence(f"Measured on {', '.join(_machine(found.machine))}.")


def _machine(machine: Mapping[str, Any]) -> list[str]:
    known = {"processor": "{}", "cpus": "{} cores", "system": "{}"}
    words = [text.format(_plain(machine[name])) for name, text in known.items() if machine.get(name)]
    return words + [f"{name} {_plain(value)}" for name, value in machine.items() if name not in known]


def _timings(found: Bench) -> Iterator[Part]:
    columns = ("model", "conditions", "p10 ms", "p50 ms", "p90 ms", "p99 ms", "samples/s", "runs", "of the first")
    rows = tuple(
        (t.model, _conditions(t.setting), *map(_ms, (t.p10, t.p50, t.p90, t.p99)), _ms(t.per_second), str(t.runs),
         _percent(t.ratio))
        for t in found.timings
    )  # fmt: skip  # a row
    if rows:
        yield Sheet("", columns, rows, words=(0, 1), is_folded=len(rows) > _FOLDED)
    variation = _variation(found.timings)
    if variation > _BUSY:
        yield Sentence(
            f"The run times vary: one run in ten took {variation:.1f} times the median or more. Other processes used "
            "the machine; measure again on an idle one before you rely on these figures.",
            "warning",
        )


def _variation(timings: Iterable[Timing]) -> float:
    """Return the largest ratio of the 90th percentile of the run times to their median."""
    return max((timing.p90 / timing.p50 for timing in timings if timing.p50), default=1.0)


def _operators(content: Content) -> Iterator[Part]:
    found = bench_of(content.get("bench") or {})
    if not any(found.profiles.values()):
        return
    yield Picture(
        "operators", "Time by operator in one run on one thread, from onnxruntime's profiler.",
        "Bars of milliseconds by operator: " + "; ".join(
            f"{name} {' and '.join(f'{ms:.3g}' for ms in spent)}" for name, spent in longest(found.profiles, 3)[:3]
        ), plots.operators(found), plots.operators(found, plots.PHONE),
    )  # fmt: skip  # name, words and figure
    rows = tuple(
        (name, f"{spent[0]:.3f}", *(part for ms in spent[1:] for part in (f"{ms:.3f}", _of_first(ms, spent[0]))))
        for name, spent in longest(found.profiles, _MAX_OPERATORS)
    )
    first, *others = found.profiles
    heads = ("operator", f"{first}, ms", *(part for name in others for part in (f"{name}, ms", "of the first")))
    yield Sheet("", heads, rows, marked=(len(rows) - 1,))


def _widths(content: Content) -> Iterator[Part]:
    groups = content.get("groups") or ()
    if not groups:
        return
    pruned = [group for group in groups if group["kept"] < group["size"]]
    yield Sentence(
        f"{len(pruned)} of {len(groups)} groups of coupled channels were pruned. A group is one width of the network, "
        "such as that of a residual stage or the heads of an attention block; its tensors are pruned together."
    )
    drawn = [(group["name"], group["size"], group["kept"]) for group in groups]
    yield Picture(
        "widths", "Channels of each group before and after, in the order of the table.",
        f"Widths of {len(groups)} groups before and after; " + "; ".join(
            f"{group['name']} from {group['size']} to {group['kept']}" for group in pruned[:3]
        ), plots.widths(drawn), plots.widths(drawn, plots.PHONE),
    )  # fmt: skip  # name, words and figure
    rows = tuple(
        (str(number), group["name"], group.get("kind") or "", str(group["size"]), str(group["kept"]),
         share(group["kept"], group["size"]), _count(group.get("macs")), _count(group.get("params")))
        for number, group in enumerate(groups, 1)
    )  # fmt: skip  # a row
    heads = ("number", "group", "kind", "before", "after", "left", "MACs before", "parameters before")
    yield Sheet("All groups", heads, rows, words=(1, 2), is_folded=len(rows) > _FOLDED)


def _sensitivity(content: Content) -> Iterator[Part]:
    found = content.get("sensitivity") or {}
    groups = [group for group in found.get("groups") or () if group.get("points")]
    if not groups:
        return
    error = str(found.get("error") or "error")
    yield Sentence(
        f"Error of the outputs when one group alone is pruned: {error}. The higher, the more the model depends on it."
    )
    curves = {group["group"]: [(p["width"], _number(p["error"])) for p in group["points"]] for group in groups}
    worst = sorted(curves, key=lambda name: -max(value for _, value in curves[name]))
    yield Picture(
        "sensitivity", "Error of the outputs over the remaining channels of one group while all others are unpruned.",
        f"Error over width for {len(groups)} groups; most sensitive: {'; '.join(worst[:3])}.",
        plots.sensitivity(curves, "error"), plots.sensitivity(curves, "error", plots.PHONE),
    )  # fmt: skip  # name, words and figure
    most = max(len(group["points"]) for group in groups)
    rows = tuple(
        (group["group"], *(f"{_short(p['error'])} at {p['width']}" for p in group["points"]),
         *[""] * (most - len(group["points"])))
        for group in groups
    )  # fmt: skip  # a row
    heads = ("group", *(f"error at width {number}" for number in range(1, most + 1)))
    yield Sheet("All points", heads, rows, is_folded=len(rows) > _FOLDED // 4)


def _training(content: Content) -> Iterator[Part]:
    found = content.get("training")
    if not found:
        return
    losses = [_number(loss) for loss in found.get("losses") or ()]
    watched = [(_number(point["step"]), _number(point["value"])) for point in found.get("watched") or ()]
    scored = found if "metric" in found else _of(content, "accuracy")
    metric = str(scored.get("metric") or "score")
    if losses:
        yield Picture(
            "training", "Distillation with the original as the teacher: the loss of each update, raw and smoothed.",
            f"Loss over {len(losses)} updates, from {_short(losses[0])} to {_short(losses[-1])}.",
            plots.training(losses, watched, f"{metric}, on held-out samples"),
        )  # fmt: skip  # name, words and figure
    facts = {
        "updates": found.get("steps"),
        "rounds of pruning and training": found.get("rounds") or content.get("rounds"),
        "seconds": found.get("seconds"),
        "device": found.get("device"),
        "loss": f"{_short(losses[0])} → {_short(losses[-1])}" if losses else None,
        **{f"output {name}": f"by {kind}" for name, kind in (found.get("losses_by") or {}).items()},
        f"best {metric} during training": _best(scored, [value for _, value in watched]),
    }
    yield from _facts("", facts)


def _sweep(content: Content) -> Iterator[Part]:
    found = content.get("sweep") or {}
    points = found.get("points") or ()
    if not points:
        return
    metric = found.get("metric")
    scored = [
        plots.Choice(str(p.get("name") or ""), _number(p["ms"]), _number(p["accuracy"]), bool(p.get("picked")))
        for p in points
        if p.get("accuracy") is not None and p.get("ms") is not None
    ]
    picked = [str(p.get("name") or "") for p in points if p.get("picked")]
    if scored:
        yield Picture(
            "sweep", "No model is both faster and better than one on the line. The ring marks the chosen one.",
            f"{metric} against latency of {len(scored)} models; chosen: {'; '.join(picked) or 'none'}",
            plots.tradeoff(scored, str(metric), is_less_better=lower_is_better(found)),
        )  # fmt: skip  # name, words and figure
    rows = tuple(
        (f"{p.get('name') or ''}{' (chosen)' if p.get('picked') else ''}", _ms(p.get("ms")), _percent(p.get("ratio")),
         _score(metric, p.get("accuracy")), _percent(p.get("macs")), _bytes(p.get("bytes")))
        for p in points
    )  # fmt: skip  # a row
    heads = ("target", "ms", "of the original's", str(metric or "accuracy"), "MACs left", "file")
    marked = tuple(place for place, point in enumerate(points) if point.get("picked"))
    yield Sheet("", heads, rows, marked=marked, is_wide=not scored or len(rows) > _FOLDED)


def _deployment(content: Content) -> Iterator[Part]:
    steps = _of(content, "deployment").get("steps") or ()
    if not steps:
        return
    metric = _of(content, "accuracy").get("metric")
    rows = tuple(
        (str(step.get("name") or ""), str(step.get("what") or ""), _bytes(step.get("bytes")),
         _short(step.get("difference")), _score(metric, step.get("accuracy")), "; ".join(step.get("notes") or ()))
        for step in steps
    )  # fmt: skip  # a row
    heads = ("step", "what it does", "file", "difference", str(metric or "accuracy"), "notes")
    yield Sheet("", heads, rows, words=(0, 1, 5))
    yield Sentence(
        "Difference: how far the outputs of a step are from those of the model before it, relative to the largest."
    )


def _kept(content: Content) -> Iterator[Part]:
    fraction = content.get("prunable_fraction")
    if fraction is not None:
        yield Sentence(f"{_percent(fraction)} of the weights have an axis that can be pruned.")
    rows = tuple(
        (entry["reason"], str(entry["axes"]), count(entry["weights"]), largest_text(entry.get("largest") or ()))
        for entry in content.get("kept") or ()
    )
    if rows:
        yield Sheet("", ("reason", "axes", "weights", "the largest"), rows, words=(0, 3), is_folded=len(rows) > _FOLDED)
    without = content.get("without_rule") or {}
    if without:
        yield Listing(
            "No rule for these operators, so their channels are frozen",
            tuple(f"{operator}, at {node}" for operator, node in without.items()),
        )


def _proof(content: Content) -> Iterator[Part]:
    found = _of(content, "verification")
    verdict = _verdict(found)
    if verdict is None:
        yield Sentence(
            "Not verified. Nothing shows that the file computes what its plan says; 'cpd-onnx verify' compares it with "
            "the original.",
            "warning",
        )
        return
    allowed, tone = found.get("allowed", found.get("tolerance")), "" if verdict == VERIFIED else "warning"
    yield Sentence(
        f"The pruned model and the original with the removed channels masked ran on {found.get('runs')} sets of "
        f"inputs. {_PROOF_RESULTS[verdict]}: the outputs differ by at most {_short(found.get('difference'))} of the "
        f"largest output, and {_short(allowed)} is allowed.",
        tone,
    )
    for note in found.get("notes") or ():
        yield Sentence(f"{str(note)[:1].upper()}{str(note)[1:]}.", tone)
    yield Listing("What this means", tuple(_meanings(found)))


def _meanings(found: Content) -> Iterator[str]:
    if _is_replay(found):
        yield "The file equals, byte for byte, the plan applied to the original."
    else:
        yield (
            "Nodes, shapes and everything but values equal the plan applied to the original; "
            f"{found.get('trained')} weights have other values, because they were fitted or trained afterwards."
        )
    if found.get("noise"):
        yield f"Rounding alone changes the outputs by {_short(found.get('noise'))}."
    yield (
        f"Masking the removed channels changes the outputs by {_short(found.get('effect'))}. Repair and training have "
        "to compensate for that."
    )
    yield "The proof does not measure the accuracy of the model, which takes data: see the section on accuracy."


def _provenance(content: Content) -> Iterator[Part]:
    found = _of(content, "provenance")
    if found.get("command"):
        yield Code(str(found["command"]))
    listed = list(found.get("files") or ())
    known = {"", None} | {entry.get("file") for entry in listed}
    files = [entry for name in ("source", "output") if (entry := _of(content, name)).get("file") not in known]
    rows = [(e["file"], "" if e in files else _bytes(e.get("bytes")), e.get("sha256") or "") for e in files + listed]
    if rows:
        yield Sheet("Files", ("file", "size", "SHA-256"), tuple(rows), words=(0, 2))
    versions = _of(found, "versions")
    machine = {f"machine: {name}": each for name, each in _of(found, "machine").items() if name not in versions}
    yield from _facts("Environment", {"tool": found.get("tool"), "seed": found.get("seed"), **versions} | machine)
    yield from _facts("Seconds", {name: _ms(value) for name, value in _of(found, "seconds").items()})


_SECTIONS: tuple[tuple[str, str, Callable[[Content], Iterator[Part]]], ...] = (
    ("accuracy", "Accuracy", _accuracy), ("size", "Size and cost", _size), ("latency", "Latency and memory", _latency),
    ("operators", "Time by operator", _operators), ("widths", "Widths", _widths),
    ("sensitivity", "Sensitivity", _sensitivity), ("training", "Training", _training), ("sweep", "Sweep", _sweep),
    ("deployment", "Deployment", _deployment), ("kept", "What cannot be pruned, and why", _kept),
    ("verification", "Verification", _proof), ("provenance", "Provenance", _provenance),
)  # fmt: skip  # a table
"""Identifier, heading and function of each section, in the order of the page."""


# Parts of the content.


def bench_of(content: Content) -> Bench:
    """Return the benchmark that `Bench.as_json` turned into plain values."""
    timings = tuple(
        Timing(**{**timing, "setting": Setting(**timing["setting"])}) for timing in content.get("timings") or ()
    )
    profiled = Setting(**content["profiled"]) if content.get("profiled") else Setting(threads=1)
    return Bench(timings, _of(content, "memory"), _of(content, "profiles"), profiled, _of(content, "machine"))


def _of(content: Content, name: str) -> Content:
    """Return a part of the content; empty if it is absent."""
    found: Content = content.get(name) or {}
    return found


def _costs(content: Content) -> list[tuple[str, float, float, str]]:
    """Return name, value before, value after, and percentage left of each cost that the original has."""
    return [(name, old, new, share(new, old)) for name, old, new in cost_rows(content) if old]


def _cost(name: str, value: float) -> str:
    return bytes_text(value) if name == "file" else count(value)


def _speed(content: Content) -> tuple[Timing, Timing] | None:
    """Return the timings of the original and of the result under the first setting; None if not measured."""
    timings = bench_of(_of(content, "bench")).timings
    timings = tuple(timing for timing in timings if timing.setting == timings[0].setting)
    if len(timings) < 2:
        return None
    name = _of(content, "output").get("file")
    return timings[0], next((timing for timing in timings[1:] if timing.model == name), timings[-1])


def _on(content: Content) -> str:
    """Return what the outputs are compared with to measure accuracy."""
    return str(_of(content, "accuracy").get("on") or _LABELS)


def _scores(content: Content) -> list[tuple[str, float]]:
    values = _of(content, "accuracy").get("values") or {}
    return [(name, float(value)) for name, value in values.items() if value is not None and math.isfinite(value)]


def _facts(title: str, facts: Mapping[str, Any]) -> Iterator[Sheet]:
    """Yield a table of names and values, without those that are absent; nothing if all are."""
    rows = tuple((name, _plain(value)) for name, value in facts.items() if value not in (None, "", _MISSING))
    if rows:
        yield Sheet(title, ("", ""), rows, words=(0, 1), is_wide=False)


def _best(scored: Mapping[str, Any], values: Sequence[float]) -> str:
    if not values:
        return ""
    return _score(scored.get("metric"), min(values) if lower_is_better(scored) else max(values))


# Numbers and lists as text.


def _number(value: Any) -> float:
    """Return the value as a number; NaN for None."""
    return math.nan if value is None else float(value)


def _score(metric: Any, value: Any) -> str:
    number = _number(value)
    if not math.isfinite(number):
        return _MISSING
    return f"{100 * number:.2f} %" if metric in _FRACTIONS else f"{number:.4g}"


def _change(metric: Any, first: float, last: float) -> str:
    """Return the change of a score, with its sign."""
    text = f"{100 * (last - first):+.2f} points" if metric in _FRACTIONS else f"{last - first:+.3g}"
    return text.replace("-", "−")  # noqa: RUF001  # a minus is meant


def _percent(value: Any) -> str:
    number = _number(value)
    return f"{100 * number:.1f} %" if math.isfinite(number) else _MISSING


def _faster(ratio: float) -> str:
    """Return the speedup that corresponds to a ratio of times."""
    return f"{1 / ratio:.2f}×" if ratio > 0 else _MISSING  # noqa: RUF001  # times


def _of_first(part: float, first: float) -> str:
    """Return a ratio as a percentage, or as a factor if the percentage would be large."""
    return share(part, first) if part < _MANY * first else f"{part / first:.0f}×" if first else _MISSING  # noqa: RUF001


def _ms(value: Any) -> str:
    """Return a time with three or four significant digits."""
    number = _number(value)
    if not math.isfinite(number):
        return _MISSING
    digits = next((d for limit, d in ((0.1, 4), (1.0, 3), (10.0, 2), (100.0, 1)) if abs(number) < limit), 0)
    return f"{number:.{digits}f}"


def _short(value: Any) -> str:
    number = _number(value)
    return _MISSING if math.isnan(number) else f"{number:.2g}"


def _count(value: Any) -> str:
    return _MISSING if value is None else count(float(value))


def _bytes(value: Any) -> str:
    return _MISSING if value is None else bytes_text(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items()) or "none"
    return str(value)


def _count_of(found: Content) -> str:
    samples = found.get("samples")
    return f"{samples:,} samples" if samples else "an unknown number of samples"


def _conditions(setting: Setting) -> str:
    return setting.words() + ("" if setting.threads else ", default threads")


def _joined(words: Sequence[str]) -> str:
    """Return an enumeration.

    >>> _joined(["one", "two", "three"])
    'one, two and three'
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
