"""Breaks a real stack in every way at every moment, and says what was lost or doubled.

    .venv/bin/python -m tests.chaos [--faults REGEX] [--moments REGEX] [--lasting-seconds 20]
    .venv/bin/python -m tests.chaos --schedules 100 [--seed 1] [--stack sqlite]

The first runs the matrix, the second so many random schedules, drawn by seeds that count up from the given
one. Both write their tables into docs/reliability.md and their results into bench/results/chaos.json.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import closing

from tests.chaos.cells import is_sensible, run_cell, undisturbed
from tests.chaos.faults import DEFAULT_LASTING_SECONDS, FAULTS, is_possible
from tests.chaos.invariants import Reference, violations
from tests.chaos.report import Report
from tests.chaos.schedules import MAX_STRIKES, Schedule, run_schedule
from tests.chaos.stack import KINDS, Kind, chaos_stack
from tests.chaos.workload import MOMENTS, Account


def run_matrix(
    report: Report, kind: Kind, faults: Sequence[str], moments: Sequence[str], lasting_seconds: float
) -> int:
    """Runs cells one after another against one stack; returns how many failed."""
    num_failed = 0
    with chaos_stack(kind) as stack:
        first, reference = undisturbed(stack)
        for moment in moments:
            for fault in faults:
                if is_possible(FAULTS[fault], stack) and is_sensible(fault, moment):
                    cell = run_cell(stack, fault, moment, reference, lasting_seconds)
                    report.add_cell(cell)
                    num_failed += bool(cell.problems)
                    _tell(f"{cell.seconds:5.1f} s  {moment:13} {fault:30}", cell.problems)
        num_failed += _is_damaged(first, reference)
    return num_failed


def run_schedules(report: Report, kind: Kind, seeds: Sequence[int]) -> int:
    """Runs random schedules one after another against one stack; returns how many failed."""
    num_failed = 0
    with chaos_stack(kind, TUNERY_MAX_RETRIES=str(2 * MAX_STRIKES)) as stack:
        first, reference = undisturbed(stack)
        for seed in seeds:
            schedule = Schedule.draw(seed, stack)
            problems = run_schedule(stack, schedule, reference)
            report.add_schedule(kind, seed, problems)
            num_failed += bool(problems)
            _tell(str(schedule), problems)
        num_failed += _is_damaged(first, reference)
    return num_failed


def _is_damaged(first: Account, reference: Reference) -> bool:
    """Looks once more at what was there before anything broke."""
    with closing(first):
        problems = list(violations(first, reference))
    _tell("what was there before", problems)
    return bool(problems)


def _tell(what: str, problems: list[str]) -> None:
    print(what, "ok" if not problems else f"FAILED: {'; '.join(problems)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stack", choices=KINDS, help="on this kind only; else where each fault belongs")
    parser.add_argument("--faults", default="", help="only faults whose name has this in it (a regex)")
    parser.add_argument("--moments", default="", help="only moments whose name has this in it (a regex)")
    parser.add_argument("--lasting-seconds", type=float, default=DEFAULT_LASTING_SECONDS)
    parser.add_argument("--schedules", type=int, default=0, help="so many random schedules, no matrix")
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule")
    options = parser.parse_args()
    # Ended by a signal, it still stops what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report, num_failed = Report(), 0
    for kind in [options.stack] if options.stack else KINDS:
        if options.schedules:
            seeds = range(options.seed, options.seed + options.schedules)
            num_failed += run_schedules(report, kind, seeds)
            continue
        faults = [
            name
            for name, fault in FAULTS.items()
            if re.search(options.faults, name)
            and (kind in fault.kinds if options.stack else kind == fault.kinds[0])
        ]
        moments = [name for name in MOMENTS if re.search(options.moments, name)]
        num_failed += run_matrix(report, kind, faults, moments, options.lasting_seconds)
    return bool(num_failed)


if __name__ == "__main__":
    sys.exit(main())
