"""Tells whether a run died because the host's memory was full, and what to try next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The kernel counts here the processes that it has killed for want of memory: of this container, or of all.
COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


class MemoryFull(Exception):
    """A run was out of memory, and may fit in smaller passes.

    Attributes:
        tokens_per_pass: what to try next.
    """

    def __init__(self, message: str, tokens_per_pass: int) -> None:
        super().__init__(message)
        self.tokens_per_pass = tokens_per_pass


class MemoryWatch:
    """Watches one run of the engine from its start to its death."""

    def __init__(self, counters: tuple[Path, ...] | None = None) -> None:
        self._counters = COUNTERS if counters is None else counters
        self._kills_before = self._count_kills()
        self._tokens_per_pass = 0
        self._longest_row_tokens = 0

    def note(self, event: dict[str, Any]) -> None:
        """Takes from the run's events how large its passes are."""
        self._tokens_per_pass = event.get("tokens_per_pass", self._tokens_per_pass)
        self._longest_row_tokens = event.get("longest_row_tokens", self._longest_row_tokens)

    @property
    def kernel_has_killed(self) -> bool:
        """Whether the kernel has killed a process for want of memory since the start."""
        return self._count_kills() > self._kills_before

    @property
    def smaller_passes(self) -> int | None:
        """How many tokens to try in one pass next; None when one row is the largest pass already."""
        if self._tokens_per_pass <= self._longest_row_tokens:
            return None
        return max(self._tokens_per_pass // 2, self._longest_row_tokens)

    def _count_kills(self) -> int:
        for counter in self._counters:
            if counter.exists():
                for line in counter.read_text().splitlines():
                    name, _, count = line.partition(" ")
                    if name == "oom_kill":
                        return int(count)
        return 0
