"""The sections of a report, independent of whether it is rendered as HTML, Markdown or PDF.

Each section is a function from the report's content to parts: sentences, tables, figures. A section without parts is
omitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from shlex import quote
from typing import Any, TypeAlias

from cpd_onnx.data.metrics import lower_is_better
from cpd_onnx.proof.comparison import INCONCLUSIVE, VERIFIED, WRONG
from cpd_onnx.report import figures as plots
from cpd_onnx.report.judging import NO, PROVED, TONES, UNKNOWN, YES, agreement_text, cards, judgement, lead
from cpd_onnx.report.parts import DOUBT, MARKS, Code, Listing, Page, Part, Picture, Section, Sentence, Sheet
from cpd_onnx.report.tables import largest_text, longest, prunable_line, repair_line
from cpd_onnx.report.words import (
    BUSY,
    FRACTIONS,
    LABELS,
    MISSING,
    Content,
    bench_of,
    change,
    conditions,
    cost_text,
    costs_of,
    count_text,
    day,
    faster,
    is_of_many,
    is_replay,
    ms,
    number,
    of,
    of_first,
    percent,
    plain,
    proof_of,
    samples_text,
    score,
    scores_of,
    sentence,
    short,
    size_text,
    variation,
)
from cpd_onnx.rewrite.plan import current_budget
from cpd_onnx.runtime.bench import Bench
from cpd_onnx.summary import count, share

_FOLDED = 20
"""Number of rows above which a table is collapsed (heuristic)."""
_MAX_OPERATORS = 12
"""Maximum number of operators in the table of time by operator (heuristic)."""
_BUDGETS = {"macs": "MACs", "params": "parameters", "channels": "channels", "bytes": "file", "latency": "latency"}
"""Names of the kinds of budget."""
_OF_BUDGET = ("kind", "target", "policy", "asked")
"""Entries of the budget that have words of their own."""
_SETTINGS = {"round_to": "widths in multiples of", "rounds": "rounds:", "score": "channels scored by"}
"""Words for options of an allocation; others are shown by their names."""
_PROOF_RESULTS = {
    VERIFIED: "They agree", INCONCLUSIVE: "This does not show whether the file is correct",
    WRONG: "They differ: do not use the file",
}  # fmt: skip  # a table
"""Start of the sentence on the difference by the verdict of the proof."""


def page(content: Content) -> Page:
    """Return the report on a content."""
    found = (Section(key, title, tuple(parts(content))) for key, title, parts in _SECTIONS)
    provenance = of(content, "provenance")
    return Page(
        title=str(content.get("title") or "Report"),
        files=" → ".join(filter(None, (of(content, "source").get("file"), of(content, "output").get("file")))),
        lead=lead(content),
        verdict=judgement(content),
        cards=tuple(cards(content)),
        notes=tuple(content.get("notes") or ()),
        advice=tuple(content.get("advice") or ()),
        sections=tuple(section for section in found if section.parts),
        tool=str(provenance.get("tool") or "cpd-onnx"),
        date=day(provenance.get("date")),
    )


# The sections.


def _accuracy(content: Content) -> Iterator[Part]:
    values = scores_of(content)
    if is_of_many(content) and not values:
        return  # the table of the sweep holds what was measured of each model
    agreement = agreement_text(content)
    if agreement:
        yield Sentence(sentence(agreement))
    if not values and not agreement:
        yield Sentence("Not measured: that takes data, with labels or to compare the outputs on.", "warning")
    if values:
        found = content["accuracy"]
        metric = found["metric"]
        rows = [
            ("the original" if name == "original" else name, score(metric, value),
             change(metric, values[0][1], value) if place else "")
            for place, (name, value) in enumerate(values)
        ]  # fmt: skip  # a row
        yield Sheet("", ("model", str(metric), "change"), tuple(rows), is_wide=False)
        yield Sentence(_meaning(found, [value for _, value in values]), is_wide=False)
    if content.get("repaired"):
        line = repair_line(content["repaired"]).replace("->", "→")
        yield Sentence(f"{line[0].upper()}{line[1:]}.")


def _meaning(found: Content, values: Sequence[float]) -> str:
    """Return what the scores measure, and their statistical error."""
    samples, metric = found.get("samples"), found["metric"]
    on = found.get("on") or LABELS
    text = f"{metric} on {samples_text(found)}, against {on}."
    if on != LABELS:
        text = sentence(text)
        text += " This measures how close the model is to the original, not its accuracy, which takes labels."
    if metric in ("top1", "top5") and samples:
        error = max(1.96 * math.sqrt(max(0.0, value * (1 - value)) / samples) for value in values)
        text += f" With this number of samples, the 95 % confidence interval is at most ±{100 * error:.1f} points."
    return text


def _size(content: Content) -> Iterator[Part]:
    rows = [
        (name, cost_text(name, before), cost_text(name, after), left) for name, before, after, left in costs_of(content)
    ]
    if rows:
        yield Sheet("", ("", "before", "after", "left"), tuple(rows), is_wide=False)
    budget = current_budget(content.get("budget") or {})
    if "kind" in budget:
        kind, target = str(budget["kind"]), budget.get("target")
        asked = f"Target: {percent(target)} of the {_BUDGETS.get(kind, kind)}" if target else f"Target: {kind}"
        if budget.get("asked"):
            asked = f"Target: {', '.join(map(str, budget['asked']))}"
        if content.get("is_bounded"):
            asked += f", found by a search for the fastest model that loses at most {content['max_loss']:g}"
        policy = f", allocation policy {budget['policy']}" if budget.get("policy") else ""
        more = list(_settings(budget))
        yield Sentence(
            f"{asked}{policy}{'; ' if more else ''}{', '.join(more)}. "
            "MACs are multiply-accumulate operations a sample.",
            is_wide=False,
        )


def _settings(budget: Content) -> Iterator[str]:
    """Yield the options of an allocation in words, beyond target and policy; those without effect are omitted."""
    for name, value in budget.items():
        if name in _OF_BUDGET or value in (None, False, []) or isinstance(value, Mapping):
            continue
        if (name == "round_to" and value == 1) or (name == "rounds" and value == 1) or name == "steps":
            continue
        if name == "ratios" and isinstance(value, Sequence) and len(value) == 2:
            yield f"{percent(value[0])} to {percent(value[1])} of each group's channels survive"
            continue
        yield f"{_SETTINGS.get(name, name.replace('_', '-'))} {plain(value)}"


def _latency(content: Content) -> Iterator[Part]:
    if not content.get("bench"):
        yield Sentence("Not measured: fewer MACs do not always mean less time; use 'cpd-onnx bench'.", "warning")
        return
    found = bench_of(content["bench"])
    if found.timings:
        yield Picture(
            "latency", "Latency of one run: the dot is the median, the line spans the 10th to the 99th percentile.",
            "Median latency: " + "; ".join(
                f"{t.model} {ms(t.p50)} ms, {conditions(t.setting)}" for t in found.timings[:4]
            ), plots.latencies(found), plots.latencies(found, plots.PHONE), is_wide=False,
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
    words = [text.format(plain(machine[name])) for name, text in known.items() if machine.get(name)]
    return words + [f"{name} {plain(value)}" for name, value in machine.items() if name not in known]


def _timings(found: Bench) -> Iterator[Part]:
    columns = ("model", "conditions", "p10 ms", "p50 ms", "p90 ms", "p99 ms", "samples/s", "runs", "of the first")
    rows = tuple(
        (t.model, conditions(t.setting), *map(ms, (t.p10, t.p50, t.p90, t.p99)), ms(t.per_second), str(t.runs),
         percent(t.ratio))
        for t in found.timings
    )  # fmt: skip  # a row
    if rows:
        yield Sheet("", columns, rows, words=(0, 1), is_folded=len(rows) > _FOLDED)
    longer = variation(found.timings)
    if longer > BUSY:
        yield Sentence(
            f"The run times vary: one run in ten took {longer:.1f} times the median or more. Other processes used "
            "the machine; measure again on an idle one before you rely on these figures.",
            "warning",
        )


def _operators(content: Content) -> Iterator[Part]:
    found = bench_of(content.get("bench") or {})
    if not any(found.profiles.values()):
        return
    yield Picture(
        "operators", "Time by operator in one run on one thread, from onnxruntime's profiler.",
        "Bars of milliseconds by operator: " + "; ".join(
            f"{name} {' and '.join(f'{each:.3g}' for each in spent)}" for name, spent in longest(found.profiles, 3)[:3]
        ), plots.operators(found), plots.operators(found, plots.PHONE),
    )  # fmt: skip  # name, words and figure
    rows = tuple(
        (name, f"{spent[0]:.3f}", *(part for each in spent[1:] for part in (f"{each:.3f}", of_first(each, spent[0]))))
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
        (str(place), group["name"], group.get("kind") or "", str(group["size"]), str(group["kept"]),
         share(group["kept"], group["size"]), count_text(group.get("macs")), count_text(group.get("params")))
        for place, group in enumerate(groups, 1)
    )  # fmt: skip  # a row
    heads = ("number", "group", "kind", "before", "after", "left", "MACs before", "parameters before")
    yield Sheet("All groups", heads, rows, words=(1, 2), is_folded=len(rows) > _FOLDED)


def _sensitivity(content: Content) -> Iterator[Part]:
    found = content.get("sensitivity") or {}
    groups = [group for group in found.get("groups") or () if group.get("points")]
    if not groups:
        return
    error = str(found.get("error") or "error")
    chosen = {group["name"]: group["kept"] for group in content.get("groups") or ()}
    marked = " A dashed line or mark shows the width that was chosen." if chosen else ""
    yield Sentence(
        f"Error of the outputs when one group alone is pruned: {error}. The higher, the more the model depends on it. "
        f"The scale is logarithmic, with zero at its foot.{marked}"
    )
    curves = {group["group"]: [(p["width"], number(p["error"])) for p in group["points"]] for group in groups}
    worst = sorted(curves, key=lambda name: -max(value for _, value in curves[name]))
    yield Picture(
        "sensitivity", "Error of the outputs over the remaining channels of one group while all others are unpruned.",
        f"Error over width for {len(groups)} groups; most sensitive: {'; '.join(worst[:3])}.",
        plots.sensitivity(curves, "error", chosen=chosen),
        plots.sensitivity(curves, "error", plots.PHONE, chosen=chosen),
    )  # fmt: skip  # name, words and figure
    most = max(len(group["points"]) for group in groups)
    rows = tuple(
        (group["group"], str(chosen.get(group["group"], MISSING)),
         *(f"{short(p['error'])} at {p['width']}" for p in group["points"]), *[""] * (most - len(group["points"])))
        for group in groups
    )  # fmt: skip  # a row
    heads = ("group", "chosen width", *(f"error at width {place}" for place in range(1, most + 1)))
    yield Sheet("All points", heads, rows, is_folded=len(rows) > _FOLDED // 4)


def _training(content: Content) -> Iterator[Part]:
    found = content.get("training")
    if not found:
        return
    losses = [number(loss) for loss in found.get("losses") or ()]
    watched = [(number(point["step"]), number(point["value"])) for point in found.get("watched") or ()]
    scored = found if "metric" in found else of(content, "accuracy")
    metric = str(scored.get("metric") or "score")
    held_out = f"{metric}, on held-out samples"
    if losses:
        yield Picture(
            "training", "Distillation with the original as the teacher: the loss of each update, raw and smoothed.",
            f"Loss over {len(losses)} updates, from {short(losses[0])} to {short(losses[-1])}.",
            plots.training(losses, watched, held_out), plots.training(losses, watched, held_out, plots.PHONE),
            is_wide=False,
        )  # fmt: skip  # name, words and figure
    facts = {
        "updates": found.get("steps"),
        "rounds of pruning and training": found.get("rounds") or content.get("rounds"),
        "seconds": found.get("seconds"),
        "device": found.get("device"),
        "loss": f"{short(losses[0])} → {short(losses[-1])}" if losses else None,
        **_on_held_out(found.get("held_out")),
        **{f"output {name}": f"by {kind}" for name, kind in (found.get("losses_by") or {}).items()},
        "hidden tensors compared": ", ".join(found.get("compared") or ()) or None,
        f"best {metric} during training": _best(scored, [value for _, value in watched]),
    }
    yield from _facts("", facts)


def _on_held_out(found: Content | None) -> dict[str, str]:
    """Return the divergence of the outputs before and after a training, and whether its weights were taken."""
    if not found:
        return {}
    title = f"divergence on {found.get('samples')} samples not trained on"
    rest = "" if found.get("kept") else "; the weights before the training were kept"
    return {title: f"{short(found.get('before'))} → {short(found.get('after'))}{rest}"}


def _sweep(content: Content) -> Iterator[Part]:
    found = content.get("sweep") or {}
    points = found.get("points") or ()
    if not points:
        return
    metric, key = _quality_of(found, points)
    named, scale = (f"{metric}, %", 100.0) if metric in FRACTIONS else (metric, 1.0)
    is_less = key == "accuracy" and lower_is_better(found)
    scored = [
        plots.Choice(
            str(p.get("name") or ""), number(p["ms"]), scale * number(_quality(p, key)), bool(p.get("picked")),
            is_original=p.get("name") == "the original",
        )
        for p in points
        if _quality(p, key) is not None and p.get("ms") is not None
    ]  # fmt: skip  # what is known of each
    picked = [str(p.get("name") or "") for p in points if p.get("picked")]
    if scored:
        yield Picture(
            "sweep", "No model is both faster and better than one on the line. The ring marks the chosen one.",
            f"{metric} against latency of {len(scored)} models; chosen: {'; '.join(picked) or 'none'}",
            plots.tradeoff(scored, named, plots.WIDE, is_less_better=is_less),
            plots.tradeoff(scored, named, plots.PHONE, is_less_better=is_less),
        )  # fmt: skip  # name, words and figure
    columns = [*_SWEEP_COLUMNS, *(_quality_column(metric, key) if scored else ()), *_judged_columns(points)]
    shown = [(head, [cell(p) for p in points]) for head, cell in columns]
    shown = [(head, cells) for head, cells in shown if any(cell != MISSING for cell in cells)]
    marked = tuple(place for place, point in enumerate(points) if point.get("picked"))
    words = tuple(place for place, (_, cells) in enumerate(shown) if not place or cells[-1][:1] in MARKS.values())
    yield Sheet(
        "", tuple(head for head, _ in shown), tuple(zip(*(cells for _, cells in shown), strict=True)), words,
        marked=marked,
    )  # fmt: skip  # a table
    if any(point.get("file") for point in points) and content.get("source"):
        yield Sentence("Each file is checked against the original by its plan, which stands beside it:")
        last = next((p for p in points if p.get("picked")), points[-1])
        yield Code(f"cpd-onnx verify {quote(of(content, 'source').get('file') or '')} {quote(str(last.get('file')))}")


def _quality_of(found: Content, points: Sequence[Content]) -> tuple[str, str]:
    """Return name and key of what models are chosen by: the metric, or the agreement with the original without it."""
    if not any(point.get("accuracy") is not None for point in points):
        measure = next((of(p, "agreement").get("measure") for p in points if p.get("agreement")), None)
        if measure:
            return str(measure), "agreement"
    return str(found.get("metric") or "accuracy"), "accuracy"


def _quality(point: Content, key: str) -> Any:
    if key == "accuracy":
        return point.get("accuracy")
    return 1.0 if point.get("name") == "the original" else of(point, "agreement").get("value")


_Column: TypeAlias = tuple[str, Callable[[Content], str]]

_SWEEP_COLUMNS: tuple[_Column, ...] = (
    ("model", lambda p: f"{p.get('name') or ''}{' (chosen)' if p.get('picked') else ''}"),
    ("ms", lambda p: ms(p.get("ms"))),
    ("times as fast", lambda p: faster(p["ratio"]) if p.get("ratio") else MISSING),
    ("MACs left", lambda p: percent(p.get("macs"))),
    ("file", lambda p: size_text(p.get("bytes"))),
)
"""Headings of a sweep's table, and the functions that return the cells from a point."""


