"""Numbers and lists as text, and the parts of a report's content that several sections read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

from cpd_onnx.proof.comparison import VERDICTS, VERIFIED, WRONG
from cpd_onnx.report.tables import bytes_text, cost_rows
from cpd_onnx.runtime.bench import Bench, Setting, Timing
from cpd_onnx.runtime.sessions import Method
from cpd_onnx.summary import count, share

Content: TypeAlias = Mapping[str, Any]
"""A report's content, or a part of it, as `document.schema` describes it."""

MISSING = "–"  # noqa: RUF001  # a dash is meant
"""Text in place of a number that is not known."""
FRACTIONS = ("top1", "top5", "miou", "same answer")
"""Metrics that are fractions and shown in percent."""
LABELS = "labels"
"""What a metric is measured against, if not against the original."""
BUSY = 1.3
"""Ratio of the 90th percentile of the run times to the median above which the machine counts as busy (heuristic)."""
_MANY = 10
"""Ratio from which a factor is shown instead of a percentage (heuristic)."""


# Parts of the content.


def of(content: Content, name: str) -> Content:
    """Return a part of the content; empty if it is absent."""
    found: Content = content.get(name) or {}
    return found


def is_of_many(content: Content) -> bool:
    """Return whether a report is on several models instead of one, as that of a sweep."""
    return bool(content.get("sweep")) and not of(content, "output").get("file")


def bench_of(content: Content) -> Bench:
    """Return the benchmark that `Bench.as_json` turned into plain values."""
    timings = tuple(
        Timing(**{**timing, "setting": Setting(**timing["setting"])}) for timing in content.get("timings") or ()
    )
    profiled = Setting(**content["profiled"]) if content.get("profiled") else Setting(threads=1)
    method = Method(**of(content, "method"))
    return Bench(timings, of(content, "memory"), of(content, "profiles"), profiled, of(content, "machine"), method)


def costs_of(content: Content) -> list[tuple[str, float, float, str]]:
    """Return name, value before, value after, and percentage left of each cost that the original has."""
    return [(name, old, new, share(new, old)) for name, old, new in cost_rows(content) if old]


def speed_of(content: Content) -> tuple[Timing, Timing] | None:
    """Return the timings of the original and of the result under the first setting; None if not measured."""
    timings = bench_of(of(content, "bench")).timings
    timings = tuple(timing for timing in timings if timing.setting == timings[0].setting)
    if len(timings) < 2:
        return None
    name = of(content, "output").get("file")
    return timings[0], next((timing for timing in timings[1:] if timing.model == name), timings[-1])


def scores_of(content: Content) -> list[tuple[str, float]]:
    """Return the scores that were measured, by model, the original's first."""
    values = of(content, "accuracy").get("values") or {}
    return [(name, float(value)) for name, value in values.items() if value is not None and math.isfinite(value)]


def compared_with(content: Content) -> str:
    """Return what the outputs are compared with to measure accuracy."""
    return str(of(content, "accuracy").get("on") or LABELS)


def proof_of(found: Content | None) -> str | None:
    """Return the verdict of a proof; None if there is none.

    Reports written before there were three verdicts only say whether it passed.
    """
    if not found:
        return None
    verdict = found.get("verdict")
    return str(verdict) if verdict in VERDICTS else VERIFIED if found.get("passed", True) else WRONG


def is_replay(found: Content) -> bool:
    """Return whether the file equals the plan applied to the original, without refitted or trained weights."""
    return bool(found.get("is_replay", not found.get("trained")))


def doubt_of(before: Timing, after: Timing) -> str:
    """Return the reason why the medians of two models are not comparable; empty if they are."""
    if variation((before, after)) > BUSY:
        return "the machine was busy: measure again"
    fast, slow = sorted((before, after), key=lambda timing: timing.p50)
    return "the run times of both overlap" if fast.p90 > slow.p10 else ""


def variation(timings: Iterable[Timing]) -> float:
    """Return the largest ratio of the 90th percentile of the run times to their median."""
    return max((timing.p90 / timing.p50 for timing in timings if timing.p50), default=1.0)


# Numbers and lists as text.


def number(value: Any) -> float:
    """Return the value as a number; NaN for None."""
    return math.nan if value is None else float(value)


def score(metric: Any, value: Any) -> str:
    """Return a score, in percent if the metric is a fraction."""
    found = number(value)
    if not math.isfinite(found):
        return MISSING
    return f"{100 * found:.2f} %" if metric in FRACTIONS else f"{found:.4g}"


def change(metric: Any, first: float, last: float) -> str:
    """Return the change of a score, with its sign."""
    text = f"{100 * (last - first):+.2f} points" if metric in FRACTIONS else f"{last - first:+.3g}"
    return text.replace("-", "−")  # noqa: RUF001  # a minus is meant


def percent(value: Any) -> str:
    """Return a fraction in percent."""
    found = number(value)
    return f"{100 * found:.1f} %" if math.isfinite(found) else MISSING


def faster(ratio: float) -> str:
    """Return the speedup that corresponds to a ratio of times."""
    return f"{1 / ratio:.2f}×" if ratio > 0 else MISSING  # noqa: RUF001  # times


def of_first(part: float, first: float) -> str:
    """Return a ratio as a percentage, or as a factor if the percentage would be large."""
    return share(part, first) if part < _MANY * first else f"{part / first:.0f}×" if first else MISSING  # noqa: RUF001


def ms(value: Any) -> str:
    """Return a time with three or four significant digits."""
    found = number(value)
    if not math.isfinite(found):
        return MISSING
    digits = next((d for limit, d in ((0.1, 4), (1.0, 3), (10.0, 2), (100.0, 1)) if abs(found) < limit), 0)
    return f"{found:.{digits}f}"


def short(value: Any) -> str:
    """Return a number with two significant digits."""
    found = number(value)
    return MISSING if math.isnan(found) else f"{found:.2g}"


def count_text(value: Any) -> str:
    """Return a large number with its unit prefix."""
    return MISSING if value is None else count(float(value))


def size_text(value: Any) -> str:
    """Return a number of bytes with its unit."""
    return MISSING if value is None else bytes_text(value)


def cost_text(name: str, value: float) -> str:
    """Return a cost, by its name in `cost_rows`."""
    return bytes_text(value) if name == "file" else count(value)


def plain(value: Any) -> str:
    """Return any plain value as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(each)}" for name, each in value.items()) or "none"
    return str(value)


def day(text: Any) -> str:
    """Return a date and time in UTC for a reader; empty if there is none.

    >>> day("2026-11-26T05:12:00+00:00")
    '2026-11-26 05:12 UTC'
    """
    try:
        return f"{datetime.fromisoformat(str(text)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):
        return str(text or "")


def samples_text(found: Content) -> str:
    """Return the number of samples of a measurement."""
    samples = found.get("samples")
    return f"{samples:,} samples" if samples else "an unknown number of samples"


def conditions(setting: Setting) -> str:
    """Return the conditions of a timing."""
    return setting.words() + ("" if setting.threads else ", default threads")


def shapes_text(content: Content) -> str:
    """Return names and shapes of the inputs that the figures hold for; empty if they are not known."""
    inputs = content.get("inputs") or ()
    return joined([f"{entry['name']} {list(entry.get('shape') or ())}" for entry in inputs])


def joined(words: Sequence[str]) -> str:
    """Return an enumeration.

    >>> joined(["one", "two", "three"])
    'one, two and three'
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def sentence(text: str) -> str:
    """Return a text with a capital letter at its start and a full stop at its end.

    >>> sentence("a note")
    'A note.'
    """
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text[-1:] in ('.', '?', '!', ':') else '.'}"
