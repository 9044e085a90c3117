"""Uploads, from the first byte to the stored dataset."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, BinaryIO

import sqlalchemy as sa

from dataset_svc.datasets import Datasets
from dataset_svc.incoming_file import CheckedFile, Format, IncomingFile, check_file_name
from dataset_svc.upload_form import UploadForm, base_name_of, has_control_character
from svc_kit.cancellation import see_through
from svc_kit.errors import InvalidRequest, LimitReached, MalformedUpload, TooManyRequests, TuneryError
from svc_kit.object_store import ObjectStore
from svc_kit.under_way import UnderWay

MAX_CONCURRENT_UPLOADS = 64
MAX_NAME_CHARS = 256
MAX_DISCARDED_BYTES = 16 * 1024 * 1024
_DISCARD_SECONDS = 2.0
MAX_FILE_NAME_CHARS = 255


class Uploads:
    """Takes files in. Checking and storing run in threads, so that other calls are answered meanwhile."""

    def __init__(
        self, datasets: Datasets, store: ObjectStore, max_upload_bytes: int, max_of_account: int
    ) -> None:
        """Args:
        datasets: where finished uploads go.
        store: where their bytes go.
        max_upload_bytes: the largest file.
        max_of_account: uploads that an account may have under way.
        """
        self._datasets = datasets
        self._store = store
        self._max_upload_bytes = max_upload_bytes
        self._checkers = concurrent.futures.ThreadPoolExecutor(MAX_CONCURRENT_UPLOADS, "check")
        self._writers = concurrent.futures.ThreadPoolExecutor(MAX_CONCURRENT_UPLOADS, "store")
        self._max_of_account = max_of_account
        self._under_way = UnderWay()

    async def take_form(
        self,
        account_id: str,
        format_: Format,
        content_type: str,
        chunks: AsyncIterator[bytes],
        idempotency_key: str | None,
    ) -> sa.Row[Any]:
        """Takes a multipart/form-data body with the part `file`, and maybe `name`.

        Where the same was uploaded with the same key already, returns that dataset.

        Raises:
            MalformedUpload: the body is broken or was cut off.
            InvalidRequest: a part, a name or the file is not what it should be.
            PayloadTooLarge: the file is over the limit.
            LimitReached: the account has as much as it may, or as many uploads under way.
            TooManyRequests: all accounts together have.
        """
        async with self._draft(account_id, format_, idempotency_key) as draft:
            form = UploadForm(
                content_type,
                lambda file_name: draft.start(check_file_name(file_name, (format_,))),
                draft.write,
                MAX_NAME_CHARS,
            )
            try:
                async for chunk in chunks:
                    await draft.in_thread(partial(form.feed, chunk))
            except TuneryError:
                await see_through(draft.discard())
                await _discard_rest(chunks)
                raise
            uploaded = await draft.in_thread(form.finish)
            return await draft.commit(uploaded.name or uploaded.filename)

    async def take_chunks(
        self,
        account_id: str,
        file_name: str,
        name: str | None,
        size_bytes: int,
        chunks: AsyncIterator[bytes],
        idempotency_key: str | None,
    ) -> sa.Row[Any]:
        """Takes a file whose size is announced, so that a cut-off upload is told from a finished one.

        Where the same was uploaded with the same key already, returns that dataset.

        Raises:
            MalformedUpload: the bytes are more or fewer than announced.
            InvalidRequest: a name or the file is not what it should be.
            PayloadTooLarge: the file is over the limit.
            LimitReached: the account has as much as it may, or as many uploads under way.
            TooManyRequests: all accounts together have.
        """
        for field, text, limit in (
            ("header.file_name", file_name, MAX_FILE_NAME_CHARS),
            ("header.name", name or "", MAX_NAME_CHARS),
        ):
            if len(text) > limit or has_control_character(text):
                raise InvalidRequest(
                    f"`{field}` must be at most {limit} characters, none of them a control character.",
                    field=field,
                )
        format_ = check_file_name(file_name, ("csv", "jsonl"))
        received = 0
        async with self._draft(account_id, format_, idempotency_key) as draft:
            await draft.in_thread(partial(draft.start, format_))
            async for chunk in chunks:
                received += len(chunk)
                await draft.in_thread(partial(draft.write, chunk))
            if received != size_bytes:
                raise MalformedUpload(
                    f"The upload has {received:,} bytes where {size_bytes:,} were announced. Nothing was "
                    "stored; send it again.",
                    field="header.size_bytes",
                )
            return await draft.commit((name or "").strip() or base_name_of(file_name))

    def open_file(self, format_: Format, object_key: str) -> IncomingFile:
        """Starts storing a file."""

        def store(stream: BinaryIO) -> None:
            self._store.put_stream(object_key, stream)

        return IncomingFile(format_, self._max_upload_bytes, store, self._writers)

    @property
    def checkers(self) -> concurrent.futures.Executor:
        """The threads that check files."""
        return self._checkers

    @property
    def datasets(self) -> Datasets:
        """Where finished uploads go."""
        return self._datasets

    @asynccontextmanager
    async def _draft(
        self, account_id: str, format_: Format, idempotency_key: str | None
    ) -> AsyncIterator[_Draft]:
        """Gives an upload its place; nobody waits for one, or uploads would block each other."""
        if self._under_way.total >= MAX_CONCURRENT_UPLOADS:
            raise TooManyRequests(f"{MAX_CONCURRENT_UPLOADS} uploads are under way; try again after a pause.")
        if self._under_way.of(account_id) >= self._max_of_account:
            raise LimitReached(
                f"The account has {self._max_of_account} uploads under way, and that is the limit; wait for "
                "one to end."
            )
        with self._under_way.one_more(account_id):
            async with _Draft(self, account_id, format_, idempotency_key) as draft:
                yield draft


async def _discard_rest(chunks: AsyncIterator[bytes]) -> None:
    """Reads on for a while: some clients lose an answer that comes while they still write."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > MAX_DISCARDED_BYTES:
                    return


