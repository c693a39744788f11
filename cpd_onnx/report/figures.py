"""Results as figures, in SVG, PNG or PDF or inside a page: the same result gives the same file; no window opens.

matplotlib, of the extra "report", is imported once something is drawn.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.io.files import require_free, write_atomically
from cpd_onnx.report.svg import embedded
from cpd_onnx.report.tables import longest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from cpd_onnx.runtime.bench import Bench, Setting, Timing

SUFFIXES = (".svg", ".png", ".pdf")
"""Endings of the files that figures can be written to."""
Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points of a line."""
_Panel: TypeAlias = "Callable[[Axes, Bench], object]"

_UNDATED: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
"""Metadata that would differ from one drawing to the next."""
_COLOURS = ("#8b97a5", "#0068a8", "#d55e00", "#009e73", "#b8609b", "#b98700", "#3a9bd9")
"""The first model, which others are compared with, is grey; the others differ for colour-blind readers too (Okabe and
Ito, Color Universal Design, 2008; darkened to be seen on white)."""
_INK, _MUTED, _FAINT, _GRID = "#1b2430", "#5b6673", "#c9d1d9", "#e6e9ed"
_INKS = {colour: f"--series-{number}" for number, colour in enumerate(_COLOURS)} | {
    _INK: "--ink", _MUTED: "--muted", _FAINT: "--faint", _GRID: "--grid",
}  # fmt: skip  # a table
"""The CSS variables that stand for them inside a page."""
_LOOK: dict[Any, Any] = {
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": "medium", "axes.titleweight": "bold", "grid.color": _GRID,
    "font.size": 9.0, "legend.frameon": False, "svg.hashsalt": "cpd-onnx", "savefig.dpi": 150,
    "text.color": _INK, "axes.labelcolor": _MUTED, "axes.edgecolor": _FAINT, "xtick.color": _FAINT,
    "ytick.color": _FAINT, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "text.parse_math": False,
}  # fmt: skip  # a table
WIDE, PHONE = 9.8, 4.2
"""Inches: a wide figure takes all of a page; on a phone the same one would be too small to read."""
_NARROW = 5.2
"""Inches: two narrow figures stand side by side."""
_LETTERS = 4.2
"""Letters of the names at an axis that there is room for, by inch of the width."""
_LETTERS_AN_INCH, _HANDLE = 12.5, 7
"""Letters of the names in a legend that there is room for, and what stands before each takes so many."""
_SMALL = 0.01
"""Operators that take less than this share of the time have no bar of their own on a page."""
_OPERATORS = 7
"""Operators that have a colour of their own."""
_ROWS = 30
"""Groups that have a row of their own in the figure of widths; more are told by their numbers."""
_TALLEST = 8.5
"""Inches that rows together take at most, so that the figure goes on a sheet of paper."""
_BUCKETS = 400
"""Pieces of a long line, each drawn from its least to its largest value."""
_SMOOTHED = 40
"""The part of a line that one point of the smoothed one stands for is this small a part of it."""
_PANELS = 24
"""Groups that have a panel of their own; more are the rows of one map."""
_COLUMNS = 4
_SHARES = 101
"""Columns of a map."""
_TICKS, _DENSE = 12, 500.0
"""Numbers at a logarithmic axis at most; below this ratio of its ends there are those between the powers of ten too."""
_LOGARITHMIC = 20.0
"""From this ratio on of the largest to the smallest number, small ones would not be seen on a linear axis."""


