"""Large blocks go back to the kernel, also after the first."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: what it asks of the C library lasts as long as the process.
LARGE_AFTER_A_LARGER_WAS_FREED = """
import ctypes
from pathlib import Path
from dataset_svc.__main__ import give_back_large_blocks

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

give_back_large_blocks()
larger = bytes(bytearray(b"x" * 30_000_000))
del larger
before = resident_mb()
blocks = []
for _ in range(50):
    blocks.append((bytearray(b"x" * 2_000_000), bytearray(b"y" * 1_000)))
small = [block[1] for block in blocks]
del blocks
print(resident_mb() - before)
"""


def test_large_blocks_leave_no_gaps_behind_when_they_are_freed() -> None:
    command = [sys.executable, "-c", LARGE_AFTER_A_LARGER_WAS_FREED]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(run.stdout) < 5
