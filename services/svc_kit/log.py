"""Structured logs: one JSON object a line on standard error."""

from __future__ import annotations

import logging
import re
import sys
from contextlib import AbstractContextManager
from functools import partial

import structlog
from structlog.typing import EventDict

# People paste API keys into the strangest places: ids, names, a request's id.
_API_KEY = re.compile(r"(tnry_[A-Za-z0-9_-]{6})[A-Za-z0-9_-]{37,}")
REQUEST_ID_HEADER = "x-request-id"
MAX_REQUEST_ID_CHARS = 128  # as the gateway lets in


def without_keys(text: str) -> str:
    """Returns a text with its API keys cut to what may be seen of them."""
    return _API_KEY.sub(r"\1...", text)


def configure_log(service: str, level: str) -> None:
    """Sets up structlog for a process. Every line names the service; secrets are never passed to it."""
    structlog.configure(
        processors=[
            partial(_name_service, service),
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


def _name_service(service: str, _logger: object, _method: str, event: EventDict) -> EventDict:
    event["service"] = service
    return event


def current_request_id() -> str | None:
    """Returns the id of the client's request that is worked for; None where it is for none."""
    request_id: str | None = structlog.contextvars.get_contextvars().get("request_id")
    return request_id


def working_for(request_id: str | None, job_id: str) -> AbstractContextManager[object]:
    """Has the block's lines name a job, and these and its calls the request that the job is from."""
    return structlog.contextvars.bound_contextvars(request_id=request_id, job_id=job_id)
