"""The stack's processes, looked at from outside."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.conftest import RunningStack


def service_process(stack: RunningStack, module: str) -> psutil.Process:
    """The stack's process that runs a module."""
    for process in psutil.Process(stack.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[-2:] == ["-m", module]:
                return process
    raise AssertionError(f"{module} is not running")


def training_processes(stack: RunningStack) -> list[psutil.Process]:
    """torchrun and the engine's processes of this stack."""
    found = []
    for process in service_process(stack, "trainer_svc").children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "trainer_svc.engine" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Returns the condition's first true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s in vain for {what}")
        time.sleep(0.02)
    return value
