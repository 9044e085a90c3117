"""Random schedules: several jobs, several faults, at moments that a seed decides."""

from __future__ import annotations

import random
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from tests.chaos.cells import Reference
from tests.chaos.faults import FAULTS, is_possible
from tests.chaos.invariants import violations
from tests.chaos.stack import ChaosStack
from tests.chaos.workload import EPOCHS, NUM_ROWS, Account, rows

_JOBS = (2, 3)
_MIN_STRIKES, MAX_STRIKES = 2, 5
_LASTING_SECONDS = (0.5, 8.0)  # shorter and longer than a lease
_GAP_SECONDS = (0.0, 6.0)


@dataclass(frozen=True)
class PlannedJob:
    """A job that a client uploads data for, makes, and may cancel.

    Attributes:
        starts_after_seconds: after the schedule's beginning.
        cancelled_after_seconds: after it was made; None for one that shall complete.
    """

    starts_after_seconds: float
    epochs: int
    cancelled_after_seconds: float | None


@dataclass(frozen=True)
class Strike:
    """A fault, and when: so long after the one before was over."""

    gap_seconds: float
    fault: str
    lasting_seconds: float


@dataclass(frozen=True)
class Schedule:
    """What a seed decides. It is the same each time; how the machine answers is not."""

    seed: int
    jobs: tuple[PlannedJob, ...]
    strikes: tuple[Strike, ...]

    @classmethod
    def draw(cls, seed: int, stack: ChaosStack) -> Schedule:
        """Draws a schedule from what can break in a stack of this kind."""
        draw = random.Random(seed)
        faults = [name for name, fault in FAULTS.items() if is_possible(fault, stack)]
        jobs = tuple(
            PlannedJob(
                starts_after_seconds=draw.uniform(0, 2),
                epochs=draw.randint(1, 2 * EPOCHS),
                cancelled_after_seconds=draw.uniform(0, 12) if draw.random() < 0.3 else None,
            )
            for _ in range(draw.randint(*_JOBS))
        )
        strikes = tuple(
            Strike(draw.uniform(*_GAP_SECONDS), draw.choice(faults), draw.uniform(*_LASTING_SECONDS))
            for _ in range(draw.randint(_MIN_STRIKES, MAX_STRIKES))
        )
        return cls(seed, jobs, strikes)

    def __str__(self) -> str:
        jobs = ", ".join(
            f"{job.epochs} epochs"
            + (f" cancelled after {job.cancelled_after_seconds:.1f} s" if job.cancelled_after_seconds else "")
            for job in self.jobs
        )
        strikes = ", ".join(
            f"+{strike.gap_seconds:.1f} s {strike.fault} ({strike.lasting_seconds:.1f} s)"
            for strike in self.strikes
        )
        return f"seed {self.seed}: jobs of {jobs}; {strikes}"


def run_schedule(stack: ChaosStack, schedule: Schedule, reference: Reference) -> list[str]:
    """Runs a schedule to its end, and returns what is wrong afterwards."""
    try:
        return _problems_after(stack, schedule, reference)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]


def _problems_after(stack: ChaosStack, schedule: Schedule, reference: Reference) -> list[str]:
    stack.wait_until_well()
    with closing(Account(stack, f"schedule {schedule.seed}")) as account, account.leaving_nothing():
        for job in schedule.jobs:
            account.in_background(partial(_run_job, account, job))
        for strike in schedule.strikes:
            fault = FAULTS[strike.fault]
            time.sleep(strike.gap_seconds)
            fault.begin(stack)
            try:
                time.sleep(fault.seconds(strike.lasting_seconds))
            finally:
                fault.end(stack)
        stack.wait_until_well()
        account.finish()
        return list(violations(account, reference))


def _run_job(account: Account, planned: PlannedJob) -> None:
    time.sleep(planned.starts_after_seconds)
    job = account.create_job(account.upload(rows(NUM_ROWS)), epochs=planned.epochs, with_metrics=True)
    if planned.cancelled_after_seconds is not None:
        time.sleep(planned.cancelled_after_seconds)
        account.cancel(job)
