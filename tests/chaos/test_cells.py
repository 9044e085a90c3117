"""The most telling cells of the matrix. `make chaos` runs them all; docs/reliability.md has the outcome."""

from __future__ import annotations

import pytest

from tests.chaos.cells import run_cell
from tests.chaos.invariants import NO_REFERENCE
from tests.chaos.stack import LEASE_SECONDS, ChaosStack


@pytest.mark.parametrize(
    ("fault", "moment"),
    [("kill -9 of all", "checkpointing"), ("stop trainer_svc", "cancelling")],
)
def test_nothing_is_lost_or_doubled(chaos: ChaosStack, fault: str, moment: str) -> None:
    cell = run_cell(chaos, fault, moment, NO_REFERENCE, LEASE_SECONDS + 1)
    assert not cell.problems
