"""Regression test of a refactoring: run the same commands with two checkouts and compare every byte that they write.

    python benchmarks/robustness/unchanged.py --before CHECKOUT --after CHECKOUT --data DATA [--jobs 2] [--words]
        [--rename=--old=--new] [--only NAME] [--keep FOLDER] [--out results/unchanged.json]

DATA is a folder with real models in `onnx/`. Every command runs in a separate process, on one thread, in a separate
folder whose inputs have the same names for both checkouts. Exit codes, printed output and the bytes of all files are
compared: models, plans, reports, manifests, recipes. Only what must differ is replaced first: the version of the tool,
seconds, and absolute paths. Of .ort files only the size is compared, since onnxruntime writes different bytes each time.

Latencies vary from run to run. For a comparison to the last byte the commands therefore use a simulated clock, which
advances with each run of a model (1/16 s) and each reading of the clock (2^-30 s) only; every operator takes one
microsecond in a profile, and the memory of a process is reported as zero.

--words is for changes of wording: models are compared by their bytes, JSON files by their values without sentences,
recipes as sets of lines; printed output, Markdown, HTML, plots, and the sizes and hashes of text files in manifests are
skipped. --rename gives the new name of an option to the checkout after the change. Cases whose default allocation policy
was changed on purpose pass --spread.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pathlib
import platform
import queue
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.runs import plain

HERE = Path(__file__).parents[1]
LIMIT = 240
"""Seconds after which a command is stopped."""
BINARY = {".onnx", ".data"}
"""Suffixes of files that are compared byte by byte in every mode."""
PROSE = {"reason", "made_by", "note", "notes", "version"}
"""Keys of JSON files whose values are sentences, or the version of the format or the tool."""
WORDING = {"stdout", "stderr"}
"""Names of the files with the printed output."""
WORDING_SUFFIXES = {".md", ".html", ".svg"}
"""Suffixes of files that consist of sentences."""

RENAMED = {
    "spread": "policy", "multiple": "round_to", "shares": "ratios", "min-share": "min-ratio", "max-share": "max-ratio",
}  # fmt: skip  # a table
"""Keys in plans and reports of format version 1 and in older recipes, and their present names."""


@dataclass(frozen=True)
class Case:
    """Commands that run one after the other in one folder.

    Attributes:
        name: Unique name of the case.
        model: Stem of a file in DATA/onnx, or "digits" for that in `models/`; copied into the folder as `m.onnx`.
        commands: Command lines without `cpd-onnx`; `m.npz` are samples, `test.npz` labelled samples of the digits.
        samples: Number of random samples in `m.npz`; 0 for no file, or for the real samples of the digits.
    """

    name: str
    model: str
    commands: tuple[str, ...]
    samples: int = 0


CASES = (
    Case("magnitude", "resnet20_gtsrb", (
        "prune m.onnx -o p.onnx --json p.json",
        "apply m.onnx p.onnx.plan.json -o a.onnx --json a.json",
        "verify m.onnx p.onnx --json v.json",
        "inspect m.onnx --json i.json",
    )),
    Case("l1, global", "resnet20_cifar10", ("prune m.onnx -o p.onnx --score l1 --target macs=0.5 --spread global",)),
    Case("fpgm, isomorphic, multiples", "resnet20_cifar10_bnfold", (
        "prune m.onnx -o p.onnx --score fpgm --target params=0.4 --spread isomorphic --multiple 4 --json p.json",
    )),
    Case("bn, kept layers", "resnet20_jpeg_cifar10", (
        "prune m.onnx -o p.onnx --score bn --target bytes=0.5 --keep layer1*",
    )),
    Case("lamp, least and most", "resnet56_cifar10", (
        "prune m.onnx -o p.onnx --score lamp --target macs=0.3 --spread global --min-share 0.2 --max-share 0.9",
    )),
    Case("random", "resnet56_vainf_groupsl_pruned2.55x_cifar10", (
        "prune m.onnx -o p.onnx --score random --seed 3 --target macs=0.7 --multiple 8",
    )),
    Case("reconstruction, repaired", "resnet20_gtsrb", (
        "prune m.onnx -o p.onnx --data m.npz --samples 24 --repair-samples 32 --target macs=0.5 --json p.json",
        "verify m.onnx p.onnx --json v.json",
        "apply m.onnx p.onnx.plan.json -o a.onnx",
    ), 40),
    Case("wanda, two rounds", "resnet20_gtsrb_bnfold", (
        "prune m.onnx -o p.onnx --data m.npz --score wanda --spread optimal --samples 16 --repair-samples 16 --rounds 2",
    ), 24),
    Case("activation, not repaired", "resnet20_cifar10", (
        "prune m.onnx -o p.onnx --data m.npz --score activation --spread uniform --samples 16 --no-repair "
        "--target macs=0.4",
    ), 24),
    Case("variance, two rounds", "resnet20_cifar10_bnfold", (
        "prune m.onnx -o p.onnx --data m.npz --score variance --spread optimal --samples 16 --no-repair --rounds 2 "
        "--target macs=0.4",
    ), 24),
    Case("gradients", "digits", (
        "prune m.onnx -o t.onnx --data m.npz --score taylor --spread uniform --samples 32 --target macs=0.5 --no-repair",
        "prune m.onnx -o f.onnx --data m.npz --score fisher --spread uniform --samples 32 --score-labels "
        "--target macs=0.5 --no-repair",
    )),
    Case("optimal widths", "digits", (
        "prune m.onnx -o p.onnx --spread optimal --target macs=0.3 --width=*=0.25..1",
    )),
    Case("compress without data", "digits", ("compress m.onnx -o c.onnx --json c.json",)),
    Case("compress with data", "digits", (
        "compress m.onnx -o c.onnx --data m.npz --eval test.npz --target macs=0.3 --no-distill --samples 64 --json c.json",
        "verify m.onnx c.onnx --data test.npz --json v.json",
        "reproduce c.onnx.manifest.json -o again --json r.json",
    )),
    Case("compress, two rounds, distilled", "digits", (
        "compress m.onnx -o c.onnx --data m.npz --target macs=0.4 --rounds 2 --steps 3 --threads 1 --samples 64",
    )),
    Case("compress by a plan", "digits", (
        "prune m.onnx -o p.onnx --target channels=0.7",
        "compress m.onnx -o c.onnx --like p.onnx.plan.json --no-report",
    )),
    Case("deployed", "digits", (
        "prune m.onnx -o p.onnx --target macs=0.5",
        "deploy p.onnx -o d8.onnx --int8 --data m.npz --samples 32 --json d8.json",
        "verify m.onnx d8.onnx --data test.npz --json v8.json",
        "deploy p.onnx -o d16.onnx --half float16 --json d16.json",
        "deploy p.onnx -o db.onnx --batch 1 --opset 18 --ort db.ort",
        "verify m.onnx db.onnx --json vb.json",
        "deploy p.onnx -o dx.onnx --profile avx512 --eval test.npz",
    )),
    Case("sensitivity", "digits", (
        "inspect m.onnx --sensitivity --data m.npz --samples 16 --json i.json --plot i.svg",
    )),
    Case("detector", "fastestdet", ("prune m.onnx -o p.onnx --target macs=0.5 --json p.json",)),
    Case("layout of tensorflow", "person_reid_0248", ("prune m.onnx -o p.onnx --spread global --target params=0.6",)),
    Case("open sizes", "ppocr_v2_det", ("prune m.onnx -o p.onnx --input-shape x:1,3,64,64 --no-verify",)),
    Case("recurrent", "silero_vad_half", ("prune m.onnx -o p.onnx",)),
    Case("transformer", "vit_cifar10_smmk47", ("prune m.onnx -o p.onnx --target macs=0.6 --multiple 8",)),
    Case("quantised", "twinlitenet_qdq_int8", ("inspect m.onnx --json i.json",)),
    Case("segmentation", "espnetv2_s0.5_city", ("inspect m.onnx --json i.json --keep *level3*",)),
    Case("old operators", "cntk_mnist", ("compress m.onnx -o c.onnx --target params=0.5 --json c.json",)),
    Case("refused operator", "espcn_quant_qonnx", ("prune m.onnx -o p.onnx",)),
    Case("refused model", "sklearn_rf_iris", ("prune m.onnx -o p.onnx", "inspect m.onnx --json i.json")),
)  # fmt: skip  # a table


@dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome of one command.

    Attributes:
        code: Exit code; None after `LIMIT` seconds.
        seconds: Wall time in seconds.
        written: Contents of the files that it wrote or changed, by name, with `stdout` and `stderr`.
    """

    code: int | None
    seconds: float
    written: dict[str, bytes]


