"""What a run leaves behind: checkpoints on its way, the artifact at its end."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch

from trainer_svc.engine.artifact import ARTIFACT_DIR, CardFacts, model_card
from trainer_svc.engine.checkpoint import (
    CheckpointMark,
    CheckpointWriter,
    Snapshot,
    TrainingState,
    save_model,
    save_training_state,
    split_kept,
    take_snapshot,
    write_folder,
)
from trainer_svc.engine.device import free_unused_memory
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.events import EventLog
from trainer_svc.engine.merging import write_merged
from trainer_svc.engine.parity import check_parity, reference_of, wait_for
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.run_spec import RunSpec
from trainer_svc.engine.setup import Workload

LOGS_DIR = "logs"


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


class RunOutput:
    """Writes a run's files, and an event for each once it is complete."""

    def __init__(self, spec: RunSpec, group: ProcessGroup, events: EventLog, workload: Workload) -> None:
        self._spec = spec
        self._group = group
        self._events = events
        self._workload = workload
        self._writer = CheckpointWriter()
        self._written: list[CheckpointMark] = []

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.close()

    def checkpoint(
        self, state: TrainingState, validation_loss: float | None, *, ends_epoch: bool
    ) -> TrainingState:
        """Has what training changes copied and written, while training goes on.

        `wait_for_copy` must be called before anything is changed.

        Args:
            state: the run's.
            validation_loss: measured just now; None if it wasn't.
            ends_epoch: whether an epoch or the run ends here.

        Returns:
            The state with the checkpoint in it, and without those that it replaces.
        """
        mark = CheckpointMark(
            step=state.step,
            epoch=state.epoch,
            ends_epoch=ends_epoch,
            validation_loss=validation_loss,
            half_rate=state.learning_rate_factor < 1,
        )
        before = tuple(old for old in state.checkpoints if old.step < mark.step)
        kept, removed = split_kept((*before, mark), self._spec.extras.keep_checkpoints)
        # A run that went back comes by the same steps again.
        removed += tuple(old for old in state.checkpoints if old.step >= mark.step)
        self._written.append(mark)
        state = state.model_copy(update={"checkpoints": kept})
        snapshot = take_snapshot(self._workload.model, self._workload.optimizer, keep=self._group.is_first)
        if self._group.is_first:
            self._writer.write(snapshot, partial(self._write_checkpoint, state, mark, removed))
        return state

    def wait(self) -> None:
        """Returns once all checkpoints are written."""
        self._writer.wait()
        self._group.wait_for_all()

    def wait_for_copy(self) -> None:
        """Returns once the weights and the optimizer's state may be changed."""
        self._writer.wait_for_copy()

    def checkpoint_to_go_back_to(self, state: TrainingState) -> Path | None:
        """Returns the newest checkpoint from before the last change of the weights; None is the start.

        A later one holds the very weights that gave no finite gradients. Every process must call it.
        """
        self.wait()
        for mark in reversed(self._written):
            folder = self._spec.output_dir / mark.path
            if mark.step < state.changed_at_step and folder.exists():
                return folder
        return self._spec.resume_from if self._workload.start.step < state.changed_at_step else None

    def _write_checkpoint(
        self,
        state: TrainingState,
        mark: CheckpointMark,
        removed: tuple[CheckpointMark, ...],
        snapshot: Snapshot,
        waited_seconds: float,
    ) -> None:
        workload = self._workload

        def fill(folder: Path) -> None:
            # float32, so that a resumed run continues from the very same weights.
            save_model(workload.model, workload.tokenizer, snapshot.weights, folder, torch.float32)
            save_training_state(folder, state, snapshot.optimizer)
            self._write_card(folder, state)

        write_folder(self._spec.output_dir / mark.path, fill)
        place = f"epoch {mark.epoch}" if mark.ends_epoch else f"step {mark.step}"
        self._events.write(
            "checkpoint",
            f"checkpoint of {place} written",
            epoch=mark.epoch,
            step=mark.step,
            ends_epoch=mark.ends_epoch,
            path=str(mark.path),
            tokens_trained=state.tokens_trained,
            epochs_completed=self._epochs_completed(state),
            changed_at_step=state.changed_at_step,
            waited_seconds=round(waited_seconds, 4),
        )
        for old in removed:
            if not self._spec.leaves_removed_checkpoints:
                shutil.rmtree(self._spec.output_dir / old.path, ignore_errors=True)
            if old.step != mark.step:  # or it has been replaced
                self._events.write(
                    "checkpoint_removed",
                    f"checkpoint of step {old.step} removed",
                    step=old.step,
                    path=str(old.path),
                )

    def finish(self, state: TrainingState) -> None:
        """Writes the artifact, and holds it, as it was stored, against the trained model.

        Every process must call it. The first does the work, which may take longer than others can wait.

        Raises:
            JobFault: the last steps made the weights, or what comes of them, no numbers to go by.
            ParityError: the stored model is not the trained one.
        """
        spec, workload = self._spec, self._workload
        self._writer.wait()
        reference = reference_of(workload, self._group)
        snapshot = take_snapshot(workload.model, None, keep=self._group.is_first).copied()
        is_sound = reference.is_sound and all(map(_is_finite, snapshot.weights.values()))
        if self._group.largest(int(not is_sound)):
            raise JobFault(
                f"training diverged: after step {state.changed_at_step}, the model's weights or logits are "
                "infinite, not numbers or all alike; lower learning_rate, or add warmup_steps"
            )
        if self._group.is_first:
            write_folder(spec.output_dir / ARTIFACT_DIR, partial(self._fill_artifact, state, snapshot))
            self._events.write("artifact", "model written", path=ARTIFACT_DIR)
            self._make_room()
            folder = spec.readback_dir or spec.output_dir / ARTIFACT_DIR
            wait_for(folder)
            # Sharded weights may be too many for one process's device.
            device = torch.device("cpu") if workload.is_sharded else self._group.device
            difference = check_parity(folder, reference, spec, workload, device)
            loss = "unknown" if state.training_loss is None else f"{state.training_loss:.4f}"
            self._events.write(
                "finished",
                f"finished after {state.step} steps · training loss {loss} · stored model checked: its "
                f"logits differ by {difference:.1e}",
                path=ARTIFACT_DIR,
                training_loss=state.training_loss,
                validation_loss=state.validation_loss,
                steps=state.step,
                epochs_completed=self._epochs_completed(state),
                tokens_trained=state.tokens_trained,
                parity_difference=difference,
            )

    def _make_room(self) -> None:
        """Frees the device of what was trained, for the check loads the model once more."""
        workload = self._workload
        workload.optimizer.state.clear()
        is_movable = not workload.is_sharded and self._spec.extras.quantize_base == "none"
        if self._group.device.type == "cuda" and is_movable:
            torch.nn.Module.to(workload.model, "cpu")
        free_unused_memory(self._group.device)

    def _fill_artifact(self, state: TrainingState, snapshot: Snapshot, folder: Path) -> None:
        workload = self._workload
        save_model(workload.model, workload.tokenizer, snapshot.weights, folder, workload.stored_dtype)
        if self._spec.extras.save_merged:
            write_merged(folder, self._spec.base_model_dir, workload.stored_dtype)
        self._write_card(folder, state)
        if self._spec.train_log_file is not None:
            shutil.copyfile(
                self._spec.output_dir / LOGS_DIR / self._spec.train_log_file,
                folder / self._spec.train_log_file,
            )

    def _epochs_completed(self, state: TrainingState) -> int:
        return state.step // self._workload.plan.steps_per_epoch

    def _write_card(self, folder: Path, state: TrainingState) -> None:
        workload = self._workload
        facts = CardFacts(
            training_sha256=state.identity.training_sha256,
            num_rows=len(workload.training.examples),
            num_tokens_trained=state.tokens_trained,
            steps=state.step,
            epochs_completed=self._epochs_completed(state),
            training_loss=state.training_loss,
            validation_loss=state.validation_loss,
            dtype=str(workload.dtype).removeprefix("torch."),
        )
        (folder / "README.md").write_text(model_card(self._spec, facts), encoding="utf-8")
