"""The report: whole in itself, true to its content, and readable in a browser, on a phone and on paper."""

from __future__ import annotations

import base64
import copy
import functools
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("jsonschema")

import jsonschema  # after the checks

import cpd_onnx as cpd
from cpd_onnx.proof.comparison import WRONG, Comparison
from cpd_onnx.report import document
from cpd_onnx.report import figures as plots
from cpd_onnx.report.sections import bench_of, page
from cpd_onnx.runtime.bench import Bench, Setting, Timing

MODELS = Path(__file__).parents[2] / "models"
SETTINGS = (Setting(1, 1), Setting(8, 1))
MACHINE = {"cpus": 2, "processor": "one", "system": "some", "onnxruntime": "1.0"}
HOSTILE = (
    '<script>alert("x")</script>', "a & b 'c' \"d\" `e` |f| $g$ *h* _i_ [j](k)", "line\nbreak\ttab", "x" * 300, "\x00\x1b[31m",
    "层/卷积/ядро-é", "</svg></style><img src=x onerror=alert(1)>", "{{ 7 * 7 }}{% raw %}", "--><!--", "\ud800", "\u202egnp",
)  # fmt: skip  # a table
FIGURES = ("latency", "operators", "widths", "sensitivity", "training", "sweep")
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
WIDTHS = (390, 768, 1280)


def bench(names: tuple[str, ...] = ("first.onnx", "small.onnx"), spread: float = 1.1) -> dict[str, Any]:
    timings = tuple(
        Timing(name, s, 0.9 * ms, ms, spread * ms, 1.4 * ms, 1e3 * (s.batch or 1) / ms, 50, ms / (4.0 * (s.batch or 1)))
        for s in SETTINGS
        for place, name in enumerate(names)
        for ms in (4.0 * (s.batch or 1) / (1 + place),)
    )
    profiles = {name: {f"Op{k}": 3 / (k + 1 + place) for k in range(12)} for place, name in enumerate(names)}
    memory = {name: 20.0 / (1 + place) for place, name in enumerate(names)}
    return Bench(timings, memory, profiles, Setting(1, 1), MACHINE).as_json()


