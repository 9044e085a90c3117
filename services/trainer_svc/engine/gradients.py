"""One step's gradients: forward and backward over its rows, in passes that fit the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.distributed.tensor import DTensor

from trainer_svc.engine.device import free_unused_memory, is_out_of_memory
from trainer_svc.engine.errors import JobFault, OutOfMemory
from trainer_svc.engine.events import EventLog
from trainer_svc.engine.examples import Example
from trainer_svc.engine.packing import Pack, make_pack
from trainer_svc.engine.passes import Passes
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.row_order import derived_seed, rank_share
from trainer_svc.engine.run_spec import TOKENS_PER_PASS, RunSpec
from trainer_svc.engine.setup import Workload

_T = TypeVar("_T")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step's gradients.

    Attributes:
        loss: mean over the step's target tokens, in nats.
        grad_norm: of all gradients together, before clipping.
        num_tokens: input tokens of all processes.
        num_targets: target tokens of all processes.
        padding_share: tokens computed for nothing, of all that this process computed; 0 to below 1.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    num_targets: int
    padding_share: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class GradientComputer:
    """Computes gradients and losses; splits rows into passes, and into smaller ones when memory is short."""

    def __init__(self, spec: RunSpec, group: ProcessGroup, events: EventLog, workload: Workload) -> None:
        self._spec = spec
        self._group = group
        self._events = events
        self._workload = workload
        self._tokens_per_pass = spec.tokens_per_pass or TOKENS_PER_PASS[group.device.type]
        self._passes = Passes(
            workload.model,
            workload.trainable,
            group.device,
            dtype=workload.dtype,
            packs_rows=workload.packs_rows,
        )

    def compute(self, rows: Sequence[Example], step: int) -> StepResult:
        """Leaves the clipped gradients of a step on the parameters.

        The loss is normalised by the targets of the whole step, so that accumulating and spreading over
        processes give what one large batch gives.

        Args:
            rows: of the step, over all processes.
            step: seeds the dropout.

        Raises:
            JobFault: not even one row fits the memory.
            OutOfMemory: the weights are sharded, so the processes can't try again by themselves.
        """
        workload, group = self._workload, self._group
        num_targets = sum(row.num_targets for row in rows)
        loss, padding_share = self._until_it_fits(lambda: self._accumulate(rows, num_targets, step), rows)
        if not workload.is_sharded:
            group.sum_gradients(workload.trainable)
        grad_norm = torch.nn.utils.clip_grad_norm_(workload.trainable, self._spec.extras.max_grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        return StepResult(
            loss=group.sum_scalar(loss),
            grad_norm=float(grad_norm),
            num_tokens=sum(row.num_tokens for row in rows),
            num_targets=num_targets,
            padding_share=padding_share,
        )

    def mean_loss(self, rows: Sequence[Example]) -> float:
        """The mean loss over the targets of rows that aren't trained on, over all processes, in nats."""
        model = self._workload.model
        model.eval()
        with torch.no_grad():
            total = self._until_it_fits(lambda: self._passes.summed_loss(self._packs(rows)[0]), rows)
        model.train()
        return self._group.sum_scalar(total) / sum(row.num_targets for row in rows)

    def _accumulate(self, rows: Sequence[Example], num_targets: int, step: int) -> tuple[float, float]:
        """Returns this process's part of the loss, and its share of padding."""
        self._workload.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(derived_seed(self._spec.seed, step, self._group.rank))
        packs, num_needed = self._packs(rows)
        loss = self._passes.add_gradients(packs, num_targets)
        num_computed = sum(pack.input_ids.numel() for pack in packs)
        # Rows that begin alike are computed with less than all their tokens.
        return loss, max(0.0, 1 - num_needed / num_computed) if num_computed else 0.0

    def _packs(self, rows: Sequence[Example]) -> tuple[list[Pack], int]:
        """This process's share of the rows in packs, and how many tokens it has.

        Processes that share the weights must go through the model equally often: those with fewer packs
        repeat one that doesn't count.
        """
        share = rank_share(rows, rank=self._group.rank, world_size=self._group.world_size)
        packs = self._passes.split(share, self._tokens_per_pass) if share else []
        if self._workload.is_sharded:
            shortest = min(rows, key=lambda row: row.num_tokens)
            idle = replace(make_pack([shortest], self._group.device), counts=False)
            packs += [idle] * (self._group.largest(len(packs)) - len(packs))
        return packs, sum(row.num_tokens for row in share)

    def _until_it_fits(self, compute: Callable[[], _T], rows: Sequence[Example]) -> _T:
        """Returns what `compute` does; while the memory is too small, with passes of half the size."""
        while True:
            result, fits = None, True
            try:
                result = compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            if not fits and self._workload.is_sharded:
                raise OutOfMemory(self._smaller_passes(rows))
            if self._group.largest(int(not fits)) == 0:
                assert result is not None
                return result
            self._workload.optimizer.zero_grad(set_to_none=True)
            free_unused_memory(self._group.device)
            self._tokens_per_pass = self._smaller_passes(rows)
            self._events.log(
                f"out of memory: the step is computed again in passes of at most {self._tokens_per_pass:,} "
                "tokens, which changes no result",
                tokens_per_pass=self._tokens_per_pass,
            )

    def _smaller_passes(self, rows: Sequence[Example]) -> int:
        longest = max(row.num_tokens for row in rows)
        largest_pass = min(self._tokens_per_pass, sum(row.num_tokens for row in rows))
        if largest_pass <= longest or not self._workload.packs_rows:
            raise JobFault(
                f"the memory is too small even for one row of {longest:,} tokens; lower "
                "max_sequence_length, or train a smaller base model"
            )
        return max(largest_pass // 2, longest)
