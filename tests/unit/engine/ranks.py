"""Processes of a run, forked from a server that has imported everything: torchrun takes seconds to start.

Where there is a GPU they are started each by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

from trainer_svc.engine.device import make_deterministic
from trainer_svc.engine.errors import Stopped
from trainer_svc.engine.events import EventLog
from trainer_svc.engine.process_group import ProcessGroup, join_process_group, leave_process_group
from trainer_svc.engine.run_spec import RunSpec
from trainer_svc.engine.train import train
from tunery.ports import free_ports

# What CUDA has begun in a process can't be forked, and to import everything is enough for that.
_SERVER = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")


def run_ranks(
    spec: RunSpec, num_processes: int, killed_at: int | None = None, stopped_at: int | None = None
) -> bool:
    """Runs the engine in processes of one group, as torchrun does.

    Args:
        spec: the run's.
        num_processes: of the group.
        killed_at: the first process dies of SIGKILL after this step, once a checkpoint before it is whole;
            when exactly that is, is left to chance.
        stopped_at: the specification's `stop_file` appears in this step.

    Returns:
        Whether all processes ended well. When one dies the others are killed.
    """
    return in_ranks(num_processes, _train, spec, killed_at, stopped_at)


def in_ranks(num_processes: int, work: Callable[..., None], *arguments: Any) -> bool:
    """Calls a module's function with the process group and the arguments, in processes of one group."""
    _SERVER.set_forkserver_preload([__name__])
    port = free_ports(1)[0]
    environment = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes: list[BaseProcess] = [
        _SERVER.Process(target=_rank, args=(rank, environment, work, arguments))
        for rank in range(num_processes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in too_few_gpus_hidden(num_processes).items():
            patch.setenv(name, value)
        for process in processes:
            process.start()
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            assert isinstance(sentinel, int)
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                for other in running.values():
                    other.kill()
    return all(process.exitcode == 0 for process in processes)


def too_few_gpus_hidden(num_processes: int) -> dict[str, str]:
    """Environment variables with which so many processes compute on CPUs, if each can't have a GPU."""
    return {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < num_processes else {}


def _rank(
    rank: int, environment: Mapping[str, str], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
    torch.set_num_threads(1)
    make_deterministic()
    try:
        work(join_process_group(), *arguments)
    finally:
        leave_process_group()


def _train(group: ProcessGroup, spec: RunSpec, killed_at: int | None, stopped_at: int | None) -> None:
    if group.is_first:
        spec.output_dir.mkdir()
    events = EventLog(spec.output_dir, silent=not group.is_first)
    seen: set[str] = set()

    def kill(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint" or (event["kind"] == "step" and event["step"] == killed_at):
            seen.add(event["kind"])
        if seen == {"checkpoint", "step"}:
            os.kill(os.getpid(), signal.SIGKILL)

    def tell_to_stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == stopped_at and spec.stop_file is not None:
            spec.stop_file.touch()

    if killed_at is not None:
        events.subscribe(kill)
    events.subscribe(tell_to_stop)
    with contextlib.suppress(Stopped):
        train(spec, group, events)