def _quality_column(metric: str, key: str) -> tuple[_Column, ...]:
    return ((metric, lambda p: score(metric, _quality(p, key))),)


def _judged_columns(points: Sequence[Content]) -> Iterator[_Column]:
    """Yield a column for each question of the verdicts; that of the proof also for points without a verdict."""
    asked = [str(e["question"]) for p in points for e in of(p, "verdict").get("answers") or ()]
    for question in dict.fromkeys(asked):
        yield _HEADS.get(question, question), partial(_answered, question=question)
    if PROVED not in asked:
        yield _HEADS[PROVED], partial(_answered, question=PROVED)


_HEADS = {PROVED: "structure proved"}
"""Headings of questions that need more words in a table."""


def _answered(point: Content, question: str) -> str:
    """Return the answer to a question about a model of a sweep."""
    entries = of(point, "verdict").get("answers") or ()
    answer = next((str(e.get("answer")) for e in entries if e["question"] == question), None)
    if answer is None and question == PROVED and point.get("verification"):
        answer = {VERIFIED: YES, WRONG: NO}.get(proof_of(point["verification"]) or "", UNKNOWN)
    return f"{MARKS[TONES.get(answer, DOUBT)]} {answer}" if answer else MISSING


def _deployment(content: Content) -> Iterator[Part]:
    steps = of(content, "deployment").get("steps") or ()
    if not steps:
        return
    metric = of(content, "accuracy").get("metric")
    columns: dict[str, Callable[[Content], str]] = {
        "step": lambda step: str(step.get("name") or ""),
        "what it does": lambda step: str(step.get("what") or ""),
        "file": lambda step: size_text(step.get("bytes")),
        "difference": lambda step: short(step.get("difference")),
    }
    if any(step.get("agreement") is not None for step in steps):
        columns["same answer"] = lambda step: percent(step.get("agreement"))
    if any(step.get("accuracy") is not None for step in steps):
        columns[str(metric or "accuracy")] = lambda step: score(metric, step.get("accuracy"))
    columns["notes"] = lambda step: "; ".join(step.get("notes") or ())
    rows = tuple(tuple(text(step) for text in columns.values()) for step in steps)
    yield Sheet("", tuple(columns), rows, words=(0, 1, len(columns) - 1))
    yield Sentence(
        "Difference: how far the outputs of a step are from those of the model before it: the largest difference, as a "
        "fraction of the output's range. Same answer: how often both give it, on the samples of the conversion."
    )


