"""Ends a process with its parent, however the parent dies (Linux's prctl(2)).

As a program, `python -m svc_kit.parent_death PARENT_PID COMMAND...` becomes COMMAND, which then ends with
the process PARENT_PID that started it. This stands in for `subprocess`'s `preexec_fn`, which isn't safe in
a process with gRPC's threads: they may hold locks at the fork.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_COMMAND_PID_VARIABLE = "DIES_WITH_PROCESS"


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent dies.

    Args:
        parent_pid: the parent at the time when it started this process; if another has taken its place by
            now, it is dead already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_command() -> None:
    """Has the kernel kill this process with the command of `dying_with_this_process` that started it.

    That may be dead already, before this process came to look: its parent is another one then, and so it
    can't be asked for. Without such a command it is the parent of now.
    """
    die_with_parent(int(os.environ.get(_COMMAND_PID_VARIABLE, os.getppid())))


def dying_with_this_process(*command: str) -> list[str]:
    """Returns a command that becomes `command`, and ends when the process that calls this does."""
    # -I and -S: nothing of Python's environment is needed, and without it the start takes 10 ms.
    return [sys.executable, "-IS", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.environ[_COMMAND_PID_VARIABLE] = str(os.getpid())
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  # no shell is the point
