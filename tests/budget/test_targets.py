"""Targets as text: what is read, what is refused, and what became of each."""

from __future__ import annotations

import pytest

import cpd_onnx as cpd
from cpd_onnx.budget.targets import OF_THE_ORIGINAL, Asked, Target, Targets, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs=0.5", [Target("macs", 0.5)]),
        ("macs=1", [Target("macs", 1.0)]),
        ("macs=50%", [Target("macs", 0.5)]),
        ("macs<=30M", [Target("macs", 30.0, "M")]),
        ("params=1e6", [Target("params", 1e6, "")]),
        (" latency = 5ms , flash≤400kB", [Target("latency", 5.0, "ms"), Target("flash", 400.0, "kB")]),
        ("ram=256KiB,latency=0.5", [Target("ram", 256.0, "KiB"), Target("latency", 0.5)]),
    ],
)
def test_what_is_read(text: str, expected: list[Target]) -> None:
    assert list(parse(text)) == expected
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize("amount", [1 / 3, 0.1 + 0.2, 1234567.0, 0.5])
def test_amounts_survive_a_recipe(amount: float) -> None:
    unit = OF_THE_ORIGINAL if amount < 1 else ""
    assert parse(str(Targets((Target("macs", amount, unit),)))).each[0].amount == amount


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("mac=0.5", "unknown target 'mac': .*did you mean macs"),
        ("speed=2", "unknown target 'speed'"),
        ("latency=5", "latency=5 has no unit: give us, ms or s"),
        ("macs=30m", "units of macs are k, M or G .did you mean M"),
        ("flash=400kb", "did you mean kB"),
        ("ram=1M", "the units of ram are B, kB"),
        ("latency=5sec", "the units of latency are us, ms or s"),
        ("macs=0", "above 0 up to 1"),
        ("macs=-1", "above 0 up to 1"),
        ("latency=0ms", "must be above 0"),
        ("macs=0.5,macs=0.3", "two targets are of the kind 'macs'"),
    ],
)
def test_what_is_refused(text: str, error: str) -> None:
    with pytest.raises(cpd.TargetError, match=error):
        parse(text)


@pytest.mark.parametrize("text", ["", "macs", "macs=", "macs=0.5,", "macs=nan", "macs=1.2.3", "=0.5=", "macs=0.5 0.6"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises((ValueError, cpd.TargetError)):
        parse(text)


def test_what_became_of_a_target() -> None:
    assert Target("macs", 0.5).asked(51.0, 100.0) == Asked("macs", 0.5, 0.51, OF_THE_ORIGINAL, is_met=True)
    assert not Target("macs", 0.5).asked(60.0, 100.0).is_met
    assert Target("macs", 0.1).asked(11.9, 100.0).is_met
    assert not Target("macs", 0.001).asked(1.0, 100.0).is_met, "ten times as much as asked for"
    assert Target("flash", 400.0, "kB").asked(399_000.0, 1e6) == Asked("flash", 400.0, 399.0, "kB", is_met=True)
    assert not Target("flash", 400.0, "kB").asked(400_001.0, 1e6).is_met
    assert Target("ram", 1.0, "KiB").fraction_of(4096.0) == 0.25
    assert Target("latency", 500.0, "us").fraction_of(2.0) == 0.25


def test_a_single_fraction_is_an_option_of_its_kind() -> None:
    assert parse("macs=0.5").options() == {"macs": 0.5}
    assert parse("macs=30M").options() == {"target": "macs=30M"}
    assert parse("flash=0.5").options() == {"target": "flash=0.5"}