def require(path: Path) -> None:
    """Raise UnsupportedError if no figure can be written to a file of that name, or matplotlib is not installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise UnsupportedError(f"figures are {', '.join(SUFFIXES)}: {path} ends in none of these")
    _require_matplotlib()


def _require_matplotlib() -> None:
    if util.find_spec("matplotlib") is None:
        raise UnsupportedError("drawing needs matplotlib: pip install 'cpd-onnx[report]'")


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure that is not drawn yet.

    Attributes:
        size: width and height in inches.
        paint: puts it on an empty figure.

    """

    size: tuple[float, float]
    paint: Callable[[Figure], None]

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Draw it into a file; raises UnsupportedError as `require`, ModelError if the file cannot be written."""
        require(path)
        require_free(path, overwrite=overwrite)
        suffix = path.suffix.lower()
        write_atomically(path, self._drawn(format=suffix[1:], metadata=_UNDATED[suffix]))

    def svg(self, key: str, label: str) -> str:
        """The figure as an element for a page of HTML.

        Args:
            key: its name within the page.
            label: what it shows, in words.

        Raises:
            UnsupportedError: matplotlib is not installed.

        """
        _require_matplotlib()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts write the text, not ours
            drawn = self._drawn(format="svg", metadata=_UNDATED[".svg"], transparent=True)
        return embedded(drawn.decode(), key, label, _INKS)

    def _drawn(self, **how: Any) -> bytes:
        """The figure as bytes, whatever the user's own matplotlib says."""
        import matplotlib
        from matplotlib.figure import Figure

        content = io.BytesIO()
        fonts = {"svg.fonttype": "none"} if how.get("transparent") else {}
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_LOOK | fonts)
            figure = Figure(figsize=self.size, layout="constrained")
            self.paint(figure)
            figure.savefig(content, **how)
        return content.getvalue()


def bench(found: Bench, path: Path, *, overwrite: bool = False) -> None:
    """Draw what `cpd-onnx bench` measured: latency, throughput, time by operator, memory.

    Raises UnsupportedError as `require`, ModelError if the file is there or cannot be written.
    """
    panels: list[_Panel] = [_latency, *_throughputs(found), _operators, _memory]
    rows = math.ceil(len(panels) / 2)
    tallest = max(2.6, 0.6 + 0.22 * len(found.timings))

    def paint(figure: Figure) -> None:
        axes = figure.subplots(rows, 2, squeeze=False).ravel()
        for place, panel in zip(axes, panels, strict=False):
            panel(place, found)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        _name_models(figure, found)
        machine = ", ".join(f"{name} {found.machine[name]}" for name in ("processor", "cpus", "onnxruntime"))
        figure.supxlabel(_shortened(machine, 200), fontsize=7, color=_MUTED)

    Drawing((11.0, rows * tallest + 0.4), paint).write(path, overwrite=overwrite)


def latencies(found: Bench) -> Drawing:
    """The latency of each model under each setting: the median, and from where to where the runs went."""

    def paint(figure: Figure) -> None:
        place = figure.subplots()
        for height, timing in _latency(place, found):
            place.annotate(
                f"{timing.p50:.3g}", (timing.p99, height), (4, 0), textcoords="offset points", va="center",
                fontsize=8, color=_MUTED,
            )  # fmt: skip  # what, where and how
        place.set_title("")
        place.margins(x=0.15)
        _name_models(figure, found)

    models = list(dict.fromkeys(timing.model for timing in found.timings))
    return Drawing((_NARROW, 1.0 + 0.28 * len(found.timings) + _above(models, _NARROW)), paint)


def operators(found: Bench, inches: float = WIDE) -> Drawing:
    """Where the time goes: the operators that take longest, a bar for each model."""
    rows = longest(found.profiles, _with_a_bar(found))[:-1]
    models = list(found.profiles)

    def paint(figure: Figure) -> None:
        place = figure.subplots()
        thickness = 0.8 / len(models)
        for number in range(len(models)):
            heights = np.arange(len(rows)) + thickness * (number - (len(models) - 1) / 2)
            spent = [times[number] for _, times in rows]
            bars = place.barh(heights, spent, 0.9 * thickness, color=_colour(number), label=str(number))
            place.bar_label(bars, [f"{ms:.3g}" for ms in spent], padding=3, fontsize=8, color=_MUTED)
        place.set_yticks(range(len(rows)), [_shortened(name, round(_LETTERS * inches)) for name, _ in rows])
        place.set_ylim(len(rows) - 0.5, -0.5)
        place.grid(visible=False, axis="y")
        place.margins(x=0.15)
        place.set_xlabel("ms in one run, one thread")
        _legend(figure, place.get_legend_handles_labels()[0], models)

    return Drawing((inches, 0.8 + len(rows) * (0.12 + 0.18 * len(models)) + _above(models, inches)), paint)


