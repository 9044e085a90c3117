"""The training loop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from trainer_svc.engine.artifact import ARTIFACT_DIR, CardFacts, model_card
from trainer_svc.engine.checkpoint import (
    CHECKPOINTS_DIR,
    save_model,
    save_training_state,
    write_folder,
)
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.events import EventLog, format_duration, plain_log
from trainer_svc.engine.examples import Example
from trainer_svc.engine.loss import summed_loss
from trainer_svc.engine.optimizer import learning_rate_at, set_learning_rate
from trainer_svc.engine.packing import Pack, group_rows, make_pack
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.progress import Progress
from trainer_svc.engine.row_order import derived_seed, epoch_order, rank_share
from trainer_svc.engine.run_spec import RunSpec
from trainer_svc.engine.setup import Workload, prepare
from trainer_svc.engine.wandb_tracking import start_wandb

LOGS_DIR = "logs"

# By device. Past this a pack's matrix products gain nothing, and its activations are what fills the memory.
MAX_TOKENS_PER_PASS = {"cpu": 1024, "cuda": 8192}

_MAX_NON_FINITE_STEPS = 5


def train(spec: RunSpec, group: ProcessGroup, events: EventLog) -> None:
    """Does a whole run: events, checkpoints and the artifact come out in `spec.output_dir`.

    Every process of the group must call it with the same specification.

    Args:
        spec: what to do; its `output_dir` must exist.
        group: the processes; the first writes the files.
        events: silent in all but the first process.

    Raises:
        JobFault: the run can't succeed as it was asked for.
        CheckpointError: `resume_from` is damaged or of another run.
    """
    with ExitStack() as cleanup:
        if group.is_first:
            if spec.train_log_file is not None:
                (spec.output_dir / LOGS_DIR).mkdir(exist_ok=True)
                events.subscribe(plain_log(spec.output_dir / LOGS_DIR / spec.train_log_file))
            if spec.wandb_project is not None:
                tracked = start_wandb(spec)
                cleanup.callback(tracked.finish)
                events.subscribe(tracked.record)
                place = (
                    tracked.url or "offline, since WANDB_API_KEY isn't set; `wandb sync` uploads its files"
                )
                events.log(f"Weights & Biases: {place}", wandb_url=tracked.url)
        Loop(spec, group, events, prepare(spec, group, events)).run()


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: mean over the step's target tokens, in nats.
        grad_norm: of all gradients together, before clipping.
        num_tokens: input tokens of all processes.
    """

    loss: float
    grad_norm: float
    num_tokens: int

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Loop:
    """The steps of one run, from its start state to its artifact."""

    def __init__(self, spec: RunSpec, group: ProcessGroup, events: EventLog, workload: Workload) -> None:
        self._spec = spec
        self._group = group
        self._events = events
        self._workload = workload
        self._state = workload.start
        self._progress = Progress()
        self._non_finite_steps = 0
        self._order: tuple[int, list[int]] = (0, [])

    def run(self) -> None:
        plan = self._workload.plan
        with self._adapters_take_any_dtype():
            for step in range(self._state.step + 1, plan.total_steps + 1):
                self._take_step(step)
                if step % plan.steps_per_epoch == 0 or step == plan.total_steps:
                    self._end_epoch()
        self._finish()

    def _adapters_take_any_dtype(self) -> AbstractContextManager[None]:
        # peft turns an adapter's input into float32, which autocast at once turns back: two copies of the
        # activations for nothing.
        model = self._workload.model
        if isinstance(model, PeftModel) and self._workload.dtype == torch.bfloat16:
            return disable_input_dtype_casting(model)
        return nullcontext()

    def _take_step(self, step: int) -> None:
        spec, plan = self._spec, self._workload.plan
        learning_rate = learning_rate_at(
            step,
            peak=spec.learning_rate,
            total_steps=plan.total_steps,
            warmup_steps=spec.extras.warmup_steps,
            scheduler=spec.extras.lr_scheduler,
        )
        set_learning_rate(self._workload.optimizer, learning_rate)
        self._progress.start_step()
        result = self._compute_gradients(step)
        if result.is_finite:
            self._workload.optimizer.step()
        self._workload.optimizer.zero_grad(set_to_none=True)
        self._progress.end_step(result.num_tokens)
        epoch = (step - 1) // plan.steps_per_epoch + 1
        self._state = self._state.model_copy(
            update={
                "step": step,
                "epoch": epoch,
                "tokens_trained": self._state.tokens_trained + result.num_tokens,
                "training_loss": result.loss if result.is_finite else self._state.training_loss,
            }
        )
        if result.is_finite:
            self._non_finite_steps = 0
            self._report_step(result, learning_rate)
        else:
            self._count_non_finite(step)

    def _compute_gradients(self, step: int) -> StepResult:
        """Forward and backward over the step's rows; leaves clipped gradients on the parameters.

        The loss is normalised by the targets of the whole step, so that accumulating and spreading over
        processes give what one large batch gives.
        """
        workload, group = self._workload, self._group
        rows = self._step_rows(step)
        num_targets = sum(row.num_targets for row in rows)
        torch.manual_seed(derived_seed(self._spec.seed, step, group.rank))
        loss = torch.zeros((), device=group.device)
        for pack in self._packs(rows):
            pack_loss = summed_loss(workload.model, pack, workload.dtype, packs_rows=workload.packs_rows)
            (pack_loss / num_targets).backward()
            loss += pack_loss.detach() / num_targets
        group.sum_gradients(workload.trainable)
        grad_norm = torch.nn.utils.clip_grad_norm_(workload.trainable, self._spec.extras.max_grad_norm)
        return StepResult(
            loss=group.sum_scalar(float(loss)),
            grad_norm=float(grad_norm),
            num_tokens=sum(row.num_tokens for row in rows),
        )

    def _step_rows(self, step: int) -> list[Example]:
        """The rows of a step, over all processes."""
        plan, examples = self._workload.plan, self._workload.training.examples
        epoch_index, step_in_epoch = divmod(step - 1, plan.steps_per_epoch)
        epoch = epoch_index + 1
        if self._order[0] != epoch:
            order = epoch_order(len(examples), seed=self._spec.seed, epoch=epoch, shuffle=self._spec.shuffle)
            self._order = (epoch, order)
        start = step_in_epoch * plan.rows_per_step
        return [examples[index] for index in self._order[1][start : start + plan.rows_per_step]]

    def _packs(self, rows: Sequence[Example]) -> Iterator[Pack]:
        """This process's share of the rows, in packs of at most `batch_size` rows."""
        share = rank_share(rows, rank=self._group.rank, world_size=self._group.world_size)
        max_tokens = MAX_TOKENS_PER_PASS[self._group.device.type] if self._workload.packs_rows else 0
        for start in range(0, len(share), self._spec.batch_size):
            for examples in group_rows(share[start : start + self._spec.batch_size], max_tokens):
                yield make_pack(examples, self._group.device)

    def _report_step(self, result: StepResult, learning_rate: float) -> None:
        state, total_steps = self._state, self._workload.plan.total_steps
        remaining_seconds = self._progress.remaining_seconds(total_steps - state.step)
        tokens_per_second = self._progress.tokens_per_second
        self._events.write(
            "step",
            f"step {state.step}/{total_steps} · epoch {state.epoch} · loss {result.loss:.4f} · "
            f"lr {learning_rate:.1e} · {tokens_per_second:,.0f} tokens/s · "
            f"{format_duration(remaining_seconds)} left",
            step=state.step,
            total_steps=total_steps,
            epoch=state.epoch,
            loss=result.loss,
            learning_rate=learning_rate,
            tokens_trained=state.tokens_trained,
            tokens_per_second=round(tokens_per_second, 1),
            remaining_seconds=round(remaining_seconds, 1),
            grad_norm=result.grad_norm,
        )

    def _count_non_finite(self, step: int) -> None:
        self._non_finite_steps += 1
        if self._non_finite_steps >= _MAX_NON_FINITE_STEPS:
            raise JobFault(
                f"the loss or its gradient was infinite or not a number in {_MAX_NON_FINITE_STEPS} steps in "
                f"a row, the last of them step {step}; lower learning_rate, or add warmup_steps"
            )
        self._events.log(f"step {step} skipped: its loss or gradient is infinite or not a number", step=step)

    def _end_epoch(self) -> None:
        validation_loss = self._validate()
        if validation_loss is not None:
            self._state = self._state.model_copy(update={"validation_loss": validation_loss})
        state = self._state
        if self._group.is_first:
            relative = Path(CHECKPOINTS_DIR) / f"epoch-{state.epoch}"
            write_folder(self._spec.output_dir / relative, self._fill_checkpoint)
            self._events.write(
                "checkpoint",
                f"checkpoint of epoch {state.epoch} written",
                epoch=state.epoch,
                step=state.step,
                path=str(relative),
                tokens_trained=state.tokens_trained,
                epochs_completed=self._epochs_completed,
            )
        self._group.wait_for_all()

    @property
    def _epochs_completed(self) -> int:
        return self._state.step // self._workload.plan.steps_per_epoch

    def _validate(self) -> float | None:
        """The mean loss over the validation rows' targets; None without validation rows."""
        validation = self._workload.validation
        if validation is None:
            return None
        workload = self._workload
        workload.model.eval()
        total = 0.0
        with torch.no_grad():
            for pack in self._packs(validation.examples):
                total += float(
                    summed_loss(workload.model, pack, workload.dtype, packs_rows=workload.packs_rows)
                )
        workload.model.train()
        loss = self._group.sum_scalar(total) / validation.num_targets
        state = self._state
        if not math.isfinite(loss):
            self._events.log(f"the validation loss of epoch {state.epoch} is infinite or not a number")
            return None
        self._events.write(
            "validation",
            f"epoch {state.epoch} · validation loss {loss:.4f}",
            epoch=state.epoch,
            step=state.step,
            loss=loss,
        )
        return loss

    def _fill_checkpoint(self, folder: Path) -> None:
        workload = self._workload
        # float32, so that a resumed run continues from the very same weights.
        save_model(workload.model, workload.tokenizer, folder, torch.float32)
        save_training_state(folder, self._state, workload.model, workload.optimizer)
        self._write_card(folder)

    def _finish(self) -> None:
        state = self._state
        if self._group.is_first:
            write_folder(self._spec.output_dir / ARTIFACT_DIR, self._fill_artifact)
            loss = "unknown" if state.training_loss is None else f"{state.training_loss:.4f}"
            self._events.write(
                "finished",
                f"finished after {state.step} steps · training loss {loss}",
                path=ARTIFACT_DIR,
                training_loss=state.training_loss,
                validation_loss=state.validation_loss,
                steps=state.step,
                epochs_completed=self._epochs_completed,
                tokens_trained=state.tokens_trained,
            )
        self._group.wait_for_all()

    def _fill_artifact(self, folder: Path) -> None:
        workload = self._workload
        save_model(workload.model, workload.tokenizer, folder, workload.stored_dtype)
        self._write_card(folder)
        if self._spec.train_log_file is not None:
            self._events.log("artifact written")
            shutil.copyfile(
                self._spec.output_dir / LOGS_DIR / self._spec.train_log_file,
                folder / self._spec.train_log_file,
            )

    def _write_card(self, folder: Path) -> None:
        workload, state = self._workload, self._state
        facts = CardFacts(
            training_sha256=state.identity.training_sha256,
            num_rows=len(workload.training.examples),
            num_tokens_trained=state.tokens_trained,
            steps=state.step,
            epochs_completed=self._epochs_completed,
            training_loss=state.training_loss,
            validation_loss=state.validation_loss,
            dtype=str(workload.dtype).removeprefix("torch."),
        )
        (folder / "README.md").write_text(model_card(self._spec, facts), encoding="utf-8")
