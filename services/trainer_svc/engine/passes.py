"""Forward and backward passes over packs of rows, on the CPU several at once.

On a CPU each core takes packs of its own, one thread a pack: nothing waits for the slowest core after every
product, as it does when all cores share each one, which also suffers least when other programs want a core.

Shapes: none; packs are `packing.Pack`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer_svc.engine.examples import Example
from trainer_svc.engine.layers.segment_attention import uses_flash
from trainer_svc.engine.layers.speed_up import is_fast
from trainer_svc.engine.loss import summed_loss
from trainer_svc.engine.packing import Pack, group_rows, make_pack
from trainer_svc.engine.run_spec import TOKENS_PER_PASS

# Below this a pass takes as long as reading the weights, which all cores do better together.
_MIN_TOKENS_AT_ONCE = 128

_Result = TypeVar("_Result")


class Passes:
    """What a step or a validation computes with the model."""

    def __init__(
        self,
        model: nn.Module,
        trainable: Sequence[nn.Parameter],
        device: torch.device,
        *,
        dtype: torch.dtype,
        packs_rows: bool,
    ) -> None:
        """Makes threads, where passes run in several.

        Args:
            model: a causal language model of transformers, with or without peft's adapters.
            trainable: its parameters that learn.
            device: where it computes. Its weights may lie elsewhere in between.
            dtype: of the matrix products.
            packs_rows: whether its attention takes several rows in one pass.
        """
        self._model = model
        self._trainable = tuple(trainable)
        self._dtype = dtype
        self._packs_rows = packs_rows
        self._device = device
        self._num_threads = torch.get_num_threads()
        # The usual layers draw random numbers for dropout from one generator, in whatever order threads come;
        # and processes that share weights must all make their passes in one order.
        shares_weights = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        self._shares_prefix = is_fast(model) and not uses_flash(self._device, dtype)
        several = self._device.type == "cpu" and is_fast(model) and not shares_weights
        self._max_at_once = self._num_threads if several else 1
        if self._device.type == "cpu":
            _keep_freed_memory()
        self._threads = ThreadPoolExecutor(self._max_at_once, "pass") if self._max_at_once > 1 else None

    def split(self, rows: Sequence[Example], tokens_per_pass: int | None = None) -> list[Pack]:
        """The rows in packs: a function of the rows and of the machine.

        Args:
            rows: this process's share.
            tokens_per_pass: most tokens of a pack, a longer row aside; None is what suits the device.
        """
        max_tokens = (tokens_per_pass or TOKENS_PER_PASS[self._device.type]) if self._packs_rows else 0
        num_tokens = sum(row.num_tokens for row in rows)
        at_once = max(1, min(self._max_at_once, num_tokens // _MIN_TOKENS_AT_ONCE, len(rows)))
        return [
            make_pack(group, self._device, share_prefix=self._shares_prefix)
            for group in group_rows(rows, max_tokens, at_once, share_prefix=self._shares_prefix)
        ]

    def add_gradients(self, packs: Sequence[Pack], num_targets: int) -> float:
        """Adds to the parameters' gradients those of the packs' summed loss over `num_targets`.

        Args:
            packs: this process's share of a step; may be empty.
            num_targets: of the whole step.

        Returns:
            The packs' summed loss over `num_targets`.
        """
        if self._num_at_once(packs) == 1:
            losses = [self._backward(pack, num_targets) for pack in packs]
            return sum(float(loss) for loss in losses)
        total = 0.0
        # Each thread's sums are added in one order, so that the bits don't depend on who is done first.
        for loss, gradients in self._map(lambda share: self._gradients(share, num_targets), packs):
            total += float(loss)
            for parameter, gradient in zip(self._trainable, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return total

    def summed_loss(self, packs: Sequence[Pack]) -> float:
        """The summed loss of the packs' targets, in nats, without gradients."""
        return sum(self._map(self._loss_without_gradient, packs))

    def _num_at_once(self, packs: Sequence[Pack]) -> int:
        return max(1, min(self._max_at_once, len(packs)))

    def _map(self, compute: Callable[[Sequence[Pack]], _Result], packs: Sequence[Pack]) -> list[_Result]:
        at_once = self._num_at_once(packs)
        if self._threads is None or at_once == 1:
            return [compute(packs)]

        def compute_with_its_share_of_cores(share: Sequence[Pack]) -> _Result:
            # Of the calling thread, and of none that has set it already.
            torch.set_num_threads(self._num_threads // at_once)
            return compute(share)

        shares = [packs[start::at_once] for start in range(at_once)]
        return list(self._threads.map(compute_with_its_share_of_cores, shares))

    def _loss(self, pack: Pack) -> Tensor:
        loss = summed_loss(self._model, pack, self._dtype, packs_rows=self._packs_rows)
        return loss if pack.counts else loss * 0.0

    def _loss_without_gradient(self, packs: Sequence[Pack]) -> float:
        with torch.no_grad():
            return sum(float(self._loss(pack)) for pack in packs)

    def _backward(self, pack: Pack, num_targets: int) -> Tensor:
        loss = self._loss(pack) / num_targets
        loss.backward()
        return loss.detach()

    def _gradients(self, packs: Sequence[Pack], num_targets: int) -> tuple[Tensor, list[Tensor | None]]:
        total = torch.zeros(())
        sums: list[Tensor | None] = [None] * len(self._trainable)
        for pack in packs:
            loss = self._loss(pack) / num_targets
            gradients = torch.autograd.grad(loss, self._trainable, allow_unused=True)
            total += loss.detach()
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, gradients, strict=True)]
        return total, sums


def _keep_freed_memory() -> None:
    """Has glibc keep what is freed: fresh pages from the kernel cost more than a pass over them.

    And has threads share one heap, since the others' heaps are given back all the same.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, which has its own ways
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)
    mallopt(arena_max, 1)
