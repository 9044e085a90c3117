"""The real command, and real stacks of it, run as processes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.conftest import own_database
from tunery.supervisor import MARK_VARIABLE

COMMAND = (sys.executable, "-P", "-m", "tunery.cli")
READY_SECONDS = 60
WAIT_SECONDS = 60


def many_rows(number: int) -> str:
    """A CSV file of so many questions and answers."""
    return "question,answer\n" + "".join(f"What is {n} plus one?,It is {n + 1}.\n" for n in range(number))


ROWS = many_rows(16)


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without another installation's settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TUNERY_") or name in ("TUNERY_MODELS_DIR", "TUNERY_CATALOG_FILE")
    }
    return {**kept, **variables}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Returns the condition's first true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return value


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Up:
    """A running `tunery up`."""

    data_dir: Path
    port: int
    output_path: Path
    process: subprocess.Popen[bytes]
    marks: set[str] = field(default_factory=set)

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def credentials(self) -> dict[str, str]:
        credentials: dict[str, str] = json.loads((self.data_dir / "credentials.json").read_text())
        return credentials

    def wait_until_ready(self) -> None:
        wait_for(
            lambda: f"tunery is ready at {self.url}\n" in self.output or self.process.poll() is not None,
            f"readiness; {self.output_path} has what it said",
            READY_SECONDS,
        )
        assert self.process.poll() is None, self.output
        self.marks = {mark.partition("/")[0] for mark in self.children()}
        assert len(self.marks) == 1

    def children(self) -> dict[str, psutil.Process]:
        """The processes that it keeps running, by their marks."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):
                mark = child.environ().get(MARK_VARIABLE)
                if mark:  # between fork and exec a process has no environment yet
                    found[mark] = child
        return found

    def child(self, name: str) -> psutil.Process:
        [process] = [child for mark, child in self.children().items() if mark.endswith(f"/{name}")]
        return process

    def family(self) -> list[psutil.Process]:
        """Every process that carries its mark, itself not among them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                mark = process.environ().get(MARK_VARIABLE, "").partition("/")[0]
                if mark in self.marks and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def get(self, path: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.credentials['api_key']}"}
        return httpx.get(f"{self.url}{path}", headers=headers, trust_env=False)

    def tunery(self, *arguments: str, **variables: str) -> Result:
        return run_tunery(*arguments, "--data-dir", str(self.data_dir), **variables)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def run_tunery(*arguments: str, timeout: float = 120, **variables: str) -> Result:
    """Runs the command to its end."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_in_terminal(columns: int, *arguments: str, **variables: str) -> tuple[int, list[str]]:
    """Runs the command in a terminal of that width; returns its exit code and its lines without colours."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env=clean_environment(TERM="xterm", **variables),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    written = b""
    with suppress(OSError), open(screen, "rb", buffering=0) as file:  # Linux's way to say that nobody writes
        while chunk := file.read(65536):
            written += chunk
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", written.decode())
    return process.wait(), [line.rstrip() for line in text.splitlines()]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


class Ups:
    """Starts stacks, and stops them all in the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Up] = []

    def start(
        self, data_dir: Path, port: int | None = None, options: Sequence[str] = (), **variables: str
    ) -> Up:
        """Starts a stack without waiting for it."""
        port = port or free_port()
        output_path = self._folder / f"up-{len(self._started)}.txt"
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                [*COMMAND, "up", "--data-dir", str(data_dir), "--port", str(port), *options],
                env=clean_environment(**{**own_database(data_dir), **variables}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        up = Up(data_dir, port, output_path, process)
        self._started.append(up)
        return up

    def start_ready(
        self, data_dir: Path, port: int | None = None, options: Sequence[str] = (), **variables: str
    ) -> Up:
        up = self.start(data_dir, port, options, **variables)
        up.wait_until_ready()
        return up

    def stop_all(self) -> None:
        for up in self._started:
            if up.process.poll() is None:
                up.process.terminate()
        for up in self._started:
            up.process.wait(30)