def _kept(content: Content) -> Iterator[Part]:
    fraction = content.get("prunable_fraction")
    if fraction is not None:
        yield Sentence(f"{prunable_line(content, 'have an axis that can be pruned')}.")
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
    found = of(content, "verification")
    verdict = proof_of(found)
    if verdict is None and is_of_many(content):
        return  # the table of the sweep holds the proof of each model
    if verdict is None:
        yield Sentence(
            "Not checked. Nothing shows that the file computes what its plan says; 'cpd-onnx verify' compares it with "
            "the original.",
            "warning",
        )
        return
    allowed, tone = found.get("allowed", found.get("tolerance")), "" if verdict == VERIFIED else "warning"
    yield Sentence(
        f"The pruned model and the original with the removed channels masked ran on {found.get('runs')} sets of "
        f"inputs. {_PROOF_RESULTS[verdict]}: the outputs differ by at most {short(found.get('difference'))} of the "
        f"largest output, and {short(allowed)} is allowed.",
        tone,
    )
    for note in found.get("notes") or ():
        yield Sentence(f"{str(note)[:1].upper()}{str(note)[1:]}.", tone)
    yield Listing("What this means", tuple(_meanings(found)))


def _meanings(found: Content) -> Iterator[str]:
    if is_replay(found):
        yield "The file equals, byte for byte, the plan applied to the original."
    else:
        yield (
            "Nodes, shapes and everything but values equal the plan applied to the original; "
            f"{found.get('trained')} weights have other values, because they were fitted or trained afterwards."
        )
    if found.get("noise"):
        yield f"Rounding alone changes the outputs by {short(found.get('noise'))}."
    yield (
        f"Masking the removed channels changes the outputs by {short(found.get('effect'))}. Repair and training have "
        "to compensate for that."
    )
    yield "The proof does not measure the accuracy of the model, which takes data: see the section on accuracy."


