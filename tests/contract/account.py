"""What the tests do in an account's name: each response is held against the contracts on its way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from tests.contract.contracts import check_error, check_response

JOBS = "/api/v1/fine-tuning/jobs"
DATASETS = "/api/v1/fine-tuning/datasets"
MODELS = "/api/v1/fine-tuning/models"
SUBMIT = "/fine_tuning/jobs/submit"
STATUS = "/fine_tuning/jobs/status"
CANCEL = "/fine_tuning/jobs/cancel"
TAIL = "/fine_tuning/jobs/tail"
DIALOGS = "/fine_tuning/datasets"
CHAT = "/v1/chat/completions"

BASE_MODEL = "tunery-tiny"
ENDED = ("completed", "failed", "cancelled")
_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 420


def qa_csv(num_rows: int = 8) -> str:
    """A small CSV file of questions and answers."""
    return "question,answer\n" + "".join(f"What is {n} plus one?,It is {n + 1}.\n" for n in range(num_rows))


def dialogs_jsonl(num_rows: int = 8) -> str:
    """A small JSONL file of dialogs."""
    return "".join(
        json.dumps(
            {
                "dialog": [
                    {"role": "user", "content": f"What is {n} plus one?"},
                    {"role": "assistant", "content": f"It is {n + 1}."},
                ]
            }
        )
        + "\n"
        for n in range(num_rows)
    )


class Account:
    """An account's view of the gateway."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url
        self.api_key = api_key
        self.http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=60,
            trust_env=False,
            event_hooks={"response": [check_response]},
        )

    def upload(self, content: str | bytes = "", file_name: str = "rows.csv", **fields: str) -> httpx.Response:
        """Uploads a CSV file; `fields` are further form fields."""
        return self.http.post(
            DATASETS, files={"file": (file_name, content or qa_csv(), "text/csv")}, data=fields
        )

    def dataset(self, content: str | bytes = "", **options: str) -> str:
        """Uploads a CSV file that is right, and returns its id."""
        return str(ok(self.upload(content, **options), 201)["id"])

    def dialogs(self, content: str | bytes = "") -> str:
        """Uploads a JSONL file, and returns its id."""
        files = {"file": ("rows.jsonl", content or dialogs_jsonl(), "application/jsonl")}
        return str(ok(self.http.post(DIALOGS, files=files), 201)["id"])

    def request_job(self, dataset_id: str, **fields: Any) -> httpx.Response:
        """Asks for a job by the first contract."""
        body = {"base_model": BASE_MODEL, "dataset_id": dataset_id, "task_type": "qa", **fields}
        return self.http.post(JOBS, json=body)

    def create_job(self, dataset_id: str, **fields: Any) -> str:
        """Makes a job by the first contract, and returns its id."""
        return str(ok(self.request_job(dataset_id, **fields), 201)["id"])

    def submit(self, data: str, **fields: Any) -> httpx.Response:
        """Asks for a job by the second contract."""
        return self.http.post(SUBMIT, json={"model": BASE_MODEL, "data": data, **fields})

    def submit_job(self, data: str, **fields: Any) -> str:
        """Makes a job by the second contract, and returns its id."""
        return str(ok(self.submit(data, **fields))["job_id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as the first contract shows it."""
        return ok(self.http.get(f"{JOBS}/{job_id}"))

    def status(self, job_id: str) -> dict[str, Any]:
        """A job as the second contract shows it."""
        return ok(self.http.get(STATUS, params={"job_id": job_id}))

    def cancel(self, job_id: str) -> httpx.Response:
        """Cancels by the first contract."""
        return self.http.post(f"{JOBS}/{job_id}/cancel")

    def wait(self, job_id: str, *statuses: str, seconds: float = _PATIENCE_SECONDS) -> dict[str, Any]:
        """Returns the job once it has one of the first contract's statuses; fails if it ended otherwise."""
        deadline = time.monotonic() + seconds
        while (job := self.job(job_id))["status"] not in statuses:
            if job["status"] in ENDED or time.monotonic() > deadline:
                pytest.fail(f"waited for {statuses}, but: {job} {self.log(job_id)}")
            time.sleep(_POLL_SECONDS)
        return job

    def wait_status(self, job_id: str, *statuses: str) -> dict[str, Any]:
        """Returns the job once it has one of the second contract's statuses."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (job := self.status(job_id))["status"] not in statuses:
            if job["status"] in ("success", "failed", "cancelled") or time.monotonic() > deadline:
                pytest.fail(f"waited for {statuses}, but: {job} {self.log(job_id)}")
            time.sleep(_POLL_SECONDS)
        return job

    def log(self, job_id: str) -> list[str]:
        """The messages of a job's log so far."""
        text = self.http.get(self.status(job_id)["logs"]).text
        return [line.partition(" ")[2] for line in text.splitlines()]

    def balance(self) -> float:
        """What the account can spend."""
        return float(ok(self.http.get("/api/v1/credits"))["balance"])

    def entries(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """The ledger's lines, or those of one job."""
        entries: list[dict[str, Any]] = ok(self.http.get("/api/v1/credits/entries"))["data"]
        return [entry for entry in entries if job_id is None or entry.get("job_id") == job_id]


def ok(response: httpx.Response, status: int = 200) -> Any:
    """A success's body."""
    assert response.status_code == status, response.text
    return response.json()


def refused(response: httpx.Response, status: int, code: str, *words: str) -> str:
    """An error's message, which has all of `words`."""
    response.read()
    assert response.status_code == status, response.text
    error = check_error(response)
    assert error["code"] == code, error
    return _with_words(error["message"], words)


def _with_words(message: str, words: Iterable[str]) -> str:
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    return message
