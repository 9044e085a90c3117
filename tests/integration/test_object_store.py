"""The object store, against the embedded server or any endpoint given by TUNERY_TEST_S3_ENDPOINT."""

from __future__ import annotations

import asyncio
import contextlib
import io
import secrets
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import urllib3
from minio.error import MinioException
from pydantic import SecretStr

from svc_kit.errors import NotFound
from svc_kit.object_store import PART_BYTES, ObjectStore
from svc_kit.settings import ObjectStoreSettings
from tests.certificates import Authority


@pytest.fixture
async def store(embedded_s3: ObjectStoreSettings) -> ObjectStore:
    store = ObjectStore(embedded_s3)
    await store.wait_and_create_bucket()
    return store


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(6)}/"


async def read(store: ObjectStore, key: str) -> bytes:
    return b"".join([chunk async for chunk in store.read_chunks(key)])


@pytest.fixture
async def https_store(embedded_s3: ObjectStoreSettings, tmp_path: Path) -> AsyncIterator[ObjectStoreSettings]:
    """The same store behind TLS, with a certificate of an authority of its own."""
    tls = Authority(tmp_path).issue("s3")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.cert_file, tls.key_file)
    upstream = urlsplit(embedded_s3.s3_endpoint)

    connections = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        from_store, to_store = await asyncio.open_connection(upstream.hostname, upstream.port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(copy(reader, to_store))
                group.create_task(copy(from_store, writer))
        finally:
            for each in (writer, to_store):
                each.close()
                with contextlib.suppress(OSError):
                    await each.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    yield embedded_s3.model_copy(
        update={"s3_endpoint": f"https://127.0.0.1:{port}", "s3_ca_file": tls.ca_file}
    )
    server.close()
    tasks = [connection for connection in connections if connection]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_store_with_a_certificate_of_its_own(
    https_store: ObjectStoreSettings, prefix: str, tmp_path: Path
) -> None:
    store = ObjectStore(https_store)
    await store.wait_and_create_bucket()
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    await store.put_file(prefix + "x", file)
    assert await read(store, prefix + "x") == b"x" * 1000

    stranger = ObjectStore(https_store.model_copy(update={"s3_ca_file": None}))
    with pytest.raises(urllib3.exceptions.HTTPError, match="CERTIFICATE_VERIFY_FAILED"):
        await asyncio.to_thread(stranger.create_bucket)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 7])
async def test_a_stream_of_any_size_comes_back(store: ObjectStore, prefix: str, size: int) -> None:
    data = secrets.token_bytes(size)
    store.put_stream(prefix + "x", io.BytesIO(data))
    assert await read(store, prefix + "x") == data
    assert (await store.stat(prefix + "x")).size_bytes == size


@pytest.mark.parametrize("size", [1000, PART_BYTES + 1000])
async def test_a_stream_that_fails_stores_nothing(store: ObjectStore, prefix: str, size: int) -> None:
    class Failing(io.RawIOBase):
        left = size

        def read(self, size: int = -1) -> bytes:
            if self.left <= 0:
                raise RuntimeError("the upload was cut off")
            taken = min(size, self.left)
            self.left -= taken
            return bytes(taken)

    with pytest.raises(RuntimeError, match="cut off"):
        store.put_stream(prefix + "x", Failing())
    assert await store.list(prefix) == []


async def test_a_folder_comes_back(store: ObjectStore, prefix: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "inner" / "b.txt").write_text("b")
    await store.put_folder(prefix, source)
    await store.get_folder(prefix, tmp_path / "copy")
    assert (tmp_path / "copy" / "inner" / "b.txt").read_text() == "b"
    await store.get_folder(prefix, tmp_path / "part", without="inner")
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["a.txt"]
    assert [stored.key for stored in await store.list(prefix)] == [f"{prefix}a.txt", f"{prefix}inner/b.txt"]


async def test_deleting_many_leaves_the_others(store: ObjectStore, prefix: str) -> None:
    for name in ("one/a", "one/b", "one-more/a"):
        store.put_stream(prefix + name, io.BytesIO(b"x"))
    keys = [stored.key for stored in await store.list(prefix + "one/")]
    assert len(keys) == 2
    for _ in range(2):
        await store.delete_all(keys)
    assert [stored.key for stored in await store.list(prefix)] == [f"{prefix}one-more/a"]


async def test_what_is_not_there_is_not_found(store: ObjectStore, prefix: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await store.stat(prefix + "x")
    with pytest.raises(NotFound):
        store.open(prefix + "x")
    with pytest.raises(NotFound):
        await store.get_folder(prefix, tmp_path / "copy")
    await store.delete(prefix + "x")


async def test_wrong_keys_are_refused(embedded_s3: ObjectStoreSettings) -> None:
    wrong = embedded_s3.model_copy(update={"s3_secret_key": SecretStr("wrong")})
    with pytest.raises(MinioException):
        ObjectStore(wrong).create_bucket()


async def test_the_parts_of_an_upload_that_broke_off_go(store: ObjectStore, prefix: str) -> None:
    def begun() -> list[str]:
        uploads = store._client._list_multipart_uploads(store.bucket, prefix=prefix).uploads
        return sorted(upload.object_name for upload in uploads)

    for name in ("x", "y/1", "y/2"):
        store._client._create_multipart_upload(store.bucket, prefix + name, {})
    assert begun() == [prefix + name for name in ("x", "y/1", "y/2")]

    await store.abort_uploads(prefix + "y/")

    assert begun() == [prefix + "x"]
    assert await store.list(prefix) == []
