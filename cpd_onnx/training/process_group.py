"""The processes of one run under torchrun or accelerate launch, for torch's data parallelism and for other work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cpd_onnx.errors import CpdError
from cpd_onnx.runtime.processes import joined, leading
from cpd_onnx.runtime.shards import Group

_GLOO_THREADS = 2
"""Number of threads of the gloo backend, that is, of concurrent collectives (its default)."""


@dataclass(frozen=True)
class ProcessGroup:
    """The process group, as seen from this process.

    Attributes:
        device: Device of this process.
        rank: Rank of this process.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process of rank 0, which writes files and messages."""
        return self.rank == 0

    def shared(self, value: Any) -> Any:
        """Return the value of the process of rank 0 in all processes."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in some process."""
        return flag if self.size == 1 else float(self.mean(torch.tensor(float(flag), device=self.device))) > 0

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return the module wrapped so that gradients are averaged over all processes."""
        if self.size == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, static_graph=True)


@contextmanager
def join_process_group(device: str) -> Iterator[ProcessGroup]:
    """Join the process group of a launcher; without one, the group is this process alone.

    Raises:
        CpdError: torch does not know the device, or finds no such device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device)
    if size == 1 or not distributed.is_available():
        yield ProcessGroup(chosen)
        return
    if chosen == torch.device("cuda"):
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    opened = not distributed.is_initialized()
    if opened:
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield ProcessGroup(chosen, distributed.get_rank(), distributed.get_world_size())
        # DDP never frees its group, whose threads release the tensors of the last collectives some time after these
        # complete; a process that exits before that aborts. A barrier has no tensors, and completes after those.
        for _ in range(_GLOO_THREADS):
            distributed.barrier()
    finally:
        if opened:
            distributed.destroy_process_group()


@contextmanager
def launched() -> Iterator[Group]:
    """Share the batches of other work than training, see `runtime.shards`, with all processes of a launcher.

    Torch tells them where the first of them is.
    """
    distributed.init_process_group("gloo")
    try:
        rank = distributed.get_rank()
        if rank == 0:
            size = distributed.get_world_size()
            with leading(size, lambda place: distributed.broadcast_object_list([place]), is_local=False) as group:
                yield group
            return
        told: list[Any] = [None]
        distributed.broadcast_object_list(told)
        with joined(replace(told[0], rank=rank)) as group:
            yield group
    finally:
        distributed.destroy_process_group()


def _device(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CpdError(f"device {name!r} was requested but torch finds no GPU; use 'auto' or 'cpu'")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise CpdError(f"torch knows no device {name!r}; use 'auto', 'cpu' or 'cuda'") from error
