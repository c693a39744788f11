"""Chain: a file that went through `deploy`, back through its manifest to the pruned file, its plan and the original.

The steps that the manifest has on record are done again, which takes no data: an int8 step has the ranges of its
calibration on record. The file must be what comes out, value for value, and have the SHA-256 that the manifest names.
Files are looked for in the folder of the manifest only, and must have the SHA-256 that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpd_onnx.data.sources import Source
from cpd_onnx.deploy.steps import compared, feeds_for, ort_difference, redo
from cpd_onnx.errors import InconclusiveError, PlanError, ProofError
from cpd_onnx.ir.differences import differences
from cpd_onnx.ir.model import Array, Model, load
from cpd_onnx.proof.comparison import Difference
from cpd_onnx.proof.files import FileVerification, verify_files
from cpd_onnx.report import manifest
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.runtime import bench
from cpd_onnx.runtime.sessions import Feed

_LONGEST = 16
"""Files that were made of one another, at most."""
_ORT = "ort"


@dataclass(frozen=True)
class Given:
    """What is known beside the original and the file.

    Attributes:
        plan: of the pruned file; None is the one beside it.
        via: files from which others were made, wherever they are.
        feeds: inputs for the proof of the pruned file; random ones without.
        source: gives samples for a model to measure the steps on; None where there are none.
    """

    plan: Path | None = None
    via: Sequence[Path] = ()
    feeds: Callable[[], Iterable[Mapping[str, Array]] | None] = lambda: None
    source: Callable[[Model], Source | None] = lambda _: None


@dataclass(frozen=True)
class StepCheck:
    """One step that was done again.

    Attributes:
        name: of the step.
        what: it did, in words.
        recorded: difference that the manifest names, as plain values; None where it was not measured.
        measured: the same here.
    """

    name: str
    what: str
    recorded: Mapping[str, Any] | None
    measured: Difference | None


@dataclass(frozen=True)
class Link:
    """A file, what it was made of, and how."""

    file: str
    source: str
    steps: tuple[StepCheck, ...]


@dataclass(frozen=True)
class Chain:
    """Outcome of following a deployed file back to the original.

    Attributes:
        links: from the pruned file to the deployed one.
        pruned: the check of the pruned file; None where the original itself was deployed.
        measured: how far outputs of the deployed file are from the original's.
    """

    links: tuple[Link, ...] = ()
    pruned: FileVerification | None = None
    measured: Difference | None = None


@dataclass(frozen=True, eq=False)
class _Manifest:
    """A manifest of `deploy` that names a file."""

    path: Path
    content: Mapping[str, Any]
    entry: Mapping[str, Any]

    @property
    def source(self) -> Mapping[str, Any]:
        """The entry of the model that the file was made of."""
        for entry in self.content["inputs"]:
            if entry["role"] == "model":
                found: Mapping[str, Any] = entry
                return found
        raise PlanError(f"manifest {self.path} does not name the model that went in")

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """The steps that were done, each with its options."""
        steps = self.content.get("steps")
        if not isinstance(steps, list) or not all(
            isinstance(s, dict) and isinstance(s.get("name"), str) for s in steps
        ):
            raise PlanError(f"manifest {self.path} names no steps")
        if not all("options" in step for step in steps):
            raise PlanError(f"manifest {self.path} is of a version that put no options on record: deploy again")
        return [step for step in steps if step["options"] is not None]


def manifest_of(path: Path, named: Path | None = None) -> _Manifest | None:
    """The manifest of `deploy` that names a file: the given one, that beside it, or another one of its folder."""
    if named is not None:
        found = _naming(named, path)
        if found is None:
            raise PlanError(f"manifest {named} is not of a deploy that made {path.name}")
        return found
    places = [manifest.place_of(path), *sorted(path.parent.glob("*.manifest.json"))]
    for place in places:
        if place.is_file() and (found := _naming(place, path)) is not None:
            return found
    return None


def _naming(place: Path, path: Path) -> _Manifest | None:
    """A manifest, if it is one of `deploy` that names the file as made by it."""
    try:
        content = manifest.read(place)
    except PlanError:
        if place == manifest.place_of(path):
            raise
        return None
    if content.get("run") != "deploy":
        return None
    for entry in content["outputs"]:
        if entry["role"] in ("model", _ORT) and Path(entry["file"]).name == path.name:
            return _Manifest(place, content, entry)
    return None


def is_intact(path: Path, there: _Manifest) -> bool:
    """Whether a file has the SHA-256 that its manifest names."""
    return bool(_sha256(path) == there.entry["sha256"])


def verify_deployed(original: Model, path: Path, there: _Manifest, given: Given | None = None) -> Chain:
    """Follow a deployed file back to the original, and check each step on the way.

    Raises:
        PlanError: a manifest or plan is malformed, or a file is not there or another one than it names.
        ProofError: the file is not what the steps make, or the pruned file is not what its plan makes of the original.
        InconclusiveError: the steps give something else here, with other versions or on another processor than then.
    """
    return _Follower(original, given or Given()).chain(path, there, 1)


@dataclass(eq=False)
class _Follower:
    original: Model
    given: Given
    feeds: list[Feed] = field(default_factory=list)

    def chain(self, path: Path, there: _Manifest, length: int) -> Chain:
        """The chain that ends in a file."""
        if length > _LONGEST:
            raise PlanError(f"{path} was made in more than {_LONGEST} runs of deploy: name the pruned file with --via")
        source = self.source(path, there)
        before, base = self.base(source, length)
        link = self.link(path, there, source, before)
        measured = None
        if there.entry["role"] != _ORT:
            measured = compared(self.original, load(path), self.feeds, "all", lambda _: None) if self.feeds else None
        return Chain((*base.links, link), base.pruned, measured)

    def source(self, path: Path, there: _Manifest) -> Path:
        """The file that another one was made of: one that was given, or one in the folder of the manifest."""
        wanted = there.source
        for candidate in self.given.via:
            if candidate.is_file() and _sha256(candidate) == wanted["sha256"]:
                return candidate
        name = Path(wanted["file"]).name
        found = next((p for p in _inside(there.path.parent, wanted["file"]) if _sha256(p) == wanted["sha256"]), None)
        if found is None:
            raise PlanError(
                f"{path.name} was made of {name!r} with SHA-256 {wanted['sha256'][:12]}…, which is not beside its "
                "manifest: name it with --via"
            )
        return found

    def base(self, source: Path, length: int) -> tuple[Model, Chain]:
        """The file that was deployed, which must be the original, a pruned file with its plan, or deployed itself."""
        place = self.original.path
        if place is not None and _sha256(source) == _sha256(place):
            return self.original, Chain()
        plan = self.given.plan or source.with_name(f"{source.name}.plan.json")
        further = manifest_of(source)
        if further is not None and (is_intact(source, further) or not plan.is_file()):
            return load(source), self.chain(source, further, length + 1)
        if not plan.is_file():
            raise PlanError(
                f"{source} has neither a plan nor a manifest of deploy beside it: name the plan with --plan"
            )
        model = load(source)
        return model, Chain(
            (), verify_files(self.original, model, load_plan(plan), self.given.feeds(), allow_inconclusive=True)
        )

    def link(self, path: Path, there: _Manifest, source: Path, before: Model) -> Link:
        """The steps from one file to another, done again."""
        steps = [step for step in there.steps if step["name"] != _ORT]
        states = [before]
        for step in steps:
            states.append(redo(states[-1], step["name"], _options(step, there.path)))
        checked = []
        if there.entry["role"] == _ORT:
            _require_intact(path, there)
        else:
            states[-1] = _required(states[-1], path, there, source)
        self.feeds = []
        for step, first, second in zip(steps, states, states[1:], strict=False):
            self.feeds = self.feeds or feeds_for(step["name"], first, second, self.given.source(second))
            measured = compared(first, second, self.feeds, step["name"], lambda _: None)
            checked.append(StepCheck(step["name"], str(step.get("what", "")), _recorded(step), measured))
        if not self.feeds:
            self.feeds = feeds_for("", states[-1], states[-1], self.given.source(states[-1]))
        if there.entry["role"] == _ORT:
            last = next((step for step in there.steps if step["name"] == _ORT), {})
            measured = ort_difference(states[-1], path, self.feeds)
            checked.append(StepCheck(_ORT, str(last.get("what", "")), _recorded(last), measured))
        return Link(path.name, source.name, tuple(checked))


def _options(step: Mapping[str, Any], place: Path) -> Mapping[str, Any]:
    options = step["options"]
    if not isinstance(options, dict):
        raise PlanError(f"manifest {place}: the options of the step {step['name']!r} should be a table")
    return options


def _recorded(step: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = step.get("difference")
    return found if isinstance(found, dict) else None


def _required(replay: Model, path: Path, there: _Manifest, source: Path) -> Model:
    """The model of a file, which must be what the steps make, and the one that the manifest names."""
    model = load(path)
    found = next(differences(replay, model), None)
    intact = is_intact(path, there)
    others = [*manifest.differences(there.content), *_other_machine(there.content)]
    if found is None:
        _require_intact(path, there)
        return model
    what = f"{path.name} is not what the steps of its manifest make of {source.name}: {found}"
    if intact and others:
        raise InconclusiveError(f"{what}; they were done elsewhere, which may be why: {', '.join(others)}")
    raise ProofError(what if intact else f"{what}. Its SHA-256 is not the one that the manifest names either")


def _other_machine(content: Mapping[str, Any]) -> list[str]:
    """Processors, where they are others than in a manifest: kernels that fold constants may round otherwise."""
    machine = content.get("machine")
    then = machine.get("processor") if isinstance(machine, dict) else None
    now = bench.machine()["processor"]
    return [] if then == now else [f"processor {then} then, {now} now"]


def _require_intact(path: Path, there: _Manifest) -> None:
    """Raise ProofError where a file does not have the SHA-256 that its manifest names."""
    if not is_intact(path, there):
        raise ProofError(
            f"{path.name} is not the file that was made: its SHA-256 is {_sha256(path)[:12]}…, the manifest names "
            f"{there.entry['sha256'][:12]}…"
        )


def _inside(folder: Path, name: str) -> list[Path]:
    """Files in a folder that a name in a manifest may mean: where it says, or of that name beside the manifest."""
    if "\0" in name:
        return []
    base = folder.resolve()
    found = []
    for candidate in (folder / name, folder / Path(name).name):
        try:
            if candidate.resolve().is_relative_to(base) and candidate.is_file():
                found.append(candidate)
        except (OSError, RuntimeError):  # a name that no file can have, or links in a circle
            continue
    return found


def _sha256(path: Path) -> str:
    return str(manifest.file_entry(path, "")["sha256"])