def _inputs(content: Content) -> Iterator[Part]:
    entries = content.get("inputs") or ()
    if entries:
        rows = tuple(
            (str(e["name"]), " × ".join(map(str, e.get("shape") or ())) or "one number", str(e.get("type") or MISSING),  # noqa: RUF001
             ", ".join(map(str, e.get("assumed") or ())) or "none")
            for e in entries
        )  # fmt: skip  # a row
        yield Sheet("", ("input", "shape", "type", "assumed axes"), rows, words=(0, 1, 2, 3), is_wide=False)
        yield Sentence("All figures hold for these sizes. An assumed axis is open in the file, and got a default.")
    found = of(content, "preflight")
    if not found:
        return
    facts = {"samples": found.get("samples"), "source": found.get("source"), "scale": found.get("preset"),
             "preprocessing": found.get("preprocessing")}  # fmt: skip  # a table
    yield from _facts("Data", facts)
    if found.get("facts"):
        yield Listing("What was seen in the data", tuple(sentence(str(fact)) for fact in found["facts"]))
    for warning in found.get("warnings") or ():
        yield Sentence(sentence(str(warning)), "warning")


def _provenance(content: Content) -> Iterator[Part]:
    found = of(content, "provenance")
    if found.get("command"):
        yield Code(str(found["command"]), "The run")
    yield from _commands(content)
    listed = list(found.get("files") or ())
    known = {"", None} | {entry.get("file") for entry in listed}
    named = {"the original, as read": of(content, "source"), "": of(content, "output")}
    rows = [
        (f"{entry['file']}{f' ({what})' * bool(what)}", "", entry.get("sha256") or "")
        for what, entry in named.items()
        if entry.get("file") not in known
    ]
    rows += [(entry["file"], size_text(entry.get("bytes")), entry.get("sha256") or "") for entry in listed]
    if rows:
        yield Sheet("Files", ("file", "size", "SHA-256"), tuple(rows), words=(0, 2))
    versions = of(found, "versions")
    machine = {f"machine: {name}": each for name, each in of(found, "machine").items() if name not in versions}
    facts = {"date": day(found.get("date")), "tool": found.get("tool"), "seed": found.get("seed")}
    yield from _facts("Environment", facts | {**versions} | machine)
    yield from _facts("Seconds", {name: ms(value) for name, value in of(found, "seconds").items()})


