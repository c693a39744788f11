"""Audit: everything that shows where a file comes from, in one folder or archive.

The original, the model, plan, manifest, recipe and report, the outcome of `verify`, the SHA-256 of each file, and
scripts that check and repeat it all. Only files that have the SHA-256 of their manifest are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cpd_onnx.errors import CpdError, PlanError
from cpd_onnx.io import trust
from cpd_onnx.io.files import read_json
from cpd_onnx.ir.model import load
from cpd_onnx.report import checks, document, manifest
from cpd_onnx.report.tables import REPORT_FORMAT, REPORT_VERSION, size_of
from cpd_onnx.version import __version__
from cpd_onnx.workflow.evidence import bundle, repeating
from cpd_onnx.workflow.evidence.bundle import Stored
from cpd_onnx.workflow.evidence.repeating import Command
from cpd_onnx.workflow.places import json_text, plan_path_of, require_outputs, write_json
from cpd_onnx.workflow.prune import verify
from cpd_onnx.workflow.requests import Audit, Observer, VerifyFile, ignore

FORMAT = "cpd-onnx/audit"
"""Format of the JSON result."""
_RUNS = ("compress", "deploy")
_MODEL, _PLAN, _ORT, _C = "model", "plan", "ort", "c"
_MADE = (_MODEL, "weights", _PLAN)
"""Roles of outputs that a run cannot lack; others, such as a report, may have been deleted since."""
_OPTIONS = {"like": "plan", "cost_table": "cost-table", "profile": "profile"}
_LONGEST = 16
"""Number of consecutive runs up to which a file is traced back; a heuristic against cycles."""


@dataclass(frozen=True, eq=False)
class _Run:
    """A run that a manifest records."""

    place: Path
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The command."""
        return str(self.content.get("run", "compress"))

    def outputs(self, *roles: str) -> list[Mapping[str, Any]]:
        """Return the outputs that have one of the roles, or all."""
        return [entry for entry in self.content["outputs"] if not roles or entry["role"] in roles]

    def input(self, role: str) -> Mapping[str, Any] | None:
        """Return the input of a role."""
        return next((entry for entry in self.content["inputs"] if entry["role"] == role), None)

    def model(self) -> Mapping[str, Any]:
        """Return the entry of the model that was written."""
        found = next(iter(self.outputs(_MODEL)), None)
        if found is None or self.name not in _RUNS or self.input(_MODEL) is None:
            raise PlanError(f"manifest {self.place} names no model, or a run other than {' or '.join(_RUNS)}")
        return found


@dataclass(eq=False)
class _Collected:
    """What was found: the runs from the file back to the original, and all files by their path in the bundle."""

    runs: list[_Run] = field(default_factory=list)
    files: dict[str, Stored] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def take(self, name: str, path: Path, sha256: str) -> str:
        """Add a file that must have a SHA-256, and return its path in the bundle.

        Raises CpdError if it does not have it, or the path is not that of a file below a folder on every system.
        """
        if not name.isprintable() or "\\" in name or not {*name.split("/")}.isdisjoint(("", ".", "..")):
            raise CpdError(f"{name!r} is not a file name that an audit can hold")
        if not path.is_file():
            raise CpdError(f"{path} does not exist: an audit needs all files of the run")
        found = manifest.file_entry(path, "")["sha256"]
        if found != sha256:
            raise CpdError(f"{path} has changed: its SHA-256 is {found}, and the manifest names {sha256}")
        if name in self.files and self.files[name].sha256 != sha256:
            raise CpdError(f"two different files would be {name} in the audit: {path} and {self.files[name].path}")
        self.files[name] = Stored(path, sha256)
        return name


