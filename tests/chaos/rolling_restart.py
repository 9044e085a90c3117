"""A restart of each service in turn, as an upgrade does it, while clients that never try again go on."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import closing

from tests.chaos.stack import ChaosStack
from tests.chaos.traffic import Traffic, running_traffic
from tests.chaos.workload import NUM_ROWS, Account, rows
from tests.integration.tunery.running import wait_for

_PAUSE_SECONDS = 0.5
_END_SECONDS = 30


def restart_under_traffic(stack: ChaosStack, services: Sequence[str]) -> dict[str, Traffic]:
    """Restarts services by SIGTERM while a job runs and clients ask; returns what they were answered.

    A follower of the job's log counts as traffic too: as failed if it lost a line or gave up.
    """
    stack.wait_until_well()
    with closing(Account(stack, "rolling restart")) as account:
        job = account.create_job(account.upload(rows(NUM_ROWS)), epochs=1000)
        wait_for(job.steps, "the job's first step")
        with running_traffic(account) as traffic:
            for service in services:
                time.sleep(_PAUSE_SECONDS)
                [process] = stack.processes(service)
                process.send_signal(signal.SIGTERM)
                process.wait(_END_SECONDS)
                stack.wait_until_well()
            time.sleep(_PAUSE_SECONDS)
        account.cancel(job)
        account.finish()
        failures = [repr(error) for error in job.errors]
        seqs = [record.seq for record in job.log]
        if seqs != list(range(1, len(seqs) + 1)):
            failures.append(f"the follower saw {seqs}")
        return traffic | {"logs followed": Traffic(1, failures)}
