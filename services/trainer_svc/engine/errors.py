"""What can go wrong in a run, and whose doing it is."""

from __future__ import annotations

from typing import Literal

Fault = Literal["job", "platform"]

# The engine's exit code for a job's fault; every other failure exits with 1.
JOB_FAULT_EXIT_CODE = 3


class JobFault(ValueError):
    """The run can't succeed as it was asked for: its data, model or settings must change first.

    The message is for the user: what was wrong, where, what was expected, what to do. Running the same
    job again ends the same way. Every other exception is the platform's fault.
    """
