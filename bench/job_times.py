"""Runs jobs through the whole stack: how soon they take their first step, and how true their estimates are.

    .venv/bin/python bench/job_times.py [--rounds 2] [--json]

The claims, on 2 cores: with the base model on the machine, a job takes its first step within 10 s of being
made; over the test models, its estimated time is within 30 % of what it takes. And of what checkpoints
cost: training stands still for less than 5 % of a step's time at each.
Prints a table, and writes `bench/results/job_times.json` with the commit and the hardware.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from kept_results import keep
from stacks import whole_stack

BENCH = Path(__file__).parent
ROWS = BENCH.parent / "tests" / "e2e" / "gsm8k" / "rows.csv"
SMOLLM2, TINY = "smollm2-135m-instruct", "tunery-tiny"
JOBS: dict[str, dict[str, Any]] = {
    "tiny, LoRA": {"base_model": TINY, "hyperparameters": {"epochs": 20}},
    "SmolLM2, LoRA": {"base_model": SMOLLM2, "hyperparameters": {"epochs": 3}},
    "SmolLM2, LoRA, validated": {
        "base_model": SMOLLM2,
        "hyperparameters": {"epochs": 2, "validation_split": 0.25},
    },
}


def seconds_between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def run_job(client: httpx.Client, dataset_id: str, job: dict[str, Any]) -> dict[str, float]:
    """Runs a job to its end and returns its times."""
    body = {"dataset_id": dataset_id, "task_type": "qa", **job}
    made = client.post("/api/v1/fine-tuning/jobs", json=body).raise_for_status().json()
    path = f"/api/v1/fine-tuning/jobs/{made['id']}"
    metrics = [json.loads(line) for line in client.get(f"{path}/metrics", timeout=1800).text.splitlines()]
    details = client.get(f"{path}/details").raise_for_status().json()
    assert details["job"]["status"] == "completed", details
    estimate, actual = details["estimate"], details["actual"]
    return {
        "first_step_seconds": seconds_between(made["created_at"], metrics[0]["time"]),
        "estimated_seconds": estimate["seconds"],
        "actual_seconds": actual["seconds"],
        "estimated_over_actual": estimate["seconds"] / actual["seconds"],
        "tokens_estimated_over_actual": estimate["tokens"] / actual["tokens"],
        "memory_estimated_over_actual": estimate["memory_bytes"] / actual["memory_bytes"],
        "tokens_per_second": metrics[-1].get("tokens_per_second", 0.0),
    }


def checkpoint_waits(method: dict[str, Any]) -> dict[str, float]:
    """Runs the engine alone with a checkpoint after every fourth step; returns how long steps wait."""
    from trainer_svc.engine.run_spec import RunSpec
    from trainer_svc.engine.train import fine_tune
    from tunery.models_dir import models_dir

    events: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tunery-bench-") as folder:
        spec = RunSpec.model_validate(
            {
                "base_model_dir": models_dir(os.environ) / SMOLLM2,
                "base_model_id": SMOLLM2,
                "training_file": ROWS.with_suffix(".jsonl"),
                "output_dir": Path(folder) / "run",
                "method": method,
                "epochs": 5,
                "extras": {"checkpoint_every_steps": 4, "keep_checkpoints": 1},
            }
        )
        fine_tune(spec, on_event=events.append)
    waited = [event["waited_seconds"] for event in events if event["kind"] == "checkpoint"]
    steps = [event for event in events if event["kind"] == "step"]
    seconds = {
        later["step"]: seconds_between(earlier["time"], later["time"])
        for earlier, later in itertools.pairwise(steps)
    }
    # A checkpoint is copied and written beside the step that follows it.
    checkpoint_steps = {event["step"] for event in events if event["kind"] == "checkpoint"}
    beside = [taken for step, taken in seconds.items() if step - 1 in checkpoint_steps]
    step_seconds = statistics.median(
        taken for step, taken in seconds.items() if step - 1 not in checkpoint_steps
    )
    return {
        "step_seconds": round(step_seconds, 2),
        "step_beside_a_checkpoint_seconds": round(statistics.median(beside), 2),
        "waited_seconds": round(statistics.median(waited), 3),
        "waited_share_of_a_step": round(statistics.median(waited) / step_seconds, 4),
    }


def measure(rounds: int) -> dict[str, Any]:
    """Runs a stack of its own and each job `rounds` times, in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in JOBS}
    with whole_stack() as stack, stack.client() as client:
        upload = client.post("/api/v1/fine-tuning/datasets", files={"file": ("rows.csv", ROWS.read_bytes())})
        dataset_id = upload.raise_for_status().json()["id"]
        for _ in range(rounds):
            for name, job in JOBS.items():
                found[name].append(run_job(client, dataset_id, job))
    jobs = {
        name: {key: round(statistics.median(each[key] for each in runs), 3) for key in runs[0]}
        for name, runs in found.items()
    }
    full = {"kind": "full", "activation_checkpointing": False}
    return {
        "jobs": jobs,
        "checkpoints": {"LoRA": checkpoint_waits({"kind": "lora"}), "full": checkpoint_waits(full)},
    }


def main() -> None:
    """Measures, prints, and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    result = measure(options.rounds)
    result = keep("job_times", result)
    if options.json:
        print(json.dumps(result))
        return
    for name, job in result["jobs"].items():
        estimated, actual = job["estimated_seconds"], job["actual_seconds"]
        print(
            f"{name:26} first step after {job['first_step_seconds']:4.1f} s · "
            f"estimated {estimated:5.1f} s of {actual:5.1f} s ({estimated / actual:.0%})"
        )
    for name, waits in result["checkpoints"].items():
        share, step = waits["waited_share_of_a_step"], waits["step_seconds"]
        print(f"checkpoints, {name:13} {share:.1%} of a step of {step} s")


if __name__ == "__main__":
    main()
