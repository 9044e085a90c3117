"""What a run tells the outside: one JSON object a line in `events.jsonl`, each with a line for people.

Kinds: `log`, `step`, `validation`, `checkpoint`, `checkpoint_removed`, `artifact`, and at the end one of
`finished`, `stopped`, `failed`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

EVENTS_FILE = "events.jsonl"

Kind = Literal[
    "log",
    "step",
    "validation",
    "checkpoint",
    "checkpoint_removed",
    "artifact",
    "finished",
    "stopped",
    "failed",
]

# Called with each event after it is written.
Subscriber = Callable[[dict[str, Any]], None]


class EventLog:
    """The one writer of a run's events, for any thread. Ranks above 0 hold one that is silent."""

    def __init__(self, output_dir: Path, *, silent: bool = False) -> None:
        """Opens the file for appending.

        Args:
            output_dir: the run's folder; must exist.
            silent: write nothing and tell no subscriber.
        """
        self._lock = threading.Lock()
        self._subscribers: list[Subscriber] = []
        self._file = None if silent else (output_dir / EVENTS_FILE).open("a", encoding="utf-8", buffering=1)

    def subscribe(self, subscriber: Subscriber) -> None:
        self._subscribers.append(subscriber)

    def log(self, message: str, **facts: Any) -> None:
        """Writes a `log` event: something that a person may want to know."""
        self.write("log", message, **facts)

    def write(self, kind: Kind, message: str, **facts: Any) -> None:
        """Writes one event and flushes it, so that a follower of the file sees whole lines at once.

        Args:
            kind: the event's kind.
            message: the line for people.
            facts: the kind's own fields; JSON values, and finite numbers only.
        """
        if self._file is None:
            return
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        event = {"time": now, "kind": kind, "message": message, **facts}
        # NaN is no JSON: a reader in another language would choke on it.
        line = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            for subscriber in self._subscribers:
                subscriber(event)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def plain_log(path: Path) -> Subscriber:
    """A subscriber that appends `time message` lines to a file."""

    def append(event: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{event['time']} {event['message']}\n")

    return append


def format_duration(seconds: float) -> str:
    """Seconds as people write them: `45s`, `1m 32s`, `2h 05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
