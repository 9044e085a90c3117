"""What can go wrong in a run, and whose doing it is."""

from __future__ import annotations

from typing import Literal

Fault = Literal["job", "platform", "memory"]

# The engine's exit code for a job's fault; every other failure exits with 1.
JOB_FAULT_EXIT_CODE = 3


class JobFault(ValueError):
    """The run can't succeed as it was asked for: its data, model or settings must change first.

    The message is for the user: what was wrong, where, what was expected, what to do. Running the same
    job again ends the same way. Every other exception is the platform's fault.
    """


class OutOfMemory(RuntimeError):
    """The memory is full, and only a new start with smaller passes helps.

    Attributes:
        tokens_per_pass: what to start with.
    """

    def __init__(self, tokens_per_pass: int) -> None:
        super().__init__(f"out of memory; to be gone on with in passes of at most {tokens_per_pass:,} tokens")
        self.tokens_per_pass = tokens_per_pass


class Stopped(Exception):
    """The run was told to stop. Its checkpoint is written, and another run goes on from it."""


class Diverged(ArithmeticError):
    """The loss or its gradient was infinite or not a number in too many steps in a row."""
