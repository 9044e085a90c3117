"""Data URIs: what each kind fetches, and what is refused."""

from __future__ import annotations

import datetime as dt
import gzip
import http.server
import ipaddress
import os
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dataset_svc.data_sources import DataSources, is_public
from dataset_svc.settings import DatasetSettings
from svc_kit.errors import InvalidRequest, Unavailable, UnsupportedDataUri
from svc_kit.object_store import ObjectStore
from svc_kit.settings import ObjectStoreSettings

ROWS = b'{"dialog": []}\n'
ACCOUNT = "acct-a"
LIMIT_BYTES = 1000


class Pages(http.server.BaseHTTPRequestHandler):
    """What the HTTPS host serves."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        status = int(path.rsplit("/", 1)[-1]) if path.startswith("/status/") else 200
        self.send_response(status)
        if status in (301, 302):
            self.send_header("Location", "https://127.0.0.1/elsewhere")
        body = b"x" * (LIMIT_BYTES + 1) if self.path == "/large" else ROWS
        if self.path == "/bomb":
            self.send_header("Content-Encoding", "gzip, gzip")
            body = gzip.compress(gzip.compress(ROWS))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of localhost and 127.0.0.1, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "host.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture(scope="module")
def https_port(certificate: Path) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def settings(
    embedded_s3: ObjectStoreSettings, tmp_path: Path, certificate: Path, https_port: int
) -> DatasetSettings:
    (tmp_path / "roots").mkdir()
    return DatasetSettings(
        **embedded_s3.model_dump(),
        identity_dir=tmp_path,
        database_url="sqlite+aiosqlite://",
        job_svc_address="127.0.0.1:1",
        models_dir=tmp_path / "models",
        max_upload_bytes=LIMIT_BYTES,
        import_file_roots=(tmp_path / "roots",),
        import_https_hosts=(f"localhost:{https_port}", f"127.0.0.1:{https_port}"),
        import_https_private=True,
        import_https_ca_file=certificate,
    )


@pytest.fixture
async def store(settings: DatasetSettings) -> ObjectStore:
    store = ObjectStore(settings)
    await store.wait_and_create_bucket()
    return store


async def fetch(settings: DatasetSettings, store: ObjectStore, uri: str, to: Path) -> bytes:
    sources = DataSources(settings, None, store)  # type: ignore[arg-type]  # no dataset is named here
    assert await sources.fetch(ACCOUNT, uri, to) == "jsonl"
    return to.read_bytes()


async def test_files_under_a_root_are_copied(
    settings: DatasetSettings, store: ObjectStore, tmp_path: Path
) -> None:
    source = tmp_path / "roots" / "with space.jsonl"
    source.write_bytes(ROWS)
    uri = f"file://{tmp_path}/roots/with%20space.jsonl"
    assert await fetch(settings, store, uri, tmp_path / "copy") == ROWS


async def test_files_elsewhere_are_refused(
    settings: DatasetSettings, store: ObjectStore, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_bytes(ROWS)
    roots = tmp_path / "roots"
    (roots / "link.jsonl").symlink_to(secret)
    (tmp_path / "roots-too").mkdir()
    for uri in (
        f"file://{secret}",
        f"file://{roots}/../secret.jsonl",
        f"file://{roots}/%2e%2e/secret.jsonl",
        f"file://{roots}/link.jsonl",
        f"file://{tmp_path}/roots-too/x",
        f"file://otherhost{roots}/x",
        "file:///etc/passwd",
        "file:relative",
    ):
        with pytest.raises(UnsupportedDataUri):
            await fetch(settings, store, uri, tmp_path / "copy")


async def test_what_is_no_plain_file_is_refused(
    settings: DatasetSettings, store: ObjectStore, tmp_path: Path
) -> None:
    roots = tmp_path / "roots"
    os.mkfifo(roots / "pipe")
    (roots / "folder").mkdir()
    (roots / "large").write_bytes(b"x" * (LIMIT_BYTES + 1))
    for name in ("pipe", "folder", "large", "missing"):
        with pytest.raises(InvalidRequest):
            await fetch(settings, store, f"file://{roots}/{name}", tmp_path / "copy")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_configured_hosts_are_read(
    settings: DatasetSettings, store: ObjectStore, tmp_path: Path, https_port: int, host: str
) -> None:
    assert await fetch(settings, store, f"https://{host}:{https_port}/rows", tmp_path / "copy") == ROWS


async def test_private_addresses_need_the_operators_leave(
    settings: DatasetSettings, store: ObjectStore, tmp_path: Path, https_port: int
) -> None:
    strict = settings.model_copy(update={"import_https_private": False})
    with pytest.raises(UnsupportedDataUri, match="not a public address"):
        await fetch(strict, store, f"https://localhost:{https_port}/rows", tmp_path / "copy")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *[(address, True) for address in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808")],
        *[(address, True) for address in ("2002:808:808::1", "::ffff:8.8.8.8")],
        *[
            (address, False)
            for address in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "192.0.2.1")
        ],
        *[(address, False) for address in ("224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255")],
        *[
            (address, False)
            for address in ("::", "::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "ff0e::1")
        ],
        *[
            (address, False)
            for address in ("::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a01:1")
        ],
        *[(address, False) for address in ("64:ff9b:1::808:808", "2002:7f00:1::", "2002:a9fe:a9fe::1")],
        # Teredo's, of 127.0.0.1 and of 8.8.8.8.
        *[(address, False) for address in ("2001:0:808:808::80ff:fffe", "2001:0:808:808::f7f7:f7f7")],
    ],
)
def test_which_addresses_are_public(address: str, expected: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is expected


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/status/404", InvalidRequest),
        ("/status/302", InvalidRequest),
        ("/large", InvalidRequest),
        ("/bomb", InvalidRequest),
        ("/status/503", Unavailable),
        ("/status/429", Unavailable),
    ],
)
async def test_answers_that_are_no_rows(
    settings: DatasetSettings,
    store: ObjectStore,
    tmp_path: Path,
    https_port: int,
    path: str,
    error: type[Exception],
) -> None:
    with pytest.raises(error):
        await fetch(settings, store, f"https://localhost:{https_port}{path}", tmp_path / "copy")


async def test_a_host_without_a_trusted_certificate_is_not_read(
    settings: DatasetSettings, store: ObjectStore, tmp_path: Path, https_port: int
) -> None:
    untrusting = settings.model_copy(update={"import_https_ca_file": None})
    with pytest.raises(Unavailable):
        await fetch(untrusting, store, f"https://localhost:{https_port}/rows", tmp_path / "copy")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "rows.jsonl",
        "ftp://host/x",
        "http://localhost/x",
        "https://localhost/x",
        "https://evil.test/x",
        "https://user:password@localhost:PORT/x",
        "https://localhost:PORT@evil.test/x",
        "https://localhost:99999/x",
        "dataset://",
        "dataset://ds-x/y",
        "dataset://ds-x?y",
        " dataset://ds-x",
        " https://localhost:PORT/rows",
        "https://localhost:PORT/rows ",
        "s3://other-bucket/shared/x",
        "s3://tunery-test/secret",
        "s3://tunery-test/accounts/acct-b/x",
        "s3://tunery-test/accounts/acct-a/../acct-b/x",
        "s3://tunery-test/shared//x",
        "s3://tunery-test/shared/%2e%2e/x",
        "s3://tunery-test/",
        "javascript:alert(1)",
        "file://\0",
        "file:///%00",
        "file:///srv/a.jsonl#x",
        "s3://tunery-test/shared/%00",
        "s3://tunery-test/shared/a.jsonl?versionId=1",
        "https://localhost:PORT/rows#x",
        "x" * 3000,
    ],
)
def test_other_uris_are_refused(settings: DatasetSettings, https_port: int, uri: str) -> None:
    sources = DataSources(settings, None, ObjectStore(settings))  # type: ignore[arg-type]  # none is named
    with pytest.raises(UnsupportedDataUri):
        sources.parse(ACCOUNT, uri.replace("PORT", str(https_port)))


async def test_own_and_shared_objects_are_read(
    settings: DatasetSettings, store: ObjectStore, tmp_path: Path
) -> None:
    rows = tmp_path / "rows"
    rows.write_bytes(ROWS)
    for key in (f"accounts/{ACCOUNT}/mine.jsonl", "shared/all.jsonl"):
        await store.put_file(key, rows)
        assert await fetch(settings, store, f"s3://tunery-test/{key}", tmp_path / "copy") == ROWS
    with pytest.raises(InvalidRequest, match="nothing at"):
        await fetch(settings, store, "s3://tunery-test/shared/missing", tmp_path / "copy")


async def test_a_url_is_named_without_its_query(
    settings: DatasetSettings, store: ObjectStore, tmp_path: Path, https_port: int
) -> None:
    url = f"https://localhost:{https_port}/status/404"
    with pytest.raises(InvalidRequest) as raised:
        await fetch(settings, store, f"{url}?signature=secret", tmp_path / "copy")
    assert raised.value.message == f"{url} answered 404."
