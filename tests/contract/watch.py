"""A job watched while it lives: its states through both contracts, and its log as it arrives."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.contract.account import ENDED, TAIL, Account
from tests.contract.contracts import check_log_line

_POLL_SECONDS = 0.03


@dataclass
class Watch:
    """What was seen. To be read once `wait` has returned.

    Attributes:
        jobs: the first contract's views, one for each that differs from the one before.
        statuses: the second contract's, alike.
        lines: each line of the tail with the moment of its arrival.
    """

    account: Account
    job_id: str
    jobs: list[dict[str, Any]] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    lines: list[tuple[dt.datetime, dict[str, str]]] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def wait(self, seconds: float = 600) -> Watch:
        """Returns when the job has ended and its tail too."""
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive(), f"{thread.name} of {self.job_id} goes on and on"
        assert not self._errors, self._errors
        return self

    def _poll(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            job = self.account.job(self.job_id)
            status = self.account.status(self.job_id)["status"]
            if not self.jobs or self.jobs[-1] != job:
                self.jobs.append(job)
            if not self.statuses or self.statuses[-1] != status:
                self.statuses.append(status)
            if job["status"] in ENDED and status in ("success", "failed", "cancelled"):
                return

    def _tail(self) -> None:
        parameters = {"job_id": self.job_id}
        with self.account.http.stream("GET", TAIL, params=parameters, timeout=600) as response:
            for text in response.iter_lines():
                now = dt.datetime.now(dt.UTC)
                line = json.loads(text)
                check_log_line(line)
                self.lines += [(now, log) for log in line["logs"]]
                if self._stopped.is_set():
                    return

    def _run(self, work: Any) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)

    def start(self) -> None:
        for work in (self._poll, self._tail):
            thread = threading.Thread(target=self._run, args=(work,), name=work.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._stopped.set()


@contextlib.contextmanager
def watch(account: Account, job_id: str) -> Iterator[Watch]:
    """Watches a job for the block's time, or until its end."""
    watching = Watch(account, job_id)
    watching.start()
    try:
        yield watching
    finally:
        watching.stop()
