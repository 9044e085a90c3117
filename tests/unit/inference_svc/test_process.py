"""The process: ready before torch is imported, stops when told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import grpc
from google.api import httpbody_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from svc_kit.identity import Issuer, write_identity_keys
from tunery.inference.v1 import chat_service_pb2_grpc
from tunery.ports import free_ports


def test_importing_the_service_imports_no_torch() -> None:
    code = "import sys, inference_svc.__main__; print(*sorted({'torch', 'transformers'} & {*sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_process_serves_and_stops(tmp_path: Path, models_dir: Path) -> None:
    identity_dir = tmp_path / "identity"
    write_identity_keys(identity_dir)
    [port] = free_ports(1, taken=())
    environment = {
        "TUNERY_LISTEN": f"127.0.0.1:{port}",
        "TUNERY_IDENTITY_DIR": str(identity_dir),
        "TUNERY_JOB_SVC_ADDRESS": "127.0.0.1:1",
        "TUNERY_AUTHZ_ADDRESS": "127.0.0.1:1",
        "TUNERY_MODELS_DIR": str(models_dir),
        "TUNERY_CACHE_DIR": str(tmp_path / "cache"),
        "TUNERY_CHAT_THREADS": "1",
        "TUNERY_S3_ENDPOINT": "http://127.0.0.1:1",
        "TUNERY_S3_ACCESS_KEY": "a",
        "TUNERY_S3_SECRET_KEY": "b",
    }
    body = {"model": "tunery-tiny", "messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 3}
    metadata = (
        ("authorization", f"Bearer {Issuer.load('account', identity_dir).issue('acct', ('read', 'write'))}"),
    )
    with (
        subprocess.Popen([sys.executable, "-P", "-m", "inference_svc"], env=environment) as process,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        try:
            health = health_pb2_grpc.HealthStub(channel)
            state = health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
            assert state.status == health_pb2.HealthCheckResponse.SERVING
            completion = chat_service_pb2_grpc.ChatServiceStub(channel).CreateChatCompletion(
                httpbody_pb2.HttpBody(data=json.dumps(body).encode()), metadata=metadata, timeout=120
            )
            assert completion.usage.completion_tokens == 3
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
