"""A file on its way in: checked while it streams through to the object store, memory flat."""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Literal

from dataset_svc.csv_rows import CsvChecker
from dataset_svc.dialog_rows import JsonlChecker
from svc_kit.errors import InvalidRequest, PayloadTooLarge

Format = Literal["csv", "jsonl"]

_QUEUED_CHUNKS = 4
_PATIENCE_SECONDS = 0.2


@dataclass(frozen=True)
class CheckedFile:
    """A file that was checked and stored.

    Attributes:
        size_bytes: its size.
        row_count: its data rows.
        columns: a CSV file's columns; empty for JSONL.
        sha256: of its bytes, in hex.
    """

    size_bytes: int
    row_count: int
    columns: tuple[str, ...]
    sha256: str


class _Aborted(Exception):
    """Ends the store's read, so that it stores nothing."""


class _Pipe(io.RawIOBase):
    """What the store reads from, in its thread, while the upload writes."""

    def __init__(self) -> None:
        self._chunks: queue.Queue[bytes | _Aborted | None] = queue.Queue(_QUEUED_CHUNKS)
        self._left = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # io passes a memoryview
        while not self._left and not self._ended:
            chunk = self._chunks.get()
            if isinstance(chunk, _Aborted):
                raise _Aborted  # not `chunk`: that this frame holds, and its traceback would hold the frame
            self._ended = chunk is None
            self._left = memoryview(chunk or b"")
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def put(self, item: bytes | _Aborted | None, is_read: Callable[[], bool]) -> None:
        """Waits for room, as long as somebody reads."""
        while is_read():
            try:
                self._chunks.put(item, timeout=_PATIENCE_SECONDS)
                return
            except queue.Full:
                continue


def check_file_name(file_name: str, formats: tuple[Format, ...]) -> Format:
    """Returns the format that a file's name tells.

    Raises:
        InvalidRequest: it tells none of `formats`.
    """
    for format_ in formats:
        if file_name.lower().endswith(f".{format_}"):
            return format_
    expected = " or ".join(f".{format_}" for format_ in formats)
    raise InvalidRequest(f"The file is called {file_name!r}; its name must end in {expected}.", field="file")


class IncomingFile:
    """One upload. `write` and `finish` block, and are called from a thread one after the other."""

    def __init__(
        self,
        format_: Format,
        max_bytes: int,
        store: Callable[[BinaryIO], None],
        threads: concurrent.futures.Executor,
    ) -> None:
        """Args:
        format_: what the file should be.
        max_bytes: its largest size.
        store: stores what the stream gives until its end, and nothing when reading raises.
        threads: runs `store`.
        """
        self._checker = CsvChecker() if format_ == "csv" else JsonlChecker()
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()
        self._pipe = _Pipe()
        self._stored = threads.submit(store, io.BufferedReader(self._pipe, 1024 * 1024))

    def write(self, data: bytes) -> None:
        """Takes the file's next bytes.

        Raises:
            PayloadTooLarge: the file is over the limit.
            MalformedFile: it is not what it should be.
            Exception: the store's own, when it can't store.
        """
        self._size_bytes += len(data)
        if self._size_bytes > self._max_bytes:
            raise PayloadTooLarge(
                f"The file is over the limit of {self._max_bytes:,} bytes; upload it in several datasets.",
                limit_bytes=self._max_bytes,
            )
        self._checker.feed(data)
        self._sha256.update(data)
        self._put(data)

    def _put(self, item: bytes | None) -> None:
        self._pipe.put(item, lambda: not self._stored.done())
        if self._stored.done():
            self._stored.result()

    def finish(self) -> CheckedFile:
        """Ends the file and returns once it is stored.

        Raises:
            MalformedFile: it is not what it should be; nothing is stored then.
            Exception: the store's own, when it can't store.
        """
        summary = self._checker.finish()
        self._put(None)
        self._stored.result()
        return CheckedFile(
            self._size_bytes,
            summary.row_count,
            getattr(summary, "columns", ()),
            self._sha256.hexdigest(),
        )

    def abort(self) -> None:
        """Has nothing stored, and returns once that is so. No effect after `finish`."""
        self._pipe.put(_Aborted(), lambda: not self._stored.done())
        concurrent.futures.wait([self._stored])
