"""Whether the time of an answer tells an id that another account owns from one that nobody does.

    .venv/bin/python bench/id_timing.py [--calls 2000] [--json]

The claim: it doesn't. An account asks for another's and for one that nobody has, in random order, over one
connection, by eight operations that look for it each in a way of its own. Kept is how often the answer about
another's takes longer than that about nobody's, of all pairs of the two: 50 % tells nothing. Chance alone
makes it differ from that by up to `noise` (three standard deviations).
Prints a table, and writes `bench/results/id_timing.json` with the commit and the hardware.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time

import grpc
import httpx
from kept_results import keep
from stacks import NO_RATE_LIMIT, ROWS, WholeStack, whole_stack

from tunery.account.v1 import account_service_pb2, account_service_pb2_grpc

API = "/api/v1/fine-tuning"
# What is asked, with the name of the id in it.
OPERATIONS: dict[str, tuple[str, str, str]] = {
    "GET a job": ("GET", f"{API}/jobs/{{}}", "job"),
    "cancel a job": ("POST", f"{API}/jobs/{{}}/cancel", "job"),
    "follow a log": ("GET", "/fine_tuning/jobs/tail?job_id={}", "job"),
    "download a model": ("GET", f"{API}/models/{{}}/artifact", "model"),
    "GET a dataset": ("GET", f"{API}/datasets/{{}}", "dataset"),
    "delete a dataset": ("DELETE", f"{API}/datasets/{{}}", "dataset"),
    "delete a model": ("DELETE", f"{API}/models/{{}}", "model"),
    "take back a key": ("DELETE", "/api/v1/keys/{}", "key"),
}
WARM_UP_CALLS = 50


def owned(stack: WholeStack) -> dict[str, str]:
    """Makes one of each for the first account; returns their ids."""
    with stack.client() as client:
        dataset = client.post(f"{API}/datasets", files={"file": ("rows.csv", ROWS)}).json()["id"]
        asked = {"base_model": "tunery-tiny", "dataset_id": dataset, "task_type": "qa"}
        body = {**asked, "hyperparameters": {"max_steps": 1}}
        job = client.post(f"{API}/jobs", json=body).raise_for_status().json()["id"]
        client.get(f"{API}/jobs/{job}/metrics", timeout=120)  # ends with the job
        model = client.get(f"{API}/jobs/{job}").json()["fine_tuned_model"]
        made = client.post("/api/v1/keys", json={"name": "second", "scopes": ["read"]}).raise_for_status()
    return {"dataset": dataset, "job": job, "model": model, "key": made.json()["key"]["id"]}


def other_key(stack: WholeStack) -> str:
    """Makes another account; returns its key."""
    with grpc.insecure_channel(f"127.0.0.1:{stack.port}") as channel:
        made = account_service_pb2_grpc.AccountServiceStub(channel).CreateAccount(
            account_service_pb2.CreateAccountRequest(name="curious"),
            metadata=(("authorization", f"Bearer {stack.api_key}"),),
        )
    return str(made.api_key)


def nobodys(id_: str) -> str:
    """An id of the same form."""
    letters = random.sample("bcdfghjk", 6)
    return id_[:-6] + "".join(letters)


def seconds_of(client: httpx.Client, method: str, path: str) -> float:
    """Asks for what isn't the caller's; returns how long the answer took."""
    started = time.perf_counter()
    response = client.request(method, path)
    seconds = time.perf_counter() - started
    assert response.status_code == 404, response.text
    return seconds


def share_of_longer(some: list[float], others: list[float]) -> float:
    """Of all pairs, in how many the first is longer (Mann and Whitney's U, as a share)."""
    ranked = sorted([(value, True) for value in some] + [(value, False) for value in others])
    rank_sum = sum(rank for rank, (_, is_first) in enumerate(ranked, 1) if is_first)
    return (rank_sum - len(some) * (len(some) + 1) / 2) / (len(some) * len(others))


def measure(num_calls: int) -> dict[str, object]:
    """Runs a stack of its own and asks `num_calls` times for each kind of id, of each operation."""
    found = {}
    with whole_stack(**NO_RATE_LIMIT) as stack:
        ids = owned(stack)
        with stack.client(other_key(stack)) as client:
            for name, (method, template, kind) in OPERATIONS.items():
                took: dict[bool, list[float]] = {True: [], False: []}
                order = [True, False] * num_calls
                random.shuffle(order)
                paths = {True: template.format(ids[kind]), False: template.format(nobodys(ids[kind]))}
                for is_anothers in [*order[:WARM_UP_CALLS], *order]:
                    took[is_anothers].append(seconds_of(client, method, paths[is_anothers]))
                anothers, nobody = (times[-num_calls:] for times in (took[True], took[False]))
                found[name] = {
                    "anothers_ms": round(1000 * statistics.median(anothers), 3),
                    "nobodys_ms": round(1000 * statistics.median(nobody), 3),
                    "longer_share": round(share_of_longer(anothers, nobody), 4),
                }
    noise = 3 * math.sqrt((2 * num_calls + 1) / (12 * num_calls * num_calls))
    return {"calls_of_each": num_calls, "noise": round(noise, 4), "operations": found}


def main() -> None:
    """Measures, prints, and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="for each kind of id, of each operation")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    result = keep("id_timing", measure(options.calls))
    if options.json:
        print(json.dumps(result))
        return
    for name, told in result["operations"].items():
        print(
            f"{name:18} {told['anothers_ms']:7.3f} ms another's, {told['nobodys_ms']:7.3f} ms nobody's; "
            f"longer in {told['longer_share']:.1%} of pairs"
        )
    print(f"chance alone: 50 % +- {result['noise']:.1%}")


if __name__ == "__main__":
    main()
