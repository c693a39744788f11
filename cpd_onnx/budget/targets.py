"""Targets as engineers state them: `macs=0.5`, `latency=5ms,flash=400kB,ram<=256kB`; and what became of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from cpd_onnx.errors import TargetError
from cpd_onnx.options import neighbours

KINDS = ("channels", "macs", "params", "bytes", "latency")
"""Kinds of targets that are single options of `Allocate`."""
ALL_KINDS = (*KINDS, "flash", "ram")
"""Kinds of targets: also the flash and the RAM of a program on a control unit, see `budget.deployed`."""
OF_THE_ORIGINAL = "of the original"
"""Unit of a target that is a fraction of the original's cost."""
SLACK = 0.02
"""Deviation up to which a fraction of the original or a measured latency counts as met: whole channels are removed, and
measurements of the same model differ by about as much (heuristic)."""
_RELATIVE_SLACK = 0.25
"""The same as a fraction of the target, which limits it for small targets (heuristic)."""

_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_SIZES = {
    "": 1.0, "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3
}  # fmt: skip  # a table
_TIMES = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_UNITS: dict[str, Mapping[str, float]] = {
    "channels": _COUNTS, "macs": _COUNTS, "params": _COUNTS, "bytes": _SIZES, "flash": _SIZES, "ram": _SIZES,
    "latency": _TIMES,
}  # fmt: skip  # a table
"""Units of each kind of target, with their value in multiply-accumulates, elements, bytes or milliseconds."""
_SYNONYMS = ("KB", "µs")
"""Units that are read, but not proposed."""
_FORM = re.compile(r"\s*([A-Za-z_]*)\s*(?:<=|≤|=)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ%]*)\s*")


@dataclass(frozen=True)
class Target:
    """What may remain of one cost.

    Attributes:
        kind: One of `ALL_KINDS`.
        amount: Fraction of the original's cost, or an amount in the unit.
        unit: `OF_THE_ORIGINAL`, or the unit as it was written, such as "ms", "kB" or "M"; empty for a plain number.
    """

    kind: str
    amount: float
    unit: str = OF_THE_ORIGINAL

    def __post_init__(self) -> None:
        """Check the values; raises TargetError."""
        if self.kind not in ALL_KINDS:
            close = neighbours(self.kind, ALL_KINDS)
            raise TargetError(f"unknown target {self.kind!r}: choose one of {', '.join(ALL_KINDS)}{close}")
        if self.is_fraction and not 0 < self.amount <= 1:
            raise TargetError(
                f"the target must be the fraction that may remain, above 0 up to 1, got {self.kind}={self.amount:g}"
            )
        if not self.is_fraction and self.unit not in _UNITS[self.kind]:
            raise TargetError(_no_unit(self.kind, self.amount, self.unit))
        if not 0 < self.amount < math.inf:
            raise TargetError(f"target {self}: the amount must be above 0")

    def __str__(self) -> str:
        """Return the target as `parse` reads it."""
        short = f"{self.amount:g}"
        amount = short if float(short) == self.amount else repr(self.amount)
        return f"{self.kind}={amount}{'' if self.is_fraction else self.unit}"

    @property
    def is_fraction(self) -> bool:
        """Whether it is relative to the original."""
        return self.unit == OF_THE_ORIGINAL

    @property
    def scale(self) -> float:
        """Value of one unit in multiply-accumulates, elements, bytes or milliseconds; 1 for a fraction."""
        return 1.0 if self.is_fraction else _UNITS[self.kind][self.unit]

    def fraction_of(self, full: float) -> float:
        """Return the target as a fraction of the original's cost, which may be above 1."""
        return self.amount if self.is_fraction else self.amount * self.scale / full if full else 1.0

    def asked(self, got: float, full: float) -> Asked:
        """Return what became of the target, where `got` remains of the cost `full`."""
        if self.is_fraction:
            reached = got / full if full else 1.0
            slack = SLACK if self.kind == "latency" else slack_of(self.amount)
            return Asked(self.kind, self.amount, reached, self.unit, reached <= self.amount + slack)
        reached = got / self.scale
        slack = SLACK * self.amount if self.kind == "latency" else 1e-9 * self.amount
        return Asked(self.kind, self.amount, reached, self.unit, reached <= self.amount + slack)


def slack_of(fraction: float) -> float:
    """Return how far above a fraction of the original a cost may be and still meet it."""
    return min(SLACK, _RELATIVE_SLACK * fraction)


