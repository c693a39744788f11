"""Memory for activations, against cases that are computed by hand, and the planner against trying all orders."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from onnx import ModelProto

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.deployed import STACK
from cpd_onnx.budget.memory import Buffer, MemoryModel, arena, peak, planned
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel
from tests.support.models import from_text

FLOAT = 4


def of(text: str, stored_as: str = "") -> float:
    combed = comb(from_text(text))
    return MemoryModel(combed, stored_as).arena(KeepMask(combed.atoms))


def chain() -> ModelProto:
    return from_text(
        "(float[1, 8] x, float[8, 32] w, float[32, 16] u, float[16, 4] v) => (float[1, 4] y) "
        "{ a = MatMul(x, w) b = Relu(a) c = MatMul(b, u) y = MatMul(c, v) }"
    )


def test_a_chain_by_hand() -> None:
    """The input and a, then b in the place of a beside c, then c and y: the second is the largest."""
    combed = comb(chain())
    memory = MemoryModel(combed)
    assert memory.arena(KeepMask(combed.atoms)) == FLOAT * (32 + 16)
    assert MemoryModel(combed, "int8").arena(KeepMask(combed.atoms)) == 32 + 16
    assert MemoryModel(combed, "float16").arena(KeepMask(combed.atoms)) == 2 * (32 + 16)


def test_a_chain_that_is_pruned() -> None:
    combed = comb(chain())
    hidden = next(group for group in combed.groups if len(group) == 32)
    kept = KeepMask(combed.atoms, hidden.channels[:30])
    assert MemoryModel(combed).arena(kept) == FLOAT * (16 + 4)


def test_a_residual_lives_until_it_is_added() -> None:
    text = (
        "(float[1, 8] x, float[8, 8] w, float[8, 8] u) => (float[1, 8] y) "
        "{ a = MatMul(x, w) b = MatMul(a, u) c = Relu(b) y = Add(a, c) }"
    )
    assert of(text) == FLOAT * 3 * 8


def test_sums_and_products_with_constants_overwrite_what_is_computed() -> None:
    start = "(float[1, 4] x, float[4, 16] w, float[16, 2] u) => (float[1, 2] y) { a = MatMul(x, w) "
    factor = "s = Constant<value = float[1] {2.0}>() "
    assert of(f"{start}{factor}b = Mul(s, a) c = Add(b, s) y = MatMul(c, u) }}") == FLOAT * (4 + 16)
    assert of(f"{start}{factor}b = Mul(a, a) y = MatMul(b, u) }}") == FLOAT * (4 + 16)
    assert of(f"{start}b = Neg(a) y = MatMul(b, u) }}") == FLOAT * 2 * 16
    assert of(f"{start}b = Neg(a) c = Add(a, b) y = MatMul(c, u) }}") == FLOAT * 3 * 16
    assert of(f"{start}{factor}b = Mul(s, a) c = Add(b, a) y = MatMul(c, u) }}") == FLOAT * 3 * 16


def test_a_program_needs_a_stack_besides_its_arena() -> None:
    combed = comb(from_text("(float[4] x, float[4,4] w) => (float[4] y) { y = MatMul(x, w) }"))
    memory, whole = MemoryModel(combed), KeepMask(combed.atoms)
    assert memory.ram(whole) == memory.arena(whole) + STACK == FLOAT * 8 + STACK
    assert CostModel(combed, {"ram": memory.program}).cost("ram", whole) == memory.ram(whole)


def test_what_stays_float_in_int8_counts_as_floats() -> None:
    text = "(float[16] x, float[16,8] w) => (float[8] y) { h = MatMul(x, w) y = Softmax(h) }"
    assert of(text, "int8") == 8 + FLOAT * 8
    assert of(text) == FLOAT * (16 + 8)


def test_a_view_is_no_copy() -> None:
    text = (
        "(float[1, 2, 4] x, int64[2] s, float[8, 2] w) => (float[1, 2] y) "
        "{ a = Sigmoid(x) b = Reshape(a, s) c = Neg(a) d = ReduceSum(c) e = MatMul(b, w) y = Add(e, d) }"
    )
    assert of(text) == FLOAT * (8 + 8 + 1)  # a, which b shares and keeps alive, c and d


def test_a_tensor_that_is_read_again_is_not_overwritten() -> None:
    text = "(float[1, 8] x, float[8, 8] w) => (float[1, 8] y) { a = MatMul(x, w) b = Relu(a) y = Add(a, b) }"
    assert of(text) == FLOAT * 3 * 8


def test_an_open_batch_is_one_sample() -> None:
    text = "(float[N, 8] x, float[8, 32] w, float[32, 8] u) => (float[N, 8] y) { a = MatMul(x, w) y = MatMul(a, u) }"
    assert of(text) == FLOAT * (8 + 32)


def test_the_planner_reuses_the_smallest_gap() -> None:
    buffers = [Buffer(0, 9, 10.0), Buffer(0, 3, 6.0), Buffer(0, 3, 2.0), Buffer(4, 9, 2.0), Buffer(4, 9, 6.0)]
    assert arena(buffers) == peak(buffers) == 18


def overlaps(buffers: list[Buffer], address: list[float]) -> bool:
    placed = list(zip(buffers, address, strict=True))
    return any(
        a.first <= b.last and b.first <= a.last and x < y + b.size and y < x + a.size
        for (a, x), (b, y) in itertools.combinations(placed, 2)
    )


def best(buffers: list[Buffer]) -> float:
    """Return the smallest arena of all orders in which buffers are placed as low as possible."""
    least = float("inf")
    for order in itertools.permutations(buffers):
        placed: list[tuple[Buffer, float]] = []
        for buffer in order:
            beside = sorted((y, y + b.size) for b, y in placed if b.first <= buffer.last and buffer.first <= b.last)
            start = 0.0
            for low, high in beside:
                if start + buffer.size <= low:
                    break
                start = max(start, high)
            placed.append((buffer, start))
        least = min(least, max(y + b.size for b, y in placed))
    return least


@pytest.mark.parametrize("seed", range(20))
def test_the_planner_is_near_the_best_of_all_orders(seed: int) -> None:
    rng = random.Random(seed)
    buffers = [
        Buffer(first, first + rng.randint(0, 3), float(rng.randint(1, 9)))
        for first in (rng.randint(0, 5) for _ in range(6))
    ]
    assert not overlaps(buffers, planned(buffers))
    assert peak(buffers) <= best(buffers) <= arena(buffers) <= 1.25 * best(buffers)


def test_the_cost_in_widths_is_the_lower_bound_of_the_planner() -> None:
    combed = comb(chain())
    memory = MemoryModel(combed)
    costs = CostModel(combed, {"ram": memory.peak})
    for removed in (0, 5, 20):
        hidden = next(group for group in combed.groups if len(group) == 32)
        kept = KeepMask(combed.atoms, hidden.channels[:removed])
        assert costs.cost("ram", kept) == peak(memory.buffers(kept))
        widths = [[len(g) - (removed if g is hidden else 0) for g in combed.groups]]
        assert costs.in_widths("ram")(np.asarray(widths))[0] == costs.cost("ram", kept)
