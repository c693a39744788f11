"""Models with operators that neither this program nor onnxruntime knows."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.main import main
from cpd_onnx.runtime import sessions
from tests.support.models import from_text

TEXT = (
    "(float[2, 3, 8, 8] x, float[12, 3, 3, 3] a, float[10, 12, 3, 3] b, float[6, 10, 1, 1] c, float[4, 6, 1, 1] d) "
    "=> (float[] y) { p = Conv(x, a) r = Relu(p) n, f = local.NegPos(r) q = Conv(f, b) s = Relu(q) t = Conv(q, c) "
    "y = Conv(t, d) }"
)


def declared(shape: tuple[int | str, ...], domain: str = "local") -> onnx.ModelProto:
    model = from_text(TEXT)
    for entry in (*model.graph.node, *model.opset_import):
        entry.domain = domain if entry.domain == "local" else entry.domain
    model.graph.value_info.append(helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, shape))
    return model


def test_the_declared_shape_of_a_custom_operator_leads_on() -> None:
    groups = comb(cpd.load(declared((2, 12, 6, 6)))).groups
    assert sorted(len(group) for group in groups) == [6, 10]


@pytest.mark.parametrize("shape", [("n", 12, 6, 6), (2, 11, 6, 6)])
def test_a_shape_that_is_open_or_does_not_fit_leads_nowhere_wrong(shape: tuple[int | str, ...]) -> None:
    combed = comb(cpd.load(declared(shape)))
    frozen = {entry.tensor for entry in combed.frozen()}
    assert {"a", "b"} <= frozen
    assert not any(member.weight.name == "a" for group in combed.groups for member in combed.members(group))


def test_the_error_names_both_ways_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(declared((2, 12, 6, 6)), tmp_path / "m.onnx")
    asked = ["prune", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "s.onnx"), "--target", "macs=0.6", "--blind"]
    assert main(asked) == 1
    error = capsys.readouterr().err
    assert "--custom-ops" in error
    assert "--no-verify" in error
    assert main([*asked, "--custom-ops", str(tmp_path / "none.so")]) == 1
    assert "none.so" in capsys.readouterr().err
    assert not (tmp_path / "s.onnx").exists()
    assert main([*asked, "--no-verify", "--keep-anyway"]) in (0, 3)
    assert (tmp_path / "s.onnx").exists()


@pytest.mark.parametrize("command", ["bench", "latency"])
def test_commands_that_only_measure_load_the_library_too(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(declared((2, 12, 6, 6)), tmp_path / "m.onnx")
    output = ["-o", str(tmp_path / "table.json")] if command == "latency" else []
    assert main([command, str(tmp_path / "m.onnx"), *output, "--custom-ops", str(tmp_path / "none.so")]) == 1
    assert "none.so" in capsys.readouterr().err


def test_libraries_are_given_to_the_sessions_of_a_block_alone() -> None:
    with sessions.custom_operators([Path("a.so")]), sessions.custom_operators([Path("b.so"), Path("a.so")]):
        assert sessions._libraries == [Path("a.so"), Path("b.so")]
    assert sessions._libraries == []


def test_a_model_is_proved_with_the_library_of_its_operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extensions = pytest.importorskip("onnxruntime_extensions")
    onnx.save(declared((2, 12, 6, 6), "ai.onnx.contrib"), tmp_path / "m.onnx")
    asked = ["prune", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "s.onnx"), "--target", "macs=0.6", "--blind"]
    assert main([*asked, "--keep-anyway", "--custom-ops", extensions.get_library_path()]) in (0, 3)
    assert "proved" in capsys.readouterr().out
