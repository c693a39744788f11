"""Output of `compress`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpd_onnx.cli.console import print_result
from cpd_onnx.workflow.compress_files import places_of
from cpd_onnx.workflow.deploy import merged_files
from cpd_onnx.workflow.quality.precise import FLOAT
from cpd_onnx.workflow.requests import Compress


def show(request: Compress, content: Mapping[str, Any]) -> None:
    """Print the costs, latency, accuracy and proof of the compressed model."""
    measured = []
    if content["accuracy"] is not None:
        accuracy = content["accuracy"]
        values = ", ".join(f"{name} {value:.4f}" for name, value in accuracy["values"].items())
        measured.append(f"{accuracy['metric']} against {accuracy['on']}: {values}")
    is_converted = content["precision"]["what"] != FLOAT
    more = [content["cost_table"]] if "cost_table" in content else []
    places = places_of(request, is_converted=is_converted).all()
    print_result(content, *measured, written=[*places, *merged_files(request, content), *more])
