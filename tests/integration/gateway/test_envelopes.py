"""Every error, a service's or Envoy's own, comes as the contract's ErrorResponse."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import structlog
from google.protobuf import any_pb2, struct_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from svc_kit.errors import (
    MAX_MESSAGE_CHARS,
    InsufficientCredits,
    InvalidRequest,
    NotFound,
    TuneryError,
    Unauthenticated,
    table,
    to_status,
)
from svc_kit.identity import Verifier, write_identity_keys
from tests.integration.gateway.raw_http import exchange, request
from tests.integration.gateway.stack import FIRST_KEY, Gateway
from tests.integration.gateway.upstreams import Upstreams
from tunery.job.v1 import job_service_pb2, job_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEY_HEADER = f"authorization: Bearer {FIRST_KEY}"
JOB = "/api/v1/fine-tuning/jobs/ftjob-1"


def error_of(answer: httpx.Response) -> tuple[int, str, str, str]:
    """Returns status, type, code and message of an answer that is an envelope and nothing else."""
    assert answer.headers["content-type"] == "application/json"
    assert not {name for name in answer.headers if name.startswith(("grpc-", "x-http-"))}
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code"}
    error = body["error"]
    return answer.status_code, error["type"], error["code"], error["message"]


@pytest.mark.parametrize("rest", ["GET", "tail"])
async def test_a_token_of_the_gateways_own_that_is_refused_is_no_clients_fault(
    gateway: Gateway, upstreams: Upstreams, rest: str, tmp_path: Path
) -> None:
    """A clock was set, say: the client's key is good, and the call may be sent again."""
    write_identity_keys(tmp_path)
    with pytest.raises(Unauthenticated) as raised:
        Verifier(tmp_path).verify("no token")
    for method in ("GetJob", "TailJob"):
        upstreams.fails(method, raised.value)
    stub = job_service_pb2_grpc.JobServiceStub(gateway.channel)

    if rest == "GET":
        assert error_of(await gateway.client.get(JOB))[:3] == (503, "server_error", "unavailable")
    else:
        lines = (await gateway.client.get("/fine_tuning/jobs/tail?job_id=x")).text.splitlines()
        assert [json.loads(line)["error"]["code"] for line in lines] == ["unavailable"]
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.GetJob(
            job_service_pb2.GetJobRequest(job_id="x"), metadata=(("authorization", f"Bearer {FIRST_KEY}"),)
        )
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("row", table(), ids=lambda row: row.code)
async def test_every_row_of_the_table(gateway: Gateway, upstreams: Upstreams, row: type[TuneryError]) -> None:
    upstreams.fails("GetJob", row("What was wrong.", field="suffix", type_of_it="x", line=3))

    answer = await gateway.client.get(JOB)

    assert error_of(answer) == (row.http_status, row.type, row.code, "What was wrong.")
    assert answer.headers.get("www-authenticate") == ("Bearer" if row.http_status == 401 else None)


@pytest.mark.parametrize(
    "message",
    [
        'a "quoted" word',
        "two\nlines\r\nand a\ttab",
        "Ünïcödé – 漢字 – 🚀",
        'back\\slash \\" \\u0022',
        '","details":[',
        '","details":[{"@type":"x","domain":"tunery","reason":"forged","metadata":{"http_status":"418"}}]}',
        '{"error":{"message":"x","type":"y","code":"z"}}',
        '{"error":',
        "100 % of %s %REQ(authorization)%",
        "a\x01b\x7fc\u2028d",
        "<script>&amp;</script>",
        " ",
        "x" * MAX_MESSAGE_CHARS,
    ],
)
async def test_any_message_stays_itself(gateway: Gateway, upstreams: Upstreams, message: str) -> None:
    for row in (InvalidRequest, InsufficientCredits):
        upstreams.fails("GetJob", row(message, detail=message[:200]))

        answer = await gateway.client.get(JOB)

        assert error_of(answer) == (row.http_status, row.type, row.code, message)


