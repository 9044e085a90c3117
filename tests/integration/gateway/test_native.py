"""Native gRPC, health and reflection on the port that REST has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gateway import routes
from tests.integration.gateway.stack import FIRST_KEY, Gateway
from tests.integration.gateway.upstreams import Upstreams
from tunery.dataset.v1 import dataset_service_pb2, dataset_service_pb2_grpc
from tunery.inference.v1 import chat_service_pb2_grpc
from tunery.job.v1 import (
    credit_service_pb2,
    credit_service_pb2_grpc,
    fine_tuning_service_pb2,
    fine_tuning_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

AUTHORIZATION = (("authorization", f"Bearer {FIRST_KEY}"),)


async def test_a_message_that_grows_when_it_is_unpacked_is_refused(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    async with grpc.aio.insecure_channel(gateway.address, compression=grpc.Compression.Gzip) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetJob(job_service_pb2.GetJobRequest(job_id="x" * 20_000_000), metadata=AUTHORIZATION)

    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert upstreams.calls == []


async def test_every_public_service_is_routed(gateway: Gateway, upstreams: Upstreams) -> None:
    channel, metadata = gateway.channel, AUTHORIZATION
    await dataset_service_pb2_grpc.DatasetServiceStub(channel).ListDatasets(
        dataset_service_pb2.ListDatasetsRequest(), metadata=metadata
    )
    await job_service_pb2_grpc.JobServiceStub(channel).CreateJob(
        job_service_pb2.CreateJobRequest(suffix="s"), metadata=metadata
    )
    await fine_tuning_service_pb2_grpc.FineTuningServiceStub(channel).SubmitJob(
        fine_tuning_service_pb2.Config(), metadata=metadata
    )
    await model_service_pb2_grpc.ModelServiceStub(channel).ListBaseModels(
        model_service_pb2.ListBaseModelsRequest(), metadata=metadata
    )
    await credit_service_pb2_grpc.CreditServiceStub(channel).GetCredits(
        credit_service_pb2.GetCreditsRequest(), metadata=metadata
    )
    await chat_service_pb2_grpc.ChatServiceStub(channel).CreateChatCompletion(
        httpbody_pb2.HttpBody(data=b"{}"), metadata=metadata
    )

    methods = [call.method for call in upstreams.calls]
    assert methods == [
        "ListDatasets", "CreateJob", "SubmitJob", "ListBaseModels", "GetCredits", "CreateChatCompletion",
    ]  # fmt: skip
    assert {call.identity.kind for call in upstreams.calls} == {"account"}


async def test_unknown_method_of_a_public_service(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await gateway.channel.unary_unary("/tunery.job.v1.JobService/NoSuchMethod")(
            b"", metadata=AUTHORIZATION
        )

    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_are_no_message(gateway: Gateway, upstreams: Upstreams) -> None:
    call = gateway.channel.unary_unary("/tunery.job.v1.JobService/GetJob")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(b"\xff", metadata=(("authorization", f"Bearer {FIRST_KEY}"),))
    assert raised.value.code() == grpc.StatusCode.UNKNOWN  # as docs/grpc.md says
    assert upstreams.calls == []


async def test_tail_logs_streams_one_by_one_and_ends_when_cancelled(
    gateway: Gateway, upstreams: Upstreams
) -> None:
    may_go_on = asyncio.Queue[None]()
    ended = asyncio.Event()

    async def tail(_request: Any, _context: Any) -> AsyncIterator[Any]:
        try:
            for seq in range(1, 1000):
                yield job_pb2.LogRecord(seq=seq)
                await may_go_on.get()
        finally:
            ended.set()

    upstreams.on("TailLogs", tail)
    call = job_service_pb2_grpc.JobServiceStub(gateway.channel).TailLogs(
        job_service_pb2.TailLogsRequest(job_id="j1", after_seq=7), metadata=AUTHORIZATION
    )

    async with asyncio.timeout(20):
        for seq in (1, 2, 3):
            assert (await call.read()).seq == seq
            may_go_on.put_nowait(None)
        call.cancel()
        may_go_on.put_nowait(None)
        await ended.wait()
    assert upstreams.last.request.after_seq == 7


async def test_a_status_after_messages_arrives(gateway: Gateway, upstreams: Upstreams) -> None:
    async def tail(_request: Any, context: Any) -> AsyncIterator[Any]:
        yield job_pb2.LogRecord(seq=1)
        await context.abort(grpc.StatusCode.ABORTED, "cut off")

    upstreams.on("TailLogs", tail)
    call = job_service_pb2_grpc.JobServiceStub(gateway.channel).TailLogs(
        job_service_pb2.TailLogsRequest(), metadata=AUTHORIZATION
    )

    assert (await call.read()).seq == 1
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.ABORTED, "cut off")


async def test_metadata_of_a_native_answer_is_left_alone(gateway: Gateway, upstreams: Upstreams) -> None:
    async def create(_request: Any, context: Any) -> job_pb2.Job:
        await context.send_initial_metadata((("x-http-status", "204"), ("x-own", "1")))
        context.set_trailing_metadata((("x-trailer", "2"),))
        return job_pb2.Job(id="ftjob-1")

    upstreams.on("CreateJob", create)
    call = job_service_pb2_grpc.JobServiceStub(gateway.channel).CreateJob(
        job_service_pb2.CreateJobRequest(), metadata=AUTHORIZATION
    )

    assert (await call).id == "ftjob-1"
    initial = {item[0]: item[1] for item in await call.initial_metadata()}
    assert initial["x-own"] == "1"
    assert "x-http-status" not in initial
    assert dict(iter(await call.trailing_metadata()))["x-trailer"] == "2"


async def test_health_needs_no_key(gateway: Gateway) -> None:
    stub = health_pb2_grpc.HealthStub(gateway.channel)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))

    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_needs_no_key(gateway: Gateway) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(gateway.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")

    answers = [answer async for answer in stub.ServerReflectionInfo(iter([question]))]

    names = {service.name for service in answers[0].list_services_response.service}
    assert "tunery.job.v1.JobService" in names


async def test_what_needs_no_key_has_a_rate(gateway: Gateway) -> None:
    health = health_pb2_grpc.HealthStub(gateway.channel)
    request = health_pb2.HealthCheckRequest()

    watches = [health.Watch(request) for _ in range(routes.OPEN_BURST + 30)]
    answers = await asyncio.gather(*(watch.read() for watch in watches), return_exceptions=True)
    for watch in watches:
        watch.cancel()

    refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert 0 < len(refused) <= 30
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    # A way of its own for each.
    stub = job_service_pb2_grpc.JobServiceStub(gateway.channel)
    await stub.ListJobs(job_service_pb2.ListJobsRequest(), metadata=AUTHORIZATION)
