"""Helpers shared by the scripts that build the model zoo: jobs, checks, the manifest, the command line."""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Job:
    """One model to build.

    Args:
        name: file name without the suffix, ``<arch>.<exporter>[.opsetN]``.
        family: architecture family, for example ``resnet`` or ``bert``.
        build: writes the model to the path it is given, or its parts to this folder where `run` is told so.
        high: integer inputs of the check are drawn below this.
        dims: sizes of symbolic input dimensions by name; others are 3 on axis 0 and 16 elsewhere, and those that are
            named as a sum, such as ``past + 1``, follow from the names in it.
        feeds: inputs of the check by name, in place of random ones.
    """

    name: str
    family: str
    build: Callable[[Path], None]
    high: int = 50
    dims: dict[str, int] = field(default_factory=dict)
    feeds: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """Entry of the manifest for one model; dimensions are integers or symbolic names."""

    name: str
    file: str
    family: str
    exporter: str
    exporter_version: str
    opset: int
    ir_version: int
    domains: dict[str, int]
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    run_shapes: dict[str, list[int]]
    nodes: int
    megabytes: float
    runs: bool
    seconds: float


def arguments(doc: str, **choices: list[str]) -> argparse.Namespace:
    """Parse the command line that all scripts share; ``choices`` adds options with fixed values."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the zoo; each exporter has a subfolder")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="build names that match this regex")
    parser.add_argument("--force", action="store_true", help="build again what exists")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one model")
    for option, values in choices.items():
        parser.add_argument(f"--{option}", choices=values, help="all of them if not given")
    return parser.parse_args()


def run(jobs: Iterable[Job], args: argparse.Namespace, *, exporter: str, version: str, parts: bool = False) -> None:
    """Build and check the jobs in ``args.out / exporter``, each in a forked process; one line for each model.

    With ``parts``, a job writes a folder of models, such as an encoder and a decoder: each is checked for itself.
    """
    folder = args.out / exporter
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        path = folder / f"{job.name}.onnx"
        exists = path.exists() or any(folder.glob(f"{job.name}-*.onnx"))
        if not args.only.search(job.name) or (exists and not args.force):
            continue
        start = time.perf_counter()
        work = _build_parts if parts else _build
        error, made = _isolated(lambda job=job, path=path, work=work: work(job, path), args.timeout)
        seconds = time.perf_counter() - start
        if error:
            print(f"{job.name:50} failed {seconds:6.1f} s  {error}", flush=True)
            continue
        for name, facts in made.items():
            if isinstance(facts, str):
                print(f"{name:50} failed {seconds:6.1f} s  {facts}", flush=True)
                continue
            entry = Entry(
                name=name, file=f"{name}.onnx", family=job.family, exporter=exporter, exporter_version=version,
                runs=True, seconds=round(seconds, 1), **facts,
            )  # fmt: skip
            _record(folder / "manifest.json", entry)
            print(f"{name:50} ok     {seconds:6.1f} s  {entry.megabytes:.1f} MB", flush=True)


def random_feeds(
    inputs: Iterable[ort.NodeArg], *, high: int = 50, dims: dict[str, int] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Draw inputs for a session: normal floats, integers in [0, high), ones for masks."""
    rng = np.random.default_rng(seed)
    return {i.name: _draw(rng, i, high, dims or {}) for i in inputs}


