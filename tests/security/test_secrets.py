"""What is secret stays where it belongs: it is in no log, no database, no process that doesn't need it."""

from __future__ import annotations

import json
import subprocess

import grpc
import httpx
import pytest

from tests.conftest import RunningStack, own_database, postgres_programs, wait_until
from tunery.account.v1 import account_service_pb2, account_service_pb2_grpc


@pytest.fixture(scope="module")
def secrets(stack: RunningStack) -> dict[str, str]:
    """Every kind of secret that the stack has, used in all ways that clients and their mistakes use them."""
    found = {"first key": stack.api_key, "an account's key": stack.new_account("secretive")}
    with stack.client() as client:
        made = client.post("/api/v1/keys", json={"name": "planted", "scopes": ["write"]}).json()
        found["a further key"] = made["api_key"]
    for api_key in list(found.values()):
        with stack.client(api_key) as client:
            client.get("/api/v1/fine-tuning/jobs", params={"key": api_key, "limit": "x"})
            client.get("/api/v1/fine-tuning/jobs", headers={"x-request-id": api_key})
            client.post("/api/v1/fine-tuning/jobs", json={"base_model": api_key, "dataset_id": api_key})
            client.post("/api/v1/fine-tuning/jobs", content=api_key)
            client.post("/fine_tuning/jobs/submit", json={"model": "tunery-tiny", "data": api_key})
            client.post("/fine_tuning/jobs/cancel", json={"job_id": api_key})
            client.post("/v1/chat/completions", json={"model": api_key, "messages": []})
            client.post("/api/v1/keys", json={"name": "x", "scopes": [api_key]})
    httpx.get(f"{stack.url}/api/v1/fine-tuning/jobs", headers={"authorization": stack.api_key})
    httpx.get(f"{stack.url}/api/v1/fine-tuning/jobs", headers={"x-api-key": stack.api_key})
    with grpc.insecure_channel(stack.address) as channel:
        stub = account_service_pb2_grpc.AccountServiceStub(channel)
        for metadata in (
            (("authorization", f"Bearer {stack.api_key}"),),
            (("authorization", stack.api_key),),
        ):
            with pytest.raises(grpc.RpcError):
                stub.RevokeApiKey(
                    account_service_pb2.RevokeApiKeyRequest(key_id=stack.api_key), metadata=metadata
                )
    environment = {}
    for _, own in stack.processes():
        environment |= own
    found["S3 secret key"] = environment["TUNERY_S3_SECRET_KEY"]
    for path in (stack.data_dir / "identity").glob("*.key"):
        found[path.name] = path.read_text().splitlines()[1]
    return found


def test_no_log_has_a_secret(stack: RunningStack, secrets: dict[str, str]) -> None:
    logs = [stack.output, *(stack.data_dir / "logs").iterdir()]
    assert len(logs) > 6
    text = {path.name: path.read_text(errors="replace") for path in logs}
    audit = [json.loads(line) for line in text["authz.log"].splitlines() if '"audit"' in line]
    assert {"ok", "conflict", "not_found"} & {line["result"] for line in audit}

    leaks = [(name, what) for name, log in text.items() for what, secret in secrets.items() if secret in log]

    assert leaks == []
    assert not [name for name, log in text.items() if "eyJ" in log]  # how every identity token begins


def databases_of(stack: RunningStack) -> list[bytes]:
    """All that is in the stack's databases."""
    url = own_database(stack.data_dir).get("TUNERY_DATABASE_URL")
    if url is None:
        return [path.read_bytes() for path in (stack.data_dir / "db").iterdir()]
    dump = [postgres_programs() / "pg_dump", url.replace("+psycopg", "")]
    return [subprocess.run(dump, check=True, capture_output=True).stdout]


def test_databases_have_no_key(stack: RunningStack, secrets: dict[str, str]) -> None:
    databases = databases_of(stack)
    assert any(b"api_keys" in content for content in databases)

    assert not [
        what
        for what, secret in secrets.items()
        if what.endswith("key") and any(secret.encode() in content for content in databases)
    ]


def test_no_process_is_given_a_key_on_its_command_line(stack: RunningStack, secrets: dict[str, str]) -> None:
    # Every user of the machine can read these.
    lines = [" ".join(command) for command, _ in stack.processes()]
    assert not [line for line in lines for secret in secrets.values() if secret in line]


def test_the_first_key_is_told_to_the_auth_check_alone(stack: RunningStack) -> None:
    told = {
        command[-1] for command, environment in stack.processes() if stack.api_key in environment.values()
    }
    assert told == {"gateway.authz"}


def test_files_of_secrets_are_for_their_owner_alone(stack: RunningStack, secrets: dict[str, str]) -> None:
    values = [secret.encode() for secret in secrets.values()]
    holders = [
        path
        for path in stack.data_dir.rglob("*")
        if path.is_file()
        and path.stat().st_size < 2**20
        and any(value in path.read_bytes() for value in values)
    ]
    assert {"credentials.json", "account.key"} <= {path.name for path in holders}
    assert not [path for path in holders if path.stat().st_mode & 0o077]


def test_a_run_is_told_no_secret(stack: RunningStack, secrets: dict[str, str]) -> None:
    def runs() -> list[dict[str, str]]:
        """Their environments."""
        return [environment for command, environment in stack.processes() if "trainer_svc.engine" in command]

    with stack.client(secrets["an account's key"]) as client:
        rows = "question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(8))
        dataset = client.post("/api/v1/fine-tuning/datasets", files={"file": ("rows.csv", rows)}).json()
        asked = {"base_model": "tunery-tiny", "dataset_id": dataset["id"], "task_type": "qa"}
        path = "/api/v1/fine-tuning/jobs"
        job = client.post(path, json={**asked, "hyperparameters": {"epochs": 5000}}).json()["id"]
        try:
            wait_until(lambda: bool(runs()), 60, "the run")
            environments = runs()
        finally:
            client.post(f"{path}/{job}/cancel")

    assert environments
    for environment in environments:
        assert not [name for name in environment if name.startswith("TUNERY_")]
        assert not [what for what, secret in secrets.items() if secret in environment.values()]
