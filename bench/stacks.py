"""The parts of a stack that a benchmark needs, run without the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from tunery.ports import free_ports
from tunery.probes import Probes, wait_until_well
from tunery.stack import Stack, plan_stack
from tunery.supervisor import MARK_VARIABLE, Supervisor
from tunery.up import find_weed

_STOP_SECONDS = (5.0, 5.0, 5.0)


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
