"""Restarts, and the logs of processes that run for months."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tunery.supervisor import LOG_ROTATED_OVER_BYTES, ProcessSpec, Supervisor, empty_log


@pytest.mark.parametrize("deafness", ["", "trap '' TERM;"], ids=["obedient", "stubborn"])
async def test_a_process_is_started_again_when_told(deafness: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = ("bash", "-c", f"{deafness} touch {ready}; sleep 60")
    spec = ProcessSpec("sleeper", command, dict(os.environ), tmp_path / "log", stop_stage=0)
    supervisor = Supervisor([spec], lambda _child, _pause: None)
    [child] = supervisor.children

    async def runs(starts: int) -> None:
        async with asyncio.timeout(20):
            while child.starts < starts or not ready.exists():  # noqa: ASYNC110  # another process's state
                await asyncio.sleep(0.01)

    supervisor.start()
    try:
        await runs(1)
        ready.unlink()
        await supervisor.restart("sleeper", 0.3)
        await runs(2)
        assert child.is_running
    finally:
        await supervisor.stop([1.0])


def test_a_log_that_grew_large_is_emptied_under_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "job_svc.log"
    with path.open("ab", buffering=0) as log:
        log.write(b"x" * LOG_ROTATED_OVER_BYTES)
        empty_log(path)
        assert path.stat().st_size == LOG_ROTATED_OVER_BYTES
        log.write(b"y\n")
        empty_log(path)
        log.write(b"z\n")
    assert path.read_bytes() == b"z\n"
    assert (tmp_path / "job_svc.log.1").read_bytes().endswith(b"xxy\n")


def test_a_log_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    empty_log(tmp_path / "none.log")
