"""The training run: it can be stopped, killed and continued, watched, shared by processes, and says what went wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

pytest.importorskip("torch")

import torch  # after the check for it

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.features import features_of
from cpd_onnx.cli.main import main
from cpd_onnx.data import metrics
from cpd_onnx.data.images import crops
from cpd_onnx.data.metrics import evaluate, open_session
from cpd_onnx.data.sources import LABELS, ArraySource
from cpd_onnx.errors import CpdError, StoppedError, TargetError, UnsupportedError
from cpd_onnx.ir.model import load
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.passes import iterate
from cpd_onnx.passes.distill import DistillResult, Overlap, Progress, Traces, Watched, distill
from cpd_onnx.passes.interleave import Interleave
from cpd_onnx.pipeline.state import State
from cpd_onnx.proof.files import verify_files
from cpd_onnx.scores.registry import score
from cpd_onnx.torch import import_model, write_weights
from cpd_onnx.training import loop, refolding, schedule
from cpd_onnx.training.cache import AnswerCache
from cpd_onnx.training.feed import memory_format
from cpd_onnx.training.losses import DistillationLoss, angle, correlation_distance
from cpd_onnx.training.options import DistillOptions
from tests.passes.test_distill import FAST, STUDENT, TEACHER, images, network, weights_of
from tests.support.digits import small_digits
from tests.support.runs import plain

OPTIONS = replace(FAST, epochs=1, steps=12, flip=True, shift=1, ema=0.9, threads=1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("channels", "stride", "size"), [(5, 2, 1), (5, 1, 1), (5, 2, 3), (16, 2, 1)])
def test_few_channels_before_a_strided_pointwise_kernel_are_not_trained_channels_last(
    channels: int, stride: int, size: int
) -> None:
    # In that layout, torch writes beyond the gradient of the kernel, which ends the process at random.
    kernel = numpy_helper.from_array(np.ones((4, channels, size, size), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[stride, stride])
    shapes = ("x", [1, channels, 8, 8]), ("y", None)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes)
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [kernel]))
    is_unsafe = channels == 5 and stride == 2 and size == 1
    assert memory_format(model, torch.device("cpu")) == (torch.contiguous_format if is_unsafe else torch.channels_last)
    assert memory_format(model, torch.device("cuda")) == torch.channels_last


def run(**more: Any) -> DistillResult:
    options = more.pop("options", OPTIONS)
    return distill(TEACHER, more.pop("student", STUDENT), ArraySource(images()), options, **more)


def as_bytes(result: DistillResult) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in result.values.items()}


# Stopping and going on.


def stop_at(step: int) -> Any:
    """A progress callback that tells this process to stop."""

    def tell(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return tell


@pytest.mark.parametrize("mode", ["frozen", "train", "restore"])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, mode: Any) -> None:
    options, traces = replace(OPTIONS, batch_norm=mode), Traces(tmp_path / "run.checkpoint", csv=tmp_path / "log.csv")
    whole = run(options=options)
    with pytest.raises(StoppedError, match=r"interrupted after step 5 of 12; .*--resume"):
        run(options=options, progress=stop_at(4), traces=traces)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = run(options=options, traces=replace(traces, resume=True))
    assert as_bytes(resumed) == as_bytes(whole)
    assert resumed.losses == whole.losses
    with (tmp_path / "log.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [float(row["value"]) for row in rows] == list(whole.losses)


def test_checkpoints_are_written_at_intervals(tmp_path: Path) -> None:
    written: list[int] = []
    path = tmp_path / "run.checkpoint"

    def look(progress: Progress) -> None:
        if path.exists():
            written.append(torch.load(path, weights_only=True)["step"])

    run(progress=look, traces=Traces(path, seconds=0))
    assert written == list(range(1, 12))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    traces = Traces(tmp_path / "run.checkpoint", seconds=0)
    run(traces=traces)
    with pytest.raises(CpdError, match="another run"):
        run(options=replace(OPTIONS, lr=1e-4), traces=replace(traces, resume=True))
    (tmp_path / "run.checkpoint").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(CpdError, match="cannot be read as a checkpoint"):
        run(traces=replace(traces, resume=True))
    with pytest.raises(CpdError, match=r"no checkpoint .* to resume from"):
        run(traces=Traces(tmp_path / "none", resume=True))


def on_disk(folder: Path) -> list[str]:
    """A command line that trains the student, with its files in a folder."""
    onnx.save(TEACHER, folder / "teacher.onnx")
    onnx.save(STUDENT, folder / "student.onnx")
    np.savez(folder / "data.npz", **images())
    files = [folder / "teacher.onnx", folder / "student.onnx", "--data", folder / "data.npz"]
    training = ["--steps", 40, "--batch-size", 32, "--threads", 1, "--batch-norm", "train", "--checkpoint-seconds", 0]
    return ["distill", *map(str, [*files, *training])]


def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    command = on_disk(tmp_path)
    assert main(plain([*command, "-o", str(tmp_path / "whole.onnx")])) == 0
    out, checkpoint = tmp_path / "killed.onnx", tmp_path / "killed.onnx.checkpoint"
    line = [sys.executable, "-m", "cpd_onnx", *command, "-o", str(out)]
    for _ in range(3):
        resume = ["--resume"] if checkpoint.exists() else []
        process = subprocess.Popen([*line, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, end = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                break
        process.kill()
        process.wait()
        assert not out.exists() or process.returncode == 0
    if not out.exists():
        assert main(plain([*command, "-o", str(out), "--resume"])) == 0
    assert out.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not checkpoint.exists()


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*on_disk(tmp_path), "-o", str(tmp_path / "out.onnx")]
    (tmp_path / "out.onnx.checkpoint").write_bytes(b"something")
    assert main(command) == 1
    assert "holds an unfinished run: continue with --resume" in capsys.readouterr().err


# What goes wrong.


def test_the_node_where_the_numbers_break_is_named() -> None:
    weights = weights_of()
    model = network(weights, tail=("Log",))  # of negative numbers
    with pytest.raises(CpdError, match=r"the loss became nan at step 1, first in node 't1' \(Log\)"):
        distill(model, model, ArraySource(images()), replace(FAST, steps=2, losses={"t1": "mse"}, batch_norm="frozen"))


def test_the_initializer_where_the_numbers_break_is_named() -> None:
    student = write_weights(STUDENT, {"fc.b": np.full(4, np.nan, np.float32)})
    with pytest.raises(CpdError, match=r"first in initializer 'fc\.b'"):
        run(student=student, options=replace(OPTIONS, batch_norm="frozen"))


# Batch normalisation.


def folded_network() -> onnx.ModelProto:
    """The network as exporters leave it: the normalisation has gone into the convolution."""
    model = network(weights_of())
    nodes = [n for n in model.graph.node if n.op_type != "BatchNormalization"]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.node[1].input[0] = "c"
    kept = [t for t in model.graph.initializer if not t.name.startswith("bn.")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def test_a_restored_normalisation_changes_nothing_until_it_trains() -> None:
    model = folded_network()
    made, restored = refolding.restore(model)
    assert [entry.weight for entry in restored] == ["conv.w"]
    module = import_model(made, batch_norm="train")
    batches = [[torch.from_numpy(images()["x"][start : start + 32])] for start in range(0, 192, 32)]
    own = refolding.measure(module, restored, batches)
    refolding.begin(module, restored, own, {})
    state = module.onnx_state()
    np.testing.assert_allclose((state["conv.w"] ** 2).sum((1, 2, 3)), 1.0, rtol=1e-5)
    with torch.no_grad():
        (answer,) = module(batches[0][0])
    (expected,) = open_session(model).run(None, {"x": batches[0][0].numpy()})
    np.testing.assert_allclose(answer.numpy(), expected, atol=1e-4)
    back = write_weights(model, refolding.refold(state, restored))
    (again,) = open_session(back).run(None, {"x": batches[0][0].numpy()})
    np.testing.assert_allclose(again, expected, atol=1e-4)


def test_training_with_restored_normalisation_keeps_the_nodes() -> None:
    teacher = folded_network()
    student = write_weights(teacher, {"conv.w": weights_of()["conv.w"] * 0.3, "conv.b": weights_of()["conv.b"] + 1})
    source = ArraySource(images())
    result = distill(teacher, student, source, replace(FAST, batch_norm="restore", losses={"t0": "mse"}))
    assert result.restored == 1
    assert set(result.values) <= {t.name for t in student.graph.initializer}
    before, after = (
        evaluate(write_weights(student, values), source, "mse", reference=teacher) for values in ({}, result.values)
    )
    assert after < 0.1 * before


def test_a_pruned_network_starts_with_the_moments_of_its_original() -> None:
    """Of 16 channels 10 are left, in another size; after the start they have the original's mean and spread."""
    teacher, kept = folded_network(), np.array([0, 2, 3, 5, 6, 8, 9, 11, 13, 15])
    weights = weights_of()
    student = onnx.ModelProto.FromString(teacher.SerializeToString())
    small = {
        "conv.w": weights["conv.w"][kept] * 3,
        "conv.b": weights["conv.b"][kept] - 2,
        "fc.w": weights["fc.w"][:, kept],
    }
    for tensor in student.graph.initializer:
        if tensor.name in small:
            tensor.CopyFrom(numpy_helper.from_array(small[tensor.name], tensor.name))
    overlap = Overlap(filters={"conv.w": kept})
    options = replace(FAST, batch_norm="restore", steps=1, lr=1e-12, weight_decay=0.0)
    result = distill(teacher, student, ArraySource(images()), options, overlap=overlap)
    maps = [
        open_session(with_output(model, "c")).run(["c"], images())[0]
        for model in (teacher, write_weights(student, result.values))
    ]
    np.testing.assert_allclose(maps[1].mean((0, 2, 3)), maps[0][:, kept].mean((0, 2, 3)), atol=0.1)
    np.testing.assert_allclose(maps[1].std((0, 2, 3)), maps[0][:, kept].std((0, 2, 3)), rtol=0.1)


