"""What a stack with other settings does: a small upload limit, and hosts that https:// may name."""

from __future__ import annotations

import datetime as dt
import http.server
import ipaddress
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.conftest import running_stack
from tests.contract.account import DATASETS, Account, dialogs_jsonl, ok, qa_csv, refused

LIMIT = 100_000


class _Files(http.server.BaseHTTPRequestHandler):
    """What the allowed host serves."""

    def do_GET(self) -> None:
        body = {"/rows.jsonl": dialogs_jsonl(), "/large.jsonl": dialogs_jsonl(5000)}.get(self.path, "")
        status = 302 if self.path == "/moved.jsonl" else 200 if body else 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Location", "/rows.jsonl")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


def _certificate(folder: Path) -> Path:
    """Writes a certificate for 127.0.0.1 with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def host(certificate: Path) -> Iterator[str]:
    """HOST:PORT of an HTTPS server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def limited(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, host: str, certificate: Path
) -> Iterator[Account]:
    """The first account of a stack of this module's own."""
    with running_stack(
        tmp_path_factory.mktemp("limited") / "data",
        TUNERY_MODELS_DIR=str(models_dir),
        TUNERY_MAX_UPLOAD_BYTES=str(LIMIT),
        TUNERY_IMPORT_HTTPS_HOSTS=json.dumps([host]),
        TUNERY_IMPORT_HTTPS_PRIVATE="true",
        TUNERY_IMPORT_HTTPS_CA_FILE=str(certificate),
    ) as stack:
        account = Account(stack.url, stack.api_key)
        with account.http:
            yield account


def rows_of(num_bytes: int) -> bytes:
    head = b"question,answer\nWhat?,"
    return head + b"a" * (num_bytes - len(head))


@pytest.mark.parametrize("num_bytes", [LIMIT + 1, LIMIT + 5000, 2 * LIMIT, 50 * LIMIT])
@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_file_over_the_limit_is_413(limited: Account, num_bytes: int, announced: bool) -> None:
    before = ok(limited.http.get(DATASETS))

    if announced:
        response = limited.upload(rows_of(num_bytes))
    else:
        request = limited.http.build_request(
            "POST", DATASETS, files={"file": ("rows.csv", rows_of(num_bytes))}
        )
        body = request.read()
        pieces = (body[start : start + 8192] for start in range(0, len(body), 8192))
        headers = {"Content-Type": request.headers["content-type"]}
        response = limited.http.post(DATASETS, content=pieces, headers=headers)
    message = refused(response, 413, "payload_too_large")
    assert "limit" in message
    assert ok(limited.http.get(DATASETS)) == before


def test_file_of_exactly_the_limit_is_taken(limited: Account) -> None:
    assert ok(limited.upload(rows_of(LIMIT), name="n" * 256), 201)["size_bytes"] == LIMIT


def test_allowed_host_is_read(limited: Account, host: str) -> None:
    job_id = limited.submit_job(f"https://{host}/rows.jsonl")

    limited.wait_status(job_id, "queued", "running", "success")
    assert "dataset_id" not in limited.job(job_id)
    limited.cancel(job_id)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda host: host + "/large.jsonl", ("large.jsonl", "100,000")),
        (lambda host: host + "/moved.jsonl", ("moved.jsonl", "302", "redirect")),
        (lambda host: host + "/nothing.jsonl", ("nothing.jsonl", "404")),
    ],
)
def test_what_the_host_does_not_give_fails_the_job(
    limited: Account, host: str, change: Callable[[str], str], words: tuple[str, ...]
) -> None:
    job_id = limited.submit_job(f"https://{change(host)}")
    job = limited.wait_status(job_id, "failed")

    error = ok(limited.http.get(job["error_path"]))["error"]
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "change",
    [
        lambda host: host.partition(":")[0],
        lambda host: host.replace("127.0.0.1", "localhost"),
        lambda host: host + "0",
        lambda host: "user@" + host,
        lambda host: "user:password@" + host,
        lambda host: "evil.org#@" + host,
        lambda host: host + "@evil.org",
        lambda host: host + "\\@evil.org",
        lambda host: host + ".evil.org",
    ],
)
def test_other_hosts_are_refused(limited: Account, host: str, change: Callable[[str], str]) -> None:
    response = limited.submit(f"https://{change(host)}/rows.jsonl")

    refused(response, 400, "unsupported_data_uri")


def test_small_file_is_still_taken(limited: Account) -> None:
    assert ok(limited.upload(qa_csv()), 201)