def audit(request: Audit, observer: Observer = ignore) -> dict[str, Any]:
    """Collect and verify everything about a file, write it, and return the result as plain values."""
    document.require("fpdf", "jinja2", "matplotlib")
    observer("read", 0, None)
    first, file = _first(request.file)
    found = _collected(request, first)
    original, name = _original(request, found)
    sha256 = str(manifest.file_entry(original, "")["sha256"])
    observer("verify", 0, None)
    outcome = _verified(request, found, file, original)
    observer("write", 0, None)
    entries = {**found.files, **_originals(request, found, original, name)}
    facts: dict[str, Any] = {
        "format": FORMAT, "version": 1, "file": file.name, "tool": f"cpd-onnx {__version__}",
        "original": {"file": name, "sha256": sha256, "is_included": not request.without_original},
        "verification": outcome,
    }  # fmt: skip  # a table
    commands = list(_commands(found, file.name, facts["original"]))
    versions = repeating.pinned(found.runs[0].content.get("versions") or {})
    size = size_of(load(original), original)
    made = _documents(found, outcome, {"file": name, "sha256": sha256, "bytes": size}) | {
        "verification.json": json_text(facts).encode(),
        "verification.txt": checks.text(outcome).encode(),
        "repeat.sh": repeating.shell(commands, versions),
        "repeat.py": repeating.python(commands, versions),
        "README.md": _read_me(found, facts, commands).encode(),
    }
    taken = sorted({*made, bundle.SUMS} & entries.keys())
    if taken:
        raise CpdError(f"{taken[0]} is the name of a file that the audit itself makes: rename the model")
    rows = _write(request, {**entries, **made})
    content = facts | {"output": str(request.output), "files": rows, "missing": found.missing}
    write_json(request, content)
    return content


def _write(request: Audit, entries: Mapping[str, Stored | bytes]) -> list[dict[str, object]]:
    """Write the bundle; raises ModelError if a file of it exists, or would replace what is read."""
    reads = [entry.path for entry in entries.values() if isinstance(entry, Stored)]
    if request.output.suffix.lower() == bundle.ZIP:
        require_outputs(request, request.output, reads=reads)
        return bundle.write(request.output, entries)
    if request.output.exists() and not request.output.is_dir():
        raise CpdError(f"{request.output} is a file: choose a folder, or a name that ends in {bundle.ZIP}")
    paths = [request.output / name for name in (*entries, bundle.SUMS)]
    with bundle.folders(request.output, *dict.fromkeys(path.parent for path in paths)):
        require_outputs(request, *paths, reads=reads)
        return bundle.write(request.output, entries)


# What belongs to the file.


def _first(path: Path) -> tuple[_Run, Path]:
    """Return the run that wrote a file, and that file; a manifest stands for the model of its run."""
    if path.name.endswith(".json"):
        run = _Run(path, manifest.read(path))
        return run, trust.inside(run.model()["file"], path, "the model instead of its manifest")
    found = _run_of(path)
    if found is None:
        raise CpdError(f"{path} has no manifest of {' or '.join(_RUNS)} in its folder: an audit needs one")
    return found, path


def _run_of(path: Path) -> _Run | None:
    """Return the run that wrote a file, by the manifest beside it or another one in its folder."""
    if not path.is_file():
        raise CpdError(f"{path} does not exist")
    place = manifest.place_of(path)
    for each in dict.fromkeys((place, *sorted(path.parent.glob("*.manifest.json")))):
        if not each.is_file():
            continue
        try:
            run = _Run(each, manifest.read(each))
        except PlanError:
            if each == place:
                raise
            continue
        if any(Path(entry["file"]).name == path.name for entry in run.outputs(_MODEL, _ORT, _C)):
            return run
    return None


def _collected(request: Audit, run: _Run) -> _Collected:
    """Return all files of a run, and of the runs that its input comes from."""
    found = _Collected()
    current: _Run | None = run
    while current is not None:
        found.runs.append(current)
        if len(found.runs) > _LONGEST:
            raise PlanError(f"{request.file} comes from more than {_LONGEST} runs")
        _take_run(request, current, found)
        current = _before(request, current, found)
    return found


def _take_run(request: Audit, run: _Run, found: _Collected) -> None:
    """Take the manifest and the outputs of a run, and its inputs that are files in its folder but models or data."""
    run.model()  # raises PlanError if there is none
    found.take(run.place.name, run.place, str(manifest.file_entry(run.place, "")["sha256"]))
    for entry in run.outputs():
        path = _place_of(request, run, entry)
        if path is not None:
            found.take(_name_in(run, entry, path), path, entry["sha256"])
        elif entry["role"] in _MADE:
            raise CpdError(f"{entry['file']}, which {run.place} names, is not in its folder: name it with --plan")
        else:
            found.missing.append(f"{PurePosixPath(entry['file']).name}, a {entry['role']} that is not there any more")
    for role in _OPTIONS.values():
        entry_of = run.input(role)
        path = None if entry_of is None else _place_of(request, run, entry_of)
        if entry_of is not None and path is not None:
            found.take(_name_in(run, entry_of, path), path, entry_of["sha256"])