def test_statistics_alone_are_estimated_anew() -> None:
    moved = {"x": images()["x"] * 3 + 1}
    result = distill(TEACHER, STUDENT, ArraySource(moved), replace(FAST, steps=6, batch_norm="calibrate"))
    assert set(result.values) == {"bn.mean", "bn.var"}
    assert result.losses == ()
    session = open_session(with_output(STUDENT, "c"))
    maps = session.run(["c"], moved)[0]
    np.testing.assert_allclose(result.values["bn.mean"], maps.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(result.values["bn.var"], maps.var((0, 2, 3)), rtol=2e-2)
    with pytest.raises(CpdError, match="no BatchNormalization"):
        distill(folded_network(), folded_network(), ArraySource(moved), replace(FAST, steps=1, batch_norm="calibrate"))


def with_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.output.append(helper.make_empty_tensor_value_info(name))
    return made


# What is compared.


def test_correlations_ignore_scale_and_shift() -> None:
    a = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(1)
    assert float(correlation_distance(a, a, 1, 1.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(correlation_distance(a, a.flip(1), 1, 1.0)) > 0.3
    rows, columns = a.softmax(1).numpy(), a.flip(0).softmax(1).numpy()
    between = np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(rows, columns, strict=True)])
    within = np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(rows.T, columns.T, strict=True)])
    assert float(correlation_distance(a, a.flip(0), 1, 1.0)) == pytest.approx(2 - between - within, rel=1e-4)


