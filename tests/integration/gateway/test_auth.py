"""Who is let in, and what of a client's headers gets through."""

from __future__ import annotations

import json
from urllib.parse import unquote

import grpc
import httpx
import pytest

from tests.integration.gateway.raw_http import request
from tests.integration.gateway.stack import FIRST_KEY, Gateway, wait_until
from tests.integration.gateway.upstreams import Upstreams
from tunery.job.v1 import job_service_pb2, job_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEY_HEADER = f"authorization: Bearer {FIRST_KEY}"


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/fine-tuning/jobs",
        "//api/v1/fine-tuning/jobs",
        "/api//v1/fine-tuning/jobs",
        "/api/v1/fine-tuning/jobs/",
        "/api/v1/fine-tuning/jobs//",
        "/%61pi/v1/fine-tuning/jobs",
        "/api/v1/fine-tuning/job%73",
        "/x/../api/v1/fine-tuning/jobs",
        "/healthz/../api/v1/fine-tuning/jobs",
        "/healthz/%2e%2e/api/v1/fine-tuning/jobs",
        "/./api/v1/fine-tuning/jobs",
        "/api/v1/fine-tuning/jobs?limit=5",
        "/api/v1/fine-tuning/jobs?x=/healthz",
        "/api/v1/fine-tuning/jobs#/healthz",
        "/api/v1/fine-tuning/jobs;x=/healthz",
        "/api/v1/fine-tuning/datasets",
        "/fine_tuning/jobs/status?job_id=x",
        "/fine_tuning/jobs/tail?job_id=x",
        "/fine_tuning/jobs/x/files/a/b",
        "/healthz/../fine_tuning/jobs/x/files/../../status",
        "/tunery.job.v1.JobService/ListJobs",
        "/tunery.job.v1.JobDataService/HoldJobData",
        "/grpc.health.v1.Health/Check/../../tunery.job.v1.JobService/ListJobs",
        "/grpc.health.v1.Health/Check",
        "/healthz/x",
        "/healthzz",
        "/HEALTHZ",
        "/nothing-here",
        "*",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
async def test_no_path_gets_past_the_auth_check(
    gateway: Gateway, upstreams: Upstreams, method: str, path: str
) -> None:
    answer = await request(gateway, f"{method} {path}")

    assert answer.status in (400, 401, 404)
    assert (answer.status, path[0]) != (404, "/")
    assert "error" in json.loads(answer.body) or answer.status == 404
    assert upstreams.calls == []


@pytest.mark.parametrize(
    "path",
    [
        "//api/v1/fine-tuning/jobs",
        "/api//v1/fine-tuning/jobs",
        "/api/v1/fine-tuning//jobs",
        "/api/v1/fine-tuning/jobs//",
        "/api/v1/fine-tuning/jobs//job-1",
        "/./api/v1/fine-tuning/jobs",
        "/api/v1/fine-tuning/./jobs",
        "/x/../api/v1/fine-tuning/jobs",
        "/api/v1/fine-tuning/jobs/../jobs",
        "/api/v1/fine-tuning/jobs/..",
        "/api/v1/fine-tuning/jobs/.",
        "/healthz/../api/v1/fine-tuning/jobs",
        "/api/v1/fine-tuning/jobs/..;",
        "/api/v1/fine-tuning/jobs/..;/jobs",
        "/api/v1/fine-tuning/jobs/.;x",
        "/..;/api/v1/fine-tuning/jobs",
        "/api/v1/fine-tuning/jobs/%2e%2e",
        "/api/v1/fine-tuning/jobs/%2E%2e",
        "/api/v1/fine-tuning/jobs/.%2e/jobs",
        "/api/v1/fine-tuning/jobs/%2e",
        "/api/v1/fine-tuning/jobs/..%3b",
        "/api/v1/fine-tuning/jobs/job%2e1",
        "/api%2fv1/fine-tuning/jobs",
        "/api/v1/fine-tuning/jobs%2fjob-1",
        "/api/v1/fine-tuning/jobs/%2e%2e%2fcredits",
        "/api/v1%5cfine-tuning/jobs",
        "/api/v1/fine-tuning/jobs\\job-1",
        "/%61pi/v1/fine-tuning/jobs",
        "/api/v1/fine-tuning/job%73",
        "/api/v1/fine-tuning/jobs;x=1",
        "/API/v1/fine-tuning/jobs",
        "/fine_tuning/jobs/x/files/../../status",
        "/fine_tuning/jobs/x/files/a/%2e%2e/b",
        "/fine_tuning/jobs/x/files/..;/b",
        "/%00",
        "/api/v1/fine-tuning/jobs/%00",
    ],
)
async def test_odd_path_is_refused_even_with_a_key(gateway: Gateway, upstreams: Upstreams, path: str) -> None:
    answer = await request(gateway, f"GET {path}", KEY_HEADER)

    assert answer.status in (400, 404)
    assert json.loads(answer.body)["error"]["code"] in ("invalid_request", "route_not_found")
    assert upstreams.calls == []


