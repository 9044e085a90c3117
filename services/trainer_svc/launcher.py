"""Starts a run with torchrun's machinery, in a process group of its own, and ends it for good."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from svc_kit.child_process import without_settings
from svc_kit.parent_death import dying_with_this_process
from trainer_svc.engine.run_spec import num_processes

_LOG_TAIL_BYTES = 4096
_KILL_SECONDS = 5


class RunProcess:
    """torchrun and the processes of one run."""

    def __init__(self, process: subprocess.Popen[bytes], log_file: Path) -> None:
        self._process = process
        self._log_file = log_file

    @classmethod
    def start(cls, spec_file: Path, torchrun_arguments: Sequence[str], log_file: Path) -> RunProcess:
        """Starts a run.

        Args:
            spec_file: the engine's run specification.
            torchrun_arguments: checked options, such as `--nproc_per_node=2`.
            log_file: gets what the processes print.
        """
        defaults = ["--nproc_per_node=1", "--max_restarts=0"]
        if not any(argument.startswith("--rdzv_endpoint") for argument in torchrun_arguments):
            # A rendezvous at a free port. torchrun's --standalone would overrule the other rdzv options.
            defaults += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
        command = dying_with_this_process(
            *(sys.executable, "-P", "-m", "torch.distributed.run", *defaults, *torchrun_arguments),
            *("-m", "trainer_svc.engine", str(spec_file)),
        )
        environment = without_settings()
        processes = num_processes(torchrun_arguments)
        if processes > 1:
            # torchrun's own choice is one thread each, however many cores there are.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return cls(process, log_file)

    @property
    def has_ended(self) -> bool:
        """Whether the run's processes have ended by themselves."""
        return self._process.poll() is not None

    async def ended(self) -> None:
        """Returns once the run's processes have ended by themselves."""
        await asyncio.to_thread(self._process.wait)

    def last_words(self) -> str:
        """Returns the last line that the run printed which tells what went wrong."""
        with self._log_file.open("rb") as log:
            log.seek(max(0, self._log_file.stat().st_size - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        told = [line.strip() for line in lines if "Error" in line or "Signal" in line or "signal" in line]
        return (told or ["it printed nothing about it"])[-1][:500]

    async def kill(self) -> None:
        """Kills every process of the run and returns once they are gone. No effect on an ended run."""
        if self.has_ended:  # and its number may be another process's by now
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            await asyncio.to_thread(psutil.wait_procs, family, _KILL_SECONDS)
        await asyncio.to_thread(self._process.wait)
