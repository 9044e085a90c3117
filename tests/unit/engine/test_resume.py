"""A run that goes on from a checkpoint is the run that was never interrupted, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.engine.conftest import DEVICE, Run, read_run
from tests.unit.engine.ranks import run_ranks
from trainer_svc.engine.checkpoint import CheckpointError, CheckpointMark, split_kept
from trainer_svc.engine.layers import projection
from trainer_svc.engine.layers.packed_weight import PackedWeight, can_be_packed
from trainer_svc.engine.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]
FULL = {"kind": "full", "activation_checkpointing": False}
METHODS = [pytest.param({"kind": "lora"}, id="lora"), pytest.param(FULL, id="full")]


def assert_same_end(resumed: Run, whole: Run) -> None:
    for key in ("training_loss", "validation_loss", "tokens_trained", "steps", "epochs_completed"):
        assert resumed.of_kind("finished")[0][key] == whole.of_kind("finished")[0][key]
    [name] = [path.name for path in (whole.output_dir / "artifact").glob("*.safetensors")]
    ours, theirs = (load_file(run.output_dir / "artifact" / name) for run in (resumed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_bit_for_bit(
    method: dict[str, Any], dtype: str, make_spec: MakeSpec, run_engine: Any, rows_file: Path
) -> None:
    changes = {
        "method": method,
        "epochs": 3,
        "validation_file": rows_file,
        "extras": {
            "dtype": dtype,
            "lr_scheduler": "cosine",
            "warmup_steps": 2,
            "weight_decay": 0.1,
            **({"lora_dropout": 0.1} if method["kind"] == "lora" else {}),
        },
    }
    whole = run_engine(make_spec("whole", **changes))
    resumed = run_engine(
        make_spec("resumed", **changes, resume_from=whole.output_dir / "checkpoints" / "epoch-1")
    )
    assert resumed.losses == whole.losses[4:]
    assert_same_end(resumed, whole)


def test_packed_weights_give_the_same_bits_again_and_after_a_resume(
    make_spec: MakeSpec, run_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout, bfloat16's frozen weights are packed for the processor's own products."""
    products = 0

    class Counted(PackedWeight):
        def times(self, *arguments: Any) -> torch.Tensor:
            nonlocal products
            products += 1
            return super().times(*arguments)

    monkeypatch.setattr(projection, "PackedWeight", Counted)
    extras = {"dtype": "bfloat16", "checkpoint_every_steps": 1, "keep_checkpoints": 9}
    changes = {"method": {"kind": "lora", "apply_to_mlp": True}, "extras": extras}
    whole = run_engine(make_spec("whole", **changes))
    assert (products > 0) is can_be_packed(torch.zeros(1, 1, dtype=torch.bfloat16, device=DEVICE))
    again = run_engine(make_spec("again", **changes))
    assert again.losses == whole.losses
    assert_same_end(again, whole)
    resume_from = whole.output_dir / "checkpoints" / "step-6"
    resumed = run_engine(make_spec("resumed", **changes, resume_from=resume_from))
    assert resumed.losses == whole.losses[6:]
    assert_same_end(resumed, whole)


def test_resume_inside_an_epoch_and_after_the_last(make_spec: MakeSpec, run_engine: Any) -> None:
    whole = run_engine(make_spec("whole"))
    part = run_engine(make_spec("part", max_steps=6))
    assert part.losses == whole.losses[:6]
    checkpoint = part.of_kind("checkpoint")[-1]
    assert (checkpoint["path"], checkpoint["step"]) == ("checkpoints/epoch-2", 6)
    assert part.of_kind("finished")[0]["epochs_completed"] == 1
    rest = run_engine(make_spec("rest", resume_from=part.output_dir / "checkpoints" / "epoch-2"))
    assert rest.losses == whole.losses[6:]
    nothing_left = run_engine(make_spec("nothing", resume_from=whole.output_dir / "checkpoints" / "epoch-2"))
    assert nothing_left.losses == []
    assert nothing_left.of_kind("finished")[0]["training_loss"] == whole.losses[-1]


