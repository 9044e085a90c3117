"""Where services are found, and which of them a channel calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc

from svc_kit.addresses import grpc_target, parse_addresses
from svc_kit.server import ASKED_AGAIN, connect
from svc_kit.tls import Tls
from tests.certificates import Authority
from tunery.account.v1 import key_service_pb2, key_service_pb2_grpc
from tunery.dataset.v1 import job_data_service_pb2  # noqa: F401
from tunery.job.v1 import credit_service_pb2, job_service_pb2, model_service_pb2  # noqa: F401
from tunery.trainer.v1 import worker_service_pb2, worker_service_pb2_grpc


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("127.0.0.1:7002", "127.0.0.1:7002"),
        ("job_svc:7002", "job_svc:7002"),
        ("[::1]:7002", "[::1]:7002"),
        ("127.0.0.1:1,127.0.0.2:2", "ipv4:127.0.0.1:1,127.0.0.2:2"),
        ("127.0.0.1:1, 127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2"),
        ("[::1]:1,[::2]:2", "ipv6:[::1]:1,[::2]:2"),
    ],
)
def test_addresses_are_one_or_several(text: str, target: str) -> None:
    assert grpc_target(text) == target


@pytest.mark.parametrize(
    "text", ["", ",", "host", "127.0.0.1:1,", "127.0.0.1:1,host:2", "a:1,b:2", "1.1.1.1:1,[::1]:1"]
)
def test_what_is_no_list_of_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not HOST:PORT|must be IP addresses of one version"):
        parse_addresses(text)


class CountingHealth(health_pb2_grpc.HealthServicer):
    """A service that knows how often it was asked."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        self.num_calls += 1
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def serving(health: CountingHealth, tls: Tls | None = None) -> AsyncIterator[str]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = (
        server.add_secure_port("127.0.0.1:0", tls.server_credentials())
        if tls
        else server.add_insecure_port("127.0.0.1:0")
    )
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def ask(channel: grpc.aio.Channel) -> None:
    request = health_pb2.HealthCheckRequest()
    await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)


@pytest.mark.parametrize("is_tls", [False, True])
async def test_replicas_share_the_calls_and_stand_in_for_each_other(tmp_path: Path, is_tls: bool) -> None:
    tls = Authority(tmp_path).issue("service") if is_tls else None
    first, second = CountingHealth(), CountingHealth()
    async with serving(first, tls) as address, AsyncExitStack() as others:
        other = await others.enter_async_context(serving(second, tls))
        async with connect(f"{address},{other}", tls) as channel, asyncio.timeout(20):
            while not (first.num_calls and second.num_calls):
                await ask(channel)
            await others.aclose()
            before = first.num_calls
            for _ in range(10):
                await ask(channel)
    assert first.num_calls == before + 10


async def test_a_certificate_for_another_host_is_not_believed(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    health = CountingHealth()
    async with serving(health, authority.issue("elsewhere", "192.0.2.1")) as address:
        for addresses in (address, f"{address},127.0.0.1:1"):
            async with connect(addresses, authority.issue("client")) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await ask(channel)
                assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    assert health.num_calls == 0


class EndsAtFirst(key_service_pb2_grpc.KeyServiceServicer, worker_service_pb2_grpc.WorkerServiceServicer):
    """Services that answer their first call as at their end."""

    def __init__(self, status: grpc.StatusCode) -> None:
        self.num_calls = 0
        self._status = status

    async def FindRevokedKeys(
        self, request: key_service_pb2.FindRevokedKeysRequest, context: grpc.aio.ServicerContext
    ) -> key_service_pb2.FindRevokedKeysResponse:
        await self._end(context)
        return key_service_pb2.FindRevokedKeysResponse()

    async def LeaseJob(
        self, request: worker_service_pb2.LeaseJobRequest, context: grpc.aio.ServicerContext
    ) -> worker_service_pb2.LeaseJobResponse:
        await self._end(context)
        return worker_service_pb2.LeaseJobResponse()

    async def _end(self, context: grpc.aio.ServicerContext) -> None:
        self.num_calls += 1
        if self.num_calls == 1:
            await context.abort(self._status)


def test_what_is_asked_again_is_there() -> None:
    pool = descriptor_pool.Default()
    for service, method in ASKED_AGAIN:
        assert pool.FindMethodByName(f"{service}.{method}")


@pytest.mark.parametrize("status", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE])
async def test_what_may_be_done_twice_is_asked_again_and_nothing_else(status: grpc.StatusCode) -> None:
    service = EndsAtFirst(status)
    server = grpc.aio.server()
    key_service_pb2_grpc.add_KeyServiceServicer_to_server(service, server)
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect(f"127.0.0.1:{port}") as channel:
            keys = key_service_pb2_grpc.KeyServiceStub(channel)
            await keys.FindRevokedKeys(key_service_pb2.FindRevokedKeysRequest(), timeout=10)
            assert service.num_calls == 2

            service.num_calls = 0
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await worker_service_pb2_grpc.WorkerServiceStub(channel).LeaseJob(
                    worker_service_pb2.LeaseJobRequest(), timeout=10
                )
    finally:
        await server.stop(None)
    assert raised.value.code() == status
    assert service.num_calls == 1
