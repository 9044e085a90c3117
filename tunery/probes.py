"""Asks the stack's processes whether they are well."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from svc_kit.tls import Tls
from tunery.stack import Stack

Probe = Callable[[], Awaitable[bool]]
POLL_SECONDS = 0.05
_ANSWER_SECONDS = 2.0
# Behind these two stand the auth check, dataset_svc and job_svc: the whole way that a request takes.
_GATEWAY_PATHS = ("/api/v1/fine-tuning/datasets", "/api/v1/fine-tuning/jobs?limit=1")


class Probes:
    """One probe for each process of a stack; true is well. Each fails by returning false.

    Attributes:
        is_key_refused: whether the gateway answers, but not to the key in the stack's credentials.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.is_key_refused = False
        self._http = httpx.AsyncClient(timeout=_ANSWER_SECONDS, trust_env=False)
        self._channels = {
            name: _channel(address, stack.tls) for name, address in stack.grpc_addresses.items()
        }

    async def close(self) -> None:
        """Closes every connection."""
        await self._http.aclose()
        for channel in self._channels.values():
            await channel.close()

    def by_process(self) -> Mapping[str, Probe]:
        """Returns the probes by the names of their processes."""
        probes: dict[str, Probe] = {
            name: self._grpc_probe(channel) for name, channel in self._channels.items()
        }
        probes["gateway"] = self._gateway_is_well
        if self._stack.embedded_s3:
            probes["s3"] = self._s3_is_well
        return probes

    def _grpc_probe(self, channel: grpc.aio.Channel) -> Probe:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # its types lack it

        async def probe() -> bool:
            try:
                answer = await check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        return probe

    async def _gateway_is_well(self) -> bool:
        credentials = self._stack.credentials
        headers = {"authorization": f"Bearer {credentials.api_key}"}
        try:
            answers = [
                await self._http.get(f"{credentials.url}{path}", headers=headers) for path in _GATEWAY_PATHS
            ]
        except httpx.TransportError:
            return False
        statuses = {answer.status_code for answer in answers}
        self.is_key_refused = statuses == {httpx.codes.UNAUTHORIZED}
        return self.is_key_refused or statuses == {httpx.codes.OK}

    async def _s3_is_well(self) -> bool:
        assert self._stack.embedded_s3
        try:
            answer = await self._http.get(self._stack.embedded_s3.endpoint)
        except httpx.TransportError:
            return False
        # Refused for want of a signature: it serves, and guards.
        return answer.status_code == httpx.codes.FORBIDDEN


async def wait_until_well(probe: Probe) -> None:
    """Returns when the probe first says so."""
    while not await probe():  # noqa: ASYNC110  # another process's state: there is nothing to wait on
        await asyncio.sleep(POLL_SECONDS)


def _channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    options = (
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 200),
        ("grpc.enable_http_proxy", 0),
    )
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options)
