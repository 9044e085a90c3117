"""Uses a whole stack in every way at once, for some time: does any service's memory grow?

    .venv/bin/python bench/mixed_use.py [--minutes 10] [--json]

The claim: what an hour of use by a team does, done in minutes without a pause between calls, leaves the
memory of every service flat: from the end of the first third, when caches are full, to the end, none grows
by over 5 % and 10 MB. Everything is used: uploads (some broken), lists, reports, jobs through both contracts
from their making to the model, followed logs (some let go of halfway), cancelled jobs, chats, downloads,
deletions.

Prints a table, and writes `bench/results/mixed_use.json` with the commit and the hardware.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from kept_results import keep
from stacks import running_parts

from tunery.stack import Stack
from tunery.supervisor import MARK_VARIABLE

PARTS = ("s3", "authz", "dataset_svc", "job_svc", "trainer_svc", "inference_svc", "gateway")
SAMPLE_SECONDS = 2.0
ONE = "/api/v1/fine-tuning"
ROWS = "question,answer\n" + "".join(f"What is {n} plus one?,{n + 1}\n" for n in range(64))
DIALOG = {"dialog": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
DIALOGS = f"{json.dumps(DIALOG)}\n" * 32
QUESTION = [{"role": "user", "content": "What is 1 plus one?"}]
MB = 1e6

Use = Callable[[httpx.AsyncClient], Awaitable[None]]


async def upload(client: httpx.AsyncClient, path: str, name: str, text: str) -> str:
    answer = await client.post(path, files={"file": (name, text)})
    dataset_id: str = answer.raise_for_status().json()["id"]
    return dataset_id


async def train_csv(client: httpx.AsyncClient) -> None:
    """From a CSV file to a model that answers, is downloaded and deleted; sometimes cancelled on its way."""
    dataset_id = await upload(client, f"{ONE}/datasets", "rows.csv", ROWS)
    body = {"base_model": "tunery-tiny", "dataset_id": dataset_id, "task_type": "qa"}
    job = (await client.post(f"{ONE}/jobs", json=body)).raise_for_status().json()
    if random.random() < 0.3:
        await client.post(f"{ONE}/jobs/{job['id']}/cancel")
    await follow(client, f"{ONE}/jobs/{job['id']}/metrics")
    ended = (await client.get(f"{ONE}/jobs/{job['id']}")).raise_for_status().json()
    if model_id := ended.get("fine_tuned_model"):
        question = {"model": model_id, "max_tokens": 4, "messages": QUESTION}
        (await client.post("/v1/chat/completions", json=question)).raise_for_status()
        (await client.get(f"{ONE}/models/{model_id}/artifact")).raise_for_status()
        (await client.delete(f"{ONE}/models/{model_id}")).raise_for_status()
    await client.delete(f"{ONE}/datasets/{dataset_id}")


async def train_dialogs(client: httpx.AsyncClient) -> None:
    dataset_id = await upload(client, "/fine_tuning/datasets", "rows.jsonl", DIALOGS)
    config = {"model": "tunery-tiny", "data": f"dataset://{dataset_id}"}
    job = (await client.post("/fine_tuning/jobs/submit", json=config)).raise_for_status().json()
    await follow(client, f"/fine_tuning/jobs/tail?job_id={job['job_id']}")
    await client.get("/fine_tuning/jobs/status", params={"job_id": job["job_id"]})
    await client.delete(f"{ONE}/datasets/{dataset_id}")


async def follow(client: httpx.AsyncClient, path: str) -> None:
    """Follows a stream to its end, now and then only halfway first."""
    if random.random() < 0.3:
        async with client.stream("GET", path) as stream:
            stream.raise_for_status()
            async for _ in stream.aiter_bytes():
                break
    async with client.stream("GET", path) as stream:
        stream.raise_for_status()
        async for _ in stream.aiter_bytes():
            pass


async def look_around(client: httpx.AsyncClient) -> None:
    dataset_id = await upload(client, f"{ONE}/datasets", "rows.csv", ROWS)
    for path in ("jobs?limit=100", "datasets", "models", "base-models", f"datasets/{dataset_id}/report"):
        (await client.get(f"{ONE}/{path}")).raise_for_status()
    await client.delete(f"{ONE}/datasets/{dataset_id}")


async def make_mistakes(client: httpx.AsyncClient) -> None:
    await client.post(f"{ONE}/datasets", files={"file": ("rows.csv", 'question,answer\n"a,b\n')})
    await client.post(f"{ONE}/datasets", files={"file": ("rows.csv", "x" * 2_000_000)})
    await client.post(f"{ONE}/jobs", json={"base_model": "none", "dataset_id": "ds-x", "task_type": "qa"})
    await client.post(f"{ONE}/jobs", content=b"{" * 1000)
    await client.get(f"{ONE}/jobs/job-{'a' * 20}")
    await client.get(f"{ONE}/jobs", headers={"authorization": f"Bearer tnry_{random.randbytes(21).hex()}x"})


async def repeat(client: httpx.AsyncClient, use: Use, until: float, done: Counter[str]) -> None:
    while time.monotonic() < until:
        try:
            await use(client)
            done[use.__name__] += 1
        except httpx.HTTPError as error:
            done[f"{use.__name__} failed: {error}"] += 1
        await asyncio.sleep(0.05)


def memory_by_process() -> dict[str, float]:
    """Resident megabytes of each service. What they start for a job or a report comes and goes."""
    return {
        process.environ()[MARK_VARIABLE].rpartition("/")[2]: process.memory_info().rss / MB
        for process in psutil.Process().children()
    }


async def sample(until: float) -> list[dict[str, float]]:
    samples = []
    while time.monotonic() < until:
        await asyncio.sleep(SAMPLE_SECONDS)
        samples.append(await asyncio.to_thread(memory_by_process))
    return samples


async def measure(minutes: float) -> dict[str, Any]:
    random.seed(0)
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="tunery-bench-") as folder:
        async with running_parts(Path(folder), os.environ, PARTS) as stack:
            samples = await use_for(stack, minutes, done)
    third = len(samples) // 3
    memory = {}
    for name in PARTS:
        after_a_third, at_the_end = (
            statistics.median(one.get(name, 0.0) for one in part)
            for part in (samples[third : third + third // 4 + 1], samples[-third // 4 :])
        )
        memory[name] = {
            "after_a_third_mb": round(after_a_third, 1),
            "at_the_end_mb": round(at_the_end, 1),
            "growth": round(at_the_end / after_a_third - 1, 4),
        }
    return {"minutes": minutes, "done": dict(sorted(done.items())), "memory": memory}


async def use_for(stack: Stack, minutes: float, done: Counter[str]) -> list[dict[str, float]]:
    headers = {"authorization": f"Bearer {stack.credentials.api_key}"}
    until = time.monotonic() + 60 * minutes
    async with httpx.AsyncClient(base_url=stack.credentials.url, headers=headers, timeout=300) as client:
        uses: list[Use] = [train_csv, train_csv, train_dialogs, look_around, make_mistakes]
        *_, samples = await asyncio.gather(
            *(repeat(client, use, until, done) for use in uses),
            sample(until),
        )
    return samples


def main() -> None:
    """Measures, prints, and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    result = asyncio.run(measure(options.minutes))
    result = keep("mixed_use", result)
    if options.json:
        print(json.dumps(result))
        return
    for name, memory in result["memory"].items():
        before, after = memory["after_a_third_mb"], memory["at_the_end_mb"]
        print(f"{name:14} {before:7.1f} MB  {after:7.1f} MB  {memory['growth']:+.1%}")
    print(", ".join(f"{name} {count}" for name, count in result["done"].items()))


if __name__ == "__main__":
    main()