def test_angles_ignore_length() -> None:
    a = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert float(angle(a, 5 * a)) == pytest.approx(0.0, abs=1e-6)
    assert float(angle(a, -a)) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["dist", "cosine"])
def test_each_loss_trains(kind: Any) -> None:
    losses = run(options=replace(FAST, losses={"t0": kind}, epochs=8)).losses
    assert np.mean(losses[-6:]) < 0.5 * np.mean(losses[:6])


def test_outputs_without_weight_do_not_count() -> None:
    with pytest.raises(CpdError, match="all have weight 0"):
        run(options=replace(OPTIONS, output_weights={"t0": 0.0}))


def test_inner_tensors_are_compared_on_shared_channels() -> None:
    model = cpd.load(Path(cpd.__file__).parent / "models" / "digits.onnx")
    data = np.load(Path(cpd.__file__).parent / "models" / "digits_train.npz")
    source = ArraySource(
        {"image": data["image"][:128]} if "image" in data else {k: data[k][:128] for k in data if k != LABELS}
    )
    options = "hidden=2, steps=4, batch_size=32, threads=1"
    state = cpd.run(f"comb, score, allocate{{macs=0.4}}, prune, distill{{{options}}}", model, data=source)
    assert state.distilled is not None
    names = state.distilled["compared"]
    assert len(names) == 2
    made = {name for node in model.graph.node for name in node.output}
    assert set(names) <= made - {o.name for o in model.graph.output}


