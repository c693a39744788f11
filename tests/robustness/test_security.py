"""Files of strangers: recipes, manifests, tables, checkpoints and names that would like to do more than they may.

`docs/security.md` lists what they can and cannot do, and the test that holds each line.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.progress import Progress

from cpd_onnx.budget.latency import load_table
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli import console, loading
from cpd_onnx.cli.main import main
from cpd_onnx.data.sources import ImageFolder, ImageOptions, Input
from cpd_onnx.errors import CpdError, DataError, ModelError, UnsupportedError
from cpd_onnx.io import files
from cpd_onnx.io.streams import printable
from cpd_onnx.ir.model import load
from cpd_onnx.options import options_of
from cpd_onnx.passes.iterate import RunCache
from cpd_onnx.report import manifest
from cpd_onnx.workflow import requests
from tests.support.models import from_text
from tests.support.runs import plain

ROOT = Path(__file__).parents[2]
TEXT = (
    "(float[n, 4] x, float[4, 8] w, float[8, 8] u, float[8, 3] v) => (float[n, 3] y)"
    " { a = MatMul(x, w) b = Relu(a) c = MatMul(b, u) d = Relu(c) y = MatMul(d, v) }"
)
ESCAPE = "\x1b[2Jno"
EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef run(*args, **more):\n    return []\n"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def deep(levels: int = 100_000) -> str:
    return "[" * levels + "]" * levels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a stranger with a model, samples and a module, and the current one; a secret lies beside it."""
    place = tmp_path / "theirs"
    place.mkdir()
    (place / "model.onnx").write_bytes(from_text(TEXT).SerializeToString())
    rng = np.random.default_rng(0)
    np.savez(place / "data.npz", x=rng.standard_normal((32, 4)).astype("f"))
    (place / "evil.py").write_text(EVIL)
    np.savez(tmp_path / "secret.npz", x=rng.standard_normal((32, 4)).astype("f"))
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return place


