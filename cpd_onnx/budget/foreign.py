"""Cost tables from times that were measured on another device: a phone, an NPU, a microcontroller.

The device times single layers at several widths. Their times are fitted as those of kernels are in `budget.latency`, by
products of the sizes of a layer's axes with coefficients that are not negative.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from cpd_onnx.algebra.atoms import NOTHING, Axis, Fingerprint, fingerprint
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.latency import MULTIPLES, CostTable, GroupWidths, KernelCost, NamedAxis, fit_terms, variable_axes
from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.errors import DataError, TargetError
from cpd_onnx.io.csv_rows import Row, read_rows
from cpd_onnx.options import neighbours
from cpd_onnx.runtime.bench import Setting

WHOLE = "whole model"
"""What the column of layers says for a run of the whole model; the time beyond its layers is taken for constant."""
_LAYER, _OPERATOR, _MS = "layer", "operator", "ms"
_IN, _OUT = "input_channels", "output_channels"
_WIDTHS = (_IN, _OUT)
_RATIOS = {1: (1.0, 0.75, 0.5, 0.25), 2: (1.0, 0.5, 0.25)}
"""Ratios of the widths in a template, by the number of axes of the layer (heuristic)."""
_STEP = 8
"""Number that the widths in a template are multiples of, in groups of at least four times it (heuristic)."""
_NAMED = 5
"""Maximum number of layers that a message names."""


@dataclass(frozen=True)
class Layer:
    """A node whose time depends on widths.

    Attributes:
        name: Name of the node, or of its first output if it has none or shares it.
        operator: Operator type.
        names: Name of the axis (scope path, tensor, number) behind each column of widths.
        axes: The same axes.
        has_weights: Whether it computes with a matrix or kernel of weights, so that its time counts.
    """

    name: str
    operator: str
    names: Mapping[str, NamedAxis]
    axes: Mapping[str, Axis]
    has_weights: bool


def layers_of(combed: Combed) -> dict[str, Layer]:
    """Return the layers of a model whose time depends on widths, by name, in the order of execution."""
    known = {fingerprint(axis): (name, axis) for name, axis in variable_axes(combed)}
    nodes = [node for node in combed.folded.scope.nodes if node.output and any(node.output)]
    names = [node.name for node in nodes]
    found = {}
    for node in nodes:
        name = node.name if node.name and names.count(node.name) == 1 else next(filter(None, node.output))
        layer = _layer_of(combed, node, name, known)
        if layer.axes:
            found[name] = layer
    return found


def _layer_of(combed: Combed, node: NodeProto, name: str, known: Mapping[Fingerprint, tuple[NamedAxis, Axis]]) -> Layer:
    made, read = (_axes_of(combed, tensors, known) for tensors in (node.output, node.input))
    is_weighted = any(_is_matrix(combed, tensor) for tensor in node.input)
    others = [print_ for print_ in read if print_ not in made]
    used = {_OUT: made[:1], _IN: others[:1] if is_weighted or len(others) == 1 else []}
    chosen = {column: known[used[column][0]] for column in _WIDTHS if used[column]}
    return Layer(
        name,
        node.op_type,
        {column: axis_name for column, (axis_name, _) in chosen.items()},
        {column: axis for column, (_, axis) in chosen.items()},
        is_weighted and bool(chosen),
    )


def _axes_of(
    combed: Combed, tensors: Sequence[str], known: Mapping[Fingerprint, tuple[NamedAxis, Axis]]
) -> list[Fingerprint]:
    """Return the prunable axes of tensors of the main graph, each once."""
    found = [combed.tensors["", name].axes or [] for name in tensors if ("", name) in combed.tensors]
    axes = itertools.chain.from_iterable(found)
    return list(dict.fromkeys(print_ for axis in axes if (print_ := fingerprint(axis)) in known))


def _is_matrix(combed: Combed, name: str) -> bool:
    value = combed.folded.scope.values.get(name)
    return value is not None and value.weight is not None and len(value.shape or ()) >= 2


def template(combed: Combed) -> str:
    """Return the CSV with the layers and widths to time; the times are left empty.

    Raises TargetError if the model has no groups.
    """
    _require_groups(combed)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow((_LAYER, _OPERATOR, *_WIDTHS, _MS))
    for layer in layers_of(combed).values():
        if not layer.has_weights:
            continue
        ratios = _RATIOS[len(layer.axes)]
        choices = [_widths(combed, layer.axes[c], ratios) if c in layer.axes else [0] for c in _WIDTHS]
        for widths in itertools.product(*choices):
            table.writerow((layer.name, layer.operator, *(width or "" for width in widths), ""))
    table.writerow((WHOLE, "", "", "", ""))
    return text.getvalue()


def _widths(combed: Combed, axis: Axis, ratios: Sequence[float]) -> list[int]:
    """Return the sizes of an axis to time, the largest first: of whole channels of its group, if it has only one."""
    groups = _groups_of(combed, axis)
    if len(groups) != 1:
        return list(dict.fromkeys(max(1, round(ratio * len(axis))) for ratio in ratios))
    size = len(groups[0])
    step = _STEP if size >= 4 * _STEP else 1
    channels = [size if ratio == 1 else max(1, step * round(ratio * size / step)) for ratio in ratios]
    return list(dict.fromkeys(_size_at(combed, axis, {groups[0].id: width}) for width in channels))


def _groups_of(combed: Combed, axis: Axis) -> list[Group]:
    """Return the groups whose widths an axis depends on."""
    owner, _ = combed.owners
    parts = combed.atoms.parts(axis)
    return [combed.groups[group] for group in np.unique(owner[parts[parts != NOTHING]]).tolist() if group >= 0]


def _size_at(combed: Combed, axis: Axis, widths: Mapping[int, int]) -> int:
    """Return the size of an axis if groups, by id, have these widths, and the others their own."""
    gone = [combed.groups[group].channels[width:] for group, width in widths.items()]
    return KeepMask(combed.atoms, np.concatenate(gone)).count(axis)


def table_from(combed: Combed, path: Path, setting: Setting, source: str | None = None) -> CostTable:
    """Return the cost table of a model from times of its layers.

    The file is a CSV with the columns of `template`, or with the names of groups in place of input and output channels;
    times are milliseconds. Widths between those that were timed are interpolated; the widths chosen later are multiples
    of the largest power of two, up to 32, of which all timed widths of the group are.

    Args:
        combed: The model and its groups.
        path: The CSV file.
        setting: Conditions of the measurement, as far as they are known.
        source: What the times were measured on; by default the name of the file.

    Raises:
        DataError: The file is not such a table, names other layers, or lacks layers or widths.
        TargetError: The model has no groups.
    """
    _require_groups(combed)
    columns, rows = read_rows(path, (_LAYER, _MS))
    layers = layers_of(combed)
    _require_columns(path, columns, combed)
    timed: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        name = row.cells[_LAYER]
        if name != WHOLE and name not in layers:
            raise DataError(f"{row.where}: the model has no prunable layer {name!r}{neighbours(name, layers)}")
        timed[name].append(row)
    whole = [row.number(_MS) for row in timed.pop(WHOLE, [])]
    lacking = [name for name, layer in layers.items() if layer.has_weights and name not in timed]
    if lacking:
        raise DataError(f"{path} has no times of {_listed(lacking)}: each layer needs several widths, see --template")
    sizes = {name: _sizes(combed, layers[name], rows) for name, rows in timed.items()}
    kernels = tuple(_fitted(layers[name], sizes[name], rows) for name, rows in timed.items())
    total = sum(kernel.ms for kernel in kernels)
    ms = float(np.median(whole)) if whole else total
    return CostTable(
        combed.folded.original.sha256(),
        setting,
        max(ms, total),
        max(0.0, ms - total),
        0.0,
        tuple(_group_widths(combed, group, layers, sizes) for group in combed.groups),
        kernels,
        {"source": source or path.name, "rows": len(rows)},
    )


def _require_groups(combed: Combed) -> None:
    if not combed.groups:
        raise TargetError("the model has no prunable channels, so its latency cannot be reduced")


def _require_columns(path: Path, columns: Sequence[str], combed: Combed) -> None:
    """Raise DataError for columns that are neither those of a template nor groups."""
    groups = [group.name for group in combed.groups]
    known = (_LAYER, _OPERATOR, *_WIDTHS, _MS)
    for column in columns:
        if column not in known and column not in groups:
            raise DataError(
                f"{path} has a column {column!r}{neighbours(column, [*known, *groups])}: columns are "
                f"{', '.join(known)}, or names of groups as 'inspect' lists them"
            )


def _sizes(combed: Combed, layer: Layer, rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """Return the sizes of a layer's axes, a row for each time; raises DataError if they do not vary."""
    found = np.asarray([[_size(combed, layer, row, column) for column in layer.axes] for row in rows], np.int64)
    for column, sizes in zip(layer.axes, found.T, strict=True):
        if len(set(sizes.tolist())) < 2:
            raise DataError(
                f"{rows[0].where}: all times of {layer.name!r} are for {sizes[0]} {column.replace('_', ' ')}: "
                "give at least two numbers of them, or the fit cannot tell how the time depends on them"
            )
    return found


