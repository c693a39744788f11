"""A model and its cost table on a machine that is made up; both are never changed."""

from __future__ import annotations

import pytest

from cpd_onnx.budget.latency import CostTable, measure_table
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.runtime.bench import Setting
from tests.support.machine import MadeUp, stack


@pytest.fixture(scope="package")
def combed() -> Combed:
    return comb(stack())


@pytest.fixture(scope="package")
def table(combed: Combed) -> CostTable:
    return measure_table(MadeUp(combed, Setting()))
