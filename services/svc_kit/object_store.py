"""Bytes in S3, over the minio SDK. One implementation for MinIO, the embedded server and any other S3.

The SDK blocks, so every call runs in a thread. Keys are laid out by account:
`accounts/ACCOUNT/datasets/...`, `accounts/ACCOUNT/jobs/JOB/...`, `accounts/ACCOUNT/models/MODEL/...`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import certifi
import tenacity
import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject
from minio.error import MinioException, S3Error

from svc_kit.cancellation import see_through
from svc_kit.errors import NotFound
from svc_kit.settings import ObjectStoreSettings

READ_CHUNK_BYTES = 1024 * 1024
PART_BYTES = 8 * 1024 * 1024
_CONNECT_SECONDS = 5
_READ_SECONDS = 60
_START_SECONDS = 30
_PATIENCE_SECONDS = 300


@dataclass(frozen=True)
class StoredObject:
    """An object's key, size in bytes, and time of its last change."""

    key: str
    size_bytes: int
    modified: dt.datetime


def account_prefix(account_id: str) -> str:
    """Returns the beginning of every key of an account's objects."""
    return f"accounts/{account_id}/"


async def patiently(transfer: Callable[[], Awaitable[None]]) -> None:
    """Repeats what moves or removes objects: a store that is away for minutes costs the wait alone.

    Raises:
        MinioException: or HTTPError, after five minutes.
    """
    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((MinioException, urllib3.exceptions.HTTPError)),
        stop=tenacity.stop_after_delay(_PATIENCE_SECONDS),
        wait=tenacity.wait_exponential(multiplier=0.2, max=5),
        reraise=True,
    ):
        with attempt:
            await transfer()


