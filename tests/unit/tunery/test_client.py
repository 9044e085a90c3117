"""What the client makes of answers that a stack on one machine doesn't give."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

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

    keys: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.append(self.headers["Idempotency-Key"])
        if len(self.keys) == 1:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = b'{"id": "job-1"}'
        self.send_response(201)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""


def test_a_job_whose_answer_is_lost_is_asked_for_again_with_the_same_key() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), LosesTheFirstAnswer) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with TuneryClient(f"http://127.0.0.1:{server.server_port}", "key") as client:
                assert client.create_job("tunery-tiny", "ds-1", "qa")["id"] == "job-1"
        finally:
            server.shutdown()
    first, second = LosesTheFirstAnswer.keys
    assert first == second


def test_the_log_is_the_services_own_where_the_job_logs_elsewhere_too() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), WandbJob) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with TuneryClient(f"http://127.0.0.1:{server.server_port}", "key") as client:
                assert list(client.read_log("job-1")) == [LOG.rstrip()]
        finally:
            server.shutdown()
