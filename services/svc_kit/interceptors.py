"""The one place where every rpc is let in, and where every exception becomes a status."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

import grpc
import structlog
import urllib3.exceptions
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from minio.error import MinioException

from svc_kit.database import DATABASE_AWAY
from svc_kit.errors import ERROR_DOMAIN, PermissionDenied, TuneryError, Unauthenticated, Unavailable, table
from svc_kit.identity import Identity, Kind, set_current_identity
from svc_kit.log import MAX_REQUEST_ID_CHARS, REQUEST_ID_HEADER

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

# A status travels in HTTP headers, the message twice; what is larger than these may hold is lost whole.
MAX_MESSAGE_CHARS = 2000
MAX_DETAIL_CHARS = 300


class TokenVerifier(Protocol):
    def verify(self, token: str) -> Identity: ...


def to_status(error: TuneryError) -> grpc.Status:
    """Returns the gRPC status of an error, with `ErrorInfo` as its first detail.

    The gateway reads from it: `reason` is the code, `metadata.type` and `metadata.http_status` the rest.
    """
    details = {name: _shortened(value, MAX_DETAIL_CHARS) for name, value in error.details.items()}
    info = error_details_pb2.ErrorInfo(
        reason=error.code,
        domain=ERROR_DOMAIN,
        metadata={**details, "type": error.type, "http_status": str(error.http_status)},
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    code = code_pb2.Code.Value(error.grpc_status.name)
    message = _shortened(error.message, MAX_MESSAGE_CHARS)
    return rpc_status.to_status(status_pb2.Status(code=code, message=message, details=[detail]))


def _shortened(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


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
    """Verifies the caller, binds the request id to the log, and turns exceptions into statuses.

    `allow` names, for each served service, the kinds of callers that are let in. A service that isn't
    named lets no one in.
    """

    def __init__(self, verifier: TokenVerifier, allow: Mapping[str, frozenset[Kind]]) -> None:
        self._verifier = verifier
        self._allow = allow

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.split("/")[1]
        if handler is None or service in OPEN_SERVICES:
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())

        def enter() -> None:
            structlog.contextvars.clear_contextvars()
            request_id = str(metadata.get(REQUEST_ID_HEADER, ""))[:MAX_REQUEST_ID_CHARS] or None
            structlog.contextvars.bind_contextvars(rpc=handler_call_details.method, request_id=request_id)
            identity = self._admit(service, str(metadata.get("authorization", "")))
            structlog.contextvars.bind_contextvars(caller=identity.kind)
            set_current_identity(identity)

        return _guarded(handler, enter)

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


async def _abort(context: Any, error: Exception, started: float) -> None:
    known = as_tunery_error(error)
    if known is None:
        log.exception("rpc failed in a way that was not foreseen")
        known = TuneryError("The service failed; its log has more under the request id.")
    elif known.http_status >= 500:
        log.warning("rpc failed", code=known.code, cause=repr(error))
    else:
        _log_answered(started, code=known.code)
    # The transcoder sends a response's status as soon as initial metadata comes, so none may precede this.
    await context.abort_with_status(to_status(known))


def _guarded(handler: grpc.RpcMethodHandler, enter: Callable[[], None]) -> grpc.RpcMethodHandler:
    async def unary(request: Any, context: Any) -> Any:
        started = time.monotonic()
        try:
            enter()
            response = await behavior(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await _abort(context, error, started)
        else:
            _log_answered(started)
            return response

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        started = time.monotonic()
        try:
            enter()
            async for response in behavior(request, context):
                yield response
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await _abort(context, error, started)
        else:
            _log_answered(started)

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