def test_resume_from_another_runs_checkpoint(make_spec: MakeSpec, run_engine: Any) -> None:
    run = run_engine(make_spec("first", max_steps=1))
    checkpoint = run.output_dir / "checkpoints" / "epoch-1"
    with pytest.raises(CheckpointError, match="seed was 0 and is 5"):
        run_engine(make_spec("second", seed=5, resume_from=checkpoint))
    (checkpoint / "training_state" / "optimizer.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        run_engine(make_spec("third", resume_from=checkpoint))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_run_goes_on_bit_for_bit(
    method: dict[str, Any], num_processes: int, make_spec: MakeSpec
) -> None:
    changes: dict[str, Any] = {
        "method": method,
        "epochs": 3,
        "batch_size": 4 // num_processes,
        "extras": {"dtype": "float32", "lr_scheduler": "linear", "checkpoint_every_steps": 3},
    }
    whole = run(make_spec("whole", **changes), num_processes)
    assert len(whole.losses) == 12
    for killed_at, last_checkpoint in ((4, 3), (5, 4), (7, 6)):  # mid-epoch, at an epoch's edge, mid-epoch
        killed = run(make_spec(f"killed-{killed_at}", **changes), num_processes, killed_at)
        assert len(killed.losses) >= killed_at
        assert killed.losses == whole.losses[: len(killed.losses)]
        checkpoint = max(
            (event for event in killed.of_kind("checkpoint") if event["step"] <= last_checkpoint),
            key=lambda event: event["step"],
        )
        resume_from = killed.output_dir / checkpoint["path"]
        resumed = run(make_spec(f"resumed-{killed_at}", **changes, resume_from=resume_from), num_processes)
        assert resumed.losses == whole.losses[checkpoint["step"] :]
        assert_same_end(resumed, whole)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_run_that_is_told_to_stop_goes_on_bit_for_bit(num_processes: int, make_spec: MakeSpec) -> None:
    changes: dict[str, Any] = {"epochs": 2, "batch_size": 4 // num_processes}
    whole = run(make_spec("whole", **changes), num_processes)
    stop_file = whole.output_dir.parent / "stop"
    stopped = run(make_spec("stopped", **changes, stop_file=stop_file), num_processes, stopped_at=6)
    last = stopped.events[-1]
    assert (last["kind"], stopped.losses) == ("stopped", whole.losses[:6])
    checkpoint = stopped.of_kind("checkpoint")[-1]
    assert (checkpoint["path"], checkpoint["step"]) == ("checkpoints/step-6", 6)
    rest = run(
        make_spec("rest", **changes, resume_from=stopped.output_dir / checkpoint["path"]), num_processes
    )
    assert rest.losses == whole.losses[6:]
    assert [event["step"] for event in rest.of_kind("checkpoint_removed")] == [6]
    assert_same_end(rest, whole)


def run(
    spec: RunSpec, num_processes: int, killed_at: int | None = None, stopped_at: int | None = None
) -> Run:
    assert run_ranks(spec, num_processes, killed_at, stopped_at) is (killed_at is None)
    return read_run(spec.output_dir)


def mark(step: int, *, ends_epoch: bool = False, loss: float | None = None) -> CheckpointMark:
    return CheckpointMark(step=step, epoch=1 + (step - 1) // 4, ends_epoch=ends_epoch, validation_loss=loss)


MARKS = (
    mark(2, loss=0.1),
    mark(4, ends_epoch=True, loss=0.5),
    mark(6),
    mark(8, ends_epoch=True, loss=0.7),
    mark(10),
)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(None, [4, 8, 10]), (1, [2, 10]), (2, [2, 8, 10]), (4, [2, 4, 6, 8, 10]), (9, [2, 4, 6, 8, 10])],
)
def test_best_and_last_checkpoints_are_kept(keep: int | None, kept: list[int]) -> None:
    left, removed = split_kept(MARKS, keep)
    assert [each.step for each in left] == kept
    assert sorted(each.step for each in (*left, *removed)) == [2, 4, 6, 8, 10]


def test_checkpoints_that_are_not_kept_leave_the_disk(
    make_spec: MakeSpec, run_engine: Any, rows_file: Path
) -> None:
    extras = {"dtype": "float32", "checkpoint_every_steps": 1, "eval_every_steps": 2, "keep_checkpoints": 2}
    run = run_engine(make_spec(validation_file=rows_file, extras=extras))
    written = {event["path"] for event in run.of_kind("checkpoint")}
    removed = {event["path"] for event in run.of_kind("checkpoint_removed")}
    left = {f"checkpoints/{path.name}" for path in (run.output_dir / "checkpoints").iterdir()}
    assert left == written - removed
    best = min(run.of_kind("validation"), key=lambda event: event["loss"])["step"]
    steps = {event["step"] for event in run.of_kind("checkpoint") if event["path"] in left}
    assert steps == {7, 8, best}
