"""No process outlives the one that it belongs to, however early that dies."""

from __future__ import annotations

import subprocess
import sys

from svc_kit.parent_death import dying_with_this_process

# Looks only once the command that started it is dead; the pipe then has no other writer than itself.
LATE = """
import os, sys, time
from svc_kit.parent_death import die_with_command
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.01)
die_with_command()
print("still there")
"""
COMMAND = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
"""


def test_a_process_that_starts_up_after_its_commands_death_dies_too() -> None:
    command = dying_with_this_process(sys.executable, "-c", COMMAND, LATE)
    # Ends when the last process has closed the pipe.
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
