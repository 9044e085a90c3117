"""Sections 3 and 4, from submit to the model's answer, on the jobs that train while other tests run."""

from __future__ import annotations

import concurrent.futures
import datetime as dt
import io
import json
import statistics
import tarfile
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.contract.account import CHAT, DATASETS, JOBS, MODELS, STATUS, TAIL, Account, ok, refused
from tests.contract.conftest import Trained
from tests.contract.contracts import check_log_line
from tests.contract.samples import SUFFIX_OF_64
from tests.contract.test_config_requests import exactly


@pytest.fixture(scope="session")
def qa_job(trained: Trained) -> dict[str, Any]:
    """The first job, once it is done."""
    trained.watches["qa"].wait()
    return trained.account.wait(trained.jobs["qa"], "completed")


def test_status_runs_queued_running_completed(trained: Trained, qa_job: dict[str, Any]) -> None:
    watch = trained.watches["qa"]
    statuses = [job["status"] for job in watch.jobs]

    assert list(dict.fromkeys(statuses)) == ["queued", "running", "completed"]
    assert sorted(statuses, key=["queued", "running", "completed"].index) == statuses
    # The first two may be over before they are looked at; none comes back.
    order = ["validation", "queued", "running", "success"]
    assert watch.statuses == sorted(set(watch.statuses), key=order.index)
    assert watch.statuses[-2:] == ["running", "success"]


def test_metrics_fill_in_while_running(trained: Trained, qa_job: dict[str, Any]) -> None:
    running = [job for job in trained.watches["qa"].jobs if job["status"] == "running"]
    metrics = [job["training_metrics"] for job in running if "training_metrics" in job]

    assert "training_metrics" not in running[0]
    assert metrics
    steps = [each["steps_completed"] for each in metrics]
    assert steps == sorted(steps)
    assert all(set(each) >= {"training_loss", "steps_completed", "epochs_completed"} for each in metrics)
    assert not any("fine_tuned_model" in job or "completed_at" in job for job in running)


def test_completed_job_has_everything(trained: Trained, qa_job: dict[str, Any]) -> None:
    assert set(qa_job) == {
        *("id", "status", "base_model", "dataset_id", "task_type", "hyperparameters"),
        *("fine_tuned_model", "training_metrics", "created_at", "completed_at"),
    }
    assert qa_job["hyperparameters"] == {"epochs": 2, "learning_rate": 1e-3, "validation_split": 0.25}
    # 16 rows, of which 4 are kept apart, 8 a step.
    metrics = qa_job["training_metrics"]
    assert set(metrics) == {"training_loss", "validation_loss", "steps_completed", "epochs_completed"}
    assert (metrics["steps_completed"], metrics["epochs_completed"]) == (4, 2)
    assert qa_job["created_at"] < qa_job["completed_at"]
    assert f"-{SUFFIX_OF_64}-" in qa_job["fine_tuned_model"]


def test_columns_that_are_not_used_are_in_the_log(trained: Trained, qa_job: dict[str, Any]) -> None:
    log = trained.account.log(trained.jobs["qa"])

    assert "columns that the task doesn't use: id" in log
    assert any("12 rows to train on, 4 to validate on" in line for line in log)


def test_list_shows_the_same_job(trained: Trained, qa_job: dict[str, Any]) -> None:
    page = ok(trained.account.http.get(JOBS, params={"limit": 100}))

    assert next(job for job in page["data"] if job["id"] == qa_job["id"]) == qa_job


def test_max_steps_ends_training_early(trained: Trained) -> None:
    job = trained.account.wait(trained.jobs["early"], "completed")

    # The contract sets no upper bound to epochs.
    assert (job["hyperparameters"]["epochs"], job["hyperparameters"]["max_steps"]) == (2**31 - 1, 4)
    # 24 rows are 3 steps an epoch.
    assert job["training_metrics"]["steps_completed"] == 4
    assert job["training_metrics"]["epochs_completed"] == 1
    assert "validation_loss" not in job["training_metrics"]


