"""A loss that is infinite or not a number: skipped, named, gone back from once, then the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.engine.conftest import DEVICE, Run, read_run
from trainer_svc.engine import passes
from trainer_svc.engine.checkpoint import TrainingState
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.events import EventLog
from trainer_svc.engine.gradients import GradientComputer
from trainer_svc.engine.process_group import single_process
from trainer_svc.engine.run_spec import RunSpec
from trainer_svc.engine.train import train

MakeSpec = Callable[..., RunSpec]
EXTRAS = {"dtype": "float32", "max_non_finite_steps": 2, "checkpoint_every_steps": 3}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Makes the loss of those calls NaN whose number, from 1, the argument says."""

    real = passes.summed_loss

    def spoil(is_bad: Callable[[int], bool]) -> None:
        calls = [0]

        def sometimes_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls[0] += 1
            return real(*args, **kwargs) * (math.nan if is_bad(calls[0]) else 1.0)

        monkeypatch.setattr(passes, "summed_loss", sometimes_nan)

    return spoil


def test_a_bad_step_is_skipped_and_its_rows_are_named(
    make_spec: MakeSpec, run_engine: Any, spoil: Any
) -> None:
    spoil(lambda call: call == 3)
    run = run_engine(make_spec(epochs=1, shuffle=False))
    assert [event["step"] for event in run.of_kind("step")] == [1, 2, 4]
    [skipped] = [event for event in run.of_kind("log") if "step 3 skipped" in event["message"]]
    assert skipped["lines"] == [9, 10, 11, 12]
    assert "9, 10, 11, 12" in skipped["message"]
    weights = load_file(run.output_dir / "artifact" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def steps(run: Run) -> list[tuple[int, float]]:
    return [(event["step"], event["learning_rate"]) for event in run.of_kind("step")]


def checkpoints(run: Run) -> dict[int, str]:
    """What a reader of the events takes for the run's checkpoints: paths by step."""
    found: dict[int, str] = {}
    for event in run.events:
        if event["kind"] == "checkpoint":
            found[event["step"]] = event["path"]
        elif event["kind"] == "checkpoint_removed":
            found.pop(event["step"], None)  # of a run before this one
    return found


def came_back_to(run: Run) -> str:
    [message] = [each["message"] for each in run.of_kind("log") if "goes back to" in each["message"]]
    return message.partition("goes back to ")[2].partition(",")[0]


def test_bad_steps_in_a_row_send_the_run_back_with_half_the_rate(
    make_spec: MakeSpec, run_engine: Any, spoil: Any
) -> None:
    spoil(lambda call: call in (6, 7))
    run = run_engine(make_spec(epochs=3, extras=EXTRAS))
    assert steps(run) == [(step, 1e-2) for step in range(1, 6)] + [(step, 5e-3) for step in range(5, 13)]
    assert came_back_to(run) == "the checkpoint in epoch-1"
    assert run.of_kind("finished")[0]["steps"] == 12


@pytest.mark.parametrize(
    ("bad", "keep", "back_to", "after"),
    [
        # The weights of step 4 are the last that changed: neither its checkpoint helps nor a later one.
        ((5, 6), 3, "the checkpoint in step-3", 3),
        ((5, 6), 1, "the start", 0),
        # An epoch ends among the bad steps, and its checkpoint has the weights of step 3.
        ((4, 5), 9, "the checkpoint in step-2", 2),
        ((1, 2), 9, "the start", 0),
    ],
)
def test_the_run_goes_back_to_before_the_last_change(
    bad: tuple[int, int],
    keep: int,
    back_to: str,
    after: int,
    make_spec: MakeSpec,
    run_engine: Any,
    spoil: Any,
) -> None:
    spoil(lambda call: call in bad)
    extras = EXTRAS | {"checkpoint_every_steps": 1, "keep_checkpoints": keep}
    run = run_engine(make_spec(extras=extras))
    assert came_back_to(run) == back_to
    assert steps(run) == [(step, 1e-2) for step in range(1, bad[0])] + [
        (step, 5e-3) for step in range(after + 1, 9)
    ]
    found = checkpoints(run)
    assert found[8] == "checkpoints/epoch-2-half-rate"
    if keep == 9:
        rates = [1.0] * (after - 1) + [0.5] * (9 - max(after, 1))
        assert [state_of(run, found[step]).learning_rate_factor for step in range(1, 9)] == rates[-8:]
    # Each is there, with marks of those before it, and nothing else is.
    assert sorted(path.name for path in (run.output_dir / "checkpoints").iterdir()) == sorted(
        path.removeprefix("checkpoints/") for path in found.values()
    )
    assert {mark.step: str(mark.path) for mark in state_of(run, found[8]).checkpoints} == found


def state_of(run: Run, path: str) -> TrainingState:
    file = run.output_dir / path / "training_state" / "state.json"
    return TrainingState.model_validate_json(file.read_text())


def test_skipped_steps_write_no_checkpoint_between_epochs(
    make_spec: MakeSpec, run_engine: Any, spoil: Any
) -> None:
    spoil(lambda call: call in (2, 4))
    run = run_engine(make_spec(epochs=1, shuffle=False, extras=EXTRAS | {"checkpoint_every_steps": 1}))
    assert [event["step"] for event in run.of_kind("checkpoint")] == [1, 3, 4]
    assert [event["changed_at_step"] for event in run.of_kind("checkpoint")] == [1, 3, 3]


def test_skipped_steps_are_counted_across_a_resume(make_spec: MakeSpec, run_engine: Any, spoil: Any) -> None:
    spoil(lambda call: call in (4, 5))
    part = run_engine(make_spec("part", max_steps=4, extras=EXTRAS))
    assert state_of(part, "checkpoints/epoch-1").skipped_steps == 1
    resume_from = part.output_dir / "checkpoints" / "epoch-1"
    rest = run_engine(make_spec("rest", extras=EXTRAS, resume_from=resume_from))
    # The weights that it was resumed with are those that failed.
    assert came_back_to(rest) == "the start"
    assert checkpoints(rest) == {4: "checkpoints/epoch-1-half-rate", 8: "checkpoints/epoch-2-half-rate"}


@pytest.mark.parametrize("killed_at", [3, 7])
def test_a_run_that_is_killed_after_going_back_does_not_go_back_again(
    killed_at: int, make_spec: MakeSpec, spoil: Any, run_engine: Any
) -> None:
    class Killed(BaseException):
        pass

    def kill(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and (event["step"], event["learning_rate"]) == (killed_at, 5e-3):
            raise Killed

    spoil(lambda call: call in (killed_at, killed_at + 1))
    whole = run_engine(make_spec("whole", extras=EXTRAS))
    spoil(lambda call: call in (killed_at, killed_at + 1))
    spec = make_spec("killed", extras=EXTRAS)
    spec.output_dir.mkdir()
    events = EventLog(spec.output_dir)
    events.subscribe(kill)
    with pytest.raises(Killed):
        train(spec, single_process(DEVICE), events)
    events.close()
    killed = read_run(spec.output_dir)
    step, path = max(checkpoints(killed).items())
    resumed = run_engine(make_spec("resumed", extras=EXTRAS, resume_from=spec.output_dir / path))
    assert steps(resumed) == [(each, 5e-3) for each in range(step + 1, 9)]
    assert resumed.losses == whole.losses[-len(resumed.losses) :]


@pytest.mark.parametrize("method", [{"kind": "lora"}, {"kind": "full"}])
@pytest.mark.parametrize("max_steps", [1, 2])
def test_a_run_that_diverges_in_its_last_steps_ends(
    method: dict[str, Any], max_steps: int, make_spec: MakeSpec, run_engine: Any
) -> None:
    spec = make_spec(method=method, max_steps=max_steps, learning_rate=1e30)
    with pytest.raises(JobFault, match=r"training diverged: after step [12],.*lower learning_rate"):
        run_engine(spec)
    assert not (spec.output_dir / "artifact").exists()


def test_early_stopping_without_any_finite_measurement(
    make_spec: MakeSpec, run_engine: Any, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GradientComputer, "mean_loss", lambda *_: math.nan)
    run = run_engine(make_spec(validation_file=rows_file, extras={"early_stopping_patience": 1}))
    assert any("its best was no number" in event["message"] for event in run.of_kind("log"))
    assert run.of_kind("finished")[0]["steps"] == 4


def test_a_run_that_diverges_again_ends(make_spec: MakeSpec, run_engine: Any, spoil: Any) -> None:
    spoil(lambda call: call > 1)
    with pytest.raises(
        JobFault, match=r"2 steps in a row, the last of them step 2, with half the learning rate"
    ):
        run_engine(make_spec(extras=EXTRAS | {"checkpoint_every_steps": 1}))