def _place_of(request: Audit, run: _Run, entry: Mapping[str, Any]) -> Path | None:
    """Return the path of a file of a run: that of --plan, or one in the folder of the manifest; None without one."""
    if entry["role"] == _PLAN and request.plan is not None and _has(request.plan, entry["sha256"]):
        return request.plan
    try:
        path = trust.inside(entry["file"], run.place, "--plan")
    except CpdError:
        return None
    return path if path.is_file() else None


def _name_in(run: _Run, entry: Mapping[str, Any], path: Path) -> str:
    """Return the path of a file in the bundle: as in the folder of the manifest, or its name if it is elsewhere."""
    base = run.place.parent.resolve()
    if path.parent.resolve().is_relative_to(base):
        return (path.parent.resolve() / path.name).relative_to(base).as_posix()
    return PurePosixPath(entry["file"]).name


def _before(request: Audit, run: _Run, found: _Collected) -> _Run | None:
    """Return the run that wrote the input of a deploy run, and take that input; None if it is the original."""
    if run.name != "deploy":
        return None
    entry = run.input(_MODEL)
    assert entry is not None
    source = _source(request, run, entry)
    if source is None:
        return None
    before, plan = _run_of(source), plan_path_of(source)
    if before is None and not plan.is_file():
        return None
    found.sources.append(source)
    found.take(source.name, source, entry["sha256"])
    if before is None:
        for path, name in ((plan, plan.name), *((path, _beside(source, path)) for path in load(source).data_files)):
            found.take(name, path, str(manifest.file_entry(path, "")["sha256"]))
    return before


def _source(request: Audit, run: _Run, entry: Mapping[str, Any]) -> Path | None:
    """Return the path of the input of a deploy run; None if it is the original that --model names."""
    local = run.place.parent / PurePosixPath(entry["file"]).name
    source = next((path for path in (*request.via, local) if _has(path, entry["sha256"])), None)
    if source is not None or (request.model is not None and _has(request.model, entry["sha256"])):
        return source
    if local.is_file():
        raise CpdError(f"{local} has changed: its SHA-256 must be {entry['sha256']}")
    raise CpdError(
        f"{local.name}, which {run.place} was made from, is not in its folder: name it with --via, or with --model if "
        "it is the original"
    )


def _has(path: Path, sha256: str) -> bool:
    return path.is_file() and manifest.file_entry(path, "")["sha256"] == sha256


# The original.


def _input_of(found: _Collected) -> Mapping[str, Any]:
    """Return the entry of the original: the input of the earliest run."""
    entry = found.runs[-1].input(_MODEL)
    assert entry is not None
    return entry


def _original(request: Audit, found: _Collected) -> tuple[Path, str]:
    """Return the original and its name in the bundle; a pruned file without a manifest does not say where it is."""
    run, entry = found.runs[-1], _input_of(found)
    is_unknown = bool(found.sources) and run.name == "deploy" and _has(found.sources[-1], entry["sha256"])
    if is_unknown and request.model is None:
        raise CpdError(f"nothing says which original {found.sources[-1]} was pruned from: name it with --model")
    path = request.model or trust.inside(entry["file"], run.place, "--model")
    if not path.is_file():
        raise CpdError(f"{path} does not exist: name the original with --model")
    if not is_unknown and not _has(path, entry["sha256"]):
        raise CpdError(f"{path} has changed: its SHA-256 must be {entry['sha256']}")
    return path, path.name if is_unknown else PurePosixPath(entry["file"]).name