class _Draft:
    """An upload that is discarded unless it is committed."""

    def __init__(
        self, uploads: Uploads, account_id: str, format_: Format, idempotency_key: str | None
    ) -> None:
        self._uploads = uploads
        self._account_id = account_id
        self._format: Format = format_
        self._idempotency_key = idempotency_key
        self._row: sa.Row[Any] | None = None
        self._file: IncomingFile | None = None
        self._is_over = False

    async def __aenter__(self) -> _Draft:
        self._row = await self._uploads.datasets.begin(self._account_id, self._format, self._idempotency_key)
        return self

    async def __aexit__(self, *_: object) -> None:
        # A cancelled call must leave nothing behind either.
        await see_through(self.discard())

    async def discard(self) -> None:
        """Has nothing stored, unless the upload is committed. Repeatable."""
        if self._is_over:
            return
        self._is_over = True
        assert self._row is not None
        if self._file is not None:
            await self.in_thread(self._file.abort)
        await self._uploads.datasets.discard(self._row.id)

    async def in_thread(self, work: Any) -> Any:
        """Runs blocking work in a checker's thread; when cancelled, it ends only once the thread has."""
        return await see_through(asyncio.get_running_loop().run_in_executor(self._uploads.checkers, work))

    def start(self, format_: Format) -> None:
        assert self._row is not None
        self._file = self._uploads.open_file(format_, self._row.object_key)

    def write(self, data: bytes) -> None:
        assert self._file is not None, "the file has started"
        self._file.write(data)

    async def commit(self, name: str) -> sa.Row[Any]:
        assert self._row is not None
        assert self._file is not None, "a finished form has a file"
        file: CheckedFile = await self.in_thread(self._file.finish)
        row = await self._uploads.datasets.commit(self._row, name, file, self._idempotency_key)
        self._is_over = row.id == self._row.id
        return row
