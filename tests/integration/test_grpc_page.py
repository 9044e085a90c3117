"""docs/grpc.md keeps its word: its very lines are run against a stack."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2

from gateway.routes import OPEN_METHODS, PUBLIC_SERVICES, rest_bindings
from svc_kit.errors import table
from tests.conftest import RunningStack
from tunery.job.v1 import job_service_pb2, job_service_pb2_grpc

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "grpc.md").read_text(encoding="utf-8")
CLIENT, ERRORS, HEALTH, REFLECTION = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MAX_CLIENT_LINES = 20


def run(lines: str, folder: Path, **environment: str) -> list[str]:
    """Runs lines of the page as a program of their own; returns what it printed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    program = folder / "program.py"
    program.write_text(lines)
    result = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=folder,
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.splitlines()


def test_the_client_has_20_lines() -> None:
    assert len([line for line in CLIENT.splitlines() if line]) == MAX_CLIENT_LINES


def test_the_client_uploads_trains_follows_and_names_the_model(stack: RunningStack, tmp_path: Path) -> None:
    rows = "".join(f"What is {number}?,It is {number}.\n" for number in range(8))
    (tmp_path / "rows.csv").write_text("question,answer\n" + rows)
    key = stack.new_account("grpc page")

    # The errors' example goes on with the client's names.
    printed = run(CLIENT + ERRORS, tmp_path, TUNERY_URL=stack.url, TUNERY_API_KEY=key)

    *log, ended, error = printed
    assert error == "NOT_FOUND tunery not_found not_found_error"
    assert f"prints `{error}`" in PAGE
    assert [int(line.split()[0]) for line in log] == list(range(1, len(log) + 1))
    assert "job completed: 2 steps" in log[-1]
    status, model_id = ended.split()
    assert status == "completed"
    with stack.client(key) as client:
        listed = client.get("/api/v1/fine-tuning/models").raise_for_status().json()
    assert [model["id"] for model in listed["data"]] == [model_id]


def test_health_is_told_without_a_key(stack: RunningStack, tmp_path: Path) -> None:
    assert run(HEALTH, tmp_path, TUNERY_URL=stack.url) == ["SERVING"]


def test_reflection_describes_every_public_service_without_a_key(stack: RunningStack, tmp_path: Path) -> None:
    services, methods = run(REFLECTION, tmp_path, TUNERY_URL=stack.url)
    assert set(services.split()) >= {*PUBLIC_SERVICES, "grpc.health.v1.Health"}
    assert {"CreateJob", "TailLogs"} <= set(methods.split())


def test_a_tail_is_taken_up_after_the_seq_seen(stack: RunningStack, tmp_path: Path) -> None:
    """What the page says of after_seq, on a job that ends at once: its dialogs are broken."""
    key = stack.new_account("grpc tail")
    with stack.client(key) as client:
        file = {"file": ("rows.jsonl", b'{"dialog": 1}\n')}
        dataset = client.post("/fine_tuning/datasets", files=file).raise_for_status().json()
        config = {"model": "tunery-tiny", "data": f"dataset://{dataset['id']}"}
        job = client.post("/fine_tuning/jobs/submit", json=config).raise_for_status().json()
    with grpc.insecure_channel(stack.address) as channel:
        tail = job_service_pb2_grpc.JobServiceStub(channel).TailLogs
        metadata = [("authorization", f"Bearer {key}")]

        def seqs(after_seq: int) -> list[int]:
            request = job_service_pb2.TailLogsRequest(job_id=job["job_id"], after_seq=after_seq)
            records = list(tail(request, metadata=metadata, timeout=60))
            assert records[-1].kind == "end"
            return [record.seq for record in records]

        whole = seqs(0)
        assert whole == list(range(1, len(whole) + 1))
        assert seqs(whole[0]) == whole[1:]


def test_an_rpc_that_is_not_public_is_unimplemented(stack: RunningStack) -> None:
    with grpc.insecure_channel(stack.address) as channel:
        lease = channel.unary_unary("/tunery.trainer.v1.WorkerService/LeaseJob")
        with pytest.raises(grpc.RpcError) as caught:
            lease(b"", metadata=[("authorization", f"Bearer {stack.api_key}")], timeout=30)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_every_public_rpc_is_listed_with_its_path() -> None:
    files = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "tunery" / "descriptors.pb").read_bytes())
    expected = set()
    for file in files.file:
        for service in file.service:
            name = f"{file.package}.{service.name}"
            for method in service.method if name in PUBLIC_SERVICES else ():
                paths = [f"`{kind} {path}`".replace("=**}", "}") for kind, path in rest_bindings(method)]
                rest = f" {', '.join(paths)} " if paths else " "
                expected.add(f"| `{name}/{method.name}` |{rest}|")
    assert {line for line in PAGE.splitlines() if line.startswith("| `tunery.")} == expected
    assert {method.split("/")[1].partition(".v1")[0] for method in OPEN_METHODS} == {
        "grpc.health",
        "grpc.reflection",
    }


def test_every_status_is_listed_with_its_http_status() -> None:
    listed = dict(re.findall(r"^\| `([A-Z_]+)` \| (\d+) \|", PAGE, re.MULTILINE))
    for row in table():
        assert listed[row.grpc_status.name] == str(row.http_status)
    assert listed.keys() - {row.grpc_status.name for row in table()} == {"UNIMPLEMENTED", "DEADLINE_EXCEEDED"}