def _size(combed: Combed, layer: Layer, row: Row, column: str) -> int:
    """Return the size of one axis of a layer, from its column or from those of the groups that it consists of."""
    axis = layer.axes[column]
    if row.cells.get(column):
        size = row.count(column)
        if size > len(axis):
            raise DataError(f"{row.where}: {layer.name!r} has {len(axis)} {column.replace('_', ' ')}, not {size}")
        return size
    groups = _groups_of(combed, axis)
    widths = {group.id: row.count(group.name) for group in groups if row.cells.get(group.name)}
    for group in groups:
        if widths.get(group.id, 0) > len(group):
            raise DataError(f"{row.where}: group {group.name!r} has {len(group)} channels, not {widths[group.id]}")
    if not widths:
        names = ", ".join(repr(group.name) for group in groups)
        raise DataError(f"{row.where}: {layer.name!r} needs {column}, or the width of group {names}")
    return _size_at(combed, axis, widths)


def _fitted(layer: Layer, sizes: npt.NDArray[np.int64], rows: Sequence[Row]) -> KernelCost:
    terms, error = fit_terms(sizes, np.asarray([row.number(_MS) for row in rows]))
    names, full = list(layer.names.values()), [len(axis) for axis in layer.axes.values()]
    ms = sum(factor * math.prod(full[k] for k in chosen) for factor, chosen in terms)
    named = tuple((factor, tuple(names[k] for k in chosen)) for factor, chosen in terms)
    return KernelCost(layer.name, layer.operator, ms, error, named)


