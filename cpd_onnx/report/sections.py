"""What a report says, and in which order, before it is HTML or Markdown.

Each section is a function from the report's content to parts: sentences, tables, figures. A section without parts is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from cpd_onnx.data.metrics import lower_is_better
from cpd_onnx.proof.comparison import INCONCLUSIVE, VERDICTS, VERIFIED, WRONG
from cpd_onnx.report import figures as plots
from cpd_onnx.report.tables import longest, repair_line
from cpd_onnx.runtime.bench import Bench, Setting, Timing
from cpd_onnx.summary import count, share

Content: TypeAlias = Mapping[str, Any]
Part: TypeAlias = "Sentence | Listing | Sheet | Picture | Code"

_NOTHING = "–"  # noqa: RUF001  # a dash is meant
_SHARES = ("top1", "top5", "miou")
"""Metrics that are shares, told in percent."""
_LABELS = "labels"
_FOLDED = 20
"""Rows from which on a table is folded."""
_LETTERS = 26
"""Longer words may be broken."""
_LONGEST = 12
_MANY = 10
"""From this ratio on it is told as a multiple and not in percent."""
_RESTLESS = 1.3
"""From this ratio of the ninetieth percentile to the median on, something else used the machine."""
_STAGES = {"original": "the original"}
_BUDGETS = {"macs": "MACs", "params": "parameters", "channels": "channels", "bytes": "file", "latency": "latency"}
_SHORT = {"MACs": "MACs", "parameters": "Params", "file": "File"}
_OF_BUDGET = ("kind", "target", "spread")


@dataclass(frozen=True)
class Sentence:
    """One or more of them; `tone` is "" or "warning"."""

    form: ClassVar[str] = "sentence"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Listing:
    """Points, one under the other."""

    form: ClassVar[str] = "listing"
    title: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        words: places of columns that hold words and not numbers.
        is_folded: whether it is shown only when asked for.
        is_wide: whether it takes all of the page.
        marked: places of rows that stand out.

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
        """Letters that a column of words should have room for, so that neither words nor short names are broken."""
        cells = [row[column] for row in self.rows]
        words = [word for cell in cells for word in ([cell] if len(cell) <= _LETTERS else cell.split())]
        return min(_LETTERS, max(map(len, words), default=0))


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        key: its name within the page.
        title: stands under it.
        label: what it shows, for those who cannot see it.
        drawing: narrow, or as wide as the page where there is one for phones too.
        on_phones: the same for phones.

    """

    form: ClassVar[str] = "picture"
    key: str
    title: str
    label: str
    drawing: plots.Drawing
    on_phones: plots.Drawing | None = None


@dataclass(frozen=True)
class Code:
    """Text to be copied as it is."""

    form: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    key: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Card:
    """One of the things to be seen first.

    Attributes:
        value: large.
        detail: small, under it.
        tone: "good", "bad", "unknown" or "".
        left: what is left of the original's, where the card is about that.

    """

    label: str
    value: str
    detail: str
    tone: str = ""
    left: float | None = None


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    files: str
    lead: str
    cards: tuple[Card, ...]
    notes: tuple[str, ...]
    advice: tuple[str, ...]
    sections: tuple[Section, ...]
    tool: str


def page(content: Content) -> Page:
    """What a report says."""
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


# What is seen first.


def _lead(content: Content) -> str:
    """What was bought and at what price, and what nobody knows."""
    fast, values = _speed(content), _scores(content)
    costs = _joined([f"{left} of the {name}" for name, _, _, left in _left(content)])
    verdict = _verdict(_of(content, "verification"))
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
        sentences.append(f"{metric} is {last}, the original's {first}.")
    elif values:
        metric = content["accuracy"]["metric"]
        sentences.append(f"Against {_on(content)}: {metric} {_score(metric, values[-1][1])}.")
    unknown = [*([] if fast else ["how fast it is"]), *([] if is_judged else ["how accurate it is"])]
    unknown += [] if content.get("verification") else ["whether it does what its plan says"]
    if unknown:
        sentences.append(f"Not known: {_joined(unknown)}.")
    return " ".join(sentences)


