"""What the options of a training leave open: how images are varied, how long to train, and at what rate.

All of it follows from the models and the number of samples, so that the same input gives the same result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from onnx import ModelProto
from torch.utils.flop_counter import FlopCounterMode

from cpd_onnx.data.images.crops import CROP, image_input
from cpd_onnx.data.sources import Source, inputs_of
from cpd_onnx.errors import CpdError, DataError
from cpd_onnx.torch import OnnxModule
from cpd_onnx.training import refolding
from cpd_onnx.training.feed import Feed
from cpd_onnx.training.options import BATCH_RATE, EPOCHS, FEW, LOWER_RATE, RATE, UPDATES, DistillOptions

_ENOUGH_FOR_STATISTICS = 16
"""Minimum batch size for training with batch statistics (heuristic)."""
_TOGETHER = 1 << 21
"""Numbers in the inputs of a part of a batch, whose activations are in memory together: 13 images of 224 by 224
(heuristic)."""
_MOST_WORK = 4 * 10**12
"""Multiplications and additions in all runs of the student of a default training on few images, which takes three times
as many, and the teacher some (heuristic: a quarter of an hour on two cores)."""


def with_crop(options: DistillOptions, batches: Source, student: ModelProto) -> DistillOptions:
    """Return the options with the part of an image that is shown, which is the default one unless it was given."""
    if options.crop is not None:
        return options
    is_as_before = _has_many(batches) or options.label_weight or options.teacher_cache
    is_cropped = not is_as_before and image_input(inputs_of(student)) is not None
    return replace(options, crop=CROP if is_cropped else 1.0)


def with_rate(options: DistillOptions, batches: Source, module: OnnxModule) -> DistillOptions:
    """Return the options with a learning rate, which is the default one unless it was given."""
    if options.lr is not None:
        return options
    usual = BATCH_RATE if refolding.live_layers(module) else RATE
    is_varied = _has_many(batches) or (options.crop or 1) < 1
    return replace(options, lr=usual if is_varied else LOWER_RATE)


def steps_of(feed: Feed, options: DistillOptions, batches: Source, module: OnnxModule) -> int:
    """Return the total number of updates."""
    if options.steps is not None:
        return options.steps
    if feed.per_pass is None:
        raise DataError("the length of the data is unknown: give the number of steps with --steps")
    if options.epochs is not None:
        return feed.per_pass * options.epochs
    usual = feed.per_pass * EPOCHS
    if _has_many(batches) or not (options.crop or 1) < 1:
        return usual
    return max(usual, min(UPDATES, _MOST_WORK // max(1, _work(feed, module))))


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


def part_of(feed: Feed, module: OnnxModule) -> int:
    """Return how many samples of a batch are computed together; 0 for all, as on a GPU, or if one affects another."""
    if feed.is_fixed or feed.process_group.device.type != "cpu" or refolding.live_layers(module):
        return 0
    inputs, _ = next(feed.batches())
    return max(1, _TOGETHER // max(1, sum(x[0].numel() for x in inputs if x.ndim)))


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