def said(*arguments: object) -> tuple[int, str, str]:
    """Exit code and what was printed on both streams."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(plain([*map(str, arguments)]))
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, out.getvalue(), err.getvalue()


def refused(*arguments: object) -> str:
    """The one line that a command ends with."""
    code, _, complaint = said(*arguments)
    assert code in (1, 2), complaint
    assert complaint.startswith("error: "), complaint
    assert complaint.count("\n") == 1, complaint
    assert not re.search(r"internal error|Traceback", complaint), complaint
    assert complaint.rstrip("\n").isprintable(), complaint
    return complaint


def written(place: Path, said: str = "", **changes: Any) -> Path:
    """A manifest of a run on the model in a folder."""
    model = place / "model.onnx"
    entry = {"role": "model", "file": "model.onnx", "sha256": sha256(model)}
    made = {"role": "model", "file": "small.onnx", "sha256": "0" * 64, "repeats": True}
    content = {"format": manifest.FORMAT, "version": manifest.VERSION, "run": "compress", "recipe": said}
    content |= {"inputs": [entry], "outputs": [made], "versions": {}} | changes
    path = place / "small.onnx.manifest.json"
    path.write_text(json.dumps(content))
    return path


def entry_of(path: str, role: str = "data", base: Path = Path()) -> dict[str, str]:
    place = base / path
    return {"role": role, "file": path, "sha256": manifest.file_entry(place, "")["sha256"] if place.exists() else ""}


def with_input(place: Path, entry: dict[str, str], recipe: str = "") -> Path:
    path = written(place, recipe)
    content = json.loads(path.read_text())
    content["inputs"].append(entry)
    path.write_text(json.dumps(content))
    return path


# Code.


NAMING = ("data", "eval", "watch", "score", "metric")
SHORT = 'distill = false\nreport = false\nsensitivity = false\ntarget = "macs=0.5"\n'


@pytest.mark.parametrize("option", NAMING)
def test_a_recipe_names_no_code(folder: Path, option: str) -> None:
    (folder / "r.toml").write_text(f'{SHORT}{option} = "evil:run"\n')
    line = refused("compress", "model.onnx", "-o", "small.onnx", "--recipe", "r.toml")
    assert "--trust evil:run" in line
    refused("compress", "model.onnx", "-o", "small.onnx", "--recipe", "r.toml", "--trust", "evil:other")
    assert not (folder / "ran").exists()
    assert not (folder / "small.onnx").exists()


def test_a_recipe_names_no_cache_of_compiled_code(folder: Path) -> None:
    (folder / "r.toml").write_text(f'{SHORT}latency-provider = "tensorrt:cache=theirs"\n')
    line = refused("compress", "model.onnx", "-o", "small.onnx", "--recipe", "r.toml")
    assert "--trust TensorrtExecutionProvider:cache=theirs" in line
    assert not (folder / "small.onnx").exists()


@pytest.mark.parametrize("option", ["data", "score", "watch"])
def test_a_manifest_names_no_code(folder: Path, option: str) -> None:
    place = written(folder, f'patience = 1\n{option} = "evil:run"\n')
    assert "--trust evil:run" in refused("reproduce", place, "-o", "again")
    assert not (folder / "ran").exists()
    assert not (folder / "again").exists()


def test_a_manifest_names_no_function_of_python(folder: Path) -> None:
    assert "--trust os:abort" in refused("reproduce", written(folder, 'data = "os:abort"\n'), "-o", "again")
    assert "--trust" in refused("reproduce", written(folder, 'data = "os.path:exists"\n', run="deploy"), "-o", "again")


def test_code_runs_where_the_command_line_names_it(folder: Path) -> None:
    (folder / "r.toml").write_text(f'{SHORT}data = "evil:run"\nrepair = false\n')
    asked = ("compress", "model.onnx", "-o", "small.onnx", "--recipe", "r.toml")
    assert "no samples" in refused(*asked, "--trust", "evil:run")  # `run` gives none
    assert (folder / "ran").exists()
    (folder / "ran").unlink()
    sys.modules.pop("evil")
    assert "no samples" in refused(*asked, "--data", "evil:run")
    assert (folder / "ran").exists()


def test_what_the_command_line_says_otherwise_is_not_looked_at(folder: Path) -> None:
    (folder / "r.toml").write_text(f'{SHORT}data = "evil:run"\nrepair = false\n')
    asked = ("--recipe", "r.toml", "--data", "data.npz", "--samples", 8)
    assert said("compress", "model.onnx", "-o", "small.onnx", *asked)[0] == 0
    assert not (folder / "ran").exists()


def test_the_executor_of_a_recipe_is_code(folder: Path) -> None:
    (folder / "r.toml").write_text('executor = "evil:run"\n')
    line = refused("sweep", "model.onnx", "-o", "out", "--targets", "macs=0.5", "--recipe", "r.toml")
    assert "--trust evil:run" in line
    assert not (folder / "ran").exists()


def test_every_option_that_takes_a_function_or_a_path_is_known() -> None:
    """A new one would be open to recipes."""
    for owner in (requests.Compress, requests.Distill, requests.Sweep, requests.Deploy):
        for named in options_of(owner):
            option = named.option
            if not option.is_recorded:
                continue  # typed each time
            takes = f"{option.help} {option.metavar}".lower()
            assert "module:function" not in takes or option.takes in ("data", "function"), (owner, named.name)
            is_path = option.read is Path or re.search("FILE|FOLDER|CSV|DATA", str(option.metavar))
            assert not is_path or option.takes in ("file", "data", "profile"), (owner, named.name)


def test_nothing_beside_the_model_is_imported(folder: Path) -> None:
    """By the installed command, nor by the processes that it starts."""
    for name in ("json", "numpy", "multiprocessing", "struct", "onnxruntime", "rich"):
        (folder / f"{name}.py").write_text(EVIL)
    script = folder.parent / "cpd-onnx"
    lines = (
        "import sys", f"sys.path.append({str(ROOT)!r})", "from cpd_onnx.__main__ import entry",
        "if __name__ == '__main__':", "    entry()",
    )  # fmt: skip  # as the installed one
    script.write_text("\n".join(lines))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    line = [sys.executable, str(script), "bench", "model.onnx", "--seconds", "0.05"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert not (folder / "ran").exists()


def test_a_plan_names_no_file_and_no_code(folder: Path) -> None:
    assert said("prune", "model.onnx", "-o", "small.onnx")[0] == 0
    plan = json.loads((folder / "small.onnx.plan.json").read_text())
    plan["source"]["file"] = "evil:run"
    plan["budget"]["score"] = "evil:run"
    plan["made_by"] = "evil:run"
    (folder / "small.onnx.plan.json").write_text(json.dumps(plan))
    assert said("apply", "model.onnx", "small.onnx.plan.json", "-o", "again.onnx")[0] == 0
    said("verify", "model.onnx", "small.onnx")
    assert not (folder / "ran").exists()


# Paths.


OUTSIDE = {
    "absolute": lambda outside: str(outside / "secret.npz"),
    "upwards": lambda outside: "../secret.npz",
    "hidden upwards": lambda outside: "sub/../../secret.npz",
    "through a link": lambda outside: "link.npz",
    "through a linked folder": lambda outside: "linked/secret.npz",
    "a folder with a link": lambda outside: "images",
    "with a zero": lambda outside: "a\0b.npz",
    "in a circle": lambda outside: "circle",
    "of a device": lambda outside: "/dev/zero",
}  # fmt: skip  # a table


def prepared(folder: Path) -> Path:
    """The links that the paths of `OUTSIDE` go through."""
    (folder / "sub").mkdir()
    (folder / "images").mkdir()
    (folder / "link.npz").symlink_to("../secret.npz")
    (folder / "linked").symlink_to("..")
    (folder / "images" / "a.png").symlink_to("/etc/passwd")
    (folder / "circle").symlink_to("circle")
    return folder


READING = ("data", "eval", "watch", "cost-table", "profile", "like")
WRITING = ("teacher-cache", "log", "tensorboard")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("option", [*READING, *WRITING])
def test_a_recipe_leaves_its_folder_nowhere(folder: Path, option: str, name: str) -> None:
    path = OUTSIDE[name](folder.parent)
    path += ".toml" if option == "profile" else ""
    if option == "profile" and not path.startswith((".", "/", "sub", "linked")):
        pytest.skip("another ending makes another name of it")
    (prepared(folder) / "r.toml").write_text(f"{option} = {json.dumps(path)}\n")
    before = {p: p.lstat().st_mtime_ns for p in folder.parent.rglob("*")}
    line = refused("compress", "model.onnx", "-o", "small.onnx", "--recipe", "r.toml")
    assert "outside its folder" in line
    assert f"--{option} " in line
    assert {p: p.lstat().st_mtime_ns for p in folder.parent.rglob("*")} == before


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("role", ["model", "data", "cost-table", "plan", "profile", "watch"])
def test_a_manifest_leaves_its_folder_nowhere(folder: Path, role: str, name: str) -> None:
    path = OUTSIDE[name](folder.parent)
    place = with_input(prepared(folder), {"role": role, "file": path, "sha256": "0" * 64})
    line = refused("reproduce", place, "-o", "again")
    assert "outside its folder" in line
    assert f"--{role} " in line
    assert not (folder / "again").exists()


@pytest.mark.parametrize("option", WRITING)
def test_a_manifest_writes_nothing_outside_the_new_folder(folder: Path, option: str) -> None:
    where = folder.parent / "mine"
    place = written(folder, f"{SHORT}{option} = {json.dumps(str(where))}\n")
    said("reproduce", place, "-o", "again")
    assert not where.exists()
    assert {path.name for path in (folder / "again").iterdir()} >= {"small.onnx", "small.onnx.plan.json"}


@pytest.mark.parametrize("name", ["..", ".", "/", "a/..", "", "a\0b", "../model.onnx", "/etc/small.onnx"])
def test_the_outputs_of_a_manifest_get_plain_names(folder: Path, name: str) -> None:
    made = {"role": "model", "file": name, "sha256": "0" * 64, "repeats": True}
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    place = written(folder, SHORT, outputs=[made])
    refused("reproduce", place, "-o", "again")
    assert {path.name for path in folder.parent.iterdir()} == {"theirs", "secret.npz"}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_what_the_command_line_names_too_is_read(folder: Path) -> None:
    """Data outside the folder of the manifest is named again, and the line says what to type."""
    (folder / "out").mkdir()
    asked = ("--data", "data.npz", "--no-distill", "--no-report", "--repair-samples", 16, "--samples", 16)
    assert said("compress", "model.onnx", "-o", "out/small.onnx", *asked)[0] == 0
    place = "out/small.onnx.manifest.json"
    line = refused("reproduce", place, "-o", "again")
    assert "--model model.onnx --data data.npz" in line
    assert said("reproduce", place, "-o", "again", *line.split("these options: ")[1].split())[0] == 0
    line = refused("compress", "model.onnx", "-o", "b.onnx", "--recipe", "out/small.onnx.recipe.toml")
    assert line.endswith("--data data.npz\n")
    asked = ("--recipe", "out/small.onnx.recipe.toml", "--data", "data.npz")
    assert said("compress", "model.onnx", "-o", "b.onnx", *asked)[0] == 0
    assert (folder / "b.onnx").read_bytes() == (folder / "out" / "small.onnx").read_bytes()


def test_paths_of_a_recipe_are_as_seen_from_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--data", "data.npz", "--no-distill", "--no-report", "--repair-samples", 16, "--samples", 16)
    assert said("compress", "model.onnx", "-o", "small.onnx", *asked)[0] == 0
    assert 'data = "data.npz"' in (folder / "small.onnx.recipe.toml").read_text()
    shutil.move(folder, folder.with_name("moved"))
    monkeypatch.chdir(folder.parent)
    asked = ("moved/model.onnx", "-o", "b.onnx", "--recipe", "moved/small.onnx.recipe.toml")
    assert said("compress", *asked)[0] == 0
    assert (folder.parent / "b.onnx").read_bytes() == (folder.parent / "moved" / "small.onnx").read_bytes()


# What is read.


@pytest.fixture
def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.fixture(params=["/dev/zero", "pipe", "socket", "folder"])
def no_file(request: pytest.FixtureRequest, folder: Path) -> Iterator[Path]:
    """Something at whose place nothing can be read."""
    kind = request.param
    place = folder / kind
    with contextlib.ExitStack() as stack:
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind("socket")
        elif kind == "folder":
            place.mkdir()
        yield Path(kind) if kind.startswith("/") else place


def test_only_files_are_read(no_file: Path, folder: Path) -> None:
    """A pipe would wait for ever, a device never end."""
    out = ("-o", "out.onnx")
    link = folder / "link.toml"
    link.symlink_to(no_file)
    npz = folder / "link.npz"
    npz.symlink_to(no_file)
    refused("inspect", no_file)
    refused("apply", "model.onnx", no_file, *out)
    refused("verify", "model.onnx", "model.onnx", "--plan", no_file)
    refused("compress", "model.onnx", *out, "--recipe", no_file)
    refused("compress", "model.onnx", *out, "--like", no_file)
    refused("compress", "model.onnx", *out, "--data", npz)
    refused("reproduce", no_file, "-o", "out")
    refused("prune", "model.onnx", *out, "--profile", link)
    refused("prune", "model.onnx", *out, "--cost-table", no_file, "--target", "latency=0.5")
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize("what", ["plan", "manifest", "recipe", "profile", "cost table"])
@pytest.mark.parametrize("content", ["deep", "noise", "digits", "empty", "deep inside"])
def test_nonsense_in_text_is_one_line(folder: Path, what: str, content: str) -> None:
    is_toml = what in ("recipe", "profile")
    text = {
        "deep": f"a = {deep()}" if is_toml else deep(),
        "noise": bytes(range(256)).decode("latin-1"),
        "digits": f"epochs = {'9' * 5000}" if is_toml else f'{{"format": {"9" * 5000}}}',
        "empty": "[[[" if is_toml else "",
        "deep inside": f"name = {deep(150)}" if is_toml else f'{{"format": {deep(150)}}}',
    }[content]
    path = folder / ("x.toml" if is_toml else "x.json")
    path.write_bytes(text.encode("latin-1"))
    commands: dict[str, tuple[object, ...]] = {
        "plan": ("apply", "model.onnx", path, "-o", "o.onnx"),
        "manifest": ("reproduce", path, "-o", "o"),
        "recipe": ("compress", "model.onnx", "-o", "o.onnx", "--recipe", path),
        "profile": ("prune", "model.onnx", "-o", "o.onnx", "--profile", path),
        "cost table": ("prune", "model.onnx", "-o", "o.onnx", "--target", "latency=0.5", "--cost-table", path),
    }
    assert path.name in refused(*commands[what])
    assert not (folder / "o.onnx").exists()


ODD = (None, True, 7, -1, 1.5, "word", [], ["a"], {}, {"a": 1}, [[["a"]]], 1 << 80)


@pytest.mark.parametrize("key", ["versions", "run", "recipe", "inputs", "outputs", "format", "version"])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_values_in_a_manifest(folder: Path, key: str, value: Any) -> None:
    place = written(folder, f"{SHORT}seed = -1", **{key: value})  # so that no run begins
    refused("reproduce", place, "-o", "again")


@pytest.mark.parametrize("role", ["run", "__class__", "output", "command", "force", "trust", "verbose", ESCAPE, ""])
def test_odd_roles_in_a_manifest(folder: Path, role: str) -> None:
    place = with_input(folder, entry_of("data.npz", role, folder), "seed = -1")
    assert "seed" in refused("reproduce", place, "-o", "again")
    refused("reproduce", written(folder, SHORT, outputs=[{**entry_of("x", role), "repeats": True}]), "-o", "again")


@pytest.mark.parametrize(
    "key", ["data", "score", "keep", "lr", "target", "epochs", "flip", "input-shape", "width", "device"]
)
@pytest.mark.parametrize(
    "value", ["7", "1.5", "true", "nan", "1979-05-27", "[1]", "[[1]]", "{a = 1}", '"word"', '["word"]']
)
def test_odd_values_in_a_recipe(folder: Path, key: str, value: str) -> None:
    """Either they are read as on the command line, or refused: the run itself has an option that ends it."""
    (folder / "r.toml").write_text(f"{key} = {value}\n")
    refused("compress", "model.onnx", "-o", "no/where.onnx", "--recipe", "r.toml")


def table(**changes: Any) -> dict[str, Any]:
    kernel = {"name": "k", "operator": "MatMul", "ms": 1.0, "error": 0.0, "terms": [[1.0, [["", "a", 1]]]]}
    group = {"name": "w", "size": 8, "multiple": 1, "slowdown": {"1": 1.0}}
    content = {
        "format": "cpd-onnx/latency", "version": 1, "sha256": "", "ms": 1.0, "rest": 0.0, "unattributed": 0.0,
        "setting": {"batch": None, "threads": 1, "provider": "CPUExecutionProvider"}, "machine": {},
        "groups": [group], "kernels": [kernel],
    }  # fmt: skip  # a table
    return content | changes


@pytest.mark.parametrize("key", list(table()))
@pytest.mark.parametrize("value", [*ODD, [1], [{"a": 1}], [[1, [[1, 2, 3]]]]], ids=repr)
def test_odd_values_in_a_cost_table(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "t.json").write_text(json.dumps(table(**{key: value})))
    with contextlib.suppress(DataError):
        load_table(tmp_path / "t.json")


@pytest.mark.parametrize("part", ["groups", "kernels"])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_parts_of_a_cost_table(tmp_path: Path, part: str, value: Any) -> None:
    for key in table()[part][0]:
        (tmp_path / "t.json").write_text(json.dumps(table(**{part: [table()[part][0] | {key: value}]})))
        with contextlib.suppress(DataError):
            load_table(tmp_path / "t.json")


def test_a_cost_table_of_another_model_is_refused(folder: Path) -> None:
    """Also one that says it is this model's, and names groups or axes that there are none of."""
    sha = sha256(folder / "model.onnx")
    groups = [{"name": g.name, "size": len(g), "multiple": 1, "slowdown": {}} for g in _groups(folder)]
    kernels = [table()["kernels"][0] | {"terms": [[1.0, [["", "nobody", 1]]]]}]
    for changes in ({"sha256": "0"}, {"sha256": sha}, {"sha256": sha, "groups": groups, "kernels": kernels}):
        (folder / "t.json").write_text(json.dumps(table(**changes)))
        line = refused("prune", "model.onnx", "-o", "o.onnx", "--target", "latency=0.5", "--cost-table", "t.json")
        assert "cost table" in line