def _originals(request: Audit, found: _Collected, original: Path, name: str) -> dict[str, Stored]:
    """Return the files of the original: the model, and its weights if they are beside it."""
    if request.without_original:
        return {}
    taken = _Collected(files=dict(found.files))
    for path, at in ((original, name), *((path, _beside(original, path)) for path in load(original).data_files)):
        taken.take(at, path, str(manifest.file_entry(path, "")["sha256"]))
    return taken.files


def _beside(original: Path, path: Path) -> str:
    """Return the path of a data file relative to the folder of its model, which the model names it by."""
    return path.resolve().relative_to(original.parent.resolve()).as_posix()


# What is made for the audit.


def _verified(request: Audit, found: _Collected, file: Path, original: Path) -> dict[str, Any]:
    """Return the outcome of `verify`; raises ProofError if the file does not match."""
    first = found.runs[0]
    plans = (_place_of(request, run, entry) for run in found.runs for entry in run.outputs(_PLAN))
    plan = next((path for path in plans if path is not None), None)
    is_deployed = first.name == "deploy"
    return verify(
        VerifyFile(
            original=original, pruned=file, plan=plan, manifest=first.place if is_deployed else None,
            via=tuple(found.sources) if is_deployed else (),
        )
    )  # fmt: skip  # what and how


