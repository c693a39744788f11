"""Chain: traces a file written by `deploy` back through its manifests to the pruned file, its plan and the original.

The steps that a manifest records are repeated, which needs no data, because the record of an int8 step holds its
calibrated ranges. The file must equal the result value for value, and have the SHA-256 that the manifest names. Inputs
are searched for only in the folder of the manifest, and must have the SHA-256 that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpd_onnx.data.sources import Source
from cpd_onnx.deploy.c_source import c_source
from cpd_onnx.deploy.steps import FITTED, c_difference, compared, feeds_for, ort_difference, redo
from cpd_onnx.errors import InconclusiveError, PlanError, ProofError
from cpd_onnx.ir.differences import differences
from cpd_onnx.ir.model import Array, Model, load
from cpd_onnx.proof.comparison import OutputDifference
from cpd_onnx.proof.files import FileVerification, verify_files
from cpd_onnx.report import manifest
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.runtime import bench
from cpd_onnx.runtime.sessions import Feed

_LONGEST = 16
"""Number of consecutive deploy runs up to which a file is traced back; a heuristic against cycles."""
_ORT, _C = "ort", "c"
_WRITTEN = (_ORT, _C)
"""Steps that write the converted model in another format, and the roles of the files that they write."""


@dataclass(frozen=True)
class Given:
    """Optional inputs of the check, besides the original and the file.

    Attributes:
        plan: Path of the plan of the pruned file; None for the one beside it.
        via: Paths of inputs of deploy runs, in any folder.
        feeds: Returns the inputs for the proof of the pruned file, or None for random inputs.
        source: Returns the samples of a model on which the steps are measured, or None for random inputs.
    """

    plan: Path | None = None
    via: Sequence[Path] = ()
    feeds: Callable[[], Iterable[Mapping[str, Array]] | None] = lambda: None
    source: Callable[[Model], Source | None] = lambda _: None


@dataclass(frozen=True)
class StepCheck:
    """One step of a deploy run that was repeated.

    Attributes:
        name: Name of the step.
        what: Description of the step.
        recorded: Output difference that the manifest records, as plain values; None if it was not measured.
        measured: Output difference measured now; None if it was not measured.
        fitted: Number of weights that it fitted to samples: integers, scales and biases are those of the file, and they
            have the SHA-256 that the manifest names.
    """

    name: str
    what: str
    recorded: Mapping[str, Any] | None
    measured: OutputDifference | None
    fitted: int = 0


@dataclass(frozen=True)
class Link:
    """One deploy run: the file that it wrote, the file that it read, and its steps."""

    file: str
    source: str
    steps: tuple[StepCheck, ...]


@dataclass(frozen=True)
class Chain:
    """Result of tracing a deployed file back to the original.

    Attributes:
        links: Deploy runs, from the pruned file to the deployed one.
        pruned: Check of the pruned file; None if the original itself was deployed.
        measured: Output difference between the deployed file and the original; None if it was not measured.
    """

    links: tuple[Link, ...] = ()
    pruned: FileVerification | None = None
    measured: OutputDifference | None = None


@dataclass(frozen=True, eq=False)
class _Manifest:
    """A manifest of `deploy`, with the entry of the file that it was looked up for."""

    path: Path
    content: Mapping[str, Any]
    entry: Mapping[str, Any]

    @property
    def source(self) -> Mapping[str, Any]:
        """The entry of the model that was deployed."""
        for entry in self.content["inputs"]:
            if entry["role"] == "model":
                found: Mapping[str, Any] = entry
                return found
        raise PlanError(f"manifest {self.path} does not name the input model")

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """The recorded steps that change the model, each with its options."""
        steps = self.content.get("steps")
        if not isinstance(steps, list) or not all(
            isinstance(s, dict) and isinstance(s.get("name"), str) for s in steps
        ):
            raise PlanError(f"manifest {self.path} names no steps")
        if not all("options" in step for step in steps):
            raise PlanError(f"manifest {self.path} was written by a version that recorded no options: deploy again")
        return [step for step in steps if step["options"] is not None]


def manifest_of(path: Path, named: Path | None = None) -> _Manifest | None:
    """Return the manifest of `deploy` that names a file: the given one, the one beside it, or another in its folder."""
    if named is not None:
        found = _naming(named, path)
        if found is None:
            raise PlanError(f"manifest {named} is not that of the deploy run that wrote {path.name}")
        return found
    places = [manifest.place_of(path), *sorted(path.parent.glob("*.manifest.json"))]
    for place in places:
        if place.is_file() and (found := _naming(place, path)) is not None:
            return found
    return None


def _naming(place: Path, path: Path) -> _Manifest | None:
    """Return the manifest at a path if it is one of `deploy` that lists the file as an output, else None."""
    try:
        content = manifest.read(place)
    except PlanError:
        if place == manifest.place_of(path):
            raise
        return None
    if content.get("run") != "deploy":
        return None
    for entry in content["outputs"]:
        if entry["role"] in ("model", *_WRITTEN) and Path(entry["file"]).name == path.name:
            return _Manifest(place, content, entry)
    return None


def is_intact(path: Path, record: _Manifest) -> bool:
    """Return whether a file has the SHA-256 that its manifest names."""
    return bool(_sha256(path) == record.entry["sha256"])


def verify_deployed(original: Model, path: Path, record: _Manifest, given: Given | None = None) -> Chain:
    """Trace a deployed file back to the original, and check each step on the way.

    Raises:
        PlanError: A manifest or plan is malformed, or a file that it names is missing or has changed.
        ProofError: The file is not the result of the steps, or the pruned file is not the result of its plan.
        InconclusiveError: The steps have another result now, with other versions or on another processor.
    """
    return _Tracer(original, given or Given()).chain(path, record, 1)


@dataclass(eq=False)
class _Tracer:
    """Traces files back to the original; `feeds` are the inputs on which the latest link was measured."""

    original: Model
    given: Given
    feeds: list[Feed] = field(default_factory=list)

    def chain(self, path: Path, record: _Manifest, length: int) -> Chain:
        """Return the chain that ends in a file; `length` counts the links from the deployed file to this one."""
        if length > _LONGEST:
            raise PlanError(f"{path} comes from more than {_LONGEST} deploy runs: name the pruned file with --via")
        source = self.source(path, record)
        before, base = self.base(source, length)
        link = self.link(path, record, source, before)
        measured = None
        if record.entry["role"] not in _WRITTEN:
            measured = compared(self.original, load(path), self.feeds, "all", lambda _: None) if self.feeds else None
        return Chain((*base.links, link), base.pruned, measured)

    def source(self, path: Path, record: _Manifest) -> Path:
        """Return the input of the run that wrote a file.

        It is one given by `via`, the original itself, or one in the folder of the manifest.
        """
        wanted, candidates = record.source, [*self.given.via]
        if self.original.path is not None:
            candidates.append(self.original.path)
        for candidate in candidates:
            if candidate.is_file() and _sha256(candidate) == wanted["sha256"]:
                return candidate
        name = Path(wanted["file"]).name
        found = next((p for p in _inside(record.path.parent, wanted["file"]) if _sha256(p) == wanted["sha256"]), None)
        if found is None:
            raise PlanError(
                f"{path.name} was made from {name!r} with SHA-256 {wanted['sha256'][:12]}…, which is not in the folder "
                "of its manifest: name it with --via"
            )
        return found

    def base(self, source: Path, length: int) -> tuple[Model, Chain]:
        """Return a deployed model and its chain; it is the original, a pruned file with a plan, or a deployed file."""
        place = self.original.path
        if place is not None and _sha256(source) == _sha256(place):
            return self.original, Chain()
        plan = self.given.plan or source.with_name(f"{source.name}.plan.json")
        further = manifest_of(source)
        if further is not None and (is_intact(source, further) or not plan.is_file()):
            return load(source), self.chain(source, further, length + 1)
        if not plan.is_file():
            raise PlanError(f"{source} has neither a plan nor a manifest of deploy beside it: give --plan")
        model = load(source)
        return model, Chain(
            (), verify_files(self.original, model, load_plan(plan), self.given.feeds(), allow_inconclusive=True)
        )

    def link(self, path: Path, record: _Manifest, source: Path, before: Model) -> Link:
        """Repeat the steps from one file to another, and measure them."""
        steps = [step for step in record.steps if step["name"] not in _WRITTEN]
        is_fitted = any(step["name"] in FITTED for step in steps) and record.entry["role"] not in _WRITTEN
        written = load(path) if is_fitted else None
        states = [before]
        for step in steps:
            states.append(redo(states[-1], step["name"], _options(step, record.path), written))
        checked = []
        if record.entry["role"] in _WRITTEN:
            _require_intact(path, record)
        else:
            states[-1] = _required(states[-1], path, record, source)
        self.feeds = []
        for step, first, second in zip(steps, states, states[1:], strict=False):
            self.feeds = self.feeds or feeds_for(step["name"], first, second, self.given.source(second))
            measured = compared(first, second, self.feeds, step["name"], lambda _: None)
            fitted = len(_options(step, record.path).get("weights", ())) if step["name"] in FITTED else 0
            checked.append(StepCheck(step["name"], str(step.get("what", "")), _recorded(step), measured, fitted))
        if not self.feeds:
            self.feeds = feeds_for("", states[-1], states[-1], self.given.source(states[-1]))
        if record.entry["role"] in _WRITTEN:
            checked.append(self.written(path, record, states[-1]))
        return Link(path.name, source.name, tuple(checked))

    def written(self, path: Path, record: _Manifest, model: Model) -> StepCheck:
        """Return the check of a file in another format than ONNX, written from a model."""
        role = record.entry["role"]
        unknown: Mapping[str, Any] = {"options": {}}
        step = next((step for step in record.steps if step["name"] == role), unknown)
        if role == _ORT:
            measured: OutputDifference | None = ort_difference(model, path, self.feeds)
        else:
            again = c_source(model, str(_options(step, record.path).get("name", path.stem)))
            if again.text.encode() != path.read_bytes():
                others = manifest.differences(record.content)
                problem = f"{path.name} is not the C source of {record.source['file']}"
                if others:
                    raise InconclusiveError(f"{problem}; the cause may be another environment: {', '.join(others)}")
                raise ProofError(problem)
            measured = c_difference(model, again, self.feeds)
        return StepCheck(role, str(step.get("what", "")), _recorded(step), measured)


def _options(step: Mapping[str, Any], place: Path) -> Mapping[str, Any]:
    options = step["options"]
    if not isinstance(options, dict):
        raise PlanError(f"manifest {place}: the options of step {step['name']!r} must be an object")
    return options


def _recorded(step: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = step.get("difference")
    return found if isinstance(found, dict) else None


def _required(replay: Model, path: Path, record: _Manifest, source: Path) -> Model:
    """Return the model of a file, which must equal the result of the steps and be the file that the manifest names."""
    model = load(path)
    found = next(differences(replay, model), None)
    intact = is_intact(path, record)
    others = [*manifest.differences(record.content), *_other_machine(record.content)]
    if found is None:
        _require_intact(path, record)
        return model
    problem = f"{path.name} is not the result of the steps of its manifest on {source.name}: {found}"
    if intact and others:
        raise InconclusiveError(f"{problem}; the cause may be another environment: {', '.join(others)}")
    raise ProofError(problem if intact else f"{problem}. Its SHA-256 differs from that of the manifest as well")


def _other_machine(content: Mapping[str, Any]) -> list[str]:
    """Return the processors if they differ from those of a manifest, as kernels that fold constants may then too."""
    machine = content.get("machine")
    then = machine.get("processor") if isinstance(machine, dict) else None
    now = bench.machine()["processor"]
    return [] if then == now else [f"processor {then} then, {now} now"]


def _require_intact(path: Path, record: _Manifest) -> None:
    """Raise ProofError if a file does not have the SHA-256 that its manifest names."""
    if not is_intact(path, record):
        raise ProofError(
            f"{path.name} has changed since it was written: its SHA-256 is {_sha256(path)[:12]}…, but the manifest "
            f"names {record.entry['sha256'][:12]}…"
        )


def _inside(folder: Path, name: str) -> list[Path]:
    """Return the existing files in a folder that a path in a manifest may name: at that path, or directly in it."""
    if "\0" in name:
        return []
    base = folder.resolve()
    found = []
    for candidate in (folder / name, folder / Path(name).name):
        try:
            if candidate.resolve().is_relative_to(base) and candidate.is_file():
                found.append(candidate)
        except (OSError, RuntimeError):  # an invalid name, or a cycle of links
            continue
    return found


def _sha256(path: Path) -> str:
    return str(manifest.file_entry(path, "")["sha256"])