def test_few_samples_are_compared_by_the_features() -> None:
    """The weights after the features learn nothing, and the pruned channels are those that the plan lists."""
    model = cpd.load(Path(cpd.__file__).parent / "models" / "digits.onnx")
    data = np.load(Path(cpd.__file__).parent / "models" / "digits_train.npz")
    source = ArraySource({"image": data["image"][:128]})

    def run(options: str) -> State:
        steps = "steps=4, batch_size=32, threads=1"
        return cpd.run(f"comb, score, allocate{{macs=0.4}}, prune, distill{{{steps}{options}}}", model, data=source)

    few, same, other = run(""), run(", compare='features'"), run(", compare='outputs'")
    names = features_of(comb(model))
    assert few.distilled is not None
    assert other.distilled is not None
    assert few.distilled["compared"] == names
    assert few.distilled["losses"] == {}
    assert other.distilled["compared"] == []
    assert list(other.distilled["losses"].values()) == ["kl"]
    few_bytes, same_bytes, other_bytes = (
        state.model.complete_proto().SerializeToString() for state in (few, same, other)
    )
    assert few_bytes == same_bytes != other_bytes
    last = next(node for node in reversed(model.proto.graph.node) if traits_of(node).sums_products)
    untrained = cpd.run("comb, score, allocate{macs=0.4}, prune", model, data=source).model
    np.testing.assert_array_equal(few.model.array(last.input[1]), untrained.array(last.input[1]))
    assert not np.array_equal(other.model.array(last.input[1]), untrained.array(last.input[1]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no features to compare"),
        ({"label_weight": 0.5}, "no part of the loss to outputs and labels"),
        ({"losses": {"t0": "mse"}}, "no part of the loss to outputs and labels"),
    ],
)
def test_features_cannot_be_compared_without_a_plan_or_beside_outputs(options: dict[str, Any], said: str) -> None:
    data = ArraySource(images() | {LABELS: np.zeros(192, np.int64)})
    with pytest.raises(CpdError, match=said):
        distill(TEACHER, STUDENT, data, replace(FAST, steps=1, compare="features", **options))


def test_features_that_a_model_lacks_are_not_compared() -> None:
    """As where a local function makes them, or a tool has renamed the tensors of the student."""
    result = run(overlap=Overlap(features={"of another model": {}}))
    assert result.compared == ()
    assert result.kinds == {"t0": "kl"}


# Watching.


def test_the_gradients_of_the_parts_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run()
    monkeypatch.setattr(loop, "_TOGETHER", 5 * images(1)["x"].size)
    calls: list[int] = []
    loss = DistillationLoss.loss

    def noted(self: DistillationLoss, answers: Any, *rest: Any) -> Any:
        calls.append(len(answers[0]))
        return loss(self, answers, *rest)

    monkeypatch.setattr(DistillationLoss, "loss", noted)
    parts = run()
    assert calls[:7] == [5, 5, 5, 5, 5, 5, 2]
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-4)
    for name, values in whole.values.items():
        np.testing.assert_allclose(parts.values[name], values, atol=1e-4)
    calls.clear()
    run(options=replace(OPTIONS, losses={"t0": "dist"}))  # compares the samples of a batch
    assert set(calls) == {32}


@pytest.mark.parametrize(
    ("options", "work", "updates"),
    [
        ({}, None, 24),
        ({"crop": 1.0}, None, 20),
        ({"epochs": 3}, None, 6),
        ({"label_weight": 0.5}, None, 20),
        ({}, 0, 20),
    ],
)
def test_few_images_are_cropped_and_train_longer(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], work: int | None, updates: int
) -> None:
    folder = Path(cpd.__file__).parent / "models"
    model = cpd.load(folder / "digits.onnx").complete_proto()
    data = {name: array[:64] for name, array in np.load(folder / "digits_train.npz").items()}
    monkeypatch.setattr(schedule, "UPDATES", 24)
    monkeypatch.setattr(crops, "_SHORTEST", 8)
    if work is not None:
        monkeypatch.setattr(schedule, "_MOST_WORK", work)
    result = distill(model, model, ArraySource(data), DistillOptions(batch_size=32, threads=1, **options))
    assert len(result.losses) == updates


def test_training_stops_when_held_out_data_gains_nothing() -> None:
    options = replace(FAST, steps=200, batch_norm="frozen", losses={"t0": "mse"})
    watched = Watched(ArraySource(images(64)), "mse", every=3, patience=2)
    assert len(run(student=TEACHER, options=options, watched=watched).losses) == 9


