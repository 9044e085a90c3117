"""Cancelling, deleting and following jobs that live, while the trainer is busy with a long one."""

from __future__ import annotations

import concurrent.futures
import datetime as dt
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import RunningStack
from tests.contract.account import CANCEL, DATASETS, JOBS, TAIL, Account, dialogs_jsonl, ok, qa_csv, refused
from tests.contract.conftest import BusyTrainer
from tests.contract.processes import eventually, service_process, training_processes

STOP_SECONDS = 5
RACES = 25


def test_job_cancelled_in_the_queue(account: Account, busy_trainer: BusyTrainer) -> None:
    assert busy_trainer.job_id
    dataset_id = account.dataset()
    job_id = account.create_job(dataset_id)
    account.wait_status(job_id, "queued")
    refused(account.http.delete(f"{DATASETS}/{dataset_id}"), 409, "dataset_in_use", job_id)

    job = ok(account.cancel(job_id))
    assert job["status"] == "cancelled"
    assert set(job) == {
        *("id", "status", "base_model", "dataset_id", "task_type", "hyperparameters"),
        *("created_at", "completed_at"),
    }
    # At once, and no sleep in between.
    assert account.http.delete(f"{DATASETS}/{dataset_id}").status_code == 204
    assert account.job(job_id) == job
    assert account.log(job_id)[-1] == "job cancelled by its owner"


def test_job_cancelled_before_its_data_is_checked(account: Account, busy_trainer: BusyTrainer) -> None:
    assert busy_trainer.job_id
    dataset_id = account.dialogs(dialogs_jsonl(30_000))
    job_id = account.submit_job(f"dataset://{dataset_id}")
    cancelled = ok(account.http.post(CANCEL, json={"job_id": job_id}))

    assert cancelled["status"] == "cancelled"
    assert "finished_at" in cancelled
    assert not any("queued" in line for line in account.log(job_id)), "it was in the state validation"
    assert account.http.delete(f"{DATASETS}/{dataset_id}").status_code == 204
    assert account.status(job_id) == cancelled


@pytest.mark.parametrize("body", [None, b"", b"{}"])
def test_cancel_takes_an_empty_object_or_nothing(
    account: Account, queued: Callable[[str], str], body: bytes | None
) -> None:
    job_id = queued(account.create_job(account.dataset()))

    headers = {"Content-Type": "application/json"} if body else {}
    response = account.http.post(f"{JOBS}/{job_id}/cancel", content=body, headers=headers)
    assert ok(response)["status"] == "cancelled"


def test_second_cancel_is_409(account: Account, queued: Callable[[str], str]) -> None:
    job_id = queued(account.create_job(account.dataset()))

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: account.cancel(job_id), range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    refused(account.cancel(job_id), 409, "job_ended", "cancelled")
    refused(account.http.post(CANCEL, json={"job_id": job_id}), 409, "job_ended", "cancelled")


def test_jobs_of_each_contract_are_seen_and_cancelled_by_the_other(
    account: Account, queued: Callable[[str], str]
) -> None:
    first = queued(account.create_job(account.dataset(), hyperparameters={"epochs": 5, "max_steps": 9}))
    second = queued(account.submit_job(f"dataset://{account.dialogs()}", metadata={"a": 1}))

    config = account.status(first)["input_config"]
    assert config["model"] == "tunery-tiny"
    assert config["data"] == f"dataset://{account.job(first)['dataset_id']}"
    assert config["fine_tuning_options"]["n_epochs"] == 5
    assert account.status(first)["status"] == account.job(second)["status"] == "queued"
    assert second in [job["id"] for job in ok(account.http.get(JOBS))["data"]]

    assert ok(account.http.post(CANCEL, json={"job_id": first}))["status"] == "cancelled"
    assert ok(account.cancel(second))["status"] == "cancelled"
    assert account.job(first)["completed_at"] == account.status(first)["finished_at"]


def test_running_job_keeps_its_dataset(busy_trainer: BusyTrainer) -> None:
    account, job_id = busy_trainer.account, busy_trainer.job_id
    dataset_id = account.job(job_id)["dataset_id"]

    refused(account.http.delete(f"{DATASETS}/{dataset_id}"), 409, "dataset_in_use", job_id)
    assert account.http.get(f"{DATASETS}/{dataset_id}").status_code == 200


