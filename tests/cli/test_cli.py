"""The command line: what it writes, what it says, and what it does with bad input."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import cpd_onnx as cpd
from cpd_onnx.cli import demo
from cpd_onnx.cli.main import main
from cpd_onnx.errors import ISSUES
from cpd_onnx.proof.comparison import WRONG, Comparison
from cpd_onnx.report import tables as report
from cpd_onnx.rewrite.plan import schema
from tests.rules.test_rules import model_of
from tests.support.models import from_text
from tests.support.runs import plain

EXAMPLE = Path(__file__).parents[2] / "models" / "digits.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(model_of("conv"), tmp_path / "model.onnx")
    return tmp_path


def run(*arguments: object) -> int:
    return main(plain([str(a) for a in arguments]))


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_prune_verify_apply(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, small, again = (folder / f"{n}.onnx" for n in ("model", "small", "again"))
    assert run("prune", model, "-o", small, "--target", "macs=0.5") == 0
    assert "verified" in capsys.readouterr().out
    plan = folder / "small.onnx.plan.json"
    jsonschema.validate(json.loads(plan.read_text()), schema())
    assert run("verify", model, small) == 0
    assert "byte for byte" in capsys.readouterr().out
    assert run("apply", model, plan, "-o", again) == 0
    assert again.read_bytes() == small.read_bytes()


def test_inspect_lists_groups_and_reasons(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder / "model.onnx") == 0
    said = capsys.readouterr().out
    assert "channels" in said
    assert "graph input 'x'" in said
    assert "100.0 %" in said


def test_inspect_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder / "model.onnx", "--json", "-") == 0
    content = json.loads(capsys.readouterr().out)
    assert [g["size"] for g in content["groups"]] == [8]
    assert content["costs"]["params"] == 8 * 27 + 8 + 5 * 72


def test_json_shares_the_plans_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder / "model.onnx", "--json", "-") == 0
    content = json.loads(capsys.readouterr().out)
    properties = schema()["properties"]
    for name in ("groups", "frozen"):
        jsonschema.validate(content[name], {**properties[name], "$defs": schema()["$defs"]})
    assert sum(entry["axes"] for entry in content["kept"]) >= len(content["frozen"])
    assert content["group_costs"][0]["macs"] == content["costs"]["macs"]


def test_inspect_marks_what_is_held(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder / "model.onnx", "--keep", "w*") == 0
    assert "(held)" in capsys.readouterr().out


def test_prune_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", folder / "model.onnx", "-o", folder / "s.onnx", "--json", folder / "r.json") == 0
    content = json.loads((folder / "r.json").read_text())
    assert content["verification"]["passed"]
    assert content["after"]["params"] < content["before"]["params"]
    assert "wrote" in capsys.readouterr().out


def test_nothing_is_overwritten_without_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "small.onnx").write_text("mine")
    assert run("prune", folder / "model.onnx", "-o", folder / "small.onnx") == 1
    assert "--force" in capsys.readouterr().err
    assert (folder / "small.onnx").read_text() == "mine"
    assert files(folder) == {"model.onnx", "small.onnx"}
    assert run("prune", folder / "model.onnx", "-o", folder / "small.onnx", "--force") == 0


def test_a_file_with_other_values_or_nodes_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, small = folder / "model.onnx", folder / "small.onnx"
    assert run("prune", model, "-o", small) == 0
    trained = onnx.load(small)
    trained.graph.initializer[0].raw_data = np.ones(4 * 27, np.float32).tobytes()
    onnx.save(trained, small)
    assert run("verify", model, small) == 5
    assert f"initializer {trained.graph.initializer[0].name!r} (input 1 of Conv" in capsys.readouterr().err
    assert run("apply", model, f"{small}.plan.json", "-o", small, "--force") == 0
    trained = onnx.load(small)
    trained.graph.node[0].attribute[0].ints[0] = 0
    onnx.save(trained, small)
    assert run("verify", model, small) == 5
    assert "node Conv" in capsys.readouterr().err


def damaged(folder: Path, what: str) -> Path:
    """A file that is wrong in one way."""
    path = folder / "bad.onnx"
    model = model_of("conv")
    if what == "truncated":
        path.write_bytes(model.SerializeToString()[:-200])
    elif what == "text":
        path.write_text("this is no model")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "cyclic":
        model.graph.node[0].input[0] = "y"
        onnx.save(model, path)
    elif what == "missing value":
        model.graph.node[1].input[0] = "nobody"
        onnx.save(model, path)
    else:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        location = {"no data file": "weights.bin", "leaves the folder": "../weights.bin", "absolute": "/etc/passwd"}[
            what
        ]
        tensor.external_data.add(key="location", value=location)
        path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    "what", ["truncated", "text", "empty", "cyclic", "missing value", "no data file", "leaves the folder", "absolute"]
)
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_bad_files_get_one_clear_line(
    folder: Path, what: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(folder, what)
    before = files(folder)
    arguments = [command, path] + (["-o", folder / "out.onnx"] if command == "prune" else [])
    assert run(*arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert files(folder) == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--target", "speed=0.5"], "channels, macs, params, bytes, latency"),
        (["--target", "macs=0"], "above 0"),
        (["--keep", "nothing*"], "matches no group"),
        (["--round-to", "0"], "at least 1"),
        (["--min-ratio", "0.9", "--max-ratio", "0.1"], "in order"),
        (["--width", "nothing*=0.5..1"], "matches no group"),
        (["--target", "latency=0.5", "--cost-table", "nowhere.json"], "cannot read cost table"),
        (["--input-shape", "z:1,3"], "inputs are"),
        (["--data", "nowhere.npz"], "no file"),
    ],
)
def test_bad_options_get_one_clear_line(
    folder: Path, arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prune", folder / "model.onnx", "-o", folder / "out.onnx", *arguments) == 1
    assert match in capsys.readouterr().err
    assert files(folder) == {"model.onnx"}


def test_usage_errors_exit_with_two(folder: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("prune", folder / "model.onnx", "-o", folder / "o.onnx", "--target", "half")
    assert stopped.value.code == 2


def test_model_without_channels_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", info[:1], info[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "relu.onnx")
    assert run("prune", folder / "relu.onnx", "-o", folder / "o.onnx") == 1
    assert "no weight matrices" in capsys.readouterr().err


def tampered(plan: dict[str, object], what: str) -> object:
    groups = plan["groups"]
    assert isinstance(groups, list)
    source = plan["source"]
    assert isinstance(source, dict)
    if what == "format":
        plan["format"] = "something"
    elif what == "version":
        plan["version"] = 99
    elif what == "another file":
        source["sha256"] = "0" * 64
    elif what == "group":
        groups[0]["name"] = "elsewhere"
    elif what == "all removed":
        groups[0]["removed"] = list(range(groups[0]["size"]))
    elif what == "out of range":
        groups[0]["removed"] = [groups[0]["size"]]
    else:
        return [plan]
    return plan


@pytest.mark.parametrize(
    "what", ["format", "version", "another file", "group", "all removed", "out of range", "a list"]
)
def test_a_wrong_plan_is_refused(folder: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, plan = folder / "model.onnx", folder / "s.onnx.plan.json"
    assert run("prune", model, "-o", folder / "s.onnx") == 0
    plan.write_text(json.dumps(tampered(json.loads(plan.read_text()), what)))
    capsys.readouterr()
    assert run("apply", model, plan, "-o", folder / "again.onnx") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder / "again.onnx").exists()


def test_distill_writes_into_the_same_initializers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    small, out, data = tmp_path / "small.onnx", tmp_path / "out.onnx", EXAMPLE.with_name("digits_train.npz")
    assert run("prune", EXAMPLE, "-o", small, "--target", "macs=0.5") == 0
    assert (
        run(
            "distill",
            EXAMPLE,
            small,
            "-o",
            out,
            "--data",
            data,
            "--steps",
            30,
            "--threads",
            1,
            "--batch-norm",
            "train",
            "--lr",
            "0.003",
            "--eval",
            data.with_name("digits_test.npz"),
            "--json",
            tmp_path / "r.json",
        )
        == 0
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["last_loss"] < result["first_loss"]
    assert result["distilled"] > result["student"]
    names = [[t.name for t in onnx.load(p).graph.initializer] for p in (small, out)]
    assert names[0] == names[1]
    assert run("verify", EXAMPLE, out) == 0
    assert "refitted or trained weights" in capsys.readouterr().out


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(demo, "compressed", functools.partial(demo.compressed, samples=64, repair_samples=64, effort=0))
    assert run("demo", "--epochs", "2", "--json", "-", "--out", tmp_path / "d") == 0
    content = json.loads(capsys.readouterr().out)
    accuracy = {row["name"]: row["accuracy"] for row in content["rows"]}
    assert accuracy["the original"] > 0.99
    assert accuracy["pruned, repaired, distilled"] > accuracy["random channels"]
    assert accuracy["pruned and repaired"] > accuracy["random channels"]
    assert content["verification"]["passed"]
    models = {"digits.onnx", "digits_pruned.onnx", "digits_pruned.onnx.plan.json"}
    models |= {"digits_train.npz", "digits_test.npz"}
    for name in ("digits.onnx", "digits_train.npz", "digits_test.npz"):
        assert (tmp_path / "d" / name).read_bytes() == EXAMPLE.with_name(name).read_bytes()
    assert files(tmp_path / "d") == models | {"report.html", "report.md", "report.json"}
    assert list(content["report"]["accuracy"]["values"]) == ["original", "pruned and repaired", "distilled"]
    assert content["report"]["training"]["losses_by"] == {"scores": "kl"}, "as in the controls, which have no plan"
    assert run("verify", tmp_path / "d" / "digits.onnx", tmp_path / "d" / "digits_pruned.onnx") == 0


def test_operators(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("operators") == 0
    assert "com.microsoft::FusedConv" in capsys.readouterr().out


def test_missing_operators(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("operators", "--missing") == 0
    missing = capsys.readouterr().out.split()
    assert "CenterCropPad" in missing
    assert not {"Conv", "If", "Constant"} & set(missing)


@pytest.mark.parametrize(
    "option", [["--plan", "out.onnx"], ["--plan", "model.onnx"], ["--json", "model.onnx"], ["--json", "out.onnx"]]
)
def test_one_file_is_not_named_for_two_things(
    folder: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "model.onnx").read_bytes()
    assert run("prune", folder / "model.onnx", "-o", folder / "out.onnx", "--force", option[0], folder / option[1]) == 1
    problem = "is both an input and an output" if "model.onnx" in option else "is given for two outputs"
    assert problem in capsys.readouterr().err
    assert (folder / "model.onnx").read_bytes() == before
    assert files(folder) == {"model.onnx"}


def test_the_model_itself_is_never_replaced(folder: Path) -> None:
    model = folder / "model.onnx"
    before = model.read_bytes()
    for force in ([], ["--force"]):
        assert run("prune", model, "-o", model, *force) == 1
        assert model.read_bytes() == before
        assert files(folder) == {"model.onnx"}


def test_nothing_is_left_where_the_disk_is_full(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: Path) -> None:
        if Path(target).name == "out.onnx":
            raise OSError(28, "No space left on device")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", full)
    assert run("prune", folder / "model.onnx", "-o", folder / "out.onnx") == 1
    assert "No space left" in capsys.readouterr().err
    assert files(folder) == {"model.onnx"}


def test_nothing_is_written_if_the_proof_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Comparison(difference=0.3, tolerance=1e-4, noise=0.0, runs=2, verdict=WRONG)
    monkeypatch.setattr("cpd_onnx.passes.verify.verify", lambda *arguments: wrong)
    assert run("prune", folder / "model.onnx", "-o", folder / "out.onnx") == 5
    assert "differs from the masked original" in capsys.readouterr().err
    assert files(folder) == {"model.onnx"}


def test_no_verify_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", folder / "model.onnx", "-o", folder / "out.onnx", "--no-verify") == 0
    assert "not verified" in capsys.readouterr().out


def test_data_is_used_for_the_proof(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = [d.dim_value for d in onnx.load(folder / "model.onnx").graph.input[0].type.tensor_type.shape.dim]
    np.savez(folder / "data.npz", x=np.zeros([4, *shape[1:]], np.float32))
    assert (
        run("prune", folder / "model.onnx", "-o", folder / "out.onnx", "--data", folder / "data.npz", "--json", "-")
        == 0
    )
    assert json.loads(capsys.readouterr().out)["verification"]["runs"] == 2


def test_input_shapes_are_part_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "(float[N, S, 6] x, float[6, 8] w, float[8, 5] v, int64[3] s) => (float[N, S, 5] y) { h = MatMul(x, w) r = Reshape(h, s) y = MatMul(r, v) }"
    model, small, again = (tmp_path / f"{n}.onnx" for n in ("model", "small", "again"))
    onnx.save(from_text(text, values={"s": [0, 0, 8]}), model)
    assert run("prune", model, "-o", small, "--input-shape", "x:2,7,6") == 0
    plan = tmp_path / "small.onnx.plan.json"
    content = json.loads(plan.read_text())
    jsonschema.validate(content, schema())
    assert content["source"]["input_shapes"] == {"x": [2, 7, 6]}
    assert run("apply", model, plan, "-o", again) == 0
    assert again.read_bytes() == small.read_bytes()
    assert run("verify", model, small) == 0
    content["source"]["input_shapes"] = {"x": ["two"]}
    plan.write_text(json.dumps(content))
    assert run("verify", model, small) == 1
    assert "not positive integers" in capsys.readouterr().err


def test_external_data_stays_external(tmp_path: Path) -> None:
    model = from_text(
        "(float[2, 40] x, float[40, 80] w, float[80, 50] v) => (float[2, 50] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    )
    source, small, again = (tmp_path / f"{n}.onnx" for n in ("big", "small", "again"))
    onnx.save_model(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "small.onnx.data").write_text("mine")
    assert run("prune", source, "-o", small) == 0
    assert (tmp_path / "small.onnx.data").read_text() == "mine"
    assert run("apply", source, tmp_path / "small.onnx.plan.json", "-o", again) == 0
    (first,), (second,) = (list(tmp_path.glob(f"{name}.onnx.????????.data")) for name in ("small", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert first.suffixes[-2] == second.suffixes[-2] == f".{hashlib.sha256(first.read_bytes()).hexdigest()[:8]}"
    assert run("verify", source, again, "--plan", tmp_path / "small.onnx.plan.json") == 0
    assert run("prune", source, "-o", small, "--force", "--target", "macs=0.7") == 0
    assert not first.exists()
    assert len(list(tmp_path.glob("small.onnx.????????.data"))) == 1


def test_weights_go_where_they_are_wanted(tmp_path: Path) -> None:
    text = (
        "(float[2, 40] x, float[40, 80] w, float[80, 50] v) => (float[2, 50] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    )
    source, plain = tmp_path / "big.onnx", tmp_path / "plain.onnx"
    onnx.save_model(from_text(text), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    made = {}
    for place in ("as-is", "inside", "beside"):
        out, back, report_file = tmp_path / f"{place}.onnx", tmp_path / f"{place}_back.onnx", tmp_path / f"{place}.json"
        assert run("prune", source, "-o", out, "--weights", place, "--json", report_file) == 0
        assert len(list(tmp_path.glob(f"{place}.onnx.????????.data"))) == (place != "inside")
        assert run("verify", source, out) == 0
        assert run("apply", source, f"{out}.plan.json", "-o", back, "--weights", "inside") == 0
        made[place] = (back.read_bytes(), json.loads(report_file.read_text())["bytes"]["after"])
    assert (tmp_path / "inside.onnx").read_bytes() == made["inside"][0]
    assert made["as-is"][0] == made["inside"][0] == made["beside"][0]
    assert max(size for _, size in made.values()) < 1.2 * min(size for _, size in made.values())
    onnx.save_model(from_text(text), plain)
    assert run("prune", plain, "-o", tmp_path / "apart.onnx", "--weights", "beside") == 0
    (data,) = tmp_path.glob("apart.onnx.*.data")
    assert data.stat().st_size > 4 * 40 * 40
    assert run("verify", plain, tmp_path / "apart.onnx") == 0
    assert run("prune", plain, "-o", tmp_path / "apart.onnx", "--weights", "inside", "--force") == 0
    assert not data.exists()


@pytest.mark.parametrize(
    "option",
    [
        ["--policy", "far"],
        ["--seed", "-1"],
        ["--seed", "x"],
        ["--round-to", "some"],
        ["--input-shape", "x"],
        ["--input-shape", "x:0"],
        ["--unheard-of"],
    ],
)
def test_values_that_no_option_takes_exit_with_two(
    folder: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("prune", folder / "model.onnx", "-o", folder / "o.onnx", *option)
    assert stopped.value.code == 2
    assert "cpd-onnx" in capsys.readouterr().err
    assert files(folder) == {"model.onnx"}


@pytest.mark.parametrize(
    "option",
    [
        ["--epochs", "0"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--label-weight", "2"],
        ["--shift", "-1"],
    ],
)
def test_values_that_training_does_not_take_exit_with_two(folder: Path, option: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(
            "distill", folder / "model.onnx", folder / "model.onnx", "-o", folder / "o.onnx", "--data", "d.npz", *option
        )
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--data", "nowhere.npz"], "no file"),
        (["--data", "DATA", "--device", "abacus"], "knows no device"),
        (["--data", "DATA", "--eval", "UNLABELLED"], "no array 'labels'"),
        (["--data", "DATA", "--lr", "1e30"], "the loss became"),
    ],
)
def test_distill_says_what_is_wrong(
    tmp_path: Path, arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    data = EXAMPLE.with_name("digits_train.npz")
    unlabelled = tmp_path / "images.npz"
    np.savez(unlabelled, image=np.load(data)["image"][:64])
    places = {"DATA": str(data), "UNLABELLED": str(unlabelled)}
    assert (
        run(
            "distill",
            EXAMPLE,
            EXAMPLE,
            "-o",
            tmp_path / "out.onnx",
            "--steps",
            "3",
            *(places.get(a, a) for a in arguments),
        )
        == 1
    )
    said = capsys.readouterr().err
    assert match in said
    assert sum(" %" not in line for line in said.splitlines()) == 1  # the others tell the progress of a slow machine
    assert files(tmp_path) == {"images.npz"}


def test_models_of_another_signature_are_no_students(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert (
        run(
            "distill",
            EXAMPLE,
            folder / "model.onnx",
            "-o",
            folder / "o.onnx",
            "--data",
            EXAMPLE.with_name("digits_train.npz"),
        )
        == 1
    )
    assert "model's inputs" in capsys.readouterr().err


def test_interruption(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cpd_onnx.workflow.inspect.comb", interrupted)
    assert run("inspect", folder / "model.onnx") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_internal_error_names_the_issue_tracker(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError("axis")

    monkeypatch.setattr("cpd_onnx.workflow.inspect.comb", broken)
    assert run("inspect", folder / "model.onnx") == 1
    expected = f"error: internal error: KeyError: 'axis'; please report it at {ISSUES} with the output of --verbose\n"
    assert capsys.readouterr().err == expected


def test_verbose_shows_where_an_error_came_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--verbose", "inspect", folder / "nothing.onnx") == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("error: cannot read")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--version")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"cpd-onnx {cpd.__version__}\n"


def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = from_text(
        "(float[2, 6] x, float[6, 8] w, float[8, 5] v) => (float[2, 5] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    )
    for node in model.graph.node:
        node.input[1] = f"[bold]{node.input[1]}:smile:"
    for tensor in model.graph.initializer:
        tensor.name = f"[bold]{tensor.name}:smile:"
    onnx.save(model, tmp_path / "model.onnx")
    assert run("inspect", tmp_path / "model.onnx") == 0
    assert "[bold]w:smile:" in capsys.readouterr().out


def test_a_difference_that_only_rounding_explains_is_told_as_such() -> None:
    """Not as if it were within the tolerance."""
    plain = Comparison(2e-7, 1e-4, 0.0, 2, 1.0, allowed=1e-4)
    rounded = Comparison(1.4e-4, 1e-4, 3e-5, 2, 1.0, allowed=3e-4)
    told = report.proof_line(report.comparison(plain))
    assert "(allowed 1e-04, a hundredth of the effect is 1e-02) on" in told
    told = report.proof_line(report.comparison(rounded))
    assert "1.4e-04 (allowed 3e-04, the effect of rounding, a hundredth of the effect is 1e-02) on" in told
