"""A loss that is infinite or not a number: skipped, named, gone back from once, then the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer_svc.engine import passes
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]
EXTRAS = {"dtype": "float32", "max_non_finite_steps": 2, "checkpoint_every_steps": 3}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Makes the loss of those calls NaN whose number, from 1, the argument says."""

    def spoil(is_bad: Callable[[int], bool]) -> None:
        real, calls = passes.summed_loss, [0]

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


def test_bad_steps_in_a_row_send_the_run_back_with_half_the_rate(
    make_spec: MakeSpec, run_engine: Any, spoil: Any
) -> None:
    spoil(lambda call: call in (5, 6))
    run = run_engine(make_spec(epochs=3, extras=EXTRAS))
    assert [event["step"] for event in run.of_kind("step")] == [1, 2, 3, 4, *range(5, 13)]
    assert [event["learning_rate"] for event in run.of_kind("step")] == [1e-2] * 4 + [5e-3] * 8
    assert any("goes back to the checkpoint in epoch-1" in event["message"] for event in run.of_kind("log"))
    assert run.of_kind("finished")[0]["steps"] == 12


def test_the_halved_rate_outlives_a_resume(make_spec: MakeSpec, run_engine: Any, spoil: Any) -> None:
    spoil(lambda call: call in (5, 6))
    whole = run_engine(make_spec("whole", epochs=3, extras=EXTRAS))
    resumed = run_engine(
        make_spec(
            "resumed", epochs=3, extras=EXTRAS, resume_from=whole.output_dir / "checkpoints" / "epoch-2"
        )
    )
    assert resumed.losses == whole.losses[-4:]


def test_a_run_without_a_checkpoint_goes_back_to_the_start(
    make_spec: MakeSpec, run_engine: Any, spoil: Any
) -> None:
    spoil(lambda call: call in (1, 2))
    run = run_engine(make_spec(epochs=1, extras=EXTRAS))
    assert any("goes back to the start" in event["message"] for event in run.of_kind("log"))
    assert [event["step"] for event in run.of_kind("step")] == [1, 2, 3, 4]


def test_a_run_that_diverges_again_ends(make_spec: MakeSpec, run_engine: Any, spoil: Any) -> None:
    spoil(lambda call: call > 1)
    with pytest.raises(
        JobFault, match=r"2 steps in a row, the last of them step 4, with half the learning rate"
    ):
        run_engine(make_spec(extras=EXTRAS | {"checkpoint_every_steps": 1}))
