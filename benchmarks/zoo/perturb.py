"""Perturb a randomly initialised torch model such that every weight affects the outputs."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def perturb(model: nn.Module, args: Sequence[torch.Tensor], *, seed: int = 0) -> nn.Module:
    """Replace weights that are constant or tiny by seeded noise, then calibrate the batch norms on ``args``.

    Gammas become uniform in [0.7, 1.3], zero biases normal with deviation 0.1, layer scales uniform in [0.3, 0.7];
    weights of linear layers get at least the deviation 1 / sqrt(fan in). The model is returned in eval mode.
    """
    model.eval()
    noise = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in _tensors(module):
                if tensor.is_floating_point() and id(tensor) not in seen:
                    seen.add(id(tensor))
                    _replace(module, name, tensor, noise)
    _calibrate(model, args, noise)
    return model.eval()


def _tensors(module: nn.Module) -> chain:
    """List the own parameters of a module, and the buffers if it is a norm."""
    buffers = module.named_buffers(recurse=False) if _is_norm(module) else ()
    return chain(module.named_parameters(recurse=False), buffers)


def _is_norm(module: nn.Module) -> bool:
    """Recognise norms by their class name, since libraries define dozens of their own classes."""
    return "Norm" in type(module).__name__


def _calibrate(model: nn.Module, args: Sequence[torch.Tensor], noise: torch.Generator) -> None:
    """Set the running statistics of the batch norms from one forward pass, with noise in proportion to them."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(*args)
    for norm in norms:
        variance = norm.running_var
        norm.running_mean.add_(0.1 * variance.sqrt() * torch.randn(variance.shape, generator=noise))
        variance.mul_(0.8 + 0.4 * torch.rand(variance.shape, generator=noise)).add_(0.1 * variance.mean())


def _replace(module: nn.Module, name: str, tensor: torch.Tensor, noise: torch.Generator) -> None:
    """Overwrite one tensor in place according to its role."""
    normal = torch.randn(tensor.shape, generator=noise)
    uniform = torch.rand(tensor.shape, generator=noise)
    if name.startswith("running_"):
        return
    if _is_norm(module) and name in ("weight", "gamma", "scale"):
        tensor.copy_(0.7 + 0.6 * uniform)
    elif tensor.numel() and tensor.min() == tensor.max():
        tensor.copy_(_varied(name, tensor, normal, uniform))
    elif isinstance(module, nn.Linear) and tensor.ndim == 2:
        tensor.mul_(max(1.0, tensor.shape[1] ** -0.5 / float(tensor.std())))


def _varied(name: str, tensor: torch.Tensor, normal: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the replacement of a constant tensor."""
    value = abs(float(tensor.flatten()[0]))
    if value == 0 and (tensor.ndim < 2 or "bias" in name):
        return 0.1 * normal
    if value == 0:
        return normal * (tensor.numel() / tensor.shape[0]) ** -0.5
    if value < 0.1:
        return 0.3 + 0.4 * uniform
    return tensor * (0.8 + 0.4 * uniform)
