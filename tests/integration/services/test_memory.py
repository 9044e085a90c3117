"""A run that the kernel kills for want of memory goes on in smaller passes, in the very same attempt."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from svc_kit.catalog import load_catalog
from svc_kit.identity import Issuer
from svc_kit.object_store import ObjectStore
from svc_kit.settings import ObjectStoreSettings
from trainer_svc import memory_watch
from trainer_svc.event_reporter import JobServiceClient
from trainer_svc.probes import Probes
from trainer_svc.worker import Worker
from tunery.job.v1 import job_pb2, job_service_pb2

from .conftest import Metadata, Services


@pytest.fixture
def kill_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the kernel counts its kills in."""
    path = tmp_path / "memory.events"
    path.write_text("oom_kill 0\n")
    monkeypatch.setattr(memory_watch, "COUNTERS", (path,))
    return path


@pytest.fixture
async def trainer(services: Services, models_dir: Path, tmp_path: Path) -> AsyncIterator[None]:
    """A real trainer, in this process."""
    environment = services.environment
    store = ObjectStore(
        ObjectStoreSettings(
            s3_endpoint=environment["TUNERY_S3_ENDPOINT"],
            s3_access_key=environment["TUNERY_S3_ACCESS_KEY"],
            s3_secret_key=environment["TUNERY_S3_SECRET_KEY"],
            s3_bucket=environment["TUNERY_S3_BUCKET"],
        )
    )
    client = JobServiceClient(services.worker, Issuer.load("trainer", services.identity_dir))
    worker = Worker(
        *("memory-trainer", client, store, load_catalog(), models_dir, Probes(models_dir)),
        *(tmp_path / "work", 5.0),
    )
    working = asyncio.create_task(worker.run())
    yield
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)


@pytest.mark.parametrize("service_processes", ["sqlite"], indirect=True)
async def test_a_killed_run_goes_on_in_smaller_passes(
    services: Services, trainer: None, kill_counter: Path
) -> None:
    account = services.account()
    job = await services.new_job(account, epochs=80)
    killed = 0
    async for record in log_of(services, account, job):
        if record.kind == "checkpoint" and killed == 0:
            killed = kill_engine(kill_counter)
    ended = await services.jobs.GetJobDetails(
        job_service_pb2.GetJobDetailsRequest(job_id=job.id), metadata=account
    )
    assert killed
    assert (ended.job.status, ended.attempts) == ("completed", 1), ended.error
    assert ended.job.training_metrics.epochs_completed == 80
    lines = [record.message async for record in log_of(services, account, job)]
    assert any("in passes of at most 512 tokens" in line for line in lines)
    assert any(line.startswith("resumed from step ") for line in lines)


def kill_engine(counter: Path) -> int:
    """Kills the processes that train, and counts it as the kernel does."""
    counter.write_text("oom_kill 1\n")
    engines = [
        process
        for process in psutil.Process().children(recursive=True)
        if "trainer_svc.engine" in process.cmdline() and "torch.distributed.run" not in process.cmdline()
    ]
    for process in engines:
        os.kill(process.pid, signal.SIGKILL)
    return len(engines)


async def log_of(services: Services, account: Metadata, job: job_pb2.Job) -> AsyncIterator[job_pb2.LogRecord]:
    request = job_service_pb2.TailLogsRequest(job_id=job.id)
    async for record in services.jobs.TailLogs(request, metadata=account):
        yield record
