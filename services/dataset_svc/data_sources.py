"""Where a job's data may come from: `dataset://`, `s3://`, `file://` and `https://`, as configured."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import httpx

from dataset_svc.datasets import Datasets
from dataset_svc.incoming_file import Format
from dataset_svc.settings import DatasetSettings
from svc_kit.errors import InvalidRequest, NotFound, Unavailable, UnsupportedDataUri
from svc_kit.object_store import ObjectStore, account_prefix

KINDS = "dataset://ID, s3://BUCKET/KEY, file:///PATH or https://HOST/PATH"
_LONGEST_URI = 2048
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
# For a whole file: whoever sends a byte now and then would keep others' jobs waiting.
_WHOLE_SECONDS = 1800


@dataclass(frozen=True)
class DatasetUri:
    """An uploaded dataset."""

    dataset_id: str


@dataclass(frozen=True)
class ObjectUri:
    """An object in the service's own bucket, among the keys that the account may name."""

    key: str


@dataclass(frozen=True)
class FileUri:
    """A file under one of the configured folders."""

    path: Path


@dataclass(frozen=True)
class HttpsUri:
    """A file on one of the configured hosts."""

    url: str
    host: str
    port: int

    @property
    def shown(self) -> str:
        """The URL without its query, which may hold a signature."""
        return self.url.partition("?")[0]


DataUri = DatasetUri | ObjectUri | FileUri | HttpsUri


