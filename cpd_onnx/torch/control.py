"""Control flow at run time: bodies are modules, called with the values that they capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

Body = Callable[..., Sequence[Tensor]]
Tensors = Sequence[Tensor]


def branch(condition: Tensor, then: Body, then_outer: Tensors, otherwise: Body, otherwise_outer: Tensors) -> Tensors:
    """Run one of two bodies; synchronizes with the device that computes the condition."""
    return then(*then_outer) if bool(condition) else otherwise(*otherwise_outer)


def loop(
    body: Body, outer: Tensors, trips: Tensor | None, condition: Tensor | None, state: Tensors, *, outputs: int
) -> list[Tensor]:
    """Run a body repeatedly; return the last state, and the other outputs of the body stacked over all iterations."""
    limit = None if trips is None else int(trips)
    going = torch.tensor(True) if condition is None else condition
    states, scans, count = list(state), [], 0
    while (limit is None or count < limit) and bool(going):
        going, *rest = body(torch.tensor(count), going, *states, *outer)
        states = rest[: len(states)]
        scans.append(rest[len(states) :])
        count += 1
    stacked = [torch.stack(parts) for parts in zip(*scans, strict=True)]
    return [*states, *(stacked or [torch.empty(0)] * (outputs - len(states)))]


class ScanAttributes(TypedDict, total=False):
    """Attributes of Scan."""

    num_scan_inputs: int
    scan_input_axes: Sequence[int]
    scan_input_directions: Sequence[int]
    scan_output_axes: Sequence[int]
    scan_output_directions: Sequence[int]
    directions: Sequence[int]


def scan(body: Body, outer: Tensors, inputs: Tensors, *, opset: int, **options: Unpack[ScanAttributes]) -> list[Tensor]:
    """Run a body over slices of sequences; return the last state and the stacked output slices."""
    if opset >= 9:
        return _scan(body, outer, inputs, options)
    samples = zip(*inputs, strict=True)  # before opset 9 the first axis of everything is the batch
    newer: ScanAttributes = {**options, "scan_input_directions": options.get("directions", ())}
    results = [_scan(body, outer, sample, newer) for sample in samples]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def _scan(body: Body, outer: Tensors, inputs: Tensors, options: ScanAttributes) -> list[Tensor]:
    count = options["num_scan_inputs"]
    states, sequences = list(inputs[:-count]), inputs[-count:]
    axes = options.get("scan_input_axes") or [0] * count
    turns = options.get("scan_input_directions") or [0] * count
    moved = [_turned(x.movedim(axis, 0), turn) for x, axis, turn in zip(sequences, axes, turns, strict=True)]
    scans = []
    for slices in zip(*moved, strict=True):
        results = list(body(*states, *slices, *outer))
        states = results[: len(states)]
        scans.append(results[len(states) :])
    stacked = [torch.stack(parts) for parts in zip(*scans, strict=True)]
    axes = options.get("scan_output_axes") or [0] * len(stacked)
    turns = options.get("scan_output_directions") or [0] * len(stacked)
    done = [_turned(x, turn).movedim(0, axis) for x, axis, turn in zip(stacked, axes, turns, strict=True)]
    return [*states, *done]


def _turned(x: Tensor, backwards: int) -> Tensor:
    return x.flip(0) if backwards else x
