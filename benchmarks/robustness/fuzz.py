"""Fuzzing: random graphs through the oracles, damaged files through the pipeline and all commands.

    python benchmarks/robustness/fuzz.py [--graphs 20000] [--newer 20000] [--open 20000] [--damaged 100000] [--commands 4000] [--data DATA] [--out FILE]

The long version of tests/robustness/test_fuzz.py.

Graphs (tests/support/graphs.py): operators with rules in random topologies, valid by onnx's checker. Each is inferred,
combed, pruned at random and compared with the masked original in onnxruntime, with random branches removed as a whole
too, and its channels are permuted. The same is done where random inputs and outputs may lose channels.

Graphs of newer operators: the same with operators that the graphs above do not have (sequences, transforms, losses, sources).

Graphs with open sizes (tests/support/open_graphs.py): shape arithmetic as exporters and people write it. Each is pruned
and proved; the pruned file is then compared with the masked original at five sets of sizes that neither step used.

Damaged files (tests/support/damage.py): such graphs, the files in DATA/onnx of less than 1.5 MB and the light models of
the onnx package with changed attributes, inputs, tensors, types or bytes. Each must be pruned and proved, or be refused
with a message of one line, within a minute of CPU time. Models that take long to run occur less often, and only some of
them are proved.

Commands (tests/support/commands.py): each further damaged file is the input of a command chosen at random, which must
succeed, or end with a message of one line that is not an internal error and leave no files.

Workers are processes; if one dies, its file counts as a crash. Every failure is printed with its seed. A run continues
after the seeds of the stored results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import onnx

import cpd_onnx as cpd
from cpd_onnx.runtime import sessions as runtime
from cpd_onnx.testing import depth_oracle, mask_oracle, permutation_oracle

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy.accuracy import HERE, commit, macs
from tests.support.commands import command_outcome
from tests.support.damage import damaged
from tests.support.graphs import freed, newer, seeded
from tests.support.open_outcome import open_outcome

CHUNK, SECONDS, SMALL = 50, 60, 1_500_000
"""Number of seeds of a process, CPU seconds for one of them, and largest size in bytes of a file to damage."""
LONG, LARGE, TURNS, PROVED = 2e7, 1_000_000, 40, 10
"""Multiply-accumulates and bytes above which a file counts as slow; it is used once in `TURNS` rounds, and one in
`PROVED` of its pruned models is proved. Heuristics."""


class TooSlowError(BaseException):
    """Raised when the time is over; a BaseException, which no handler of the commands catches."""


def alarm(*_: object) -> None:
    raise TooSlowError


def graph_outcome(seed: int, work: Path, data: Path | None) -> str:
    """Return the outcome of the graph of a seed."""
    return outcome_of(seeded(seed), seed)


def of_newer_graph(seed: int, work: Path, data: Path | None) -> str:
    """Return the outcome of the graph of newer operators of a seed."""
    return outcome_of(newer(seed), seed)


def outcome_of(model: onnx.ModelProto, seed: int) -> str:
    """Return the outcome of a graph, as all oracles see it."""
    onnx.checker.check_model(model, full_check=True)
    try:
        outcomes = [oracle(model, seed=seed) for oracle in (mask_oracle, permutation_oracle, depth_oracle)]
        outcomes += [oracle(freed(model, seed), seed=seed) for oracle in (mask_oracle, depth_oracle)]
    except cpd.TargetError:
        return "nothing to prune"
    except cpd.DataError:
        return "no numbers"  # NaN, with which nothing can be compared
    if any(outcome.verdict == "wrong" for outcome in outcomes):
        return "WRONG"
    return "proved" if all(outcome.passed for outcome in outcomes) else "inconclusive"


@cache
def originals(data: Path | None) -> list[tuple[bytes, bool]]:
    """Return the contents of the files to damage, in order of use, and whether each is slow."""
    light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    files = [*sorted(light.glob("*.onnx")), *(sorted((data / "onnx").glob("*.onnx")) if data else [])]
    small = {file: file.read_bytes() for file in files if file.stat().st_size < SMALL}
    long = {file for file, content in small.items() if macs(file) > LONG or len(content) > LARGE}
    real = [
        (content, file in long)
        for turn in range(TURNS)
        for file, content in small.items()
        if not turn or file not in long
    ]
    return [*real, *((seeded(seed).SerializeToString(), False) for seed in range(len(real)))]


def of_open_graph(seed: int, work: Path, data: Path | None) -> str:
    """Return the outcome of the graph with open sizes of a seed."""
    runtime.RUN_SECONDS = SECONDS / 3  # generous, since other jobs may run on the machine
    return open_outcome(seed)


def damage_outcome(seed: int, work: Path, data: Path | None) -> str:
    """Return the outcome of the damaged file of a seed in the pipeline."""
    path, rng, files = work / f"{os.getpid()}.onnx", random.Random(seed), originals(data)
    turn, place = divmod(seed, len(files))
    content, is_long = files[place]
    is_proved = not is_long or turn % PROVED == 0
    path.write_bytes(damaged(content, rng))
    try:
        cpd.run("comb, score, allocate, prune" + (", verify" if is_proved else ""), path)
    except cpd.InconclusiveError:
        return "inconclusive"
    except cpd.ProofError as error:
        return f"NOT PROVED, nothing written: {error}"
    except cpd.CpdError as error:
        return "refused" if "\n" not in str(error) else f"SEVERAL LINES: {error}"
    return "proved" if is_proved else "pruned"


def of_command(seed: int, work: Path, data: Path | None) -> str:
    """Return the outcome of a command on the damaged file of a seed."""
    files = [content for content, is_long in originals(data) if not is_long]
    folder = work / str(os.getpid())
    folder.mkdir(exist_ok=True)
    return command_outcome(files[seed % len(files)], seed, folder)


def chunk(
    outcome: Callable[[int, Path, Path | None], str], seeds: range, work: Path, data: Path | None, log: Path
) -> None:
    """Run some seeds and log one line before and one after each."""
    runtime.RUN_SECONDS = SECONDS / 20
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    signal.signal(signal.SIGPROF, alarm)
    with log.open("w", encoding="utf-8") as stream:
        for seed in seeds:
            stream.write(f"{seed} CRASH: the process died\n")
            stream.flush()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # CPU time: other jobs may run
            try:
                found = outcome(seed, work, data)
            except TooSlowError:
                found = "SLOW"
            except Exception as error:
                found = f"CRASH: {type(error).__name__}: {error}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            stream.write(f"{seed} {' '.join(found.split())[:300]}\n")


def run(
    outcome: Callable[[int, Path, Path | None], str], seeds: range, data: Path | None, cores: int
) -> Iterator[tuple[int, dict[str, str]]]:
    """Run all seeds in `cores` processes; yield the number of finished seeds and their outcomes, in order of seeds."""
    waiting, running = list(seeds), list[tuple[multiprocessing.Process, range, Path, float]]()
    done: dict[int, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < cores:
                part = range(waiting[0], min(waiting[0] + CHUNK, seeds.stop))
                del waiting[: len(part)]
                log = Path(folder) / f"{part.start}.log"
                process = multiprocessing.Process(target=chunk, args=(outcome, part, Path(folder), data, log))
                process.start()
                running.append((process, part, log, time.monotonic() + 2 * SECONDS * CHUNK))
            time.sleep(0.05)
            for entry in [e for e in running if not e[0].is_alive() or time.monotonic() > e[3]]:
                entry[0].kill()
                entry[0].join()
                running.remove(entry)
                lines = dict(line.split(" ", 1) for line in entry[2].read_text("utf-8").splitlines())
                done[entry[1].start] = lines
                waiting[:0] = entry[1][len(lines) :]
            first = min([*waiting[:1], *(part.start for _, part, _, _ in running)], default=seeds.stop)
            for start in sorted(start for start in done if start < first):
                yield len(done[start]), done.pop(start)


def main() -> None:
    """Continue from the stored results up to the given numbers of seeds, and update the counts regularly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=20_000)
    parser.add_argument("--newer", type=int, default=20_000)
    parser.add_argument("--open", type=int, default=20_000)
    parser.add_argument("--damaged", type=int, default=100_000)
    parser.add_argument("--commands", type=int, default=4_000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fuzz.json")
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {}
    originals(options.data)  # cached before the workers are forked
    content |= {"machine": {"cpus": os.cpu_count(), "system": platform.platform()}, "commit": commit()}
    for kind, outcome, count in (
        ("graphs", graph_outcome, options.graphs),
        ("newer", of_newer_graph, options.newer),
        ("open", of_open_graph, options.open),
        ("damaged", damage_outcome, options.damaged),
        ("commands", of_command, options.commands),
    ):
        entry = content.setdefault(kind, {"seeds": 0, "seconds": 0.0, "outcomes": {}, "wrong": []})
        last = time.perf_counter()
        for number, found in run(outcome, range(entry["seeds"], count), options.data, options.cores):
            counts = Counter(entry["outcomes"]) + Counter(line.split(":")[0] for line in found.values())
            wrong = [f"{seed} {line}" for seed, line in found.items() if line[:3].isupper()]
            print(*(f"{kind} {line}" for line in wrong), sep="\n", end="\n" if wrong else "", flush=True)
            now = time.perf_counter()
            entry |= {"seeds": entry["seeds"] + number, "seconds": round(entry["seconds"] + now - last, 1)}
            entry |= {"outcomes": dict(sorted(counts.items())), "wrong": [*entry["wrong"], *wrong]}
            options.out.write_text(json.dumps(content, indent=1) + "\n")
            last = now
        print(kind, entry)


if __name__ == "__main__":
    main()
