"""What becomes of a service's answer on its way to a REST client, and of a request on its way in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.api import httpbody_pb2
from google.protobuf import empty_pb2

from tests.integration.gateway.raw_http import request
from tests.integration.gateway.stack import FIRST_KEY, Gateway
from tests.integration.gateway.upstreams import Upstreams
from tunery.dataset.v1 import dataset_pb2
from tunery.job.v1 import fine_tuning_service_pb2, job_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_created_is_201(gateway: Gateway, upstreams: Upstreams) -> None:
    async def create(_request: Any, context: Any) -> job_pb2.Job:
        await context.send_initial_metadata((("x-http-status", "201"),))
        return job_pb2.Job(id="ftjob-1", status="queued")

    upstreams.on("CreateJobFromJson", create)

    answer = await gateway.client.post("/api/v1/fine-tuning/jobs", content=b'{"suffix": "\xc3\xbc"}')

    assert (answer.status_code, answer.json()["id"]) == (201, "ftjob-1")
    assert answer.headers["content-type"] == "application/json"
    assert not {name for name in answer.headers if name.startswith(("x-http-", "grpc-", "x-envoy-"))}
    assert upstreams.last.request.data == b'{"suffix": "\xc3\xbc"}'


async def test_no_content_is_204_with_nothing_in_it(gateway: Gateway, upstreams: Upstreams) -> None:
    async def delete(_request: Any, context: Any) -> empty_pb2.Empty:
        await context.send_initial_metadata((("x-http-status", "204"),))
        return empty_pb2.Empty()

    upstreams.on("DeleteDataset", delete)

    answer = await request(
        gateway, "DELETE /api/v1/fine-tuning/datasets/ds-1", f"authorization: Bearer {FIRST_KEY}"
    )

    assert (answer.status, answer.body) == (204, b"")
    assert not {"content-type", "content-length", "transfer-encoding"} & set(answer.headers)
    # The connection is still of use: nothing of the body was left in it.
    for _ in range(2):
        answer_again = await gateway.client.delete("/api/v1/fine-tuning/datasets/ds-1")
        assert (answer_again.status_code, answer_again.content) == (204, b"")


@pytest.mark.parametrize("status", ["404", "500", "199", "2000", "2x1", ""])
async def test_a_service_can_choose_only_a_2xx(gateway: Gateway, upstreams: Upstreams, status: str) -> None:
    async def get(_request: Any, context: Any) -> job_pb2.Job:
        await context.send_initial_metadata((("x-http-status", status),))
        return job_pb2.Job(id="ftjob-1")

    upstreams.on("GetJob", get)

    answer = await gateway.client.get("/api/v1/fine-tuning/jobs/ftjob-1")

    assert (answer.status_code, answer.json()["id"]) == (200, "ftjob-1")


async def test_ndjson_lines_come_one_by_one(gateway: Gateway, upstreams: Upstreams) -> None:
    may_go_on = asyncio.Queue[None]()

    async def tail(_request: Any, context: Any) -> AsyncIterator[Any]:
        await context.send_initial_metadata((("x-http-content-type", "application/x-ndjson"),))
        for number in range(3):
            log = fine_tuning_service_pb2.Log(message=f"line {number}\n“ü”")
            yield fine_tuning_service_pb2.LogLines(logs=[log])
            await may_go_on.get()  # the next line is made only after the client has this one

    upstreams.on("TailJob", tail)

    async with gateway.client.stream("GET", "/fine_tuning/jobs/tail", params={"job_id": "j1"}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert answer.headers["transfer-encoding"] == "chunked"
        seen = []
        async with asyncio.timeout(20):
            async for line in answer.aiter_lines():
                seen.append(json.loads(line))
                may_go_on.put_nowait(None)

    assert seen == [{"logs": [{"message": f"line {number}\n“ü”"}]} for number in range(3)]
    assert upstreams.last.request.job_id == "j1"


async def test_lines_that_fail_before_the_first_are_one_error(gateway: Gateway, upstreams: Upstreams) -> None:
    async def tail(_request: Any, context: Any) -> AsyncIterator[Any]:
        await context.send_initial_metadata((("x-http-content-type", "application/x-ndjson"),))
        if not context.cancelled():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "10.0.0.7 refuses")
        yield fine_tuning_service_pb2.LogLines()

    upstreams.on("TailJob", tail)

    answer = await gateway.client.get("/fine_tuning/jobs/tail", params={"job_id": "j1"})

    (line,) = answer.text.splitlines()
    error = json.loads(line)["error"]
    assert (error["type"], error["code"]) == ("server_error", "unavailable")
    assert "10.0.0.7" not in line


async def test_a_tail_that_nobody_reads_any_more_is_ended(gateway: Gateway, upstreams: Upstreams) -> None:
    ended = asyncio.Event()

    async def tail(_request: Any, _context: Any) -> AsyncIterator[Any]:
        try:
            yield fine_tuning_service_pb2.LogLines()
            await asyncio.Event().wait()
        finally:
            ended.set()

    upstreams.on("TailJob", tail)

    async with gateway.client.stream("GET", "/fine_tuning/jobs/tail", params={"job_id": "j1"}) as answer:
        await anext(answer.aiter_bytes())
    async with asyncio.timeout(20):
        await ended.wait()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GetJobFile", "/fine_tuning/jobs/j1/files/a/b%20c.tar"),
        ("DownloadFineTunedModel", "/api/v1/fine-tuning/models/m1/artifact"),
    ],
)
async def test_a_file_keeps_its_own_content_type_and_bytes(
    gateway: Gateway, upstreams: Upstreams, method: str, path: str
) -> None:
    content = bytes(range(256)) * 4096 * 3

    async def send(_request: Any, context: Any) -> AsyncIterator[Any]:
        await context.send_initial_metadata((("content-disposition", 'attachment; filename="a.tar"'),))
        for at in range(0, len(content), 500_000):
            part = content[at : at + 500_000]
            yield httpbody_pb2.HttpBody(content_type="application/x-tar", data=part)

    upstreams.on(method, send)

    answer = await gateway.client.get(path)

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-disposition"] == 'attachment; filename="a.tar"'
    assert answer.content == content
    if method == "GetJobFile":
        assert (upstreams.last.request.job_id, upstreams.last.request.path) == ("j1", "a/b c.tar")


@pytest.mark.parametrize("body", [b"", b"{}", b' {"unknown": 1} ', b'{"jobId": "other"}'])
async def test_cancel_takes_a_body_or_none(gateway: Gateway, upstreams: Upstreams, body: bytes) -> None:
    answer = await gateway.client.post("/api/v1/fine-tuning/jobs/ftjob-1/cancel", content=body)

    assert answer.status_code == 200
    assert (upstreams.last.method, upstreams.last.request.job_id) == ("CancelJob", "ftjob-1")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/api/v1/fine-tuning/datasets/mine", {"dataset_id": "other"}),
        ("DELETE", "/api/v1/fine-tuning/models/mine", {"model_id": "other"}),
        ("GET", "/api/v1/fine-tuning/jobs/mine", {"job_id": "other"}),
        ("POST", "/api/v1/fine-tuning/jobs/mine/cancel", {"job_id": "other"}),
        ("GET", "/fine_tuning/jobs/status?job_id=mine", {"job_id": "other"}),
        ("GET", "/fine_tuning/jobs/mine/files/log.txt", {"path": "other"}),
    ],
)
async def test_a_body_never_names_another_resource_than_the_path(
    gateway: Gateway, upstreams: Upstreams, method: str, path: str, body: dict[str, str]
) -> None:
    answer = await gateway.client.request(method, path, json=body)

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert upstreams.calls == []


async def test_query_parameters(gateway: Gateway, upstreams: Upstreams) -> None:
    answer = await gateway.client.get("/api/v1/fine-tuning/jobs?limit=7&offset=3&")
    assert answer.status_code == 200
    assert (upstreams.last.request.limit, upstreams.last.request.offset) == (7, 3)

    answer = await gateway.client.get("/fine_tuning/jobs/status?job_id=a+b%20c%2Fd=\u00e4")
    assert answer.status_code == 200
    assert upstreams.last.request.job_id == "a b c/d=\u00e4"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("GET /api/v1/fine-tuning/jobs?limt=1", "`limt` is not known here; those known are limit, offset."),
        ("GET /api/v1/fine-tuning/jobs?Limit=1", "`Limit` is not known"),
        ("GET /api/v1/fine-tuning/jobs?limit=1&limit=2", "`limit` is there twice"),
        ("GET /api/v1/fine-tuning/jobs?limit", "`limit` has no value"),
        ("GET /api/v1/fine-tuning/jobs?=1", "`` is not known"),
        ("GET /api/v1/fine-tuning/jobs?%22%0a=1&limit=2", "`%22%0a` is not known"),
        ("GET /api/v1/fine-tuning/jobs/?limt=1", "`limt` is not known"),
        ("POST /api/v1/fine-tuning/jobs?priority=5", "`priority` is not known here; none is known."),
        ("POST /api/v1/fine-tuning/jobs?data=e30", "`data` is not known"),
        ("POST /api/v1/fine-tuning/datasets?name=foo", "`name` is not known"),
        ("DELETE /api/v1/fine-tuning/datasets/mine?dataset_id=other", "`dataset_id` is not known"),
        ("DELETE /api/v1/fine-tuning/datasets/mine?datasetId=other", "`datasetId` is not known"),
        ("DELETE /api/v1/fine-tuning/models/mine?model_id=other", "`model_id` is not known"),
        ("GET /api/v1/fine-tuning/jobs/mine?job_id=other", "`job_id` is not known"),
        ("POST /api/v1/fine-tuning/jobs/mine/cancel?job_id=other", "`job_id` is not known"),
        ("GET /fine_tuning/jobs/mine/files/log.txt?path=other", "`path` is not known"),
        (
            "DELETE /api/v1/keys/tnry_mine?key_id=tnry_other",
            "`key_id` is not known here; those known are account_id.",
        ),
        ("GET /fine_tuning/jobs/status?job_id=a&job_id=b", "`job_id` is there twice"),
    ],
)
async def test_a_query_parameter_that_a_call_does_not_take_is_refused(
    gateway: Gateway, upstreams: Upstreams, call: str, told: str
) -> None:
    for content_type in ("application/json", "application/grpc-json"):
        answer = await gateway.client.request(*call.split(), headers={"content-type": content_type})

        error = answer.json()["error"]
        assert answer.status_code == 400
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
        assert told in error["message"]
    assert upstreams.calls == []


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/api/v1/fine-tuning/jobs/%ff", b"text/plain"),
        ("/api/v1/fine-tuning/jobs/%c3%28", b"text/plain"),
        ("/api/v1/fine-tuning/jobs/%ed%a0%80", b"text/plain"),
        ("/api/v1/fine-tuning/jobs/%e0%c3%a9%80", b"text/plain"),
        ("/fine_tuning/jobs/status?job_id=%ff", b"text/plain"),
        ("/fine_tuning/jobs/status?job_id=x", b"\xff\xfe"),
    ],
)
async def test_what_is_not_utf8_is_refused(
    gateway: Gateway, upstreams: Upstreams, path: str, content_type: bytes
) -> None:
    answer = await gateway.client.get(path, headers={b"content-type": content_type})

    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert "not UTF-8" in error["message"]
    assert upstreams.calls == []


@pytest.mark.parametrize("path", ["/api/v1/fine-tuning/datasets", "/api/v1/fine-tuning/jobs"])
async def test_a_body_that_is_packed_is_refused(gateway: Gateway, upstreams: Upstreams, path: str) -> None:
    for encoding in ("gzip", "GZIP, identity", "br"):
        answer = await gateway.client.post(path, content=b"{}", headers={"content-encoding": encoding})

        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
        assert "Content-Encoding" in answer.json()["error"]["message"]
    assert upstreams.calls == []
    assert (await gateway.client.post(path, headers={"content-encoding": "Identity"})).status_code == 200


@pytest.mark.parametrize("text", ["é", "€", "퟿", "漢字", "🚀", "\U00040000", "\U0010ffff"])
async def test_any_text_may_be_in_a_path(gateway: Gateway, upstreams: Upstreams, text: str) -> None:
    answer = await gateway.client.get(f"/api/v1/fine-tuning/jobs/{quote(text)}")

    assert answer.status_code == 200
    assert upstreams.last.request.job_id == text


@pytest.mark.parametrize("query", ["limit=abc", "limit=1.5", "limit=", "limit=%22%0a", "offset=99999999999"])
async def test_query_parameter_of_the_wrong_type_is_400(
    gateway: Gateway, upstreams: Upstreams, query: str
) -> None:
    answer = await gateway.client.get(f"/api/v1/fine-tuning/jobs?{query}")

    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert query.partition("=")[0] in error["message"]
    assert upstreams.calls == []


async def test_numbers_print_as_the_contracts_have_them(gateway: Gateway, upstreams: Upstreams) -> None:
    async def get(_request: Any, _context: Any) -> dataset_pb2.Dataset:
        return dataset_pb2.Dataset(id="ds-1", size_bytes=5_000_000_000)

    upstreams.on("GetDataset", get)

    answer = await gateway.client.get("/api/v1/fine-tuning/datasets/ds-1")

    assert answer.text == '{"id":"ds-1","name":"","size_bytes":5000000000,"row_count":0,"columns":[]}'


async def test_an_answer_that_is_too_large_is_500_in_the_envelope(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    async def get(_request: Any, _context: Any) -> job_pb2.Job:
        return job_pb2.Job(id="x" * 17 * 1024 * 1024)

    upstreams.on("GetJob", get)

    answer = await gateway.client.get("/api/v1/fine-tuning/jobs/ftjob-1")

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
