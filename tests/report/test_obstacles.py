"""What inspect says of why a model does not become smaller or faster, and where that is explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpd_onnx.channels.combing import comb
from cpd_onnx.report.inspection.obstacles import _OF_KIND, obstacles
from tests.support.models import from_text

PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
PLAIN = (
    "(float[1, 3, 64, 64] x, float[64, 3, 3, 3] w, float[64, 64, 3, 3] u, float[64, 64, 3, 3] t, float[8, 64, 1, 1] v) => (float[1, 8, 58, 58] y) "
    "{ a = Conv(x, w) b = Conv(a, u) c = Conv(b, t) y = Conv(c, v) }"
)


def sections(text: str) -> list[str]:
    return [each.section for each in obstacles(comb(from_text(text)))]


def chain(step: str, count: int) -> str:
    steps = " ".join(step.format(old=f"x{number}", new=f"x{number + 1}") for number in range(count))
    return f"{steps} y = Relu(x{count})"


def test_a_plain_network_has_no_obstacle() -> None:
    assert sections(PLAIN) == []


def test_an_interface_that_holds_weights_is_named_with_their_number() -> None:
    text = "(float[1, 4, 8, 8] x, float[100, 4, 1, 1] w, float[100, 100, 1, 1] u) => (float[1, 100, 8, 8] y) { a = Conv(x, w) y = Conv(a, u) }"
    (found,) = obstacles(comb(from_text(text)))
    assert found.section == "inputs-and-outputs"
    assert found.text == "inputs and outputs hold an axis of 10.4 k of the 10.4 k weights"


def test_many_small_kernels_are_named() -> None:
    body = chain("{new} = Conv<pads = [1, 1, 1, 1]>({old}, w)", 24)
    text = f"(float[1, 8, 8, 8] x0, float[8, 8, 3, 3] w) => (float[1, 8, 8, 8] y) {{ {body} }}"
    assert "fixed-time-per-kernel" in sections(text)


@pytest.mark.parametrize(("operator", "is_bound"), [("Softmax<axis = 1>", True), ("Relu", False)])
def test_operators_that_only_move_numbers_are_named_unless_they_are_fused(operator: str, is_bound: bool) -> None:
    step = f"c{{new}} = Conv<pads = [1, 1, 1, 1]>({{old}}, w) d{{new}} = {operator}(c{{new}}) {{new}} = {operator}(d{{new}})"
    body = chain(step, 24)
    text = f"(float[1, 32, 64, 64] x0, float[32, 32, 3, 3] w) => (float[1, 32, 64, 64] y) {{ {body} }}"
    assert ("memory-bound-layers" in sections(text)) == is_bound


def test_every_section_is_on_the_page() -> None:
    heads = re.findall(r"^#+ (.*)$", PAGE.read_text(), re.MULTILINE)
    anchors = {head.lower().replace(" ", "-").strip("?") for head in heads}
    named = {section for section, _ in _OF_KIND.values()} | {"fixed-time-per-kernel", "memory-bound-layers"}
    assert named <= anchors