def test_tail_begins_with_the_first_line_and_ends_with_the_job(
    trained: Trained, qa_job: dict[str, Any]
) -> None:
    messages = [log["message"] for _, log in trained.watches["qa"].lines]

    assert messages[0].startswith(f"job {trained.jobs['qa']} made")
    assert messages[-1].startswith("job completed: 4 steps, loss ")
    assert messages == trained.account.log(trained.jobs["qa"])
    steps = [message for message in messages if "loss" in message and "tokens/s" in message]
    assert len(steps) == 4, messages


def test_tail_is_live(trained: Trained, qa_job: dict[str, Any]) -> None:
    lateness = [
        (arrived - dt.datetime.fromisoformat(log["timestamp"])).total_seconds()
        for arrived, log in trained.watches["qa"].lines
    ]

    # The first lines may be older than the tail. Single ones may be late on a machine that others use too.
    assert statistics.median(lateness[3:]) < 0.5, lateness
    assert max(lateness[3:]) < 3, lateness


def test_tail_of_an_ended_job_gives_the_same_lines_at_once(trained: Trained, qa_job: dict[str, Any]) -> None:
    response = trained.account.http.get(TAIL, params={"job_id": trained.jobs["qa"]}, timeout=5)
    lines = [json.loads(text) for text in response.text.splitlines()]

    for line in lines:
        check_log_line(line)
    logs = [log for line in lines for log in line["logs"]]
    assert logs == [log for _, log in trained.watches["qa"].lines]


def test_config_and_metadata_come_back_after_the_end(trained: Trained) -> None:
    for name in ("lora", "full", "refused"):
        sent = trained.sent[name]
        job = trained.account.wait_status(trained.jobs[name], "failed" if name == "refused" else "success")
        assert exactly(job["input_config"]) == exactly(sent)
        assert exactly(job.get("metadata")) == exactly(sent.get("metadata"))


def test_whole_config_trains(trained: Trained) -> None:
    account, job_id = trained.account, trained.jobs["lora"]
    job = account.wait_status(job_id, "success")

    assert set(job) == {
        *("job_id", "created", "finished_at", "status", "checkpoints", "logs", "input_config", "metadata")
    }
    files = f"{account.url}/fine_tuning/jobs/{job_id}/files"
    assert job["checkpoints"] == [f"{files}/checkpoints/epoch-{epoch}.tar" for epoch in (1, 2)]
    assert job["logs"] == f"{files}/my-run.log"
    # 8 rows, 2 a batch, 2 batches a step, 2 epochs.
    seen = account.job(job_id)
    assert seen["training_metrics"]["steps_completed"] == 4
    assert seen["training_metrics"]["validation_loss"] > 0
    assert seen["hyperparameters"] == {"epochs": 2, "learning_rate": 1e-3}
    assert seen["dataset_id"] == trained.datasets["dialogs"]
    assert "task_type" not in seen
    log = account.log(job_id)
    assert sum("validation" in line and "loss" in line for line in log) >= 2


def test_checkpoints_hold_what_peft_loads(trained: Trained, other_account: Account) -> None:
    account = trained.account
    job = account.wait_status(trained.jobs["lora"], "success")

    for uri in job["checkpoints"]:
        response = account.http.get(uri)
        assert response.headers["content-type"] == "application/x-tar"
        with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
            names = tar.getnames()
        assert any(name.endswith("adapter_model.safetensors") for name in names), names
        assert not [name for name in names if name.startswith(("/", "..")) or "/../" in name]
        refused(other_account.http.get(uri), 404, "not_found")
        assert httpx.get(uri, trust_env=False).status_code == 401


@pytest.mark.parametrize(
    "path", ["checkpoints/epoch-3.tar", "checkpoints/epoch-01.tar", "checkpoints/", "", "x"]
)
def test_other_files_are_404(trained: Trained, path: str) -> None:
    job_id = trained.jobs["lora"]
    trained.account.wait_status(job_id, "success")

    refused(trained.account.http.get(f"/fine_tuning/jobs/{job_id}/files/{path}"), 404, "not_found")