def _cards(content: Content) -> Iterator[Card]:
    yield _speed_card(content)
    yield _accuracy_card(content)
    yield _proof_card(content)
    for name, before, after, left in _left(content):
        told = _bytes if name == "file" else _count
        kept = _number(after) / _number(before)
        yield Card(f"{_SHORT[name]} left", left, f"{told(before)} → {told(after)}", "", kept)


def _speed_card(content: Content) -> Card:
    fast = _speed(content)
    if fast is None:
        return Card("Speed", "Unknown", "nobody has measured it", "unknown")
    before, after = fast
    detail = f"as fast: {_ms(before.p50)} → {_ms(after.p50)} ms a run; {_conditions(after.setting)}"
    doubt = _doubt(before, after)
    if doubt:
        return Card("Speed", _faster(after.ratio), f"{detail}; {doubt}", "unknown")
    return Card("Speed", _faster(after.ratio), detail, "good" if after.ratio < 1 else "bad")


def _doubt(before: Timing, after: Timing) -> str:
    """Why the two medians say little, if they do."""
    if _restlessness((before, after)) > _RESTLESS:
        return "the machine was busy: measure again"
    fast, slow = sorted((before, after), key=lambda timing: timing.p50)
    return "the runs of both overlap" if fast.p90 > slow.p10 else ""


def _accuracy_card(content: Content) -> Card:
    values = _scores(content)
    if not values:
        return Card("Accuracy", "Unknown", "no data to judge it on was given", "unknown")
    metric, how_many = content["accuracy"]["metric"], _count_of(content["accuracy"])
    first, last = values[0][1], values[-1][1]
    if _on(content) != _LABELS:
        detail = f"{metric} against {_on(content)}, {how_many}; how often it is right is unknown"
        return Card("Distance from the original", _score(metric, last), detail, "unknown")
    if len(values) == 1:
        return Card(f"Accuracy, {metric}", _score(metric, last), f"the original's is unknown; {how_many}", "unknown")
    text = f"{_score(metric, first).removesuffix(' %')} → {_score(metric, last)}"
    return Card(f"Accuracy, {metric}", text, f"{_change(metric, first, last)}; {how_many} with labels")


def _verdict(found: Content) -> str:
    """What a proof found; reports of before there were three verdicts say whether it passed."""
    verdict = found.get("verdict")
    return str(verdict) if verdict in VERDICTS else VERIFIED if found.get("passed", True) else WRONG


def _proof_card(content: Content) -> Card:
    found = content.get("verification")
    if not found:
        return Card("Proof", "Not verified", "nothing shows that the file does what its plan says", "bad")
    if _verdict(found) == WRONG:
        return Card("Proof", "Wrong", "the file does not compute what its plan says: do not use it", "bad")
    if _verdict(found) == INCONCLUSIVE:
        return Card("Proof", "Inconclusive", "the inputs that were tried do not show whether it is right", "unknown")
    trained = found.get("trained")
    detail = "byte for byte what the plan makes of the original"
    if not found.get("is_replay", not trained):
        detail = f"structure and removal proven; {trained} weights have new values"
    return Card("Proof", "Verified", detail, "good")


# The sections.


def _accuracy(content: Content) -> Iterator[Part]:
    values = _scores(content)
    if not values:
        yield Sentence("Nobody has measured it: that takes data, with labels or to compare answers on.", "warning")
    else:
        found = content["accuracy"]
        metric = found["metric"]
        rows = [
            (_STAGES.get(name, name), _score(metric, value), "" if not place else _change(metric, values[0][1], value))
            for place, (name, value) in enumerate(values)
        ]
        yield Sheet("", ("model", str(metric), "change"), tuple(rows), is_wide=False)
        yield Sentence(_meaning(found, [value for _, value in values]))
    if content.get("repaired"):
        line = repair_line(content["repaired"]).replace("->", "→")
        yield Sentence(f"{line[0].upper()}{line[1:]}.")


