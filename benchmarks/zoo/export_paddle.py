"""Export paddle models with paddle2onnx.

Environment: pip install paddlepaddle paddle2onnx setuptools onnxruntime==1.31.1

    python export_paddle.py --out DIR [--only REGEX]
"""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import common
import paddle
from paddle import nn
from paddle.vision import models

Layer = nn.Layer


class Residual(Layer):
    """Sum of a body and its input."""

    def __init__(self, *body: Layer) -> None:
        """Keep the body."""
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Add the branch."""
        return x + self.body(x)


def groupnorm() -> Layer:
    """Residual CNN with group norms."""

    def block(width: int) -> Layer:
        """Convolve, normalise in groups, activate."""
        return Residual(nn.Conv2D(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.Silu())

    return nn.Sequential(
        nn.Conv2D(3, 24, 3, padding=1), block(24), nn.Conv2D(24, 32, 3, 2, 1), block(32), nn.AdaptiveAvgPool2D(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class Attention(Layer):
    """Attention over 16 tokens with a fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        """Project to queries, keys and values at once."""
        super().__init__()
        self.heads, self.d = heads, width // heads
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Attend."""
        q, k, v = self.qkv(x).reshape([0, 0, 3, self.heads, self.d]).transpose([2, 0, 3, 1, 4])
        weights = nn.functional.softmax(paddle.matmul(q * self.d**-0.5, k, transpose_y=True))
        return self.o(paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([0, 0, self.heads * self.d]))


def vit() -> Layer:
    """Vision transformer without class token."""

    class Tokens(Layer):
        """Cut an image into tokens."""

        def __init__(self) -> None:
            """Embed patches of 8x8."""
            super().__init__()
            self.embed = nn.Conv2D(3, 32, 8, 8)

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            """Return (N, tokens, 32)."""
            return self.embed(x).flatten(2).transpose([0, 2, 1])

    layers = [Tokens()]
    for _ in range(3):
        layers.append(Residual(nn.LayerNorm(32), Attention(32, 4)))
        layers.append(Residual(nn.LayerNorm(32), nn.Linear(32, 72), nn.GELU(), nn.Linear(72, 32)))
    return nn.Sequential(*layers, nn.LayerNorm(32), nn.Flatten(), nn.Linear(16 * 32, 10))


def transformer() -> Layer:
    """Embedding and paddle's own encoder layers."""
    layers = [nn.TransformerEncoderLayer(32, 4, 72, dropout=0.0) for _ in range(2)]
    return nn.Sequential(nn.Embedding(50, 32), *layers, nn.Linear(32, 7))


class Tagger(Layer):
    """Embed, run an LSTM, tag."""

    def __init__(self) -> None:
        """Build one layer in two directions."""
        super().__init__()
        self.embed, self.rnn = nn.Embedding(50, 24), nn.LSTM(24, 20, direction="bidirect")
        self.head = nn.Linear(40, 7)

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        """Tag (N, T) ids."""
        return self.head(self.rnn(self.embed(ids))[0])


def unet() -> Layer:
    """Encoder and decoder with a transposed convolution."""
    return nn.Sequential(
        nn.Conv2D(3, 16, 3, 2, 1), nn.BatchNorm2D(16), nn.ReLU(), nn.Conv2D(16, 32, 3, 2, 1), nn.PReLU(32),
        nn.Conv2DTranspose(32, 16, 4, 2, 1), nn.BatchNorm2D(16), nn.Hardswish(), nn.Upsample([64, 64]),
        nn.Conv2D(16, 2, 1),
    )  # fmt: skip


IMAGE = paddle.static.InputSpec([1, 3, 64, 64], "float32", "x")
BATCH = paddle.static.InputSpec([None, 3, 64, 64], "float32", "x")
SMALL = paddle.static.InputSpec([None, 3, 32, 32], "float32", "x")
IDS = paddle.static.InputSpec([2, 16], "int64", "x")
# name, family, maker, input, opset
MODELS = [
    ("mobilenet_v1", "mobilenet", lambda: models.mobilenet_v1(scale=0.5, num_classes=10), BATCH, 9),
    ("mobilenet_v2", "mobilenet", lambda: models.mobilenet_v2(num_classes=10), BATCH, 11),
    ("mobilenet_v3_small", "mobilenet", lambda: models.mobilenet_v3_small(num_classes=10), IMAGE, 17),
    ("resnet18", "resnet", lambda: models.resnet18(num_classes=10), BATCH, 13),
    ("resnext50_32x4d", "resnet", lambda: models.resnext50_32x4d(num_classes=10), IMAGE, 12),
    ("shufflenet_v2_x0_5", "shufflenet", lambda: models.shufflenet_v2_x0_5(num_classes=10), IMAGE, 10),
    ("squeezenet1_1", "squeezenet", lambda: models.squeezenet1_1(num_classes=10), IMAGE, 9),
    ("densenet121", "densenet", lambda: models.densenet121(num_classes=10), BATCH, 16),
    ("groupnorm", "resnet", groupnorm, SMALL, 15),
    ("vit", "vit", vit, SMALL, 17),
    ("transformer", "bert", transformer, IDS, 17),
    ("lstm_tagger", "recurrent", Tagger, IDS, 14),
    ("unet_transpose", "unet", unet, IMAGE, 11),
]


def jobs() -> Iterator[common.Job]:
    """List the models."""
    for name, family, make, spec, opset in MODELS:
        yield common.Job(
            name=f"{name}.paddle2onnx.opset{opset}",
            family=family,
            build=lambda path, m=make, s=spec, o=opset: export(m, s, path, o),
        )


def export(make: Callable[[], Layer], spec: paddle.static.InputSpec, path: Path, opset: int) -> None:
    """Build, perturb and export one model."""
    paddle.seed(0)
    model = make()
    perturb(model, spec)
    paddle.onnx.export(model, str(path.with_suffix("")), input_spec=[spec], opset_version=opset)


def perturb(model: Layer, spec: paddle.static.InputSpec) -> None:
    """Replace constant weights by seeded noise, then calibrate the batch norms on noise; set eval mode."""
    for value in model.parameters():
        if value.size > 1 and bool(value.min() == value.max()):
            value.set_value(value + 0.1 * paddle.randn(value.shape))
    norms = [layer for layer in model.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    for layer in norms:
        layer._momentum = 0.0
    if norms:
        model(paddle.randn([4, *spec.shape[1:]]))
    for layer in norms:
        variance = layer._variance.clone()
        factor = paddle.uniform(variance.shape, min=0.8, max=1.2)
        layer._variance.set_value(variance * factor + 0.1 * variance.mean())
        layer._mean.set_value(layer._mean + 0.1 * variance.sqrt() * paddle.randn(variance.shape))
    model.eval()


def main() -> None:
    """Export the models selected by the command line."""
    args = common.arguments(__doc__)
    common.run(jobs(), args, exporter="paddle2onnx", version=version("paddle2onnx"))


if __name__ == "__main__":
    main()
