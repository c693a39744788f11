"""What brings the package to users: the GitHub Action, the image, and the checks of a release."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpd_onnx.cli.arguments import command_line, request_of
from cpd_onnx.workflow.requests import Compress, VerifyFile
from tests.project.test_packaging import SETUPTOOLS

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
RECORDER = """#!{python}
import json, sys
from pathlib import Path
Path("arguments.json").write_text(json.dumps(sys.argv[1:]))
Path("small.onnx.report.md").write_text("the report\\n")
print("verified")
"""


def step(name: str) -> dict[str, Any]:
    (found,) = (each for each in STEPS if each.get("name") == name)
    return found


def ran(folder: Path, **inputs: str) -> tuple[int, list[str], str]:
    """Run the script of the step as GitHub does; returns its exit code, the command's arguments, and the summary."""
    program = folder / "bin" / "cpd-onnx"
    program.parent.mkdir(exist_ok=True)
    program.write_text(RECORDER.format(python=sys.executable))
    program.chmod(0o755)
    (folder / "script.sh").write_text(step("Run")["run"])
    given = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()} | inputs
    values = {key: given[re.findall(r"inputs\.([\w-]+)", text)[0]] for key, text in step("Run")["env"].items()}
    environment = os.environ | values | {
        "PATH": f"{program.parent}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(folder / "summary.md")
    }  # fmt: skip  # a table
    line = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "script.sh"]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    recorded, summary = folder / "arguments.json", folder / "summary.md"
    arguments = json.loads(recorded.read_text()) if recorded.exists() else []
    return done.returncode, arguments, summary.read_text() if summary.exists() else done.stderr


def test_the_action_compresses(tmp_path: Path) -> None:
    options = "--keep=head.*\n--no-distill\n\n--image-mean=0.5,0.5,0.5\n"
    code, arguments, summary = ran(
        tmp_path, model="a model.onnx", output="small.onnx", data="images", target="latency=0.5", options=options
    )
    assert (code, summary) == (0, "the report\n")
    request = request_of(command_line().parse_args(arguments))
    assert isinstance(request, Compress)
    assert (request.model, request.output) == (Path("a model.onnx"), Path("small.onnx"))
    assert (request.data, request.keep, request.distill) == ("images", ("head.*",), False)


def test_the_action_verifies(tmp_path: Path) -> None:
    code, arguments, summary = ran(tmp_path, command="verify", model="m.onnx", output="small.onnx")
    assert (code, summary) == (0, "verified\n")
    request = request_of(command_line().parse_args(arguments))
    assert isinstance(request, VerifyFile)
    assert (request.original, request.pruned) == (Path("m.onnx"), Path("small.onnx"))


@pytest.mark.parametrize(
    "text", ["$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "-rf", "*"]
)
def test_inputs_of_the_action_are_never_run(tmp_path: Path, text: str) -> None:
    code, arguments, _ = ran(tmp_path, model=text, output=text, data=text, eval=text, target=text, options=text)
    assert code == 0
    assert arguments == [
        "compress", f"--output={text}", text, f"--data={text}", f"--eval={text}", f"--target={text}", "--", text
    ]  # fmt: skip  # in order
    code, arguments, said = ran(tmp_path, command=text, model="m.onnx", output="o.onnx")
    assert code == 2
    assert "the command must be compress or verify" in said
    assert not (tmp_path / "pwned").exists()


def test_no_script_of_the_action_contains_an_expression() -> None:
    for each in STEPS:
        assert "${{" not in each.get("run", "")
    assert 'pip install --quiet "$ACTION_PATH[$EXTRAS]"' in step("Install")["run"]


def test_every_input_of_the_action_is_described_and_used() -> None:
    used = set(re.findall(r"inputs\.([\w-]+)", json.dumps(STEPS)))
    assert used == set(ACTION["inputs"])
    for spec in ACTION["inputs"].values():
        assert spec["description"]
        assert spec.get("required") or "default" in spec


def test_the_workflow_uses_the_action_as_it_is() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    used = [each["with"] for each in jobs["action"]["steps"] if each["uses"] == "./"]
    required = {name for name, spec in ACTION["inputs"].items() if spec.get("required")}
    assert all(required <= set(given) <= set(ACTION["inputs"]) for given in used)
    assert all((ROOT / given["model"]).is_file() for given in used)
    assert {"run": ".ci/run"} in jobs["checks"]["steps"]


def test_checks_build_and_try_the_wheel() -> None:
    assert os.access(ROOT / ".ci" / "wheel", os.X_OK)
    assert ".ci/wheel\n" in (ROOT / ".ci" / "run").read_text()
    compile((ROOT / ".ci" / "wheel").read_text(), "wheel", "exec")


def test_the_image_is_small_and_its_user_has_no_privileges() -> None:
    lines = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
    steps = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    bases = [rest for word, rest in steps if word == "FROM"]
    assert len(bases) == 2
    assert all("-slim" in base for base in bases)
    last = steps[max(number for number, (word, _) in enumerate(steps) if word == "FROM") :]
    settings = dict(last)
    assert settings["USER"] not in ("", "root", "0")
    assert f" {settings['USER']}" in settings["RUN"]
    assert json.loads(settings["ENTRYPOINT"]) == ["cpd-onnx"]
    assert "--no-cache-dir" in settings["RUN"]
    assert "COPY" not in settings
    extras = re.findall(r"EXTRAS=(\S+)", settings["ARG"])
    assert extras == ["report"]


def test_the_image_gets_what_a_build_needs_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    folders = {"cpd_onnx", *SETUPTOOLS["package-dir"].values()}
    assert allowed == folders | {"pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in allowed)