def test_creating_and_deleting_at_the_same_time_never_leaves_a_job_without_data(
    account: Account, busy_trainer: BusyTrainer
) -> None:
    assert busy_trainer.job_id
    outcomes: set[tuple[int, int]] = set()
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for number in range(RACES):
            dataset_id = account.dataset(qa_csv(2))
            barrier = threading.Barrier(2)

            def create(dataset_id: str = dataset_id, barrier: threading.Barrier = barrier) -> httpx.Response:
                barrier.wait()
                return account.request_job(dataset_id)

            def delete(
                dataset_id: str = dataset_id,
                barrier: threading.Barrier = barrier,
                pause: float = (number % 5) * 0.004,
            ) -> httpx.Response:
                barrier.wait()
                threading.Event().wait(pause)  # at different moments of the job's making
                return account.http.delete(f"{DATASETS}/{dataset_id}")

            created, deleted = (
                future.result() for future in [threads.submit(create), threads.submit(delete)]
            )
            outcomes.add((created.status_code, deleted.status_code))
            if created.status_code == 201:
                refused(deleted, 409, "dataset_in_use", created.json()["id"])
                assert account.http.get(f"{DATASETS}/{dataset_id}").status_code == 200
                account.cancel(created.json()["id"])
                assert account.http.delete(f"{DATASETS}/{dataset_id}").status_code == 204
            else:
                refused(created, 400, "unknown_dataset", dataset_id)
                assert deleted.status_code == 204
    assert outcomes <= {(201, 409), (400, 204)}


class TestCredits:
    """Held, released, refused; at every point the ledger's sum is the balance."""

    @staticmethod
    def check_sum(account: Account) -> float:
        total = sum(round(entry["amount"] * 1e6) for entry in account.entries())
        assert total == round(account.balance() * 1e6)
        return total / 1e6

    def test_hold_and_release(self, new_account: Callable[..., Account], busy_trainer: BusyTrainer) -> None:
        assert busy_trainer.job_id
        account = new_account(credits=12.5)
        assert [entry["kind"] for entry in account.entries()] == ["grant"]
        assert self.check_sum(account) == 12.5

        job_id = account.create_job(account.dataset())
        held = 12.5 - self.check_sum(account)
        [hold] = account.entries(job_id)
        assert hold["kind"] == "hold"
        assert hold["amount"] == pytest.approx(-held)
        # A job of the second contract costs something too, once its data is known.
        submitted = account.submit_job(f"dataset://{account.dialogs()}")
        account.wait_status(submitted, "queued")
        assert self.check_sum(account) < 12.5 - held

        for each in (job_id, submitted):
            account.cancel(each)
            self.check_sum(account)
            assert [entry["kind"] for entry in account.entries(each)] == ["hold", "release"]
        assert self.check_sum(account) == 12.5

    def test_max_steps_and_epochs_count(
        self, new_account: Callable[..., Account], busy_trainer: BusyTrainer
    ) -> None:
        assert busy_trainer.job_id
        account = new_account(credits=1000)
        dataset_id = account.dataset(qa_csv(64))

        def held(**settings: Any) -> float:
            before = account.balance()
            job_id = account.create_job(dataset_id, hyperparameters=settings)
            after = account.balance()
            account.cancel(job_id)
            return before - after

        once = held(epochs=1)
        assert held(epochs=4) == pytest.approx(4 * once, rel=0.01)
        assert held(epochs=4, max_steps=8) == pytest.approx(once, rel=0.01)
        assert held(epochs=1, validation_split=0.5) < once

    def test_too_little_is_402_with_both_figures(
        self, new_account: Callable[..., Account], busy_trainer: BusyTrainer
    ) -> None:
        assert busy_trainer.job_id
        account = new_account(credits=0.25)
        csv, dialogs = account.dataset(qa_csv(100)), account.dialogs(dialogs_jsonl(100))

        message = refused(account.request_job(csv), 402, "insufficient_credits", "0.25", "needs")
        assert "epochs" in message
        refused(account.submit(f"dataset://{dialogs}"), 402, "insufficient_credits", "0.25")
        assert ok(account.http.get(JOBS))["total"] == 0
        assert len(account.entries()) == 1
        assert self.check_sum(account) == 0.25
        # What was refused holds nothing.
        for dataset_id in (csv, dialogs):
            assert account.http.delete(f"{DATASETS}/{dataset_id}").status_code == 204

    def test_balance_is_never_spent_twice(
        self, new_account: Callable[..., Account], busy_trainer: BusyTrainer
    ) -> None:
        assert busy_trainer.job_id
        probe = new_account(credits=100)
        cost = 100 - (probe.create_job(probe.dataset()), probe.balance())[1]
        for job in ok(probe.http.get(JOBS))["data"]:
            probe.cancel(job["id"])
        account = new_account(credits=round(2.5 * cost, 6))
        dataset_id = account.dataset()

        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda _: account.request_job(dataset_id), range(6)))
        assert sorted(answer.status_code for answer in answers) == [201, 201, 402, 402, 402, 402]
        assert self.check_sum(account) == pytest.approx(0.5 * cost, abs=1e-5)
        for job in ok(account.http.get(JOBS))["data"]:
            account.cancel(job["id"])
        assert self.check_sum(account) == round(2.5 * cost, 6)

    def test_account_without_a_balance_pays_nothing(
        self, account: Account, queued: Callable[[str], str]
    ) -> None:
        queued(account.create_job(account.dataset()))
        assert ok(account.http.get("/api/v1/credits")) == {}
        assert ok(account.http.get("/api/v1/credits/entries")) == {"data": []}


