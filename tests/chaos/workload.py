"""What runs while something breaks, what of it was acknowledged, and how a moment of it is met exactly."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.stack import ChaosStack
from tests.integration.tunery.running import wait_for
from tunery.client import ENDED_STATUSES, ClientError, LogRecord, TuneryClient

JOBS = "/api/v1/fine-tuning/jobs"
DATASETS = "/api/v1/fine-tuning/datasets"
CREDITS = 1e6
NUM_ROWS = 64
EPOCHS = 4
PATIENCE_SECONDS = 120.0
MOMENT_SECONDS = 60.0
_PAUSE_SECONDS = 0.1
_LARGE_ROWS = 500_000  # over 8 MiB, so that it is stored in parts


def rows(count: int) -> bytes:
    """A CSV file of questions and answers, always the same."""
    lines = (f"What is {n} plus one?,It is {n + 1}.\n" for n in range(count))
    return ("question,answer\n" + "".join(lines)).encode()


@dataclass
class FollowedJob:
    """A job that was acknowledged, and what its followers were told of it.

    Attributes:
        id: the job's.
        cancel_asked: whether its owner has tried to cancel it.
        cancelled: whether that was acknowledged.
        log: what a follower of the log saw, reconnecting with `after_seq`.
        metrics: what a follower of the metrics saw, alike; None where there was none.
        errors: what ended a follower.
    """

    id: str
    cancel_asked: bool = False
    cancelled: bool = False
    log: list[LogRecord] = field(default_factory=list)
    metrics: list[dict[str, Any]] | None = None
    errors: list[BaseException] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def steps(self) -> int:
        """How many optimizer steps the follower saw so far."""
        return sum(record.kind == "step" for record in self.log)


def _is_answer(response: httpx.Response) -> bool:
    """Whether a service has answered, rather than ended in the midst of the call (499)."""
    return response.status_code < 500 and response.status_code != 499


def _new_account(stack: ChaosStack, name: str) -> tuple[str, str]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with TuneryClient(stack.url, stack.api_key) as admin:
                return admin.create_account(name, CREDITS)
        except ClientError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


class Account:
    """A client that keeps on asking until it is answered, and remembers each answer.

    Attributes:
        datasets: each acknowledged dataset with the SHA-256 of its bytes, by id.
        jobs: each acknowledged job, by id.
        doubtful_uploads: uploads that broke without an answer; each may have been stored.
        doubtful_jobs: requests for a job that broke without an answer; each may have been done later.
        failures: what ended a thread of the workload.
    """

    def __init__(self, stack: ChaosStack, name: str) -> None:
        self.stack = stack
        self.id, self.api_key = _new_account(stack, name)
        self.datasets: dict[str, tuple[dict[str, Any], str]] = {}
        self.jobs: dict[str, FollowedJob] = {}
        self.doubtful_uploads = 0
        self.doubtful_jobs = 0
        self.failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self.http = httpx.Client(
            base_url=stack.url,
            headers={"authorization": f"Bearer {self.api_key}"},
            timeout=httpx.Timeout(30, connect=2),
            trust_env=False,
        )

    def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Asks until an answer comes that is no fault of the service's."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            told: object
            try:
                response = self.http.request(method, path, **arguments)
                if _is_answer(response):
                    return response
                told = f"{response.status_code} {response.text}"
            except httpx.TransportError as error:
                told = repr(error)
            assert time.monotonic() < deadline, f"{method} {path} is not answered: {told}"
            time.sleep(_PAUSE_SECONDS)

    def get(self, path: str, **params: Any) -> Any:
        """Returns what is there, once it is told."""
        response = self.ask("GET", path, params=params)
        assert response.status_code == 200, response.text
        return response.json()

    def upload(self, content: bytes, halfway: Callable[[], None] | None = None) -> str:
        """Uploads a dataset, from its beginning again where that breaks; returns its id.

        Args:
            content: a CSV file.
            halfway: called once, when half of it is sent.
        """
        boundary = "chaos"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="rows.csv"\r\n\r\n'
        middle = len(content) // 2

        def body() -> Iterator[bytes]:
            nonlocal halfway
            yield head.encode() + content[:middle]
            if halfway is not None:
                pause, halfway = halfway, None
                pause()
            yield content[middle:] + f"\r\n--{boundary}--\r\n".encode()

        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            told: object
            try:
                headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
                response = self.http.post(DATASETS, content=body(), headers=headers)
                if response.status_code == 201:
                    dataset: dict[str, Any] = response.json()
                    self.datasets[dataset["id"]] = (dataset, hashlib.sha256(content).hexdigest())
                    return str(dataset["id"])
                told = f"{response.status_code} {response.text}"
            except httpx.TransportError as error:
                told = repr(error)
            self.doubtful_uploads += 1
            assert time.monotonic() < deadline, f"the upload does not succeed: {told}"
            time.sleep(_PAUSE_SECONDS)

    def create_job(self, dataset_id: str, epochs: int = EPOCHS, with_metrics: bool = False) -> FollowedJob:
        """Makes a job on a dataset that no other thread uses, and has its log followed.

        Where no answer came, the list of jobs tells whether it was made.
        """
        body = {
            "base_model": "tunery-tiny",
            "dataset_id": dataset_id,
            "task_type": "qa",
            "hyperparameters": {"epochs": epochs},
        }
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            told: object
            try:
                response = self.http.post(JOBS, json=body)
                if response.status_code == 201:
                    job_id = str(response.json()["id"])
                    break
                assert not _is_answer(response), response.text
                told = f"{response.status_code} {response.text}"
            except httpx.TransportError as error:
                told = repr(error)
            self.doubtful_jobs += 1
            assert time.monotonic() < deadline, f"no job can be made: {told}"
            time.sleep(_PAUSE_SECONDS)
            listed = self.get(JOBS, limit=100)["data"]
            made = [job["id"] for job in listed if job["dataset_id"] == dataset_id]
            if new := [each for each in made if each not in self.jobs]:
                [job_id] = new
                break
        job = FollowedJob(job_id, metrics=[] if with_metrics else None)
        self.jobs[job_id] = job
        self._in_thread(job, self._follow_log)
        if with_metrics:
            self._in_thread(job, self._follow_metrics)
        return job

    def _in_thread(self, job: FollowedJob, follow: Callable[[FollowedJob], None]) -> None:
        def run() -> None:
            try:
                follow(job)
            except BaseException as error:
                job.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        job.threads.append(thread)

    def _follow_log(self, job: FollowedJob) -> None:
        with TuneryClient(self.stack.url, self.api_key) as client:
            for record in client.follow_log(job.id, reconnect_seconds=PATIENCE_SECONDS):
                job.log.append(record)

    def _follow_metrics(self, job: FollowedJob) -> None:
        assert job.metrics is not None
        while True:
            after_seq = job.metrics[-1]["seq"] if job.metrics else 0
            has_ended = self.status(job) in ENDED_STATUSES
            with contextlib.suppress(httpx.TransportError):
                path, params = f"{JOBS}/{job.id}/metrics", {"after_seq": after_seq}
                with self.http.stream("GET", path, params=params) as response:
                    if response.status_code == 200:
                        for line in response.iter_lines():
                            metric = json.loads(line)
                            if "seq" not in metric:  # the stream has failed, and says so in its last line
                                break
                            job.metrics.append(metric)
                        else:
                            if has_ended:
                                return
            time.sleep(_PAUSE_SECONDS)

    def status(self, job: FollowedJob) -> str:
        """A job's state in the first contract's words."""
        return str(self.get(f"{JOBS}/{job.id}")["status"])

    def in_background(self, work: Callable[[], object]) -> None:
        """Does something in a thread, which `finish` waits for."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def cancel(self, job: FollowedJob) -> None:
        """Cancels a job, until that is acknowledged or the job has ended otherwise."""
        job.cancel_asked = True
        response = self.ask("POST", f"{JOBS}/{job.id}/cancel")
        if response.status_code == 409:  # an earlier call was done though its answer was lost; or too late
            job.cancelled = self.status(job) == "cancelled"
        else:
            assert response.status_code == 200, response.text
            job.cancelled = True

    def finish(self) -> None:
        """Returns when what was begun is done, every job has ended, and every follower knows."""
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        for job in self.jobs.values():
            for thread in job.threads:
                thread.join(PATIENCE_SECONDS)

    @contextlib.contextmanager
    def leaving_nothing(self) -> Iterator[None]:
        """Cancels the account's jobs where the block fails, so that they don't hold up what comes next."""
        try:
            yield
        except Exception:
            for job in self.jobs.values():
                self.cancel(job)
            raise

    def close(self) -> None:
        self.http.close()


