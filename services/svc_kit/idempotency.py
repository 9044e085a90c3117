"""Requests that may be sent twice and are carried out once, told apart by a key that the client makes up."""

from __future__ import annotations

from typing import Any

from svc_kit.errors import InvalidRequest

# As of the IETF's draft "The Idempotency-Key HTTP Header Field"; in gRPC's metadata it is in lower case.
HEADER = "Idempotency-Key"
_MAX_CHARS = 255


def idempotency_key(context: Any) -> str | None:
    """Returns the key that a call carries, if any.

    Args:
        context: the rpc's.

    Raises:
        InvalidRequest: the key is empty, too long, or not of printable ASCII characters, or there are two.
    """
    keys = [value for name, value in context.invocation_metadata() if name == HEADER.lower()]
    if not keys:
        return None
    if len(keys) > 1:
        raise InvalidRequest(f"`{HEADER}` is there {len(keys)} times; send one for a request.", field=HEADER)
    (key,) = keys
    if not (isinstance(key, str) and 0 < len(key) <= _MAX_CHARS and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"`{HEADER}` must be 1 to {_MAX_CHARS} printable ASCII characters.", field=HEADER
        )
    return key


def used_otherwise(key: str) -> InvalidRequest:
    """Returns the error of a key that comes again with another request."""
    return InvalidRequest(
        f"`{HEADER}` {key!r} was used for another request; make up a new one for each.", field=HEADER
    )
