"""An attempt's events on the disk, until job_svc has acknowledged them."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from google.protobuf import json_format

from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

SPOOL_FILE = "events.spool"

_Message = TypeVar("_Message", worker_pb2.Lease, worker_pb2.Event)


class EventSpool:
    """A file with the lease in its first line and an event in each further one.

    It outlives its trainer: what a killed one couldn't send, its successor does. So neither an outage of
    job_svc, however long, nor a death in it loses a line.

    Attributes:
        lease: of the attempt; only the job's id and the token are set.
    """

    def __init__(self, path: Path) -> None:
        """Opens a spool.

        Raises:
            OSError: it can't be read and written.
            ValueError: its first line is damaged.
        """
        with ExitStack() as opened:
            self._writer = opened.enter_context(path.open("ab"))
            self._reader = opened.enter_context(path.open("rb"))
            self.lease = _parse(self._reader.readline(), worker_pb2.Lease())
            opened.pop_all()
        self._position = self._reader.tell()

    @classmethod
    def create(cls, path: Path, lease: worker_pb2.Lease) -> EventSpool:
        """Makes an empty spool."""
        own = worker_pb2.Lease(job_id=lease.job_id, lease_token=lease.lease_token)
        path.write_bytes(_line(own))
        return cls(path)

    def add(self, event: worker_pb2.Event) -> None:
        """Adds an event; from now on it survives this process's death."""
        self._writer.write(_line(event))
        self._writer.flush()

    def peek(self, most: int) -> tuple[list[worker_pb2.Event], int]:
        """Returns the oldest events that aren't acknowledged, and the position after them.

        Raises:
            ValueError: a line is damaged.
        """
        self._reader.seek(self._position)
        events: list[worker_pb2.Event] = []
        # A line without its end was being written when its process died.
        while len(events) < most and (line := self._reader.readline()).endswith(b"\n"):
            events.append(_parse(line, worker_pb2.Event()))
        return events, self._reader.tell()

    def acknowledge(self, position: int) -> None:
        """Passes over the events before a position that `peek` has returned."""
        self._position = position

    def close(self) -> None:
        """Closes the file. What a full disk did not take was refused when it was added."""
        self._reader.close()
        with suppress(OSError):
            self._writer.close()


def _parse(line: bytes, message: _Message) -> _Message:
    try:
        return json_format.Parse(line, message)
    except json_format.ParseError as error:
        raise ValueError(f"a damaged line: {line[:100]!r}") from error


def _line(message: worker_pb2.Lease | worker_pb2.Event) -> bytes:
    return json_format.MessageToJson(message, indent=None, ensure_ascii=False).encode() + b"\n"