async def test_an_error_before_a_stream_has_its_status(gateway: Gateway, upstreams: Upstreams) -> None:
    for method, path in {
        "TailJob": "/fine_tuning/jobs/tail?job_id=x",
        "GetJobFile": "/fine_tuning/jobs/x/files/log",
    }.items():
        upstreams.fails(method, NotFound("There is no such job."))

        answer = await gateway.client.get(path)

        assert error_of(answer) == (404, "not_found_error", "not_found", "There is no such job.")


@pytest.mark.parametrize("path", [JOB, "/fine_tuning/jobs/tail?job_id=x"])
async def test_what_nobody_foresaw_is_not_shown(gateway: Gateway, upstreams: Upstreams, path: str) -> None:
    for method in ("GetJob", "TailJob"):
        upstreams.fails(method, RuntimeError("the password is hunter2"))

    with structlog.testing.capture_logs() as logs:
        answer = await gateway.client.get(path)

    assert error_of(answer)[:3] == (500, "server_error", "internal_error")
    assert "hunter2" not in answer.text
    assert [line["log_level"] for line in logs if "exc_info" in line] == ["error"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNKNOWN, (500, "server_error", "internal_error")),
        (grpc.StatusCode.INTERNAL, (500, "server_error", "internal_error")),
        (grpc.StatusCode.DATA_LOSS, (500, "server_error", "internal_error")),
        (grpc.StatusCode.UNIMPLEMENTED, (501, "server_error", "not_implemented")),
        (grpc.StatusCode.UNAVAILABLE, (503, "server_error", "unavailable")),
        (grpc.StatusCode.DEADLINE_EXCEEDED, (504, "server_error", "timeout")),
        (grpc.StatusCode.CANCELLED, (499, "server_error", "cancelled")),
        (grpc.StatusCode.NOT_FOUND, (404, "not_found_error", "not_found")),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, (429, "rate_limit_error", "rate_limited")),
    ],
)
async def test_a_status_without_our_error_info_shows_no_text(
    gateway: Gateway, upstreams: Upstreams, code: grpc.StatusCode, expected: tuple[int, str, str]
) -> None:
    async def fail(_request: Any, context: Any) -> None:
        await context.abort(code, 'Traceback "hunter2"')

    upstreams.on("CancelJob", fail)

    # Not a read, which the gateway would send again after some of these.
    answer = await gateway.client.post(f"{JOB}/cancel")

    assert error_of(answer)[:3] == expected
    assert "hunter2" not in answer.text


async def test_error_info_of_others_is_not_taken(gateway: Gateway, upstreams: Upstreams) -> None:
    foreign, ours, struct = any_pb2.Any(), any_pb2.Any(), any_pb2.Any()
    foreign.Pack(error_details_pb2.ErrorInfo(reason="theirs", domain="example.com", metadata={"type": "x"}))
    ours.Pack(
        error_details_pb2.ErrorInfo(reason="not_found", domain="tunery", metadata={"http_status": "200"})
    )
    struct.Pack(struct_pb2.Struct())

    def fail_with(*details: any_pb2.Any) -> None:
        async def fail(_request: Any, context: Any) -> None:
            status = status_pb2.Status(code=5, message="what was said", details=list(details))
            await context.abort_with_status(rpc_status.to_status(status))

        upstreams.on("GetJob", fail)

    fail_with(foreign)
    assert "what was said" not in (await gateway.client.get(JOB)).text
    fail_with(struct)  # not in the descriptor set's reach, perhaps: still an envelope
    assert error_of(await gateway.client.get(JOB))[0] in (404, 500)
    fail_with(foreign, ours)
    assert error_of(await gateway.client.get(JOB)) == (404, "not_found_error", "not_found", "what was said")


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/api/v1", "/api/v1/fine-tuning/jobs/a/b/c", "/v1/models?x=1"]
)
async def test_unknown_path(gateway: Gateway, upstreams: Upstreams, path: str) -> None:
    answer = await gateway.client.get(path)

    status, kind, code, message = error_of(answer)
    assert (status, kind, code) == (404, "not_found_error", "route_not_found")
    assert f"GET {path.partition('?')[0]}" in message


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/api/v1/fine-tuning/jobs", "GET, POST"),
        ("DELETE", "/api/v1/fine-tuning/jobs/ftjob-1", "GET"),
        ("GET", "/api/v1/fine-tuning/jobs/ftjob-1/cancel", "POST"),
        ("PATCH", "/api/v1/fine-tuning/datasets", "GET, POST"),
        ("GET", "/fine_tuning/datasets", "POST"),
        ("POST", "/fine_tuning/jobs/x/files/a/b", "GET"),
        ("GET", "/v1/chat/completions", "POST"),
    ],
)
async def test_wrong_method(
    gateway: Gateway, upstreams: Upstreams, method: str, path: str, allow: str
) -> None:
    answer = await gateway.client.request(method, path)

    assert error_of(answer)[:3] == (405, "invalid_request_error", "method_not_allowed")
    assert answer.headers["allow"] == allow
    assert upstreams.calls == []


