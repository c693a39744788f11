"""Export keras models with tf2onnx and with keras itself.

Environment: pip install tensorflow-cpu tf2onnx onnx onnxruntime==1.31.1

    python export_tf.py --out DIR [--only REGEX] [--exporter tf2onnx|keras]
"""

import os

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": ""}

from collections.abc import Callable, Iterator
from pathlib import Path

import common
import keras
import numpy as np
import tensorflow as tf
import tf2onnx
from keras import layers as L

Model = keras.Model


def application(name: str, size: int = 64, **options: object) -> Callable[[], Model]:
    """Name a network of keras.applications with ten classes."""
    make = getattr(keras.applications, name)
    return lambda: make(weights=None, input_shape=(size, size, 3), classes=10, **options)


def conv_bn(x: object, width: int, stride: int = 1) -> object:
    """Convolve, normalise, activate."""
    y = L.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
    return L.Activation("relu")(L.BatchNormalization()(y))


def separable() -> Model:
    """Separable, depthwise and depth-multiplier convolutions."""
    x = inputs = L.Input((32, 32, 3))
    x = conv_bn(x, 16, 2)
    x = L.Activation("relu6")(L.BatchNormalization()(L.SeparableConv2D(32, 3, padding="same")(x)))
    x = L.ReLU(6.0)(L.BatchNormalization()(L.DepthwiseConv2D(3, 2, padding="same")(x)))
    x = L.LeakyReLU()(L.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x))
    x = L.PReLU(shared_axes=[1, 2])(L.Conv2D(40, 1)(x))
    return Model(inputs, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


def unet() -> Model:
    """U-Net with transposed convolutions."""
    x = inputs = L.Input((32, 32, 3))
    skips = []
    for width in (12, 24, 48):
        x = conv_bn(x, width)
        skips.append(x)
        x = L.MaxPooling2D()(x)
    x = conv_bn(x, 64)
    for width in (48, 24, 12):
        x = L.Conv2DTranspose(width, 3, 2, padding="same", activation="relu")(x)
        x = conv_bn(L.Concatenate()([x, skips.pop()]), width)
    return Model(inputs, L.Conv2D(3, 1)(x))


def vit() -> Model:
    """Vision transformer with a flattened head."""
    x = inputs = L.Input((32, 32, 3))
    x = L.Reshape((16, 48))(L.Conv2D(48, 8, 8)(x))
    x = x + L.Embedding(16, 48)(np.arange(16))
    for _ in range(3):
        y = L.LayerNormalization()(x)
        x = L.Add()([x, L.MultiHeadAttention(4, 12)(y, y)])
        y = L.Dense(96, activation="relu")(L.LayerNormalization()(x))
        x = L.Add()([x, L.Dense(48)(y)])
    return Model(inputs, L.Dense(10)(L.Flatten()(L.LayerNormalization()(x))))


def groupnorm() -> Model:
    """Residual CNN with GroupNormalization and squeeze-and-excitation."""
    x = inputs = L.Input((32, 32, 3))
    x = L.Conv2D(24, 3, padding="same")(x)
    for _ in range(2):
        y = L.Activation("swish")(L.GroupNormalization(4)(L.Conv2D(24, 3, padding="same")(x)))
        gate = L.Dense(24, activation="sigmoid")(L.Dense(6, activation="relu")(L.GlobalAveragePooling2D()(y)))
        x = x + y * L.Reshape((1, 1, 24))(gate)
    return Model(inputs, L.Dense(10)(L.Flatten()(L.AveragePooling2D(8)(x))))


def tagger(cell: Callable[..., object]) -> Callable[[], Model]:
    """Embed, run two recurrent layers, tag each token."""

    def make() -> Model:
        """Build the network."""
        x = inputs = L.Input((12,), dtype="int32")
        x = L.Embedding(50, 24)(x)
        x = cell()(cell()(x))
        return Model(inputs, L.Dense(7)(L.Dense(20, activation="tanh")(x)))

    return make


def conv1d() -> Model:
    """Dilated causal 1-D convolutions with gates."""
    x = inputs = L.Input((40, 4))
    x = L.Conv1D(20, 1)(x)
    for rate in (1, 2, 4):
        a, b = (L.Conv1D(20, 2, padding="causal", dilation_rate=rate, activation=f)(x) for f in ("tanh", "sigmoid"))
        x = x + L.Conv1D(20, 1)(a * b)
    return Model(inputs, L.Conv1D(5, 1)(x))


def mlp() -> Model:
    """MLP with batch normalisation and two inputs."""
    a, b = L.Input((16,)), L.Input((8,))
    x = L.Concatenate()([L.Dense(32, activation="relu")(a), L.Dense(24, activation="elu")(b)])
    x = L.BatchNormalization()(L.Dense(40, activation="relu")(x))
    return Model([a, b], [L.Dense(3, activation="softmax")(x), L.Dense(1)(x)])


def conv3d() -> Model:
    """3-D convolutions, flattened."""
    x = inputs = L.Input((8, 8, 8, 2))
    x = L.MaxPooling3D()(L.Conv3D(12, 3, padding="same", activation="relu")(x))
    x = L.BatchNormalization()(L.Conv3D(18, 3, activation="relu")(x))
    return Model(inputs, L.Dense(4)(L.Flatten()(x)))


# name, family, maker, opset
MODELS = [
    ("mobilenet_v2", "mobilenet", application("MobileNetV2"), 15),
    ("separable", "mobilenet", separable, 13),
    ("unet_transpose", "unet", unet, 15),
    ("vit_like", "vit", vit, 17),
    ("lstm_tagger", "recurrent", tagger(lambda: L.LSTM(32, return_sequences=True)), 15),
    ("gru_tagger", "recurrent", tagger(lambda: L.GRU(32, return_sequences=True)), 15),
    ("bilstm_tagger", "recurrent", tagger(lambda: L.Bidirectional(L.LSTM(20, return_sequences=True))), 13),
    ("groupnorm_se", "resnet", groupnorm, 18),
    ("conv1d", "conv1d", conv1d, 15),
    ("mlp", "mlp", mlp, 13),
    ("conv3d", "video", conv3d, 15),
    ("resnet50_v2", "resnet", application("ResNet50V2"), 13),
    ("efficientnet_b0", "efficientnet", application("EfficientNetB0"), 17),
    ("densenet121", "densenet", application("DenseNet121"), 14),
    ("nasnet_mobile", "nasnet", application("NASNetMobile", classifier_activation=None), 16),
    ("xception", "xception", application("Xception", 96), 18),
    ("mobilenet", "mobilenet", application("MobileNet", alpha=0.5), 18),
    ("mobilenet_v3_small", "mobilenet", application("MobileNetV3Small"), 17),
    ("efficientnet_v2_b0", "efficientnet", application("EfficientNetV2B0"), 15),
]  # fmt: skip
KERAS_OPSET = 15
LARGE = {"resnet50_v2", "xception"}


def jobs(exporter: str) -> Iterator[common.Job]:
    """List the models; keras itself has one opset, and the large ones are not built twice."""
    for name, family, make, default in MODELS:
        if exporter == "keras" and name in LARGE:
            continue
        opset = default if exporter == "tf2onnx" else KERAS_OPSET
        yield common.Job(
            name=f"{name}.{exporter}.opset{opset}" if exporter == "tf2onnx" else f"{name}.{exporter}",
            family=family,
            build=lambda path, make=make, opset=opset: export(make, path, exporter, opset),
        )


def export(make: Callable[[], Model], path: Path, exporter: str, opset: int) -> None:
    """Build, perturb and export one model; the batch axis is dynamic."""
    keras.utils.set_random_seed(0)
    model = make()
    perturb(model)
    if exporter == "keras":
        model.export(str(path), format="onnx", verbose=False)
        return
    signature = [tf.TensorSpec(i.shape, i.dtype, f"x{n}") for n, i in enumerate(model.inputs)]
    call = tf.function(lambda *x: model(x if len(x) > 1 else x[0], training=False), input_signature=signature)
    tf2onnx.convert.from_function(call, input_signature=signature, opset=opset, output_path=str(path))


def perturb(model: Model) -> None:
    """Replace constant weights by seeded noise, then calibrate the batch norms on noise."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        value = weight.numpy()
        if weight.name == "gamma":
            weight.assign(rng.uniform(0.7, 1.3, value.shape))
        elif value.dtype.kind == "f" and value.size > 1 and np.ptp(value) == 0:
            weight.assign(rng.normal(0.0, 0.1, value.shape) + (0.5 if value.flat[0] else 0.0))
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, L.BatchNormalization)]
    for layer in norms:
        layer.momentum = 0.0
    inputs = [np.abs(rng.standard_normal((4, *i.shape[1:]))).astype(i.dtype) for i in model.inputs]
    model(inputs if len(inputs) > 1 else inputs[0], training=bool(norms))
    for layer in norms:
        variance = layer.moving_variance.numpy()
        layer.moving_variance.assign(variance * rng.uniform(0.8, 1.2, variance.shape) + 0.1 * variance.mean())
        layer.moving_mean.assign_add(0.1 * np.sqrt(variance) * rng.standard_normal(variance.shape))


def main() -> None:
    """Export the models selected by the command line."""
    versions = {"tf2onnx": tf2onnx.__version__, "keras": keras.__version__}
    args = common.arguments(__doc__, exporter=list(versions))
    for exporter in [args.exporter] if args.exporter else versions:
        common.run(jobs(exporter), args, exporter=exporter, version=versions[exporter])


if __name__ == "__main__":
    main()
