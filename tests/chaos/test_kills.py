"""kill -9 of each process in turn, while one job runs: it ends all the same and nothing is lost."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.invariants import NO_REFERENCE, violations
from tests.chaos.stack import ChaosStack
from tests.chaos.workload import Account, rows
from tests.integration.tunery.running import wait_for

VICTIMS = (
    *("s3", "dataset_svc", "job_svc", "authz", "inference_svc", "gateway"),
    *("training", "torchrun", "trainer_svc"),
)
NUM_ROWS = 512
EPOCHS = 24  # enough to outlast the kills


@pytest.mark.timeout(800)
def test_a_job_outlives_the_kill_of_each_process(chaos: ChaosStack) -> None:
    with closing(Account(chaos, "kills")) as account:
        job = account.create_job(account.upload(rows(NUM_ROWS)), epochs=EPOCHS)
        for victim in VICTIMS:
            seen = job.steps()
            wait_for(lambda seen=seen: job.steps() > seen, f"steps, before the kill of {victim}")
            assert account.status(job) in ("queued", "running"), "the job should outlive the kills"
            wait_for(lambda victim=victim: chaos.processes(victim), f"{victim} to be there")
            FAULTS[f"kill -9 {victim}"].begin(chaos)
            FAULTS[f"kill -9 {victim}"].end(chaos)
        chaos.wait_until_well()
        account.finish()
        assert not list(violations(account, NO_REFERENCE))
        [model] = account.get("/api/v1/fine-tuning/models")["data"]
        question = {"role": "user", "content": "Hello"}
        body = {"model": model["id"], "messages": [question], "max_tokens": 4}
        answer = account.ask("POST", "/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
