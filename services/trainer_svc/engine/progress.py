"""How fast a run is and how long it still takes."""

from __future__ import annotations

import time
from collections import deque

_WINDOW_STEPS = 20


class Progress:
    """Speed over the last steps, validation and checkpoints left out."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=_WINDOW_STEPS)
        self._started_at = time.perf_counter()

    def start_step(self) -> None:
        self._started_at = time.perf_counter()

    def end_step(self, num_tokens: int) -> None:
        self._steps.append((num_tokens, time.perf_counter() - self._started_at))

    @property
    def tokens_per_second(self) -> float:
        """At least one step must have ended."""
        return sum(tokens for tokens, _ in self._steps) / self._seconds

    def remaining_seconds(self, steps_left: int) -> float:
        """At least one step must have ended."""
        return steps_left * self._seconds / len(self._steps)

    @property
    def last_step_seconds(self) -> float:
        """At least one step must have ended."""
        return max(self._steps[-1][1], 1e-9)

    @property
    def _seconds(self) -> float:
        return max(sum(seconds for _, seconds in self._steps), 1e-9)