def _groups(folder: Path) -> Any:
    return comb(folder / "model.onnx").groups


@pytest.mark.parametrize("key", ["budget", "source", "groups", "version", "format", "made_by", "before"])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_values_in_a_plan(folder: Path, key: str, value: Any) -> None:
    plan = dict(_plan(folder))
    plan[key] = value
    (folder / "p.json").write_text(json.dumps(plan))
    for arguments in (("apply", "model.onnx", "p.json"), ("compress", "model.onnx", "--no-report", "--like", "p.json")):
        code, _, complaint = said(*arguments, "-o", "o.onnx", "--force")
        assert code in (0, 1)
        assert "defect" not in complaint
        assert complaint.count("\n") == code


@functools.lru_cache
def _planned(content: bytes) -> str:
    from cpd_onnx import run

    return run("comb, score, allocate, prune", onnx.load_from_string(content)).plan.dumps()


def _plan(folder: Path) -> Any:
    content = (folder / "model.onnx").read_bytes()
    plan = json.loads(_planned(content))
    plan["source"]["sha256"] = hashlib.sha256(content).hexdigest()
    return plan


# Training: checkpoints, caches of runs and the teacher's answers.


class Bomb:
    """What runs code where it is unpickled without care."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_a_checkpoint_runs_no_code(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from cpd_onnx.training.loop import read_checkpoint

    torch.save({"format": "cpd-onnx/checkpoint 2", "identity": "", "module": Bomb()}, "c")
    with pytest.raises(CpdError, match="cannot be read as a checkpoint"):
        read_checkpoint(Path("c"))
    for content in ([1], {"format": "cpd-onnx/checkpoint 2"}, {"format": "cpd-onnx/checkpoint 2", "identity": 7}):
        torch.save(content, "c")
        with pytest.raises(CpdError, match="c is "):
            read_checkpoint(Path("c"))
    assert not (folder / "ran").exists()


def test_a_checkpoint_of_odd_values_is_refused(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    training = ("--data", "data.npz", "--steps", 4, "--batch-size", 8, "--threads", 1, "--log-level", "quiet")
    asked = ("distill", "model.onnx", "model.onnx", "-o", "d.onnx", *training)
    place = folder / "d.onnx.checkpoint"
    content = _checkpoint(asked, place)
    values = itertools.cycle((None, "word", {"a": [1]}, [torch.zeros(2)], [1.5]))
    for key, value in zip(content, values, strict=False):
        torch.save(content | {key: value}, place)
        code, _, complaint = said(*asked, "--resume", "--force")
        assert "defect" not in complaint, (key, value, complaint)
        assert complaint.count("\n") == code, (key, value, complaint)


def _checkpoint(asked: tuple[object, ...], place: Path) -> dict[str, Any]:
    """What a run has on record that could not write its result."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpd_onnx.ir.model.Model.save", lambda *_, **__: (_ for _ in ()).throw(ModelError("no")))
        line = refused(*asked)
    assert "--resume" in line
    content: dict[str, Any] = torch.load(place, weights_only=True)
    return content


