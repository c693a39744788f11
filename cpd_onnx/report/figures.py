"""Results as figures, written as SVG, PNG or PDF or embedded in a page; the same result gives the same bytes.

matplotlib, of the extra "report", is imported when the first figure is drawn.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

    from cpd_onnx.runtime.bench import Bench, Timing

SUFFIXES = (".svg", ".png", ".pdf")
"""File name extensions of the formats that figures can be written in."""
Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points (x, y) of a line."""
_Panel: TypeAlias = "Callable[[Axes, Bench], object]"

_UNDATED: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
"""Metadata that savefig leaves out by format, since it would differ from one drawing to the next."""
_COLOURS = ("#8b97a5", "#0068a8", "#d55e00", "#009e73", "#b8609b", "#b98700", "#3a9bd9")
"""Colours of the series. The first model, which the others are compared with, is grey; the others are distinguishable
for colour-blind readers too (Okabe and Ito, Color Universal Design, 2008; darkened for contrast with white)."""
_INK, _MUTED, _FAINT, _GRID = "#1b2430", "#5b6673", "#c9d1d9", "#e6e9ed"
_INKS = {colour: f"--series-{number}" for number, colour in enumerate(_COLOURS)} | {
    _INK: "--ink", _MUTED: "--muted", _FAINT: "--faint", _GRID: "--grid",
}  # fmt: skip  # a table
"""CSS variables that replace the colours in a page."""
_LOOK: dict[Any, Any] = {
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": "medium", "axes.titleweight": "bold", "grid.color": _GRID,
    "font.size": 9.0, "legend.frameon": False, "svg.hashsalt": "cpd-onnx", "savefig.dpi": 150,
    "text.color": _INK, "axes.labelcolor": _MUTED, "axes.edgecolor": _FAINT, "xtick.color": _FAINT,
    "ytick.color": _FAINT, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "text.parse_math": False,
}  # fmt: skip  # a table
"""matplotlib's rcParams of all figures."""

# The sizes and limits below are heuristics, chosen by eye on screens, phones and paper.

_PRINTED = 170
"""Resolution of a figure in a document that is printed, in dots per inch."""
WIDE, PHONE = 9.8, 3.8
"""Widths in inches of a figure across the whole page, and of its version for phones."""
_NARROW = 5.2
"""Width in inches of a figure of which two stand side by side."""
_LETTERS = 4.2
"""Maximum letters of a name at an axis, per inch of the width of the figure."""
_LETTERS_AN_INCH, _HANDLE = 12.5, 7
"""Letters per inch in a legend, and the width of a handle in letters."""
_SMALL = 0.01
"""Minimum fraction of the time that an operator takes to have a bar of its own on a page."""
_OPERATORS = 7
"""Maximum number of operators that have a colour or bar of their own."""
_ROWS = 30
"""Maximum number of groups that have a row of their own in the figure of widths; more are drawn as a profile."""
_TALLEST = 8.5
"""Maximum height in inches of all rows together, so that the figure fits on a sheet of paper."""
_BUCKETS = 400
"""Maximum number of points of a line; a longer one is drawn as bands from the minimum to the maximum of each bucket."""
_SMOOTHED = 40
"""Points of a line per half window of the moving average."""
_PANELS = 24
"""Maximum number of groups that have a panel of their own in the figure of sensitivity; more are rows of a map."""
_COLUMNS = 4
"""Panels side by side."""
_FOOT = 1e-6
"""Fraction of the largest error below which an error is drawn as zero."""
_DECADES = 6
"""Maximum number of labelled powers of ten on the axis of errors."""
_MAP_COLUMNS = 101
"""Columns of the map of sensitivity: one a percent."""
_TICKS, _DENSE = 12, 500.0
"""Maximum number of ticks on a logarithmic axis, and the ratio of its ends below which 2 and 5 are labelled too."""
_LOGARITHMIC = 20.0
"""Ratio of the largest to the smallest number above which an axis is logarithmic."""


