"""How many requests an account may send, and what of the auth check is spared it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from gateway.authz.accounts import LOOKUP_SECONDS
from gateway.errors import RATE_LIMITED
from svc_kit.errors import TooManyRequests
from tests.integration.gateway.raw_http import request
from tests.integration.gateway.stack import FIRST_KEY, Gateway, run_gateway, stat, wait_until
from tests.integration.gateway.upstreams import Upstreams
from tunery.account.v1 import account_service_pb2, account_service_pb2_grpc
from tunery.job.v1 import job_service_pb2, job_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

JOB = "/api/v1/fine-tuning/jobs/job-1"
BURST = 8


def metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),)


async def new_key(gateway: Gateway) -> str:
    """Returns the key of a new account."""
    stub = account_service_pb2_grpc.AccountServiceStub(gateway.channel)
    made = await stub.CreateAccount(
        account_service_pb2.CreateAccountRequest(name="team"), metadata=metadata(FIRST_KEY)
    )
    return str(made.api_key)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slow_gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """One that takes 8 requests of an account at once, and then one a second."""
    folder = tmp_path_factory.mktemp("slow")
    async with run_gateway(folder, requests_per_second=1, request_burst=BURST) as running:
        yield running


async def get_job(gateway: Gateway, api_key: str) -> Any:
    return await gateway.client.get(JOB, headers={"authorization": f"Bearer {api_key}"})


async def test_a_flood_is_429_with_a_pause_and_slows_nobody_else(slow_gateway: Gateway) -> None:
    flooding, other = await new_key(slow_gateway), await new_key(slow_gateway)

    answers = [await get_job(slow_gateway, flooding) for _ in range(3 * BURST)]

    statuses = [answer.status_code for answer in answers]
    assert statuses[:BURST] == [200] * BURST
    assert set(statuses[BURST:]) <= {200, 429}
    assert statuses.count(200) <= BURST + 3
    refused = answers[statuses.index(429)]
    assert refused.headers["retry-after"] == "1"
    assert refused.json() == {
        "error": {"message": RATE_LIMITED.message, "type": "rate_limit_error", "code": "rate_limited"}
    }
    assert not {name for name in refused.headers if name.startswith("grpc-")}
    assert [(await get_job(slow_gateway, other)).status_code for _ in range(BURST)] == [200] * BURST

    async def is_let_in_again() -> bool:
        return bool((await get_job(slow_gateway, flooding)).status_code == 200)

    await wait_until(is_let_in_again, seconds=5)


async def test_all_keys_of_an_account_share_its_rate(slow_gateway: Gateway) -> None:
    first = await new_key(slow_gateway)
    stub = account_service_pb2_grpc.AccountServiceStub(slow_gateway.channel)
    second = (
        await stub.CreateApiKey(
            account_service_pb2.CreateApiKeyRequest(name="x", scopes=["read"]), metadata=metadata(first)
        )
    ).api_key

    statuses = [
        (await get_job(slow_gateway, key)).status_code for _ in range(BURST) for key in (first, second)
    ]

    assert 429 in statuses
    assert statuses.count(200) <= BURST + 1


async def test_a_native_call_is_told_with_error_info(slow_gateway: Gateway) -> None:
    key = await new_key(slow_gateway)
    stub = job_service_pb2_grpc.JobServiceStub(slow_gateway.channel)

    async def flood() -> None:
        for _ in range(3 * BURST):
            await stub.GetJob(job_service_pb2.GetJobRequest(job_id="job-1"), metadata=metadata(key))

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await flood()

    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(raised.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("tunery", TooManyRequests.code)
    assert dict(info.metadata) == {"type": "rate_limit_error", "http_status": "429"}
    assert status.message == RATE_LIMITED.message


async def test_whoever_is_let_in_without_a_key_has_no_rate(slow_gateway: Gateway) -> None:
    statuses = {(await request(slow_gateway, "GET /healthz")).status for _ in range(3 * BURST)}

    assert statuses == {200}


async def test_the_auth_check_is_asked_once_for_many_calls(gateway: Gateway, upstreams: Upstreams) -> None:
    key = await new_key(gateway)
    upstreams.calls.clear()
    asked = await stat(gateway, "cluster.authz.upstream_rq_total")

    for scheme in ("Bearer", "bearer", "Bearer"):
        for _ in range(5):
            headers = {"authorization": f"{scheme} {key}"}
            assert (await gateway.client.get(JOB, headers=headers)).status_code == 200
    stub = job_service_pb2_grpc.JobServiceStub(gateway.channel)
    await stub.GetJob(job_service_pb2.GetJobRequest(job_id="job-1"), metadata=metadata(key))

    assert await stat(gateway, "cluster.authz.upstream_rq_total") == asked + 1
    assert len(upstreams.calls) == 16
    assert len({call.identity for call in upstreams.calls}) == 1
    assert {call.identity.key_id for call in upstreams.calls} == {key[:11]}
    assert key not in repr([call.metadata for call in upstreams.calls])


async def test_what_is_kept_of_a_key_opens_nothing_else(gateway: Gateway, upstreams: Upstreams) -> None:
    key, other = await new_key(gateway), await new_key(gateway)
    for each in (key, other):
        assert (await get_job(gateway, each)).status_code == 200
    upstreams.calls.clear()
    good = f"authorization: Bearer {key}"

    for headers in (
        [good, good],
        [good, f"authorization: Bearer {other}"],
        [f"authorization: Bearer {key},Bearer {key}"],
        [f"authorization: Bearer {key} {other}"],
        [f"authorization: Bearer {key}x"],
        [f"authorization: Bearer {key[:-1]}"],
        [f"authorization: BEARER{key}"],
        [f"authorization: {key}"],
        [f"x-authorization: Bearer {key}"],
        ["x-tunery-account: acct-x", "tunery.auth_cache: x", "account: acct-x"],
        [f"authorization: Bearer {key[:20]}\x00{key[20:]}"],
    ):
        answer = await request(gateway, f"GET {JOB}", *headers)
        assert answer.status in (400, 401), headers
    assert upstreams.calls == []
    for path in ("/nope", "/tunery.trainer.v1.WorkerService/LeaseJob"):
        assert (await request(gateway, f"POST {path}", good)).status == 404
    assert upstreams.calls == []


async def test_a_key_that_is_used_all_the_time_is_refused_once_it_is_revoked(gateway: Gateway) -> None:
    made = (await gateway.client.post("/api/v1/keys", json={"name": "x", "scopes": ["read"]})).json()
    assert (await get_job(gateway, made["api_key"])).status_code == 200
    (await gateway.client.delete(f"/api/v1/keys/{made['key']['id']}")).raise_for_status()
    revoked = time.monotonic()

    async def refused() -> bool:
        return bool((await get_job(gateway, made["api_key"])).status_code == 401)

    await wait_until(refused, seconds=5)
    assert time.monotonic() - revoked < LOOKUP_SECONDS + 0.5
    assert all([await refused() for _ in range(5)])