def _documents(found: _Collected, outcome: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the reports that the runs did not write: the PDF of each, and all formats where there was none."""
    made: dict[str, bytes] = {}
    for run in found.runs:
        base = PurePosixPath(run.model()["file"]).name
        content = _content_of(run, found)
        if content is None:
            content = _deployed(run, outcome, original)
            made[f"{base}.report.json"] = json_text(content).encode()
        made |= _pages(base, content, found)
    return made


def _pages(base: str, content: Mapping[str, Any], found: _Collected) -> dict[str, bytes]:
    """Return the report of a run in the formats that it is not there in."""
    kinds: dict[str, Callable[[], bytes]] = {
        "pdf": lambda: document.pdf(content),
        "html": lambda: document.html(content).encode(),
        "md": lambda: document.markdown(content).encode(),
    }
    names = {kind: f"{base}.report.{kind}" for kind in kinds}
    try:
        return {names[kind]: make() for kind, make in kinds.items() if names[kind] not in found.files}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CpdError(f"{base}.report.json is not the content of a report: {type(error).__name__}: {error}") from error


def _content_of(run: _Run, found: _Collected) -> dict[str, Any] | None:
    """Return the content of the report of a run; None if it wrote none, or it is not there any more."""
    names = [PurePosixPath(entry["file"]).name for entry in run.outputs("report")]
    stored = next((found.files[name] for name in names if name.endswith(".json") and name in found.files), None)
    if stored is None:
        return None
    try:
        content = read_json(stored.path)
        document.check(content)
    except (ValueError, AttributeError) as error:
        raise CpdError(f"{stored.path} is not a report: {error}") from error
    return dict(content)


def _deployed(run: _Run, outcome: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of a run that wrote none, from its manifest and the outcome of `verify`."""
    model = run.model()
    name = PurePosixPath(model["file"]).name
    size = sum(entry.get("bytes") or 0 for entry in run.outputs(_MODEL, "weights"))
    steps = [_step(step) for step in run.content.get("steps") or () if isinstance(step, dict)]
    proof = {**outcome, "trained": len(outcome["trained"])} if "trained" in outcome else None
    known = {key: run.content.get(key) for key in ("versions", "machine", "seed")}
    return {
        "format": REPORT_FORMAT, "version": REPORT_VERSION, "title": name,
        "source": {"file": original["file"], "sha256": original["sha256"]},
        "output": {"file": name, "sha256": model["sha256"]},
        "bytes": {"before": original["bytes"], "after": size},
        "deployment": {"steps": steps} if steps else None,
        "verification": proof and {key: value for key, value in proof.items() if key not in ("deployed", "measured")},
        "notes": ["this report was made from the manifest: speed and accuracy were not measured"],
        "provenance": {
            "tool": f"cpd-onnx {known['versions'].get('cpd-onnx', '') if known['versions'] else ''}".strip(),
            "command": " ".join(map(str, run.content.get("command") or ())), "manifest": run.place.name,
            **{key: value for key, value in known.items() if value is not None},
            "files": [{"file": PurePosixPath(e["file"]).name, "bytes": e.get("bytes"), "sha256": e["sha256"]}
                      for e in run.outputs()],
        },
    }  # fmt: skip  # a table


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    found = step.get("difference")
    difference = found if isinstance(found, dict) else {}
    known = {key: step[key] for key in ("name", "what", "bytes", "notes") if key in step}
    return {"name": "", **known, "difference": difference.get("largest"), "agreement": difference.get("agreement")}


def _commands(found: _Collected, file: str, original: Mapping[str, Any]) -> Iterator[Command]:
    """Yield the commands that verify the file and repeat its runs, the earliest first."""
    place, of_original = original["file"], {}
    if not original["is_included"]:
        place, of_original = "$ORIGINAL", {"ORIGINAL": f"the original, {place}, SHA-256 {original['sha256']}"}
    plans = [entry for run in found.runs for entry in run.outputs(_PLAN)]
    more = (
        []
        if found.runs[0].name == "compress"
        else [word for source in found.sources for word in ("--via", source.name)]
    )
    if plans and f"{found.runs[-1].model()['file']}.plan.json" != plans[0]["file"]:
        more += ["--plan", _name_of(found, plans[0])]
    yield Command(("verify", place, file, *more), of_original)
    variables: dict[str, str] = {}
    for run in reversed(found.runs):
        yield _repeat(found, run, place, of_original, variables)


def _name_of(found: _Collected, entry: Mapping[str, Any]) -> str:
    """Return the path in the bundle of a file that a manifest names."""
    return next(name for name, stored in found.files.items() if stored.sha256 == entry["sha256"])


def _repeat(
    found: _Collected, run: _Run, original: str, of_original: Mapping[str, str], variables: dict[str, str]
) -> Command:
    """Return the command that repeats a run; `variables` are the names of those that hold data, by SHA-256."""
    words = ["reproduce", run.place.name]
    needs: dict[str, str] = {}
    for entry in run.content["inputs"]:
        role, sha256 = entry["role"], entry["sha256"]
        if role == _MODEL:
            is_original = run is found.runs[-1] and not (run.name == "deploy" and found.sources)
            words += ["--model", original if is_original else _name_of(found, entry)]
            needs |= of_original if is_original else {}
        elif role in ("data", "watch"):
            name = variables.setdefault(sha256, f"DATA{len(variables) + 1}" if variables else "DATA")
            words += [f"--{role}", f"${name}"]
            needs[name] = f"{role} of the run, {PurePosixPath(entry['file']).name}, SHA-256 {sha256}"
        elif role in _OPTIONS.values() and any(stored.sha256 == sha256 for stored in found.files.values()):
            words += [f"--{role}", _name_of(found, entry)]
    return Command(tuple(words), needs, run.model()["file"])


def _read_me(found: _Collected, facts: Mapping[str, Any], commands: Sequence[Command]) -> str:
    """Return what is in the bundle, and how it is checked."""
    original = facts["original"]
    kept = "" if original["is_included"] else ", which is not included"
    lines = [
        f"# Audit of {document.escaped(facts['file'])}",
        "",
        f"Made by {facts['tool']} from the original {document.escaped(original['file'])}{kept},",
        f"SHA-256 {original['sha256']}.",
        "",
        "- `verification.txt` and `.json`: the outcome of `cpd-onnx verify`",
        "- `*.report.html`, `.md`, `.pdf` and `.json`: the report of each run",
        "- `*.manifest.json`, `*.plan.json`, `*.recipe.toml`: what was done, and with which inputs and options",
        "- `SHA256SUMS`: checked by `sha256sum -c SHA256SUMS`",
        "- `repeat.sh`, `repeat.py`: check the files, verify the model and repeat the runs",
    ]
    needs = {name: what for command in commands for name, what in command.needs.items()}
    lines += ["", "Not included, to be named when the runs are repeated:", ""] if needs else []
    lines += [f"- {name}: {document.escaped(what)}" for name, what in needs.items()]
    lines += ["", "Not included:", ""] if found.missing else []
    lines += [f"- {document.escaped(text)}" for text in found.missing]
    return "\n".join(lines) + "\n"
