"""The stacks that benchmarks run: whole ones, or the parts that one needs without the others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tunery.ports import free_ports
from tunery.probes import Probes, wait_until_well
from tunery.stack import Stack, plan_stack
from tunery.supervisor import MARK_VARIABLE, Supervisor
from tunery.up import find_weed

_STOP_SECONDS = (5.0, 5.0, 5.0)
_END_SECONDS = 30
# Settings for a stack, and the rows of a small dataset.
NO_RATE_LIMIT = {
    "TUNERY_GATEWAY_REQUESTS_PER_SECOND": "1000000",
    "TUNERY_GATEWAY_REQUEST_BURST": "1000000",
}
ROWS = "question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(10))


@dataclass(frozen=True)
class WholeStack:
    """A `tunery up` of the benchmark's own.

    Attributes:
        port: of the gateway, on 127.0.0.1.
        api_key: of the first account, an admin's.
        process: `tunery up` itself, the parent of all others.
    """

    port: int
    api_key: str
    process: psutil.Process

    def client(self, api_key: str | None = None) -> httpx.Client:
        """Returns a client of an account: of the key's, or of the first."""
        headers = {"authorization": f"Bearer {api_key or self.api_key}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60)


@contextmanager
def whole_stack(**variables: str) -> Iterator[WholeStack]:
    """Runs `tunery up` for the block's time, from when it is ready; `variables` are for its environment."""
    with tempfile.TemporaryDirectory(prefix="tunery-bench-") as folder:
        port = free_ports(1)[0]
        command = [sys.executable, "-m", "tunery.cli", "up", "--data-dir", f"{folder}/data"]
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        try:
            assert process.stdout
            assert any("tunery is ready" in line for line in process.stdout), "the stack did not start"
            credentials = json.loads(Path(folder, "data", "credentials.json").read_text())
            yield WholeStack(port, credentials["api_key"], psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_END_SECONDS)


@asynccontextmanager
async def running_parts(
    folder: Path, environment: Mapping[str, str], names: Collection[str]
) -> AsyncIterator[Stack]:
    """Runs the named processes of a stack for the block's time, from when all are well."""
    stack = plan_stack(folder, free_ports(1)[0], environment, find_weed(), {})
    specs = [spec for spec in stack.specs if spec.name in names]
    supervisor = Supervisor(specs, lambda child, _: print(f"{child.spec.name} {child.last_end}"))
    supervisor.start()
    probes = Probes(stack)
    by_process = probes.by_process()
    try:
        await asyncio.gather(*(wait_until_well(by_process[spec.name]) for spec in specs))
        yield stack
    finally:
        await probes.close()
        await supervisor.stop(_STOP_SECONDS)


def process_of(name: str) -> psutil.Process:
    """Returns a process of the stack that this program runs."""
    for process in psutil.Process().children(recursive=True):
        if process.environ().get(MARK_VARIABLE, "").endswith(f"/{name}"):
            return process
    raise AssertionError(f"{name} does not run")
