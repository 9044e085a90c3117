"""kill -9 of each process in turn, while a job runs: the job ends all the same and nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import RunningStack, running_stack, wait_until
from tunery.client import TuneryClient

RECOVERY_SECONDS = 60
TRAINING_SECONDS = 300
NUM_STEPS = 1500  # enough to outlast the kills
VICTIMS = [
    "weed",
    "dataset_svc",
    "job_svc",
    "gateway.authz",
    "inference_svc",
    "envoy",
    "trainer_svc.engine",
    "torch.distributed.run",
    "trainer_svc",
]


@pytest.fixture
def stack(tmp_path: Path, models_dir: Path) -> Iterator[RunningStack]:
    with running_stack(tmp_path / "data", TUNERY_MODELS_DIR=str(models_dir)) as running:
        yield running


def processes(stack: RunningStack) -> dict[str, psutil.Process]:
    """Returns the stack's processes by module or program."""
    found = {}
    for process in psutil.Process(stack.process.pid).children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "-m" in line:  # the last one: torchrun's own line names the engine, too
            found.setdefault(line[line.index("-m") + 1], process)
        elif line:
            found[Path(line[0]).name] = process
    return found


def answers(client: httpx.Client, job_id: str) -> bool:
    try:
        return client.get(f"/api/v1/fine-tuning/jobs/{job_id}").status_code == 200
    except httpx.TransportError:
        return False


def steps_done(client: httpx.Client, job_id: str) -> int:
    job = client.get(f"/api/v1/fine-tuning/jobs/{job_id}").raise_for_status().json()
    assert job["status"] in ("queued", "running"), f"the job should outlive the kills: {job}"
    return int(job.get("training_metrics", {}).get("steps_completed", 0))


@pytest.mark.timeout(TRAINING_SECONDS + 500)
def test_a_job_outlives_the_kill_of_each_process(stack: RunningStack) -> None:
    key = stack.new_account("tester", credits=1000)
    with stack.client(key) as client, TuneryClient(stack.url, key) as followers_client:
        rows = "question,answer\n" + "".join(f"What is {n} plus one?,{n + 1}\n" for n in range(512))
        dataset = client.post("/api/v1/fine-tuning/datasets", files={"file": ("rows.csv", rows)}).json()
        job = client.post(
            "/api/v1/fine-tuning/jobs",
            json={
                "base_model": "tunery-tiny",
                "dataset_id": dataset["id"],
                "task_type": "qa",
                "hyperparameters": {"epochs": 100, "max_steps": NUM_STEPS},
            },
        ).json()
        for victim in VICTIMS:
            wait_until(
                lambda: answers(client, job["id"]) and steps_done(client, job["id"]) > 0,
                RECOVERY_SECONDS,
                "the job to run",
            )
            wait_until(lambda v=victim: v in processes(stack), RECOVERY_SECONDS, f"{victim} to be there")
            os.kill(processes(stack)[victim].pid, signal.SIGKILL)
        seen = list(followers_client.follow_log(job["id"]))
        ended = client.get(f"/api/v1/fine-tuning/jobs/{job['id']}").json()
        assert ended["status"] == "completed", [record.message for record in seen[-20:]]
        assert ended["training_metrics"]["steps_completed"] == NUM_STEPS

        assert [record.seq for record in seen] == list(range(1, len(seen) + 1))
        stored = client.get("/api/v1/fine-tuning/datasets").json()["data"]
        assert stored == [dataset]
        models = client.get("/api/v1/fine-tuning/models").json()["data"]
        assert [model["job_id"] for model in models] == [job["id"]]
        entries = client.get("/api/v1/credits/entries").json()["data"]
        assert [entry["kind"] for entry in entries] == ["grant", "hold", "release", "charge"]
        balance = client.get("/api/v1/credits").json()["balance"]
        assert balance == pytest.approx(sum(entry["amount"] for entry in entries))
        answer = client.post(
            "/v1/chat/completions",
            json={
                "model": models[0]["id"],
                "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 4,
            },
        )
        assert answer.status_code == 200, answer.text