@dataclass(eq=False)
class Server:
    """A process with loaded libraries that forks for each command of one checkout."""

    tree: Path
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        environment = {
            **os.environ, "PYTHONPATH": str(self.tree), "PYTHONHASHSEED": "0", "COLUMNS": "160", "NO_COLOR": "1",
            "PYTHONDONTWRITEBYTECODE": "1", **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        }  # fmt: skip  # a table
        line = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(line, text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, folder: Path, words: Sequence[str]) -> Outcome:
        """Run one command in a folder and return its outcome."""
        before = contents(folder)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(folder), list(words)]) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self.process.stdout.readline())
        after = contents(folder)
        return Outcome(code, seconds, {name: found for name, found in after.items() if before.get(name) != found})

    def end(self) -> None:
        """End the process."""
        self.process.communicate()  # closes its streams, upon which it ends


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files of a folder by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def serve() -> None:
    """Run the commands read from stdin, each in a fork of this process, which has the slow libraries loaded."""
    import numpy
    import onnx
    import onnx_graphsurgeon
    import onnxruntime
    import scipy.optimize

    loaded = [numpy, onnx, onnx_graphsurgeon, onnxruntime, scipy.optimize]
    if importlib.util.find_spec("matplotlib"):
        loaded.append(importlib.import_module("matplotlib.figure"))
    assert all(loaded)
    assert not any(name.split(".")[0] == "cpd_onnx" for name in sys.modules)
    for line in sys.stdin:
        folder, words = json.loads(line)
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            os.setsid()
            command(Path(folder), words)
        code = ended(child, started + LIMIT)
        print(json.dumps([code, time.perf_counter() - started]), flush=True)


