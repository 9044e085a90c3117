"""What clients see while a part of the stack is away, and what is tried again for them."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import structlog

from gateway.authz.accounts import Accounts
from gateway.authz.credit_accounts import JobServiceCreditAccounts
from gateway.authz.repository import AccountRepository
from gateway.authz.server import make_authz_server
from svc_kit.database import Database
from svc_kit.errors import Unavailable
from svc_kit.identity import Issuer, Verifier, write_identity_keys
from svc_kit.rest_answers import CREATED
from tests.integration.gateway.stack import FIRST_KEY, Gateway, run_gateway, run_server, stat, wait_until
from tests.integration.gateway.upstreams import Upstreams, make_upstream
from tunery.dataset.v1 import dataset_pb2, dataset_service_pb2, dataset_service_pb2_grpc
from tunery.job.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

JOBS = "/api/v1/fine-tuning/jobs"
DATASETS = "/api/v1/fine-tuning/datasets"
AUTHORIZATION = (("authorization", f"Bearer {FIRST_KEY}"),)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@asynccontextmanager
async def running_upstream(name: str, gateway: Gateway, address: str) -> AsyncIterator[None]:
    """A double of a service that listens for the block's time; its end breaks off what it is asked."""
    server = make_upstream(name, gateway.upstreams, Verifier(gateway.folder / "identity"))
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def without_retries(configuration: str) -> str:
    return configuration.replace("num_retries: 28", "num_retries: 0")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_call_waits_for_a_service_that_starts_again(tmp_path: Path, method: str) -> None:
    address = free_address()
    async with run_gateway(tmp_path, job_svc_address=address) as gateway:
        call = asyncio.create_task(gateway.client.request(method, JOBS))

        async def refused() -> bool:
            return await stat(gateway, "cluster.job_svc.upstream_cx_connect_fail") > 0

        await wait_until(refused)
        async with running_upstream("job_svc", gateway, address):
            assert (await call).status_code == 200
    assert len(gateway.upstreams.calls) == 1


async def test_a_service_that_is_away_is_503(tmp_path: Path) -> None:
    away = {name: free_address() for name in ("job_svc_address", "inference_svc_address")}
    async with run_gateway(tmp_path, edit=without_retries, **away) as gateway:
        for method, path in (("GET", JOBS), ("POST", JOBS), ("POST", "/v1/chat/completions")):
            answer = await gateway.client.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            assert "127.0.0.1" not in answer.text
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await job_service_pb2_grpc.JobServiceStub(gateway.channel).GetJob(
                job_service_pb2.GetJobRequest(), metadata=AUTHORIZATION
            )
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        assert raised.value.details() == "A part of the service can't be reached for now; try again."
        assert (await gateway.client.get("/api/v1/fine-tuning/datasets")).status_code == 200


async def test_a_create_that_may_have_been_done_is_not_sent_again(tmp_path: Path) -> None:
    address = free_address()
    async with run_gateway(tmp_path, job_svc_address=address) as gateway:
        reached = asyncio.Event()

        async def hang(_request: Any, _context: Any) -> None:
            reached.set()
            await asyncio.Event().wait()

        gateway.upstreams.on("CreateJobFromJson", hang)
        async with running_upstream("job_svc", gateway, address):
            call = asyncio.create_task(gateway.client.post(JOBS, content=b"{}"))
            await reached.wait()

        answer = await call

        assert answer.status_code in (499, 503)
        assert len(gateway.upstreams.calls) == 1


async def test_a_create_with_a_key_is_sent_again_when_its_service_dies(tmp_path: Path) -> None:
    address = free_address()
    host, port = address.split(":")
    connections: list[asyncio.StreamWriter] = []

    async def listen(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)

    async with run_gateway(tmp_path, job_svc_address=address) as gateway:
        deaf = await asyncio.start_server(listen, host, int(port))
        calls = [
            asyncio.create_task(gateway.client.post(JOBS, content=b"{}", headers=headers))
            for headers in ({"idempotency-key": "k"}, {})
        ]

        async def sent() -> bool:
            return await stat(gateway, "cluster.job_svc.upstream_rq_active") >= 2

        await wait_until(sent)
        deaf.close()
        for connection in connections:
            connection.close()
        async with running_upstream("job_svc", gateway, address):
            with_key, without = await asyncio.gather(*calls)
    assert (with_key.status_code, without.status_code) == (200, 503)
    assert len(gateway.upstreams.calls) == 1


