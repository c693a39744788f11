"""Scores from gradients: what a channel does to the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

pytest.importorskip("torch")

import torch  # after the check for it
from torch.nn import functional as F

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.main import main
from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import LABELS, ArraySource
from cpd_onnx.ir.model import load
from cpd_onnx.scores.gradients import changes, curvatures, loss_of_sampled
from cpd_onnx.scores.registry import ScoreContext, score
from tests.support.models import from_text
from tests.support.runs import plain

TEXT = (
    "(float[N, 3] x, float[3, 4] w, float[4, 5] v) => (float[N, 5] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
)
RNG = np.random.default_rng(0)
W, V = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(4, 5)).astype(np.float32)
LABELLED = {"x": RNG.normal(size=(16, 3)).astype(np.float32), LABELS: np.arange(16) % 5}
PLAIN = {"x": LABELLED["x"]}
DIGITS = Path(cpd.__file__).parent / "models"


def model(second: np.ndarray = V) -> ModelProto:
    return from_text(TEXT, values={"w": W.tolist(), "v": second.tolist()})


def test_changes_are_the_gradient_of_a_mask() -> None:
    """Weights times gradients, summed over both sides of a channel, are twice the gradient of a factor on it."""
    combed, source = comb(model()), ArraySource(LABELLED)
    found = list(changes(ScoreContext(combed, source, samples=4, labels=True)))
    assert len(found) == 4
    for change, batch in zip(found, source.batches(1, seed=0), strict=False):
        mask = torch.ones(4, requires_grad=True)
        y = (torch.relu(torch.from_numpy(batch["x"] @ W)) * mask) @ torch.from_numpy(V)
        F.cross_entropy(y / 4, torch.from_numpy(batch[LABELS])).backward()
        assert mask.grad is not None
        np.testing.assert_allclose(change[combed.groups[0].channels], 2 * mask.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
@pytest.mark.parametrize("labels", [False, True])
def test_a_dead_channel_does_nothing(kind: str, labels: bool) -> None:
    second = V.copy()
    second[2] = 0
    (values,) = score(comb(model(second)), kind, data=ArraySource(LABELLED), labels=labels)
    assert values.argmin() == 2
    assert values[2] == 0 < np.delete(values, 2).min()


def test_the_square_of_changes_is_the_curvature() -> None:
    """The mean over answers drawn by the model is the second derivative of the divergence from the model itself."""
    count = 40_000
    logits, direction = torch.tensor([[1.0, -0.5, 2.0]]), torch.tensor([[0.3, -1.0, 0.7]])
    steps = torch.zeros(count, 1, requires_grad=True)
    loss_of_sampled(logits + steps * direction, 1, torch.Generator().manual_seed(0)).backward()
    assert steps.grad is not None
    p, direction = (logits / 4).softmax(1), direction / 4
    expected = float((p * direction**2).sum() - (p * direction).sum() ** 2)
    assert float((count * steps.grad).square().mean()) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize(("shape", "axis"), [((2, 7, 9, 8), 1), ((3, 4, 5), None), ((2, 3), 1)])
def test_any_output_can_be_asked(shape: tuple[int, ...], axis: int | None) -> None:
    answer = torch.randn(shape, requires_grad=True)
    loss_of_sampled(answer, axis, torch.Generator().manual_seed(0)).backward()
    assert answer.grad is not None
    assert answer.grad.abs().sum() > 0


def test_scores_by_gradients_keep_more_than_chance() -> None:
    data = ArraySource({k: v[:256] for k, v in np.load(DIGITS / "digits_train.npz").items()})
    errors = {}
    for kind in ("fisher", "taylor", "random"):
        state = cpd.run(
            f"comb, score{{kind='{kind}'}}, allocate{{channels=0.8}}, prune", DIGITS / "digits.onnx", data=data
        )
        original, small = state.original.complete_proto(), state.model.complete_proto()
        errors[kind] = evaluate(small, data, "mse", reference=original)
    assert errors["fisher"] < 0.6 * errors["random"]
    assert errors["taylor"] < 0.6 * errors["random"]


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    combed = comb(model())
    with pytest.raises(cpd.DataError, match="--data"):
        score(combed, "fisher")
    with pytest.raises(cpd.DataError, match="no array 'labels'"):
        score(combed, "fisher", data=ArraySource(PLAIN), labels=True)
    target = ["-o", str(tmp_path / "small.onnx"), "--score"]
    assert main(plain(["prune", str(DIGITS / "digits.onnx"), *target, "best"])) == 1
    assert "unknown score 'best'" in capsys.readouterr().err
    np.savez(tmp_path / "few.npz", **{k: v[:8] for k, v in np.load(DIGITS / "digits_train.npz").items()})
    command = ["prune", str(DIGITS / "digits.onnx"), *target, "fisher"]
    assert main(command) == 1
    assert "--data" in capsys.readouterr().err
    assert main(plain(command)) == 0  # on generated inputs
    assert (
        main(plain([*command, "--data", str(tmp_path / "few.npz"), "--force", "--samples", "4", "--policy", "global"]))
        == 0
    )


def test_curvatures_are_the_second_moments_of_the_gradients_of_the_loss() -> None:
    """For a linear model whose one output has a normal distribution, they follow from its weights."""
    rng = np.random.default_rng(0)
    down = rng.normal(size=(3, 1)).astype(np.float32)
    text = "(float[N, 4] x, float[4, 3] up, float[3, 1] down) => (float[N, 1] y) { h = MatMul (x, up) y = MatMul (h, down) }"
    combed = comb(load(from_text(text, values={"up": rng.normal(size=(4, 3)), "down": down})))
    source = ArraySource({"x": rng.normal(size=(64, 4)).astype(np.float32)})
    found = curvatures(ScoreContext(combed, source, samples=64))
    assert set(found) == {"up", "down"}
    # The gradient at h is that at y times the weights.
    np.testing.assert_allclose(found["up"][0], found["down"][0] * (down @ down.T), rtol=1e-4)
    assert found["down"].shape == (1, 1, 1)
    assert found["down"].item() > 0