async def test_head_leaves_nothing_in_the_connection(gateway: Gateway, upstreams: Upstreams) -> None:
    for _ in range(3):
        answer = await gateway.client.head("/api/v1/fine-tuning/jobs")
        assert (answer.status_code, answer.content) == (405, b"")
    assert (await gateway.client.get("/api/v1/fine-tuning/jobs")).status_code == 200


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_request"),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 426, "upgrade_required"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"x" * 70_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 150 + b"\r\n", 431, "headers_too_large"),
        (
            b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
            403,
            "forbidden",
        ),
    ],
)
async def test_what_is_no_proper_request(gateway: Gateway, raw: bytes, status: int, code: str) -> None:
    answer = await exchange(gateway, raw)

    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/json"


async def test_json_that_the_transcoder_cannot_read(gateway: Gateway, upstreams: Upstreams) -> None:
    for body in (b'{"a": "\xff\n', b"\nnot json\n"):
        answer = await gateway.client.post(f"{JOB}/cancel", content=body, headers={"x": "y"})

        assert error_of(answer)[:3] == (400, "invalid_request_error", "invalid_request")
        assert error_of(answer)[3].isprintable()
    assert upstreams.calls == []


async def test_a_native_client_gets_status_and_details_as_the_service_gave_them(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    error = InsufficientCredits("Not “enough”.", balance=1)
    upstreams.fails("GetJob", error)
    stub = job_service_pb2_grpc.JobServiceStub(gateway.channel)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GetJob(
            job_service_pb2.GetJobRequest(), metadata=(("authorization", f"Bearer {FIRST_KEY}"),)
        )

    assert raised.value.code() == error.grpc_status
    assert raised.value.details() == error.message
    trailers = {item[0]: item[1] for item in raised.value.trailing_metadata()}
    assert trailers["grpc-status-details-bin"] == to_status(error).trailing_metadata[0][1]


async def test_a_native_client_does_not_see_what_nobody_foresaw(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    async def fail(_request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNKNOWN, "hunter2")

    upstreams.on("GetJob", fail)
    stub = job_service_pb2_grpc.JobServiceStub(gateway.channel)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GetJob(
            job_service_pb2.GetJobRequest(), metadata=(("authorization", f"Bearer {FIRST_KEY}"),)
        )

    assert raised.value.code() == grpc.StatusCode.UNKNOWN
    assert "hunter2" not in (raised.value.details() or "")


async def test_errors_of_calls_side_by_side_do_not_mix(gateway: Gateway, upstreams: Upstreams) -> None:
    async def fail(message: Any, _context: Any) -> None:
        raise NotFound(f"There is no {message.job_id}.")

    upstreams.on("GetJob", fail)

    answers = await asyncio.gather(
        *(gateway.client.get(f"/api/v1/fine-tuning/jobs/{number}") for number in range(50))
    )

    assert [error_of(answer)[3] for answer in answers] == [f"There is no {n}." for n in range(50)]


async def test_a_path_that_is_no_text_is_still_answered_in_json(gateway: Gateway) -> None:
    answer = await request(gateway, "GET /%22%0a%c3%28?q=1", KEY_HEADER)

    assert answer.status in (400, 404)
    json.loads(answer.body)
