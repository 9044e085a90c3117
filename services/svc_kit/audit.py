"""Who did what: one line of the log for each call of an account that may change something."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import structlog
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from svc_kit.errors import InvalidRequest
from svc_kit.identity import Identity
from svc_kit.log import without_keys
from svc_kit.strict_json import parse_json_object

# Written whatever the log's level is.
log = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET))

MAX_ID_CHARS = 100


class AuditRecord:
    """The record of one call; `write` ends it. The line has the rpc and the request id as every other has."""

    def __init__(self, caller: Identity) -> None:
        self._caller = caller
        self._started = time.monotonic()
        self._ids: dict[str, str] = {}

    def note(self, message: object) -> None:
        """Takes the resources' ids out of a request or a response; nothing else of it is kept."""
        if not isinstance(message, Message):  # a stream of requests
            return
        for name, value in _ids_of(message):
            self._ids[name] = without_keys(value)[:MAX_ID_CHARS]

    def write(self, result: str) -> None:
        """Writes the line.

        Args:
            result: `ok`, `cancelled`, or the error's code.
        """
        log.info(
            "audit",
            account=self._caller.subject,
            key=self._caller.key_id,
            resource=self._ids,
            result=result,
            seconds=round(time.monotonic() - self._started, 3),
        )


def _ids_of(message: Message) -> Iterator[tuple[str, str]]:
    """Yields the ids in a message, in those inside it (`key.id` as `key_id`), or in a body of JSON."""
    if isinstance(message, HttpBody):
        yield from _ids_of_json(message.data)
        return
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING and _names_an_id(field.name):
            yield field.name, value
        elif isinstance(value, Message):
            yield from (
                (f"{field.name}_id" if name == "id" else name, inner) for name, inner in _ids_of(value)
            )


def _ids_of_json(data: bytes) -> Iterator[tuple[str, str]]:
    try:
        body = parse_json_object(data)
    except InvalidRequest:  # as the service will say
        return
    for name, value in body.items():
        if isinstance(value, str) and _names_an_id(name):
            yield name[:MAX_ID_CHARS], value


def _names_an_id(field_name: str) -> bool:
    """Tells whether a field is one id; lists of them end with `_ids`."""
    return field_name == "id" or field_name.endswith("_id")
