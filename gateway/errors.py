"""Errors that Envoy itself answers, in the same envelope as the services' own."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from svc_kit.errors import TooManyRequests, TuneryError, to_status


@dataclass(frozen=True)
class GatewayError:
    """What a client sees of an error of Envoy's own.

    Attributes:
        http_status: the status that Envoy chose.
        type: `error.type`.
        code: `error.code`; docs/errors.md lists it.
        message: the text; Envoy's `%...%` commands are filled in.
        when: the condition, one sentence for docs/errors.md.
    """

    http_status: int
    type: str
    code: str
    message: str
    when: str


def details_headers(error: TuneryError) -> dict[str, str]:
    """Returns the headers that tell native clients which error it is; Envoy makes the status without them."""
    return {
        key: base64.b64encode(value).rstrip(b"=").decode()
        for key, value in to_status(error).trailing_metadata
        if isinstance(value, bytes)
    }


_BAD_REQUEST = "invalid_request_error"
_SERVER = "server_error"
RATE_LIMITED = GatewayError(
    429,
    TooManyRequests.type,
    TooManyRequests.code,
    "Requests come too fast; try again after the pause that `Retry-After` says.",
    "An account's requests, or an address's for its health, come faster than the gateway takes them; "
    "`Retry-After` has the pause in seconds.",
)
REFUSED = GatewayError(
    400,
    _BAD_REQUEST,
    "invalid_request",
    "%LOCAL_REPLY_BODY%",
    "A query parameter is unknown, repeated or of the wrong type, a header is the gateway's own, or the "
    "request can't be read.",
)
GATEWAY_ERRORS = (
    GatewayError(
        400,
        _BAD_REQUEST,
        "invalid_request",
        "The request is not proper HTTP, or its path is malformed (%RESPONSE_CODE_DETAILS%).",
        REFUSED.when,
    ),
    GatewayError(
        401,
        "authentication_error",
        "invalid_api_key",
        "%LOCAL_REPLY_BODY%",
        "The bearer token is missing, unknown or revoked.",
    ),
    GatewayError(
        403,
        "permission_error",
        "forbidden",
        "The gateway doesn't take this kind of request, such as an upgrade to WebSocket.",
        "The request asks for something that the gateway never does, such as an upgrade to WebSocket.",
    ),
    GatewayError(
        404,
        "not_found_error",
        "route_not_found",
        "Nothing is served at %REQ(:METHOD)% %PATH(NQ:PATH):200%; check the path.",
        "The path is not one of the API's.",
    ),
    GatewayError(
        405,
        _BAD_REQUEST,
        "method_not_allowed",
        "%PATH(NQ:PATH):200% doesn't take %REQ(:METHOD)%; the `allow` header lists what it takes.",
        "The path is right and the HTTP method is not; the `allow` header lists those that are.",
    ),
    GatewayError(
        408,
        _BAD_REQUEST,
        "request_timeout",
        "The request did not arrive in time; send it again.",
        "The request's headers or its body stopped coming.",
    ),
    GatewayError(
        413,
        _BAD_REQUEST,
        "payload_too_large",
        "The request's body is over the limit; docs/configuration.md has the limits.",
        "A JSON body is over 1 MiB, or an upload over the configured limit.",
    ),
    GatewayError(
        414,
        _BAD_REQUEST,
        "uri_too_long",
        "The request's path is too long.",
        "The path is longer than the gateway takes.",
    ),
    GatewayError(
        426,
        _BAD_REQUEST,
        "upgrade_required",
        "HTTP/1.0 is not spoken here; use HTTP/1.1 or HTTP/2.",
        "The request came by HTTP/1.0.",
    ),
    RATE_LIMITED,
    GatewayError(
        431,
        _BAD_REQUEST,
        "headers_too_large",
        "The request's path and headers are over 60 KiB together, or over 100 in number.",
        "The path and the headers are over 60 KiB together, or over 100 in number.",
    ),
    GatewayError(
        503,
        _SERVER,
        "unavailable",
        "A part of the service can't be reached for now; try again.",
        "A service or the auth check can't be reached for now; try again.",
    ),
    GatewayError(
        504,
        _SERVER,
        "timeout",
        "The service did not answer in time; whether it did what was asked is not known.",
        "A service did not answer in time.",
    ),
)
ANY_OTHER_ERROR = GatewayError(
    500,
    _SERVER,
    "internal_error",
    "The gateway failed; its log has more under the request id.",
    "The gateway failed in a way it did not foresee.",
)
