"""Every call that may change something leaves a line that says who, what and how it ended."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import structlog

from svc_kit.errors import NotFound
from tests.integration.gateway.stack import FIRST_KEY, Gateway, wait_until
from tests.integration.gateway.upstreams import Upstreams
from tunery.account.v1 import account_service_pb2, account_service_pb2_grpc
from tunery.dataset.v1 import dataset_pb2
from tunery.job.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

AUTHORIZATION = (("authorization", f"Bearer {FIRST_KEY}"),)
JOBS = "/api/v1/fine-tuning/jobs"


@pytest.fixture
def audit() -> Iterator[list[Any]]:
    """The records so far."""
    with structlog.testing.capture_logs(processors=[_only_records]) as logs:
        yield logs


def _only_records(_logger: Any, _method: str, line: Any) -> Any:
    if line["event"] != "audit":
        raise structlog.DropEvent
    return line


async def test_a_call_that_makes_something(gateway: Gateway, upstreams: Upstreams, audit: list[Any]) -> None:
    async def create(_request: Any, _context: Any) -> job_pb2.Job:
        return job_pb2.Job(id="job-1", base_model="private")

    upstreams.on("CreateJobFromJson", create)

    await gateway.client.post(JOBS, json={"suffix": "private"})

    [line] = audit
    assert line.pop("seconds") < 5
    assert line.pop("account").startswith("acct-")
    assert line == {
        "event": "audit",
        "log_level": "info",
        "key": FIRST_KEY[:11],
        "resource": {"id": "job-1"},
        "result": "ok",
    }


async def test_a_call_that_fails(gateway: Gateway, upstreams: Upstreams, audit: list[Any]) -> None:
    upstreams.fails("CancelJob", NotFound("There is no such job."))

    await gateway.client.post(f"{JOBS}/job-1/cancel")

    assert [(line["resource"], line["result"]) for line in audit] == [({"job_id": "job-1"}, "not_found")]


async def test_a_call_beyond_the_keys_scopes(
    gateway: Gateway, upstreams: Upstreams, audit: list[Any]
) -> None:
    made = (await gateway.client.post("/api/v1/keys", json={"name": "x", "scopes": ["read"]})).json()
    headers = {"authorization": f"Bearer {made['api_key']}"}

    await gateway.client.delete("/api/v1/fine-tuning/datasets/ds-1", headers=headers)

    created, refused = audit
    assert (created["key"], created["result"]) == (FIRST_KEY[:11], "ok")
    assert created["resource"] == {"key_id": made["key"]["id"]}
    assert (refused["key"], refused["result"]) == (made["key"]["id"], "forbidden")
    assert refused["resource"] == {"dataset_id": "ds-1"}
    assert made["api_key"] not in str(audit)


@pytest.mark.parametrize("over", ["rest", "grpc"])
async def test_a_key_for_another_account(gateway: Gateway, audit: list[Any], over: str) -> None:
    stub = account_service_pb2_grpc.AccountServiceStub(gateway.channel)
    other = await stub.CreateAccount(
        account_service_pb2.CreateAccountRequest(name="other"), metadata=AUTHORIZATION
    )
    wanted = {"name": "x", "scopes": ["read"], "account_id": other.account_id}
    if over == "rest":
        made_id = (await gateway.client.post("/api/v1/keys", json=wanted)).json()["key"]["id"]
    else:
        request = account_service_pb2.CreateApiKeyRequest(**wanted)
        made_id = (await stub.CreateApiKey(request, metadata=AUTHORIZATION)).key.id

    assert audit[-1]["resource"] == {"account_id": other.account_id, "key_id": made_id}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"job_id": 1}', b"[" * 100_000])
async def test_a_body_without_ids(
    gateway: Gateway, upstreams: Upstreams, audit: list[Any], body: bytes
) -> None:
    await gateway.client.post("/fine_tuning/jobs/cancel", content=body)

    assert [line["resource"] for line in audit] == [{}]


async def test_an_upload(gateway: Gateway, upstreams: Upstreams, audit: list[Any]) -> None:
    async def take(parts: Any, _context: Any) -> dataset_pb2.Dataset:
        async for _part in parts:
            pass
        return dataset_pb2.Dataset(id="ds-1")

    upstreams.on("UploadCsvForm", take)

    await gateway.client.post("/api/v1/fine-tuning/datasets", files={"file": ("a.csv", b"x")})

    assert [(line["resource"], line["result"]) for line in audit] == [({"id": "ds-1"}, "ok")]


async def test_a_call_that_is_cancelled(gateway: Gateway, upstreams: Upstreams, audit: list[Any]) -> None:
    reached = asyncio.Event()

    async def hang(_request: Any, _context: Any) -> None:
        reached.set()
        await asyncio.Event().wait()

    upstreams.on("CancelJob", hang)
    call = job_service_pb2_grpc.JobServiceStub(gateway.channel).CancelJob(
        job_service_pb2.CancelJobRequest(job_id="job-1"),
        metadata=AUTHORIZATION,
    )
    await reached.wait()
    call.cancel()

    async def recorded() -> list[Any]:
        return audit

    await wait_until(recorded)
    assert [(line["resource"], line["result"]) for line in audit] == [({"job_id": "job-1"}, "cancelled")]


async def test_a_call_that_changes_nothing_leaves_no_line(
    gateway: Gateway, upstreams: Upstreams, audit: list[Any]
) -> None:
    await gateway.client.get(JOBS)
    await gateway.client.get("/fine_tuning/jobs/tail?job_id=job-1")
    await gateway.client.get("/api/v1/keys")

    assert audit == []


async def test_a_key_in_an_ids_place_is_cut(gateway: Gateway, upstreams: Upstreams, audit: list[Any]) -> None:
    stub = account_service_pb2_grpc.AccountServiceStub(gateway.channel)
    for key_id in (FIRST_KEY, f"x{FIRST_KEY}x", "x" * 5000):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.RevokeApiKey(
                account_service_pb2.RevokeApiKeyRequest(key_id=key_id), metadata=AUTHORIZATION
            )

    assert [line["resource"]["key_id"] for line in audit] == [
        "tnry_AAAAAA...",
        "xtnry_AAAAAA...",
        "x" * 100,
    ]


async def test_the_line_is_written_at_every_level() -> None:
    program = """
from svc_kit.audit import AuditRecord
from svc_kit.identity import Identity
from svc_kit.log import configure_log

configure_log("job_svc", "ERROR")
AuditRecord(Identity("account", "acct-1", key_id="tnry_abcdef")).write("ok")
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    line = json.loads(done.stderr)
    assert (line["service"], line["event"], line["account"]) == ("job_svc", "audit", "acct-1")
    assert line["timestamp"]
