"""The processes of a run: who this one is, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer_svc.engine.errors import JobFault

# A rank that waits longer for another than this is waiting for a dead one.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place among those that torchrun started.

    Attributes:
        rank: from 0; rank 0 writes events and files.
        world_size: number of processes.
        device: this process's own.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_scalar(self, value: float) -> float:
        """The sum of every process's value, in float64. Every process must call it."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def largest(self, value: int) -> int:
        """The largest of every process's values. Every process must call it."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces each gradient by the sum of every process's. Every process must call it.

        A process without rows in a step has no gradients; they count as zero. Sharded parameters have their
        sums already (see `sharding.py`).
        """
        if self.world_size == 1:
            return
        gradients: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        # One message instead of hundreds: adapters are many small tensors.
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))

    def check_devices(self) -> None:
        """To be called before anything else, by every process.

        Raises:
            JobFault: there are more processes on this machine than GPUs.
        """
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if self.device.type == "cuda" and processes > gpus:
            raise JobFault(
                f"nproc_per_node is {processes}, but this trainer has {gpus} GPU{'s' if gpus > 1 else ''}, "
                "and each process needs one; lower it"
            )

    def wait_for_all(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def single_process(device: torch.device | None = None) -> ProcessGroup:
    """The group of a run that torchrun didn't start."""
    return ProcessGroup(0, 1, device or _device(0))


def join_process_group() -> ProcessGroup:
    """Joins the group that torchrun's environment variables describe; alone if there are none."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return single_process()
    device = _device(int(os.environ["LOCAL_RANK"]))
    # Shards that lie in the host's memory are summed there.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    return ProcessGroup(dist.get_rank(), world_size, device)


def leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())  # see `check_devices`
    torch.cuda.set_device(device)
    return device