def require(path: Path) -> None:
    """Raise UnsupportedError if a path has none of `SUFFIXES`, or matplotlib is not installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise UnsupportedError(f"the name of a figure must end in {', '.join(SUFFIXES)}, got {path}")
    _require_matplotlib()


def _require_matplotlib() -> None:
    if util.find_spec("matplotlib") is None:
        raise UnsupportedError("drawing needs matplotlib: pip install 'cpd-onnx[report]'")


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure that is drawn on demand.

    Attributes:
        size: Width and height in inches.
        paint: Function that draws it on an empty matplotlib figure.

    """

    size: tuple[float, float]
    paint: Callable[[Figure], None]

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Draw the figure and write it to a file.

        Args:
            path: Path of the file, with one of `SUFFIXES`.
            overwrite: Whether an existing file may be replaced.

        Raises:
            UnsupportedError: The path has another extension, or matplotlib is not installed.
            ModelError: The file exists or cannot be written.

        """
        require(path)
        require_free(path, overwrite=overwrite)
        suffix = path.suffix.lower()
        write_atomically(path, self._drawn(format=suffix[1:], metadata=_UNDATED[suffix]))

    def svg(self, key: str, label: str) -> str:
        """Return the figure as an SVG element for an HTML page.

        Args:
            key: Prefix of its identifiers, unique within the page.
            label: Description of its content for screen readers.

        Raises:
            UnsupportedError: matplotlib is not installed.

        """
        _require_matplotlib()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the text is rendered with the reader's fonts
            drawn = self._drawn(format="svg", metadata=_UNDATED[".svg"], transparent=True)
        return embedded(drawn.decode(), key, label, _INKS)

    def png(self) -> bytes:
        """Return the figure as PNG; raises UnsupportedError if matplotlib is not installed."""
        _require_matplotlib()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            return self._drawn(format="png", dpi=_PRINTED)

    def _drawn(self, **how: Any) -> bytes:
        """Return the figure as bytes, independent of the user's matplotlib configuration."""
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


def bench(found: Bench) -> Drawing:
    """Return the figure of all results of `cpd-onnx bench`: latency, throughput, time by operator, peak memory."""
    panels: list[_Panel] = [_latency, *_throughputs(found), _operators, _memory]
    rows = math.ceil(len(panels) / 2)
    tallest = max(2.6, 0.6 + 0.22 * len(found.timings))

    def paint(figure: Figure) -> None:
        for axes, panel in zip(_grid(figure, rows, 2, len(panels)), panels, strict=True):
            panel(axes, found)
        _name_models(figure, found)
        shown = ("processor", "cpus", "onnxruntime", "source")
        machine = ", ".join(f"{name} {found.machine[name]}" for name in shown if name in found.machine)
        figure.supxlabel(_shortened(machine, 200), fontsize=7, color=_MUTED)

    return Drawing((11.0, rows * tallest + 0.4), paint)


