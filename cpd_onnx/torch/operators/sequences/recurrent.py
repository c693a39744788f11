"""Recurrent layers, step by step, with ONNX's gate orders and activations.

Shapes: x [T, N, input], W [directions, gates * hidden, input], R [directions, gates * hidden, hidden],
B [directions, 2 * gates * hidden], states [directions, N, hidden]; with `layout` 1 the batch comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.torch.registry import operator

State = tuple[Tensor, ...]
Activation = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, State], State]


class Recurrent(TypedDict, total=False):
    """Attributes of LSTM, GRU and RNN."""

    activation_alpha: Sequence[float]
    activation_beta: Sequence[float]
    activations: Sequence[str]
    clip: float
    direction: str
    hidden_size: int
    input_forget: int
    layout: int
    linear_before_reset: int


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "affine": lambda x, alpha=1.0, beta=0.0: alpha * x + beta,
    "leakyrelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "thresholdedrelu": lambda x, alpha=1.0: torch.where(x > alpha, x, 0),
    "scaledtanh": lambda x, alpha=1.0, beta=1.0: alpha * torch.tanh(beta * x),
    "hardsigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "elu": lambda x, alpha=1.0: F.elu(x, alpha),
}
_PARAMETERS = {"affine": 2, "scaledtanh": 2, "hardsigmoid": 2, "leakyrelu": 1, "thresholdedrelu": 1, "elu": 1}


def _activations(options: Recurrent, defaults: Sequence[str]) -> Iterator[Activation]:
    """Return the activations of all directions; alphas and betas are assigned in order to those that have them."""
    alphas = iter(options.get("activation_alpha") or ())
    betas = iter(options.get("activation_beta") or ())
    clip = options.get("clip")
    for name in options.get("activations") or list(defaults) * 2:
        key = name.lower()
        count = _PARAMETERS.get(key, 0)
        keywords = dict(zip(("alpha", "beta")[:count], (next(alphas, None), next(betas, None)), strict=False))
        yield _activation(_ACTIVATIONS[key], {k: value for k, value in keywords.items() if value is not None}, clip)


def _activation(function: Callable[..., Tensor], keywords: dict[str, float], clip: float | None) -> Activation:
    if clip:
        return lambda x: function(x.clamp(-clip, clip), **keywords)
    return lambda x: function(x, **keywords)


def _as_it_is(x: Tensor) -> Tensor:
    return x


@operator("LSTM", weights=(1, 2, 3, 7))
def long_short_term_memory(
    x: Tensor, w: Tensor, r: Tensor, *more: Tensor | None, outputs: int, **options: Unpack[Recurrent]
) -> list[Tensor]:
    """Long short-term memory; gates in the order input, output, forget, cell."""
    return lstm((x, w, r, *more), outputs, options)


def lstm(
    inputs: Sequence[Tensor | None], outputs: int, options: Recurrent, seen: Callable[[Tensor], Tensor] = _as_it_is
) -> list[Tensor]:
    """LSTM whose matrix products take inputs and states transformed by `seen`."""
    x, w, r, *more = inputs
    assert x is not None
    assert w is not None
    assert r is not None
    bias, lengths, hidden, cell, peephole = (*more, *[None] * 5)[:5]
    activations = list(_activations(options, ("Sigmoid", "Tanh", "Tanh")))
    p = torch.zeros(w.shape[0], 3 * r.shape[2], dtype=x.dtype, device=x.device) if peephole is None else peephole

    def make(direction: int) -> Step:
        gate, squash, show = activations[3 * direction : 3 * direction + 3]
        p_i, p_o, p_f = p[direction].chunk(3)

        def step(pre: Tensor, state: State) -> State:
            h, c = state
            i, o, f, g = (pre + seen(h) @ r[direction].T).chunk(4, -1)
            i = gate(i + p_i * c)
            f = 1 - i if options.get("input_forget") else gate(f + p_f * c)
            c = f * c + i * squash(g)
            return gate(o + p_o * c) * show(c), c

        return step

    return _run(seen(x), (w, bias), (lengths, (hidden, cell)), make, options)[:outputs]


@operator("GRU", weights=(1, 2, 3))
def gru(
    x: Tensor, w: Tensor, r: Tensor, *more: Tensor | None, outputs: int, **options: Unpack[Recurrent]
) -> list[Tensor]:
    """Gated recurrent unit; gates in the order update, reset, hidden."""
    bias, lengths, hidden = (*more, *[None] * 3)[:3]
    activations = list(_activations(options, ("Sigmoid", "Tanh")))
    size = r.shape[2]
    late = _part(bias, 5 * size, 6 * size)

    def make(direction: int) -> Step:
        gate, squash = activations[2 * direction : 2 * direction + 2]
        r_gates, r_hidden = r[direction, : 2 * size].T, r[direction, 2 * size :].T
        b_hidden = 0 if late is None else late[direction]

        def step(pre: Tensor, state: State) -> State:
            (h,) = state
            update, reset = gate(pre[:, : 2 * size] + h @ r_gates).chunk(2, -1)
            if options.get("linear_before_reset"):
                new = squash(pre[:, 2 * size :] + reset * (h @ r_hidden + b_hidden))
            else:
                new = squash(pre[:, 2 * size :] + (reset * h) @ r_hidden + b_hidden)
            return ((1 - update) * new + update * h,)

        return step

    early = None if bias is None else torch.cat([bias[:, : 5 * size], torch.zeros_like(bias[:, :size])], 1)
    return _run(x, (w, early), (lengths, (hidden,)), make, options)[:outputs]


@operator("RNN", weights=(1, 2, 3))
def rnn(
    x: Tensor, w: Tensor, r: Tensor, *more: Tensor | None, outputs: int, **options: Unpack[Recurrent]
) -> list[Tensor]:
    """Plain recurrent layer."""
    bias, lengths, hidden = (*more, *[None] * 3)[:3]
    activations = list(_activations(options, ("Tanh",)))

    def make(direction: int) -> Step:
        def step(pre: Tensor, state: State) -> State:
            return (activations[direction](pre + state[0] @ r[direction].T),)

        return step

    return _run(x, (w, bias), (lengths, (hidden,)), make, options)[:outputs]


def _part(bias: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if bias is None else bias[:, start:end]


def _run(
    x: Tensor,
    projection: tuple[Tensor, Tensor | None],
    given: tuple[Tensor | None, Sequence[Tensor | None]],
    make: Callable[[int], Step],
    options: Recurrent,
) -> list[Tensor]:
    """Return all outputs Y [T, directions, N, hidden] and last states [directions, N, hidden], in the given layout."""
    (w, bias), (lengths, initial) = projection, given
    first = bool(options.get("layout"))
    if first:
        x, initial = x.transpose(0, 1), [None if state is None else state.transpose(0, 1) for state in initial]
    hidden = options["hidden_size"]
    zeros = x.new_zeros(w.shape[0], x.shape[1], hidden)
    states = [zeros if state is None else state for state in initial]
    b = None if bias is None else bias[:, : w.shape[1]] + bias[:, w.shape[1] :]
    sequences, lasts = [], []
    for direction in range(w.shape[0]):
        backwards = direction == 1 or options.get("direction") == "reverse"
        pre = F.linear(_turned(x, lengths, backwards), w[direction], None if b is None else b[direction])
        y, last = _unroll(pre, tuple(state[direction] for state in states), make(direction), lengths)
        sequences.append(_turned(y, lengths, backwards))
        lasts.append(last)
    results = [torch.stack(sequences, 1), *(torch.stack(parts) for parts in zip(*lasts, strict=True))]
    if first:
        return [results[0].permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in results[1:])]
    return results


def _unroll(pre: Tensor, state: State, step: Step, lengths: Tensor | None) -> tuple[Tensor, State]:
    """Iterate over time; a sequence that has ended keeps its state and outputs zeros."""
    results: list[Any] = []
    for time in range(pre.shape[0]):
        new = step(pre[time], state)
        if lengths is None:
            state = new
            results.append(new[0])
            continue
        alive = (time < lengths).unsqueeze(-1)
        state = tuple(torch.where(alive, fresh, old) for fresh, old in zip(new, state, strict=True))
        results.append(torch.where(alive, new[0], 0))
    return torch.stack(results), state


def _turned(x: Tensor, lengths: Tensor | None, backwards: bool) -> Tensor:
    """Return x [T, N, ...] with time reversed, each sequence within its length."""
    if not backwards:
        return x
    if lengths is None:
        return x.flip(0)
    times = torch.arange(x.shape[0], device=x.device)[:, None]
    order = torch.where(times < lengths, lengths - 1 - times, times).long()
    return x.gather(0, order.unsqueeze(-1).expand_as(x))