class DataSources:
    """Reads data URIs, and fetches what they name."""

    def __init__(self, settings: DatasetSettings, datasets: Datasets, store: ObjectStore) -> None:
        self._settings = settings
        self._datasets = datasets
        self._store = store

    def parse(self, account_id: str, uri: str) -> DataUri:
        """Returns what a URI names, if the account may name it.

        Raises:
            UnsupportedDataUri: its kind, host, bucket, key or folder is not allowed.
        """
        # `urlsplit` would pass over spaces at the start, and whoever fetches would not.
        if len(uri) > _LONGEST_URI or not uri.isprintable() or uri != uri.strip():
            raise UnsupportedDataUri(
                f"A data URI is at most {_LONGEST_URI} printable characters, without spaces around it."
            )
        try:
            parts = urlsplit(uri)
            port = parts.port
        except ValueError as error:
            raise UnsupportedDataUri(f"{uri!r} is no URI: {error}.") from error
        match parts.scheme:
            case "dataset" if parts.netloc and not parts.path and not parts.query and not parts.fragment:
                return DatasetUri(parts.netloc)
            case "s3":
                return self._parse_s3(account_id, uri, parts)
            case "file":
                return self._parse_file(uri, parts)
            case "https":
                return self._parse_https(uri, parts, port or 443)
        raise UnsupportedDataUri(f"{uri!r} is no data that can be read here; expected is {KINDS}.")

    def _parse_s3(self, account_id: str, uri: str, parts: SplitResult) -> ObjectUri:
        key = _plain_path(uri, parts).removeprefix("/")
        allowed = (account_prefix(account_id), *self._settings.import_s3_prefixes)
        is_plain = not {"", ".", ".."} & set(key.split("/"))
        if parts.netloc != self._store.bucket or not is_plain or not key.startswith(allowed):
            listed = ", ".join(f"s3://{self._store.bucket}/{prefix}..." for prefix in allowed)
            raise UnsupportedDataUri(f"{uri!r} is not allowed; S3 data must be under {listed}.")
        return ObjectUri(key)

    def _parse_file(self, uri: str, parts: SplitResult) -> FileUri:
        # Resolved first: neither `..` nor a symbolic link leads out of the allowed folders.
        path = Path(os.path.realpath(_plain_path(uri, parts)))
        roots = [Path(os.path.realpath(root)) for root in self._settings.import_file_roots]
        is_local = parts.netloc in ("", "localhost") and parts.path.startswith("/")
        if not is_local or not any(path.is_relative_to(root) for root in roots):
            listed = ", ".join(str(root) for root in self._settings.import_file_roots) or "none is configured"
            raise UnsupportedDataUri(f"{uri!r} is not allowed; the folders for file:// are: {listed}.")
        return FileUri(path)

    def _parse_https(self, uri: str, parts: SplitResult, port: int) -> HttpsUri:
        host = (parts.hostname or "").lower()
        named = {host, f"{host}:{port}"} if port == 443 else {f"{host}:{port}"}
        allowed = self._settings.import_https_hosts
        is_plain = not (parts.username or parts.password or parts.fragment)
        if not is_plain or not named & {entry.lower() for entry in allowed}:
            listed = ", ".join(allowed) or "none is configured"
            raise UnsupportedDataUri(f"{uri!r} is not allowed; the hosts for https:// are: {listed}.")
        return HttpsUri(uri, host, port)

    async def fetch(self, account_id: str, uri: str, path: Path) -> Format:
        """Copies what a URI names into a file, and returns its format.

        Raises:
            UnsupportedDataUri: the URI is not allowed.
            InvalidRequest: there is no such thing, or it is over the limit.
            Unavailable: the source can't be reached for now.
        """
        match self.parse(account_id, uri):
            case DatasetUri(dataset_id):
                dataset = await self._datasets.get(account_id, dataset_id)
                await self._store.get_file(dataset.object_key, path)
                format_: Format = dataset.format
                return format_
            case ObjectUri(key):
                await self._fetch_object(uri, key, path)
            case FileUri(source):
                await asyncio.to_thread(self._copy_file, source, path)
            case HttpsUri() as https:
                await self._download(https, path)
        return "jsonl"

    def _check_size(self, uri: object, size_bytes: int) -> None:
        limit = self._settings.max_upload_bytes
        if size_bytes > limit:
            raise InvalidRequest(f"{uri} has {size_bytes:,} bytes or more; the limit is {limit:,}.")

    async def _fetch_object(self, uri: str, key: str, path: Path) -> None:
        try:
            stored = await self._store.stat(key)
        except NotFound as error:
            raise InvalidRequest(f"There is nothing at {uri}.") from error
        self._check_size(uri, stored.size_bytes)
        await self._store.get_file(key, path)

    def _copy_file(self, source: Path, path: Path) -> None:
        try:
            # O_NOFOLLOW: the path was resolved, so a link in its last place was put there meanwhile.
            # O_NONBLOCK: opening a pipe must not wait for a writer.
            descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidRequest(f"file://{source} can't be read: {error.strerror}.") from error
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise InvalidRequest(f"file://{source} is not a regular file.")
            self._check_size(f"file://{source}", facts.st_size)
            with os.fdopen(descriptor, "rb", closefd=False) as file, path.open("wb") as copy:
                shutil.copyfileobj(file, copy, 1024 * 1024)
        finally:
            os.close(descriptor)

    async def _download(self, source: HttpsUri, path: Path) -> None:
        address = await self._resolve(source)
        ca_file = self._settings.import_https_ca_file
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        # Connecting to the address that was checked, not to what the name says a moment later.
        url = httpx.URL(source.url).copy_with(host=address)
        host = source.host if source.port == 443 else f"{source.host}:{source.port}"
        headers = {"host": host, "accept-encoding": "identity"}
        extensions = {"sni_hostname": source.host}
        try:
            async with (
                asyncio.timeout(_WHOLE_SECONDS),
                httpx.AsyncClient(
                    verify=context, timeout=_TIMEOUT, follow_redirects=False, trust_env=False
                ) as client,
                client.stream("GET", url, headers=headers, extensions=extensions) as response,
            ):
                await self._save(source, response, path)
        except httpx.HTTPError as error:
            raise Unavailable(f"{source.shown} can't be read for now: {error}.") from error
        except TimeoutError as error:
            raise InvalidRequest(
                f"{source.shown} is not read whole after {_WHOLE_SECONDS} s; upload the file as a dataset."
            ) from error

    async def _save(self, source: HttpsUri, response: httpx.Response, path: Path) -> None:
        if response.status_code >= 500 or response.status_code == 429:
            raise Unavailable(f"{source.shown} answered {response.status_code}.")
        if response.status_code != 200:
            cure = "; redirects are not followed, name the final URL" if response.is_redirect else ""
            raise InvalidRequest(f"{source.shown} answered {response.status_code}{cure}.")
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            # Little that comes may be much that it stands for, and nobody would have counted it before.
            raise InvalidRequest(
                f"{source.shown} was sent with Content-Encoding {encoding[:60]!r}, which is not read here; "
                "have it sent as it is."
            )
        size_bytes = 0
        with path.open("wb") as file:
            async for chunk in response.aiter_raw():
                size_bytes += len(chunk)
                self._check_size(source.shown, size_bytes)
                file.write(chunk)

    async def _resolve(self, source: HttpsUri) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(source.host, source.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Unavailable(f"The host {source.host} can't be found: {error.strerror}.") from error
        address = str(found[0][4][0])
        if not self._settings.import_https_private and not is_public(ipaddress.ip_address(address)):
            raise UnsupportedDataUri(f"{source.shown} is not allowed: {source.host} is not a public address.")
        return address


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Tells whether an address is a host of the internet; one that leads to an IPv4 address is as that is."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(embedded)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _plain_path(uri: str, parts: SplitResult) -> str:
    """Returns the path that a URI names, where nothing else is in the URI."""
    path = unquote(parts.path)
    if parts.query or parts.fragment or not path.isprintable():
        raise UnsupportedDataUri(f"{uri!r} is not allowed; a plain path is expected, without ? and #.")
    return path