def latencies(found: Bench, inches: float = _NARROW) -> Drawing:
    """Return the figure of the latency of each model under each setting: the median and a range of percentiles."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for height, timing in _latency(axes, found):
            _annotate(axes, f"{timing.p50:.3g}", (timing.p99, height))
        axes.set_title("")
        axes.margins(x=0.15)
        _name_models(figure, found)

    return Drawing((inches, 1.0 + 0.28 * len(found.timings) + _legend_height(_models(found), inches)), paint)


def operators(found: Bench, inches: float = WIDE) -> Drawing:
    """Return the figure of the time by operator: a bar for each model, the operators that take longest first."""
    rows = longest(found.profiles, _bar_count(found))[:-1]
    models = list(found.profiles)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        thickness = 0.8 / len(models)
        for number in range(len(models)):
            heights = np.arange(len(rows)) + thickness * (number - (len(models) - 1) / 2)
            spent = [times[number] for _, times in rows]
            bars = axes.barh(heights, spent, 0.9 * thickness, color=_colour(number), label=str(number))
            axes.bar_label(bars, [f"{ms:.3g}" for ms in spent], padding=3, fontsize=8, color=_MUTED)
        axes.set_yticks(range(len(rows)), [_shortened(name, round(_LETTERS * inches)) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.15)
        axes.set_xlabel("ms in one run, one thread")
        _legend(figure, axes.get_legend_handles_labels()[0], models)

    return Drawing((inches, 0.8 + len(rows) * (0.12 + 0.18 * len(models)) + _legend_height(models, inches)), paint)


def _bar_count(found: Bench) -> int:
    """Return the number of operators that take at least `_SMALL` of the time in some model, at least 1."""
    visible = {
        name
        for profile in found.profiles.values()
        for name, ms in profile.items()
        if ms >= _SMALL * sum(profile.values()) > 0
    }
    return max(1, min(_OPERATORS, len(visible)))


def widths(groups: Sequence[tuple[str, int, int]], inches: float = WIDE) -> Drawing:
    """Return the figure of the widths of channel groups before and after pruning.

    Args:
        groups: Name, channels before and channels after of each group, in the order of the network.
        inches: Width of the figure.

    Raises:
        ValueError: There is no group.

    """
    if not groups:
        raise ValueError("there must be at least one group")
    if len(groups) > _ROWS:
        return Drawing((inches, 4.4), lambda figure: _width_profile(figure, groups))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        heights = range(len(groups))
        axes.barh(heights, [before for _, before, _ in groups], 0.7, color=_FAINT, label="before")
        axes.barh(heights, [after for *_, after in groups], 0.7, color=_colour(1), label="after")
        for height, (_, before, after) in zip(heights, groups, strict=True):
            _annotate(axes, f"{before} → {after}" if after != before else f"{before}", (before, height))
        axes.set_yticks(heights, _distinct([name for name, *_ in groups], round(_LETTERS * inches)))
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.margins(x=0.1 + 0.6 / inches)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("channels")
        figure.legend(loc="outside upper left", ncols=2)

    return Drawing((inches, 0.9 + 0.24 * len(groups)), paint)


def _width_profile(figure: Figure, groups: Sequence[tuple[str, int, int]]) -> None:
    """Draw the widths and the percentage that survives as steps along the network."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    before, after = (np.asarray([group[column] for group in groups], np.float64) for column in (1, 2))
    edges = np.arange(len(groups) + 1) + 0.5
    upper.stairs(before, edges, fill=True, color=_FAINT, label="before")
    upper.stairs(after, edges, fill=True, color=_colour(1), label="after")
    upper.set_ylabel("channels")
    if before.max() > _LOGARITHMIC * before.min():
        upper.set_yscale("log", base=2)
        _decimal_ticks(upper.yaxis, base=2)
    lower.stairs(100 * after / before, edges, fill=True, color=_colour(1), alpha=0.35)
    lower.stairs(100 * after / before, edges, color=_colour(1), baseline=None)
    lower.set_ylim(0, 105)
    lower.set_ylabel("% left")
    lower.set_xlim(edges[0], edges[-1])
    lower.set_xlabel("number of the group, as in the table")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left", ncols=2)


def training(losses: Sequence[float], watched: Curve = (), metric: str = "", inches: float = _NARROW) -> Drawing:
    """Return the figure of the loss of each update, raw and smoothed, above the scores during training.

    Args:
        losses: Loss of each update; if there are many, each bucket is a band from its minimum to its maximum.
        watched: Pairs of the number of updates done and the score at that point.
        metric: Name of the score.
        inches: Width of the figure.

    Raises:
        ValueError: There are no losses.

    """
    if not losses:
        raise ValueError("there must be at least one loss")

    def paint(figure: Figure) -> None:
        upper, *lower = figure.subplots(2 if watched else 1, 1, sharex=True, squeeze=False).ravel()
        _losses(upper, np.asarray(losses, np.float64))
        for axes in lower:
            axes.plot(*zip(*watched, strict=True), "o-", color=_colour(2), markersize=3)
            axes.set_title(_shortened(metric, round(11 * inches)))
        (lower or [upper])[-1].set_xlabel("updates")

    return Drawing((inches, 4.4 if watched else 2.8), paint)