def test_full_fine_tuning_of_a_local_file_makes_a_whole_model(trained: Trained) -> None:
    account, job_id = trained.account, trained.jobs["full"]
    account.wait_status(job_id, "success")
    job = account.job(job_id)

    assert "dataset_id" not in job
    response = account.http.get(f"{MODELS}/{job['fine_tuned_model']}/artifact")
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        assert "model.safetensors" in tar.getnames()


def test_logs_and_report_want_the_accounts_key(trained: Trained, other_account: Account) -> None:
    account = trained.account
    job = account.wait_status(trained.jobs["refused"], "failed")

    for uri, content_type in (
        (job["logs"], "text/plain; charset=utf-8"),
        (job["error_path"], "application/json"),
    ):
        assert account.http.get(uri).headers["content-type"] == content_type
        assert httpx.get(uri, trust_env=False).status_code == 401
        refused(other_account.http.get(uri), 404, "not_found")


def test_run_that_fails_ends_the_job_and_charges_nothing(trained: Trained) -> None:
    account, job_id = trained.account, trained.jobs["refused"]
    job = account.wait_status(job_id, "failed")

    report = ok(account.http.get(job["error_path"]))
    assert "tokens" in report["error"]
    assert report["rows"] == []
    assert account.log(job_id)[-1] == f"job failed: {report['error']}"
    assert "fine_tuned_model" not in account.job(job_id)
    kinds = [entry["kind"] for entry in account.entries(job_id)]
    assert kinds == ["hold", "release"]
    assert sum(entry["amount"] for entry in account.entries(job_id)) == pytest.approx(0, abs=1e-9)


def test_credits_of_a_completed_job_are_settled_by_its_tokens(
    trained: Trained, qa_job: dict[str, Any]
) -> None:
    account = trained.account
    [hold, release, charge] = account.entries(qa_job["id"])

    assert [entry["kind"] for entry in (hold, release, charge)] == ["hold", "release", "charge"]
    assert set(charge) == {"created_at", "kind", "amount", "job_id"}
    assert hold["amount"] == -release["amount"] < 0
    assert charge["amount"] < 0
    details = ok(account.http.get(f"{JOBS}/{qa_job['id']}/details"))
    assert details["credits_charged"] == -charge["amount"]
    # 1,000 credits a million tokens.
    assert details["credits_charged"] == pytest.approx(details["tokens_trained"] / 1000, abs=1e-6)
    assert details["job"] == qa_job


def test_dataset_can_be_deleted_right_after_the_end(trained: Trained) -> None:
    account = trained.account
    refusal = account.http.delete(f"{DATASETS}/{trained.datasets['text']}")
    if account.job(trained.jobs["early"])["status"] in ("queued", "running"):
        refused(refusal, 409, "dataset_in_use", trained.jobs["early"])
    account.wait(trained.jobs["early"], "completed")

    if refusal.status_code != 204:
        assert account.http.delete(f"{DATASETS}/{trained.datasets['text']}").status_code == 204
    # The job stays as it was.
    assert account.job(trained.jobs["early"])["dataset_id"] == trained.datasets["text"]


