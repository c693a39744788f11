"""What the options of a training leave open: how images are varied, how long to train, and at what rate.

All of it follows from the models and the number of samples, so that the same input gives the same result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from cpd_onnx.data.images.crops import CROP
from cpd_onnx.data.sources import Source
from cpd_onnx.errors import CpdError, DataError
from cpd_onnx.torch import OnnxModule
from cpd_onnx.training import refolding
from cpd_onnx.training.feed import Feed
from cpd_onnx.training.options import BATCH_RATE, EPOCHS, FEW, LOWER_RATE, RATE, UPDATES, DistillOptions

_ENOUGH_FOR_STATISTICS = 16
"""Minimum batch size for training with batch statistics (heuristic)."""
_MOST_WORK = 4 * 10**12
"""Most multiplications and additions in all runs of the student for which few images are cropped: training takes three
times as many, and the teacher some (heuristic: a quarter of an hour on two cores)."""


def settled(options: DistillOptions, feed: Feed, batches: Source, module: OnnxModule) -> DistillOptions:
    """Return the options with those that were left open: the crops of images, the learning rate, and the updates.

    Few images are cropped at random, and shown for more updates, unless the model is so large that these would take too
    long: fewer were no gain.

    Args:
        options: The options; `steps` is set in the result.
        feed: The batches, as yet without crops.
        batches: The data.
        module: The student.

    Raises:
        DataError: The length of the data is unknown, and neither are the updates given.
    """
    is_long = options.steps is None and options.epochs is None
    crop = options.crop
    if crop is None:
        crop = CROP if _may_crop(options, feed, batches) and _is_affordable(feed, module) else 1.0
    steps = options.steps
    if steps is None:
        if feed.per_pass is None:
            raise DataError("the length of the data is unknown: give the number of steps with --steps")
        steps = feed.per_pass * (options.epochs or EPOCHS)
        if is_long and crop < 1 and not _has_many(batches):
            steps = max(steps, UPDATES)
    lr = options.lr
    if lr is None:
        usual = BATCH_RATE if refolding.live_layers(module) else RATE
        lr = usual if _has_many(batches) or crop < 1 else LOWER_RATE
    return replace(options, crop=crop, steps=steps, lr=lr)


def _may_crop(options: DistillOptions, feed: Feed, batches: Source) -> bool:
    """Return whether weights are trained on few images, whose answers nothing but the teacher knows."""
    is_trained = options.batch_norm != "calibrate"
    is_known = bool(options.label_weight or options.teacher_cache)
    return is_trained and not is_known and not _has_many(batches) and feed.photographs is not None


def _is_affordable(feed: Feed, module: OnnxModule) -> bool:
    return _work(feed, module) * UPDATES <= _MOST_WORK


def _work(feed: Feed, module: OnnxModule) -> int:
    """Return the multiplications and additions of a run of the module on one batch."""
    inputs, _ = next(feed.batches())
    part = [x[:1] for x in inputs] if not feed.is_fixed and all(x.ndim for x in inputs) else inputs
    is_training = module.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(*part)
    module.train(is_training)
    times = len(inputs[0]) // len(part[0]) if inputs[0].ndim else 1
    return times * int(counter.get_total_flops())


def in_parts(feed: Feed, module: OnnxModule) -> bool:
    """Return whether a batch may be computed in parts: not on a GPU, nor where one sample affects others."""
    return not (feed.is_fixed or feed.process_group.device.type != "cpu" or refolding.live_layers(module))


def compared(options: DistillOptions, batches: Source, *, has_features: bool) -> Literal["outputs", "features"]:
    """Return what the loss compares; raises CpdError if that is the features and there are none."""
    needs_outputs = bool(options.label_weight or options.losses or options.output_weights)
    if options.compare == "features":
        if needs_outputs:
            raise CpdError(
                "--compare features leaves no part of the loss to outputs and labels: leave out --compare, or the "
                "options of their losses and weights"
            )
        if not has_features:
            raise CpdError(
                "there are no features to compare: the student has no plan, or not every output is computed by weights "
                "from hidden tensors of both models; leave out --compare"
            )
    if options.compare != "auto":
        return options.compare
    return "features" if has_features and not (needs_outputs or options.hidden or _has_many(batches)) else "outputs"


def batch_norm_mode(options: DistillOptions, batch_size: int, batches: Source) -> str:
    """Return how the statistics of batch normalizations are treated, see `DistillOptions.batch_norm`; never "auto"."""
    if options.batch_norm != "auto":
        return options.batch_norm
    return "restore" if batch_size >= _ENOUGH_FOR_STATISTICS and _has_many(batches) else "frozen"


def _has_many(batches: Source) -> bool:
    return batches.count is None or batches.count >= FEW
