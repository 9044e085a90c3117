"""Who did what: one line of the log for each call of an account that may change something."""

from __future__ import annotations

import logging
import time

import structlog
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from svc_kit.identity import Identity
from svc_kit.log import without_keys

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
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_STRING and _names_an_id(field.name):
                self._ids[field.name] = without_keys(value)[:MAX_ID_CHARS]

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


def _names_an_id(field_name: str) -> bool:
    """Tells whether a field is one id; lists of them end with `_ids`."""
    return field_name == "id" or field_name.endswith("_id")