def _group_widths(
    combed: Combed, group: Group, layers: Mapping[str, Layer], sizes: Mapping[str, npt.NDArray[np.int64]]
) -> GroupWidths:
    """Return the multiple that all timed widths of a group are of, except its full size; 1 if none was timed."""
    widths = set(_timed_widths(combed, group, layers, sizes)) - {float(len(group))}
    possible = [
        multiple
        for multiple in MULTIPLES
        if widths and multiple < len(group) and all(width % multiple == 0 for width in widths)
    ]
    return GroupWidths(group.name, len(group), possible[-1] if possible else 1, {})


def _timed_widths(
    combed: Combed, group: Group, layers: Mapping[str, Layer], sizes: Mapping[str, npt.NDArray[np.int64]]
) -> Iterator[float]:
    """Yield the numbers of channels of a group that layers were timed at."""
    for name, table in sizes.items():
        for axis, column in zip(layers[name].axes.values(), table.T, strict=True):
            if len(group) > 1 and _groups_of(combed, axis) == [group]:
                unit = (len(axis) - _size_at(combed, axis, {group.id: 1})) / (len(group) - 1)
                yield from (len(group) - (len(axis) - size) / unit for size in column.tolist())


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    text = ", ".join(map(repr, names[:_NAMED]))
    return f"{text} and {more} more layers" if more > 0 else f"layer {text}" if len(names) == 1 else f"layers {text}"