@contextlib.contextmanager
def _upload(account: Account) -> Iterator[None]:
    """A large file is half sent, and a part of it is in the store."""
    reached, go_on = threading.Event(), threading.Event()

    def halfway() -> None:
        reached.set()
        go_on.wait(MOMENT_SECONDS)

    with account.stack.proxy.hold("PUT .*/datasets/.*partNumber=1") as hold:
        account.in_background(lambda: account.upload(rows(_LARGE_ROWS), halfway))
        assert reached.wait(MOMENT_SECONDS)
        assert hold.reached.wait(MOMENT_SECONDS), "no part of the upload is in the store"
        yield
        go_on.set()


@contextlib.contextmanager
def _at_request(account: Account, pattern: str) -> Iterator[FollowedJob]:
    """A request of a job to the store is done, and its answer on the way."""
    dataset_id = account.upload(rows(NUM_ROWS))
    with account.stack.proxy.hold(f"{pattern}") as hold:
        job = account.create_job(dataset_id)
        assert hold.reached.wait(MOMENT_SECONDS), f"no {pattern}"
        yield job


@contextlib.contextmanager
def _validation(account: Account) -> Iterator[None]:
    with _at_request(account, "PUT .*/jobs/.*/data/"):
        yield


@contextlib.contextmanager
def _queued(account: Account) -> Iterator[None]:
    """The trainer has another job, which is cancelled afterwards."""
    dataset_id = account.upload(rows(NUM_ROWS))
    other = account.create_job(dataset_id, epochs=1000)
    wait_for(lambda: account.status(other) == "running", "the other job to run")
    job = account.create_job(dataset_id)
    wait_for(lambda: any("job queued" in record.message for record in job.log), "the job to be queued")
    yield
    account.in_background(lambda: account.cancel(other))