def test_a_cache_of_answers_runs_no_code(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from cpd_onnx.training.cache import AnswerCache

    def ask() -> Any:
        return AnswerCache(Path("answers"), lambda inputs: [inputs[0] + 1], b"")([torch.zeros(1, 2)])

    assert ask()[0].tolist() == [[1, 1]]
    assert ask()[0].tolist() == [[1, 1]]
    stream = io.BytesIO()
    torch.save(Bomb(), stream)
    for answer in (stream.getvalue(), b"noise", "text", 7, None):
        with sqlite3.connect("answers") as database:
            database.execute("UPDATE answers SET answer = ?", [answer])
        with pytest.raises(CpdError, match="answers holds"):
            ask()
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE mine (a)", "CREATE VIEW answers AS SELECT 1 AS question, 2 AS answer"]
)
def test_a_database_of_something_else_is_no_cache(folder: Path, statement: str) -> None:
    pytest.importorskip("torch")
    from cpd_onnx.training.cache import AnswerCache

    with sqlite3.connect("other") as database:
        database.execute(statement)
    before = (folder / "other").read_bytes()
    with pytest.raises(CpdError, match="another kind"):
        AnswerCache(Path("other"), lambda inputs: inputs, b"")
    assert (folder / "other").read_bytes() == before


# Data.


