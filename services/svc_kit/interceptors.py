"""The one place where every rpc is let in and recorded, and where every exception becomes a status."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc
import structlog
import urllib3.exceptions
from google.protobuf import descriptor_pb2, descriptor_pool
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from minio.error import MinioException

from svc_kit.audit import AuditRecord
from svc_kit.database import DATABASE_AWAY
from svc_kit.errors import (
    ERROR_DOMAIN,
    PermissionDenied,
    TuneryError,
    Unauthenticated,
    Unavailable,
    table,
    to_status,
)
from svc_kit.identity import Identity, Kind, Scope, set_current_identity
from svc_kit.log import MAX_REQUEST_ID_CHARS, REQUEST_ID_HEADER, without_keys
from svc_kit.open_streams import OpenStreams

log = structlog.get_logger(__name__)

# Open to everyone: load balancers ask for health without a key, and the schema is public documentation.
OPEN_SERVICES = frozenset(
    {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)


# A trainer renews its lease every second; Envoy asks the auth check at every call.
_FREQUENT_CALLERS: frozenset[Kind] = frozenset({"trainer", "authz"})


class TokenVerifier(Protocol):
    def verify(self, token: str) -> Identity: ...


def from_rpc_error(error: grpc.aio.AioRpcError) -> TuneryError:
    """Returns what a service that was asked said, as an error of ours.

    A status without our `ErrorInfo` is the transport's: the service couldn't be reached.
    """
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # has all that a Call is asked for
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return _rebuild(info, error.details() or "")
    return Unavailable("A part of the service can't be reached for now; try again.")


def _rebuild(info: error_details_pb2.ErrorInfo, message: str) -> TuneryError:
    kind = next((row for row in table() if row.code == info.reason), TuneryError)
    details = {key: value for key, value in info.metadata.items() if key not in ("type", "http_status")}
    return kind(message, **details)


def as_tunery_error(error: Exception) -> TuneryError | None:
    """Returns the table's row for an exception, or None for one that nobody foresaw."""
    match error:
        case TuneryError():
            return error
        case grpc.aio.AioRpcError():
            return from_rpc_error(error)
        case error if isinstance(error, DATABASE_AWAY):
            return Unavailable("The database can't be reached for now; try again.")
        case MinioException() | urllib3.exceptions.HTTPError():
            return Unavailable("The object store can't be reached for now; try again.")
    return None


class ServingInterceptor(grpc.aio.ServerInterceptor):
    """Verifies the caller and its scope, records what may change something, turns exceptions into statuses.

    `allow` names, for each served service, the kinds of callers that are let in. A service that isn't
    named lets no one in. `streams` ends those whose API key is taken back; without it they go on.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        allow: Mapping[str, frozenset[Kind]],
        streams: OpenStreams | None = None,
    ) -> None:
        self._verifier = verifier
        self._allow = allow
        self._streams = streams

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        rpc = handler_call_details.method
        service = rpc.split("/")[1]
        if handler is None or service in OPEN_SERVICES:
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())

        @asynccontextmanager
        async def served(request: Any, context: Any) -> AsyncIterator[Callable[[Any], None]]:
            """Lets a call in or ends it with a status; gives a function that takes note of its response."""
            structlog.contextvars.clear_contextvars()
            started = time.monotonic()
            request_id = without_keys(str(metadata.get(REQUEST_ID_HEADER, ""))[:MAX_REQUEST_ID_CHARS]) or None
            structlog.contextvars.bind_contextvars(rpc=rpc, request_id=request_id)
            record = None
            result = "cancelled"
            try:
                identity = self._admit(service, str(metadata.get("authorization", "")))
                structlog.contextvars.bind_contextvars(caller=identity.kind)
                set_current_identity(identity)
                if identity.kind == "account" and not is_read(rpc):
                    record = AuditRecord(identity)
                    record.note(request)
                _check_scope(identity, rpc)
                yield record.note if record else lambda _response: None
                result = "ok"
                _log_answered(started)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                known = _known(error)
                if record:  # before the answer: who gets it may look for the record at once
                    record.write(known.code)
                    record = None
                if known.http_status < 500:
                    _log_answered(started, code=known.code)
                # The transcoder sends a response's status as soon as initial metadata comes, so none may
                # precede this.
                status = to_status(known)
                del known  # its traceback holds this frame
                await context.abort_with_status(status)
            finally:
                if record:
                    record.write(result)

        return _guarded(handler, served, self._streams)

    def _admit(self, service: str, authorization: str) -> Identity:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("The call carries no identity token.")
        identity = self._verifier.verify(token)
        if identity.kind not in self._allow.get(service, frozenset()):
            raise PermissionDenied(f"A caller of the kind {identity.kind} may not call {service}.")
        return identity


def _log_answered(started: float, **facts: Any) -> None:
    """Writes a line for a call that got its answer; for those that come several a second, if asked to."""
    is_frequent = structlog.contextvars.get_contextvars().get("caller") in _FREQUENT_CALLERS
    level = logging.DEBUG if is_frequent else logging.INFO
    log.log(level, "rpc answered", seconds=round(time.monotonic() - started, 4), **facts)


@functools.cache
def is_read(rpc: str) -> bool:
    """Tells whether an rpc, `/package.Service/Method`, changes nothing; its proto says so.

    Raises:
        KeyError: there is no such rpc.
    """
    method = descriptor_pool.Default().FindMethodByName(rpc[1:].replace("/", "."))
    level: int = method.GetOptions().idempotency_level
    return level == descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS


def _check_scope(identity: Identity, rpc: str) -> None:
    if identity.kind != "account":
        return
    needed: Scope = "read" if is_read(rpc) else "write"
    if needed not in identity.scopes:
        raise PermissionDenied(
            f"The API key has no scope `{needed}`, which this call needs.",
            scope=needed,
        )


def _known(error: Exception) -> TuneryError:
    known = as_tunery_error(error)
    if known is None:
        log.exception("rpc failed in a way that was not foreseen")
        return TuneryError("The service failed; its log has more under the request id.")
    if known.http_status >= 500:
        log.warning("rpc failed", code=known.code, cause=repr(error))
    return known


def _bare(abort: grpc.aio.AbortError) -> grpc.aio.AbortError:
    """An abort without what led to it. gRPC keeps it in a circle, and so would keep the frames of the call,
    and all their buffers, until somebody looks for garbage."""
    abort.__context__ = None
    return abort.with_traceback(None)


def _guarded(
    handler: grpc.RpcMethodHandler, served: Callable[[Any, Any], Any], streams: OpenStreams | None
) -> grpc.RpcMethodHandler:
    async def unary(request: Any, context: Any) -> Any:
        try:
            async with served(request, context) as note:
                response = await behavior(request, context)
                note(response)
                return response
        except grpc.aio.AbortError as abort:
            raise _bare(abort) from None

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with served(request, context):
                responses = behavior(request, context)
                async for response in streams.guard(responses) if streams else responses:
                    yield response
        except grpc.aio.AbortError as abort:
            raise _bare(abort) from None

    behavior: Any  # a coroutine function or an async generator, which grpc's types don't tell apart
    if handler.response_streaming:
        behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
        assert inspect.isasyncgenfunction(behavior), "a streaming rpc is an async generator"
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(stream, handler.request_deserializer, handler.response_serializer)
    behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
    make = (
        grpc.stream_unary_rpc_method_handler
        if handler.request_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(unary, handler.request_deserializer, handler.response_serializer)
