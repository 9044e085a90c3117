"""How much a request may carry, and how a refusal reaches the client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from svc_kit.errors import MalformedFile
from tests.integration.gateway.raw_http import exchange
from tests.integration.gateway.stack import FIRST_KEY, MAX_UPLOAD_BYTES, Gateway, run_gateway
from tests.integration.gateway.upstreams import Upstreams
from tunery.dataset.v1 import dataset_pb2, dataset_service_pb2, dataset_service_pb2_grpc
from tunery.job.v1 import job_service_pb2, job_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

MIB = 1024 * 1024
AUTHORIZATION = (("authorization", f"Bearer {FIRST_KEY}"),)
UPLOADS = {
    "/api/v1/fine-tuning/datasets": "UploadCsvForm",
    "/api/v1/fine-tuning/datasets/": "UploadCsvForm",
    "/fine_tuning/datasets": "UploadDialogsForm",
}


async def collect(parts: Any, context: Any) -> dataset_pb2.Dataset:
    """Answers an upload with what came of it."""
    sizes, content_types = [], []
    async for part in parts:
        sizes.append(len(part.data))
        content_types.append(part.content_type)
    await context.send_initial_metadata((("x-http-status", "201"),))
    return dataset_pb2.Dataset(
        id="ds-1", size_bytes=sum(sizes), row_count=max(sizes), name=next(filter(None, content_types))
    )


def pieces(num_bytes: int) -> Iterator[bytes]:
    for at in range(0, num_bytes, 100_000):
        yield b"x" * min(100_000, num_bytes - at)


async def chunks(num_bytes: int) -> AsyncIterator[bytes]:
    for piece in pieces(num_bytes):
        yield piece


def post(gateway: Gateway, path: str, body: Any) -> httpx.Response:
    """Posts with the blocking client: while it writes, the asynchronous one doesn't look for an answer,
    and loses it when the gateway closes the connection."""
    return httpx.post(
        f"{gateway.url}{path}", content=body, headers={"authorization": f"Bearer {FIRST_KEY}"}, timeout=30
    )


@pytest.mark.parametrize(("path", "method"), UPLOADS.items())
async def test_upload_up_to_the_limit_arrives_whole(
    gateway: Gateway, upstreams: Upstreams, path: str, method: str
) -> None:
    upstreams.on(method, collect)

    answer = await gateway.client.post(path, files={"file": ("a.csv", b"x" * MAX_UPLOAD_BYTES)})

    assert answer.status_code == 201
    body = answer.json()
    assert MAX_UPLOAD_BYTES < body["size_bytes"] < MAX_UPLOAD_BYTES + 1000
    assert body["row_count"] <= MIB
    assert body["name"].startswith("multipart/form-data; boundary=")
    assert upstreams.last.method == method


@pytest.mark.parametrize(("path", "method"), UPLOADS.items())
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_upload_over_the_limit_is_413(
    gateway: Gateway, upstreams: Upstreams, path: str, method: str, is_chunked: bool
) -> None:
    upstreams.on(method, collect)
    body = pieces(3 * MAX_UPLOAD_BYTES) if is_chunked else b"x" * 3 * MAX_UPLOAD_BYTES

    answer = await asyncio.to_thread(post, gateway, path, body)

    assert answer.status_code == 413
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "payload_too_large")


@pytest.mark.parametrize("transfer", ["known length", "chunked"])
@pytest.mark.parametrize("refused_by", ["gateway", "service"])
async def test_refusal_in_the_middle_of_an_upload_reaches_curl(
    gateway: Gateway, upstreams: Upstreams, tmp_path: Path, transfer: str, refused_by: str
) -> None:
    if refused_by == "service":

        async def refuse(parts: Any, _context: Any) -> None:
            await anext(aiter(parts))
            raise MalformedFile("line 2, column 3: not closed")

        upstreams.on("UploadCsvForm", refuse)
        size_bytes, expected = MAX_UPLOAD_BYTES, (400, "malformed_file")
    else:
        upstreams.on("UploadCsvForm", collect)
        size_bytes, expected = 20 * MIB, (413, "payload_too_large")
    file = tmp_path / "big.csv"
    file.write_bytes(b"x" * size_bytes)
    options = {
        "known length": [],
        "chunked": ["-H", "transfer-encoding: chunked"],
    }[transfer]

    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", *options, "-H", f"authorization: Bearer {FIRST_KEY}", "-F", f"file=@{file}",
        "-w", "\n%{http_code}", f"{gateway.url}/api/v1/fine-tuning/datasets",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, complaint = await process.communicate()

    body, _, status = output.decode().rpartition("\n")
    assert (process.returncode, complaint) == (0, b"")
    assert (int(status), json.loads(body)["error"]["code"]) == expected


async def test_upload_without_a_key_is_refused_before_its_body(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    answer = await gateway.client.post(
        "/fine_tuning/datasets", content=chunks(100_000), headers={"authorization": ""}
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert upstreams.calls == []


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/fine-tuning/jobs",
        "/fine_tuning/jobs/submit",
        "/fine_tuning/jobs/cancel",
        "/v1/chat/completions",
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_json_bodies_end_at_1_mib(
    gateway: Gateway, upstreams: Upstreams, path: str, is_chunked: bool
) -> None:
    def body(num_bytes: int) -> Any:
        return chunks(num_bytes) if is_chunked else b"x" * num_bytes

    assert (await gateway.client.post(path, content=body(MIB))).status_code == 200
    assert len(upstreams.last.request.data) == MIB
    upstreams.calls.clear()

    over = pieces(MIB + 1) if is_chunked else b"x" * (MIB + 1)
    answer = await asyncio.to_thread(post, gateway, path, over)

    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
    assert upstreams.calls == []


async def test_other_methods_of_an_upload_path_have_the_limit_for_json(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    answer = await gateway.client.request("PUT", "/fine_tuning/datasets", content=b"x" * 2 * MIB)

    assert answer.status_code == 413


async def test_native_upload_over_1_mib(gateway: Gateway, upstreams: Upstreams) -> None:
    async def take(parts: Any, _context: Any) -> dataset_pb2.Dataset:
        sizes = [len(part.chunk) async for part in parts]
        return dataset_pb2.Dataset(size_bytes=sum(sizes))

    async def parts(num_chunks: int) -> AsyncIterator[dataset_service_pb2.UploadDatasetRequest]:
        yield dataset_service_pb2.UploadDatasetRequest(header=dataset_service_pb2.UploadHeader())
        for _ in range(num_chunks):
            yield dataset_service_pb2.UploadDatasetRequest(chunk=b"x" * MIB)

    upstreams.on("UploadDataset", take)
    stub = dataset_service_pb2_grpc.DatasetServiceStub(gateway.channel)

    made = await stub.UploadDataset(parts(3), metadata=AUTHORIZATION)
    assert made.size_bytes == 3 * MIB


async def test_native_upload_over_the_limit(gateway: Gateway, upstreams: Upstreams) -> None:
    def upload() -> grpc.RpcError:
        # The blocking client: grpc.aio shows a refusal that meets its writing as INTERNAL.
        with grpc.insecure_channel(gateway.address) as channel:
            stub = dataset_service_pb2_grpc.DatasetServiceStub(channel)
            chunk = dataset_service_pb2.UploadDatasetRequest(chunk=b"x" * MIB)
            with pytest.raises(grpc.RpcError) as raised:
                stub.UploadDataset(iter([chunk] * 20), metadata=AUTHORIZATION)
        return raised.value

    error: Any = await asyncio.to_thread(upload)

    assert error.code() == grpc.StatusCode.OUT_OF_RANGE
    assert "over the limit" in error.details()


async def test_native_unary_body_ends_at_1_mib(gateway: Gateway, upstreams: Upstreams) -> None:
    stub = job_service_pb2_grpc.JobServiceStub(gateway.channel)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GetJob(job_service_pb2.GetJobRequest(job_id="x" * 2 * MIB), metadata=AUTHORIZATION)

    assert raised.value.code() == grpc.StatusCode.OUT_OF_RANGE
    assert upstreams.calls == []


async def test_headers_that_never_end_are_408(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, request_headers_timeout_seconds=0.2) as gateway:
        answer = await exchange(gateway, b"GET /healthz HTTP/1.1\r\nhost: x\r\n")

    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (408, "request_timeout")
    assert answer.headers["content-type"] == "application/json"