def test_pickles_in_data_are_not_opened(folder: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save("d.npz", x=np.asarray([Bomb()], object))
        refused("prune", "model.onnx", "-o", "o.onnx", "--data", "d.npz")
    assert not (folder / "ran").exists()


def test_damaged_archives_are_one_line(folder: Path) -> None:
    whole = (folder / "data.npz").read_bytes()
    np.savez_compressed("c.npz", x=np.zeros((32, 4), "f"))
    packed = (folder / "c.npz").read_bytes()
    rng = np.random.default_rng(0)
    for number in range(60):
        content = bytearray((whole, packed)[number % 2])
        for _ in range(3):
            content[rng.integers(len(content))] = rng.integers(256)
        (folder / "d.npz").write_bytes(bytes(content))
        words = ("prune", "model.onnx", "-o", "o.onnx", "--data", "d.npz", "--samples", 4, "--force")
        code, _, complaint = said(*words, "--log-level", "quiet")
        assert "defect" not in complaint, complaint
        lines = [line for line in complaint.splitlines() if not line.startswith("warning: ")]  # of values in the data
        assert len(lines) == code, complaint


def test_an_image_is_what_its_kind_says(tmp_path: Path) -> None:
    """PostScript under another name would be given to Ghostscript."""
    pytest.importorskip("PIL")
    (tmp_path / "cat.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    entry = Input("x", (1, 3, 8, 8), np.dtype("f"))
    source = ImageFolder(tmp_path, entry, ImageOptions())
    with pytest.raises(DataError, match="cannot identify image file"):
        next(source.batches(1))


def test_broken_images_are_one_line(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    entry = Input("x", (1, 3, 8, 8), np.dtype("f"))
    for ending in ("png", "jpg", "bmp", "tif", "ppm"):
        place = tmp_path / f"a.{ending}"
        image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(place)
        whole = place.read_bytes()
        for _ in range(40):
            content = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            content[rng.integers(len(content))] = rng.integers(256)
            place.write_bytes(bytes(content))
            with contextlib.suppress(DataError):
                next(ImageFolder(tmp_path, entry, ImageOptions()).batches(1))
        place.unlink()


# What is written.


@pytest.mark.parametrize("name", ["null", "full", "pipe", "socket", "linked"])
def test_devices_pipes_and_sockets_stay_what_they_are(folder: Path, name: str) -> None:
    place = Path("/dev") / name if name in ("null", "full") else folder / name
    with contextlib.ExitStack() as stack:
        if name == "pipe":
            os.mkfifo(place)
        elif name == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(name)
        elif name == "linked":
            place.symlink_to("/dev/null")
        before = place.lstat()
        for option in ("-o", "--plan", "--json"):
            others = () if option == "-o" else ("-o", "small.onnx")
            refused("prune", "model.onnx", *others, option, place, "--force")
        after = place.lstat()
    assert (after.st_mode, after.st_ino, after.st_rdev) == (before.st_mode, before.st_ino, before.st_rdev)
    assert not (folder / "small.onnx").exists()


SPELLINGS: dict[str, Callable[[Path], object]] = {
    "itself": lambda file: file,
    "absolute": lambda file: file.absolute(),
    "by a detour": lambda file: f"sub/../{file}",
    "a link": lambda file: _linked(Path("link"), lambda link: link.symlink_to(file)),
    "a hard link": lambda file: _linked(Path("hard"), lambda link: link.hardlink_to(file)),
    "a linked folder": lambda file: _linked(Path("here"), lambda link: link.symlink_to(".")) / file,
}


def _linked(link: Path, make: Callable[[Path], object]) -> Path:
    make(link)
    return link


COMMANDS: dict[str, tuple[str, ...]] = {
    "model": ("prune", "IN", "-o", "OUT"),
    "model, as JSON": ("inspect", "IN", "--json", "OUT"),
    "model, as a plan": ("prune", "IN", "-o", "small.onnx", "--plan", "OUT"),
    "model, as a log": ("compress", "IN", "-o", "small.onnx", "--log", "OUT"),
    "model, as a checkpoint": ("compress", "IN", "-o", "small.onnx", "--checkpoint", "OUT"),
    "model, as a cache": ("compress", "IN", "-o", "small.onnx", "--teacher-cache", "OUT"),
    "data": ("prune", "model.onnx", "-o", "OUT", "--data", "IN"),
    "data, scored on": ("compress", "model.onnx", "-o", "OUT", "--eval", "IN"),
    "recipe": ("compress", "model.onnx", "-o", "OUT", "--recipe", "IN"),
    "cost table": ("prune", "model.onnx", "-o", "OUT", "--cost-table", "IN"),
    "plan": ("apply", "model.onnx", "IN", "-o", "OUT"),
    "plan, as JSON": ("verify", "model.onnx", "model.onnx", "--plan", "IN", "--json", "OUT"),
    "student": ("distill", "model.onnx", "IN", "-o", "OUT"),
    "model for a target": ("deploy", "IN", "-o", "OUT", "--batch", "1"),
    "model for onnxruntime": ("deploy", "IN", "-o", "small.onnx", "--batch", "1", "--ort", "OUT"),
    "model that is measured": ("latency", "IN", "-o", "OUT"),
}  # fmt: skip  # a table


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_input_is_replaced(folder: Path, command: str, spelling: str) -> None:
    (folder / "sub").mkdir()
    (folder / "input").write_text("")
    if command.startswith("model"):
        shutil.copy("model.onnx", "input")
    before = (folder / "input").read_bytes()
    words = {"IN": "input", "OUT": SPELLINGS[spelling](Path("input"))}
    line = refused(*(words.get(word, word) for word in COMMANDS[command]), "--force")
    assert "is both an input and an output" in line
    assert (folder / "input").read_bytes() == before


def test_the_data_file_of_a_model_is_not_replaced(folder: Path) -> None:
    model = onnx.load("model.onnx")
    onnx.save_model(model, "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    before = (folder / "apart.data").read_bytes()
    for words in (
        ("prune", "apart.onnx", "-o", "apart.data"),
        ("deploy", "apart.onnx", "--batch", 1, "-o", "apart.data"),
    ):
        assert "holds weights" in refused(*words, "--force")
    assert (folder / "apart.data").read_bytes() == before


def test_the_data_of_a_model_that_was_renamed_is_not_removed(folder: Path) -> None:
    """Its name says that it belongs to an older output."""
    model = onnx.load("model.onnx")
    name = "small.onnx.0123abcd.data"
    onnx.save_model(model, "renamed.onnx", save_as_external_data=True, location=name, size_threshold=0)
    assert said("prune", "renamed.onnx", "-o", "small.onnx", "--force")[0] == 0
    assert (folder / name).exists()
    assert said("deploy", "renamed.onnx", "-o", "small.onnx", "--batch", 1, "--weights", "inside", "--force")[0] == 0
    assert (folder / name).exists()
    assert len(load("renamed.onnx").array("w")) == 4


def test_permissions_of_a_replaced_file_stay(folder: Path) -> None:
    assert said("prune", "model.onnx", "-o", "small.onnx")[0] == 0
    modes = {"small.onnx": 0o600, "small.onnx.plan.json": 0o640}
    for name, mode in modes.items():
        (folder / name).chmod(mode)
    assert said("prune", "model.onnx", "-o", "small.onnx", "--force")[0] == 0
    assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in modes} == modes


def test_a_link_at_the_place_of_an_output_is_replaced_and_not_followed(folder: Path) -> None:
    (folder / "mine").write_text("mine")
    (folder / "small.onnx").symlink_to("mine")
    assert "exists" in refused("prune", "model.onnx", "-o", "small.onnx")
    assert said("prune", "model.onnx", "-o", "small.onnx", "--force")[0] == 0
    assert (folder / "mine").read_text() == "mine"
    (folder / "dangling").symlink_to("nowhere")
    assert "exists" in refused("prune", "model.onnx", "-o", "dangling")


def test_a_log_replaces_nothing_without_force(folder: Path) -> None:
    pytest.importorskip("torch")
    (folder / "log").write_text("mine")
    asked = ("compress", "model.onnx", "-o", "small.onnx", "--data", "data.npz", "--log", "log")
    assert "log exists" in refused(*asked)
    assert (folder / "log").read_text() == "mine"


# Names on a terminal.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü →", "plain ü →"),
        ("\x1b[31m\a", r"\x1b[31m\x07"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b\x7f\u202e\u2028", r"\x9b\x7f\u202e\u2028"),
        ("\udcff", r"\xff"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_is_printed_is_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.isprintable()


def clean(*arguments: object) -> str:
    """What a command prints, none of which a terminal obeys."""
    code, out, err = said(*arguments)
    assert code in (0, 1, 2)
    for line in (out + err).splitlines():
        assert line.isprintable(), line
    assert "[2J" not in (out + err) or "\\x1b[2J" in (out + err) or "\\u001b[2J" in (out + err)
    return out + err


def test_names_in_a_model_reach_no_terminal_raw(folder: Path) -> None:
    name = f"{ESCAPE}\nverified: all is well\r\x9b\u202e"
    model = from_text(TEXT)
    for node in model.graph.node:
        node.name = f"{name}{node.op_type}"
        node.input[:] = [f"{name}{n}" for n in node.input]
        node.output[:] = [f"{name}{n}" for n in node.output]
    for entry in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        entry.name = f"{name}{entry.name}"
    strange = model.graph.node.add(op_type=name, name=name, domain="x")
    strange.input.append(model.graph.node[0].output[0])
    strange.output.append(f"{name}strange")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    assert r"\x1b[2Jno\nverified" in clean("inspect", "m.onnx")
    clean("inspect", "m.onnx", "--json", "-")
    del model.graph.node[-1]
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    clean("prune", "m.onnx", "-o", "small.onnx", "--input-shape", "nobody:1,4")
    clean("prune", "m.onnx", "-o", "small.onnx", "--data", "data.npz")
    clean("prune", "m.onnx", "-o", "small.onnx")
    clean("verify", "m.onnx", "small.onnx")
    clean("deploy", "m.onnx", "-o", "d.onnx", "--batch", "1")
    clean("--verbose", "prune", "m.onnx", "-o", "x.onnx", "--data", "data.npz")


@pytest.mark.parametrize("name", [f"{ESCAPE}.onnx", "two\nlines.onnx", "\udcff\udcfe.onnx"])
def test_names_of_files_reach_no_terminal_raw(folder: Path, name: str) -> None:
    shutil.copy("model.onnx", name)
    clean("inspect", name)
    assert "nowhere" in clean("inspect", f"{name}nowhere")
    code, out, err = said("prune", name, "-o", f"small{name}")
    assert code == (1 if "\udcff" in name else 0), err
    assert (out + err).replace("\n", "").isprintable()
    if code == 0:
        clean("verify", name, f"small{name}")
        clean("compress", name, "-o", f"c{name}", "--no-report")
        clean("reproduce", f"c{name}.manifest.json", "-o", "again")
    clean("prune", "model.onnx", "-o", "s.onnx", "--target", name)
    clean("prune", "model.onnx", "-o", "s.onnx", name)


def test_keys_and_values_of_files_reach_no_terminal_raw(folder: Path) -> None:
    key = json.dumps(ESCAPE)
    (folder / "r.toml").write_text(f"{key} = 1\n")
    clean("compress", "model.onnx", "-o", "o.onnx", "--recipe", "r.toml")
    (folder / "r.toml").write_text(f"data = {key}\n")
    clean("compress", "model.onnx", "-o", "o.onnx", "--recipe", "r.toml")
    (folder / "p.toml").write_text(f"name = {key}\nallows = ['Conv']\nmultiple = 2\n")
    assert r"\x1b[2J" in clean("deploy", "model.onnx", "-o", "o.onnx", "--profile", "p.toml")
    clean("reproduce", written(folder, SHORT, versions={ESCAPE: ESCAPE}), "-o", "again")
    clean("reproduce", with_input(folder, {"role": "data", "file": f"../{ESCAPE}", "sha256": ESCAPE}), "-o", "again")


def test_progress_shows_names_as_they_are() -> None:
    column, line = console.Words("{task.description}"), Progress(disable=True)
    task = line.add_task(f"{ESCAPE}[/red]")
    assert str(column.render(line.tasks[task])) == r"\x1b[2Jno[/red]"


def test_a_recipe_holds_names_as_they_are(folder: Path) -> None:
    (folder / "a\x7f\x1bü.npz").write_bytes((folder / "data.npz").read_bytes())
    asked = ("--data", "a\x7f\x1bü.npz", "--no-distill", "--no-report", "--repair-samples", 16, "--samples", 16)
    assert said("compress", "model.onnx", "-o", "small.onnx", *asked)[0] == 0
    assert said("compress", "model.onnx", "-o", "b.onnx", "--recipe", "small.onnx.recipe.toml")[0] == 0
    shutil.copy("data.npz", "\udcff.npz")
    line = refused("compress", "model.onnx", "-o", "c.onnx", "--no-distill", "--data", "\udcff.npz")
    assert "not UTF-8" in line
    assert not list(folder.glob("c.onnx*"))


# The table.


def test_every_line_of_the_table_names_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "docs" / "security.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| file ")]
    defined = {
        (path.name, name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, (set(named) - defined, row)


# Faults.


def test_output_that_cannot_be_written_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    for words in (["inspect", "model.onnx"], ["inspect", "model.onnx", "--json", "-"], ["operators"]):
        for stream in (Full(), None):
            complaint = io.StringIO()
            with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(stream):  # type: ignore[type-var]  # None: closed
                code = main(words)
            assert code == 1
            assert complaint.getvalue().count("\n") == 1
            assert "standard output" in complaint.getvalue()


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    for words in (["inspect", "model.onnx"], ["inspect", "model.onnx", "--json", "-"]):
        with contextlib.redirect_stdout(Gone()), contextlib.redirect_stderr(io.StringIO()) as complaint:
            assert main(words) == 141
        assert complaint.getvalue() == ""


@pytest.mark.parametrize("streams", [">&-", ">/dev/full", "2>/dev/full"])
def test_streams_that_are_closed_or_full(folder: Path, streams: str) -> None:
    """The process itself: what a library prints goes into no file, and Python does not fail when it ends."""
    line = f"{sys.executable} -m cpd_onnx apply none.onnx none.json -o o.onnx {streams}"
    if streams.startswith(">"):
        line = f"{sys.executable} -m cpd_onnx operators {streams}"
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == (0 if "2>" in streams else 1), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits")
@pytest.mark.parametrize("kibibytes", [30_000, 200_000])
def test_too_little_memory_for_the_libraries_is_one_line(folder: Path, kibibytes: int) -> None:
    line = f"ulimit -v {kibibytes} && {sys.executable} -m cpd_onnx inspect model.onnx"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert "ulimit -v" in done.stderr


@pytest.mark.parametrize("error", [ImportError("x: cannot map"), MemoryError(), SystemError("x"), KeyboardInterrupt()])
def test_libraries_that_cannot_be_loaded_are_one_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        """Fails where the command line is looked for."""

        def find_spec(self, name: str, *_: object) -> None:
            if name == "cpd_onnx.cli.main":
                os.write(2, b"OpenBLAS: a page\nof complaints\n")
                raise error

    monkeypatch.delitem(sys.modules, "cpd_onnx.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    start = loading.Start()
    assert start.run() == 1
    assert start.is_done
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("length", [230, 245, 255, 300, 5000])
def test_names_that_get_too_long(folder: Path, length: int) -> None:
    """Also where only the names of what lies beside would."""
    name = "a" * length
    refused("prune", "model.onnx", "-o", f"{name}a" * 2)
    for words in (("prune", "model.onnx"), ("compress", "model.onnx"), ("apply", "model.onnx", "model.onnx")):
        if length < 240:
            continue
        refused(*words, "-o", name)
    refused("inspect", name)
    refused("prune", "model.onnx", "-o", "o.onnx", "--data", f"{name}x")
    refused("inspect", "model.onnx", "--json", f"{name * 2}")
    assert not [path for path in folder.iterdir() if path.name.startswith(("a", "o"))]


@pytest.mark.parametrize("words", ["prune model.onnx -o", "compress model.onnx -o", "apply model.onnx model.onnx -o"])
@pytest.mark.parametrize("output", ["", ".", "..", "/", "sub/.."])
def test_outputs_without_a_name(folder: Path, words: str, output: str) -> None:
    (folder / "sub").mkdir()
    before = set(folder.parent.rglob("*"))
    refused(*words.split(), output)
    assert set(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("command", ["prune", "compress", "deploy", "distill"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_disk_that_fills_leaves_all_files_or_none(
    folder: Path, command: str, monkeypatch: pytest.MonkeyPatch, *, is_there: bool
) -> None:
    """Whichever of the files no longer fits: a model stands nowhere without its plan, nor a plan without its model."""
    words: dict[str, list[object]] = {
        "prune": ["prune", "model.onnx", "--weights", "beside"],
        "compress": ["compress", "model.onnx", "--no-report"],
        "deploy": ["deploy", "model.onnx", "--batch", 1, "--ort", "small.ort"],
        "distill": ["distill", "model.onnx", "model.onnx", "--data", "data.npz", "--steps", 1, "--batch-size", 8, "--threads", 1],
    }  # fmt: skip  # a table
    if command == "distill":
        pytest.importorskip("torch")
    line = [*words[command], "-o", "small.onnx"]
    if is_there:
        assert said(*line)[0] == 0
        line += ["--force", *(["--target", "channels=0.8"] if command in ("prune", "compress") else [])]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for step in ("give_name", "replace_target"):
        for number in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(files._PendingFile, step, _failing_at(number, getattr(files._PendingFile, step)))
                code, _, complaint = said(*line)
            if code == 0:
                continue  # there are fewer files
            assert "No space left on device" in complaint
            after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
            assert {name for name in after if "checkpoint" not in name} == set(before)
            assert all(after[name] == content for name, content in before.items())
            for path in folder.glob("*checkpoint*"):
                assert path.name in complaint
                path.unlink()


def _failing_at(number: int, real: Callable[[Any], None]) -> Callable[[Any], None]:
    """The same, but for the file of that number, for which the disk has no room."""
    count = itertools.count()

    def step(part: Any) -> None:
        if next(count) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(part)

    return step


def test_a_failed_run_says_what_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on from there; what nobody can go on from is not left."""

    def fail(*_: object, **__: object) -> None:
        raise UnsupportedError("no")

    with monkeypatch.context() as patch:
        patch.setattr("cpd_onnx.workflow.compress.verify_files", fail)
        _, _, complaint = said("compress", "model.onnx", "-o", "small.onnx", "--no-report")
    left = {path.name for path in folder.glob("small*")}
    assert left == {"small.onnx.checkpoint.1.json", "small.onnx.checkpoint.1.onnx"}
    assert "no; checkpoint written to" in complaint
    assert "--resume" in complaint
    assert all(name in complaint for name in left)
    assert said("compress", "model.onnx", "-o", "small.onnx", "--no-report", "--resume")[0] == 0
    assert not list(folder.glob("*checkpoint*"))


@pytest.mark.parametrize("key", ["identity", "chosen", "repaired", "removed", "before", "notes", "latency"])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_values_in_a_stage(folder: Path, key: str, value: Any) -> None:
    combed = _groups(folder)
    place = folder / "small.onnx.checkpoint"
    costs = {"macs": 1.0, "params": 1.0, "channels": 1.0, "bytes": 1.0}
    chosen = {"removed": [[0] for _ in combed], "before": costs, "after": costs, "notes": [], "latency": {}}
    content = {"identity": "", "chosen": chosen, "repaired": None}
    (content if key in content else chosen)[key] = value
    cache = RunCache(place, "")
    cache.files(1)[0].write_text(json.dumps(content))
    with contextlib.suppress(CpdError):
        cache.load(1, comb(folder / "model.onnx"))
