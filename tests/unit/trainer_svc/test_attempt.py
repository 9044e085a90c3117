"""Which checkpoints stay on a trainer's disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer_svc.attempt import with_newest


@pytest.mark.parametrize(
    ("steps", "step", "changed_at_step", "kept"),
    [
        ([], 4, 4, [4]),
        ([4], 8, 8, [4, 8]),
        ([4, 8], 12, 12, [8, 12]),
        # The weights of 12 are those of 8, and a run that diverges goes back to 4.
        ([4, 8], 12, 8, [4, 8, 12]),
        ([4, 8, 12], 16, 16, [12, 16]),
        # It went back.
        ([4, 8, 12], 4, 4, [4]),
        ([4, 8], 0, 0, [0]),
    ],
)
def test_what_the_engine_may_go_back_to_is_kept(
    steps: list[int], step: int, changed_at_step: int, kept: list[int]
) -> None:
    old = [(each, Path(f"step-{each}")) for each in steps]
    newest = Path("newest")
    found = with_newest(old, step, newest, changed_at_step)
    assert [each for each, _ in found] == kept
    assert found[-1] == (step, newest)
