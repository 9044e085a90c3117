"""An API key that is taken back ends what it has opened and what goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.conftest import RunningStack
from tunery.job.v1 import job_service_pb2, job_service_pb2_grpc

WITHIN_SECONDS = 5
JOBS = "/api/v1/fine-tuning/jobs"
KEYS = "/api/v1/keys"


@pytest.fixture
def live_job(stack: RunningStack) -> Iterator[tuple[str, str]]:
    """A job that goes on until the test has ended: its account's key and its id."""
    api_key = stack.new_account("taken back")
    with stack.client(api_key) as client:
        rows = "question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(8))
        dataset = client.post("/api/v1/fine-tuning/datasets", files={"file": ("rows.csv", rows)}).json()["id"]
        asked = {"base_model": "tunery-tiny", "dataset_id": dataset, "task_type": "qa"}
        job = client.post(JOBS, json={**asked, "hyperparameters": {"epochs": 5000}}).json()["id"]
        yield api_key, job
        client.post(f"{JOBS}/{job}/cancel").raise_for_status()


def test_streams_of_a_revoked_key_end(stack: RunningStack, live_job: tuple[str, str]) -> None:
    owner, job = live_job
    request = job_service_pb2.TailLogsRequest(job_id=job)
    with (
        stack.client(owner) as client,
        grpc.insecure_channel(stack.address) as channel,
        ThreadPoolExecutor() as threads,
    ):
        key = client.post(KEYS, json={"name": "to be lost", "scopes": ["read"]}).json()["api_key"]
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        tails = {each: jobs.TailLogs(request, metadata=metadata(each)) for each in (owner, key)}
        for tail in tails.values():
            next(tail)
        with stack.client(key) as reader, reader.stream("GET", f"{JOBS}/{job}/metrics") as metrics:
            assert metrics.status_code == 200

            client.delete(f"{KEYS}/{key[:11]}").raise_for_status()

            revoked_at = time.monotonic()
            ended = threads.submit(lambda: [None for _ in metrics.iter_lines()])
            with pytest.raises(grpc.RpcError) as raised:
                list(tails[key])
            ended.result(WITHIN_SECONDS)
            assert time.monotonic() - revoked_at < WITHIN_SECONDS
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        next(tails[owner])  # the same account's other key still has its stream
        tails[owner].cancel()


def metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),)