def test_the_best_weights_are_the_result(tmp_path: Path) -> None:
    source, traces = ArraySource(images(64)), Traces(csv=tmp_path / "log.csv")
    watched = Watched(source, "mse", every=2, patience=3)
    options = replace(FAST, steps=60, lr=0.5, clip_norm=0.0, batch_norm="frozen", losses={"t0": "mse"})
    result = run(options=options, watched=watched, traces=traces)
    with (tmp_path / "log.csv").open() as stream:
        scores = [float(row["value"]) for row in csv.DictReader(stream) if row["what"] == "held out"]
    assert evaluate(write_weights(STUDENT, result.values), source, "mse", reference=TEACHER) == min(scores)
    assert scores[-1] > min(scores)
    assert [value for _, value in result.judged] == scores
    assert result.metric == {"metric": "mse"}


def test_the_average_is_the_result() -> None:
    plain, averaged = (run(options=replace(FAST, steps=30, lr=0.05, ema=decay)) for decay in (0.0, 0.95))
    assert plain.losses == averaged.losses
    assert as_bytes(plain) != as_bytes(averaged)


# Several processes.


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Data parallel by torchrun with the gloo backend, at the same global batch."""
    command = [*on_disk(tmp_path)]
    command[command.index("--batch-norm") + 1] = "frozen"
    assert main(plain([*command, "-o", str(tmp_path / "one.onnx")])) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "cpd_onnx"]
    line = [*launcher, *command, "--device", "cpu", "-o", str(tmp_path / "two.onnx")]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (onnx.load(tmp_path / name) for name in ("one.onnx", "two.onnx"))
    for a, b in zip(one.graph.initializer, two.graph.initializer, strict=True):
        x, y = numpy_helper.to_array(a), numpy_helper.to_array(b)
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4, err_msg=a.name)


def test_two_processes_go_through_rounds_together(tmp_path: Path) -> None:
    folder = Path(cpd.__file__).parent / "models"
    arrays = dict(np.load(folder / "digits_train.npz"))
    np.savez(tmp_path / "few.npz", **{k: v[:64] for k, v in arrays.items()})
    onnx.save(small_digits(), tmp_path / "digits.onnx")
    training = ["--data", tmp_path / "few.npz", "--steps", 4, "--batch-size", 32, "--threads", 1, "--device", "cpu"]
    command = [
        "compress",
        tmp_path / "digits.onnx",
        "-o",
        tmp_path / "two.onnx",
        "--rounds",
        2,
        "--no-report",
        *training,
    ]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "cpd_onnx"]
    done = subprocess.run(
        [*line, *plain(command)], capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip  # one command
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(plain(["verify", str(tmp_path / "digits.onnx"), str(tmp_path / "two.onnx")])) == 0


# Pruning and training in turns.


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_share_one_plan(tmp_path: Path, rounds: int) -> None:
    folder = Path(cpd.__file__).parent / "models"
    data = {k: v[:256] for k, v in np.load(folder / "digits_train.npz").items() if k != LABELS}
    told: list[int] = []
    step = Interleave(macs=0.4, rounds=rounds, steps=12, batch_size=32, threads=1, lr=3e-3, effort=0)
    model = cpd.load(folder / "digits.onnx")
    start = cpd.State(model, model, data=ArraySource(data))
    state = step.run(start, lambda number, result: told.append(len(result.losses)))
    assert told == [12 // rounds] * rounds
    assert state.plan is not None
    assert state.allocation is not None
    assert state.allocation.after.macs == pytest.approx(0.4 * state.allocation.before.macs, rel=0.05)
    found = verify_files(model, state.model, state.plan)
    assert not found.is_replay
    assert found.comparison.passed
    assert state.distilled is not None
    assert state.distilled["rounds"] == rounds


@pytest.mark.parametrize(("rate", "is_kept"), [(1e-3, True), (0.1, False)])
def test_training_is_undone_unless_the_outputs_come_nearer(rate: float, is_kept: bool) -> None:
    folder = Path(cpd.__file__).parent / "models"
    data = {k: v[:256] for k, v in np.load(folder / "digits_train.npz").items() if k != LABELS}
    model = cpd.load(folder / "digits.onnx")
    untrained: list[cpd.Model] = []
    step = Interleave(macs=0.3, steps=40, batch_size=32, threads=1, lr=rate, effort=0)
    source = ArraySource(data)
    state = step.run(cpd.State(model, model, data=source), lambda now, _: untrained.append(now.small))
    assert state.distilled is not None
    found = state.distilled["held_out"]
    assert found["samples"] == 256 // 8
    assert (found["after"] < found["before"]) is found["kept"] is is_kept
    assert state.data is source
    changed = state.model.complete_proto() != untrained[0].complete_proto()
    assert changed is is_kept


def test_training_with_labels_is_not_compared_with_the_original() -> None:
    folder = Path(cpd.__file__).parent / "models"
    data = {k: v[:128] for k, v in np.load(folder / "digits_train.npz").items()}
    model = cpd.load(folder / "digits.onnx")
    step = Interleave(macs=0.5, steps=2, batch_size=32, threads=1, label_weight=0.5, effort=0)
    state = step(cpd.State(model, model, data=ArraySource(data)))
    assert state.distilled is not None
    assert state.distilled["held_out"] is None


def test_what_went_stays_away_and_what_was_trained_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round sees the values of the first, in a model of the original size."""
    seen: list[Any] = []
    monkeypatch.setattr(iterate, "score", lambda combed, *a, **k: seen.append(combed) or score(combed, *a, **k))
    folder = Path(cpd.__file__).parent / "models"
    data = {k: v[:64] for k, v in np.load(folder / "digits_train.npz").items() if k != LABELS}
    model = cpd.load(folder / "digits.onnx")
    state = Interleave(channels=0.5, rounds=2, steps=6, batch_size=32, threads=1, lr=1e-2).run(
        cpd.State(model, model, data=ArraySource(data))
    )
    first, second = (combed.folded.model for combed in seen)
    changed = 0
    for tensor in model.graph.initializer:
        before, after = first.array(tensor.name), second.array(tensor.name)
        assert before.shape == after.shape == model.array(tensor.name).shape
        changed += int((before != after).sum())
    assert changed > 1000
    assert state.allocation is not None
    assert all(len(set(gone)) == len(gone) for gone in state.allocation.removed)


