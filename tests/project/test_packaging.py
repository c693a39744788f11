"""What is installed: the packages that are listed are those that there are, with their data."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest

import cpd_onnx
from cpd_onnx.errors import ISSUES
from cpd_onnx.rules import unsupported_operators

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
IS_UNPACKED = (ROOT / "PKG-INFO").exists()
"""Whether this is a source distribution, which has no links."""


def packages() -> set[str]:
    """Folders with an `__init__`, by the name under which they are imported."""
    found = {"cpd_onnx"}
    for folder in [ROOT / "cpd_onnx", ROOT / "passes", ROOT / "models"]:
        base = () if folder.name == "cpd_onnx" else (folder.name,)
        for init in folder.rglob("__init__.py"):
            parts = init.parent.relative_to(folder).parts
            if parts[:1] not in (("passes",), ("models",)):
                found.add(".".join(("cpd_onnx", *base, *parts)))
    return found


def test_listed_packages_are_the_folders() -> None:
    assert set(SETUPTOOLS["packages"]) == packages()
    for name, folder in SETUPTOOLS["package-dir"].items() if not IS_UNPACKED else ():
        link = ROOT / name.replace(".", "/")
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == ROOT / folder


def test_files_that_are_no_code_are_there() -> None:
    for package, name in (
        ("cpd_onnx", "py.typed"),
        ("cpd_onnx.deploy", "profiles.toml"),
        ("cpd_onnx.report", "report.schema.json"),
        ("cpd_onnx.report", "templates/report.html"),
        ("cpd_onnx.rewrite", "plan.schema.json"),
    ):
        assert {name, f"{Path(name).parent}/*"} & set(SETUPTOOLS["package-data"][package])
        assert resources.files(package).joinpath(name).is_file()
    for name in ("digits.onnx", "digits_train.npz", "digits_test.npz"):
        assert resources.files("cpd_onnx.models").joinpath(name).is_file()


def test_models_are_those_of_the_manifest() -> None:
    folder = ROOT / "models"
    entries = json.loads((folder / "manifest.json").read_text())
    assert set(entries) == {path.name for path in folder.glob("*.onnx")}
    for name, entry in entries.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]


def test_version_and_command() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", cpd_onnx.__version__)
    assert PROJECT["project"]["scripts"] == {"cpd-onnx": "cpd_onnx.__main__:entry"}
    try:
        assert metadata.version("cpd-onnx") == cpd_onnx.__version__
    except metadata.PackageNotFoundError:
        assert SETUPTOOLS["dynamic"]["version"] == {"attr": "cpd_onnx.version.__version__"}


def test_public_names_exist() -> None:
    assert all(hasattr(cpd_onnx, name) for name in cpd_onnx.__all__)
    assert set(cpd_onnx.__all__) <= set(dir(cpd_onnx))
    assert list(cpd_onnx.__all__) == sorted(cpd_onnx.__all__, key=lambda name: (not name.isupper(), name))


@pytest.mark.parametrize("command", [["-m", "cpd_onnx"], ["-c", "from cpd_onnx.__main__ import entry; entry()"]])
def test_it_starts(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == f"cpd-onnx {cpd_onnx.__version__}\n"


def test_passes_are_not_imported_from_their_folder() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "import this package as cpd_onnx.passes" in done.stderr


def test_wheel_holds_everything(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="without network only an installed setuptools can build")
    pytest.importorskip("pip", reason="there is no pip to build with")
    source = tmp_path / "source"  # a copy, so that nothing is built in the tree
    for name in ("cpd_onnx", "passes", "models"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    line = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(line, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, inside in (("cpd_onnx", "cpd_onnx"), ("passes", "cpd_onnx/passes"), ("models", "cpd_onnx/models")):
        code = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}
        wanted = {f"{inside}/{name}" for name in code if not name.startswith(("passes/", "models/"))}
        assert wanted <= names
    folder = ROOT / "cpd_onnx" / "report" / "templates"
    templates = {f"cpd_onnx/report/templates/{path.name}" for path in folder.iterdir()}
    schemas = {"cpd_onnx/rewrite/plan.schema.json", "cpd_onnx/report/report.schema.json"}
    assert {"cpd_onnx/py.typed", "cpd_onnx/models/digits.onnx"} | schemas | templates <= names
    assert {name.split("/")[0] for name in names} == {"cpd_onnx", f"cpd_onnx-{cpd_onnx.__version__}.dist-info"}


def repository() -> set[str]:
    """Files that belong to the project, links aside: those of a source distribution where this is one."""
    listed = sorted(ROOT.glob("*.egg-info/SOURCES.txt")) if IS_UNPACKED else []
    if listed:
        return {line for line in listed[0].read_text().split("\n") if line and ".egg-info" not in line}
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("neither a repository nor a source distribution")
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file() and not (ROOT / name).is_symlink()}


def test_source_distribution_is_the_repository(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="without network only an installed setuptools can build")
    wanted, source = repository(), tmp_path / "source"
    for name in wanted:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name, folder in SETUPTOOLS["package-dir"].items():  # as git has them
        (source / name.replace(".", "/")).symlink_to(f"../{folder}")
    line = [sys.executable, "-c", "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"]
    subprocess.run([*line, str(tmp_path)], check=True, capture_output=True, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as stream:
        entries = {Path(entry.name).as_posix().partition("/")[2]: entry for entry in stream if not entry.isdir()}
    made = {name for name in entries if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert set(entries) - made == wanted
    assert all(entry.isfile() for entry in entries.values())


def commands() -> list[str]:
    """The set-up commands of the README, the lines of its first block."""
    return re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0].splitlines()


def test_readme_has_two_commands_and_the_second_is_tested() -> None:
    assert len(commands()) == 2
    assert commands()[0] == "pip install -c constraints.txt '.[torch,report]' && cpd-onnx demo --out example"
    assert commands()[1].endswith("&& pytest")
    install, _, _ = commands()[1].partition(" && ")
    assert install.removeprefix("pip install ") in (ROOT / ".ci" / "run").read_text()


def test_readme_lists_the_operators_as_they_are() -> None:
    text = (ROOT / "README.md").read_text()
    missing = ", ".join(f"`{name}`" for name in unsupported_operators())
    assert f"{missing}\n" in text.replace(",\n", ", ")


def test_issue_tracker_of_messages_and_package_agree() -> None:
    assert PROJECT["project"]["urls"]["Issues"] == ISSUES
