"""Scores from activations: what a channel carries where it is consumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.cli.main import main
from cpd_onnx.data.sources import ArraySource, inputs_of
from cpd_onnx.pipeline.state import State
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.scores import activations
from cpd_onnx.scores.registry import ScoreContext, score
from tests.support.models import from_text
from tests.support.runs import plain

DATA = Path(os.environ.get("CPD_DATA", Path(__file__).parents[3] / "shared" / "data")) / "onnx"
KINDS = ("activation", "wanda", "variance")
DIGITS = Path(cpd.__file__).parent / "models"
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


W, BIAS, V = normal(3, 4), np.asarray([0, 0, 0, 5], np.float32), normal(4, 5)
W[:, 3] = 0  # channel 3 is constant
V[1] = 0  # nobody listens to channel 1
W[:, 2] = 0  # channel 2 is dead
X = normal(32, 3)
MLP = (
    "(float[N, 3] x, float[3, 4] w, float[4] b, float[4, 5] v) => (float[N, 5] y)"
    " { a = MatMul(x, w) c = Add(a, b) d = Relu(c) y = MatMul(d, v) }"
)


def mlp() -> ModelProto:
    return from_text(MLP, values={"w": W.tolist(), "b": BIAS.tolist(), "v": V.tolist()})


def error_of(state: State, feed: dict[str, np.ndarray]) -> float:
    """Mean square of what pruning changes in the first output."""
    before, after = (execute(open_model(model), feed)[0] for model in (state.original, state.model))
    return float(np.square(before - after).mean())


def test_values_are_those_of_the_papers() -> None:
    hidden = np.maximum(X.astype(np.float64) @ W + BIAS, 0)
    energy = (hidden**2).mean(0)
    expected = {
        "activation": energy / energy.mean(),
        "wanda": np.sqrt(energy) * np.abs(V).sum(1),
        "variance": hidden.var(0) * (V.astype(np.float64) ** 2).sum(1),
    }
    for kind, wanted in expected.items():
        (found,) = score(comb(mlp()), kind, data=ArraySource({"x": X}), samples=len(X))
        wanted[1] = 0  # no weight reads it, so that it goes first, like the dead one
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-8, err_msg=kind)
    assert expected["activation"].argmax() == 3
    assert expected["variance"][3] == 0 < expected["wanda"][3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_channel_goes_first(kind: str) -> None:
    state = cpd.run(
        f"comb, score{{kind='{kind}'}}, allocate{{channels=0.75}}, prune", mlp(), data=ArraySource({"x": X})
    )
    (values,), (removed,) = state.need("scores", "score"), state.need("allocation", "allocate").removed
    assert values[2] <= 0
    assert removed == [int(values.argmin())]
    assert error_of(state, {"x": X}) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_what_overflows_stays(kind: str) -> None:
    bias = [np.inf, 0, 0, 5]
    model = from_text(MLP, values={"w": W.tolist(), "b": bias, "v": V.tolist()})
    (values,) = score(comb(model), kind, data=ArraySource({"x": X}), samples=len(X))
    assert values.argmax() == 0
    assert np.isfinite(values).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_samples_does_not_matter(kind: str) -> None:
    combed = comb(mlp())
    found = [
        score(combed, kind, data=ArraySource({"x": rows}), samples=len(X), seed=seed)[0]
        for rows, seed in ((X, 0), (X[::-1].copy(), 0), (X, 1))
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-9, atol=1e-12)


CASES: dict[str, tuple[str, str]] = {
    "conv": (
        "(float[N, 3, 6, 6] x, float[8, 3, 3, 3] w, float[5, 8, 3, 3] v) => (float[N, 5, 2, 2] y)"
        " { a = Conv(x, w) y = Conv(a, v) }",
        "nchw,ockl->n",
    ),
    "transposed": (
        "(float[N, 3, 6, 6] x, float[8, 3, 3, 3] w, float[8, 5, 3, 3] v) => (float[N, 5, 6, 6] y)"
        " { a = Conv(x, w) y = ConvTranspose(a, v) }",
        "nchw,cokl->n",
    ),
    "gemm": (
        "(float[N, 3] x, float[3, 8] w, float[5, 8] v) => (float[N, 5] y) { a = MatMul(x, w) y = Gemm<transB=1>(a, v) }",
        "nc,oc->n",
    ),
    "einsum": (
        "(float[N, 4, 3] x, float[3, 8] w, float[5, 8] v) => (float[N, 4, 5] y)"
        ' { a = MatMul(x, w) y = Einsum<equation="nsc,oc->nso">(a, v) }',
        "nsc,oc->n",
    ),
    "behind a transposition": (
        "(float[N, 4, 3] x, float[3, 8] w, float[5, 8] v) => (float[N, 4, 5] y)"
        " { a = MatMul(x, w) t = Transpose<perm=[1, 0]>(v) y = MatMul(a, t) }",
        "nsc,oc->n",
    ),
    "fused": (
        "(float[N, 4, 3] x, float[3, 8] w, float[5, 8] v) => (float[N, 4, 5] y)"
        " { a = MatMul(x, w) y = com.microsoft.FusedMatMul<transB=1>(a, v) }",
        "nsc,oc->n",
    ),
}


def data_of(combed: Combed, count: int = 6) -> dict[str, np.ndarray]:
    values = [v for n, v in combed.folded.scope.values.items() if n.startswith("x")]
    return {v.name: normal(count, *(v.shape or ())[1:]) for v in values}


@pytest.mark.parametrize("name", CASES)
def test_every_operator_says_where_it_consumes(name: str) -> None:
    """The consumer's input `a` and weight `v` are reduced along the axes that the operator's own letters name."""
    text, letters = CASES[name]
    combed = comb(from_text(text))
    feed = data_of(combed)
    hidden = _run(combed, feed, "a")
    weight = combed.folded.model.array("v").astype(np.float64)
    left, right = letters.removesuffix("->n").split(",")
    axes = [tuple(k for k, letter in enumerate(term) if letter != "c") for term in (left, right)]
    (found,) = score(combed, "wanda", data=ArraySource(feed), samples=6)
    expected = np.sqrt((hidden**2).mean(axes[0])) * np.abs(weight).sum(axes[1])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    (found,) = score(combed, "variance", data=ArraySource(feed), samples=6)
    np.testing.assert_allclose(found, hidden.var(axes[0]) * (weight**2).sum(axes[1]), rtol=1e-4)


def _run(combed: Combed, feed: dict[str, Any], name: str) -> np.ndarray:
    context = ScoreContext(combed, ArraySource(feed), len(next(iter(feed.values()))))
    order = np.random.default_rng(0).permutation(context.samples)
    (found,) = list(activations.batches(context, [name]))
    return found[name][np.argsort(order)].astype(np.float64)


def test_groups_meet_their_own_weights() -> None:
    """A convolution in two groups: channel 5 is channel 1 of the second group, which feeds outputs 3 to 5."""
    model = from_text(
        "(float[N, 3, 4, 4] x, float[8, 3, 1, 1] w, float[6, 4, 1, 1] v, float[2, 6, 1, 1] u) => (float[N, 2, 4, 4] y)"
        " { a = Conv(x, w) b = Conv<group=2>(a, v) y = Conv(b, u) }"
    )
    combed = comb(model)
    feed = data_of(combed)
    hidden, weight = _run(combed, feed, "a"), combed.folded.model.array("v").astype(np.float64)
    consumed = next(
        c for c in activations.consumers(ScoreContext(combed, ArraySource(feed), 6)) if len(c.channels) == 8
    )
    expected = np.concatenate([np.abs(weight[3 * g : 3 * g + 3]).sum((0, 2, 3)) for g in range(2)])
    np.testing.assert_allclose(consumed.absolute, expected, rtol=1e-6)
    np.testing.assert_allclose(consumed.own.energy, (hidden**2).mean((0, 2, 3)), rtol=1e-4)


ATTENTION = (
    "(float[N, 5, 6] x, float[6, 6] q, float[6, 6] k, float[6, 6] v, float[6, 6] o, int64[4] s, int64[3] m)"
    " => (float[N, 5, 6] y) {"
    " qa = MatMul(x, q) qb = Reshape(qa, s) qc = Transpose<perm=[0, 2, 1, 3]>(qb)"
    " ka = MatMul(x, k) kb = Reshape(ka, s) kc = Transpose<perm=[0, 2, 3, 1]>(kb)"
    " va = MatMul(x, v) vb = Reshape(va, s) vc = Transpose<perm=[0, 2, 1, 3]>(vb)"
    " p = MatMul(qc, kc) a = Softmax<axis=-1>(p) c = MatMul(a, vc)"
    " d = Transpose<perm=[0, 2, 1, 3]>(c) e = Reshape(d, m) y = MatMul(e, o) }"
)


def test_heads_and_their_dimensions() -> None:
    """Queries and keys meet in a product of two activations; heads add up what their dimensions carry."""
    matrices = {name: normal(6, 6) for name in "qkvo"}
    matrices["k"][:, [1, 4]] = 0  # dimension 1 of both heads: queries ask, no key answers
    matrices["v"][:, 3:] = 0  # the second head brings nothing
    sizes = {"s": [0, 0, 2, 3], "m": [0, 0, 6]}
    combed = comb(from_text(ATTENTION, values={n: w.tolist() for n, w in matrices.items()} | sizes))
    feed = {"x": normal(4, 5, 6)}
    kinds = [group.kind for group in combed.groups]
    assert sorted(kinds) == ["channels", "head_dim", "heads"]  # the channels are the dimensions of the values
    for kind in KINDS:
        dims = score(combed, kind, data=ArraySource(feed), samples=4)[kinds.index("head_dim")]
        assert dims[1] == 0 < np.delete(dims, 1).min(), kind
    heads = score(combed, "wanda", data=ArraySource(feed), samples=4)[kinds.index("heads")]
    assert heads[1] < heads[0]


def test_queries_and_keys_meet_in_fused_attention() -> None:
    model = from_text(
        "(float[N, 5, 8] x, float[8, 8] q, float[8, 8] k, float[8, 8] v, float[8, 8] o) => (float[N, 5, 8] y)"
        " { a = MatMul(x, q) b = MatMul(x, k) c = MatMul(x, v)"
        " d = com.microsoft.MultiHeadAttention<num_heads=2>(a, b, c) y = MatMul(d, o) }"
    )
    combed = comb(model)
    feed = data_of(combed)
    queries, keys = (np.square(_run(combed, feed, name)).mean((0, 1)) for name in "ab")
    pairs = [c for c in activations.consumers(ScoreContext(combed, ArraySource(feed), 6)) if not (c.met == 1).all()]
    for consumed, own, other in zip(pairs, (queries, keys), (keys, queries), strict=True):
        np.testing.assert_allclose(consumed.own.energy, own, rtol=1e-4)
        np.testing.assert_allclose(consumed.met, other, rtol=1e-4)


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real models is not there")
@pytest.mark.parametrize("name", ["resnet20_jpeg_cifar10", "vit_cifar10_smmk47", "twinlitenet_qdq_int8"])
def test_real_models(name: str) -> None:
    """Every group of a trained network is seen; what is tested here are composites, residuals, groups and QDQ."""
    combed = comb(DATA / f"{name}.onnx")
    (entry,) = inputs_of(combed.folded.model.proto)
    shape = [size if isinstance(size, int) else 2 for size in entry.shape or ()]
    data = ArraySource({entry.name: np.random.default_rng(0).normal(size=shape).astype(entry.dtype)})
    seen = np.zeros(len(combed.atoms), np.bool_)
    for consumed in activations.consumers(ScoreContext(combed, data, 2)):
        seen[combed.atoms.parts(consumed.channels)] = True
        assert len({len(consumed.channels), len(consumed.own.energy), len(consumed.absolute)}) == 1
        assert np.isfinite(consumed.own.energy).all()
    assert all(seen[group.channels].all() for group in combed.groups)


def test_what_is_not_seen_is_scored_by_its_weights() -> None:
    """Consumers inside a branch of an If cannot be shown as outputs of the model."""
    model = from_text(
        "(float[1, 3] x, bool[1] xflag, float[3, 4] w, float[4, 5] v) => (float[1, 5] y)"
        " { y = If(xflag) <then_branch = g1 () => (float[1, 5] y1) { a = MatMul(x, w) y1 = MatMul(a, v) },"
        " else_branch = g2 () => (float[1, 5] y2) { b = MatMul(x, w) y2 = MatMul(b, v) }> }"
    )
    combed = comb(model)
    data = ArraySource({"x": normal(2, 3), "xflag": np.asarray([True, True])})
    assert len(combed.groups) == 1
    np.testing.assert_array_equal(score(combed, "wanda", data=data)[0], score(combed, "l2")[0])


def test_tensors_are_shown_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = {k: v[:40] for k, v in np.load(DIGITS / "digits_train.npz").items()}
    combed = comb(DIGITS / "digits.onnx")
    found = []
    for limit in (1 << 28, 1 << 10):
        monkeypatch.setattr(activations, "CHUNK_BYTES", limit)
        found.append(score(combed, "variance", data=ArraySource(feed), samples=40))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_fixed_batch_is_filled() -> None:
    model = from_text(MLP.replace("[N,", "[8,"))
    scores = {n: score(comb(model), "wanda", data=ArraySource({"x": X[:n]}))[0] for n in (16, 19)}
    assert not np.array_equal(scores[16], scores[19])  # other samples: the order is random
    with pytest.raises(cpd.DataError, match="too few samples for one batch"):
        score(comb(model), "wanda", data=ArraySource({"x": X[:7]}))
    with pytest.raises(cpd.DataError, match="--data"):
        score(comb(model), "wanda")


@pytest.mark.parametrize("kind", KINDS)
def test_they_keep_more_than_chance(kind: str) -> None:
    data = ArraySource({k: v[:256] for k, v in np.load(DIGITS / "digits_train.npz").items()})
    feed = {"image": next(data.batches(64))["image"]}
    errors = {}
    for each in (kind, "random"):
        text = f"comb, score{{kind='{each}'}}, allocate{{channels=0.8}}, prune"
        errors[each] = error_of(cpd.run(text, DIGITS / "digits.onnx", data=data), feed)
    assert errors[kind] < errors["random"]


def test_command_without_torch(tmp_path: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from cpd_onnx.cli.main import main; sys.exit(main(sys.argv[1:]))"
    line = ["prune", str(DIGITS / "digits.onnx"), "-o", str(tmp_path / "small.onnx"), "--score", "wanda"]
    line += ["--data", str(DIGITS / "digits_train.npz"), "--log-level", "quiet"]
    done = subprocess.run([sys.executable, "-c", script, *plain(line)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first = (tmp_path / "small.onnx").read_bytes()
    assert main(plain([*line, "--force"])) == 0
    assert (tmp_path / "small.onnx").read_bytes() == first
