"""Keeps a set of processes running: starts them, starts again those that die, and stops them all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from svc_kit.parent_death import dying_with_this_process

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
# A process that ran for so long was well: its next death begins with the first pause again.
WELL_AFTER_SECONDS = 30.0
_DEATH_SECONDS = 0.02
LOG_ROTATED_OVER_BYTES = 10 * 1024 * 1024
_LOG_LOOK_SECONDS = 60.0
# Marks every process of a supervisor and all that they start, so that none can be overlooked.
MARK_VARIABLE = "SUPERVISED_BY_TUNERY"  # no TUNERY_ in front: the training process is given none of those


@dataclass(frozen=True)
class ProcessSpec:
    """A process to keep running.

    Attributes:
        name: what people know it by.
        command: the program and its arguments.
        environment: all of its environment.
        log_path: its output is appended to this file.
        stop_stage: processes of a lower stage are stopped first.
        folder: its working folder; None: the supervisor's own.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log_path: Path
    stop_stage: int
    folder: Path | None = None


class Child:
    """A process that is kept running, through all of its restarts.

    Attributes:
        spec: what is run.
        starts: how often it was started.
        deaths_in_a_row: how often it died since it last ran for `WELL_AFTER_SECONDS`.
        last_end: how it ended last, in words. Empty before.
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.starts = 0
        self.deaths_in_a_row = 0
        self.last_end = ""
        self.process: asyncio.subprocess.Process | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None


class Supervisor:
    """Keeps processes running. To be used from the main thread's event loop only.

    The kernel kills every child when the thread that started it ends, so that a supervisor killed with
    SIGKILL leaves none behind; that thread must therefore live as long as the supervisor.
    """

    def __init__(self, specs: Sequence[ProcessSpec], on_death: Callable[[Child, float], None]) -> None:
        """Args:
        specs: the processes.
        on_death: told of a child that died unasked, and of the seconds until it is started again.
        """
        self.children = [Child(spec) for spec in specs]
        self._on_death = on_death
        self._mark = uuid.uuid4().hex
        self._keepers: list[asyncio.Task[None]] = []
        self._is_stopping = False

    def start(self) -> None:
        """Starts every process, in the order of the specs, and returns without waiting for any."""
        for child in self.children:
            rotate_log(child.spec.log_path)
            self._keepers.append(asyncio.create_task(self._keep(child)))
        self._keepers.append(asyncio.create_task(self._keep_logs_small()))

    async def stop(self, seconds_by_stage: Sequence[float]) -> None:
        """Asks every process to end, stage by stage, and kills those that don't in time.

        Args:
            seconds_by_stage: how long each stage's processes may take.
        """
        self._is_stopping = True
        for stage, seconds in enumerate(seconds_by_stage):
            running = [c for c in self.children if c.spec.stop_stage == stage and c.process and c.is_running]
            for child in running:
                _signal(child, signal.SIGTERM)
            if running:
                waits = [asyncio.create_task(child.process.wait()) for child in running if child.process]
                await asyncio.wait(waits, timeout=seconds)
            for child in running:
                if child.is_running:
                    _signal(child, signal.SIGKILL)
        await asyncio.to_thread(self.kill_all)
        await asyncio.gather(*(child.process.wait() for child in self.children if child.process))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def restart(self, name: str, seconds: float) -> None:
        """Has a process end, whereupon it is started again like one that died.

        Args:
            name: of its spec.
            seconds: how long it may take to end by itself.
        """
        child = next(child for child in self.children if child.spec.name == name)
        process = child.process
        if process is None or process.returncode is not None:
            return
        _signal(child, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            _signal(child, signal.SIGKILL)

    def kill_all(self) -> None:
        """Kills every process that carries this supervisor's mark, whoever started it. Blocking."""
        self._is_stopping = True
        while survivors := list(_marked(self._mark)):
            for process in survivors:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(_DEATH_SECONDS)

    async def _keep(self, child: Child) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            started = time.monotonic()
            child.last_end = await self._run_once(child)
            if self._is_stopping:
                return
            if time.monotonic() - started > WELL_AFTER_SECONDS:
                pause, child.deaths_in_a_row = FIRST_PAUSE_SECONDS, 0
            child.deaths_in_a_row += 1
            self._on_death(child, pause)
            # What it had started would work against its successor.
            await asyncio.to_thread(_kill_marked, self._mark_of(child))
            await asyncio.sleep(pause)
            if self._is_stopping:
                return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _keep_logs_small(self) -> None:
        while True:
            await asyncio.sleep(_LOG_LOOK_SECONDS)
            for child in self.children:
                await asyncio.to_thread(empty_log, child.spec.log_path)

    async def _run_once(self, child: Child) -> str:
        spec = child.spec
        child.starts += 1
        try:
            with spec.log_path.open("ab") as log:
                child.process = await asyncio.create_subprocess_exec(
                    *dying_with_this_process(*spec.command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**spec.environment, MARK_VARIABLE: self._mark_of(child)},
                    cwd=spec.folder,
                    # Ctrl-C in the terminal is the supervisor's to handle, not the children's.
                    start_new_session=True,
                )
        except OSError as error:
            return f"could not be started: {error}"
        return _ended(await child.process.wait())

    def _mark_of(self, child: Child) -> str:
        return f"{self._mark}/{child.spec.name}"


def rotate_log(path: Path) -> None:
    """Moves a log that has grown large aside, to `NAME.log.1`, over the one that lay there."""
    if path.exists() and path.stat().st_size > LOG_ROTATED_OVER_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))


def empty_log(path: Path) -> None:
    """Copies a log that has grown large aside, to where `rotate_log` moves it, and empties it.

    For a process that has it open: it goes on at the file's new end. What it writes meanwhile is lost.
    """
    with contextlib.suppress(OSError):  # a full disk, or no such file yet
        if path.stat().st_size > LOG_ROTATED_OVER_BYTES:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            os.truncate(path, 0)


def _signal(child: Child, number: signal.Signals) -> None:
    assert child.process
    with contextlib.suppress(ProcessLookupError):
        child.process.send_signal(number)


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            value = process.environ().get(MARK_VARIABLE, "")
            if (value == mark or value.startswith(f"{mark}/")) and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:  # it has ended, or is another user's
            continue


def _kill_marked(mark: str) -> None:
    for process in _marked(mark):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _ended(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
