"""One cell of the matrix: a fault at a moment, and what is wrong afterwards."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field

from tests.chaos.faults import FAULTS
from tests.chaos.invariants import Reference, reference_of, violations
from tests.chaos.stack import ChaosStack
from tests.chaos.workload import MOMENTS, NUM_ROWS, Account, rows
from tests.integration.tunery.running import wait_for

_PARTS_OF_RUN = ("torchrun", "training")
_MOMENTS_WITHOUT_RUN = ("upload", "validation")
# What has no part in anything of the workload.
_BYSTANDERS = ("inference_svc",)


@dataclass(frozen=True)
class Cell:
    """What came of a fault at a moment.

    Attributes:
        stack: its kind.
        problems: what is wrong; empty is a pass.
        seconds: how long it took.
    """

    stack: str
    fault: str
    moment: str
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def is_sensible(fault_name: str, moment: str) -> bool:
    """Whether there is something to break at the moment that has a part in it."""
    victim = FAULTS[fault_name].victim
    return victim not in _BYSTANDERS and not (victim in _PARTS_OF_RUN and moment in _MOMENTS_WITHOUT_RUN)


def undisturbed(stack: ChaosStack) -> tuple[Account, Reference]:
    """Runs a job without a fault; returns what it came to, and its account, to be looked at again later.

    Raises:
        AssertionError: even that one is not as it should be.
    """
    account = Account(stack, "reference")
    job = account.create_job(account.upload(rows(NUM_ROWS)), with_metrics=True)
    account.finish()
    reference = reference_of(account, job)
    problems = list(violations(account, reference))
    assert not problems, problems
    return account, reference


def run_cell(
    stack: ChaosStack, fault_name: str, moment: str, reference: Reference, lasting_seconds: float
) -> Cell:
    """Strikes at the moment, waits until all is over, and looks at what is there."""
    started = time.monotonic()
    try:
        problems = _problems_after(stack, fault_name, moment, reference, lasting_seconds)
    except Exception as error:
        problems = [f"{type(error).__name__}: {error}"]
    return Cell(stack.kind, fault_name, moment, problems, round(time.monotonic() - started, 1))


def _problems_after(
    stack: ChaosStack, fault_name: str, moment: str, reference: Reference, lasting_seconds: float
) -> list[str]:
    fault = FAULTS[fault_name]
    stack.wait_until_well()
    with closing(Account(stack, f"{fault_name} at {moment}"[:100])) as account, account.leaving_nothing():
        with MOMENTS[moment](account):
            if fault.victim:
                wait_for(lambda: stack.processes(fault.victim), f"a {fault.victim} at {moment}")
            fault.begin(stack)
        try:
            time.sleep(fault.seconds(lasting_seconds))
        finally:
            fault.end(stack)
        stack.wait_until_well()
        account.finish()
        return list(violations(account, reference))