def ended(child: int, until: float) -> int | None:
    """Return the exit code of a process; None if it was killed at the time `until`."""
    while time.perf_counter() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def command(folder: Path, words: Sequence[str]) -> None:
    """Run a `cpd-onnx` command in a folder, in this process, which then exits."""
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.path[0] = os.environ["PYTHONPATH"]
    sys.argv = ["cpd-onnx", *words]
    steady()
    code: object = 1
    try:
        runpy.run_module("cpd_onnx", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def steady() -> None:
    """Make measurements of time and memory in this process reproducible to the last bit."""
    import onnxruntime

    now = [0.0]
    session = onnxruntime.InferenceSession
    run, profile = session.run, session.end_profiling
    text, context = pathlib.Path.read_text, multiprocessing.get_context

    def clock() -> float:
        now[0] += 2.0**-30
        return now[0]

    def counted(self: Any, *given: Any, **options: Any) -> Any:
        now[0] += 2.0**-4
        return run(self, *given, **options)

    def flat(self: Any) -> Any:
        name = profile(self)
        events = json.loads(text(Path(name)))
        Path(name).write_text(json.dumps([event | {"dur": 1} if "dur" in event else event for event in events]))
        return name

    def read_text(self: Path, *given: Any, **options: Any) -> str:
        return "" if str(self) == "/proc/self/status" else text(self, *given, **options)

    time.perf_counter = time.monotonic = clock
    session.run, session.end_profiling = counted, flat
    pathlib.Path.read_text = read_text  # type: ignore[method-assign]
    multiprocessing.get_context = lambda method=None: context("fork" if method == "spawn" else method)  # type: ignore[assignment, misc]


def prepare(case: Case, folder: Path, data: Path) -> None:
    """Write the inputs of a case to a folder."""
    import numpy as np
    import onnx

    folder.mkdir(parents=True)
    models = HERE.parent / "models"
    if case.model == "digits":
        for name, target in (("digits.onnx", "m.onnx"), ("digits_train.npz", "m.npz"), ("digits_test.npz", "test.npz")):
            shutil.copyfile(models / name, folder / target)
        return
    place = data / "onnx" / f"{case.model}.onnx"
    shutil.copyfile(place, folder / "m.onnx")
    if case.samples:
        values = onnx.load(place).graph.input[0]
        dims = [dim.dim_value for dim in values.type.tensor_type.shape.dim][1:]
        samples = np.random.default_rng(0).standard_normal((case.samples, *dims)).astype(np.float32)
        np.savez(folder / "m.npz", **{values.name: samples})


def scrubbed(name: str, content: bytes, paths: Iterable[str], version: str) -> bytes:
    """Return the content of a file with everything that must differ replaced."""
    if Path(name).suffix in BINARY:
        return content
    if Path(name).suffix == ".ort":  # onnxruntime writes different bytes each time
        return b"%d bytes" % len(content)
    text = content.decode("utf-8", "surrogateescape")
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, "PATH")
    text = re.sub(rf"(cpd-onnx[^0-9\n]{{1,40}}){re.escape(version)}", r"\1VERSION", text)
    text = re.sub(r'("(?:seconds|pruning|training|verification|all)": )[0-9.e+-]+', r'\1"SECONDS"', text)
    text = re.sub(r"\b[0-9]+(\.[0-9]+)? s\b", "SECONDS s", text)
    return text.encode("utf-8", "surrogateescape")


