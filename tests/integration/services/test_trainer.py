"""A real trainer that is stopped, or dies while job_svc is away: what it had done is not lost or redone."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from tests.conftest import wait_until
from trainer_svc.event_spool import SPOOL_FILE
from tunery.job.v1 import fine_tuning_service_pb2, job_pb2, job_service_pb2

from .conftest import Metadata, Services, own_services

pytestmark = pytest.mark.parametrize("service_processes", ["sqlite"], indirect=True)


@pytest.fixture
async def own(service_processes: Services, tmp_path: Path) -> AsyncIterator[Services]:
    """Services that aren't shared; dataset_svc runs. Leases outlast what the tests do to the others."""
    services = own_services(service_processes, TUNERY_LEASE_SECONDS="30")
    with services.running("dataset_svc", tmp_path):
        yield services
        await services.close()


@contextmanager
def trainer(services: Services, folder: Path, models_dir: Path) -> Iterator[Any]:
    settings = {
        "TUNERY_MODELS_DIR": str(models_dir),
        "TUNERY_WORK_DIR": str(folder / "work"),
        "TUNERY_TRAINER_ID": "trainer",
    }
    with services.running("trainer_svc", folder, **settings) as process:
        yield process


async def log_of(
    services: Services, account: Metadata, job: job_pb2.Job, after_seq: int = 0
) -> AsyncIterator[job_pb2.LogRecord]:
    request = job_service_pb2.TailLogsRequest(job_id=job.id, after_seq=after_seq)
    async for record in services.jobs.TailLogs(request, metadata=account):
        yield record


async def until_step(services: Services, account: Metadata, job: job_pb2.Job, step: int) -> None:
    async for record in log_of(services, account, job):
        if record.kind == "step" and record.step.step >= step:
            return


async def cancelled_log(services: Services, account: Metadata, job: job_pb2.Job) -> list[job_pb2.LogRecord]:
    request = job_service_pb2.CancelJobRequest(job_id=job.id)
    await services.jobs.CancelJob(request, metadata=account)
    log = [record async for record in log_of(services, account, job)]
    assert [record.seq for record in log] == list(range(1, len(log) + 1))
    return log


def steps(log: list[job_pb2.LogRecord]) -> list[int]:
    return [record.step.step for record in log if record.kind == "step"]


async def test_a_trainer_that_is_told_to_stop_hands_over_what_it_has_done(
    own: Services, tmp_path: Path, models_dir: Path
) -> None:
    account = own.account()
    with own.running("job_svc", tmp_path):
        job = await own.new_job(account, epochs=5000)
        with trainer(own, tmp_path, models_dir) as process:
            await until_step(own, account, job, 25)
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)
        with trainer(own, tmp_path, models_dir):
            resumed_from = await until_resumed(own, account, job)
            await until_step(own, account, job, resumed_from + 5)
            log = await cancelled_log(own, account, job)
    assert resumed_from >= 25
    assert any(record.message == "the trainer was stopped; job queued again" for record in log)
    # No step was done twice.
    assert steps(log) == list(range(1, len(steps(log)) + 1))


async def until_resumed(services: Services, account: Metadata, job: job_pb2.Job) -> int:
    """Returns the step after which a run goes on."""
    async for record in log_of(services, account, job):
        if record.message.startswith("resumed from step"):
            return int(record.message.split()[3])
    raise AssertionError("the job ended")


async def test_what_was_trained_while_job_svc_was_away_survives_the_trainers_death(
    own: Services, tmp_path: Path, models_dir: Path
) -> None:
    account = own.account()
    with own.running("job_svc", tmp_path) as job_svc:
        job = await own.new_job(account, epochs=5000)
        with trainer(own, tmp_path, models_dir) as process:
            await until_step(own, account, job, 20)
            job_svc.kill()
            job_svc.wait()
            spool = tmp_path / "work" / job.id / SPOOL_FILE
            num_events = spool.read_bytes().count(b"\n")
            wait_until(lambda: spool.read_bytes().count(b"\n") > num_events + 30, 60, "further events")
            process.kill()
            process.wait()
    spooled = [json.loads(line) for line in spool.read_bytes().split(b"\n")[1:-1]]
    with own.running("job_svc", tmp_path), trainer(own, tmp_path, models_dir):
        resumed_from = await until_resumed(own, account, job)
        log = await cancelled_log(own, account, job)
    told = {record.seq: record.message for record in log}
    assert [told[int(event["seq"])] for event in spooled] == [event["message"] for event in spooled]
    # From the last checkpoint that the dead trainer had stored, of which job_svc heard only now.
    assert resumed_from == max(
        int(event["data"]["step"]) for event in spooled if event["kind"] == "checkpoint"
    )


async def test_a_run_that_diverges_takes_its_spoilt_checkpoints_back(
    own: Services, tmp_path: Path, models_dir: Path
) -> None:
    account = own.account()
    message = {"role": "assistant", "content": "a few words"}
    dataset = await own.upload(account, (json.dumps({"dialog": [message]}) + "\n") * 2, "rows.jsonl")
    config = json_format.ParseDict(
        {
            "model": "tunery-tiny",
            "data": f"dataset://{dataset.id}",
            "fine_tuning_options": {
                "n_epochs": 3,
                "batch_size": 1,
                "lr": 1e30,
                "extras": {"checkpoint_every_steps": 1, "max_non_finite_steps": 2},
            },
        },
        fine_tuning_service_pb2.Config(),
    )
    with own.running("job_svc", tmp_path), trainer(own, tmp_path, models_dir):
        submitted = await own.fine_tuning.SubmitJob(config, metadata=account)
        job = job_pb2.Job(id=submitted.job_id)
        log = [record.message async for record in log_of(own, account, job)]
    told = [line for line in log if line.startswith(("checkpoint", "job failed"))]
    assert told[:-1] == [
        "checkpoint of step 1 stored",
        "checkpoint of epoch 1 stored",
        "checkpoint of step 1 removed",
        # It goes back to the start: what it has stored since has the spoilt weights.
        "checkpoint of step 0 stored",
        "checkpoint of step 2 removed",
        "checkpoint of step 1 stored",
        "checkpoint of step 0 removed",
        "checkpoint of epoch 1 stored",
        "checkpoint of step 1 removed",
    ]
    assert "with half the learning rate too; lower learning_rate" in told[-1]
