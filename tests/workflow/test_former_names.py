"""Files and options of the version before: plans, manifests and recipes in the former terms, and renamed options."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.budget.allocation import Budget
from cpd_onnx.budget.widths import Limits
from cpd_onnx.cli.main import main
from cpd_onnx.moved import GONE_IN
from cpd_onnx.options import former_names
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.sensitivity import SensitivityOptions
from cpd_onnx.pipeline.pipeline import make
from cpd_onnx.rewrite.plan import schema
from tests.support.runs import plain

FORMER = {"spread": "policy", "multiple": "round_to", "min_share": "min_ratio", "max_share": "max_ratio"}
PLAN = """{
 "format": "cpd-onnx/plan",
 "version": 1,
 "made_by": "cpd-onnx 0.1.0",
 "source": {"file": "tiny.onnx", "sha256": "5e66846951b5f5e1008d90a63f5f6b0290362de392a88df05d5dc1d70abb0291"},
 "groups": [
  {"id": 0, "name": "w", "kind": "channels", "size": 4, "members": [{"initializer": "w", "axis": 1, "indices": [[0], [1], [2], [3]]}, \
{"initializer": "v", "axis": 0, "indices": [[0], [1], [2], [3]]}], "removed": [0, 2]}
 ],
 "frozen": [
  {"tensor": "w", "axis": 0, "indices": 3, "of": 3, "reason": "graph input 'x'"},
  {"tensor": "v", "axis": 1, "indices": 2, "of": 2, "reason": "graph output 'y'"}
 ],
 "removed": {
  "w": {"1": [0, 2]},
  "v": {"0": [0, 2]}
 },
 "budget": {"kind": "channels", "target": 0.5, "spread": "global", "multiple": 2, "keep": [], "shares": [0.0, 0.75], "score": "l2", "seed": 0},
 "before": {"macs": 20.0, "params": 20.0, "channels": 8.0, "bytes": 235.0},
 "after": {"macs": 10.0, "params": 10.0, "channels": 4.0, "bytes": 195.0}
}
"""  # as version 0.1.0 wrote it, byte for byte
SMALL = "d02b8c804ee8c8420d51f21b49231aabb9501d2d69945c3d0e92fdff54039baf"
"""SHA-256 of the model that version 0.1.0 wrote with that plan."""
MANIFEST: dict[str, Any] = {
    "format": "cpd-onnx/manifest",
    "version": 1,
    "run": "compress",
    "recipe": 'made_by = "cpd-onnx 0.1.0"\ntarget = "macs=0.5"\nspread = "global"\nmin-share = 0.0\nmax-share = 1.0\n',
    "inputs": [
        {
            "role": "model",
            "file": "tiny.onnx",
            "bytes": 235,
            "sha256": "5e66846951b5f5e1008d90a63f5f6b0290362de392a88df05d5dc1d70abb0291",
        }
    ],
    "outputs": [
        {
            "role": "model",
            "file": "c.onnx",
            "bytes": 410,
            "sha256": "5d1686a91ad02e21e44250d1222e5466491dedd4b4a6ca6ae7cc15eccf8b9084",
            "repeats": True,
        },
        {
            "role": "plan",
            "file": "c.onnx.plan.json",
            "bytes": 948,
            "sha256": "5635e1444ae9c6930e69d135ffdf159cb87761eedfd468c8fead2db243ef686e",
            "repeats": True,
        },
    ],
    "versions": {"cpd-onnx": "0.1.0"},
}
"""What `reproduce` reads of the manifest that version 0.1.0 wrote."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the original, by the version that wrote the files above."""
    weights = {
        "w": np.array([[1, 2, 0, 3], [4, 1, 0, 2], [1, 5, 0, 1]], np.float32),
        "v": np.array([[2, 1], [1, 3], [0, 1], [4, 2]], np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
            helper.make_node("Relu", ["h"], ["r"], "act"),
            helper.make_node("MatMul", ["r", "v"], ["y"], "last"),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "tiny.onnx")
    (tmp_path / "small.onnx.plan.json").write_text(PLAN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cpd_onnx.rewrite.plan.__version__", "0.1.0")
    return tmp_path


def test_plan_of_version_1_is_converted(folder: Path) -> None:
    plan = cpd.load_plan("small.onnx.plan.json")
    assert plan.dumps(1) == PLAN
    assert plan.content["budget"] == {
        "kind": "channels", "target": 0.5, "policy": "global", "round_to": 2, "keep": [], "ratios": [0.0, 0.75],
        "score": "l2", "seed": 0,
    }  # fmt: skip  # a table
    jsonschema.validate(dict(plan.content), schema())
    plan.save(folder / "new.json")
    assert cpd.load_plan("new.json").dumps() == plan.dumps() != PLAN
    (folder / "other.json").write_text(PLAN.replace('"version": 1', '"version": 4'))
    assert main(plain(["apply", "tiny.onnx", "other.json", "-o", "o.onnx"])) == 1


def test_model_of_version_1_has_the_same_bytes_and_is_verified(folder: Path) -> None:
    assert main(plain(["apply", "tiny.onnx", "small.onnx.plan.json", "-o", "small.onnx"])) == 0
    assert hashlib.sha256((folder / "small.onnx").read_bytes()).hexdigest() == SMALL
    assert main(plain(["verify", "tiny.onnx", "small.onnx"])) == 0
    cpd.load_plan("small.onnx.plan.json").save(folder / "new.json")
    assert main(plain(["verify", "tiny.onnx", "small.onnx", "--plan", "new.json"])) == 0
    (folder / "small.onnx.plan.json").write_text(PLAN.replace('"spread": "global"', '"spread": "uniform"'))
    assert main(plain(["verify", "tiny.onnx", "small.onnx"])) == 5  # the stamp is that of another plan


def test_manifest_of_version_1_is_reproduced(folder: Path) -> None:
    (folder / "c.onnx.manifest.json").write_text(json.dumps(MANIFEST))
    assert main(plain(["reproduce", "c.onnx.manifest.json", "-o", "again"])) == 0
    assert json.loads(Path("again/c.onnx.plan.json").read_text())["version"] == 3
    another = json.dumps(MANIFEST).replace("5635e1444a", "0635e1444a")
    (folder / "c.onnx.manifest.json").write_text(another)
    assert main(plain(["reproduce", "c.onnx.manifest.json", "-o", "again", "--force"])) == 1


def test_former_options_work_and_warn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = ("--policy", "global", "--round-to", "2", "--max-ratio", "0.75", "--min-ratio", "0.0")
    old = ("--spread", "global", "--multiple", "2", "--max-share", "0.75", "--min-share", "0.0")
    common = ("--target", "channels=0.5", "--force")
    assert main(plain(["prune", "tiny.onnx", "-o", "small.onnx", *common, *new])) == 0
    assert "warning" not in capsys.readouterr().err
    plan = Path("small.onnx.plan.json").read_text()
    assert main(plain(["prune", "tiny.onnx", "-o", "small.onnx", *common, *old])) == 0
    warned = capsys.readouterr().err
    for before, now in zip(old[::2], new[::2], strict=True):
        assert f"warning: {before} is now {now};" in warned
    assert Path("small.onnx.plan.json").read_text() == plan
    assert main(plain(["prune", "tiny.onnx", "-o", "small.onnx", *common, *old, "--log-level", "quiet"])) == 0
    assert not capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(plain(["prune", "--help"]))
    assert "--spread" not in capsys.readouterr().out


def test_former_recipe_keys_are_read(folder: Path) -> None:
    (folder / "r.toml").write_text('spread = "global"\nmultiple = 2\nmax-share = 0.75\n')
    asked = ("compress", "tiny.onnx", "-o", "c.onnx", "--recipe", "r.toml", "--no-report")
    assert main(plain([*asked])) == 0
    recipe = Path("c.onnx.recipe.toml").read_text()
    assert 'policy = "global"\n' in recipe
    assert "round-to = 2\n" in recipe
    assert "spread" not in recipe


def test_former_fields_are_accepted_with_a_warning() -> None:
    assert former_names(Allocate) == FORMER
    assert former_names(SensitivityOptions) == {"shares": "ratios"}
    with pytest.warns(DeprecationWarning, match=f"'spread' is now called 'policy'.*{GONE_IN}") as caught:
        assert Allocate(macs=0.5, spread="global") == Allocate(macs=0.5, policy="global")  # type: ignore[call-arg]
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="'min_share' is now called 'min_ratio'"):
        assert make("allocate", {"min_share": 0.5}) == Allocate(min_ratio=0.5)
    with pytest.warns(DeprecationWarning, match="'shares' is now called 'ratios'"):
        limits = Limits(shares=(0.5, 1.0))  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="'multiple' is now called 'round_to'") as caught:
        assert limits.multiple == 1  # type: ignore[attr-defined]
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="'spread'"):
        assert Budget(spread="optimal").policy == "optimal"  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'spread' is the former name of 'policy'"):
        Allocate(policy="global", spread="global")  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        limits.nonsense  # type: ignore[attr-defined]  # noqa: B018  # that is the point


def test_former_arguments_of_compress_are_accepted(folder: Path) -> None:
    with pytest.warns(DeprecationWarning, match="'multiple' is now called 'round_to'"):
        made = cpd.compressed("tiny.onnx", macs=0.5, blind=True, repair=False, **{"multiple": 2})
    assert made.state.need("plan", "prune").content["budget"]["round_to"] == 2