def _with_a_bar(found: Bench) -> int:
    """How many operators take enough time in some model to be seen."""
    shares = {
        name: max(profile.get(name, 0.0) / (sum(profile.values()) or 1.0) for profile in found.profiles.values())
        for profile in found.profiles.values()
        for name in profile
    }
    return max(1, min(_OPERATORS, sum(share >= _SMALL for share in shares.values())))


def widths(groups: Sequence[tuple[str, int, int]], inches: float = WIDE) -> Drawing:
    """How wide each group of channels was and is: name, channels before, channels after, in the order of the network.

    Raises ValueError if there is no group.
    """
    if not groups:
        raise ValueError("there must be a group")
    if len(groups) > _ROWS:
        return Drawing((inches, 4.4), lambda figure: _profile_of_widths(figure, groups))

    def paint(figure: Figure) -> None:
        place = figure.subplots()
        heights = range(len(groups))
        place.barh(heights, [before for _, before, _ in groups], 0.7, color=_FAINT, label="before")
        place.barh(heights, [after for *_, after in groups], 0.7, color=_colour(1), label="after")
        for height, (_, before, after) in zip(heights, groups, strict=True):
            text = f"{before} → {after}" if after != before else f"{before}"
            place.annotate(
                text, (before, height), (4, 0), textcoords="offset points", va="center", fontsize=8, color=_MUTED
            )
        place.set_yticks(heights, _told_apart([name for name, *_ in groups], round(_LETTERS * inches)))
        place.set_ylim(len(groups) - 0.4, -0.6)
        place.margins(x=0.1 + 0.6 / inches)
        place.grid(visible=False, axis="y")
        place.set_xlabel("channels")
        figure.legend(loc="outside upper left", ncols=2)

    return Drawing((inches, 0.9 + 0.24 * len(groups)), paint)


