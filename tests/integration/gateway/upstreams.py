"""Doubles of the services behind the gateway: real gRPC servers whose answers a test chooses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor

from svc_kit.identity import Identity, Verifier, current_identity
from svc_kit.server import ServedService, make_server
from tunery.dataset.v1 import dataset_service_pb2, job_data_service_pb2
from tunery.inference.v1 import chat_service_pb2
from tunery.job.v1 import credit_service_pb2, fine_tuning_service_pb2, job_service_pb2, model_service_pb2
from tunery.trainer.v1 import worker_service_pb2

Handler = Callable[[Any, grpc.aio.ServicerContext], Any]

DESCRIPTORS: dict[str, tuple[ServiceDescriptor, ...]] = {
    "dataset_svc": (
        dataset_service_pb2.DESCRIPTOR.services_by_name["DatasetService"],
        job_data_service_pb2.DESCRIPTOR.services_by_name["JobDataService"],
    ),
    "job_svc": (
        job_service_pb2.DESCRIPTOR.services_by_name["JobService"],
        fine_tuning_service_pb2.DESCRIPTOR.services_by_name["FineTuningService"],
        model_service_pb2.DESCRIPTOR.services_by_name["ModelService"],
        model_service_pb2.DESCRIPTOR.services_by_name["ModelArtifactService"],
        credit_service_pb2.DESCRIPTOR.services_by_name["CreditService"],
        credit_service_pb2.DESCRIPTOR.services_by_name["CreditAccountService"],
        worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"],
    ),
    "inference_svc": (chat_service_pb2.DESCRIPTOR.services_by_name["ChatService"],),
}


@dataclass(frozen=True)
class Call:
    """A call that reached a double."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    identity: Identity


@dataclass
class Upstreams:
    """What the doubles answer, and what they were asked.

    A method without a handler answers with its empty message; a stream with no message at all.
    """

    handlers: dict[str, Handler] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def reset(self) -> None:
        self.handlers.clear()
        self.calls.clear()

    def on(self, method: str, handler: Handler) -> None:
        """Sets a method's answer: a coroutine function, or an async generator function for a stream."""
        self.handlers[method] = handler

    def fails(self, method: str, error: Exception) -> None:
        async def fail(_request: Any, _context: Any) -> None:
            raise error

        async def fail_stream(_request: Any, _context: Any) -> AsyncIterator[Any]:
            raise error
            yield

        streams = {
            m.name for group in DESCRIPTORS.values() for s in group for m in s.methods if m.server_streaming
        }
        self.on(method, fail_stream if method in streams else fail)

    def note(self, method: str, request: Any, context: grpc.aio.ServicerContext) -> None:
        metadata = {item[0]: item[1] for item in context.invocation_metadata() or ()}
        self.calls.append(Call(method, request, metadata, current_identity()))

    @property
    def last(self) -> Call:
        return self.calls[-1]


def make_upstream(name: str, upstreams: Upstreams, verifier: Verifier) -> grpc.aio.Server:
    """Returns the server of one double, with the interceptor that the services have."""
    everyone = frozenset({"account", "authz", "job_svc", "trainer", "inference_svc"})
    services = [
        ServedService(
            descriptor.full_name, _servicer(descriptor, upstreams), _registrar(descriptor), everyone
        )
        for descriptor in DESCRIPTORS[name]
    ]
    server, _health = make_server(services, verifier)
    return server


def _servicer(service: ServiceDescriptor, upstreams: Upstreams) -> dict[str, Callable[..., Any]]:
    def unary(method: Any) -> Callable[..., Awaitable[Any]]:
        async def behaviour(request: Any, context: grpc.aio.ServicerContext) -> Any:
            upstreams.note(method.name, request, context)
            handler = upstreams.handlers.get(method.name)
            if handler is not None:
                return await handler(request, context)
            if method.client_streaming:
                async for _part in request:
                    pass
            return message_factory.GetMessageClass(method.output_type)()

        return behaviour

    def stream(method: Any) -> Callable[..., AsyncIterator[Any]]:
        async def behaviour(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            upstreams.note(method.name, request, context)
            handler = upstreams.handlers.get(method.name)
            if handler is not None:
                async for message in handler(request, context):
                    yield message

        return behaviour

    return {m.name: (stream(m) if m.server_streaming else unary(m)) for m in service.methods}


def _registrar(
    service: ServiceDescriptor,
) -> Callable[[dict[str, Callable[..., Any]], grpc.aio.Server], None]:
    def register(behaviours: dict[str, Callable[..., Any]], server: grpc.aio.Server) -> None:
        handlers = {}
        for method in service.methods:
            make = {
                (False, False): grpc.unary_unary_rpc_method_handler,
                (False, True): grpc.unary_stream_rpc_method_handler,
                (True, False): grpc.stream_unary_rpc_method_handler,
                (True, True): grpc.stream_stream_rpc_method_handler,
            }[(method.client_streaming, method.server_streaming)]
            handlers[method.name] = make(
                behaviours[method.name],
                request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
                response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
            )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    return register