def test_tail_of_a_queued_job_waits_and_ends_with_its_cancelling(
    account: Account, queued: Callable[[str], str]
) -> None:
    job_id = queued(account.create_job(account.dataset()))
    messages: list[str] = []
    with account.http.stream("GET", TAIL, params={"job_id": job_id}) as response:
        for text in response.iter_lines():
            messages += [log["message"] for log in json.loads(text)["logs"]]
            if "job queued" in messages[-1]:
                account.cancel(job_id)
    assert messages[0].startswith(f"job {job_id} made")
    assert messages[-1] == "job cancelled by its owner"


def test_closed_tails_free_everything(stack: RunningStack, busy_trainer: BusyTrainer) -> None:
    account, parameters = busy_trainer.account, {"job_id": busy_trainer.job_id}
    services = [service_process(stack, module) for module in ("job_svc", "gateway.authz")]
    [envoy] = [
        process
        for process in psutil.Process(stack.process.pid).children()
        if "envoy" in os.path.basename(process.exe())
    ]

    def open_and_close(count: int) -> None:
        with httpx.Client(
            base_url=account.url,
            headers=account.http.headers,
            timeout=60,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        ) as client:
            responses = []
            for _ in range(count):
                request = client.build_request("GET", TAIL, params=parameters)
                response = client.send(request, stream=True)
                next(response.iter_raw())
                responses.append(response)
            for response in responses:
                response.close()

    open_and_close(50)  # the pools of connections to the database grow with what is asked at once
    watched = [*services, envoy]
    eventually(lambda: len(envoy.net_connections("tcp")) < 100, 10, "Envoy's connections to be closed")
    before = [process.num_fds() for process in watched]
    for _ in range(4):
        open_and_close(50)
    started = time.monotonic()
    assert account.job(busy_trainer.job_id)["status"] == "running"
    assert time.monotonic() - started < 2
    # A few connections more or less are the pools' own.
    eventually(
        lambda: all(now.num_fds() <= old + 5 for now, old in zip(watched, before, strict=True)),
        10,
        f"file descriptors to come back to {before}, not {[process.num_fds() for process in watched]}",
    )


def test_many_tails_see_each_line_in_time(busy_trainer: BusyTrainer) -> None:
    account = busy_trainer.account

    def follow(_: int) -> list[float]:
        lateness: list[float] = []
        with account.http.stream("GET", TAIL, params={"job_id": busy_trainer.job_id}) as response:
            for text in response.iter_lines():
                now = dt.datetime.now(dt.UTC)
                logs = json.loads(text)["logs"]
                lateness += [
                    (now - dt.datetime.fromisoformat(log["timestamp"])).total_seconds() for log in logs[-1:]
                ]
                if len(lateness) > 12:
                    return lateness[2:]  # what was there already came first
        raise AssertionError("the tail ended")

    with busy_trainer.moving(), concurrent.futures.ThreadPoolExecutor(8) as threads:
        late = [each for lateness in threads.map(follow, range(8)) for each in lateness]
    assert statistics.median(late) < 0.5, late


def test_cancelling_a_running_job_stops_its_processes(
    stack: RunningStack, busy_trainer: BusyTrainer, stored_keys: Callable[[str], list[str]]
) -> None:
    account, job_id = busy_trainer.account, busy_trainer.job_id
    processes = training_processes(stack)
    assert processes
    spent = account.balance()
    with account.http.stream("GET", TAIL, params={"job_id": job_id}) as response:
        lines = response.iter_lines()
        next(lines)

        job = ok(account.cancel(job_id))
        started = time.monotonic()
        assert job["status"] == "cancelled"
        eventually(lambda: not any(each.is_running() for each in processes), STOP_SECONDS, "their end")
        last = [json.loads(text) for text in lines][-1]
        assert time.monotonic() - started < STOP_SECONDS + 1
    assert last["logs"][-1]["message"] == "job cancelled by its owner"
    assert "fine_tuned_model" not in job
    assert account.job(job_id) == job

    # Unused credits come back; what was trained is paid.
    details = ok(account.http.get(f"{JOBS}/{job_id}/details"))
    assert [entry["kind"] for entry in account.entries(job_id)] == ["hold", "release", "charge"]
    assert details["credits_charged"] == pytest.approx(details["tokens_trained"] / 1000, abs=1e-6)
    assert 0 < details["credits_charged"] < details["credits_held"]
    assert account.balance() > spent
    TestCredits.check_sum(account)
    # Its partial artifacts go, the log stays, and the dataset is free.
    eventually(lambda: not [key for key in stored_keys("") if job_id in key], 15, "its objects to go")
    assert account.status(job_id)["checkpoints"] == []
    assert account.log(job_id)[-1] == "job cancelled by its owner"
    assert not training_processes(stack)
