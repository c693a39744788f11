"""The options of a training, which are known without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from cpd_onnx.data.images.crops import CROP
from cpd_onnx.data.metrics import IGNORED
from cpd_onnx.options import above_zero, integer, natural, not_negative, option, output_pair, positive, ratio, share

LossKind: TypeAlias = Literal["kl", "dist", "mse", "cosine"]
"""How outputs can be compared."""
LOSSES: tuple[LossKind, ...] = get_args(LossKind)
RATE, BATCH_RATE, LOWER_RATE = 1e-3, 2e-3, 2e-4
"""Default learning rates: with enough samples; where batch normalizations use the statistics of the batch, with which a
higher rate ends nearer to the teacher (docs/measured.md); and with few samples, of which it unlearns more than they
teach."""
FEW = 1000
"""Number of samples below which stored statistics of batch normalizations are the default, and images are cropped at
random or, without images, the rate is the lower one (heuristic)."""
EPOCHS, UPDATES = 10, 480
"""Default number of passes over the data, and of updates where there are few images, each of which is cropped at random
in each pass (heuristic)."""
_training = partial(option, group="training")


def loss_kind(text: str) -> LossKind:
    """Reads a kind of loss; raises ValueError."""
    for kind in LOSSES:
        if kind == text:
            return kind
    raise ValueError(f"a loss is one of {', '.join(LOSSES)}")


@dataclass(frozen=True)
class Optimization:
    """Options of the optimizer and the learning rate schedule.

    SGD has Nesterov momentum 0.9. The learning rate rises during the warm-up and then falls to zero along a cosine.
    """

    optimizer: Literal["adamw", "sgd"] = _training("adamw", "Optimiser of the weights", choices=("adamw", "sgd"))
    lr: float | None = _training(
        None,
        f"Learning rate after the warm-up (default: {RATE:g}, {BATCH_RATE:g} where batch normalisations use the "
        f"statistics of the batch, or {LOWER_RATE:g} with fewer than {FEW} samples that are not cropped)",
        read=above_zero,
    )
    warmup: float = _training(
        0.05, "Fraction of the steps in which the learning rate rises from zero", read=ratio, metavar="FRACTION"
    )
    weight_decay: float = _training(1e-4, "Weight decay of tensors with two or more axes", read=not_negative)
    clip_norm: float = _training(1.0, "Maximum norm of the gradient; 0 does not clip", read=not_negative)
    ema: float = _training(
        0.0,
        "Decay of the running average of the weights that is the result; 0 takes the last weights",
        read=ratio,
        metavar="DECAY",
    )
    mixed_precision: bool = _training(False, "Compute in bfloat16 where that is safe")


@dataclass(frozen=True)
class DistillOptions(Optimization):
    """Options of knowledge distillation, with those of the optimizer.

    A model that fixes its batch size gets batches of that size. Stored statistics of BatchNormalization are kept
    ("frozen"), or those of the batch are used ("train"), also of normalisations that the exporter folded into
    convolutions, which are put back and folded again at the end ("restore"); "calibrate" estimates stored statistics
    anew and trains nothing. The teacher runs in onnxruntime on the CPU and in torch on a GPU, and in the other one
    where that lacks an operator. For small models, or on a busy machine, one thread is fastest.
    """

    epochs: int | None = _training(
        None,
        f"Passes over the data (default: {EPOCHS}; as many as make {UPDATES} updates where few images are cropped, see "
        "--crop)",
        read=positive,
        is_common=True,
    )
    steps: int | None = _training(None, "Updates in all, instead of epochs", read=positive)
    batch_size: int = _training(64, "Samples in an update, of all processes together", read=positive)
    temperature: float = _training(4.0, "Temperature that softens the distributions compared", read=above_zero)
    label_weight: float = _training(
        0.0,
        "Weight of the cross-entropy with the labels in the loss, from 0 to 1; 0 needs no labels",
        read=ratio,
        metavar="WEIGHT",
    )
    ignore_label: int = _training(IGNORED, "Label that the loss ignores", read=integer)
    losses: Mapping[str, LossKind] = _training(
        {},
        f"Loss of an output, one of {', '.join(LOSSES)} (default: chosen by the teacher's outputs); may be repeated",
        read=output_pair(loss_kind),
        flag="--loss",
        metavar="OUTPUT=KIND",
        is_many=True,
    )
    output_weights: Mapping[str, float] = _training(
        {},
        "Weight of an output in the loss (default: 1); may be repeated",
        read=output_pair(not_negative),
        flag="--weight",
        metavar="OUTPUT=NUMBER",
        is_many=True,
    )
    compare: Literal["auto", "outputs", "features"] = _training(
        "auto",
        "What the loss compares: the outputs, or the features, which are the last hidden tensors before the outputs "
        f"(default: features with fewer than {FEW} samples, unless labels, losses of outputs or hidden tensors are "
        "asked for; else outputs)",
        choices=("auto", "outputs", "features"),
    )
    hidden: int = _training(
        0,
        "Number of hidden tensors that are compared as well, on the channels that teacher and student share",
        read=natural,
        metavar="N",
    )
    hidden_weight: float = _training(1.0, "Weight of the hidden tensors in the loss", read=not_negative)
    batch_norm: Literal["auto", "frozen", "train", "restore", "calibrate"] = _training(
        "auto",
        "Statistics of BatchNormalization: stored (frozen), of the batch (train), of the batch also for normalisations "
        "folded into convolutions (restore), or re-estimated without training (calibrate) (default: restore with at "
        f"least {FEW} samples in batches of at least 16, else frozen)",
        choices=("auto", "frozen", "train", "restore", "calibrate"),
    )
    freeze: tuple[str, ...] = _training(
        (), "Initializer that is not trained; may be repeated", metavar="NAME", is_many=True
    )
    flip: bool = _training(False, "Mirror half of the images (rank-4 inputs, width last)")
    shift: int = _training(0, "Shift images by up to this many pixels, padded with zeros", read=natural)
    crop: float | None = _training(
        None,
        "Crop each image at random to at least this fraction of its area, and scale it back to its size; 1: not at all "
        f"(default: {CROP:g} with fewer than {FEW} images, unless the model is large, or labels or a teacher cache are "
        "used; else 1)",
        read=share,
        metavar="FRACTION",
    )
    seed: int = _training(0, "Seed of the sample order and augmentation", read=natural)
    device: str = _training(
        "auto",
        "Device for the training: auto, cpu or cuda (default: a GPU if there is one)",
        suggested=("auto", "cpu", "cuda"),
    )
    threads: int = _training(0, "Number of torch threads on the CPU; 0: torch's default", read=natural)
    teacher_runtime: Literal["auto", "onnxruntime", "torch"] = _training(
        "auto",
        "Runtime of the teacher (default: onnxruntime on the CPU, torch on a GPU)",
        choices=("auto", "onnxruntime", "torch"),
    )
    teacher_cache: Path | None = _training(
        None,
        "File that caches the teacher's outputs, so that each sample is computed once; not with augmentation",
        read=Path,
        metavar="FILE",
        takes="file",
        is_output=True,
    )