def _meaning(found: Content, values: Sequence[float]) -> str:
    """What the figures stand for, and how far chance alone may move them."""
    samples, metric = found.get("samples"), found["metric"]
    on = found.get("on") or _LABELS
    text = f"{metric} on {_count_of(found)}, against {on}."
    if on != _LABELS:
        text += " That tells how close it is to the original, not how often it is right: that takes labels."
    if metric in ("top1", "top5") and samples:
        reach = max(1.96 * math.sqrt(max(0.0, value * (1 - value)) / samples) for value in values)
        text += f" With so many samples, chance moves each figure by up to {100 * reach:.1f} points (95 %)."
    return text


def _size(content: Content) -> Iterator[Part]:
    rows = [
        (name, told(before), told(after), left)
        for name, before, after, left in _left(content, with_channels=True)
        for told in (_bytes if name == "file" else _count,)
    ]
    if rows:
        yield Sheet("", ("", "before", "after", "left"), tuple(rows), is_wide=False)
    budget = content.get("budget") or {}
    if "kind" in budget:
        kind, target = str(budget["kind"]), budget.get("target")
        asked = f"Asked for: {_percent(target)} of the {_BUDGETS.get(kind, kind)}"
        spread = f", spread {budget['spread']} over the groups" if budget.get("spread") else ""
        said = {
            name: value
            for name, value in budget.items()
            if name not in _OF_BUDGET and value not in (None, False, [], {})
        }
        more = [f"{name} {_plain(value)}" for name, value in said.items() if not isinstance(value, Mapping)]
        yield Sentence(
            f"{asked}{spread}{'; ' if more else ''}{', '.join(more)}. MACs are multiply-accumulates a sample."
        )


