"""Every call has an id that client, gateway and services know it by."""

from __future__ import annotations

import json
import re

import grpc
import pytest

from tests.integration.gateway.stack import FIRST_KEY, Gateway, wait_until
from tests.integration.gateway.upstreams import Upstreams
from tunery.job.v1 import job_service_pb2, job_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
JOBS = "/api/v1/fine-tuning/jobs"


async def test_the_gateway_makes_one(gateway: Gateway, upstreams: Upstreams) -> None:
    ids = [(await gateway.client.get(JOBS)).headers["x-request-id"] for _ in range(3)]

    assert all(UUID.fullmatch(request_id) for request_id in ids)
    assert [call.metadata["x-request-id"] for call in upstreams.calls] == ids
    assert len(set(ids)) == 3


@pytest.mark.parametrize("request_id", ["a", "my-id_1.2", "A" * 128, "00000000-0000-4000-8000-000000000000"])
async def test_a_sane_one_of_the_client_is_kept(
    gateway: Gateway, upstreams: Upstreams, request_id: str
) -> None:
    answer = await gateway.client.get(JOBS, headers={"x-request-id": request_id})

    assert answer.headers["x-request-id"] == request_id
    assert upstreams.last.metadata["x-request-id"] == request_id
    assert "x-tunery-client-request-id" not in upstreams.last.metadata


@pytest.mark.parametrize("request_id", ["", "a b", "a\tb", "A" * 129, "a,b", "ä", "<x>", '"', "%00"])
async def test_any_other_is_replaced(gateway: Gateway, upstreams: Upstreams, request_id: str) -> None:
    answer = await gateway.client.get(JOBS, headers={"x-request-id": request_id.encode()})

    assert UUID.fullmatch(answer.headers["x-request-id"])
    assert upstreams.last.metadata["x-request-id"] == answer.headers["x-request-id"]


async def test_several_are_replaced(gateway: Gateway, upstreams: Upstreams) -> None:
    answer = await gateway.client.get(
        JOBS, headers=[("x-request-id", "one"), ("x-request-id", "two"), *gateway.client.headers.items()]
    )

    assert UUID.fullmatch(answer.headers["x-request-id"])
    assert upstreams.last.metadata["x-request-id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/nope", {}),
        ("PUT", JOBS, {}),
        ("GET", JOBS, {"authorization": "Bearer x"}),
        ("GET", f"{JOBS}?limit=x", {}),
        ("GET", "/healthz", {}),
    ],
)
async def test_errors_carry_it_too(
    gateway: Gateway, upstreams: Upstreams, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = await gateway.client.request(method, path, headers={**headers, "x-request-id": "mine"})

    assert answer.headers["x-request-id"] == "mine"


async def test_native_calls_have_one(gateway: Gateway, upstreams: Upstreams) -> None:
    metadata = (("authorization", f"Bearer {FIRST_KEY}"), ("x-request-id", "native-1"))
    stub = job_service_pb2_grpc.JobServiceStub(gateway.channel)

    call = stub.GetJob(job_service_pb2.GetJobRequest(), metadata=metadata)

    assert dict(iter(await call.initial_metadata()))["x-request-id"] == "native-1"
    assert upstreams.last.metadata["x-request-id"] == "native-1"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GetJob(job_service_pb2.GetJobRequest(), metadata=metadata[1:])
    assert dict(iter(raised.value.trailing_metadata()))["x-request-id"] == "native-1"


async def test_the_access_log_names_it(gateway: Gateway, upstreams: Upstreams) -> None:
    await gateway.client.get(JOBS, params={"limit": 3}, headers={"x-request-id": "to-be-found"})

    async def logged() -> dict[str, object] | None:
        lines = [json.loads(line) for line in gateway.access_log.read_text().splitlines()]
        return next((line for line in lines if line["request_id"] == "to-be-found"), None)

    line = await wait_until(logged)
    assert (line["method"], line["path"], line["status"]) == ("GET", JOBS, 200)
