"""The training loop."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from trainer_svc.engine.artifact import ARTIFACT_DIR
from trainer_svc.engine.checkpoint import CheckpointMark, TrainingState
from trainer_svc.engine.device import free_unused_memory, make_deterministic, peak_memory_bytes
from trainer_svc.engine.errors import Diverged, JobFault, Stopped
from trainer_svc.engine.events import EVENTS_FILE, EventLog, Subscriber, format_duration, plain_log
from trainer_svc.engine.examples import Example
from trainer_svc.engine.flops import FlopCounts
from trainer_svc.engine.gradients import GradientComputer, StepResult
from trainer_svc.engine.optimizer import learning_rate_at, set_learning_rate
from trainer_svc.engine.process_group import ProcessGroup, join_process_group, leave_process_group
from trainer_svc.engine.progress import Progress
from trainer_svc.engine.row_order import epoch_order
from trainer_svc.engine.run_output import LOGS_DIR, RunOutput
from trainer_svc.engine.run_spec import RunSpec
from trainer_svc.engine.setup import Workload, prepare
from trainer_svc.engine.wandb_tracking import start_wandb

_LISTED_ROWS = 20
_LONGEST_SECONDS = 100 * 365 * 24 * 3600  # a date beyond the year 9999 can't be told


def fine_tune(spec: RunSpec, on_event: Subscriber | None = None) -> Path:
    """Does a whole run in this process, or in one of several that torchrun started.

    Has torch choose deterministic algorithms, for the whole process and from then on.

    Args:
        spec: what to do; its `output_dir` is made if missing, and must hold no other run.
        on_event: called with each event after it is written.

    Returns:
        The artifact's folder: what peft or transformers load, and a model card.

    Raises:
        FileExistsError: `output_dir` holds another run.
        JobFault: and the others that `train` raises.
    """
    make_deterministic()
    group = join_process_group()
    try:
        if group.is_first:
            spec.output_dir.mkdir(parents=True, exist_ok=True)
            if (spec.output_dir / EVENTS_FILE).exists():
                raise FileExistsError(f"{spec.output_dir} holds another run; give each run its own folder")
        events = EventLog(spec.output_dir, silent=not group.is_first)
        if on_event is not None:
            events.subscribe(on_event)
        try:
            train(spec, group, events)
        finally:
            events.close()
    finally:
        leave_process_group()
    return spec.output_dir / ARTIFACT_DIR


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
        OutOfMemory: sharded weights leave too little memory; smaller passes may help.
        Stopped: the specification's `stop_file` appeared.
        ParityError: the stored model is not the trained one.
    """
    group.check_devices()
    with ExitStack() as cleanup:
        if group.is_first:
            if spec.train_log_file is not None:
                (spec.output_dir / LOGS_DIR).mkdir(exist_ok=True)
                events.subscribe(plain_log(spec.output_dir / LOGS_DIR / spec.train_log_file))
            if spec.wandb_project is not None:
                tracked = start_wandb(spec)
                cleanup.callback(tracked.finish)
                events.subscribe(tracked.record)
                events.log(f"Weights & Biases: {tracked.place}", wandb_url=tracked.url)
        way_back = _run(spec, group, events, prepare(spec, group, events))
        if way_back is not None:
            # Prepared anew rather than rolled back: the same path as a resumed run's, which is tested.
            spec = spec.model_copy(update={"resume_from": way_back.checkpoint})
            free_unused_memory(group.device)
            workload = prepare(spec, group, events)
            _run(spec, group, events, replace(workload, start=way_back.start(workload.start)), goes_back=True)


@dataclass(frozen=True)
class _WayBack:
    """Where a run that diverged goes on from.

    Attributes:
        checkpoint: its folder; None is the start.
        marks: the checkpoints that the run had.
    """

    checkpoint: Path | None
    marks: tuple[CheckpointMark, ...]

    def start(self, saved: TrainingState) -> TrainingState:
        """The state to start with, in which the checkpoints of later steps are yet to be removed."""
        marks = {mark.step: mark for mark in (*self.marks, *saved.checkpoints[-1:])}
        checkpoints = tuple(marks[step] for step in sorted(marks))
        return saved.model_copy(update={"learning_rate_factor": 0.5, "checkpoints": checkpoints})