@dataclass(frozen=True)
class Targets:
    """All targets of a run, which are to be met together.

    Attributes:
        each: The targets, of different kinds, at least one.
    """

    each: tuple[Target, ...]

    def __post_init__(self) -> None:
        """Check the targets; raises TargetError."""
        kinds = [target.kind for target in self.each]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise TargetError(f"two targets are of the kind {twice!r}: give one of each kind")
        if not kinds:
            raise TargetError("there is no target: give one, as in macs=0.5")

    def __iter__(self) -> Iterator[Target]:
        """Iterate over the targets."""
        return iter(self.each)

    def __str__(self) -> str:
        """Return the targets as `parse` reads them."""
        return ",".join(map(str, self.each))

    @property
    def plain(self) -> tuple[str, float] | None:
        """Kind and fraction of a single target that is an option of `Allocate`; None for any other."""
        first = self.each[0]
        if len(self.each) > 1 or not first.is_fraction or first.kind not in KINDS:
            return None
        return first.kind, first.amount

    @property
    def has_latency(self) -> bool:
        """Whether one of them is a latency, for which models are measured."""
        return any(target.kind == "latency" for target in self.each)

    def options(self) -> dict[str, Any]:
        """Return the targets as an option of `Allocate`."""
        plain = self.plain
        return {"target": str(self)} if plain is None else {plain[0]: plain[1]}


@dataclass(frozen=True)
class Asked:
    """A target, and what was reached.

    Attributes:
        kind: Kind of the target, one of `ALL_KINDS`.
        asked: Amount asked for, in the unit.
        got: Amount that was reached, in the unit: measured for a latency if it was measured, else computed.
        unit: "of the original" for fractions, else the unit as it was written: "ms", "kB", "M", …
        is_met: Whether it was reached.
    """

    kind: str
    asked: float
    got: float
    unit: str
    is_met: bool

    def __str__(self) -> str:
        """Return the target and what was reached as text."""
        unit = "" if self.unit == OF_THE_ORIGINAL else self.unit
        return f"{self.kind}={self.got:.4g}{unit} (asked for {self.asked:g}{unit})"


AnyTargets: TypeAlias = Targets | str | tuple[str, float]
"""Targets, their text, or kind and fraction of one target."""


def targets_of(said: AnyTargets) -> Targets:
    """Return targets from their text, or from kind and fraction of one; raises TargetError if they are not valid."""
    if isinstance(said, Targets):
        return said
    if not isinstance(said, str):
        return fraction(*said)
    try:
        return parse(said)
    except ValueError as error:
        raise TargetError(f"target: {error}") from error


def fraction(kind: str, amount: float) -> Targets:
    """Return a single target that is a fraction of the original."""
    return Targets((Target(kind, amount),))


def parse(text: str) -> Targets:
    """Return the targets of KIND=AMOUNT,KIND=AMOUNT,…; `<=` may be written for `=`.

    An amount up to 1 without a unit is the fraction of the original that may remain, as is a percentage. Others are
    absolute: multiply-accumulates, parameters and channels in k, M or G, sizes in B, kB, MB, KiB or MiB, latencies in
    us, ms or s.

    Raises TargetError for an unknown kind or unit, ValueError for another text.
    """
    return Targets(tuple(_parsed(part) for part in text.split(",")))


def _parsed(text: str) -> Target:
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not KIND=AMOUNT, as in macs=0.5 or latency=5ms")
    kind, number, unit = found.groups()
    try:
        amount = float(number)
    except ValueError as error:
        raise ValueError(f"{text!r} is not KIND=AMOUNT, as in macs=0.5 or latency=5ms") from error
    if unit == "%":
        return Target(kind, amount / 100)
    if kind in ALL_KINDS and unit and unit not in _UNITS[kind]:
        raise TargetError(_no_unit(kind, amount, unit))
    is_fraction = not unit and (amount <= 1 or kind not in ALL_KINDS)
    return Target(kind, amount) if is_fraction else Target(kind, amount, unit)


def _no_unit(kind: str, amount: float, unit: str) -> str:
    units = [name for name in _UNITS[kind] if name and name not in _SYNONYMS]
    wanted = f"{', '.join(units[:-1])} or {units[-1]}"
    if not unit:
        return f"{kind}={amount:g} has no unit: give {wanted}, or a fraction of the original from 0 to 1"
    folded = [name for name in units if name.lower() == unit.lower()]
    close = f" (did you mean {' or '.join(folded)}?)" if folded else neighbours(unit, units)
    return f"{kind}={amount:g}{unit}: the units of {kind} are {wanted}{close}"