def full(groups: int = 12, losses: int = 300, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Content with everything; some names take the place of those of the groups."""
    rng = random.Random(0)
    called = [*names, *(f"layer{k // 6}.{k % 6}.conv" for k in range(groups))][:groups]
    sizes = [16 * (1 + 3 * k // groups) for k in range(groups)]
    return {
        "format": "cpd-onnx/report", "version": 1, "title": "first.onnx",
        "source": {"file": "first.onnx", "sha256": "a" * 64}, "output": {"file": "small.onnx", "sha256": "b" * 64},
        "budget": {"kind": "macs", "target": 0.5, "policy": "optimal", "round_to": 1, "keep": []},
        "before": {"macs": 3e6, "params": 2e5, "channels": 5900.0}, "after": {"macs": 1.5e6, "params": 1e5, "channels": 4100.0},
        "bytes": {"before": 858600, "after": 441000},
        "bench": bench(),
        "accuracy": {"metric": "top1", "on": "labels", "samples": 10000, "values": {"original": 0.89, "pruned and repaired": 0.872, "distilled": 0.885}},
        "groups": [
            {"id": k, "name": name, "kind": "channels", "size": size, "kept": rng.randint(1, size), "macs": 1e3 * size, "params": 10.0 * size}
            for k, (name, size) in enumerate(zip(called, sizes, strict=True))
        ],
        "sensitivity": {
            "error": "squared error of the outputs over their variance",
            "groups": [
                {"group": name, "points": [{"width": width, "error": (size - width) / size * rng.random()} for width in (size, size // 2, 1)]}
                for name, size in zip(called, sizes, strict=True)
            ],
        },
        "repaired": {"fitted": [{"weight": "w", "before": 0.3, "after": 0.1}], "left": {"v": "has no input that is left"}},
        "training": {
            "losses": [0.5 * math.exp(-4 * k / losses) + 0.02 * rng.random() for k in range(losses)], "steps": losses, "seconds": 12.3,
            "device": "cpu", "losses_by": {"scores": "kl"}, "rounds": 1, "watched": [{"step": 100, "value": 0.87}, {"step": 200, "value": 0.88}],
        },
        "sweep": {
            "metric": "top1",
            "points": [
                {"name": f"latency={share}", "ratio": share, "ms": 4 * share, "accuracy": 0.9 - (1 - share) ** 3,
                 "macs": share, "bytes": 10**5, "picked": share == 0.5}
                for share in (0.9, 0.7, 0.5, 0.3)
            ],
        },
        "deployment": {"steps": [{"name": "int8", "what": "eight bits", "bytes": 120000, "difference": 0.01, "accuracy": 0.86, "notes": ["one layer stays"]}]},
        "kept": [{"reason": "graph output 'scores'", "axes": 2, "weights": 650, "largest": [{"tensor": "head.weight", "axis": 0, "dims": [10, 64]}]}],
        "without_rule": {"NonZero": "node_7"}, "prunable_fraction": 0.99,
        "verification": {
            "difference": 2.1e-7, "tolerance": 1e-4, "noise": 3e-7, "runs": 2, "effect": 0.62, "allowed": 1e-4, "passed": True,
            "is_replay": False, "trained": 84,
        },
        "notes": ["a note"], "advice": ["an advice"],
        "provenance": {
            "tool": "cpd-onnx 0.1.0", "command": "cpd-onnx compress first.onnx -o small.onnx", "seed": 0, "versions": {"python": "3.11.7"},
            "machine": {"processor": "one", "cpus": 2, "system": "some"}, "files": [{"file": "small.onnx", "bytes": 441000, "sha256": "b" * 64}],
            "seconds": {"comb": 0.3, "score": 4.0},
        },
    }  # fmt: skip  # a table


def plain() -> dict[str, Any]:
    """The same without what is drawn."""
    return {
        name: value
        for name, value in full().items()
        if name not in ("bench", "groups", "sensitivity", "training", "sweep")
    }


@functools.cache
def made(name: str) -> str:
    """The page of some content; each is made once."""
    contents = {"full": full, "long": lambda: full(300, 100_000), "hostile": hostile, "minimal": lambda: MINIMAL,
                "judged": lambda: plain() | FACTS, "swept": swept}  # fmt: skip  # a table
    return document.html(contents[name]())


MINIMAL = {"format": "cpd-onnx/report", "version": 1, "title": "first.onnx"}


def hostile() -> dict[str, Any]:
    """Every name of the content is one that somebody could break a page with."""
    content = full(len(HOSTILE), names=HOSTILE)
    one = "".join(HOSTILE)
    content |= {
        "title": one,
        "notes": [one],
        "advice": [one],
        "bench": bench((one, f"{one} small")),
        "without_rule": {one: one},
    }
    content["source"]["file"] = content["output"]["file"] = one
    content["accuracy"] |= {"metric": one, "values": {one: 0.5, f"{one}2": 0.25}}
    content["sweep"] = {"metric": one, "points": [content["sweep"]["points"][0] | {"name": one, "picked": True}]}
    content["training"] |= {"losses_by": {one: one}, "device": one}
    content["deployment"]["steps"][0] |= {"name": one, "what": one, "notes": [one]}
    content["kept"][0] |= {"reason": one, "largest": [{"tensor": one, "axis": 0, "dims": [1]}]}
    content["provenance"] |= {"command": f"{one}\n```\nrm", "versions": {one: one}, "tool": one}
    return content


class Parsed(HTMLParser):
    """The elements of a page, the text outside of style sheets, and whether all is closed."""

    VOID = ("meta", "br", "img", "path", "use", "rect", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]


@pytest.fixture(scope="module")
def whole() -> str:
    return made("full")


def test_the_page_says_it_all(whole: str) -> None:
    parsed = Parsed(whole)
    assert parsed.open == []
    said = (
        f"✓ Yes 2.00{TIMES} as fast", "✓ Faster, as good as the original, smaller and its structure is proved.",
        "50.0 % of the MACs, 50.0 % of the parameters and 51.4 % of the file of the original are left.",
        "✓ Yes 89.00 → 88.50 %", "top1 0.89 → 0.885 on 10000 labelled samples, within 0.05", "Structure proved? ✓ Yes",
        "with the removed channels masked, to 2.1e-07", "858.6 kB", "a note", "an advice",
        "confidence interval is at most ±0.7 points", "Target: 50.0 % of the MACs, allocation policy optimal", "layer1.0.conv",
        "No rule for these operators", "NonZero, at node_7", "99.0 % of the weights", "by kl", "latency=0.5 (chosen)", "one layer stays",
        "cpd-onnx compress first.onnx -o small.onnx", "cpd-onnx verify first.onnx small.onnx", "a" * 64, "b" * 64, "it loads nothing",
    )  # fmt: skip  # a list
    assert [words for words in said if words not in parsed.text] == []
    assert [place for place in FIGURES if f'id="{place}"' not in whole and place not in parsed.ids()] == []
    labels = [a["aria-label"] for tag, a in parsed.elements if tag == "svg" and a.get("role") == "img"]
    assert len(labels) == 2 * len(FIGURES)  # phones get others
    assert all(labels)


def test_the_page_is_whole_in_itself(whole: str) -> None:
    for tag, attributes in Parsed(whole).elements:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        assert not [name for name in attributes if name.startswith("on") or name in ("srcset", "srcdoc")]
        for name in ("src", "href", "xlink:href", "action"):
            assert str(attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "://" not in whole
    assert "@import" not in whole


def test_figures_do_not_share_names(whole: str) -> None:
    ids = Parsed(whole).ids()
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', whole))
    assert {one or other for one, other in referred} <= set(ids)
    assert len(referred) > 20


def test_the_same_content_gives_the_same_bytes(whole: str) -> None:
    content = full()
    before = copy.deepcopy(content)
    assert document.html(content) == whole
    assert document.markdown(content) == document.markdown(full())
    assert content == before


def test_what_is_not_known_is_said() -> None:
    text = Parsed(document.html(MINIMAL)).text
    assert (
        "Not known: whether it is faster, whether it is as good as the original, whether it is smaller and whether its "
        "structure is right."
    ) in text
    assert "✓" not in text
    assert "<svg" not in document.html(MINIMAL)
    empty = {name: type(value)() if isinstance(value, list | dict) else None for name, value in full().items()}
    assert Parsed(document.html(empty | MINIMAL)).text == text
    assert Parsed(document.html(dict.fromkeys(full()) | MINIMAL)).text == text


def test_what_went_wrong_is_said() -> None:
    content = plain()
    content["verification"] |= {"passed": False, "difference": math.inf}
    content["bench"] = bench(("first.onnx", "small.onnx"), spread=2.0)
    content["bench"]["timings"][1]["ratio"] = 1.25
    content["bench"]["profiles"] = {}
    text = Parsed(document.html(content)).text
    assert "✗ No it does not compute what its plan says: do not use it" in text
    assert "Do not use this file: it does not compute what its plan says." in text
    assert "They differ: do not use the file: the outputs differ by at most inf" in text
    assert f"✗ No 0.80{TIMES} as fast" in text
    assert "one run in ten took 2.0 times the median or more" in text
    assert "the machine was busy, measure again" in text


@pytest.mark.parametrize(
    ("p90", "p50", "tone", "words"),
    [
        (3.5, 3.0, "good", "threads: 1)"),
        (3.0, 2.0, "good", "the machine was busy, measure again"),
        (4.8, 4.5, "bad", "threads: 1)"),
        (4.0, 3.9, "bad", "threads: 1)"),
    ],
)
def test_a_report_without_a_verdict_is_judged_like_others(p90: float, p50: float, tone: str, words: str) -> None:
    content = full()
    content["bench"]["timings"][1].update(p10=0.9 * p50, p50=p50, p90=p90, ratio=p50 / 4.0)
    verdict = page(content).verdict
    assert verdict is not None
    answer = verdict.answers[0]
    assert (answer.tone, answer.text.endswith(words)) == (tone, True)


def test_agreement_is_no_accuracy() -> None:
    content = plain()
    content["accuracy"] = {
        "metric": "squared error",
        "on": "the original's answers",
        "samples": 64,
        "values": {"original": 0.0, "distilled": 0.0125},
    }
    text = Parsed(document.html(content)).text
    assert "Not known: whether it is faster and whether it is as good as the original." in text
    assert "squared error 0.0125 against the original's answers, 64 samples; the accuracy is unknown" in text


# The verdict.


VERDICT = {
    "code": 4,
    "answers": [
        {"question": "faster", "answer": "yes", "text": "4.00 → 2.00 ms a run"},
        {"question": "as good", "answer": "no", "text": "top1 fell by 92.9 points"},
        {"question": "smaller", "answer": "yes", "text": "half"},
        {"question": "proved", "answer": "yes", "text": "the removed channels are those of the plan"},
    ],
    "asked": [
        {"kind": "latency", "asked": 0.5, "got": 0.513, "unit": "of the original", "is_met": False},
        {"kind": "flash", "asked": 400, "got": 366.9, "unit": "kB", "is_met": True},
    ],
}  # fmt: skip  # a table
FACTS = {
    "verdict": VERDICT,
    "agreement": {"task": "classification", "measure": "same answer", "value": 0.981, "low": 0.961, "confidence": 0.95,
                  "samples": 512, "interval": "Clopper-Pearson"},
    "preflight": {"samples": 538, "source": "folder of images", "facts": ["all images are grey"], "preset": "0-1",
                  "preprocessing": "538 PNG 32x32 RGB -> float [3,32,32], x/255", "warnings": ["3 images were cropped"]},
    "inputs": [{"name": "image", "shape": [1, 3, 32, 32], "type": "float32", "assumed": ["batch"]}],
}  # fmt: skip  # a table


def judged(**answers: str) -> dict[str, Any]:
    """Content with the answers given, and yes to all other questions."""
    entries = [e | {"answer": answers.get(e["question"].replace(" ", "_"), "yes")} for e in VERDICT["answers"]]  # type: ignore[attr-defined]
    return plain() | {"verdict": VERDICT | {"code": 0, "answers": entries}}


def test_one_verdict_is_at_the_top() -> None:
    content = plain() | FACTS
    content["accuracy"]["values"] = {"original": 0.987, "distilled": 0.058}
    jsonschema.validate(json.loads(json.dumps(content)), document.schema())
    text = Parsed(document.html(content)).text
    top = text[: text.index("Target: 50.0 %")]
    words = (
        "✗ Not as good as the original.", "Faster? ✓ Yes", "As good? ✗ No 98.70 → 5.80 %", "top1 fell by 92.9 points",
        "latency 50.0 % of the original 51.3 % of the original ✗ no", "flash 400 kB 366.9 kB ✓ yes", "image [1, 3, 32, 32]",
    )  # fmt: skip  # a list
    assert [word for word in words if word not in top] == []
    written = document.markdown(content)
    words = (
        "**✗ Not as good as the original.**", "| As good? | **✗ No** | 98.70 → 5.80 % | top1 fell by 92.9 points |",
        "| latency | 50.0 % of the original | 51.3 % of the original | ✗ no |",
        "98.1 % of 512 samples; with 95 % confidence at least 96.1 % (exact, Clopper-Pearson).",
        "538 PNG 32x32 RGB -> float", "**Warning:** 3 images were cropped.", f"| image | 1 {TIMES} 3 {TIMES} 32 {TIMES} 32 | float32 | batch |",
    )  # fmt: skip  # a list
    assert [word for word in words if word.replace("[", "\\[") not in written] == []


@pytest.mark.parametrize(
    ("answers", "headline", "tones"),
    [
        ({}, "✓ Faster, as good as the original, smaller and its structure is proved.", ["good", "good", "good", "good"]),
        ({"as_good": "no"}, "✗ Not as good as the original.", ["good", "bad", "good", "plain"]),
        ({"as_good": "unknown"}, "? Not known: whether it is as good as the original.", ["good", "unknown", "good", "plain"]),
        ({"faster": "no", "as_good": "unknown"}, "✗ Not faster. Not known: whether it is as good as the original.", ["bad", "unknown", "good", "plain"]),
        ({"faster": "no"}, "? As good as the original, smaller and its structure is proved. Not faster.", ["bad", "good", "good", "good"]),
        ({"proved": "no"}, "✗ Do not use this file: it does not compute what its plan says.", ["good", "good", "good", "bad"]),
    ],
)  # fmt: skip  # a table
def test_a_proof_alone_is_no_success(answers: dict[str, str], headline: str, tones: list[str]) -> None:
    content = judged(**answers)
    text = document.html(content)
    assert headline in Parsed(text).text
    assert re.findall(r'<div class="answer (\w+)">', text) == tones


def test_a_target_that_was_not_reached_is_said() -> None:
    content = judged()
    content["verdict"]["code"] = 6
    verdict = page(content).verdict
    assert verdict is not None
    assert (verdict.tone, verdict.headline) == ("bad", "A target was not reached; this is the nearest result.")


def test_a_verdict_of_another_shape_breaks_nothing() -> None:
    verdict = {
        "answers": [{"question": "cheaper", "answer": "perhaps"}],
        "asked": [{"kind": "ram", "asked": None, "got": "much", "is_met": None}],
    }
    text = Parsed(document.html(MINIMAL | {"verdict": verdict})).text
    assert "Cheaper? ? Unknown" in text
    assert "Not known: whether it is cheaper." in text
    assert "ram – much ? unknown" in text  # noqa: RUF001  # a dash is meant


def swept(*, is_judged: bool = True) -> dict[str, Any]:
    """Report of a sweep: several models, none of which is the output."""
    content = full()
    kept = ("format", "version", "title", "source", "sweep", "bench", "notes", "advice", "provenance")
    content = {name: value for name, value in content.items() if name in kept}
    content["bench"]["profiles"] = {}
    first = {"name": "the original", "file": "first.onnx", "ratio": 1.0, "ms": 4.0, "accuracy": 0.91, "macs": 1.0}
    for point in content["sweep"]["points"]:
        point["file"] = f"{point['name']}.onnx"
        if is_judged:
            point |= {"verification": {"verdict": "verified"}, "verdict": VERDICT}
    content["sweep"]["points"].insert(0, first)
    return content


def test_a_sweep_shows_what_it_has() -> None:
    content = swept()
    jsonschema.validate(json.loads(json.dumps(content)), document.schema())
    text = Parsed(document.html(content)).text
    assert [
        word for word in ("Unknown", "Not known", "Not measured", "Not checked", "Not verified") if word in text
    ] == []
    assert page(content).sections[0].key == "sweep"
    assert (
        f"4 models, from 1.11{TIMES} to 3.33{TIMES} as fast as the original. Chosen: latency=0.5, 2.00{TIMES} as fast, top1 77.50 %."
        in text
    )
    written = document.markdown(content)
    assert (
        "| model | ms | times as fast | MACs left | file | top1 | faster | as good | smaller | structure proved |"
        in written
    )
    assert (
        f"| latency=0.5 (chosen) | 2.00 | 2.00{TIMES} | 50.0 % | 100.0 kB | 77.50 % | ✓ yes | ✗ no | ✓ yes | ✓ yes |"
        in written
    )


def test_a_sweep_without_a_metric_is_drawn_by_its_agreement() -> None:
    content = swept(is_judged=False)
    for point in content["sweep"]["points"]:
        point["accuracy"] = None
        if point["name"] != "the original":
            point["agreement"] = {"measure": "same answer", "value": 0.9 * point["ratio"]}
    text = Parsed(document.html(content)).text
    assert "same answer, %" in text
    assert "45.00 %" in text
    assert "structure proved" not in text


def test_nothing_in_a_name_is_taken_for_more() -> None:
    text = made("hostile")
    parsed = Parsed(text)
    assert parsed.open == []
    assert {tag for tag, _ in parsed.elements} <= {tag for tag, _ in Parsed(made("full")).elements}
    assert "49" not in parsed.text.split("{{")[0]
    assert "{{ 7 * 7 }}{% raw %}" in parsed.text
    assert '<script>alert("x")</script>' in parsed.text
    assert text.encode().decode() == text
    assert "\x00" not in text


def test_markdown_says_the_same() -> None:
    text = document.markdown(full())
    for section in (
        "Accuracy",
        "Size and cost",
        "Latency and memory",
        "Time by operator",
        "Widths",
        "Sensitivity",
        "Training",
    ):
        assert f"\n## {section}\n" in text
    assert "| MACs | 3.0 M | 1.5 M | 50.0 % |" in text
    assert "```\ncpd-onnx compress first.onnx -o small.onnx\n```" in text
    assert f"| pruned and repaired | 87.20 % | {MINUS}1.80 points |" in text
    assert re.search(r"\n\n\n", text) is None


def test_markdown_tables_hold_together() -> None:
    text = document.markdown(hostile())
    assert text.encode().decode() == text
    assert "\\<script" in text
    inside = False
    for line in text.splitlines():
        inside ^= line.startswith("````")
        columns = len(re.findall(r"(?<!\\)\|", line))
        if line.startswith("|") and not inside:
            head = columns if not previous.startswith("|") else head  # noqa: F821  # of the line before
            assert columns == head
        previous = line  # noqa: F841
    blocks = re.findall(r"^(`{3,})\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    assert all("\n```\nrm" in block or block.startswith("cpd-onnx verify ") for _, block in blocks)


def test_long_content_stays_small() -> None:
    text = made("long")
    assert len(text) < 1_500_000
    assert len(re.findall(r"<details", text)) == 2
    assert "(300 rows)" in text
    assert document.markdown(full(300, 100_000)).count("\n") < 2000


@pytest.mark.parametrize(
    "content", [full(), full(300), MINIMAL, dict.fromkeys(full()) | MINIMAL], ids=["full", "long", "minimal", "null"]
)
def test_content_fits_the_schema(content: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(document.schema())
    validator.check_schema(document.schema())
    content = json.loads(json.dumps(content))
    validator.validate(content)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(content | {"benhc": {}})


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 'cpd-onnx/report' and 1 or 2, got 'cpd-onnx/report' and 3"):
        document.html(MINIMAL | {"version": 3})
    with pytest.raises(ValueError, match="got None and None"):
        document.markdown({})


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_what_is_not_installed_is_said(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = document.util.find_spec
    monkeypatch.setattr(document.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(cpd.UnsupportedError, match=rf"needs {missing}: pip install 'cpd-onnx\[report\]'"):
        document.html(full())
    if missing == "matplotlib":
        assert document.markdown(full())


def test_a_report_of_a_run_fits(tmp_path: Path) -> None:
    state = cpd.run("comb, score{kind='l2'}, allocate{macs=0.5}, prune, verify", MODELS / "digits.onnx")
    from cpd_onnx.report import tables as report

    allocation, combed = state.need("allocation", "allocate"), state.need("combed", "comb")
    result = report.result(state, 1.0)
    kept = {group.id: len(group) - len(gone) for group, gone in zip(combed.groups, allocation.removed, strict=True)}
    groups = [
        {"id": g.id, "name": g.name, "kind": g.kind, "size": len(g), "kept": kept[g.id], "macs": 0.0, "params": 0.0}
        for g in combed.groups
    ]
    names = ("source", "budget", "before", "after", "prunable_fraction", "kept", "notes", "verification")
    content = MINIMAL | {name: result[name] for name in names} | {"groups": groups}
    jsonschema.validate(content, document.schema())
    text = Parsed(document.html(content)).text
    assert "50.4 %" in text
    assert "graph output 'scores'" in text


# Figures.


def test_who_is_beaten_is_not_on_the_line() -> None:
    choices = [
        plots.Choice("a", 1.0, 0.5),
        plots.Choice("b", 2.0, 0.4),
        plots.Choice("c", 3.0, 0.9),
        plots.Choice("d", 1.0, 0.5),
    ]
    assert [one.name for one in plots.frontier(choices)] == ["a", "d", "c"]
    assert [one.name for one in plots.frontier(choices, is_less_better=True)] == ["a", "d", "b"]


@pytest.mark.parametrize(
    ("scored", "is_less", "best"),
    [
        ({"metric": "top1"}, False, "75.00 %"),
        ({"metric": "mse"}, True, "0.25"),
        ({"metric": "m:rmse"}, True, "0.25"),
        ({"metric": "m:rmse", "lower_is_better": False}, False, "0.75"),
        ({"metric": "m:gain", "lower_is_better": True}, True, "0.25"),
        ({"metric": "m:gain"}, False, "0.75"),
    ],
)
def test_the_best_is_told_by_the_direction_of_the_metric(
    scored: dict[str, Any], is_less: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_elsewhere = ("bench", "groups", "sensitivity")
    content = json.loads(json.dumps({name: value for name, value in full().items() if name not in drawn_elsewhere}))
    content["sweep"] |= scored
    content["training"] |= scored | {"watched": [{"step": 1, "value": 0.25}, {"step": 2, "value": 0.75}]}
    jsonschema.validate(content, document.schema())
    seen: list[bool] = []
    drawn = plots.tradeoff

    def tradeoff(choices: list[plots.Choice], metric: str, inches: float, *, is_less_better: bool) -> plots.Drawing:
        seen.append(is_less_better)
        return drawn(choices, metric, inches, is_less_better=is_less_better)

    monkeypatch.setattr(plots, "tradeoff", tradeoff)
    text = Parsed(document.html(content)).text
    assert re.search(rf"best {scored['metric']} during training\s+{best}", text)
    assert seen == [is_less] * 2


def test_names_that_would_look_alike_have_numbers() -> None:
    alike = plots.widths([(f"/{'x' * 60}/{k}/attention/MatMul_of_the_values", 8, 4) for k in range(3)], plots.PHONE)
    assert [f">{k}: " in alike.svg("key", "") for k in (1, 2, 3)] == [True] * 3
    assert ": " not in re.sub(r'style="[^"]*"', "", plots.widths([("a", 8, 4), ("b", 8, 4)]).svg("key", ""))


def test_pareto_writes_a_file(tmp_path: Path) -> None:
    choices = [plots.Choice(f"c{k}", 1.0 + k, 0.5 + 0.1 * k, k == 1) for k in range(4)]
    plots.tradeoff(choices, "top1").write(tmp_path / "a.svg")
    plots.tradeoff(choices, "top1").write(tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert [word for word in ("top1", "latency, ms", "c1") if f"<!-- {word} -->" not in text] == []
    with pytest.raises(cpd.ModelError, match="exists"):
        plots.tradeoff(choices, "top1").write(tmp_path / "a.svg")
    with pytest.raises(ValueError, match="choose"):
        plots.tradeoff([], "top1").write(tmp_path / "c.svg")


@pytest.mark.parametrize(
    ("drawing", "words"),
    [
        (plots.widths([("one", 4, 2), ("two", 8, 8)]), ("one", "two", "4 → 2", "8")),
        (plots.widths([(f"g{k}", 2 ** (k % 11), 1) for k in range(300)]), ("% left", "1024")),
        (plots.training([1.0]), ("Loss", "each update")),
        (plots.training([1.0, math.nan, math.inf, 0.5]), ("smoothed",)),
        (plots.training([math.nan]), ("Loss",)),
        (plots.training(list(np.linspace(1, 1e-3, 5000)), [(1, 0.5)], "top1"), ("top1",)),
        (plots.tradeoff([plots.Choice("only", 1.0, 0.5, True)], "top1"), ("only", "top1")),
        (plots.sensitivity({"a$b$c": [(1, 0.0)]}, "error"), ("a$b$c",)),
    ],
)  # fmt: skip  # a table
def test_text_of_figures_is_text(drawing: plots.Drawing, words: tuple[str, ...]) -> None:
    text = drawing.svg("key", "what it shows")
    assert text == drawing.svg("key", "what it shows")
    parsed = Parsed(text)
    assert [word for word in words if f">{word}<" not in text] == []
    assert text.startswith('<svg viewBox="0 0 ')
    assert parsed.elements[0][1]["aria-label"] == "what it shows"
    assert all(one.startswith("key-") for one in parsed.ids())
    assert "font-family" not in text
    assert "://" not in text


# Notebooks.


def test_results_show_themselves_in_notebooks() -> None:
    state = cpd.run("comb, score{kind='l2'}, allocate{macs=0.5}, prune, verify", MODELS / "digits.onnx")
    benched = bench_of(bench(("<a>", "b")))
    for shown, words in (
        (state, ("digits.onnx", "13", "3.0 M -&gt; 1.5 M", "verified")),
        (cpd.run("comb", MODELS / "digits.onnx"), ("digits.onnx", "13")),
        (state.model, ("opset", "image", "scores")),
        (state.plan, ("digits.onnx", "macs 0.5 uniform", "13 of 13")),
        (benched, ("&lt;a&gt;", "p50 ms", "peak MiB")),
        (Comparison(1e-7, 1e-4, 0.0, 2, 0.6), ("verified", "1e-07")),
        (Comparison(1.0, 1e-4, 0.0, 2, 0.6, verdict=WRONG), ("wrong",)),
    ):
        text = shown._repr_html_()
        assert Parsed(text).open == []
        assert [word for word in words if word not in text] == []


# PDF.


def test_a_pdf_holds_the_report_as_text() -> None:
    pytest.importorskip("fpdf")
    content = plain() | FACTS
    made = document.pdf(content)
    assert made == document.pdf(content)
    assert made.startswith(b"%PDF-")
    assert made.count(b"/ToUnicode") == 3  # letters are letters in each of the three fonts, and can be searched for
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", made)) <= 6
    assert b"/Subtype /Image" not in made
    content["provenance"]["date"] = "2026-11-26T05:12:00+00:00"
    assert b"D:20261126051200" in document.pdf(content)
    content["provenance"]["date"] = "yesterday"
    assert document.pdf(content)


def test_odd_names_break_no_pdf() -> None:
    pytest.importorskip("fpdf")
    content = hostile()
    content = {name: value for name, value in content.items() if name not in ("groups", "sensitivity", "training")}
    made = document.pdf(content | {"verdict": VERDICT})
    assert b"/Subtype /Image" in made
    assert len(re.findall(rb"/Type\s*/Page\b", made)) < 12
    assert document.pdf(MINIMAL)


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    steering = shutil.which("chromedriver")
    if program is None or steering is None:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip  # a list
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(steering))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    names = ("full", "long", "hostile", "minimal", "judged", "swept")
    for name in names:
        (folder / f"{name}.html").write_text(made(name), "utf-8")
    return {name: folder / f"{name}.html" for name in names}


def opened(browser: Any, path: Path, width: int = 1280, **media: str) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": media.get("scheme", "light")}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("media", "screen"), "features": features})
    browser.get(path.as_uri())


SHOWN = "[...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility())"
OVERLAPS = (
    f"return {SHOWN}"
    + """.flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const found = [];
  texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
    const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (across > 2 && down > 0.35 * Math.min(p.height, q.height)) found.push([svg.ariaLabel, a, b]);
  }));
  return found;
})
"""
)
OUTSIDE = (
    f"return {SHOWN}"
    + """.flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(t => {
    const r = t.getBoundingClientRect();
    return r.left < box.left - 2 || r.right > box.right + 2 || r.top < box.top - 2 || r.bottom > box.bottom + 2;
  }).map(t => t.textContent);
})
"""
)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["full", "long", "hostile", "minimal", "judged", "swept"])
def test_it_fits_the_window(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    opened(browser, pages[name], width)
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    sizes = browser.execute_script(f"return {SHOWN}.map(s => s.getBoundingClientRect().toJSON())")
    assert len(sizes) == {"minimal": 0, "judged": 0, "swept": 2}.get(name, len(FIGURES))
    assert all(size["width"] > 250 and size["height"] > 80 for size in sizes)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["full", "long", "hostile"])
def test_words_of_figures_do_not_collide(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    opened(browser, pages[name], width)
    assert browser.execute_script(OVERLAPS) == []
    assert browser.execute_script(OUTSIDE) == []


CUT = """
document.querySelectorAll('details').forEach(each => each.open = true);
const width = document.documentElement.clientWidth;
return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('svg')).filter(e => {
  const box = e.getBoundingClientRect();
  const inside = getComputedStyle(e).display != 'inline' && e.scrollWidth > e.clientWidth + 1;
  return box.width > 0 && (box.right > width + 1 || box.left < -1 || inside && !['TBODY', 'TR'].includes(e.tagName));
}).map(e => `${e.tagName} ${e.textContent.slice(0, 40)}`)
"""


@pytest.mark.parametrize("name", ["full", "hostile", "judged", "swept"])
def test_a_phone_cuts_nothing(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name], 390)
    assert browser.execute_script(CUT) == []


def test_paper_shows_what_is_folded(browser: Any, pages: dict[str, Path]) -> None:
    shown = "return [...document.querySelectorAll('details td')].filter(e => e.checkVisibility({contentVisibilityAuto: true})).length"
    opened(browser, pages["full"])
    if not browser.execute_script("return CSS.supports('selector(::details-content)')"):
        pytest.skip("the browser is too old to unfold by a style sheet")
    assert browser.execute_script(shown) == 0
    opened(browser, pages["full"], media="print")
    assert browser.execute_script(shown) > 50


LIGHTNESS = """
const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number); return (0.299 * r + 0.587 * g + 0.114 * b) / 255; };
const of = (what, property) => light(getComputedStyle(document.querySelector(what))[property]);
return [of('body', 'backgroundColor'), of('body', 'color'), of('figure svg text', 'fill')];
"""


def test_it_is_dark_where_that_is_liked_and_never_on_paper(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["full"], scheme="dark")
    paper, ink, drawn = browser.execute_script(LIGHTNESS)
    assert paper < 0.15
    assert min(ink, drawn) > 0.6
    for media in ({"scheme": "light"}, {"scheme": "dark", "media": "print"}):
        opened(browser, pages["full"], **media)
        paper, ink, drawn = browser.execute_script(LIGHTNESS)
        assert paper > 0.95
        assert max(ink, drawn) < 0.45


@pytest.mark.parametrize(("name", "most"), [("full", 9), ("long", 24), ("minimal", 2)])
def test_it_goes_on_paper(browser: Any, pages: dict[str, Path], name: str, most: int) -> None:
    opened(browser, pages[name], media="")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": False})
    content = base64.b64decode(printed["data"])
    sheets = re.findall(rb"/Type\s*/Page\b", content)
    assert 1 <= len(sheets) <= most
    boxes = {
        tuple(round(float(n)) for n in box.split()[2:]) for box in re.findall(rb"/MediaBox\s*\[([^\]]*)\]", content)
    }
    assert boxes <= {(595, 842), (596, 842)}


def test_options_of_the_allocation_are_in_words() -> None:
    budget = {
        "kind": "macs",
        "target": 0.5,
        "policy": "uniform",
        "round_to": 8,
        "steps": "auto",
        "rounds": 1,
        "score": "l2",
    }
    text = Parsed(document.html(plain() | {"budget": budget | {"ratios": [0.5, 1.0]}})).text
    assert (
        "Target: 50.0 % of the MACs, allocation policy uniform; widths in multiples of 8, channels scored by l2, "
        "50.0 % to 100.0 % of each group's channels survive." in text
    )
    assert (
        "Target: 50.0 % of the MACs, allocation policy uniform."
        in Parsed(
            document.html(
                plain() | {"budget": {"kind": "macs", "target": 0.5, "policy": "uniform", "round_to": 1, "rounds": 1}}
            )
        ).text
    )


def test_a_report_of_conversions_shows_what_was_compared() -> None:
    content = {key: value for key, value in plain().items() if key not in ("accuracy", "verdict")}
    step = {"name": "int8", "what": "eight bits", "bytes": 120000, "difference": 0.01, "agreement": 0.985, "notes": []}
    text = Parsed(document.html(content | {"deployment": {"steps": [step]}})).text
    assert "difference same answer notes int8 eight bits 120.0 kB 0.01 98.5 %" in text
    assert "not measured, see what each conversion changes" in text
    assert "no data was given" not in text