def _losses(axes: Axes, losses: npt.NDArray[np.float64]) -> None:
    losses = np.where(np.isfinite(losses), losses, np.nan)
    pieces = [piece for piece in np.array_split(losses, min(_BUCKETS, len(losses))) if np.isfinite(piece).any()]
    steps = np.linspace(1, len(losses), len(pieces))
    low, middle, high = (np.asarray([of(piece) for piece in pieces]) for of in (np.nanmin, np.nanmean, np.nanmax))
    axes.set_title("Loss")
    if len(pieces) == len(losses):
        axes.plot(steps, middle, color=_colour(0), linewidth=0.8, label="each update")
    else:
        axes.fill_between(steps, low, high, color=_colour(0), alpha=0.5, linewidth=0, label="each update")
    axes.plot(steps, _smoothed(middle), color=_colour(1), linewidth=1.6, label="smoothed")
    if len(low) and low.min() > 0 and high.max() > _LOGARITHMIC * low.min():
        axes.set_yscale("log")
        _decimal_ticks(axes.yaxis)
    axes.legend(fontsize=8)


def _smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the centred moving average, over a window that narrows towards the ends."""
    reach = max(1, len(values) // _SMOOTHED)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    around = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    return np.asarray((sums[index + around + 1] - sums[index - around]) / (2 * around + 1))


@dataclass(frozen=True)
class Choice:
    """One of the models to choose from.

    Attributes:
        name: Name of the model.
        ms: Latency in milliseconds.
        quality: Score of the model.
        picked: Whether it was chosen.
        is_original: Whether it is the original.

    """

    name: str
    ms: float
    quality: float
    picked: bool = False
    is_original: bool = False


def tradeoff(
    choices: Sequence[Choice], metric: str, inches: float = _NARROW, *, is_less_better: bool = False
) -> Drawing:
    """Return the figure of score against latency, with a line along the Pareto frontier.

    Args:
        choices: The models.
        metric: Name of the score, with its unit.
        inches: Width of the figure.
        is_less_better: Whether a low score is better than a high one.

    Raises:
        ValueError: There is no model.

    """
    if not choices:
        raise ValueError("there must be at least one model to choose from")
    best = frontier(choices, is_less_better=is_less_better)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([c.ms for c in best], [c.quality for c in best], "-", color=_colour(1), alpha=0.5)
        for one in choices:
            colour = _colour(0 if one.is_original else 1)
            face = colour if one in best or one.is_original else "none"
            label = "the original" if one.is_original else ""
            axes.plot(one.ms, one.quality, "o", mfc=face, mec=colour, markersize=6, linestyle="none", label=label)
        ring: dict[str, Any] = {"fillstyle": "none", "color": _colour(2), "markersize": 12, "markeredgewidth": 2}
        for one in [one for one in choices if one.picked]:
            axes.plot(one.ms, one.quality, "o", linestyle="none", label="chosen", **ring)
        _label_picked(axes, choices)
        axes.margins(0.14)
        axes.set_xlabel("latency, ms")
        axes.set_ylabel(_shortened(metric, 40))
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=2)

    return Drawing((inches, 3.6), paint)


def frontier(choices: Sequence[Choice], *, is_less_better: bool = False) -> list[Choice]:
    """Return the Pareto frontier: the models that no other one dominates in latency and score, the fastest first."""
    sign = -1.0 if is_less_better else 1.0
    ordered = sorted(choices, key=lambda one: (one.ms, -sign * one.quality))
    return [one for one in ordered if not any(_dominates(other, one, sign) for other in choices)]


def _dominates(one: Choice, other: Choice, sign: float) -> bool:
    """Return whether a model is at least as good as another in both respects, and better in one."""
    gains = (other.ms - one.ms, sign * (one.quality - other.quality))
    return min(gains) >= 0 and max(gains) > 0


def _label_picked(axes: Axes, choices: Sequence[Choice]) -> None:
    """Write the name of the chosen model beside its dot, on the side towards the middle of the figure."""
    middle = (min(c.ms for c in choices) + max(c.ms for c in choices)) / 2
    for one in [one for one in choices if one.picked][:1]:
        is_left = one.ms <= middle
        axes.annotate(
            _shortened(one.name, 24), (one.ms, one.quality), (11 if is_left else -11, -12),
            textcoords="offset points", ha="left" if is_left else "right", fontsize=8, color=_INK,
        )  # fmt: skip  # what, where and how


def sensitivity(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    error_name: str,
    inches: float = WIDE,
    *,
    chosen: Mapping[str, int] | None = None,
) -> Drawing:
    """Return the figure of the output error over the width of one group while all other groups are unpruned.

    Each group has a panel; if there are many, each is a row of one map. Errors are on a logarithmic scale, as those of
    different groups differ by orders of magnitude; an error of 0, such as that of the full width, is at its foot.

    Args:
        curves: For each group by name, pairs of a width and the error at that width; the largest width is the full one.
        error_name: Name of the error, with its unit.
        inches: Width of the figure.
        chosen: Width that was chosen for each group, which is marked; may lack groups.

    Raises:
        ValueError: There is no curve, or one without points.

    """
    if not curves or not all(curves.values()):
        raise ValueError("there must be at least one group, and each group needs points")
    ordered = {name: sorted(points) for name, points in curves.items()}
    marked = chosen or {}
    if len(ordered) > _PANELS:
        height = min(_TALLEST, 0.16 * len(ordered)) + 1.2
        return Drawing((inches, height), lambda figure: _sensitivity_map(figure, ordered, error_name, marked))
    columns = min(_COLUMNS if inches > _NARROW else 2, math.ceil(math.sqrt(1.5 * len(ordered))))
    rows = math.ceil(len(ordered) / columns)
    size = (min(inches, max(_NARROW, inches * columns / _COLUMNS)), 1.8 * rows + 0.6)
    letters = round(10 * size[0] / columns)
    low, high = _extent(ordered)

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("constrained", h_pad=0.08)  # so that a title does not seem to belong to the row above
        grid = _grid(figure, rows, columns, len(ordered), sharey=True)
        for axes, (name, points) in zip(grid, ordered.items(), strict=True):
            if name in marked:
                axes.axvline(marked[name], color=_colour(2), linestyle="--", linewidth=1.2)
            axes.plot(*zip(*points, strict=True), "o-", color=_colour(1), markersize=3)
            axes.set_title(_shortened(name, letters), fontsize=8, fontweight="normal")
            axes.set_xlim(left=0)
        _from_zero(grid[0], low, high)
        figure.supxlabel("channels left", fontsize=9, color=_MUTED)
        figure.supylabel(_shortened(error_name, 60), fontsize=9, color=_MUTED)

    return Drawing(size, paint)


def _extent(curves: Mapping[str, Curve]) -> tuple[float, float]:
    """Return the smallest error above zero, or what counts as zero beside the largest, and the largest one."""
    errors = [error for points in curves.values() for _, error in points if math.isfinite(error) and error > 0]
    high = max(errors, default=1.0)
    return max(min(errors, default=high), high * _FOOT), high


def _from_zero(axes: Axes, low: float, high: float) -> None:
    """Make the y axis logarithmic from a power of ten below `low`, with 0 at its foot."""
    from matplotlib.ticker import FixedLocator, NullLocator

    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = math.ceil((last - first + 1) / _DECADES)
    axes.set_yscale("symlog", linthresh=10.0**first, linscale=0.5)
    axes.yaxis.set_major_locator(FixedLocator([0.0, *(10.0**power for power in range(first, last + 1, step))]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-0.15 * 10.0**first, 1.3 * high)


def _sensitivity_map(figure: Figure, curves: Mapping[str, Curve], error_name: str, chosen: Mapping[str, int]) -> None:
    """Draw a map with one row a group, over the fraction of its channels, since groups differ in width."""
    from matplotlib.colors import LogNorm

    low, high = _extent(curves)
    fractions = np.linspace(0, 1, _MAP_COLUMNS)
    rows = []
    for points in curves.values():
        widths, errors = (np.asarray(part, np.float64) for part in zip(*points, strict=True))
        errors = np.log(np.clip(errors, low, None))
        rows.append(np.exp(np.interp(fractions, widths / widths.max(), errors, left=np.nan)))
    axes = figure.subplots()
    edges = np.linspace(-0.5 / (_MAP_COLUMNS - 1), 1 + 0.5 / (_MAP_COLUMNS - 1), _MAP_COLUMNS + 1)
    norm = LogNorm(low, high if high > low else 10 * low)
    drawn = axes.pcolormesh(
        edges, np.arange(len(rows) + 1), np.asarray(rows), cmap="viridis", norm=norm, rasterized=True
    )
    places = [(chosen[name] / max(width for width, _ in points), row)
              for row, (name, points) in enumerate(curves.items()) if name in chosen]  # fmt: skip  # a list
    if places:
        at, tops = (np.asarray(part, np.float64) for part in zip(*places, strict=True))
        for colour, width in (("#ffffff", 3.0), (_COLOURS[2], 1.6)):
            axes.vlines(at, tops, tops + 1, colors=colour, linewidth=width)
    step = math.ceil(0.14 * len(rows) / _TALLEST)  # as many names as there is room for
    names = _distinct(list(curves), round(_LETTERS * figure.get_figwidth()))
    axes.set_yticks(np.arange(0, len(rows), step) + 0.5, names[::step], fontsize=7)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("fraction of the group's channels left")
    is_narrow = figure.get_figwidth() < _NARROW
    bar = figure.colorbar(drawn, label=_shortened(error_name, 60), location="top" if is_narrow else "right")
    _decimal_ticks(bar.ax.xaxis if is_narrow else bar.ax.yaxis)


# The panels of `bench`.


def _latency(axes: Axes, found: Bench) -> list[tuple[float, Timing]]:
    """Draw a dot at each median and a line from the 10th to the 99th percentile; return the height of each."""
    drawn = []
    models = _models(found)
    settings = list(dict.fromkeys(timing.setting for timing in found.timings))
    for timing in found.timings:
        number = models.index(timing.model)
        height = settings.index(timing.setting) + 0.7 * ((number + 0.5) / len(models) - 0.5)
        axes.plot([timing.p10, timing.p99], [height] * 2, color=_colour(number), alpha=0.5)
        axes.plot(timing.p50, height, "o", color=_colour(number), markersize=4)
        drawn.append((height, timing))
    without = _common(found)
    axes.set_yticks(range(len(settings)), [_shortened(setting.words(without), 40) for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_title("Latency: median, 10th to 99th percentile")
    axes.set_xlabel("ms")
    _scale(axes, [number for timing in found.timings for number in (timing.p10, timing.p99)])
    return drawn


def _throughputs(found: Bench) -> list[_Panel]:
    """Return a panel over batch sizes and one over threads if both vary; otherwise only the one that does."""
    varied = {name for name in ("batch", "threads") if len({getattr(t.setting, name) for t in found.timings}) > 1}
    over_batches = partial(_throughput, over="batch", label="samples at a time")
    over_threads = partial(_throughput, over="threads", label="threads")
    return [over_threads] if varied == {"threads"} else [over_batches, *[over_threads] * ("threads" in varied)]


def _throughput(axes: Axes, found: Bench, over: str, label: str) -> None:
    """Draw samples per second: one line for each model and each combination of the other settings, which are dashed."""
    models = _models(found)
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    without = (over, *_common(found))
    for timing in found.timings:
        rest = timing.setting.words(without)
        x = _samples(timing) if over == "batch" else timing.setting.threads
        lines.setdefault((timing.model, rest), []).append((x, timing.per_second))
    rests = list(dict.fromkeys(rest for _, rest in lines))
    for (model, rest), points in lines.items():
        dashes = ("-", "--", ":", "-.")[rests.index(rest) % 4]
        colour = _colour(models.index(model))
        axes.plot(*zip(*sorted(points), strict=True), f"o{dashes}", color=colour, markersize=4)
        if model == models[0]:
            axes.plot([], [], dashes, color=_MUTED, label=rest)
    if len(rests) > 1:
        axes.legend(fontsize=7, handlelength=3)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    if ticks[0] > 0 and ticks[-1] >= 4 * ticks[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_title("Throughput, samples/s")


def _operators(axes: Axes, found: Bench) -> None:
    """Draw one stacked bar a model: the operators that take longest in any model, then all others together."""
    rows = longest(found.profiles, _OPERATORS)[:-1]
    left = np.zeros(len(found.profiles))
    for number, (operator, spent) in enumerate(rows):
        colour = _FAINT if number == _OPERATORS else _pale(number)
        axes.barh(range(len(left)), spent, 0.6, left=left, color=colour, label=operator)
        left += spent
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _finish_bars(axes, found.profiles, "Time by operator in one run, one thread", "ms")


def _memory(axes: Axes, found: Bench) -> None:
    """Draw the peak memory of each model."""
    colours = [_colour(number) for number in range(len(found.memory))]
    bars = axes.barh(range(len(found.memory)), list(found.memory.values()), 0.6, color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    _finish_bars(axes, found.memory, "Peak memory of loading and running it", "MiB")


def _finish_bars(axes: Axes, names: Iterable[str], title: str, unit: str) -> None:
    """Label a panel of horizontal bars, one a name, the first at the top."""
    shown = [_shortened(name, 30) for name in names]
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_title(title)
    axes.set_xlabel(unit)


def _samples(timing: Timing) -> int:
    """Return the number of samples in one run."""
    return timing.setting.batch or round(timing.per_second * timing.p50 / 1e3)


def _models(found: Bench) -> list[str]:
    """Return the names of the models in the order of their timings."""
    return list(dict.fromkeys(timing.model for timing in found.timings))


def _common(found: Bench) -> tuple[str, ...]:
    """Return the fields of the settings that need no mention, since they are the same in all timings."""
    return ("provider",) if len({timing.setting.provider for timing in found.timings}) == 1 else ()


# Shared by all figures.


def _grid(figure: Figure, rows: int, columns: int, count: int, **how: Any) -> Sequence[Axes]:
    """Return the first `count` panels of a grid, the others switched off."""
    grid: npt.NDArray[Any] = figure.subplots(rows, columns, squeeze=False, **how).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    return list(grid[:count])


def _annotate(axes: Axes, text: str, point: tuple[float, float]) -> None:
    """Write a text to the right of a point."""
    axes.annotate(text, point, (4, 0), textcoords="offset points", va="center", fontsize=8, color=_MUTED)


def _name_models(figure: Figure, found: Bench) -> None:
    """Draw a legend of the models above all panels."""
    models = _models(found)
    handles = [figure.axes[0].plot([], [], "o-", color=_colour(number))[0] for number in range(len(models))]
    _legend(figure, handles, models)


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Draw a legend above all panels, with as many names side by side as there is room for."""
    inches = figure.get_figwidth()
    shown = [_shortened(name, round(_LETTERS_AN_INCH * inches) - _HANDLE) for name in names]
    figure.legend(handles, shown, loc="outside upper left", ncols=_columns(names, inches))


