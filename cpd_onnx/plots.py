"""Results as figures in SVG, PNG or PDF: the same result gives the same file; nothing here opens a window.

matplotlib, the extra "plot", is imported once something is drawn.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.files import require_free, write_atomically
from cpd_onnx.report import longest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cpd_onnx.bench import Bench, Setting, Timing

SUFFIXES = (".svg", ".png", ".pdf")
"""Endings of the files that figures can be written to."""
Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points of a line."""
_Panel: TypeAlias = "Callable[[Axes, Bench], None]"

_UNDATED: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
"""Metadata that would differ from one drawing to the next."""
_LOOK: dict[Any, Any] = {
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": "medium", "axes.titleweight": "bold", "grid.color": "0.9",
    "font.size": 9.0, "legend.frameon": False, "svg.hashsalt": "cpd-onnx", "savefig.dpi": 150,
}  # fmt: skip  # a table
_OPERATORS = 7
"""Operators that have a colour of their own."""
_PANELS = 24
"""Groups that have a panel of their own; more are the rows of one map."""
_COLUMNS = 6
_SHARES = 101
"""Columns of a map."""
_LOGARITHMIC = 20.0
"""From this ratio on of the largest to the smallest number, small ones would not be seen on a linear axis."""


def require(path: Path) -> None:
    """Raise UnsupportedError if no figure can be written to a file of that name, or matplotlib is not installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise UnsupportedError(f"figures are {', '.join(SUFFIXES)}: {path} ends in none of these")
    if util.find_spec("matplotlib") is None:
        raise UnsupportedError("drawing needs matplotlib: pip install 'cpd-onnx[plot]'")


def bench(found: Bench, path: Path, *, overwrite: bool = False) -> None:
    """Draw what `cpd-onnx bench` measured: latency, throughput, time by operator, memory.

    Raises UnsupportedError as `require`, ModelError if the file is there or cannot be written.
    """
    models = list(dict.fromkeys(timing.model for timing in found.timings))
    panels: list[_Panel] = [_latency, *_throughputs(found), _operators, _memory]
    rows = math.ceil(len(panels) / 2)
    tallest = max(2.6, 0.6 + 0.22 * len(found.timings))
    with _drawing(path, (11.0, rows * tallest + 0.4), overwrite=overwrite) as figure:
        axes = figure.subplots(rows, 2, squeeze=False).ravel()
        for place, panel in zip(axes, panels, strict=False):
            panel(place, found)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        handles = [axes[0].plot([], [], "o-", color=_colour(number))[0] for number in range(len(models))]
        figure.legend(handles, models, loc="outside upper left", ncols=min(4, len(models)))
        machine = ", ".join(f"{name} {found.machine[name]}" for name in ("processor", "cpus", "onnxruntime"))
        figure.supxlabel(machine, fontsize=7, color="0.4")


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
    if not curves or not all(curves.values()):
        raise ValueError("every group needs points, and there must be a group")
    ordered = {name: sorted(points) for name, points in curves.items()}
    if len(ordered) > _PANELS:
        _sensitivity_map(ordered, path, error_name, overwrite=overwrite)
        return
    columns = min(_COLUMNS, math.ceil(math.sqrt(1.5 * len(ordered))))
    rows = math.ceil(len(ordered) / columns)
    with _drawing(path, (max(4.0, 2.0 * columns), 1.7 * rows + 0.6), overwrite=overwrite) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for place, (name, points) in zip(axes, ordered.items(), strict=False):
            place.plot(*zip(*points, strict=True), "o-", color=_colour(0), markersize=3)
            place.set_title(_shortened(name, 24), fontsize=7)
            place.set_xlim(left=0)
        for place in axes[len(ordered) :]:
            place.set_axis_off()
        figure.supxlabel("channels kept")
        figure.supylabel(error_name)


def _sensitivity_map(curves: Mapping[str, Curve], path: Path, error_name: str, *, overwrite: bool) -> None:
    """One row a group: groups differ in width, so that the share kept runs along the row."""
    shares = np.linspace(0, 1, _SHARES)
    rows = []
    for points in curves.values():
        widths, errors = (np.asarray(part, np.float64) for part in zip(*points, strict=True))
        rows.append(np.interp(shares, widths / widths.max(), errors, left=np.nan))
    with _drawing(path, (8.0, 0.16 * len(rows) + 1.2), overwrite=overwrite) as figure:
        place = figure.subplots()
        edges = np.linspace(-0.5 / (_SHARES - 1), 1 + 0.5 / (_SHARES - 1), _SHARES + 1)
        drawn = place.pcolormesh(edges, np.arange(len(rows) + 1), np.asarray(rows), cmap="viridis", rasterized=True)
        place.set_yticks(np.arange(len(rows)) + 0.5, [_shortened(name, 40) for name in curves], fontsize=6)
        place.invert_yaxis()
        place.grid(visible=False)
        place.set_xlabel("share of the group's channels kept")
        figure.colorbar(drawn, label=error_name)


# The panels of `bench`.


def _latency(place: Axes, found: Bench) -> None:
    """A dot at the median, and a line from the tenth to the ninety-ninth percentile."""
    models = list(dict.fromkeys(timing.model for timing in found.timings))
    settings = list(dict.fromkeys(timing.setting for timing in found.timings))
    for timing in found.timings:
        number = models.index(timing.model)
        height = settings.index(timing.setting) + 0.7 * ((number + 0.5) / len(models) - 0.5)
        place.plot([timing.p10, timing.p99], [height] * 2, color=_colour(number), alpha=0.5)
        place.plot(timing.p50, height, "o", color=_colour(number), markersize=4)
    without = ("provider",) if len({setting.provider for setting in settings}) == 1 else ()
    place.set_yticks(range(len(settings)), [_words(setting, without) for setting in settings])
    place.invert_yaxis()
    place.set_title("Latency: median, 10th to 99th percentile")
    place.set_xlabel("ms")
    _scale(place, [number for timing in found.timings for number in (timing.p10, timing.p99)])


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
            place.plot([], [], dashes, color="0.3", label=rest)
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
        colour = "0.75" if number == _OPERATORS else _colour(number, "Set2")
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


@contextlib.contextmanager
def _drawing(path: Path, size: tuple[float, float], *, overwrite: bool) -> Iterator[Figure]:
    """An empty figure of so many inches, which is written when it is left, whatever the user's own matplotlib says."""
    require(path)
    require_free(path, overwrite=overwrite)
    import matplotlib
    from matplotlib.figure import Figure

    suffix, content = path.suffix.lower(), io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(content, format=suffix[1:], metadata=_UNDATED[suffix])
    write_atomically(path, content.getvalue())


def _colour(number: int, palette: str = "tab10") -> Any:
    import matplotlib

    colours = matplotlib.color_sequences[palette]
    return colours[number % len(colours)]


def _scale(place: Axes, numbers: Sequence[float]) -> None:
    """Logarithmic where a linear axis would hide the small numbers, else from zero on."""
    if min(numbers) > 0 and max(numbers) / min(numbers) > _LOGARITHMIC:
        place.set_xscale("log")
        place.xaxis.set_major_formatter("{x:g}")
    else:
        place.set_xlim(left=0)


def _shortened(name: str, length: int) -> str:
    """The end of a name says more than its beginning."""
    return name if len(name) <= length else f"…{name[1 - length :]}"
