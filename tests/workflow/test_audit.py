"""`audit`: everything about a file is collected, verified and can be repeated; what has changed is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest

import cpd_onnx as cpd
from cpd_onnx.workflow.api import run
from cpd_onnx.workflow.evidence import bundle, repeating
from cpd_onnx.workflow.evidence.repeating import Command
from cpd_onnx.workflow.requests import Audit, Compress, Deploy, Prune, VerifyFile

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("fpdf")

MODELS = Path(__file__).parents[2] / "models"
HALF: dict[str, Any] = {
    "target": ("macs", 0.5),
    "round_to": 1,
    "blind": True,
    "score": "l2",
    "repair": False,
    "check_speed": False,
}
OF_COMPRESS = {"small.onnx", "small.onnx.plan.json", "small.onnx.manifest.json", "small.onnx.recipe.toml"}
REPORTS = {f"small.onnx.report.{kind}" for kind in ("html", "json", "md", "pdf")}
ALWAYS = {"README.md", "SHA256SUMS", "repeat.py", "repeat.sh", "verification.json", "verification.txt"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an original, a pruned model and a deployed one, with their plans and manifests."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(MODELS / "digits.onnx", folder)
    small = folder / "small.onnx"
    run(Compress(model=folder / "digits.onnx", output=small, **HALF, report=False))
    run(Deploy(model=small, output=folder / "half.onnx", half="float16"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the folder, which a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "made"))


def audited(file: Path, output: Path, **more: Any) -> dict[str, Any]:
    content = run(Audit(file=file, output=output, **more))
    assert content is not None
    return content


def test_all_that_belongs_to_a_file_is_in_one_folder(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "audit"
    content = audited(made / "small.onnx", output)
    names = {path.name for path in output.iterdir()}
    assert names == OF_COMPRESS | REPORTS | ALWAYS | {"digits.onnx"}
    assert {row["file"] for row in content["files"]} == names - {"SHA256SUMS"}
    for line in (output / "SHA256SUMS").read_text().splitlines():
        sha256, name = line.split("  ")
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == sha256
    assert (output / "small.onnx.report.pdf").read_bytes().startswith(b"%PDF-")
    stored = json.loads((output / "verification.json").read_text())
    assert stored["verification"]["verdict"] == "verified"
    assert stored["original"] == {
        "file": "digits.onnx", "sha256": hashlib.sha256((MODELS / "digits.onnx").read_bytes()).hexdigest(), "is_included": True
    }  # fmt: skip  # a table
    assert "equals, byte for byte" in (output / "verification.txt").read_text()


def test_a_manifest_stands_for_its_model(made: Path, tmp_path: Path) -> None:
    audited(made / "small.onnx", tmp_path / "a.zip")
    audited(made / "small.onnx.manifest.json", tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_deployed_file_comes_with_the_runs_before_it(made: Path, tmp_path: Path) -> None:
    content = audited(made / "half.onnx", tmp_path / "a.zip", without_original=True)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
        assert names[:-1] == sorted(names[:-1])
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        script, read_me = (archive.read(name).decode() for name in ("repeat.sh", "README.md"))
        report = json.loads(archive.read("half.onnx.report.json"))
    assert OF_COMPRESS | {"half.onnx", "half.onnx.manifest.json", "half.onnx.report.pdf"} <= set(names)
    assert "digits.onnx" not in names
    assert content["original"]["sha256"] in read_me
    commands = [line.strip() for line in script.splitlines() if line.strip().startswith("cpd-onnx ")]
    assert commands == [
        'cpd-onnx verify "$ORIGINAL" half.onnx --via small.onnx',
        'cpd-onnx reproduce small.onnx.manifest.json --model "$ORIGINAL" -o "$work/2" "$@"',
        'cpd-onnx reproduce half.onnx.manifest.json --model small.onnx -o "$work/3" "$@"',
    ]
    (step,) = report["deployment"]["steps"]
    assert step["name"] == "half"
    assert 0 < step["difference"] < 0.01
    assert step["agreement"] == 1
    assert report["verification"]["verdict"] == "verified"


@pytest.mark.parametrize("name", ["small.onnx", "small.onnx.plan.json", "small.onnx.recipe.toml", "digits.onnx"])
def test_what_has_changed_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    with (folder / name).open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(cpd.CpdError, match="has changed: its SHA-256"):
        audited(folder / "half.onnx", tmp_path / "audit")
    assert not (tmp_path / "audit").exists()


def test_what_is_missing_is_refused_or_said(folder: Path, tmp_path: Path) -> None:
    (folder / "small.onnx.recipe.toml").unlink()
    content = audited(folder / "small.onnx", tmp_path / "a.zip")
    assert content["missing"] == ["small.onnx.recipe.toml, a recipe that is not there any more"]
    (folder / "small.onnx.plan.json").unlink()
    with pytest.raises(cpd.CpdError, match="name it with --plan"):
        audited(folder / "small.onnx", tmp_path / "b.zip")
    with pytest.raises(cpd.CpdError, match="has no manifest of compress or deploy"):
        audited(folder / "digits.onnx", tmp_path / "b.zip")


def test_an_original_outside_is_used_only_if_it_is_named(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "small.onnx.manifest.json").read_text())
    (folder / "digits.onnx").rename(tmp_path / "digits.onnx")
    record["inputs"][0]["file"] = "../digits.onnx"
    (folder / "small.onnx.manifest.json").write_text(json.dumps(record))
    with pytest.raises(cpd.CpdError, match=r"outside its folder; to use it, .* --model"):
        audited(folder / "small.onnx", tmp_path / "a.zip")
    content = audited(folder / "small.onnx", tmp_path / "a.zip", model=tmp_path / "digits.onnx")
    assert "digits.onnx" in {row["file"] for row in content["files"]}


def test_weights_beside_the_models_come_along(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    model = onnx.load(MODELS / "digits.onnx")
    onnx.save_model(model, folder / "d.onnx", save_as_external_data=True, location="d.data", size_threshold=0)
    run(Prune(model=folder / "d.onnx", output=folder / "small.onnx", **HALF))
    run(Deploy(model=folder / "small.onnx", output=folder / "half.onnx", half="float16"))
    with pytest.raises(cpd.CpdError, match=r"nothing says which original .* was pruned from: name it with --model"):
        audited(folder / "half.onnx", tmp_path / "audit")
    audited(folder / "half.onnx", tmp_path / "audit", model=folder / "d.onnx")
    shutil.rmtree(folder)
    names = {path.suffix for path in (tmp_path / "audit").iterdir()}
    assert {".data", ".onnx"} <= names
    done = run(VerifyFile(original=tmp_path / "audit" / "d.onnx", pruned=tmp_path / "audit" / "half.onnx"))
    assert done is not None
    assert done["verdict"] == "verified"


@pytest.mark.parametrize("name", ["..", "a/../..", "digits\n.onnx", "..\\digits.onnx", ""])
def test_a_manifest_chooses_no_place_in_an_archive(folder: Path, tmp_path: Path, name: str) -> None:
    record = json.loads((folder / "small.onnx.manifest.json").read_text())
    record["inputs"][0]["file"] = name
    (folder / "small.onnx.manifest.json").write_text(json.dumps(record))
    with pytest.raises(cpd.CpdError, match="is not a file name that an audit can hold"):
        audited(folder / "small.onnx", tmp_path / "a.zip", model=folder / "digits.onnx")
    assert not (tmp_path / "a.zip").exists()


def test_a_report_of_another_shape_is_one_line(folder: Path, tmp_path: Path) -> None:
    report = folder / "small.onnx.report.json"
    record = json.loads((folder / "small.onnx.manifest.json").read_text())
    for text in ("[]", '{"format": "cpd-onnx/report", "version": 2, "title": "x", "groups": [1]}', "{"):
        report.write_text(text)
        entry = {
            "role": "report",
            "file": report.name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "repeats": False,
        }
        changed = {**record, "outputs": [*record["outputs"], entry]}
        (folder / "small.onnx.manifest.json").write_text(json.dumps(changed))
        with pytest.raises(cpd.CpdError, match=r"is not (a|the content of a) report"):
            audited(folder / "small.onnx", tmp_path / "a.zip")


def test_nothing_is_overwritten_without_force(folder: Path, tmp_path: Path) -> None:
    audited(folder / "small.onnx", tmp_path / "a.zip")
    before = (tmp_path / "a.zip").read_bytes()
    with pytest.raises(cpd.ModelError, match="exists: choose another name"):
        audited(folder / "small.onnx", tmp_path / "a.zip")
    audited(folder / "small.onnx", tmp_path / "a.zip", force=True)
    assert (tmp_path / "a.zip").read_bytes() == before
    files = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(cpd.ModelError, match="is both an input and an output"):
        audited(folder / "small.onnx", folder, force=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


# The scripts.


HOSTILE = ("a b", "$(touch x)", "'; touch x; '", "line\nbreak", "`touch x`", '"', "-o", "層", "\\")


@pytest.fixture
def printing(tmp_path: Path) -> Path:
    """A folder with a program cpd-onnx that prints its arguments as JSON."""
    program = tmp_path / "bin" / "cpd-onnx"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint('said', json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    return program.parent


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs a POSIX shell with sha256sum")
def test_the_shell_script_passes_every_word_on(tmp_path: Path, printing: Path) -> None:
    commands = [
        Command(("verify", *HOSTILE, "$DATA"), {"DATA": "data\nof; touch x"}, ""),
        Command(("reproduce", "m"), {"MORE": "x"}, "m"),
        Command(("reproduce", "m"), {}, "m"),
    ]
    script = repeating.shell(commands, ["cpd-onnx==1'; touch x"])
    folder = tmp_path / "bundle"
    folder.mkdir()
    bundle.write(folder, {"repeat.sh": script, "odd\\\nname": b"x"})
    (tmp_path / "data.npz").touch()
    done = subprocess.run(
        ["sh", folder / "repeat.sh", "--trust", "m:f"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PATH": f"{printing}:/usr/bin:/bin", "INSTALLED": "1", "DATA": "data.npz"},
    )  # fmt: skip  # what and where
    said = [json.loads(line.removeprefix("said ")) for line in done.stdout.splitlines() if line.startswith("said ")]
    assert said[0] == ["verify", *HOSTILE, str(tmp_path / "data.npz")]
    assert [*said[1][:3], *said[1][4:]] == ["reproduce", "m", "-o", "--trust", "m:f"]
    assert len(said) == 2
    assert "skipped, as it needs MORE=PATH" in done.stdout
    assert not list(tmp_path.rglob("x"))
    (folder / "odd\\\nname").write_bytes(b"y")
    failed = subprocess.run(
        ["sh", folder / "repeat.sh"], capture_output=True, env={"PATH": "/usr/bin:/bin", "INSTALLED": "1"}, check=False
    )
    assert failed.returncode != 0
    assert b"FAILED" in failed.stdout


def test_the_python_script_checks_and_runs(made: Path, tmp_path: Path) -> None:
    audited(made / "small.onnx", tmp_path / "audit")
    script = tmp_path / "audit" / "repeat.py"
    compile(script.read_text(), "repeat.py", "exec")
    odd = repeating.python([Command(("verify", *HOSTILE), {"DATA": '"""\nimport x'}, "")], ["a'b"])
    compile(odd, "repeat.py", "exec")
    (tmp_path / "audit" / "small.onnx.plan.json").write_text("{}")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env={"INSTALLED": "1"}, check=False)
    assert done.returncode == 1
    assert "small.onnx.plan.json has changed: its SHA-256 must be" in done.stderr


def test_only_versions_are_installed() -> None:
    with pytest.raises(cpd.PlanError, match="is not a version of numpy"):
        repeating.pinned({"numpy": "1 --index-url http://there"})
    assert repeating.pinned({"python": "3.11", "torch": "2.9.0+cpu", "other": "1"}) == ["torch==2.9.0"]
