"""Clients that never try again: what they are answered while services are restarted under them."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx

from tests.chaos.workload import DATASETS, JOBS, Account, rows

_PAUSE_SECONDS = 0.05


@dataclass
class Traffic:
    """The requests of one kind so far.

    Attributes:
        num_requests: those that were answered or failed.
        failures: what went wrong, in words.
    """

    num_requests: int = 0
    failures: list[str] = field(default_factory=list)

    def ask(self, client: httpx.Client, method: str, path: str, expected: int, **arguments: object) -> str:
        """Asks once; returns the id in the answer, if there is one."""
        self.num_requests += 1
        try:
            response = client.request(method, path, **arguments)  # type: ignore[arg-type]  # httpx's own
        except httpx.TransportError as error:
            self.failures.append(f"{method} {path}: {error!r}")
            return ""
        if response.status_code != expected:
            self.failures.append(f"{method} {path}: {response.status_code} {response.text[:200]}")
            return ""
        return str(response.json().get("id", "")) if response.content else ""


def _read(client: httpx.Client, traffic: Traffic, _dataset_id: str) -> None:
    for path in (JOBS, DATASETS, "/api/v1/credits", "/api/v1/fine-tuning/models"):
        traffic.ask(client, "GET", path, 200)


def _create(client: httpx.Client, traffic: Traffic, dataset_id: str) -> None:
    body = {"base_model": "tunery-tiny", "dataset_id": dataset_id, "task_type": "qa"}
    headers = {"idempotency-key": str(uuid.uuid4())}
    if job_id := traffic.ask(client, "POST", JOBS, 201, json=body, headers=headers):
        client.post(f"{JOBS}/{job_id}/cancel")  # of no account here: it only keeps the queue short


def _upload(client: httpx.Client, traffic: Traffic, _dataset_id: str) -> None:
    files = {"file": ("rows.csv", rows(8), "text/csv")}
    headers = {"idempotency-key": str(uuid.uuid4())}
    traffic.ask(client, "POST", DATASETS, 201, files=files, headers=headers)


KINDS: dict[str, Callable[[httpx.Client, Traffic, str], None]] = {
    "reads": _read,
    "jobs made": _create,
    "uploads": _upload,
}


@contextlib.contextmanager
def running_traffic(account: Account) -> Iterator[dict[str, Traffic]]:
    """Asks for the block's time, with a client for each kind of request."""
    dataset_id = account.upload(rows(8))
    traffic = {name: Traffic() for name in KINDS}
    stopped = threading.Event()

    def run(name: str) -> None:
        headers = {"authorization": f"Bearer {account.api_key}"}
        with httpx.Client(base_url=account.stack.url, headers=headers, timeout=30, trust_env=False) as client:
            while not stopped.wait(_PAUSE_SECONDS):
                # What becomes of the cancelling is not counted.
                with contextlib.suppress(httpx.TransportError):
                    KINDS[name](client, traffic[name], dataset_id)

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in KINDS]
    for thread in threads:
        thread.start()
    try:
        yield traffic
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