def _profile_of_widths(figure: Figure, groups: Sequence[tuple[str, int, int]]) -> None:
    """Widths, and what is left of them, as steps along the network."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    before, after = (np.asarray([group[place] for group in groups], np.float64) for place in (1, 2))
    edges = np.arange(len(groups) + 1) + 0.5
    upper.stairs(before, edges, fill=True, color=_FAINT, label="before")
    upper.stairs(after, edges, fill=True, color=_colour(1), label="after")
    upper.set_ylabel("channels")
    if before.max() > _LOGARITHMIC * before.min():
        upper.set_yscale("log", base=2)
        _plain_numbers(upper.yaxis, base=2)
    lower.stairs(100 * after / before, edges, fill=True, color=_colour(1), alpha=0.35)
    lower.stairs(100 * after / before, edges, color=_colour(1), baseline=None)
    lower.set_ylim(0, 105)
    lower.set_ylabel("% kept")
    lower.set_xlim(edges[0], edges[-1])
    lower.set_xlabel("number of the group, as in the table")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left", ncols=2)


def training(losses: Sequence[float], watched: Curve = (), metric: str = "") -> Drawing:
    """The loss of each update, raw and smoothed, and what was scored on the way, over the updates.

    Args:
        losses: one for each update; many are drawn as bands from the least to the largest.
        watched: updates done, and the score then.
        metric: what the score is.

    Raises:
        ValueError: there are no losses.

    """
    if not losses:
        raise ValueError("there must be losses")

    def paint(figure: Figure) -> None:
        upper, *lower = figure.subplots(2 if watched else 1, 1, sharex=True, squeeze=False).ravel()
        _losses(upper, np.asarray(losses, np.float64))
        for place in lower:
            place.plot(*zip(*watched, strict=True), "o-", color=_colour(2), markersize=3)
            place.set_title(_shortened(metric, 60))
        (lower or [upper])[-1].set_xlabel("updates")

    return Drawing((_NARROW, 4.4 if watched else 2.8), paint)


def _losses(place: Axes, losses: npt.NDArray[np.float64]) -> None:
    losses = np.where(np.isfinite(losses), losses, np.nan)
    pieces = [piece for piece in np.array_split(losses, min(_BUCKETS, len(losses))) if np.isfinite(piece).any()]
    steps = np.linspace(1, len(losses), len(pieces))
    low, middle, high = (np.asarray([of(piece) for piece in pieces]) for of in (np.nanmin, np.nanmean, np.nanmax))
    place.set_title("Loss")
    if len(pieces) == len(losses):
        place.plot(steps, middle, color=_colour(0), linewidth=0.8, label="each update")
    else:
        place.fill_between(steps, low, high, color=_colour(0), alpha=0.5, linewidth=0, label="each update")
    place.plot(steps, _smoothed(middle), color=_colour(1), linewidth=1.6, label="smoothed")
    if len(low) and low.min() > 0 and high.max() > _LOGARITHMIC * low.min():
        place.set_yscale("log")
        _plain_numbers(place.yaxis)
    place.legend(fontsize=8)


def _smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of what is around each value, of less towards the ends."""
    reach = max(1, len(values) // _SMOOTHED)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    around = np.minimum(reach, np.minimum(places, len(values) - 1 - places))
    return np.asarray((sums[places + around + 1] - sums[places - around]) / (2 * around + 1))


@dataclass(frozen=True)
class Choice:
    """One model to choose among others.

    Attributes:
        ms: its latency.
        quality: what it scores.
        picked: whether it was chosen.

    """

    name: str
    ms: float
    quality: float
    picked: bool = False


def tradeoff(choices: Sequence[Choice], metric: str, *, is_less_better: bool = False) -> Drawing:
    """Score against latency, with a line along the models that no other one is both faster and better than.

    Raises ValueError if there is nothing to choose from.
    """
    if not choices:
        raise ValueError("there must be something to choose from")
    best = frontier(choices, is_less_better=is_less_better)

    def paint(figure: Figure) -> None:
        place = figure.subplots()
        place.plot([c.ms for c in best], [c.quality for c in best], "-", color=_colour(1), alpha=0.5)
        for one in choices:
            face = _colour(1) if one in best else "none"
            place.plot(one.ms, one.quality, "o", markerfacecolor=face, markeredgecolor=_colour(1), markersize=5)
        for one in choices:
            if one.picked:
                place.plot(
                    one.ms, one.quality, "o", fillstyle="none", color=_colour(2), markersize=12, markeredgewidth=2
                )
        _label_picked(place, choices)
        place.margins(0.14)
        place.set_xlabel("latency, ms")
        place.set_ylabel(_shortened(metric, 40))

    return Drawing((_NARROW, 3.4), paint)


def pareto(
    choices: Sequence[Choice], path: Path, *, metric: str, is_less_better: bool = False, overwrite: bool = False
) -> None:
    """Draw score against latency into a file.

    Args:
        choices: the models.
        path: where the figure goes.
        metric: what the score is, with its unit.
        is_less_better: whether a low score is a good one.
        overwrite: whether a file may be replaced.

    Raises:
        UnsupportedError: as `require`.
        ModelError: the file is there or cannot be written.
        ValueError: there is nothing to choose from.

    """
    tradeoff(choices, metric, is_less_better=is_less_better).write(path, overwrite=overwrite)


def frontier(choices: Sequence[Choice], *, is_less_better: bool = False) -> list[Choice]:
    """The models that no other one is both faster and better than, the fastest first."""
    sign = -1.0 if is_less_better else 1.0
    ordered = sorted(choices, key=lambda one: (one.ms, -sign * one.quality))
    return [one for one in ordered if not any(_beats(other, one, sign) for other in choices)]


def _beats(one: Choice, other: Choice, sign: float) -> bool:
    """Whether nothing speaks for the other one."""
    gains = (other.ms - one.ms, sign * (one.quality - other.quality))
    return min(gains) >= 0 and max(gains) > 0


def _label_picked(place: Axes, choices: Sequence[Choice]) -> None:
    """The name of what was chosen, on the side where there is room."""
    middle = (min(c.ms for c in choices) + max(c.ms for c in choices)) / 2
    for one in [one for one in choices if one.picked][:1]:
        is_left = one.ms <= middle
        place.annotate(
            _shortened(one.name, 24), (one.ms, one.quality), (11 if is_left else -11, -12),
            textcoords="offset points", ha="left" if is_left else "right", fontsize=8, color=_INK,
        )  # fmt: skip  # what, where and how


def sensitivity(
    curves: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, error_name: str, overwrite: bool = False
) -> None:
    """Draw the error of a model over the width that one group of channels keeps while the others stay whole.

    Args:
        curves: for each group by name, the widths kept and the errors there; the largest width is the whole group.
        path: where the figure goes; a panel for each group, or one map with a row for each if they are many.
        error_name: what the error is, with its unit.
        overwrite: whether a file may be replaced.

    Raises:
        UnsupportedError: as `require`.
        ModelError: the file is there or cannot be written.
        ValueError: there is no curve, or one without points.
    """
    sensitivities(curves, error_name).write(path, overwrite=overwrite)


def sensitivities(curves: Mapping[str, Sequence[tuple[int, float]]], error_name: str, inches: float = WIDE) -> Drawing:
    """The figure of `sensitivity`; raises ValueError as that does."""
    if not curves or not all(curves.values()):
        raise ValueError("every group needs points, and there must be a group")
    ordered = {name: sorted(points) for name, points in curves.items()}
    if len(ordered) > _PANELS:
        height = min(_TALLEST, 0.16 * len(ordered)) + 1.2
        return Drawing((inches, height), lambda figure: _sensitivity_map(figure, ordered, error_name))
    columns = min(_COLUMNS if inches > _NARROW else 2, math.ceil(math.sqrt(1.5 * len(ordered))))
    rows = math.ceil(len(ordered) / columns)
    size = (min(inches, max(_NARROW, inches * columns / _COLUMNS)), 1.8 * rows + 0.6)
    letters = round(10 * size[0] / columns)

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("constrained", h_pad=0.08)  # so that a title does not seem to belong to what is above
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for place, (name, points) in zip(axes, ordered.items(), strict=False):
            place.plot(*zip(*points, strict=True), "o-", color=_colour(1), markersize=3)
            place.set_title(_shortened(name, letters), fontsize=8, fontweight="normal")
            place.set_xlim(left=0)
        for place in axes[len(ordered) :]:
            place.set_axis_off()
        figure.supxlabel("channels kept", fontsize=9, color=_MUTED)
        figure.supylabel(_shortened(error_name, 60), fontsize=9, color=_MUTED)

    return Drawing(size, paint)


def _sensitivity_map(figure: Figure, curves: Mapping[str, Curve], error_name: str) -> None:
    """One row a group: groups differ in width, so that the share kept runs along the row."""
    from matplotlib.colors import PowerNorm

    shares = np.linspace(0, 1, _SHARES)
    rows = []
    for points in curves.values():
        widths, errors = (np.asarray(part, np.float64) for part in zip(*points, strict=True))
        rows.append(np.interp(shares, widths / widths.max(), errors, left=np.nan))
    place = figure.subplots()
    edges = np.linspace(-0.5 / (_SHARES - 1), 1 + 0.5 / (_SHARES - 1), _SHARES + 1)
    drawn = place.pcolormesh(
        edges, np.arange(len(rows) + 1), np.asarray(rows), cmap="viridis", norm=PowerNorm(0.5), rasterized=True
    )  # the root, since a few groups matter far more than the others
    step = math.ceil(0.14 * len(rows) / _TALLEST)  # names that there is room for
    names = _told_apart(list(curves), round(_LETTERS * figure.get_figwidth()))
    place.set_yticks(np.arange(0, len(rows), step) + 0.5, names[::step], fontsize=7)
    place.invert_yaxis()
    place.grid(visible=False)
    place.set_xlabel("share of the group's channels kept")
    figure.colorbar(drawn, label=_shortened(error_name, 60))


# The panels of `bench`.


def _latency(place: Axes, found: Bench) -> list[tuple[float, Timing]]:
    """A dot at the median, and a line from the tenth to the ninety-ninth percentile; says at which height each is."""
    drawn = []
    models = list(dict.fromkeys(timing.model for timing in found.timings))
    settings = list(dict.fromkeys(timing.setting for timing in found.timings))
    for timing in found.timings:
        number = models.index(timing.model)
        height = settings.index(timing.setting) + 0.7 * ((number + 0.5) / len(models) - 0.5)
        place.plot([timing.p10, timing.p99], [height] * 2, color=_colour(number), alpha=0.5)
        place.plot(timing.p50, height, "o", color=_colour(number), markersize=4)
        drawn.append((height, timing))
    without = ("provider",) if len({setting.provider for setting in settings}) == 1 else ()
    place.set_yticks(range(len(settings)), [_shortened(_words(setting, without), 40) for setting in settings])
    place.set_ylim(len(settings) - 0.5, -0.5)
    place.set_title("Latency: median, 10th to 99th percentile")
    place.set_xlabel("ms")
    _scale(place, [number for timing in found.timings for number in (timing.p10, timing.p99)])
    return drawn


def _throughputs(found: Bench) -> list[_Panel]:
    """A panel over batch sizes, and one over threads, if there are several of both; else one over what there is."""
    varied = {name for name in ("batch", "threads") if len({getattr(t.setting, name) for t in found.timings}) > 1}

    def over_batches(place: Axes, found: Bench) -> None:
        _throughput(place, found, "batch", "samples at a time")

    def over_threads(place: Axes, found: Bench) -> None:
        _throughput(place, found, "threads", "threads")

    return [over_threads] if varied == {"threads"} else [over_batches, *([over_threads] if "threads" in varied else [])]


def _throughput(place: Axes, found: Bench, over: str, label: str) -> None:
    """Samples a second; one line for each model and the rest of the setting, told apart by its dashes."""
    models = list(dict.fromkeys(timing.model for timing in found.timings))
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    without = (over, "provider") if len({timing.setting.provider for timing in found.timings}) == 1 else (over,)
    for timing in found.timings:
        rest = _words(timing.setting, without)
        x = _samples(timing) if over == "batch" else timing.setting.threads
        lines.setdefault((timing.model, rest), []).append((x, timing.per_second))
    rests = list(dict.fromkeys(rest for _, rest in lines))
    for (model, rest), points in lines.items():
        dashes = ("-", "--", ":", "-.")[rests.index(rest) % 4]
        colour = _colour(models.index(model))
        place.plot(*zip(*sorted(points), strict=True), f"o{dashes}", color=colour, markersize=4)
        if model == models[0]:
            place.plot([], [], dashes, color=_MUTED, label=rest)
    if len(rests) > 1:
        place.legend(fontsize=7, handlelength=3)
    places = sorted({x for points in lines.values() for x, _ in points})
    if places[0] > 0 and places[-1] >= 4 * places[0]:
        place.set_xscale("log", base=2)
    place.set_xticks(places, [str(x) for x in places])
    place.minorticks_off()
    place.set_ylim(bottom=0)
    place.set_xlabel(label)
    place.set_title("Throughput, samples/s")


def _operators(place: Axes, found: Bench) -> None:
    """One bar a model, in pieces: the operators that take longest in any of them, then the others together."""
    rows = longest(found.profiles, _OPERATORS)[:-1]
    heights, left = np.arange(len(found.profiles)), np.zeros(len(found.profiles))
    for number, (operator, spent) in enumerate(rows):
        colour = _FAINT if number == _OPERATORS else _pale(number)
        place.barh(heights, spent, 0.6, left=left, color=colour, label=operator)
        left += spent
    place.set_yticks(heights, [_shortened(name, 30) for name in found.profiles])
    place.invert_yaxis()
    place.grid(visible=False, axis="y")
    place.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    place.set_title("Time by operator in one run, one thread")
    place.set_xlabel("ms")


def _memory(place: Axes, found: Bench) -> None:
    heights, mebibytes = np.arange(len(found.memory)), list(found.memory.values())
    bars = place.barh(heights, mebibytes, 0.6, color=[_colour(number) for number in range(len(mebibytes))])
    place.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    place.set_yticks(heights, [_shortened(name, 30) for name in found.memory])
    place.invert_yaxis()
    place.grid(visible=False, axis="y")
    place.set_title("Peak memory of loading and running it")
    place.set_xlabel("MiB")


def _samples(timing: Timing) -> int:
    """Samples in one run."""
    return timing.setting.batch or round(timing.per_second * timing.p50 / 1e3)


def _words(setting: Setting, without: Sequence[str] = ()) -> str:
    """A setting in words."""
    words = {
        "provider": setting.provider.removesuffix("ExecutionProvider"),
        "batch": f"batch {setting.batch}" if setting.batch else "",
        "threads": f"{setting.threads} thread{'s' if setting.threads > 1 else ''}" if setting.threads else "",
    }
    return ", ".join(word for name, word in words.items() if word and name not in without)


# What all figures share.


def _name_models(figure: Figure, found: Bench) -> None:
    """A legend of the models above all panels."""
    models = list(dict.fromkeys(timing.model for timing in found.timings))
    place = figure.axes[0]
    handles = [place.plot([], [], "o-", color=_colour(number))[0] for number in range(len(models))]
    _legend(figure, handles, models)


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Above all panels, as many names side by side as there is room for."""
    inches = figure.get_figwidth()
    shown = [_shortened(name, _room(inches)) for name in names]
    figure.legend(handles, shown, loc="outside upper left", ncols=_columns(names, inches))


def _room(inches: float) -> int:
    """Letters that a name in a legend may have."""
    return round(_LETTERS_AN_INCH * inches) - _HANDLE


def _columns(names: Sequence[str], inches: float) -> int:
    """How many names of a legend stand side by side."""
    most = max(map(len, names)) + _HANDLE
    return max(1, min(4, len(names), int(_LETTERS_AN_INCH * inches / most)))


def _above(names: Sequence[str], inches: float) -> float:
    """Inches that a legend takes."""
    return 0.19 * math.ceil(len(names) / _columns(names, inches))


def _pale(number: int) -> Any:
    """A colour for an area of its own kind."""
    import matplotlib

    return matplotlib.color_sequences["Set2"][number]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _scale(place: Axes, numbers: Sequence[float]) -> None:
    """Logarithmic where a linear axis would hide the small numbers, else from zero on."""
    if min(numbers) > 0 and max(numbers) / min(numbers) > _LOGARITHMIC:
        place.set_xscale("log")
        _plain_numbers(place.xaxis)
    else:
        place.set_xlim(left=0)


def _told_apart(names: Sequence[str], letters: int) -> list[str]:
    """Names shortened, with their numbers where they would look alike."""
    shown = [_shortened(name, letters) for name in names]
    if len(set(shown)) == len(shown):
        return shown
    return [f"{number}: {_shortened(name, letters - 4)}" for number, name in enumerate(names, 1)]


def _plain_numbers(axis: Axis, *, base: int = 10) -> None:
    """Of a logarithmic axis: 0.01 and not ten to the power of minus two, which would be written as mathematics."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if base == 10 and high < _DENSE * low else (1,)
    axis.set_major_locator(LogLocator(base, subs=steps, numticks=_TICKS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _shortened(name: str, length: int) -> str:
    """The end of a name says more than its beginning; what cannot be printed is a question mark."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= length else f"…{name[1 - length :]}"