def _run(
    spec: RunSpec, group: ProcessGroup, events: EventLog, workload: Workload, *, goes_back: bool = False
) -> _WayBack | None:
    """Runs to the end. Returns where to go on from, once, when the loss diverges."""
    output = RunOutput(spec, group, events, workload)
    loop = Loop(spec, group, events, workload, output)
    try:
        if goes_back:
            loop.keep_start()
        loop.run()
    except Diverged as error:
        if workload.start.learning_rate_factor < 1:
            raise JobFault(
                f"{error}, with half the learning rate too; lower learning_rate, or add warmup_steps"
            ) from error
        way_back = loop.way_back()
        place = (
            "the start" if way_back.checkpoint is None else f"the checkpoint in {way_back.checkpoint.name}"
        )
        events.log(f"{error}; the run goes back to {place}, with half the learning rate")
        return way_back
    finally:
        output.close()
    return None


class Loop:
    """The steps of one run, from its start state to its artifact."""

    def __init__(
        self,
        spec: RunSpec,
        group: ProcessGroup,
        events: EventLog,
        workload: Workload,
        output: RunOutput,
    ) -> None:
        self._spec = spec
        self._group = group
        self._events = events
        self._workload = workload
        self._output = output
        self._state: TrainingState = workload.start
        self._gradients = GradientComputer(spec, group, events, workload)
        self._progress = Progress()
        self._flops = FlopCounts.of(workload.model, workload.base)
        self._order: tuple[int, list[int]] = (0, [])

    def way_back(self) -> _WayBack:
        """Returns where to go back to, once all checkpoints are written. Every process must call it."""
        return _WayBack(self._output.checkpoint_to_go_back_to(self._state), self._state.checkpoints)

    def keep_start(self) -> None:
        """Writes a checkpoint of the start in place of all from this step on.

        So a run that is resumed from the newest goes on with half the learning rate, as this one does.
        """
        self._group.wait_for_all()  # until every process has read the one that is replaced
        state = self._state
        replaced = next((mark for mark in state.checkpoints if mark.step == state.step), None)
        loss, ends_epoch = (replaced.validation_loss, replaced.ends_epoch) if replaced else (None, False)
        self._state = self._output.checkpoint(state, loss, ends_epoch=ends_epoch)

    def run(self) -> None:
        """Trains to the end and writes the artifact.

        Raises:
            Diverged: too many steps in a row had no finite gradients.
            JobFault: the weights that it ended with are of no use.
            Stopped: it was told to stop before the last step.
        """
        plan = self._workload.plan
        with self._adapters_take_any_dtype():
            while self._state.step < plan.total_steps and not self._stops_early:
                self._take_step(self._state.step + 1)
                self._after_step()
                self._stop_if_told()
            if self._stops_early:
                best = self._state.best_validation_loss
                self._events.log(
                    f"stopped early after step {self._state.step}: the validation loss had no gain in "
                    f"{self._state.measurements_without_gain} measurements; its best was "
                    f"{'no number' if best is None else f'{best:.4f}'}"
                )
            self._output.finish(self._state)

    def _adapters_take_any_dtype(self) -> AbstractContextManager[None]:
        # peft turns an adapter's input into float32, which autocast at once turns back: two copies of the
        # activations for nothing.
        model = self._workload.model
        if isinstance(model, PeftModel) and self._workload.dtype == torch.bfloat16:
            return disable_input_dtype_casting(model)
        return nullcontext()

    def _take_step(self, step: int) -> None:
        spec, plan = self._spec, self._workload.plan
        learning_rate = self._state.learning_rate_factor * learning_rate_at(
            step,
            peak=spec.learning_rate,
            total_steps=plan.total_steps,
            warmup_steps=spec.extras.warmup_steps,
            scheduler=spec.extras.lr_scheduler,
        )
        set_learning_rate(self._workload.optimizer, learning_rate)
        rows = self._step_rows(step)
        self._progress.start_step()
        result = self._gradients.compute(rows, step)
        self._output.wait_for_copy()
        if result.is_finite:
            self._workload.optimizer.step()
        self._workload.optimizer.zero_grad(set_to_none=True)
        self._progress.end_step(result.num_tokens)
        self._state = self._state.model_copy(
            update={
                "step": step,
                "epoch": (step - 1) // plan.steps_per_epoch + 1,
                "tokens_trained": self._state.tokens_trained + result.num_tokens,
                "training_loss": result.loss if result.is_finite else self._state.training_loss,
                "skipped_steps": 0 if result.is_finite else self._state.skipped_steps + 1,
            }
        )
        if result.is_finite:
            self._report_step(result, learning_rate, rows)
        else:
            self._report_skipped(rows)

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

    def _report_step(self, result: StepResult, learning_rate: float, rows: list[Example]) -> None:
        state, total_steps = self._state, self._workload.plan.total_steps
        remaining_seconds = self._progress.remaining_seconds(total_steps - state.step)
        tokens_per_second = self._progress.tokens_per_second
        finish = datetime.now(UTC) + timedelta(seconds=min(remaining_seconds, _LONGEST_SECONDS))
        facts = {
            "step": state.step,
            "total_steps": total_steps,
            "epoch": state.epoch,
            "loss": result.loss,
            "learning_rate": learning_rate,
            "tokens_trained": state.tokens_trained,
            "tokens_per_second": round(tokens_per_second, 1),
            "remaining_seconds": round(remaining_seconds, 1),
            "estimated_finish": finish.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "grad_norm": result.grad_norm,
        }
        if state.step % self._spec.extras.report_every_steps == 0 or state.step == total_steps:
            flops = self._flops.of_rows(rows) / self._group.world_size
            share = flops / self._progress.last_step_seconds / self._workload.matrix_peak_flops
            facts |= {
                "peak_memory_bytes": peak_memory_bytes(self._group.device),
                "padding_share": round(result.padding_share, 4),
                "matrix_peak_share": round(share, 4),
            }
        self._events.write(
            "step",
            f"step {state.step}/{total_steps} · epoch {state.epoch} · loss {result.loss:.4f} · "
            f"lr {learning_rate:.1e} · {tokens_per_second:,.0f} tokens/s · "
            f"{format_duration(remaining_seconds)} left",
            **facts,
        )

    def _report_skipped(self, rows: list[Example]) -> None:
        step = self._state.step
        lines = sorted(row.line_number for row in rows)
        listed = ", ".join(str(line) for line in lines[:_LISTED_ROWS])
        listed += f" and {len(lines) - _LISTED_ROWS} more" if len(lines) > _LISTED_ROWS else ""
        self._events.log(
            f"step {step} skipped: its loss or gradient is infinite or not a number; its rows are those of "
            f"lines {listed}",
            step=step,
            lines=lines[:_LISTED_ROWS],
        )
        limit = self._spec.extras.max_non_finite_steps
        if self._state.skipped_steps >= limit:
            raise Diverged(
                f"the loss or its gradient was infinite or not a number in {limit} steps in a row, the last "
                f"of them step {step}"
            )

    def _after_step(self) -> None:
        step, plan, extras = self._state.step, self._workload.plan, self._spec.extras
        ends_epoch = step % plan.steps_per_epoch == 0 or step == plan.total_steps
        measured = ends_epoch or _is_due(step, extras.eval_every_steps)
        loss = self._validate() if measured else None
        # Of a step that was skipped there is nothing new to keep.
        is_due = self._state.skipped_steps == 0 and _is_due(step, extras.checkpoint_every_steps)
        if ends_epoch or self._stops_early or is_due:
            self._state = self._output.checkpoint(
                self._state, loss, ends_epoch=ends_epoch or self._stops_early
            )

    def _stop_if_told(self) -> None:
        stop_file, state = self._spec.stop_file, self._state
        is_last = state.step == self._workload.plan.total_steps or self._stops_early
        if stop_file is None or is_last or not self._group.largest(int(stop_file.exists())):
            return
        if not state.checkpoints or state.checkpoints[-1].step != state.step:
            self._state = self._output.checkpoint(state, None, ends_epoch=False)
        self._output.wait()
        message = f"stopped after step {state.step}, as it was told"
        self._events.write("stopped", message, step=state.step)
        raise Stopped(message)

    @property
    def _stops_early(self) -> bool:
        patience = self._spec.extras.early_stopping_patience
        return patience is not None and self._state.measurements_without_gain >= patience

    def _validate(self) -> float | None:
        """Measures the loss on the validation rows; None without any, or when it is not finite."""
        validation = self._workload.validation
        if validation is None:
            return None
        loss = self._gradients.mean_loss(validation.examples)
        state = self._state
        best = state.best_validation_loss
        gains = math.isfinite(loss) and (
            best is None or loss < best - self._spec.extras.early_stopping_min_gain
        )
        without_gain = 0 if gains else state.measurements_without_gain + 1
        update = {"measurements_without_gain": without_gain, "best_validation_loss": loss if gains else best}
        if not math.isfinite(loss):
            self._state = state.model_copy(update=update)
            self._events.log(f"the validation loss after step {state.step} is infinite or not a number")
            return None
        self._state = state.model_copy(update=update | {"validation_loss": loss})
        self._events.write(
            "validation",
            f"epoch {state.epoch} · validation loss {loss:.4f}",
            epoch=state.epoch,
            step=state.step,
            loss=loss,
        )
        return loss


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