def test_rounds_are_a_pass(tmp_path: Path) -> None:
    folder = Path(cpd.__file__).parent / "models"
    data = {k: v[:64] for k, v in np.load(folder / "digits_train.npz").items() if k != LABELS}
    text = "interleave{macs=0.5, rounds=2, steps=4, batch_size=32, threads=1}"
    state = cpd.run(text, folder / "digits.onnx", data=ArraySource(data))
    assert state.distilled is not None
    assert state.distilled["steps"] == 4
    with pytest.raises(TargetError, match="rounds must be at least 1, got 0"):
        cpd.run("interleave{rounds=0}", folder / "digits.onnx", data=ArraySource(data))


@pytest.mark.parametrize("round_", [1, 2])
def test_stopped_rounds_go_on_to_the_same_bytes(tmp_path: Path, round_: int) -> None:
    model = load(TEACHER)
    step = Interleave(macs=0.5, rounds=2, steps=12, batch_size=32, threads=1)
    state = State(model, model, {}, ArraySource(images()))
    whole = step.run(state).model.complete_proto().SerializeToString(deterministic=True)
    traces = Traces(tmp_path / "run", csv=tmp_path / "log.csv")
    rounds: list[int] = []

    def stop(progress: Progress) -> None:
        if len(rounds) == round_ - 1 and progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="after step 4 of 6"):
        step.run(state, lambda made, _: rounds.append(made.number), stop, traces=traces)
    steps: list[int] = []
    resumed = step.run(state, progress=lambda now: steps.append(now.step), traces=replace(traces, resume=True))
    assert resumed.model.complete_proto().SerializeToString(deterministic=True) == whole
    assert steps == ([5, 6, *range(1, 7)] if round_ == 1 else [5, 6])
    assert all((tmp_path / f"log.csv.{number}").read_text().count("loss") == 6 for number in (1, 2))


# Who runs the teacher, and how often.


def test_the_teacher_in_onnxruntime_and_torch_teach_the_same() -> None:
    a, b = (run(options=replace(OPTIONS, teacher_runtime=runtime)) for runtime in ("onnxruntime", "torch"))
    np.testing.assert_allclose(a.losses, b.losses, rtol=1e-4)


def test_what_one_runtime_lacks_the_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise UnsupportedError("no such kernel")

    expected = run(options=replace(OPTIONS, teacher_runtime="torch"))
    monkeypatch.setattr(metrics, "open_session", fail)
    assert as_bytes(run()) == as_bytes(expected)
    with pytest.raises(CpdError, match="no such kernel"):
        run(options=replace(OPTIONS, teacher_runtime="onnxruntime"))