async def test_a_read_that_its_service_breaks_off_is_asked_again(tmp_path: Path) -> None:
    address = free_address()
    reached: list[asyncio.Event] = [asyncio.Event(), asyncio.Event()]
    waiting = iter(reached)

    async def hang_at_first(_request: Any, _context: Any) -> job_pb2.JobList:
        event = next(waiting)
        event.set()
        if event is reached[0]:
            await asyncio.Event().wait()
        return job_pb2.JobList()

    async with run_gateway(tmp_path, job_svc_address=address) as gateway:
        gateway.upstreams.on("ListJobs", hang_at_first)
        async with running_upstream("job_svc", gateway, address):
            read = asyncio.create_task(gateway.client.get(JOBS))
            await reached[0].wait()
        async with running_upstream("job_svc", gateway, address):
            answer = await read
    assert answer.status_code == 200
    assert reached[1].is_set()


async def test_a_read_whose_service_lacks_its_database_is_answered_at_once(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    upstreams.fails("ListJobs", Unavailable("The database can't be reached for now; try again."))

    answer = await gateway.client.get(JOBS)

    assert answer.status_code == 503
    assert len(upstreams.calls) == 1


# The gateway keeps 1 MiB of an upload.
@pytest.mark.parametrize(
    ("headers", "num_bytes", "is_sent_again"),
    [
        ({"idempotency-key": "k"}, 100, True),
        ({"idempotency-key": "k"}, 1_000_000, True),
        ({"idempotency-key": "k"}, 1_100_000, False),
        ({}, 100, False),
    ],
)
async def test_an_upload_with_a_key_is_sent_again_when_its_service_ends(
    tmp_path: Path, headers: dict[str, str], num_bytes: int, is_sent_again: bool
) -> None:
    address = free_address()
    sizes: list[int] = []
    arrived = asyncio.Event()

    async def take(parts: Any, context: Any) -> dataset_pb2.Dataset:
        sizes.append(sum([len(part.data) async for part in parts]))
        if len(sizes) == 1:
            arrived.set()
            await asyncio.Event().wait()
        await context.send_initial_metadata(CREATED)
        return dataset_pb2.Dataset(id="ds-1")

    async with run_gateway(tmp_path, dataset_svc_address=address) as gateway:
        gateway.upstreams.on("UploadCsvForm", take)
        async with running_upstream("dataset_svc", gateway, address):
            files = {"file": ("rows.csv", b"x" * num_bytes)}
            upload = asyncio.create_task(gateway.client.post(DATASETS, files=files, headers=headers))
            await arrived.wait()
        async with running_upstream("dataset_svc", gateway, address):
            answer = await upload

    assert answer.status_code in ((201,) if is_sent_again else (499, 503))
    assert len(sizes) == (2 if is_sent_again else 1)
    assert len(set(sizes)) == 1
    assert sizes[0] > num_bytes


async def test_a_large_upload_that_is_still_sent_when_its_service_ends_is_503(tmp_path: Path) -> None:
    address = free_address()
    arrived = asyncio.Event()
    has_ended = threading.Event()

    async def take(parts: Any, _context: Any) -> None:
        async for _ in parts:
            arrived.set()
        raise AssertionError("the service has ended")

    def chunks() -> Iterator[bytes]:
        yield b"x" * 100_000
        assert has_ended.wait(30)
        yield from [b"x" * 100_000] * 30

    def upload(url: str) -> httpx.Response:
        # The blocking client: the asynchronous one looks for no answer while it writes.
        headers = {"authorization": f"Bearer {FIRST_KEY}", "idempotency-key": "k"}
        return httpx.post(f"{url}{DATASETS}", content=chunks(), headers=headers, timeout=30)

    async with run_gateway(tmp_path, dataset_svc_address=address) as gateway:
        gateway.upstreams.on("UploadCsvForm", take)
        async with running_upstream("dataset_svc", gateway, address):
            uploading = asyncio.create_task(asyncio.to_thread(upload, gateway.url))
            await arrived.wait()
        has_ended.set()
        answer = await uploading

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


async def test_a_large_native_upload_whose_service_is_away_is_unavailable(tmp_path: Path) -> None:
    is_refused = threading.Event()

    def chunks() -> Iterator[dataset_service_pb2.UploadDatasetRequest]:
        chunk = dataset_service_pb2.UploadDatasetRequest(chunk=b"x" * 100_000)
        yield chunk
        assert is_refused.wait(30)
        yield from [chunk] * 30

    def upload(gateway_address: str) -> Any:
        # The blocking client: grpc.aio shows an answer that meets its writing as INTERNAL.
        with grpc.insecure_channel(gateway_address) as channel:
            stub = dataset_service_pb2_grpc.DatasetServiceStub(channel)
            with pytest.raises(grpc.RpcError) as raised:
                stub.UploadDataset(chunks(), metadata=AUTHORIZATION)
        return raised.value

    async with run_gateway(tmp_path, dataset_svc_address=free_address()) as gateway:
        uploading = asyncio.create_task(asyncio.to_thread(upload, gateway.address))

        async def refused() -> bool:
            return await stat(gateway, "cluster.dataset_svc.upstream_rq_retry") > 0

        await wait_until(refused)
        is_refused.set()
        error = await uploading

    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert error.details() == "A part of the service can't be reached for now; try again."


async def test_without_the_auth_check_nobody_is_let_in(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, edit=without_retries, authz_address=free_address()) as gateway:
        for path in (JOBS, "/nope", "/fine_tuning/jobs/tail?job_id=x"):
            answer = await gateway.client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            assert answer.headers["content-type"] == "application/json"
        assert gateway.upstreams.calls == []
        assert (await gateway.client.get("/healthz")).status_code == 200


async def test_without_the_accounts_database_nobody_is_let_in(tmp_path: Path) -> None:
    keys = tmp_path / "identity"
    write_identity_keys(keys)
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/no/such/folder/authz.db")
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        accounts = Accounts(
            AccountRepository(database),
            Issuer.load("account", keys),
            JobServiceCreditAccounts(channel, Issuer.load("authz", keys)),
        )
        server, _health = make_authz_server(accounts, Verifier(keys))
        async with run_server(server) as address, run_gateway(tmp_path, authz_address=address) as gateway:
            with structlog.testing.capture_logs() as logs:
                answer = await gateway.client.get(JOBS)

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert gateway.upstreams.calls == []
    assert {line["code"] for line in logs} == {"unavailable"}
    await database.close()


async def never(_request: Any, _context: Any) -> None:
    await asyncio.Event().wait()


async def native_get_job(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await job_service_pb2_grpc.JobServiceStub(gateway.channel).GetJob(
            job_service_pb2.GetJobRequest(), metadata=AUTHORIZATION
        )
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "did not answer in time" in (raised.value.details() or "")


async def rest_get_job(gateway: Gateway) -> None:
    answer = await gateway.client.get(f"{JOBS}/ftjob-1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("ask", [native_get_job, rest_get_job])
async def test_a_service_that_does_not_answer_is_504(
    tmp_path: Path, ask: Callable[[Gateway], Awaitable[None]]
) -> None:
    def impatient(configuration: str) -> str:
        return configuration.replace("timeout: 15s", "timeout: 0.2s")

    async with run_gateway(tmp_path, edit=impatient) as gateway:
        gateway.upstreams.on("GetJob", never)
        await ask(gateway)