def _columns(names: Sequence[str], inches: float) -> int:
    """Return the number of names of a legend that fit side by side."""
    most = max(map(len, names)) + _HANDLE
    return max(1, min(4, len(names), int(_LETTERS_AN_INCH * inches / most)))


def _legend_height(names: Sequence[str], inches: float) -> float:
    """Return the height of a legend in inches."""
    return 0.19 * math.ceil(len(names) / _columns(names, inches))


def _pale(number: int) -> Any:
    """Return one of a set of pale colours, for areas."""
    import matplotlib

    return matplotlib.color_sequences["Set2"][number]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _scale(axes: Axes, numbers: Sequence[float]) -> None:
    """Make the x axis logarithmic if a linear one would hide the small numbers; otherwise start it at zero."""
    if min(numbers) > 0 and max(numbers) / min(numbers) > _LOGARITHMIC:
        axes.set_xscale("log")
        _decimal_ticks(axes.xaxis)
    else:
        axes.set_xlim(left=0)


def _distinct(names: Sequence[str], letters: int) -> list[str]:
    """Return the names shortened, preceded by their numbers if some would look the same."""
    shown = [_shortened(name, letters) for name in names]
    if len(set(shown)) == len(shown):
        return shown
    return [f"{number}: {_shortened(name, letters - 4)}" for number, name in enumerate(names, 1)]


def _decimal_ticks(axis: Axis, *, base: int = 10) -> None:
    """Label a logarithmic axis with decimal numbers, such as 0.01, instead of powers."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if base == 10 and high < _DENSE * low else (1,)
    axis.set_major_locator(LogLocator(base, subs=steps, numticks=_TICKS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _shortened(name: str, length: int) -> str:
    """Return the end of a name, which identifies it better than its start; unprintable characters become "?"."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= length else f"…{name[1 - length :]}"