def test_answers_in_a_cache_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = metrics.run

    def count(session: Any, batch: Any) -> Any:
        asked.append(len(next(iter(batch.values()))))
        return ask(session, batch)

    monkeypatch.setattr(metrics, "run", count)
    path, samples = tmp_path / "answers", len(next(iter(images().values())))
    plain = replace(OPTIONS, flip=False, shift=0, epochs=3, steps=None, batch_size=32)
    without = run(options=plain)
    assert sum(asked) == 3 * samples
    asked.clear()
    cached = run(options=replace(plain, teacher_cache=path))
    assert sum(asked) == samples
    np.testing.assert_allclose(cached.losses, without.losses, rtol=1e-4)
    asked.clear()
    again = run(options=replace(plain, teacher_cache=path))
    assert not asked
    assert as_bytes(again) == as_bytes(cached)


def test_a_cache_of_changing_images_or_no_cache_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CpdError, match="leave out the augmentation"):
        run(options=replace(OPTIONS, teacher_cache=tmp_path / "answers"))
    (tmp_path / "text").write_text("not a table of answers " * 100)
    with pytest.raises(CpdError, match="cannot be used as a cache"):
        run(options=replace(OPTIONS, flip=False, shift=0, teacher_cache=tmp_path / "text"))


def test_a_cache_tells_questions_apart(tmp_path: Path) -> None:
    def sums(inputs: Any) -> Any:
        return [inputs[0].sum(1), inputs[0].sum()]  # the second has no row per sample

    cache = AnswerCache(tmp_path / "answers", sums, b"sums")
    x = torch.arange(6.0).reshape(3, 2)
    for _ in range(2):
        assert [a.tolist() for a in cache([x])] == [[1.0, 5.0, 9.0], 15.0]
        assert [a.tolist() for a in cache([x[:1]])] == [[1.0], 1.0]
    rows = AnswerCache(tmp_path / "answers", lambda inputs: [2 * inputs[0]], b"twice")
    assert torch.equal(rows([x])[0], 2 * x)
    assert torch.equal(rows([x.flip(0)])[0], 2 * x.flip(0))
    assert torch.equal(rows([x[1:]])[0], 2 * x[1:])
    assert torch.equal(rows([x.int()])[0], 2 * x.int())


def test_mixed_precision_trains_and_keeps_the_file_in_float32() -> None:
    options = replace(FAST, steps=60, mixed_precision=True, batch_norm="train")
    result, exact = run(options=options), run(options=replace(options, mixed_precision=False))
    assert {value.dtype for value in result.values.values()} == {np.dtype(np.float32)}
    assert as_bytes(result) != as_bytes(exact)
    assert result.losses[-1] < 0.7 * result.losses[0]
    assert result.losses[-1] == pytest.approx(exact.losses[-1], rel=0.2)


# Quantised models.


class _Calibration(CalibrationDataReader):
    """A few batches for onnxruntime's quantiser."""

    def __init__(self) -> None:
        self.batches = iter([images(64)])

    def get_next(self) -> Any:
        return next(self.batches, None)


def test_a_pruned_int8_model_learns_and_stays_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(TEACHER, tmp_path / "float.onnx")
    np.savez(tmp_path / "data.npz", **images())
    int8, small, out = (str(tmp_path / f"{name}.onnx") for name in ("int8", "small", "out"))
    quantize_static(tmp_path / "float.onnx", int8, _Calibration(), per_channel=True)
    assert main(plain(["prune", int8, "-o", small, "--target", "channels=0.7"])) == 0
    training = ["--steps", "60", "--batch-size", "32", "--lr", "0.02", "--threads", "1", "--batch-norm", "frozen"]
    data = ["--data", str(tmp_path / "data.npz"), "--eval", str(tmp_path / "data.npz"), "--metric", "mse"]
    capsys.readouterr()
    assert main(plain(["distill", int8, small, "-o", out, *data, *training, "--json", "-"])) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["distilled"] < 0.5 * scores["student"]
    assert main(plain(["verify", int8, out])) == 0
    before, after = (onnx.load(path).graph for path in (small, out))
    changed = {a.data_type for a, b in zip(before.initializer, after.initializer, strict=True) if a != b}
    assert changed == {TensorProto.INT8, TensorProto.INT32}
    assert before.node == after.node
