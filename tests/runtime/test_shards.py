"""Batches divided among processes: what is summed over them has the same bytes as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import pytest

from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.budget.latency import LatencyProbe, measure_table
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.main import main
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.errors import CpdError, DataError
from cpd_onnx.ir.model import load
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime import processes
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.runtime.processes import Place, joined, working
from cpd_onnx.runtime.shards import Divided, agreed, current_group
from cpd_onnx.scores.registry import score
from tests.support.digits import small_digits
from tests.support.runs import plain

T = TypeVar("T")
IMAGES = np.random.default_rng(0).standard_normal((48, 1, 8, 8)).astype(np.float32)


def together(size: int, function: Callable[[], T]) -> list[T]:
    """Return the results of a function in each of some processes, here threads, by rank."""
    results: dict[int, T] = {}

    def job(place: Place) -> None:
        with joined(place):
            results[place.rank] = function()

    with ThreadPoolExecutor(size) as pool, working(pool, size, job, is_local=True):
        results[0] = function()
    return [results[rank] for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 23])
def test_results_come_in_order_in_every_process(size: int, count: int) -> None:
    def run() -> tuple[list[int], list[int], list[int]]:
        items = Divided.among(range(count), held_out=count // 4)
        squares = items.map(lambda item: item**2)
        return items.each(lambda item: 10 * item), squares[2:].each(lambda item: item), squares.own

    found = together(size, run) if size > 1 else [run()]
    for everything, later, _ in found:
        assert everything == [10 * item for item in range(count)]
        assert later == [item**2 for item in range(2, count)]
    assert sorted(item for *_, own in found for item in own) == [item**2 for item in range(count)]


def test_items_stay_where_they_are_when_some_are_chosen() -> None:
    def run() -> list[tuple[int, int]]:
        rank = current_group().rank
        return Divided.among(range(6)).map(lambda item: (rank, item)).at([0, 0, 2, 5]).each(lambda pair: pair)

    assert together(2, run) == [[(0, 0), (0, 0), (0, 2), (0, 5)]] * 2


@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_sums_have_the_same_bytes_for_any_number_of_processes(count: int) -> None:
    numbers = np.random.default_rng(0).standard_normal((count, 5)).astype(np.float32) ** 5

    def run() -> tuple[int, bytes]:
        items = Divided.among(range(count), held_out=count // 8)
        total, squares = items.total(lambda item: (item, numbers[item]))
        np.testing.assert_allclose(squares, numbers.sum(axis=0, dtype=np.float64), rtol=1e-5)
        assert squares.dtype == np.float64
        return total, squares.tobytes() + items[: count // 2 + 1].total(lambda item: numbers[item]).tobytes()

    alone = run()
    assert alone[0] == sum(range(count))
    for size in (2, 3, 8, 11):
        assert together(size, run) == [alone] * size


def test_held_out_batches_are_divided_as_evenly_as_the_others() -> None:
    def run() -> tuple[int, int]:
        items = Divided.among(range(64), held_out=8)
        return len(items[:56].own), len(items[56:].own)

    assert together(4, run) == [(14, 2)] * 4


def test_what_the_first_process_measures_holds_in_all() -> None:
    assert together(3, lambda: agreed(lambda: current_group().rank + 0.5)) == [0.5] * 3
    assert agreed(lambda: 7) == 7


def test_processes_that_compute_something_else_are_told() -> None:
    """As where one has other samples: their sums would not be those of one run."""
    with pytest.raises(CpdError, match="the processes do not compute the same"):
        together(2, lambda: Divided.among(range(5 + current_group().rank)).total(lambda item: item))


@pytest.mark.parametrize(("size", "count"), [(2, 32), (5, 3)])
def test_scores_and_repairs_have_the_same_bytes(size: int, count: int) -> None:
    """With more processes than batches too."""
    combed = comb(load(small_digits()))
    data = ArraySource({"image": IMAGES[:count]})

    def run() -> tuple[bytes, bytes]:
        scores = score(combed, "reconstruction", samples=count, data=data)
        kept = allocate(combed, scores, Budget("macs", 0.5)).keep_mask(combed)
        made = repair(combed, kept, rewrite(combed, kept).model, data, RepairOptions(samples=count))
        assert made.fits
        return np.concatenate(scores).tobytes(), made.model.proto.SerializeToString(deterministic=True)

    alone = run()
    assert together(size, run) == [alone] * size


def test_a_worker_that_fails_ends_the_run_with_its_error() -> None:
    def job(place: Place) -> None:
        with joined(place):
            raise DataError("no such samples")

    with (
        pytest.raises(DataError, match="no such samples"),
        ThreadPoolExecutor(1) as pool,
        working(pool, 2, job, is_local=True),
    ):
        agreed(lambda: 1)


def test_a_first_process_that_fails_ends_its_workers() -> None:
    ended: list[str] = []

    def job(place: Place) -> None:
        try:
            with joined(place):
                agreed(lambda: 1)
        except CpdError as error:
            ended.append(str(error))
            raise

    with (
        pytest.raises(DataError, match="wrong"),
        ThreadPoolExecutor(1) as pool,
        working(pool, 2, job, is_local=True),
    ):
        raise DataError("wrong")
    assert len(ended) == 1
    assert "the first process of the run has ended" in ended[0]


def test_workers_that_cannot_all_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_SECONDS", 1.0)

    def job(place: Place) -> None:
        with joined(place):
            agreed(lambda: 1)

    with (
        pytest.raises(CpdError, match="only 1 of 3 further processes have started"),
        ThreadPoolExecutor(1) as pool,
        working(pool, 4, job, is_local=True),
    ):
        pass


def test_another_program_on_the_port_takes_no_part() -> None:
    def job(place: Place) -> None:
        with pytest.raises(Exception, match="digest"):  # its key is wrong
            Client((place.hosts[0], place.port), authkey=b"guessed")
        with joined(place):
            agreed(lambda: 1)

    with ThreadPoolExecutor(1) as pool, working(pool, 2, job, is_local=True):
        assert agreed(lambda: 1) == 1


def command(folder: Path, *more: object, target: str = "macs=0.5") -> list[str]:
    """Return the command line of a pruning with data, without the output."""
    onnx.save(small_digits(), folder / "digits.onnx")
    np.savez(folder / "data.npz", image=IMAGES)
    return plain(["prune", folder / "digits.onnx", "--target", target, "--data", folder / "data.npz", *more])


def test_processes_write_the_same_files(tmp_path: Path) -> None:
    line = command(tmp_path, "--effort", 3)
    for name, more in (("one", []), ("two", ["--processes", "2"])):
        (tmp_path / name).mkdir()
        assert main([*line, "-o", str(tmp_path / name / "small.onnx"), *more]) == 0
    for name in ("small.onnx", "small.onnx.plan.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_processes_agree_on_what_is_measured() -> None:
    """Times differ in each process; by different allocations they would not sum the same things."""
    combed = comb(load(small_digits()))

    def run() -> tuple[float, float, dict[str, Any]]:
        probe = LatencyProbe(combed, Setting(batch=1, threads=1))
        table = measure_table(probe)
        return probe.ratio(np.zeros(0, np.int64), seconds=0.01), probe.ms, table.as_json()

    first, second = together(2, run)
    assert first == second


def test_torchrun_shares_a_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    line = command(tmp_path, "--effort", 0)
    assert main([*line, "-o", str(tmp_path / "one.onnx")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "cpd_onnx"]
    done = subprocess.run(
        [*launcher, *line, "-o", str(tmp_path / "two.onnx"), "--json", "-"],
        capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip  # one command
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["output"].endswith("two.onnx")  # only the first process prints
    assert (tmp_path / "two.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()


def test_an_executor_needs_a_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(tmp_path), "-o", str(tmp_path / "x.onnx"), "--executor", "executors:pool"]) == 1
    assert "--processes 4" in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()
