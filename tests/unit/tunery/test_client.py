"""What the client makes of answers that a stack on one machine doesn't give."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tunery.client import TuneryClient

LOG = "2026-01-02T03:04:05.678+00:00 job completed\n"


class WandbJob(BaseHTTPRequestHandler):
    """A service with one job, which logs to Weights & Biases with a key."""

    def do_GET(self) -> None:
        answers = {
            "/fine_tuning/jobs/status?job_id=job-1": json.dumps(
                {
                    "logs": "https://wandb.test/team/project/runs/1",
                    "input_config": {"logger": {"log_type": "wandb", "project": "project"}},
                }
            ),
            "/fine_tuning/jobs/job-1/files/log.txt": LOG,
        }
        self.send_response(200 if self.path in answers else 404)
        self.end_headers()
        self.wfile.write(answers.get(self.path, "").encode())

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""


class LosesTheFirstAnswer(BaseHTTPRequestHandler):
    """A service that carries a request out and then breaks the connection, the first time."""

    received: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.headers["Idempotency-Key"], body))
        if len(self.received) == 1:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = b'{"id": "made-1"}'
        self.send_response(201)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def forgetful() -> Iterator[TuneryClient]:
    """A client of a service that loses its first answer."""
    LosesTheFirstAnswer.received.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), LosesTheFirstAnswer) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with TuneryClient(f"http://127.0.0.1:{server.server_port}", "key") as client:
                yield client
        finally:
            server.shutdown()


def test_a_job_whose_answer_is_lost_is_asked_for_again_with_the_same_key(forgetful: TuneryClient) -> None:
    assert forgetful.create_job("tunery-tiny", "ds-1", "qa")["id"] == "made-1"
    first, second = LosesTheFirstAnswer.received
    assert first == second


def test_a_file_whose_answer_is_lost_is_sent_again_whole_with_the_same_key(
    forgetful: TuneryClient, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"question,answer\n" + b"q,a\n" * 100_000)
    told: list[int] = []
    assert forgetful.upload_dataset(path, on_progress=lambda sent, _size: told.append(sent))["id"] == "made-1"
    (first_key, _), (second_key, body) = LosesTheFirstAnswer.received
    assert first_key == second_key
    assert path.read_bytes() in body
    assert told == 2 * told[: len(told) // 2]  # it began anew


def test_the_log_is_the_services_own_where_the_job_logs_elsewhere_too() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), WandbJob) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with TuneryClient(f"http://127.0.0.1:{server.server_port}", "key") as client:
                assert list(client.read_log("job-1")) == [LOG.rstrip()]
        finally:
            server.shutdown()