class TestModels:
    """Listed while available, gone for everyone when deleted."""

    def test_listed_with_exactly_the_contracts_fields(self, trained: Trained, qa_job: dict[str, Any]) -> None:
        listed = ok(trained.account.http.get(MODELS))

        assert set(listed) == {"data"}
        model = next(each for each in listed["data"] if each["job_id"] == qa_job["id"])
        assert set(model) == {"id", "base_model", "job_id", "status", "created_at"}
        assert model["id"] == qa_job["fine_tuned_model"]
        assert model["base_model"] == "tunery-tiny"
        assert model["status"] == "available"
        times = [each["created_at"] for each in listed["data"]]
        assert times == sorted(times, reverse=True)

    def test_openai_package_asks_it(self, trained: Trained, qa_job: dict[str, Any]) -> None:
        account = trained.account
        with openai.OpenAI(base_url=f"{account.url}/v1", api_key=account.api_key, max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "What is 1 plus one?"}]
            for model in (qa_job["fine_tuned_model"], "tunery-tiny"):
                answer = client.chat.completions.create(model=model, messages=messages, max_tokens=4)
                assert answer.model == model
                assert answer.object == "chat.completion"
                assert answer.choices[0].message.role == "assistant"
                assert isinstance(answer.choices[0].message.content, str)
                assert answer.choices[0].finish_reason in ("stop", "length")
                assert answer.usage is not None
                assert (
                    answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
                )
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="nope", messages=messages)
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="tunery-tiny", messages=[])
        with (
            openai.OpenAI(base_url=f"{account.url}/v1", api_key="tnry_wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.chat.completions.create(model="tunery-tiny", messages=messages)

    def test_deleted_model_is_gone(
        self, trained: Trained, other_account: Account, stored_keys: Callable[[str], list[str]]
    ) -> None:
        account = trained.account
        job = account.wait(trained.jobs["early"], "completed")
        model_id = job["fine_tuned_model"]
        body = {"model": model_id, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        # Asked before, so that its adapter is loaded.
        ok(account.http.post(CHAT, json=body))
        refused(other_account.http.post(CHAT, json=body), 404, "not_found")
        refused(other_account.http.delete(f"{MODELS}/{model_id}"), 404, "not_found")
        assert [key for key in stored_keys("") if job["id"] in key and "artifact" in key]

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: account.http.delete(f"{MODELS}/{model_id}"), range(4)))
        assert sorted(answer.status_code for answer in answers) == [204, 404, 404, 404]

        refused(account.http.post(CHAT, json=body), 404, "not_found", model_id)
        refused(account.http.get(f"{MODELS}/{model_id}/artifact"), 404, "not_found")
        assert model_id not in [model["id"] for model in ok(account.http.get(MODELS))["data"]]
        assert not [key for key in stored_keys("") if job["id"] in key]
        assert account.status(job["id"])["checkpoints"] == []
        assert account.job(job["id"])["status"] == "completed"


class TestOtherAccount:
    """Another's things are a 404, in every operation."""

    def test_lists_are_empty(self, trained: Trained, qa_job: dict[str, Any], other_account: Account) -> None:
        assert ok(other_account.http.get(JOBS)) == {"data": [], "total": 0}
        assert ok(other_account.http.get(MODELS)) == {"data": []}
        assert ok(other_account.http.get(DATASETS)) == {"data": []}
        assert ok(other_account.http.get("/api/v1/credits")) == {}
        assert ok(other_account.http.get("/api/v1/credits/entries")) == {"data": []}

    def test_nothing_of_it_can_be_reached(
        self, trained: Trained, qa_job: dict[str, Any], other_account: Account
    ) -> None:
        http = other_account.http
        job_id, dataset_id = qa_job["id"], trained.datasets["qa"]
        for response in (
            http.get(f"{JOBS}/{job_id}"),
            http.get(f"{JOBS}/{job_id}/details"),
            http.post(f"{JOBS}/{job_id}/cancel"),
            http.get(STATUS, params={"job_id": job_id}),
            http.get(TAIL, params={"job_id": job_id}),
            http.post("/fine_tuning/jobs/cancel", json={"job_id": job_id}),
            http.get(f"/fine_tuning/jobs/{job_id}/files/log.txt"),
            http.get(f"{DATASETS}/{dataset_id}"),
            http.delete(f"{DATASETS}/{dataset_id}"),
            http.delete(f"{MODELS}/{qa_job['fine_tuned_model']}"),
            http.get(f"{MODELS}/{qa_job['fine_tuned_model']}/artifact"),
            http.post(
                CHAT,
                json={"model": qa_job["fine_tuned_model"], "messages": [{"role": "user", "content": "Hi"}]},
            ),
        ):
            refused(response, 404, "not_found")
        refused(other_account.request_job(dataset_id), 400, "unknown_dataset", dataset_id)
        dialogs = trained.datasets["dialogs"]
        refused(other_account.submit(f"dataset://{dialogs}"), 400, "unknown_dataset", dialogs)

    def test_refusal_reads_as_for_an_id_that_never_was(
        self, trained: Trained, qa_job: dict[str, Any], other_account: Account
    ) -> None:
        """So that nobody learns which ids exist."""
        never = "job-" + "a" * 20
        real = refused(other_account.http.get(f"{JOBS}/{qa_job['id']}"), 404, "not_found")
        invented = refused(other_account.http.get(f"{JOBS}/{never}"), 404, "not_found")

        assert real.replace(qa_job["id"], never) == invented


def test_cancel_of_an_ended_job_is_409(trained: Trained, qa_job: dict[str, Any]) -> None:
    account = trained.account
    for response in (
        account.cancel(qa_job["id"]),
        account.http.post(f"{JOBS}/{qa_job['id']}/cancel", json={}),
        account.http.post("/fine_tuning/jobs/cancel", json={"job_id": qa_job["id"]}),
    ):
        refused(response, 409, "job_ended", "completed")
    assert account.job(qa_job["id"]) == qa_job


class TestMetrics:
    """The extension that reads and follows a job's metrics."""

    def test_every_step_and_measurement_is_there(self, trained: Trained, qa_job: dict[str, Any]) -> None:
        response = trained.account.http.get(f"{JOBS}/{qa_job['id']}/metrics", timeout=5)

        assert response.headers["content-type"] == "application/x-ndjson"
        metrics = [json.loads(line) for line in response.text.splitlines()]
        steps = [metric for metric in metrics if "training_loss" in metric]
        assert [metric["step"] for metric in steps] == [1, 2, 3, 4]
        assert steps[-1]["training_loss"] == qa_job["training_metrics"]["training_loss"]
        assert all(metric["tokens_per_second"] > 0 for metric in steps)
        assert 0 < steps[-1]["matrix_peak_share"] < 1
        assert steps[-1]["peak_memory_bytes"] > 2**20
        measured = [metric for metric in metrics if "validation_loss" in metric]
        assert [metric["step"] for metric in measured] == [2, 4]
        assert measured[-1]["validation_loss"] == qa_job["training_metrics"]["validation_loss"]
        seqs = [metric["seq"] for metric in metrics]
        assert seqs == sorted(set(seqs))

    def test_after_seq_goes_on_from_there(self, trained: Trained, qa_job: dict[str, Any]) -> None:
        path = f"{JOBS}/{qa_job['id']}/metrics"
        every = trained.account.http.get(path).text.splitlines()
        after = json.loads(every[2])["seq"]

        assert trained.account.http.get(path, params={"after_seq": after}).text.splitlines() == every[3:]
        assert trained.account.http.get(path, params={"after_seq": 2**31 - 1}).text == ""
        refused(trained.account.http.get(path, params={"after_seq": -1}), 400, "invalid_request", "after_seq")

    def test_another_accounts_are_not_found(self, qa_job: dict[str, Any], other_account: Account) -> None:
        refused(other_account.http.get(f"{JOBS}/{qa_job['id']}/metrics"), 404, "not_found", qa_job["id"])


class TestEstimates:
    """What a job will take is told before it trains, and held against what it took."""

    def test_job_has_its_estimate_and_what_it_took(self, trained: Trained, qa_job: dict[str, Any]) -> None:
        details = ok(trained.account.http.get(f"{JOBS}/{qa_job['id']}/details"))
        estimate, actual = details["estimate"], details["actual"]

        assert set(estimate) == set(actual) == {"tokens", "steps", "seconds", "memory_bytes", "credits"}
        assert estimate["steps"] == actual["steps"] == 4
        assert estimate["tokens"] == pytest.approx(actual["tokens"], rel=0.1)
        # A job of four steps comes to see few sizes of rows, and needs less than the estimate allows for.
        assert 0.5 < estimate["memory_bytes"] / actual["memory_bytes"] < 3
        assert (estimate["credits"], actual["credits"]) == (
            details["credits_held"],
            details["credits_charged"],
        )
        log = trained.account.log(qa_job["id"])
        assert any(line.startswith("estimate: 4 steps · ") for line in log), log

    def test_model_is_checked_before_it_is_available(self, trained: Trained, qa_job: dict[str, Any]) -> None:
        log = trained.account.log(qa_job["id"])

        assert log.index("model stored, and now checked") < len(log) - 1
        assert any("stored model checked: its logits differ by" in line for line in log)
