"""Follows one job's log a thousand times over while it is written, through the gateway.

    .venv/bin/python bench/follow_log.py [--followers 1000] [--lines-per-second 50] [--seconds 30] [--json]

The claim, on 2 cores that the followers share: with 1,000 followers at 50 lines a second, a line is with
its follower within 0.5 s of its sending by a trainer at the 99th percentile; each follower gets each line
once and in order; and job_svc stays under 400 MB. The lines are written as a trainer writes them, each in a
call of its own. Prints a line, and writes `bench/results/follow_log.json` with the commit and the hardware.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import httpx
from kept_results import keep
from stacks import process_of, running_parts

from svc_kit.identity import Issuer
from svc_kit.server import connect
from tunery.stack import Stack
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2
from tunery.trainer.v1.worker_service_pb2_grpc import WorkerServiceStub

PARTS = ("s3", "authz", "dataset_svc", "job_svc", "gateway")  # this program is the trainer
# One account has all followers here.
LIMITS = {"TUNERY_MAX_OPEN_TAILS": "100000", "TUNERY_GATEWAY_REQUEST_BURST": "100000"}
LINE = re.compile(rb"line (\d+) sent at (\d+)\.")
CHUNK = re.compile(rb"([0-9a-f]+)\r\n")


class Follower(asyncio.Protocol):
    """One follower: what it got, and how long each line took."""

    def __init__(self, request: bytes, delays: array[float]) -> None:
        self.numbers: list[int] = []
        self.ended = asyncio.get_running_loop().create_future()
        self._request = request
        self._delays = delays
        self._raw = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.time_ns()
        self._raw += data
        if self._raw.startswith(b"HTTP/1.1 "):
            head, end, rest = self._raw.partition(b"\r\n\r\n")
            if not end:
                return
            assert head.startswith(b"HTTP/1.1 200"), head
            self._raw = rest
        while (size := CHUNK.match(self._raw)) and len(self._raw) >= size.end() + int(size[1], 16) + 2:
            length = int(size[1], 16)
            chunk = self._raw[size.end() : size.end() + length]
            self._raw = self._raw[size.end() + length + 2 :]
            if not length:
                self._transport.close()
                self.ended.set_result(None)
                return
            for number, sent_at in LINE.findall(chunk):
                self.numbers.append(int(number))
                self._delays.append((now - int(sent_at)) / 1e9)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the log broke off"))


async def make_job(stack: Stack) -> str:
    """Makes a job that waits for a trainer."""
    rows = "question,answer\n" + "".join(f"q{n},a{n}\n" for n in range(16))
    headers = {"authorization": f"Bearer {stack.credentials.api_key}"}
    base_url = f"{stack.credentials.url}/api/v1/fine-tuning"
    async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=60) as client:
        dataset = (await client.post("/datasets", files={"file": ("rows.csv", rows)})).raise_for_status()
        body = {"base_model": "tunery-tiny", "dataset_id": dataset.json()["id"], "task_type": "qa"}
        made = (await client.post("/jobs", json=body)).raise_for_status()
    return str(made.json()["id"])


async def measure(num_followers: int, lines_per_second: int, seconds: int) -> dict[str, Any]:
    """Runs a stack of its own; returns the figures."""
    delays: array[float] = array("d")
    with tempfile.TemporaryDirectory(prefix="tunery-bench-") as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        async with (
            running_parts(folder, {**os.environ, **LIMITS}, PARTS) as stack,
            connect(stack.grpc_addresses["job_svc"]) as channel,
        ):
            worker, issuer = WorkerServiceStub(channel), Issuer.load("trainer", folder / "identity")
            job_id = await make_job(stack)
            request = worker_pb2.LeaseJobRequest(trainer_id="bench", wait_seconds=30)
            lease = (await worker.LeaseJob(request, metadata=issuer.own_metadata())).lease
            assert lease.job_id == job_id
            followers = await follow(stack, job_id, num_followers, delays)
            process = process_of("job_svc")
            before = process.cpu_times()
            started = time.monotonic()
            await write(worker, issuer, lease, lines_per_second, seconds)
            writing_seconds = time.monotonic() - started
            memory, after = process.memory_info().rss, process.cpu_times()
            ended = worker_pb2.EndAttemptRequest(
                job_id=job_id,
                lease_token=lease.lease_token,
                failed=worker_pb2.Failed(message="enough", fault="job"),
            )
            await worker.EndAttempt(ended, metadata=issuer.own_metadata())
            await asyncio.wait_for(asyncio.gather(*(follower.ended for follower in followers)), 60)
    expected = list(range(lines_per_second * seconds))
    assert all(follower.numbers == expected for follower in followers), "a line is missing, or came twice"
    hundredths = statistics.quantiles(delays, n=100)
    return {
        "followers": num_followers,
        "lines": len(expected),
        "lines_per_second": round(len(expected) / writing_seconds, 1),
        "deliveries": len(delays),
        "delay_p50_seconds": round(hundredths[49], 3),
        "delay_p99_seconds": round(hundredths[98], 3),
        "delay_max_seconds": round(max(delays), 3),
        "job_svc_memory_mb": round(memory / 1e6),
        "job_svc_processor_share": round(
            (after.user + after.system - before.user - before.system) / seconds, 2
        ),
    }


async def follow(stack: Stack, job_id: str, number: int, delays: array[float]) -> list[Follower]:
    """Starts followers, a few at a time, as no thousand people start at once."""
    address = stack.credentials.url.removeprefix("http://")
    host, _, port = address.partition(":")
    request = (
        f"GET /fine_tuning/jobs/tail?job_id={job_id} HTTP/1.1\r\nHost: {address}\r\n"
        f"Authorization: Bearer {stack.credentials.api_key}\r\n\r\n"
    ).encode()
    followers = []
    for _ in range(number):
        _, follower = await asyncio.get_running_loop().create_connection(
            lambda: Follower(request, delays), host, int(port)
        )
        followers.append(follower)
        await asyncio.sleep(0.005)
    await asyncio.sleep(3)  # until the last have what was there before
    return followers


async def write(
    worker: WorkerServiceStub, issuer: Issuer, lease: worker_pb2.Lease, lines_per_second: int, seconds: int
) -> None:
    """Sends lines at that rate, each when it is due, as a trainer does: the next after the one before."""
    started = time.monotonic()
    for number in range(lines_per_second * seconds):
        await asyncio.sleep(started + number / lines_per_second - time.monotonic())
        event = worker_pb2.Event(seq=lease.next_seq + number, kind="log")
        event.time.GetCurrentTime()
        event.message = f"line {number} sent at {time.time_ns()}."
        report = worker_pb2.ReportEventsRequest(
            job_id=lease.job_id, lease_token=lease.lease_token, events=[event]
        )
        await worker.ReportEvents(report, metadata=issuer.own_metadata())


def main() -> None:
    """Measures, prints, and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--followers", type=int, default=1000)
    parser.add_argument("--lines-per-second", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    result = asyncio.run(measure(options.followers, options.lines_per_second, options.seconds))
    result = keep("follow_log", result)
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{result['followers']} followers, {result['lines_per_second']} lines/s: "
        f"p50 {result['delay_p50_seconds']} s, p99 {result['delay_p99_seconds']} s, "
        f"max {result['delay_max_seconds']} s; job_svc: "
        f"{result['job_svc_memory_mb']} MB, {result['job_svc_processor_share']:.0%} of a processor"
    )


if __name__ == "__main__":
    main()