def _latency(content: Content) -> Iterator[Part]:
    if not content.get("bench"):
        yield Sentence(
            "Not measured: fewer MACs are not always less time, 'cpd-onnx bench' says what they are here.", "warning"
        )
        return
    found = bench_of(content["bench"])
    if found.timings:
        yield Picture(
            "latency", "Latency of one run: the dot is the median, the line goes from the 10th to the 99th percentile.",
            _heard_latency(found), plots.latencies(found),
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
    restless = _restlessness(found.timings)
    if restless > _RESTLESS:
        yield Sentence(
            f"The runs differ: one in ten took {restless:.1f} times the median or more. Something else used the "
            "machine; measure again on a quiet one before you rely on these figures.",
            "warning",
        )


def _restlessness(timings: Iterable[Timing]) -> float:
    """How many times the median the slowest tenth of the runs takes at least."""
    return max((timing.p90 / timing.p50 for timing in timings if timing.p50), default=1.0)


def _operators(content: Content) -> Iterator[Part]:
    found = bench_of(content.get("bench") or {})
    if not any(found.profiles.values()):
        return
    yield Picture(
        "operators", "Time by operator in one run on one thread, from onnxruntime's profiler.",
        "Bars of milliseconds by operator: " + _spoken(
            f"{name} {' and '.join(f'{ms:.3g}' for ms in spent)}" for name, spent in longest(found.profiles, 3)[:3]
        ), plots.operators(found), plots.operators(found, plots.PHONE),
    )  # fmt: skip  # name, words and figure
    rows = tuple(
        (name, f"{spent[0]:.3f}", *(part for ms in spent[1:] for part in (f"{ms:.3f}", _of_first(ms, spent[0]))))
        for name, spent in longest(found.profiles, _LONGEST)
    )
    first, *others = found.profiles
    heads = ("operator", f"{first}, ms", *(part for name in others for part in (f"{name}, ms", "of the first")))
    yield Sheet("", heads, rows, marked=(len(rows) - 1,))


def _widths(content: Content) -> Iterator[Part]:
    groups = content.get("groups") or ()
    if not groups:
        return
    touched = [group for group in groups if group["kept"] < group["size"]]
    yield Sentence(
        f"{len(touched)} of {len(groups)} groups of coupled channels lost some. A group is one width of the network, "
        "such as that of a residual stage or the heads of a block: its channels can only go together."
    )
    drawn = [(group["name"], group["size"], group["kept"]) for group in groups]
    yield Picture(
        "widths", "Channels of each group before and after, in the order of the table.",
        f"Widths of {len(groups)} groups before and after; " + _spoken(
            f"{group['name']} from {group['size']} to {group['kept']}" for group in touched[:3]
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
        f"What the outputs lose when one group alone loses channels: {error}. The higher, the more it matters."
    )
    curves = {group["group"]: [(p["width"], _number(p["error"])) for p in group["points"]] for group in groups}
    worst = sorted(curves, key=lambda name: -max(value for _, value in curves[name]))
    yield Picture(
        "sensitivity", "Error of the outputs over the channels that one group keeps while all others stay whole.",
        f"Error over width for {len(groups)} groups; most sensitive: {_spoken(worst[:3])}.",
        plots.sensitivities(curves, "error"), plots.sensitivities(curves, "error", plots.PHONE),
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
            "training", "The original teaches the pruned model: the loss of each update, and smoothed.",
            f"Loss over {len(losses)} updates, from {_short(losses[0])} to {_short(losses[-1])}.",
            plots.training(losses, watched, f"{metric}, on samples kept from training"),
        )  # fmt: skip  # name, words and figure
    facts = {
        "updates": found.get("steps"),
        "rounds of pruning and training": found.get("rounds") or content.get("rounds"),
        "seconds": found.get("seconds"),
        "device": found.get("device"),
        "loss": f"{_short(losses[0])} → {_short(losses[-1])}" if losses else None,
        **{f"output {name}": f"by {kind}" for name, kind in (found.get("losses_by") or {}).items()},
        f"best {metric} on the way": _best(scored, [value for _, value in watched]),
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
            f"{metric} against latency of {len(scored)} models; chosen: {_spoken(picked) or 'none'}",
            plots.tradeoff(scored, str(metric), is_less_better=lower_is_better(found)),
        )  # fmt: skip  # name, words and figure
    rows = tuple(
        (f"{p.get('name') or ''}{' (chosen)' if p.get('picked') else ''}", _ms(p.get("ms")), _percent(p.get("ratio")),
         _score(metric, p.get("accuracy")), _percent(p.get("macs")), _bytes(p.get("bytes")))
        for p in points
    )  # fmt: skip  # a row
    heads = ("asked for", "ms", "of the original's", str(metric or "accuracy"), "MACs left", "file")
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
        "The difference is that of the outputs from those of the model before the step, relative to the largest."
    )


def _kept(content: Content) -> Iterator[Part]:
    fraction = content.get("prunable_fraction")
    if fraction is not None:
        yield Sentence(f"{_percent(fraction)} of the weights lie on an axis that channels can be taken from.")
    rows = tuple(
        (entry["reason"], str(entry["axes"]), count(entry["weights"]),
         ", ".join(f"{e['tensor']} {e['dims']} axis {e['axis']}" for e in entry.get("largest") or ()))
        for entry in content.get("kept") or ()
    )  # fmt: skip  # a row
    if rows:
        yield Sheet("", ("reason", "axes", "weights", "the largest"), rows, words=(0, 3), is_folded=len(rows) > _FOLDED)
    without = content.get("without_rule") or {}
    if without:
        yield Listing(
            "No rule for these operators, so that their channels are kept",
            tuple(f"{operator}, at {node}" for operator, node in without.items()),
        )


_SAID = {
    VERIFIED: "It passed", INCONCLUSIVE: "That shows too little to say that the file is right, or wrong",
    WRONG: "It failed: do not use the file",
}  # fmt: skip  # a table


def _proof(content: Content) -> Iterator[Part]:
    found = content.get("verification")
    if not found:
        yield Sentence(
            "Not verified. Nothing shows that the file computes what its plan says; 'cpd-onnx verify' compares the two "
            "files.",
            "warning",
        )
        return
    allowed, verdict = found.get("allowed", found.get("tolerance")), _verdict(found)
    yield Sentence(
        f"The original ran with the removed channels masked, the small model ran beside it, on {found.get('runs')} "
        f"sets of inputs. {_SAID[verdict]}: the outputs differ by at most {_short(found.get('difference'))} of the "
        f"largest output, and {_short(allowed)} is allowed.",
        "" if verdict == VERIFIED else "warning",
    )
    for note in found.get("notes") or ():
        yield Sentence(f"{str(note)[:1].upper()}{str(note)[1:]}.", "" if verdict == VERIFIED else "warning")
    yield Listing("What that means", tuple(_meanings(found)))


def _meanings(found: Content) -> Iterator[str]:
    trained = found.get("trained")
    if found.get("is_replay", not trained):
        yield "The file is, byte for byte, what the plan makes of the original."
    else:
        yield (
            f"Nodes, shapes and everything but values are what the plan makes of the original; {trained} weights have "
            "other values, because they were fitted or trained since."
        )
    if found.get("noise"):
        yield f"Rounding alone moves the outputs by {_short(found.get('noise'))}."
    yield (
        f"Masking the removed channels moves the outputs by {_short(found.get('effect'))}. That is what repair and "
        "training have to make up for."
    )
    yield "It does not say how accurate the model is: that takes data, and stands under accuracy."


def _provenance(content: Content) -> Iterator[Part]:
    found = _of(content, "provenance")
    if found.get("command"):
        yield Code(str(found["command"]))
    files = [(what, content.get(what)) for what in ("source", "output")]
    known = {entry.get("file") for entry in found.get("files") or ()}
    rows = [(e["file"], "", e.get("sha256") or "") for _, e in files if e and e.get("file") and e["file"] not in known]
    rows += [(e["file"], _bytes(e.get("bytes")), e.get("sha256") or "") for e in found.get("files") or ()]
    if rows:
        yield Sheet("Files", ("file", "size", "SHA-256"), tuple(rows), words=(0, 2))
    versions = _of(found, "versions")
    machine = {f"machine: {name}": each for name, each in _of(found, "machine").items() if name not in versions}
    yield from _facts("Made with", {"tool": found.get("tool"), "seed": found.get("seed"), **versions} | machine)
    yield from _facts("Seconds", {name: _ms(value) for name, value in _of(found, "seconds").items()})


_SECTIONS: tuple[tuple[str, str, Callable[[Content], Iterator[Part]]], ...] = (
    ("accuracy", "Accuracy", _accuracy), ("size", "Size and cost", _size), ("latency", "Latency and memory", _latency),
    ("operators", "Where the time goes", _operators), ("widths", "Widths", _widths),
    ("sensitivity", "Sensitivity", _sensitivity), ("training", "Training", _training), ("sweep", "Sweep", _sweep),
    ("deployment", "Deployment", _deployment), ("kept", "What was kept, and why", _kept),
    ("verification", "Verification", _proof), ("provenance", "Where it comes from", _provenance),
)  # fmt: skip  # a table


# What they are made of.


def bench_of(content: Content) -> Bench:
    """What `Bench.as_json` gave, as it was."""
    timings = tuple(
        Timing(**{**timing, "setting": Setting(**timing["setting"])}) for timing in content.get("timings") or ()
    )
    profiled = Setting(**content["profiled"]) if content.get("profiled") else Setting(threads=1)
    return Bench(timings, _of(content, "memory"), _of(content, "profiles"), profiled, _of(content, "machine"))


def _of(content: Content, name: str) -> Content:
    """A part of the content; nothing in it where it is absent."""
    found: Content = content.get(name) or {}
    return found


def _left(content: Content, *, with_channels: bool = False) -> list[tuple[str, float, float, str]]:
    """What there is of each cost: name, before, after, and what is left."""
    before, after, sizes = (_of(content, name) for name in ("before", "after", "bytes"))
    names = {"MACs": "macs", "parameters": "params"} | ({"prunable channels": "channels"} if with_channels else {})
    rows = [(name, before[key], after[key]) for name, key in names.items() if key in before and key in after]
    if "before" in sizes and "after" in sizes:
        rows.append(("file", sizes["before"], sizes["after"]))
    return [(name, old, new, share(new, old)) for name, old, new in rows if old]


def _of_first_setting(content: Content) -> list[Timing]:
    timings = bench_of(_of(content, "bench")).timings
    return [timing for timing in timings if timing.setting == timings[0].setting]


def _speed(content: Content) -> tuple[Timing, Timing] | None:
    """How long the original takes and how long the result does; nothing where that was not measured."""
    timings = _of_first_setting(content)
    if len(timings) < 2:
        return None
    name = _of(content, "output").get("file")
    return timings[0], next((timing for timing in timings[1:] if timing.model == name), timings[-1])


def _on(content: Content) -> str:
    """What accuracy is measured against."""
    return str(_of(content, "accuracy").get("on") or _LABELS)


def _scores(content: Content) -> list[tuple[str, float]]:
    values = _of(content, "accuracy").get("values") or {}
    return [(name, float(value)) for name, value in values.items() if value is not None and math.isfinite(value)]


def _facts(title: str, facts: Mapping[str, Any]) -> Iterator[Sheet]:
    """A table of names and values, of those that there are."""
    rows = tuple((name, _plain(value)) for name, value in facts.items() if value not in (None, "", _NOTHING))
    if rows:
        yield Sheet(title, ("", ""), rows, words=(0, 1), is_wide=False)


def _best(scored: Mapping[str, Any], values: Sequence[float]) -> str:
    if not values:
        return ""
    return _score(scored.get("metric"), min(values) if lower_is_better(scored) else max(values))


def _heard_latency(found: Bench) -> str:
    return "Median latency: " + _spoken(
        f"{t.model} {_ms(t.p50)} ms, {_conditions(t.setting)}" for t in found.timings[:4]
    )


# Numbers in words.


def _number(value: Any) -> float:
    """The number; none at all is no number."""
    return math.nan if value is None else float(value)


def _score(metric: Any, value: Any) -> str:
    number = _number(value)
    if not math.isfinite(number):
        return _NOTHING
    return f"{100 * number:.2f} %" if metric in _SHARES else f"{number:.4g}"


def _change(metric: Any, first: float, last: float) -> str:
    """By how much a score moved."""
    if metric in _SHARES:
        points = f"{100 * (last - first):+.2f} points"
        return points.replace("-", "−")  # noqa: RUF001  # a minus is meant
    return f"{last - first:+.3g}".replace("-", "−")  # noqa: RUF001  # a minus is meant


def _percent(value: Any) -> str:
    number = _number(value)
    return f"{100 * number:.1f} %" if math.isfinite(number) else _NOTHING


def _faster(ratio: float) -> str:
    """How many times as fast something is that takes so much of the time."""
    return f"{1 / ratio:.2f}×" if ratio > 0 else _NOTHING  # noqa: RUF001  # times


def _of_first(part: float, first: float) -> str:
    """A share, or a multiple where percent would be unreadable."""
    return share(part, first) if part < _MANY * first else f"{part / first:.0f}×" if first else _NOTHING  # noqa: RUF001


def _ms(value: Any) -> str:
    """Three or more digits, of which none is noise."""
    number = _number(value)
    if not math.isfinite(number):
        return _NOTHING
    digits = next((d for limit, d in ((0.1, 4), (1.0, 3), (10.0, 2), (100.0, 1)) if abs(number) < limit), 0)
    return f"{number:.{digits}f}"


def _short(value: Any) -> str:
    number = _number(value)
    return _NOTHING if math.isnan(number) else f"{number:.2g}"


def _count(value: Any) -> str:
    return _NOTHING if value is None else count(float(value))


def _bytes(value: Any) -> str:
    if value is None:
        return _NOTHING
    text = count(float(value))
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


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
    return f"{samples:,} samples" if samples else "samples that nobody counted"


def _conditions(setting: Setting) -> str:
    words = (
        setting.provider.removesuffix("ExecutionProvider"),
        f"batch {setting.batch}" if setting.batch else "",
        f"{setting.threads} thread{'s' if setting.threads > 1 else ''}" if setting.threads else "threads as it likes",
    )
    return ", ".join(word for word in words if word)


def _joined(words: Sequence[str]) -> str:
    """Some words as a sentence has them.

    >>> _joined(["one", "two", "three"])
    'one, two and three'
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _spoken(words: Iterable[str]) -> str:
    """Some words, one after the other."""
    return "; ".join(words)
