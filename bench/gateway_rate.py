"""GET of a job through the gateway, its key checked, beside the same call straight to job_svc.

    .venv/bin/python bench/gateway_rate.py [--seconds 5] [--rounds 5] [--connections 16] [--json]

The claim: at least 40 % of the rate of job_svc itself, and 99 in 100 calls answered within 25 ms at 16
connections. The legs take turns, and each has the same client: HTTP/2 by hand, so that it costs little, one
call at a time on each connection. They differ in what they send: `gateway` a GET with an API key, `gateway,
native` GetJob with that key, `job_svc` GetJob with the identity that the gateway would have put in the key's
place. Of each process it is noted too how much processor time a call takes, which hardly depends on what else
the machine does.
Prints a table, and writes `bench/results/gateway_rate.json` with the commit and the hardware.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass

import grpc
import psutil
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from kept_results import keep
from stacks import NO_RATE_LIMIT, ROWS, WholeStack, whole_stack

from tunery.job.v1 import job_service_pb2

CLIENT_PROCESSES = 2
WARM_UP_SECONDS = 1.0
JOBS = "/api/v1/fine-tuning/jobs"
GET_JOB = "/tunery.job.v1.JobService/GetJob"

# HTTP/2 (RFC 9113): frame types and flags, and a client's first words: a window that never closes in a round.
DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
LARGEST_WINDOW = 2**31 - 1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def literal(text: str) -> bytes:
    """A string of HPACK (RFC 7541, 5.2), not Huffman-coded."""
    size = len(text)
    if size < 127:
        return bytes((size,)) + text.encode()
    prefix, size = bytearray((127,)), size - 127
    while size >= 128:
        prefix.append(size % 128 + 128)
        size //= 128
    return bytes((*prefix, size)) + text.encode()


PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + frame(SETTINGS, 0, 0, (4).to_bytes(2, "big") + LARGEST_WINDOW.to_bytes(4, "big"))
    + frame(WINDOW_UPDATE, 0, 0, (LARGEST_WINDOW - 65535).to_bytes(4, "big"))
)


@dataclass(frozen=True)
class Leg:
    """What is asked of whom.

    Attributes:
        port: on 127.0.0.1.
        headers: the request's.
        body: the request's; empty for none.
        expected: bytes that every right answer's body has.
    """

    port: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    expected: bytes

    def request(self, stream: int) -> bytes:
        """The frames of one request."""
        block = b"".join(b"\0" + literal(name) + literal(value) for name, value in self.headers)
        if not self.body:
            return frame(HEADERS, END_HEADERS | END_STREAM, stream, block)
        return frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, self.body)


class Connection(asyncio.Protocol):
    """Sends a request as soon as the last is answered, and notes how long each took, in seconds."""

    def __init__(self, leg: Leg) -> None:
        self._leg = leg
        self._buffer = b""
        self._body = b""
        self._stream = 1
        self.latencies: list[float] = []
        self.failure: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(PREFACE)
        self._ask()

    def _ask(self) -> None:
        self._body = b""
        self._asked = time.perf_counter()
        self._transport.write(self._leg.request(self._stream))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 9:
            size = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + size:
                return
            kind, flags = self._buffer[3], self._buffer[4]
            stream = int.from_bytes(self._buffer[5:9], "big")
            payload, self._buffer = self._buffer[9 : 9 + size], self._buffer[9 + size :]
            self._take(kind, flags, stream, payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in (SETTINGS, PING) and not flags & ACK:
            self._transport.write(frame(kind, ACK, 0, payload if kind == PING else b""))
        elif kind == DATA:
            self._body += payload
        if kind in (DATA, HEADERS) and flags & END_STREAM and stream == self._stream:
            if self._leg.expected not in self._body:
                self.failure = f"a wrong answer: {payload!r} {self._body!r}"
                self._transport.close()
                return
            self.latencies.append(time.perf_counter() - self._asked)
            self._stream += 2
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        self.failure = self.failure or f"the connection ended: {error}"


async def _load(leg: Leg, num_connections: int, seconds: float) -> list[float]:
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Connection(leg), "127.0.0.1", leg.port)
        for _ in range(num_connections)
    ]
    await asyncio.sleep(WARM_UP_SECONDS)
    for _, connection in made:
        connection.latencies.clear()
    await asyncio.sleep(seconds)
    failures = [connection.failure for _, connection in made if connection.failure]
    assert not failures, failures[0]
    latencies = [latency for _, connection in made for latency in connection.latencies]
    for transport, _ in made:
        transport.abort()
    return latencies


def load(leg: Leg, num_connections: int, seconds: float) -> list[float]:
    """Asks for a while on some connections; returns how long each answer took, in seconds."""
    return asyncio.run(_load(leg, num_connections, seconds))


def stack_processes(root: psutil.Process) -> dict[str, psutil.Process]:
    """The processes that a call may go through, by name."""
    found = {}
    for process in root.children(recursive=True):
        line = process.cmdline()
        name = "envoy" if line[0].endswith("/envoy") else line[-1]
        if name in ("envoy", "gateway.authz", "job_svc"):
            found[name] = process
    assert len(found) == 3, found
    return found


def processor_seconds(process: psutil.Process) -> float:
    """What a process has used so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def identity(authz_address: str, api_key: str) -> str:
    """The `authorization` that the gateway puts in a key's place."""
    request = external_auth_pb2.CheckRequest()
    request.attributes.request.http.headers["authorization"] = f"Bearer {api_key}"
    with grpc.insecure_channel(authz_address) as channel:
        answer = external_auth_pb2_grpc.AuthorizationStub(channel).Check(request, timeout=10)
    return str(answer.ok_response.headers[0].header.value)