def session(path: Path) -> ort.InferenceSession:
    """Open a model on the CPU with two threads and without log output."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _draw(rng: np.random.Generator, value: ort.NodeArg, high: int, dims: dict[str, int]) -> np.ndarray:
    """Draw one input."""
    shape = [d if isinstance(d, int) else _size(d, dims, 16 if axis else 3) for axis, d in enumerate(value.shape)]
    dtype = np.dtype(DTYPES[value.type])
    if dtype == np.bool_ or "mask" in value.name:
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        high = 2 if "type" in value.name else high  # types of tokens: a sentence or the next
        return rng.integers(0, high, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _size(name: str | None, dims: dict[str, int], otherwise: int) -> int:
    """Return the size of a symbolic dimension; the name may be a sum."""
    if name in dims or not name:
        return dims.get(name or "", otherwise)
    terms = [term.strip() for term in name.split("+")]
    if len(terms) == 1:
        return otherwise
    return sum(int(term) if term.isdecimal() else _size(term, dims, 16) for term in terms)


def _build(job: Job, path: Path) -> dict[str, Any]:
    """Build one model under a temporary name, check that it runs, rename it; return its facts by its name."""
    draft = path.with_name(f"draft-{path.name}")
    try:
        job.build(draft)
        facts = _check(job, draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return {job.name: facts}


def _build_parts(job: Job, path: Path) -> dict[str, Any]:
    """Build a model of several files in a temporary folder; return the facts of each by name, or why it does not run."""
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        job.build(Path(folder))
        for file in sorted(Path(folder).rglob("*.onnx")):
            name = job.name if file.stem == "model" else f"{job.name}-{file.stem}"
            try:
                made[name] = _check(job, file)
            except Exception as error:
                made[name] = _one_line(error)
                continue
            onnx.save(onnx.load(file), path.with_name(f"{name}.onnx"))  # with its external data
    return made


def _check(job: Job, path: Path) -> dict[str, Any]:
    """Run a model once in onnxruntime and describe it.

    Raises:
        ValueError: an output is not finite.
    """
    runtime = session(path)
    feeds = job.feeds or random_feeds(runtime.get_inputs(), high=job.high, dims=job.dims)
    for value, output in zip(runtime.get_outputs(), runtime.run(None, feeds), strict=True):
        if isinstance(output, np.ndarray) and output.dtype.kind == "f" and not np.isfinite(output).all():
            raise ValueError(f"output {value.name} is not finite")
    model = onnx.load(path, load_external_data=False)
    domains = {opset.domain: opset.version for opset in model.opset_import}
    data = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    return {
        "opset": domains.get("", 0),
        "ir_version": model.ir_version,
        "domains": domains,
        "inputs": {i.name: i.shape for i in runtime.get_inputs()},
        "outputs": {o.name: o.shape for o in runtime.get_outputs()},
        "run_shapes": {name: list(feed.shape) for name, feed in feeds.items()},
        "nodes": len(model.graph.node),
        "megabytes": round(sum(f.stat().st_size for f in [path, *map(path.parent.joinpath, data)]) / 1e6, 2),
    }


def _isolated(work: Callable[[], dict[str, Any]], timeout: float) -> tuple[str, dict[str, Any]]:
    """Call ``work`` in a forked process, so that a crash, a leak or a hang affects one model only. Return (error, result)."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(timeout) else (f"timeout after {timeout:.0f} s", {})
    except EOFError:
        answer = ("the process died", {})
    process.kill()
    process.join()
    return answer


def _answer(work: Callable[[], dict[str, Any]], sender: Any) -> None:
    """Send (error, result) of ``work``, with a failure as one line; ZOO_DEBUG keeps the traceback."""
    debug = "ZOO_DEBUG" in os.environ
    if not debug:
        _silence()
    try:
        sender.send(("", work()))
    except BaseException as error:
        if debug:
            traceback.print_exc()
        sender.send((_one_line(error), {}))


def _silence() -> None:
    """Suppress the output of exporters, also from C++."""
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(sink, stream)


def _one_line(error: BaseException) -> str:
    """Shorten an exception to its type and its most informative line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    root = error.__cause__
    told = f" <- {_one_line(root)}" if root is not None else ""
    return f"{type(error).__name__}: {' '.join(lines)[:160]}{told}"


def _record(path: Path, entry: Entry) -> None:
    """Add or replace an entry of the manifest, sorted by name."""
    entries = {e["name"]: e for e in read_manifest(path)} | {entry.name: asdict(entry)}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps([entries[name] for name in sorted(entries)], indent=1) + "\n")
    os.replace(draft, path)


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Read a manifest; return an empty one if the file does not exist."""
    return json.loads(path.read_text()) if path.exists() else []


def models(zoo: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """List the models of all exporters as (path, entry of the manifest)."""
    for manifest in sorted(zoo.glob("*/manifest.json")):
        for entry in read_manifest(manifest):
            yield manifest.parent / entry["file"], entry
