"""SmolLM2 on rows of GSM8K, through both contracts: curl's way in, plain transformers' way out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.conftest import RunningStack, wait_until
from tunery.client import TuneryClient

ROWS = Path(__file__).parent / "gsm8k"
BASE = "smollm2-135m-instruct"
TRAINING_SECONDS = 400
# bfloat16 has 8 bits of mantissa; another adapter or none is off by far more.
MEAN_LOGPROB_DIFFERENCE = 0.1
LARGEST_LOGPROB_DIFFERENCE = 0.4

pytestmark = [pytest.mark.smollm2, pytest.mark.timeout(TRAINING_SECONDS + 200)]


def ended(client: httpx.Client, job_id: str) -> bool:
    job = client.get(f"/api/v1/fine-tuning/jobs/{job_id}").raise_for_status().json()
    return job["status"] in ("completed", "failed", "cancelled")


def step_losses(stack: RunningStack, job_id: str) -> list[float]:
    with TuneryClient(stack.url, stack.api_key) as client:
        return [record.step.loss for record in client.follow_log(job_id) if record.kind == "step"]


def finish(stack: RunningStack, client: httpx.Client, job_id: str) -> dict[str, Any]:
    """Waits for the job's end, checks that its loss fell, and returns it."""
    wait_until(lambda: ended(client, job_id), TRAINING_SECONDS, f"the end of {job_id}")
    job: dict[str, Any] = client.get(f"/api/v1/fine-tuning/jobs/{job_id}").json()
    assert job["status"] == "completed", job
    losses = step_losses(stack, job_id)
    epochs = job["hyperparameters"]["epochs"]
    per_epoch = len(losses) // epochs
    assert sum(losses[-per_epoch:]) < 0.9 * sum(losses[:per_epoch]), losses
    return job


def check_artifact(client: httpx.Client, model_id: str, models_dir: Path, folder: Path) -> None:
    """The model, loaded plainly from its tar, gives the log probabilities that the service answers with."""
    tar = client.get(f"/api/v1/fine-tuning/models/{model_id}/artifact").raise_for_status().content
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        archive.extractall(folder, filter="data")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    question = [{"role": "user", "content": "A box has 12 pens. How many pens are in 4 boxes?"}]
    answer = client.post(
        "/v1/chat/completions",
        json={
            "model": model_id,
            "messages": question,
            "max_tokens": 12,
            "temperature": 0,
            "logprobs": True,
        },
    )
    scored = answer.raise_for_status().json()["choices"][0]["logprobs"]["content"]

    # In float32, so that rounding is the service's alone; on its own answer, since where two tokens are about
    # as likely, rounding decides.
    base = AutoModelForCausalLM.from_pretrained(models_dir / BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    tokens = torch.tensor(tokenizer.convert_tokens_to_ids([token_of(item["bytes"]) for item in scored]))
    with torch.inference_mode():
        logits = model(torch.cat([prompt[0], tokens])[None]).logits[0, prompt.shape[1] - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    answered = torch.tensor([item["logprob"] for item in scored])
    assert (answered - expected).abs().mean() < MEAN_LOGPROB_DIFFERENCE
    assert (answered - expected).abs().max() < LARGEST_LOGPROB_DIFFERENCE


def token_of(content: list[int]) -> str:
    """A token as the tokenizer writes it, from its bytes."""
    return "".join(bytes_to_unicode()[byte] for byte in content)


def test_csv_rows_through_the_first_contract(stack: RunningStack, models_dir: Path, tmp_path: Path) -> None:
    with stack.client() as client:
        upload = client.post(
            "/api/v1/fine-tuning/datasets",
            files={"file": ("gsm8k.csv", (ROWS / "rows.csv").read_bytes(), "text/csv")},
        )
        assert upload.status_code == 201, upload.text
        created = client.post(
            "/api/v1/fine-tuning/jobs",
            json={
                "base_model": BASE,
                "dataset_id": upload.json()["id"],
                "task_type": "qa",
                "hyperparameters": {"epochs": 2, "learning_rate": 1e-3, "validation_split": 0.25},
                "suffix": "gsm8k",
            },
        )
        assert created.status_code == 201, created.text
        job = finish(stack, client, created.json()["id"])
        assert job["training_metrics"]["validation_loss"] > 0
        assert job["training_metrics"]["epochs_completed"] == 2
        check_artifact(client, job["fine_tuned_model"], models_dir, tmp_path)


def test_dialogs_through_the_second_contract(stack: RunningStack, models_dir: Path, tmp_path: Path) -> None:
    with stack.client() as client:
        upload = client.post(
            "/fine_tuning/datasets", files={"file": ("gsm8k.jsonl", (ROWS / "rows.jsonl").read_bytes())}
        )
        assert upload.status_code == 201, upload.text
        config = {
            "model": BASE,
            "data": f"dataset://{upload.json()['id']}",
            "fine_tuning_options": {
                "n_epochs": 2,
                "batch_size": 8,
                "lr": 1e-3,
                "seed": 1,
                "custom_training_options": {
                    "finetuning_type": "lora",
                    "lora_attn_modules": ["q_proj", "v_proj"],
                    "apply_lora_to_mlp": True,
                    "lora_rank": 8,
                    "lora_alpha": 16,
                },
            },
            "metadata": {"purpose": "end to end"},
        }
        submitted = client.post("/fine_tuning/jobs/submit", json=config)
        assert submitted.status_code == 200, submitted.text
        job_id = submitted.json()["job_id"]
        job = finish(stack, client, job_id)
        status = client.get("/fine_tuning/jobs/status", params={"job_id": job_id}).json()
        assert status["status"] == "success"
        assert status["input_config"] == config
        assert len(status["checkpoints"]) == 2
        for uri in [*status["checkpoints"], status["logs"]]:
            assert client.get(uri).status_code == 200
        tail = client.get("/fine_tuning/jobs/tail", params={"job_id": job_id}).text.splitlines()
        assert json.loads(tail[-1])["logs"][-1]["message"].startswith("job completed")
        check_artifact(client, job["fine_tuned_model"], models_dir, tmp_path)