def make_job(stack: WholeStack) -> str:
    """Makes a job, ended at once."""
    with stack.client() as client:
        dataset = client.post("/api/v1/fine-tuning/datasets", files={"file": ("rows.csv", ROWS)}).json()
        asked = {"base_model": "tunery-tiny", "dataset_id": dataset["id"], "task_type": "qa"}
        job_id = str(client.post(JOBS, json=asked).raise_for_status().json()["id"])
        client.post(f"{JOBS}/{job_id}/cancel").raise_for_status()
    return job_id


def measure(seconds: float, rounds: int, num_connections: int) -> dict[str, object]:
    """Runs a stack of its own; the legs take turns."""
    with whole_stack(**NO_RATE_LIMIT) as stack:
        job_id = make_job(stack)
        processes = stack_processes(stack.process)
        return compare(processes, stack.port, stack.api_key, job_id, seconds, rounds, num_connections)


def legs(processes: dict[str, psutil.Process], port: int, api_key: str, job_id: str) -> dict[str, Leg]:
    """The legs, whose identity is good for 30 seconds at least."""
    job_svc = processes["job_svc"].environ()["TUNERY_LISTEN"]
    authz = processes["gateway.authz"].environ()["TUNERY_LISTEN"]
    message = job_service_pb2.GetJobRequest(job_id=job_id).SerializeToString()
    body = b"\0" + len(message).to_bytes(4, "big") + message

    def native(port: int, authorization: str) -> Leg:
        headers = (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", GET_JOB),
            (":authority", "tunery"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("authorization", authorization),
        )
        return Leg(port, headers, body, job_id.encode())

    rest = (
        (":method", "GET"),
        (":scheme", "http"),
        (":path", f"{JOBS}/{job_id}"),
        (":authority", "tunery"),
        ("authorization", f"Bearer {api_key}"),
    )
    return {
        "job_svc": native(int(job_svc.rpartition(":")[2]), identity(authz, api_key)),
        "gateway": Leg(port, rest, b"", job_id.encode()),
        "gateway, native": native(port, f"Bearer {api_key}"),
    }


def compare(
    processes: dict[str, psutil.Process],
    port: int,
    api_key: str,
    job_id: str,
    seconds: float,
    rounds: int,
    num_connections: int,
) -> dict[str, object]:
    """Measures each leg `rounds` times in turn."""
    rates: dict[str, list[float]] = {}
    latencies: dict[str, list[float]] = {}
    used: dict[str, list[dict[str, float]]] = {}
    share = num_connections // CLIENT_PROCESSES
    with multiprocessing.get_context("spawn").Pool(CLIENT_PROCESSES) as clients:
        for _ in range(rounds):
            for name, leg in legs(processes, port, api_key, job_id).items():
                before = {each: processor_seconds(process) for each, process in processes.items()}
                parts = clients.starmap(load, [(leg, share, seconds)] * CLIENT_PROCESSES)
                found = [latency for part in parts for latency in part]
                rates.setdefault(name, []).append(len(found) / seconds)
                latencies.setdefault(name, []).extend(found)
                num_calls = len(found) * (WARM_UP_SECONDS + seconds) / seconds
                used.setdefault(name, []).append(
                    {
                        each: (processor_seconds(process) - before[each]) / num_calls
                        for each, process in processes.items()
                    }
                )
    return {
        "connections": num_connections,
        "calls_per_second": {name: [round(rate) for rate in each] for name, each in rates.items()},
        "share_of_job_svc": {
            name: round(statistics.median(a / b for a, b in zip(each, rates["job_svc"], strict=True)), 3)
            for name, each in rates.items()
        },
        "milliseconds": {
            name: dict(zip(("p50", "p99"), percentiles(each), strict=True))
            for name, each in latencies.items()
        },
        "processor_microseconds_per_call": {
            name: {each: round(1e6 * statistics.median(one[each] for one in rows)) for each in processes}
            for name, rows in used.items()
        },
    }


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return round(1000 * cuts[49], 1), round(1000 * cuts[98], 1)


def main() -> None:
    """Measures, prints, and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each leg in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    result = measure(options.seconds, options.rounds, options.connections)
    result = keep("gateway_rate", result)
    if options.json:
        print(json.dumps(result))
        return
    for name, rates in result["calls_per_second"].items():  # type: ignore[attr-defined]  # a dict, as made above
        share, took = result["share_of_job_svc"][name], result["milliseconds"][name]  # type: ignore[index]
        print(f"{name:16} {rates} calls/s, {share:.0%}, p50 {took['p50']} ms, p99 {took['p99']} ms")
        print(f"{'':16} microseconds of processor a call: {result['processor_microseconds_per_call'][name]}")  # type: ignore[index]


if __name__ == "__main__":
    main()