@pytest.mark.parametrize("job_id", ["..job", "job..1", "job.", "a;b", "%3A", "job%3b"])
async def test_a_dot_in_a_name_is_none_of_those(gateway: Gateway, upstreams: Upstreams, job_id: str) -> None:
    answer = await request(gateway, f"GET /api/v1/fine-tuning/jobs/{job_id}", KEY_HEADER)

    assert answer.status == 200
    assert upstreams.last.request.job_id == unquote(job_id)


@pytest.mark.parametrize(
    "content_type", ["application/grpc", "application/grpc+proto", "application/grpc-web", "application/json"]
)
async def test_no_content_type_gets_past_the_auth_check(
    gateway: Gateway, upstreams: Upstreams, content_type: str
) -> None:
    for path in ("/tunery.job.v1.JobService/ListJobs", "/api/v1/fine-tuning/jobs"):
        answer = await request(
            gateway, f"POST {path}", f"content-type: {content_type}", "te: trailers", body=b"\0\0\0\0\0"
        )
        assert answer.status == 401 or answer.headers.get("grpc-status") == "16"
    assert upstreams.calls == []


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["authorization:"],
        ["authorization: Bearer"],
        ["authorization: Bearer "],
        [f"authorization: {FIRST_KEY}"],
        [f"authorization: Basic {FIRST_KEY}"],
        [f"authorization: Bearer {FIRST_KEY}x"],
        [f"authorization: Bearer {FIRST_KEY[:-1]}B"],
        [f"authorization: Bearer {FIRST_KEY} x"],
        [f"authorization: Bearer  {FIRST_KEY},"],
        [f"authorization: Bearer {FIRST_KEY.lower()}"],
        [f"authorization: Bearer {FIRST_KEY.upper()}"],
        ["authorization: Bearer tnry_%00"],
        ["authorization: Bearer tnry_\xff\xfe"],
        [KEY_HEADER, "authorization: Bearer x"],
        ["authorization: Bearer x", KEY_HEADER],
        [KEY_HEADER, KEY_HEADER],
        [f"x-authorization: Bearer {FIRST_KEY}"],
        [f"proxy-authorization: Bearer {FIRST_KEY}"],
    ],
)
async def test_odd_credentials_are_401_with_what_to_do(
    gateway: Gateway, upstreams: Upstreams, headers: list[str]
) -> None:
    answer = await request(gateway, "GET /api/v1/fine-tuning/jobs", *headers)

    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/json"
    error = json.loads(answer.body)["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert "Authorization: Bearer tnry_" in error["message"]
    assert FIRST_KEY not in answer.body.decode()
    assert upstreams.calls == []


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR", "Bearer  "])
async def test_the_scheme_is_taken_in_any_case(gateway: Gateway, upstreams: Upstreams, scheme: str) -> None:
    answer = await request(gateway, "GET /api/v1/fine-tuning/jobs", f"authorization: {scheme} {FIRST_KEY}")

    assert answer.status == 200
    assert upstreams.last.method == "ListJobs"


async def test_services_get_an_identity_and_never_the_key(gateway: Gateway, upstreams: Upstreams) -> None:
    (await gateway.client.get("/api/v1/fine-tuning/jobs")).raise_for_status()

    call = upstreams.last
    assert (call.identity.kind, call.identity.scopes) == ("account", frozenset({"read", "write", "admin"}))
    assert call.identity.key_id == FIRST_KEY[:11]
    assert call.identity.subject.startswith("acct-")
    assert FIRST_KEY not in repr(call.metadata)


@pytest.mark.parametrize(
    "name", ["x-account-id", "X-Account-Id", "x-tunery-account", "x-tunery-identity", "x-tunery-x.y"]
)
async def test_a_header_that_claims_an_identity_is_refused(
    gateway: Gateway, upstreams: Upstreams, name: str
) -> None:
    answer = await gateway.client.get("/api/v1/fine-tuning/jobs", headers={name: "acct-victim"})

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "invalid_request"
    assert f"`{name.lower()}`" in error["message"]
    assert upstreams.calls == []


async def test_a_native_call_that_claims_an_identity_has_its_own(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    stub = job_service_pb2_grpc.JobServiceStub(gateway.channel)
    claims = (("x-account-id", "acct-victim"), ("x-tunery-account", "acct-victim"))

    await stub.ListJobs(
        job_service_pb2.ListJobsRequest(), metadata=(("authorization", f"Bearer {FIRST_KEY}"), *claims)
    )

    assert "acct-victim" not in repr(upstreams.last.metadata)
    assert upstreams.last.identity.subject != "acct-victim"


@pytest.mark.parametrize("name", ["content-type", "idempotency-key"])
async def test_a_header_that_is_there_twice_is_refused(
    gateway: Gateway, upstreams: Upstreams, name: str
) -> None:
    answer = await request(
        gateway, "POST /api/v1/fine-tuning/jobs", KEY_HEADER, f"{name}: a", f"{name}: b", body=b"{}"
    )

    assert answer.status == 400
    assert f"`{name}` is there twice" in json.loads(answer.body)["error"]["message"]
    assert upstreams.calls == []


async def test_headers_that_only_the_gateway_may_send_are_stripped(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    spoofed = {
        "x-envoy-original-path": "/healthz",
        "x-envoy-original-method": "PUT",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-max-retries": "99",
        "x-envoy-retry-on": "5xx",
        "x-envoy-decorator-operation": "x",
        "x-envoy-anything": "x",
        "x-tunery-client-request-id": "x",
        "x-http-status": "201",
        "x_account_id": "acct-victim",
    }

    answer = await gateway.client.get("/api/v1/fine-tuning/jobs", headers=spoofed)

    assert answer.status_code == 200
    metadata = upstreams.last.metadata
    assert metadata["x-envoy-original-path"] == "/api/v1/fine-tuning/jobs"
    assert metadata["x-envoy-original-method"] == "GET"
    kept = set(metadata) & set(spoofed)
    assert kept == {"x-envoy-original-path", "x-envoy-original-method"}


@pytest.mark.parametrize(
    "path",
    [
        "/tunery.dataset.v1.JobDataService/ReleaseJobData",
        "/tunery.trainer.v1.WorkerService/LeaseJob",
        "/tunery.job.v1.ModelArtifactService/FindModelArtifact",
        "/tunery.job.v1.CreditAccountService/OpenCreditAccount",
        "/tunery.job.v1.JobLifeService/FindEndedJobs",
        "/envoy.service.auth.v3.Authorization/Check",
        "/grpc.channelz.v1.Channelz/GetTopChannels",
        "/grpc.health.v1.Health/List",
    ],
)
async def test_inner_services_are_not_reachable(gateway: Gateway, upstreams: Upstreams, path: str) -> None:
    call = gateway.channel.unary_unary(path)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(b"", metadata=(("authorization", f"Bearer {FIRST_KEY}"),))

    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert raised.value.details() == "There is no such method here."
    answer = await gateway.client.post(path, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found")
    assert upstreams.calls == []


async def test_native_call_without_a_key_is_told_what_to_do(gateway: Gateway, upstreams: Upstreams) -> None:
    stub = job_service_pb2_grpc.JobServiceStub(gateway.channel)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GetJob(job_service_pb2.GetJobRequest(job_id="x"))

    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert "Authorization: Bearer tnry_" in (raised.value.details() or "")
    assert upstreams.calls == []


async def test_healthz_needs_no_key(gateway: Gateway) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{gateway.url}/healthz")

    assert (answer.status_code, answer.text) == (200, "ok\n")


async def test_no_key_is_ever_logged(gateway: Gateway, upstreams: Upstreams) -> None:
    await gateway.client.get(
        "/api/v1/fine-tuning/jobs", params={"key": FIRST_KEY}, headers={"x-request-id": "with-a-key"}
    )

    async def logged() -> bool:
        return "with-a-key" in gateway.access_log.read_text()

    await wait_until(logged)
    log = gateway.access_log.read_text() + (gateway.folder / "envoy" / "envoy.log").read_text()
    assert FIRST_KEY not in log
    assert "eyJ" not in log