def without_digests(files: dict[str, bytes], known: dict[str, str]) -> dict[str, bytes]:
    """Return files with the SHA-256 of text files replaced by their names, since scrubbing leaves the digests as is."""
    result = {}
    for name, content in files.items():
        if Path(name).suffix not in BINARY:
            for digest, of in known.items():
                content = content.replace(digest.encode(), f"SHA-256 of {of}".encode())
                content = content.replace(digest[:12].encode(), f"SHA-256 of {of}".encode())
        result[name] = content
    return result


def without_wording(name: str, content: bytes) -> Any:
    """Return what is compared of a file with --words; None for a file that consists of sentences."""
    suffix = Path(name).suffix
    if name in WORDING or suffix in WORDING_SUFFIXES:
        return None
    if suffix == ".json":
        return _values(json.loads(content))
    if suffix == ".toml":
        pairs = (line.partition(" = ") for line in content.decode().splitlines())
        return {(RENAMED.get(key, key), value) for key, _, value in pairs}
    return content


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        is_text = "sha256" in value and Path(str(value.get("file", ""))).suffix not in BINARY
        skipped = PROSE | ({"bytes", "sha256"} if is_text else set())
        return {RENAMED.get(key, key): _values(inner) for key, inner in value.items() if key not in skipped}
    if isinstance(value, list):
        return [_values(inner) for inner in value]
    return None if isinstance(value, str) and " " in value else value


@dataclass(frozen=True, eq=False)
class Tree:
    """One of the two checkouts, with the servers that run its commands.

    Attributes:
        path: Folder of the checkout.
        work: Folder in which the commands run.
        version: Version of the tool.
        servers: Idle servers.
        renamed: New names of options by old name.
    """

    path: Path
    work: Path
    version: str
    servers: queue.Queue[Server]
    renamed: dict[str, str]

    def run(self, case: Case, data: Path) -> list[Outcome]:
        """Run all commands of a case and return their outcomes, scrubbed for comparison."""
        folder = self.work / re.sub(r"\W+", "_", case.name)
        prepare(case, folder, data)
        server = self.servers.get()
        known: dict[str, str] = {}
        outcomes = []
        try:
            for line in case.commands:
                done = server.run(folder, self.words(line))
                texts = {name: found for name, found in done.written.items() if Path(name).suffix not in BINARY}
                known |= {hashlib.sha256(found).hexdigest(): name for name, found in texts.items() if found}
                paths = [str(folder), str(self.path), str(data)]
                files = {name: scrubbed(name, found, paths, self.version) for name, found in done.written.items()}
                outcomes.append(Outcome(done.code, done.seconds, without_digests(files, known)))
        finally:
            self.servers.put(server)
        return outcomes

    def words(self, line: str) -> list[str]:
        """Return the words of a command; checkouts that measure and bound by default get the options that do not."""
        words = [self.word(word) for word in line.split()]
        return plain(words) if (self.path / "tests" / "support" / "runs.py").is_file() else words

    def word(self, word: str) -> str:
        """Return a word of a command with this checkout's name of the option."""
        option, equals, value = word.partition("=")
        return self.renamed.get(option, option) + equals + value


