"""A service's gRPC server: health, reflection, let-in rules, and an orderly end."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from svc_kit.addresses import grpc_target
from svc_kit.identity import Kind, Verifier
from svc_kit.interceptors import ServingInterceptor
from svc_kit.open_streams import OpenStreams
from svc_kit.tls import Tls

log = structlog.get_logger(__name__)

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
DRAIN_SECONDS = 3

# As much as Envoy takes and more; gRPC's own limits begin to refuse at 8 KiB.
MAX_METADATA_BYTES = 128 * 1024
_SIZE_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
)
# A peer that vanished without a word is noticed within a minute, and calls that wait for it end.
_PING_MS = 20_000
_PING_ANSWER_MS = 20_000
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZE_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second process on the port is an error, not a load balancer
    # Pings as often as channels send them are welcome.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_MS // 2),
)
# Quick calls between services, which may be done twice, as their protos say. They are asked again where a
# server is at its end, of which it tells in either way. Trainers try again by themselves.
ASKED_AGAIN = (
    ("tunery.account.v1.KeyService", "FindRevokedKeys"),
    ("tunery.dataset.v1.JobDataService", "HoldJobData"),
    ("tunery.dataset.v1.JobDataService", "ReleaseJobData"),
    ("tunery.job.v1.CreditAccountService", "OpenCreditAccount"),
    ("tunery.job.v1.JobLifeService", "FilterLiveJobs"),
    ("tunery.job.v1.ModelArtifactService", "FindModelArtifact"),
)
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": service, "method": method} for service, method in ASKED_AGAIN],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["CANCELLED", "UNAVAILABLE"],
            },
        }
    ],
}
CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    *_SIZE_OPTIONS,
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # A service that was restarted is found again within a second, not after gRPC's usual 20.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", _PING_ANSWER_MS),
    ("grpc.http2.max_pings_without_data", 0),
    # A proxy configured for the way out must not be asked for the stack's own services.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True)
class ServedService:
    """A servicer with the kinds of callers that it is for.

    Attributes:
        name: the service's full name, such as `tunery.job.v1.JobService`.
        servicer: the implementation.
        register: the generated `add_..._to_server`.
        allow: who may call it.
    """

    name: str
    servicer: Any
    register: Callable[[Any, Any], None]
    allow: frozenset[Kind]


def make_server(
    services: Sequence[ServedService],
    verifier: Verifier,
    reflected: Sequence[str] = (),
    streams: OpenStreams | None = None,
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """Makes a server that serves `services`, health and reflection; it listens nowhere yet.

    Args:
        services: what to serve.
        verifier: checks callers' tokens.
        reflected: further services that reflection describes, served elsewhere.
        streams: ends those whose API key is taken back; None for a server that streams nothing to accounts.
    """
    allow = {service.name: service.allow for service in services}
    interceptor = ServingInterceptor(verifier, allow, streams)
    server = grpc.aio.server(
        interceptors=[interceptor],
        options=SERVER_OPTIONS,
    )
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    for service in services:
        service.register(service.servicer, server)
    names = [service.name for service in services if "account" in service.allow]
    reflection.enable_server_reflection(
        sorted({*names, *reflected, health.SERVICE_NAME, reflection.SERVICE_NAME}), server
    )
    return server, health_servicer


def connect(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """Returns a channel to another service of the stack; it connects when first used.

    Args:
        address: of the service, or of its replicas, with commas between: those that are well share the calls.
        tls: what this process shows and believes; None where services speak no TLS. Replicas' certificates
            must be good for the host of the first.
    """
    target = grpc_target(address)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
    # Of several addresses gRPC would make one name that no certificate has.
    authority = ("grpc.default_authority", address.partition(",")[0])
    return grpc.aio.secure_channel(target, tls.channel_credentials(), options=(*CHANNEL_OPTIONS, authority))


async def serve(
    server: grpc.aio.Server,
    health_servicer: health.aio.HealthServicer,
    listen: str,
    background: Sequence[Coroutine[Any, Any, None]] = (),
    tls: Tls | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, then lets calls end for `DRAIN_SECONDS`.

    Args:
        server: from `make_server`.
        health_servicer: from `make_server`.
        listen: HOST:PORT to bind.
        background: works that go on beside the calls. None of them ends by itself; one that fails ends the
            service, so that whoever supervises it starts it again.
        tls: what this process shows and believes; None: it speaks no TLS.

    Raises:
        RuntimeError: the address can't be bound.
        Exception: what a work in the background failed with.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if tls is None:
        port = server.add_insecure_port(listen)
    else:
        port = server.add_secure_port(listen, tls.server_credentials())
    await server.start()
    await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    log.info("serving", listen=listen, port=port)
    # What was imported stays for good: without it a look for garbage is quick, and so comes often.
    gc.collect()
    gc.freeze()
    works = [asyncio.create_task(work) for work in background]
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, *works], return_when=asyncio.FIRST_COMPLETED)
    failed = [work for work in works if work.done()]
    for work in (stopping, *works):
        work.cancel()
    await health_servicer.enter_graceful_shutdown()
    await server.stop(DRAIN_SECONDS)
    await asyncio.gather(stopping, *works, return_exceptions=True)
    log.info("stopped")
    for work in failed:
        work.result()