def _commands(content: Content) -> Iterator[Part]:
    """Yield the commands that check the file and repeat the run."""
    source, output = (of(content, name).get("file") for name in ("source", "output"))
    if source and output:
        yield Code(f"cpd-onnx verify {quote(source)} {quote(output)}", "To check the file against the original")
    record = of(content, "provenance").get("manifest")
    if record:
        yield Code(f"cpd-onnx reproduce {quote(record)} -o repeated", "To repeat the run and compare the bytes")
        yield Sentence(
            "Files of the run that are not in the folder of its manifest are to be named: the error says how."
        )


_SECTIONS: tuple[tuple[str, str, Callable[[Content], Iterator[Part]]], ...] = (
    ("sweep", "The models to choose from", _sweep), ("accuracy", "Accuracy", _accuracy),
    ("size", "Size and cost", _size), ("latency", "Latency and memory", _latency),
    ("operators", "Time by operator", _operators), ("widths", "Widths", _widths),
    ("sensitivity", "Sensitivity", _sensitivity), ("training", "Training", _training),
    ("deployment", "Deployment", _deployment), ("kept", "What cannot be pruned, and why", _kept),
    ("verification", "Proof of the structure", _proof), ("inputs", "Inputs and data", _inputs),
    ("provenance", "Provenance", _provenance),
)  # fmt: skip  # a table
"""Identifier, heading and function of each section, in the order of the page."""


def _facts(title: str, facts: Mapping[str, Any]) -> Iterator[Sheet]:
    """Yield a table of names and values, without those that are absent; nothing if all are."""
    rows = tuple((name, plain(value)) for name, value in facts.items() if value not in (None, "", MISSING))
    if rows:
        yield Sheet(title, ("", ""), rows, words=(0, 1), is_wide=False)


def _best(scored: Mapping[str, Any], values: Sequence[float]) -> str:
    if not values:
        return ""
    return score(scored.get("metric"), min(values) if lower_is_better(scored) else max(values))
