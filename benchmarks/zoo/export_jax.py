"""Export flax (nnx) models with jax2onnx.

Environment: pip install jax flax jax2onnx onnxruntime==1.31.1

    python export_jax.py --out DIR [--only REGEX]
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import jax2onnx
import onnx
from flax import nnx

Array = jax.Array


class Stack(nnx.Module):
    """Call layers in a row."""

    def __init__(self, *layers: Callable[[Array], Array]) -> None:
        """Keep ``layers``."""
        self.layers = nnx.List(layers)

    def __call__(self, x: Array) -> Array:
        """Run them."""
        for layer in self.layers:
            x = layer(x)
        return x


class Residual(nnx.Module):
    """Sum of a body and a shortcut."""

    def __init__(self, body: nnx.Module, shortcut: nnx.Module | None = None) -> None:
        """Without a shortcut the input is added as it is."""
        self.body, self.shortcut = body, shortcut

    def __call__(self, x: Array) -> Array:
        """Add the branch."""
        return self.body(x) + (x if self.shortcut is None else self.shortcut(x))


def conv(rngs: nnx.Rngs, cin: int, cout: int, k: int = 3, stride: int = 1, groups: int = 1) -> nnx.Module:
    """Convolve NHWC with SAME padding."""
    return nnx.Conv(cin, cout, (k, k), (stride, stride), feature_group_count=groups, rngs=rngs)


def norm(rngs: nnx.Rngs, width: int) -> nnx.Module:
    """Normalise with running statistics."""
    return nnx.BatchNorm(width, use_running_average=True, rngs=rngs)


def pool(x: Array) -> Array:
    """Average over space."""
    return x.mean((1, 2))


def cnn(rngs: nnx.Rngs) -> nnx.Module:
    """Convolve, pool, flatten, classify."""
    return Stack(
        conv(rngs, 3, 16), nnx.relu, partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)),
        conv(rngs, 16, 24), nnx.gelu, partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2)),
        lambda x: x.reshape(x.shape[0], -1), nnx.Linear(24 * 64, 32, rngs=rngs), nnx.relu,
        nnx.Linear(32, 10, rngs=rngs),
    )  # fmt: skip


def resnet(rngs: nnx.Rngs) -> nnx.Module:
    """Residual CNN with batch norms."""
    layers = [conv(rngs, 3, 16), norm(rngs, 16), nnx.relu]
    for a, b in ((16, 16), (16, 32), (32, 48)):
        stride = 1 if a == b else 2
        body = Stack(conv(rngs, a, b, 3, stride), norm(rngs, b), nnx.relu, conv(rngs, b, b), norm(rngs, b))
        layers += [Residual(body, None if a == b else conv(rngs, a, b, 1, stride)), nnx.relu]
    return Stack(*layers, pool, nnx.Linear(48, 10, rngs=rngs))


def mobilenet(rngs: nnx.Rngs) -> nnx.Module:
    """Inverted residuals with depthwise convolutions."""
    layers = [conv(rngs, 3, 16, 3, 2), norm(rngs, 16), nnx.relu6]
    for _ in range(2):
        layers.append(Residual(Stack(
            conv(rngs, 16, 64, 1), norm(rngs, 64), nnx.relu6, conv(rngs, 64, 64, 3, 1, 64), norm(rngs, 64), nnx.relu6,
            conv(rngs, 64, 16, 1), norm(rngs, 16),
        )))  # fmt: skip
    return Stack(*layers, pool, nnx.Linear(16, 10, rngs=rngs))


def groupnorm(rngs: nnx.Rngs) -> nnx.Module:
    """Residual CNN with group norms."""

    def block(width: int) -> nnx.Module:
        """Convolve, normalise in groups, activate."""
        return Stack(conv(rngs, width, width), nnx.GroupNorm(width, num_groups=4, rngs=rngs), nnx.silu)

    return Stack(conv(rngs, 3, 24), Residual(block(24)), Residual(block(24)), pool, nnx.Linear(24, 10, rngs=rngs))


def unet(rngs: nnx.Rngs) -> nnx.Module:
    """Encode, decode by a transposed convolution, concatenate."""
    up = Stack(conv(rngs, 16, 32, 3, 2), nnx.relu, nnx.ConvTranspose(32, 16, (2, 2), (2, 2), rngs=rngs), nnx.relu)
    return Stack(conv(rngs, 3, 16), nnx.relu, Join(up), conv(rngs, 32, 4, 1))


class Join(nnx.Module):
    """Concatenate the input and a branch."""

    def __init__(self, body: nnx.Module) -> None:
        """Keep the branch."""
        self.body = body

    def __call__(self, x: Array) -> Array:
        """Concatenate channels, last."""
        return jnp.concatenate([x, self.body(x)], -1)


def mlp(rngs: nnx.Rngs, width: int, hidden: int) -> nnx.Module:
    """Two linear layers with GELU."""
    return Stack(nnx.Linear(width, hidden, rngs=rngs), nnx.gelu, nnx.Linear(hidden, width, rngs=rngs))


def attention(rngs: nnx.Rngs, width: int, heads: int) -> nnx.Module:
    """Attend over all tokens."""
    return nnx.MultiHeadAttention(heads, width, decode=False, deterministic=True, rngs=rngs)


class Swap(nnx.Module):
    """Run a body on swapped token and channel axes."""

    def __init__(self, body: nnx.Module) -> None:
        """Keep the body."""
        self.body = body

    def __call__(self, x: Array) -> Array:
        """Mix tokens."""
        return self.body(x.swapaxes(1, 2)).swapaxes(1, 2)


def patches(rngs: nnx.Rngs, width: int) -> nnx.Module:
    """Cut 32x32 images into 16 tokens."""
    embed = nnx.Conv(3, width, (8, 8), (8, 8), padding="VALID", rngs=rngs)
    return Stack(embed, lambda x: x.reshape(x.shape[0], 16, width))


def vit(rngs: nnx.Rngs) -> nnx.Module:
    """Vision transformer without class token."""
    layers = [patches(rngs, 32)]
    for _ in range(3):
        layers.append(Residual(Stack(nnx.LayerNorm(32, rngs=rngs), attention(rngs, 32, 4))))
        layers.append(Residual(Stack(nnx.LayerNorm(32, rngs=rngs), mlp(rngs, 32, 72))))
    return Stack(*layers, nnx.LayerNorm(32, rngs=rngs), lambda x: x.mean(1), nnx.Linear(32, 10, rngs=rngs))


def mixer(rngs: nnx.Rngs) -> nnx.Module:
    """MLP-Mixer."""
    layers = [patches(rngs, 32)]
    for _ in range(2):
        layers.append(Residual(Stack(nnx.LayerNorm(32, rngs=rngs), Swap(mlp(rngs, 16, 24)))))
        layers.append(Residual(Stack(nnx.LayerNorm(32, rngs=rngs), mlp(rngs, 32, 64))))
    return Stack(*layers, lambda x: x.mean(1), nnx.Linear(32, 10, rngs=rngs))


def transformer(rngs: nnx.Rngs) -> nnx.Module:
    """Token transformer with RMS norms and gated MLPs."""
    layers = [nnx.Embed(50, 32, rngs=rngs)]
    for _ in range(2):
        layers.append(Residual(Stack(nnx.RMSNorm(32, rngs=rngs), attention(rngs, 32, 4))))
        layers.append(Residual(Stack(nnx.RMSNorm(32, rngs=rngs), Gate(rngs))))
    return Stack(*layers, nnx.RMSNorm(32, rngs=rngs), nnx.Linear(32, 50, use_bias=False, rngs=rngs))


class Gate(nnx.Module):
    """SwiGLU."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Build three projections."""
        self.gate, self.up, self.down = (nnx.Linear(a, b, rngs=rngs) for a, b in ((32, 80), (32, 80), (80, 32)))

    def __call__(self, x: Array) -> Array:
        """Transform the last axis."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


def plain_mlp(rngs: nnx.Rngs) -> nnx.Module:
    """MLP with a batch norm."""
    return Stack(
        nnx.Linear(12, 40, rngs=rngs), norm(rngs, 40), nnx.relu, nnx.Linear(40, 24, rngs=rngs), nnx.tanh,
        nnx.Linear(24, 3, rngs=rngs),
    )  # fmt: skip


IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
BATCH = ("B", 32, 32, 3)
IDS = jax.ShapeDtypeStruct((2, 16), jnp.int32)
# name, family, maker, input, opset
MODELS = [
    ("cnn", "cnn", cnn, BATCH, 23),
    ("resnet", "resnet", resnet, BATCH, 23),
    ("mobilenet", "mobilenet", mobilenet, IMAGE, 21),
    ("groupnorm", "resnet", groupnorm, IMAGE, 23),
    ("unet_transpose", "unet", unet, IMAGE, 23),
    ("vit", "vit", vit, BATCH, 23),
    ("vit", "vit", vit, IMAGE, 21),
    ("mixer", "mixer", mixer, IMAGE, 23),
    ("transformer", "llama", transformer, IDS, 23),
    ("mlp", "mlp", plain_mlp, ("B", 12), 23),
]


def jobs() -> Iterator[common.Job]:
    """List the models."""
    for name, family, make, value, opset in MODELS:
        yield common.Job(
            name=f"{name}.jax2onnx.opset{opset}",
            family=family,
            build=lambda path, m=make, v=value, o=opset: export(m, v, path, o),
        )


def export(make: Callable[[nnx.Rngs], nnx.Module], value: object, path: Path, opset: int) -> None:
    """Build, perturb and export one model."""
    model = make(nnx.Rngs(0))
    perturb(model)
    onnx.save(jax2onnx.to_onnx(model, [value], opset=opset), path)


def perturb(model: nnx.Module) -> None:
    """Replace constant weights and statistics by seeded noise around their value."""
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    nnx.update(model, jax.tree.unflatten(tree, [_noisy(k, x) for k, x in zip(keys, leaves, strict=True)]))


def _noisy(key: Array, x: Array) -> Array:
    """Add noise to a constant tensor: uniform around ones, normal around zeros."""
    if not x.size or x.min() != x.max():
        return x
    return (
        0.1 * jax.random.normal(key, x.shape)
        if x.ravel()[0] == 0
        else x * jax.random.uniform(key, x.shape, minval=0.7, maxval=1.3)
    )


def main() -> None:
    """Export the models selected by the command line."""
    args = common.arguments(__doc__)
    common.run(jobs(), args, exporter="jax2onnx", version=version("jax2onnx"))


if __name__ == "__main__":
    main()