def differing(before: Outcome, after: Outcome, *, ignores_wording: bool) -> list[str]:
    """Return the names of files in which two outcomes differ, and a different exit code."""
    found = [] if before.code == after.code else [f"exit code {before.code} -> {after.code}"]
    for name in sorted(before.written.keys() | after.written.keys()):
        old, new = before.written.get(name), after.written.get(name)
        if old is None or new is None:
            found.append(f"{name} ({'new' if old is None else 'missing'})")
        elif old != new and not (ignores_wording and without_wording(name, old) == without_wording(name, new)):
            found.append(name)
    return found


def version_of(tree: Path) -> str:
    """Return the version of a checkout."""
    found = re.search(r'__version__ = "([^"]+)"', (tree / "cpd_onnx" / "version.py").read_text())
    if found is None:
        raise SystemExit(f"{tree} is not a checkout of cpd-onnx")
    return found[1]


def commit_of(tree: Path) -> str | None:
    """Return the commit of a checkout; None if it is not a git repository."""
    done = subprocess.run(["git", "-C", tree, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def shown(row: dict[str, Any], stream: IO[str]) -> None:
    """Print the line of one command."""
    verdict = "identical" if not row["differs"] else "DIFFERS: " + ", ".join(row["differs"])
    seconds = "{:6.1f} {:6.1f}".format(*row["seconds"])
    columns = f"{row['case']:32.32} {row['command']:60.60} {row['code']!s:>4} {row['files']:3} {seconds}"
    print(columns, verdict, file=stream, flush=True)


def compared(trees: Sequence[Tree], case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one case, one for each command."""
    first, second = (tree.run(case, options.data) for tree in trees)
    rows = []
    for line, before, after in zip(case.commands, first, second, strict=True):
        rows.append({
            "case": case.name, "model": case.model, "command": line, "code": before.code, "files": len(before.written),
            "seconds": [round(before.seconds, 2), round(after.seconds, 2)],
            "differs": differing(before, after, ignores_wording=options.words),
            "sha256": {n: hashlib.sha256(c).hexdigest() for n, c in before.written.items() if Path(n).suffix in BINARY},
        })  # fmt: skip  # a table
    return rows


def main() -> None:
    """Run all commands with both checkouts and write the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout before the change")
    parser.add_argument("--after", type=Path, required=True, help="checkout after the change")
    parser.add_argument("--data", type=Path, default=os.environ.get("CPD_DATA"), help="default: $CPD_DATA")
    parser.add_argument("--jobs", type=int, default=1, help="number of cases that run at the same time (default 1)")
    parser.add_argument("--words", action="store_true", help="ignore changes of wording")
    parser.add_argument("--rename", action="append", default=[], metavar="--OLD=--NEW", help="renamed option")
    parser.add_argument("--only", help="run only the cases whose names contain this text")
    parser.add_argument("--keep", type=Path, help="folder in which all files are kept (default: they are deleted)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "unchanged.json")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data, or the environment variable CPD_DATA, is required")
    options.data = Path(options.data).resolve()
    cases = [case for case in CASES if (options.only or "") in case.name]
    renamed = dict(pair.split("=") for pair in options.rename)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.keep.resolve() if options.keep else Path(temporary).resolve()
        trees = []
        for name, path in (("was", options.before.resolve()), ("now", options.after.resolve())):
            servers: queue.Queue[Server] = queue.Queue()
            for _ in range(options.jobs):
                servers.put(Server(path))
            trees.append(Tree(path, work / name, version_of(path), servers, renamed if name == "now" else {}))
        rows: list[dict[str, Any]] = []
        lock = threading.Lock()

        def one(case: Case) -> None:
            found = compared(trees, case, options)
            with lock:
                rows.extend(found)
                for row in found:
                    shown(row, sys.stdout)

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, cases))
        for tree in trees:
            while not tree.servers.empty():
                tree.servers.get().end()
    place = {case.name: number for number, case in enumerate(CASES)}
    rows.sort(key=lambda row: place[row["case"]])
    wrong = [row for row in rows if row["differs"]]
    content = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "before": commit_of(options.before), "after": commit_of(options.after), "words": options.words,
        "commands": len(rows), "identical": len(rows) - len(wrong), "files": sum(row["files"] for row in rows),
        "rows": rows,
    }  # fmt: skip  # a table
    if not options.only:
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(rows) - len(wrong)} of {len(rows)} commands identical, {content['files']} files")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
