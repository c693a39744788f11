"""Defects that are planted in pruned models: none is called verified, whatever the outputs are."""

from __future__ import annotations

import pytest

from cpd_onnx.proof.comparison import INCONCLUSIVE, VERIFIED
from tests.support.planted import DEFECTS, NETWORKS, SILENT, verdict_of

FEW = ("inputs of a kernel in another order", "one filter a tenth larger", "other channels of the second group")
"""All of them with all networks: benchmarks/robustness/planted.py."""


@pytest.mark.parametrize("name", NETWORKS)
def test_the_right_model_is_verified_and_wrong_ones_are_not(name: str) -> None:
    assert verdict_of(name) == (INCONCLUSIVE if name in SILENT else VERIFIED)
    for defect in FEW:
        assert verdict_of(name, defect) != VERIFIED, defect


@pytest.mark.parametrize("defect", [defect for defect in DEFECTS if defect not in FEW])
def test_each_defect_is_seen(defect: str) -> None:
    assert verdict_of("plain", defect) != VERIFIED
    assert verdict_of("int8, QDQ", defect) != VERIFIED