@contextlib.contextmanager
def _training(account: Account, with_metrics: bool = False) -> Iterator[None]:
    """The second epoch has begun."""
    job = account.create_job(account.upload(rows(NUM_ROWS)), epochs=3 * EPOCHS, with_metrics=with_metrics)
    wait_for(lambda: job.steps() > NUM_ROWS // 8 + 1 or job.errors, "steps", MOMENT_SECONDS)
    yield


@contextlib.contextmanager
def _checkpointing(account: Account) -> Iterator[None]:
    """There is a checkpoint to go on from, and a second one is half stored."""
    with _at_request(account, "PUT .*/checkpoints/epoch-2/"):
        yield


@contextlib.contextmanager
def _artifact(account: Account) -> Iterator[None]:
    with _at_request(account, "PUT .*/artifact/"):
        yield


@contextlib.contextmanager
def _cancelling(account: Account) -> Iterator[None]:
    """The job is cancelled while its trainer stores a checkpoint."""
    with _at_request(account, "PUT .*/checkpoints/epoch-2/") as job:
        account.in_background(lambda: account.cancel(job))
        yield


@contextlib.contextmanager
def _tailing(account: Account) -> Iterator[None]:
    """As in training, with a follower of the metrics beside that of the log."""
    with _training(account, with_metrics=True):
        yield


# Each yields at its moment; what was held back goes on at the block's end.
MOMENTS: dict[str, Callable[[Account], AbstractContextManager[None]]] = {
    "upload": _upload,
    "validation": _validation,
    "queued": _queued,
    "training": _training,
    "checkpointing": _checkpointing,
    "artifact": _artifact,
    "cancelling": _cancelling,
    "tailing": _tailing,
}