class ObjectStore:
    """The bucket."""

    def __init__(self, settings: ObjectStoreSettings) -> None:
        endpoint = urlsplit(settings.s3_endpoint)
        self.bucket = settings.s3_bucket
        self._client = Minio(
            endpoint.netloc,
            access_key=settings.s3_access_key.get_secret_value(),
            secret_key=settings.s3_secret_key.get_secret_value(),
            secure=endpoint.scheme == "https",
            region=settings.s3_region,
            http_client=urllib3.PoolManager(
                timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
                maxsize=32,
                cert_reqs="CERT_REQUIRED",
                ca_certs=str(settings.s3_ca_file or certifi.where()),
                retries=urllib3.Retry(total=3, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
            ),
        )

    def create_bucket(self) -> None:
        """Makes the bucket where it doesn't exist. Blocking."""
        if self._client.bucket_exists(self.bucket):
            return
        try:
            self._client.make_bucket(self.bucket)
        except S3Error as error:
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    async def wait_and_create_bucket(self) -> None:
        """Makes the bucket where it doesn't exist, giving a store that is still starting some time.

        Raises:
            Exception: the store can't be reached or refuses, also at the last try.
        """
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((MinioException, urllib3.exceptions.HTTPError)),
            stop=tenacity.stop_after_delay(_START_SECONDS),
            wait=tenacity.wait_fixed(0.1),
            reraise=True,
        ):
            with attempt:
                await asyncio.to_thread(self.create_bucket)

    def put_stream(self, key: str, data: BinaryIO) -> None:
        """Stores what `data.read` gives until it ends. Blocking; nothing is visible before the end.

        An exception of `data.read` ends the upload, and nothing is stored.
        """
        self._client.put_object(
            self.bucket, key, data, length=-1, part_size=PART_BYTES, num_parallel_uploads=1
        )

    async def put_file(self, key: str, path: Path) -> None:
        """Stores a file. When cancelled it ends only once nothing can be stored any more."""
        await see_through(asyncio.to_thread(self._client.fput_object, self.bucket, key, str(path)))

    async def put_folder(
        self, prefix: str, folder: Path, before_each: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Stores every file below a folder under `prefix` and its relative path.

        Args:
            prefix: with a slash at its end.
            folder: what to store.
            before_each: waited for before each file.
        """
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if before_each is not None:
                await before_each()
            await self.put_file(prefix + path.relative_to(folder).as_posix(), path)

    async def get_folder(self, prefix: str, folder: Path, *, without: str | None = None) -> None:
        """Fetches every object under `prefix` into a folder, which it makes.

        Args:
            prefix: with a slash at its end.
            folder: where they go.
            without: a folder below `prefix` that is left out.

        Raises:
            NotFound: there is no such object.
        """
        objects = [
            stored
            for stored in await self.list(prefix)
            if without is None or not stored.key.startswith(f"{prefix}{without}/")
        ]
        if not objects:
            raise NotFound(f"there is no object under {prefix}")
        for stored in objects:
            target = folder / stored.key.removeprefix(prefix)
            assert target.resolve().is_relative_to(folder.resolve()), "a key that leaves its folder"
            await self.get_file(stored.key, target)

    async def get_file(self, key: str, path: Path) -> None:
        """Fetches an object into a file; the file appears whole or not at all."""
        await asyncio.to_thread(self._client.fget_object, self.bucket, key, str(path))

    async def stat(self, key: str) -> StoredObject:
        """Returns an object's facts.

        Raises:
            NotFound: there is no such object.
        """
        try:
            found = await asyncio.to_thread(self._client.stat_object, self.bucket, key)
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject", "NotFound"):
                raise NotFound(f"there is no object {key}") from error
            raise
        return StoredObject(key, int(found.size or 0), found.last_modified or dt.datetime.now(dt.UTC))

    def open(self, key: str) -> BinaryIO:
        """Opens an object for reading as a stream. Blocking; to be closed by the caller.

        Raises:
            NotFound: there is no such object.
        """
        try:
            return self._client.get_object(self.bucket, key)  # type: ignore[return-value]  # it reads and closes
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject", "NotFound"):
                raise NotFound(f"there is no object {key}") from error
            raise

    async def read_chunks(self, key: str) -> AsyncIterator[bytes]:
        """Yields an object's bytes in pieces of at most `READ_CHUNK_BYTES`.

        Raises:
            NotFound: there is no such object.
        """
        stream = await asyncio.to_thread(self.open, key)
        try:
            while chunk := await asyncio.to_thread(stream.read, READ_CHUNK_BYTES):
                yield chunk
        finally:
            # In a thread: it waits for a read that is still under way.
            await asyncio.shield(asyncio.to_thread(stream.close))

    async def list(self, prefix: str) -> list[StoredObject]:
        """Returns every object under a prefix, by key."""
        return await asyncio.to_thread(lambda: list(self._iter(prefix)))

    def _iter(self, prefix: str) -> Iterator[StoredObject]:
        for found in self._client.list_objects(self.bucket, prefix=prefix, recursive=True):
            if found.object_name and not found.is_dir:
                modified = found.last_modified or dt.datetime.now(dt.UTC)
                yield StoredObject(found.object_name, int(found.size or 0), modified)

    async def delete(self, key: str) -> None:
        """Removes an object. One that isn't there is no error."""
        await asyncio.to_thread(self._client.remove_object, self.bucket, key)

    async def delete_prefix(self, prefix: str) -> None:
        """Removes every object under a prefix.

        Raises:
            MinioException: the store refused to remove one.
        """
        await self.delete_all([stored.key for stored in await self.list(prefix)])

    async def delete_all(self, keys: Iterable[str]) -> None:
        """Removes objects, a thousand a request. Those that aren't there are no error.

        Raises:
            MinioException: the store refused to remove one.
        """

        def remove() -> None:
            for error in self._client.remove_objects(self.bucket, [DeleteObject(key) for key in keys]):
                raise MinioException(f"{error.name} can't be removed: {error.message}")

        await asyncio.to_thread(remove)

    async def abort_uploads(self, prefix: str) -> None:
        """Removes the parts of uploads under a prefix that broke off, up to a thousand of them.

        A process that is killed while it stores a large object leaves them, and `list` doesn't show them.
        """

        def abort() -> None:
            # The SDK's own calls for this aren't public.
            for upload in self._client._list_multipart_uploads(self.bucket, prefix=prefix).uploads:
                assert upload.upload_id, "an upload under way has an id"
                self._client._abort_multipart_upload(self.bucket, upload.object_name, upload.upload_id)

        await asyncio.to_thread(abort)
