"""The commands against a running stack: what they print, and their exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import own_database, postgres_programs
from tests.integration.tunery.running import (
    COMMAND,
    Result,
    Up,
    Ups,
    clean_environment,
    free_port,
    run_in_terminal,
    run_tunery,
    wait_for,
)
from tunery.backup import back_up, restore
from tunery.errors import SetUpError

REFUSED, USAGE, UNREACHABLE, NOT_FOUND, INTERRUPTED = 1, 2, 3, 4, 130


def assert_fails(result: Result, code: int, *words: str) -> None:
    assert result.code == code, result
    assert result.out == ""
    assert len(result.err.splitlines()) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


@pytest.fixture(scope="module")
def trained(stack: Up, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A job that has completed, as `jobs create --follow --json` shows it."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_text("question,answer\n" + "".join(f"Number {n}?,It is {n}.\n" for n in range(16)))
    result = stack.tunery(
        "jobs", "create", str(path), "--model", "tunery-tiny", "--epochs", "1",
        "--validation-split", "0.25", "--suffix", "told", "--follow", "--json",
    )  # fmt: skip
    assert result.code == 0, result
    details: dict[str, object] = result.json
    return details


@pytest.fixture
def long_job(stack: Up, rows_csv: Path) -> str:
    """A job that would train for very long."""
    result = stack.tunery(
        "jobs", "create", str(rows_csv), "--model", "tunery-tiny", "--epochs", "5000", "--json"
    )
    assert result.code == 0, result
    job_id: str = result.json["id"]
    return job_id


def epochs_completed(up: Up, job_id: str) -> int:
    job = up.get(f"/api/v1/fine-tuning/jobs/{job_id}").json()
    return int(job.get("training_metrics", {}).get("epochs_completed", 0))


def files_of(archive: httpx.Response) -> dict[str, bytes]:
    """The files of a tar; their times are those at which they were stored."""
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_a_running_stack_is_backed_up_and_restored(
    stack: Up, ups: Ups, trained: dict[str, Any], rows_csv: Path, tmp_path: Path
) -> None:
    create = ("jobs", "create", str(rows_csv), "--model", "tunery-tiny", "--epochs", "25", "--json")
    running = stack.tunery(*create).json["id"]
    wait_for(lambda: epochs_completed(stack, running), "the first checkpoint")
    backup, folder = tmp_path / "backup", tmp_path / "restored"
    database = own_database(folder)
    variables = {**own_database(stack.data_dir), "PATH": f"{postgres_programs()}:{os.environ['PATH']}"}
    assert back_up(backup, stack.data_dir, {**os.environ, **variables}).num_objects > 0
    stack.tunery("jobs", "cancel", running)
    private = [backup / "credentials.json", *backup.glob("identity/*.key")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (*private, backup)} == {0o600, 0o700}

    restored = run_tunery("restore", str(backup), "--data-dir", str(folder), **{**variables, **database})
    assert restored.code == 0, restored
    up = ups.start_ready(folder, TUNERY_LEASE_SECONDS="3")
    assert up.credentials["api_key"] == stack.credentials["api_key"]
    assert up.tunery("datasets", "list", "--json").json == stack.tunery("datasets", "list", "--json").json
    artifact = f"/api/v1/fine-tuning/models/{trained['job']['fine_tuned_model']}/artifact"
    assert files_of(up.get(artifact)) == files_of(stack.get(artifact))
    followed = up.tunery("jobs", "logs", "-f", running, "--json")
    assert followed.code == 0, followed
    messages = [record["message"] for record in followed.json["data"]]
    assert "the trainer was lost; job queued again" in messages
    details = up.tunery("jobs", "show", running, "--json").json
    assert (details["job"]["status"], details["attempts"]) == ("completed", 2)
    assert details["job"]["training_metrics"]["epochs_completed"] == 25
    assert up.stop() == 0

    # A stack that doesn't run is backed up as well.
    again = up.tunery("backup", str(tmp_path / "again"), **{**variables, **database})
    assert again.code == 0, again


def test_what_no_backup_is_made_of_and_none_is_restored_to(stack: Up, tmp_path: Path) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(SetUpError, match="full is not empty"):
        back_up(full, stack.data_dir, {})
    with pytest.raises(SetUpError, match="no folder of `tunery up`"):
        back_up(empty, tmp_path / "nowhere", {})
    with pytest.raises(SetUpError, match="no whole backup"):
        restore(full, empty, {})
    (full / "backup.json").touch()
    with pytest.raises(SetUpError, match="data is not empty"):
        restore(full, stack.data_dir, {})
    assert_fails(stack.tunery("backup", str(full)), USAGE, "is not empty")


def test_help_is_complete():
    result = run_tunery("--help")
    assert result.code == 0
    for name in ("up", "datasets", "jobs", "models", "accounts", "keys"):
        assert name in result.out


def test_help_waits_for_no_large_library():
    program = "import sys; from tunery.cli import run; run(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "grpc", "httpx", "sqlalchemy", "minio"} & set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("jobs", "nonsense"),
        ("jobs", "show"),
        ("jobs", "list", "--limit", "many"),
        ("jobs", "create", "x", "--epochs", "2.5"),
        ("datasets", "upload"),
        ("accounts", "create", "x", "--credits", "much"),
        ("keys", "create", "x", "--scope", "root"),
        ("models", "list", "--nonsense"),
    ],
)
def test_wrong_usage(arguments):
    assert_fails(run_tunery(*arguments), USAGE)


def test_no_service_named():
    assert_fails(run_tunery("jobs", "list"), USAGE, "--data-dir", "TUNERY_URL", "TUNERY_API_KEY")
    assert_fails(run_tunery("jobs", "list", TUNERY_URL="http://127.0.0.1:1"), USAGE, "TUNERY_API_KEY")


def test_wrong_url():
    result = run_tunery("jobs", "list", TUNERY_URL="127.0.0.1:1", TUNERY_API_KEY="x")
    assert_fails(result, USAGE, "127.0.0.1:1")


@pytest.mark.parametrize("key", ["tnry_ü", "tnry_x\n", "tnry x"])
def test_key_that_can_be_none(key):
    for arguments in (("jobs", "list"), ("jobs", "logs", "-f", "job-x")):
        result = run_tunery(*arguments, TUNERY_URL="http://127.0.0.1:1", TUNERY_API_KEY=key)
        assert_fails(result, USAGE, "API key")
        assert "tnry" not in result.err


def test_service_at_an_ipv6_address():
    url = f"http://[::1]:{free_port()}"
    for arguments in (("jobs", "list"), ("accounts", "create", "x")):
        result = run_tunery(*arguments, TUNERY_URL=url, TUNERY_API_KEY="x")
        assert_fails(result, UNREACHABLE, url)
        assert "resolving" not in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("jobs", "show", "\udcff"),
        ("accounts", "create", "\udcff"),
        ("models", "ask", "tunery-tiny", "\udcff"),
        ("datasets", "upload", "\udcff.csv"),
    ],
)
def test_argument_that_is_no_text(arguments):
    assert_fails(run_tunery(*arguments, TUNERY_URL="http://127.0.0.1:1", TUNERY_API_KEY="x"), USAGE, "UTF-8")


@pytest.mark.parametrize("wrong_id", ["", ".", "..", "a/b"])
def test_id_that_no_path_can_carry(wrong_id):
    for command in (("jobs", "show"), ("jobs", "cancel"), ("datasets", "delete"), ("models", "delete")):
        result = run_tunery(*command, wrong_id, TUNERY_URL="http://127.0.0.1:1", TUNERY_API_KEY="x")
        assert_fails(result, NOT_FOUND, repr(wrong_id))


def test_number_that_json_does_not_know(stack, rows_csv):
    for number in ("nan", "inf"):
        asked = stack.tunery("models", "ask", "tunery-tiny", "Who?", "--temperature", number)
        assert_fails(asked, REFUSED, "not a JSON number")
        created = stack.tunery("jobs", "create", str(rows_csv), "--learning-rate", number)
        assert_fails(created, REFUSED, "not a JSON number")


def test_output_that_can_not_be_written(stack, trained):
    job_id = trained["job"]["id"]
    for arguments in ("jobs list", "jobs list --json", f"jobs logs {job_id}", f"jobs logs -f {job_id}"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, *arguments.split(), "--data-dir", str(stack.data_dir)],
                env=clean_environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == USAGE
        assert done.stderr == "tunery: [Errno 28] No space left on device\n"


def test_locale_without_the_characters_printed(stack, trained):
    for follow in ((), ("-f",)):
        told = stack.tunery("jobs", "logs", *follow, trained["job"]["id"], PYTHONIOENCODING="ascii")
        assert told.code == 0, told
        assert "epoch 1 \\xb7 loss" in told.out


def test_what_others_named_moves_no_cursor(stack, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,\x1b]0;title\x07\x9b31m\nWho?,Me.,x\n")
    uploaded = stack.tunery("datasets", "upload", str(path), "--json")
    assert "\\u009b31m" in uploaded.out
    assert uploaded.json["columns"][2] == "\x1b]0;title\x07\x9b31m"
    dataset_id = uploaded.json["id"]
    for arguments in (("datasets", "list"), ("datasets", "report", dataset_id), ("jobs", "show", "\x1b[31m")):
        told = stack.tunery(*arguments)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", told.out + told.err), arguments
    assert "\\x1b]0;title\\x07" in stack.tunery("datasets", "list").out
    stack.tunery("datasets", "delete", dataset_id)


@pytest.mark.parametrize("columns", [40, 60, 120])
def test_datasets_leave_columns_out_of_narrow_terminals(stack, rows_csv, columns):
    uploaded = stack.tunery("datasets", "upload", str(rows_csv), "--json").json["id"]
    code, lines = run_in_terminal(columns, "datasets", "list", "--data-dir", str(stack.data_dir))
    assert code == 0
    assert max(map(len, lines)) <= columns
    assert sum(line.startswith(uploaded) for line in lines) == 1
    assert ("no room for" in " ".join(lines)) == (columns < 120)
    stack.tunery("datasets", "delete", uploaded)


@pytest.mark.parametrize(("closed", "code"), [(">&-", USAGE), ("2>&-", REFUSED)])
def test_closed_streams(stack, closed, code):
    command = f"{' '.join(COMMAND)} jobs list --limit 101 --data-dir {stack.data_dir} {closed}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_tables_in_terminals_of_several_widths(stack, trained):
    job_id, model_id = trained["job"]["id"], trained["job"]["fine_tuned_model"]
    where = ("--data-dir", str(stack.data_dir))
    for columns in (80, 100, 160):
        code, lines = run_in_terminal(columns, "jobs", "list", *where)
        assert code == 0
        [row] = [line for line in lines if job_id in line]
        assert "completed" in row
        assert model_id in row
        assert max(map(len, lines)) <= columns
        assert ("no room for" in lines[-1]) == (columns < 160)
        _, lines = run_in_terminal(columns, "models", "list", *where)
        [row] = [line for line in lines if model_id in line]
        assert job_id in row


def test_step_in_a_narrow_terminal_is_one_line(stack, trained):
    code, lines = run_in_terminal(
        60, "jobs", "logs", "-f", trained["job"]["id"], "--data-dir", str(stack.data_dir)
    )
    assert code == 0
    after = [lines[index + 1] for index, line in enumerate(lines) if "  step " in line]
    assert after
    assert all(line[:8].count(":") == 2 or line.startswith("training") for line in after), lines


def test_folder_without_credentials(tmp_path):
    result = run_tunery("jobs", "list", "--data-dir", str(tmp_path))
    assert_fails(result, USAGE, "credentials.json")


@pytest.mark.parametrize("arguments", [("jobs", "list"), ("accounts", "create", "x"), ("models", "list")])
def test_service_out_of_reach(arguments):
    url = f"http://127.0.0.1:{free_port()}"
    result = run_tunery(*arguments, TUNERY_URL=url, TUNERY_API_KEY="x")
    assert_fails(result, UNREACHABLE, url)


def test_key_that_is_refused(stack):
    for arguments in (("jobs", "list"), ("accounts", "create", "x"), ("jobs", "logs", "-f", "job-x")):
        result = run_tunery(*arguments, TUNERY_URL=stack.url, TUNERY_API_KEY="tnry_wrong")
        assert_fails(result, REFUSED, "invalid_api_key")


def test_service_by_variables(stack):
    result = run_tunery(
        "datasets", "list", "--json", TUNERY_URL=stack.url, TUNERY_API_KEY=stack.credentials["api_key"]
    )
    assert result.code == 0
    assert "data" in result.json


def test_account_gets_a_key_of_its_own(stack):
    created = stack.tunery("accounts", "create", "a team", "--credits", "2.5")
    assert created.code == 0
    [key] = created.out.splitlines()
    assert key.startswith("tnry_")
    own = {"TUNERY_URL": stack.url, "TUNERY_API_KEY": key}
    assert run_tunery("jobs", "list", "--json", **own).json == {"data": [], "total": 0}
    assert_fails(run_tunery("accounts", "create", "more", **own), REFUSED, "forbidden")
    databases = b"".join(path.read_bytes() for path in stack.data_dir.glob("db/*"))
    assert key.encode() not in databases


def test_keys_are_made_listed_and_taken_back(stack, rows_csv):
    made = stack.tunery("keys", "create", "a reader", "--scope", "read")
    assert made.code == 0, made
    [key] = made.out.splitlines()
    own = {"TUNERY_URL": stack.url, "TUNERY_API_KEY": key}
    assert run_tunery("jobs", "list", **own).code == 0
    assert_fails(run_tunery("datasets", "upload", str(rows_csv), **own), REFUSED, "`write`", "forbidden")
    listed = stack.tunery("keys", "list", "--json").json["data"]
    assert {"id": key[:11], "name": "a reader", "scopes": ["read"]}.items() <= listed[-1].items()
    assert key[:11] in stack.tunery("keys", "list").out

    assert stack.tunery("keys", "revoke", key, "--json").json == {"id": key[:11], "revoked": True}

    wait_for(lambda: run_tunery("jobs", "list", **own).code == REFUSED, "the key to be refused")
    assert_fails(stack.tunery("keys", "revoke", key), NOT_FOUND, "not_found")
    first = stack.credentials["api_key"]
    assert_fails(stack.tunery("keys", "revoke", first), REFUSED, "conflict")
    assert_fails(stack.tunery("keys", "list", "--account", "acct-x"), NOT_FOUND, "account")


def test_account_with_wrong_arguments(stack):
    assert_fails(stack.tunery("accounts", "create", ""), REFUSED, "name")
    assert_fails(stack.tunery("accounts", "create", "x", "--credits", "-1"), REFUSED, "credits")


def test_account_without_enough_credits(stack, rows_csv):
    key = stack.tunery("accounts", "create", "poor", "--credits", "0", "--json").json["api_key"]
    result = run_tunery(
        "jobs", "create", str(rows_csv), "--model", "tunery-tiny",
        TUNERY_URL=stack.url, TUNERY_API_KEY=key,
    )  # fmt: skip
    assert_fails(result, REFUSED, "insufficient_credits")


def test_datasets(stack, rows_csv):
    uploaded = stack.tunery("datasets", "upload", str(rows_csv), "--name", "[red]numbers", "--json").json
    assert uploaded["row_count"] == 16
    assert uploaded["columns"] == ["question", "answer"]
    assert uploaded["size_bytes"] == rows_csv.stat().st_size
    assert uploaded in stack.tunery("datasets", "list", "--json").json["data"]
    table = stack.tunery("datasets", "list").out
    assert uploaded["id"] in table
    assert "[red]numbers" in table
    deleted = stack.tunery("datasets", "delete", uploaded["id"], "--json")
    assert deleted.json == {"id": uploaded["id"], "deleted": True}
    assert_fails(stack.tunery("datasets", "delete", uploaded["id"]), NOT_FOUND, uploaded["id"])


def test_report_on_a_dataset(stack, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nWhat?,[b]That\n" + f"What?,{'so ' * 99}\n" * 30 + "What?,\n" * 15)
    dataset_id = stack.tunery("datasets", "upload", str(path), "--json").json["id"]
    asked = ("datasets", "report", dataset_id, "--base-model", "tunery-tiny", "--max-sequence-length", "60")

    told = stack.tunery(*asked, "--task", "qa", "--json").json
    assert (told["dataset_id"], told["num_rows"], told["num_bad_rows"]) == (dataset_id, 46, 15)
    code, lines = run_in_terminal(80, *asked, "--data-dir", str(stack.data_dir))
    assert code == 0
    assert max(map(len, lines)) <= 80
    facts = dict(part for line in lines if len(part := re.split("  +", line, maxsplit=1)) == 2)
    assert facts["rows"] == "46"
    assert facts["duplicate rows"] == "29: lines 4 (as 3), 5 (as 3), 6 (as 3), 7 (as 3), 8 (as 3), 9"
    assert facts["over 60 tokens"] == "30: lines 3, 4, 5, 6, 7, 8, 9, 10, …"
    shown = "\n".join(lines)
    [longest] = [line for line in lines if line.endswith("█" * 40)]
    assert " 30 " in longest
    assert re.search(r"33 +answer +the value is empty +write some text", shown)
    assert "and 5 more" in shown
    assert "⟦[b]That<|im_end|>⟧" in shown
    assert "⟦[b]That<|im_end|>⟧" in stack.tunery(*asked).out

    refused = stack.tunery("datasets", "report", dataset_id, "--task", "chat")
    assert_fails(refused, REFUSED, "task_type", "not_qa")
    assert_fails(stack.tunery("datasets", "report", "ds-none"), NOT_FOUND, "ds-none")


def test_broken_dataset(stack, tmp_path):
    broken = tmp_path / "broken.csv"
    broken.write_text("question,answer\nonly one\n")
    assert_fails(stack.tunery("datasets", "upload", str(broken)), REFUSED, "malformed_file", "Line 2")
    assert_fails(stack.tunery("datasets", "upload", str(tmp_path / "none.csv")), USAGE, "none.csv")
    assert_fails(stack.tunery("datasets", "upload", str(tmp_path)), USAGE)
    wrong = tmp_path / "rows.txt"
    wrong.write_text("question,answer\na,b\n")
    assert_fails(stack.tunery("datasets", "upload", str(wrong)), REFUSED)


def test_job_from_csv_to_model(stack, trained):
    job = trained["job"]
    assert job["status"] == "completed"
    assert job["hyperparameters"]["epochs"] == 1
    assert "told" in job["fine_tuned_model"]
    assert trained["attempts"] == 1
    assert stack.tunery("jobs", "show", job["id"], "--json").json["job"] == job
    assert job in stack.tunery("jobs", "list", "--json").json["data"]
    shown = stack.tunery("jobs", "show", job["id"]).out
    for fact in (job["id"], "completed", job["fine_tuned_model"], "validation loss"):
        assert fact in shown
    assert job["id"] in stack.tunery("jobs", "list", "--limit", "100").out


def test_log_of_a_job(stack, trained):
    job_id = trained["job"]["id"]
    followed = stack.tunery("jobs", "logs", "-f", job_id, "--json")
    assert followed.code == 0
    records = followed.json["data"]
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    assert records[-1]["kind"] == "end"
    steps = [record["step"] for record in records if record["kind"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, steps[0]["total_steps"] + 1))
    lines = stack.tunery("jobs", "logs", job_id).out.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [record["message"] for record in records]
    entries = stack.tunery("jobs", "logs", job_id, "--json").json["data"]
    assert [entry["message"] for entry in entries] == [record["message"] for record in records]
    plain = stack.tunery("jobs", "logs", "--follow", job_id)
    assert plain.code == 0
    assert all(record["message"] in plain.out for record in records)
    assert "\x1b" not in plain.out


def test_wrong_jobs(stack, rows_csv):
    assert_fails(stack.tunery("jobs", "show", "job-none"), NOT_FOUND, "job-none")
    assert_fails(stack.tunery("jobs", "logs", "job-none"), NOT_FOUND)
    assert_fails(stack.tunery("jobs", "logs", "-f", "job-none"), NOT_FOUND)
    assert_fails(stack.tunery("jobs", "cancel", "job-none"), NOT_FOUND)
    kept = {dataset["id"] for dataset in stack.tunery("datasets", "list", "--json").json["data"]}
    assert_fails(stack.tunery("jobs", "create", "ds-none", "--model", "tunery-tiny"), REFUSED, "ds-none")
    assert_fails(stack.tunery("jobs", "create", "none.csv"), USAGE, "none.csv")
    assert_fails(stack.tunery("jobs", "list", "--limit", "101"), REFUSED, "limit")
    assert_fails(stack.tunery("jobs", "create", str(rows_csv), "--model", "x"), REFUSED, "unknown_base_model")
    assert_fails(stack.tunery("jobs", "create", str(rows_csv), "--task", "x"), REFUSED, "task")
    assert_fails(stack.tunery("jobs", "create", str(rows_csv), "--epochs", "0"), REFUSED, "epochs")
    assert {dataset["id"] for dataset in stack.tunery("datasets", "list", "--json").json["data"]} == kept


def test_cancelled_job_ends_its_follower(stack, long_job):
    follower = subprocess.Popen(
        [*COMMAND, "jobs", "logs", "-f", long_job, "--data-dir", str(stack.data_dir)],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout
    assert "made" in follower.stdout.readline()
    cancelled = stack.tunery("jobs", "cancel", long_job, "--json")
    assert cancelled.json["status"] == "cancelled"
    _, errors = follower.communicate(timeout=30)
    assert follower.returncode == REFUSED
    assert errors == f"tunery: {long_job} cancelled\n"
    assert_fails(stack.tunery("jobs", "cancel", long_job), REFUSED, "job_ended")


def test_interrupted_follower(stack, long_job):
    follower = subprocess.Popen(
        [*COMMAND, "jobs", "logs", "-f", long_job, "--data-dir", str(stack.data_dir)],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout
    follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=30)
    assert follower.returncode == INTERRUPTED
    assert "Traceback" not in errors
    assert stack.tunery("jobs", "show", long_job, "--json").json["job"]["status"] in ("queued", "running")
    assert stack.tunery("jobs", "cancel", long_job).code == 0


def test_follower_survives_restarts_without_gap_or_double(stack, long_job):
    follower = subprocess.Popen(
        [*COMMAND, "jobs", "logs", "-f", long_job, "--json", "--data-dir", str(stack.data_dir)],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    for name in ("gateway", "job_svc"):
        said = len(stack.output)
        stack.child(name).kill()
        wait_for(lambda name=name, said=said: f"{name} is well again" in stack.output[said:], name)
    assert stack.tunery("jobs", "cancel", long_job).code == 0
    out, _ = follower.communicate(timeout=60)
    assert follower.returncode == REFUSED
    records = json.loads(out)["data"]
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    assert records[-1]["kind"] == "end"


def test_models(stack, trained):
    model_id = trained["job"]["fine_tuned_model"]
    listed = stack.tunery("models", "list", "--json").json
    assert model_id in [model["id"] for model in listed["fine_tuned"]]
    assert "tunery-tiny" in [model["id"] for model in listed["base"]]
    table = stack.tunery("models", "list").out
    assert model_id in table
    assert "tunery-tiny" in table
    for model in (model_id, "tunery-tiny"):
        answer = stack.tunery(
            "models", "ask", model, "Who?", "--system", "Be short.", "--max-tokens", "5", "--json"
        )
        assert answer.code == 0, answer
        assert answer.json["model"] == model
        assert answer.json["choices"][0]["message"]["role"] == "assistant"
    assert stack.tunery("models", "ask", model_id, "Who?", "--max-tokens", "5").code == 0
    assert_fails(stack.tunery("models", "ask", "none", "Who?"), NOT_FOUND, "none")
    assert_fails(stack.tunery("models", "ask", model_id, "Who?", "--max-tokens", "0"), REFUSED, "max_tokens")
    assert stack.tunery("models", "delete", model_id).code == 0
    assert_fails(stack.tunery("models", "delete", model_id), NOT_FOUND)
    assert_fails(stack.tunery("models", "ask", model_id, "Who?"), NOT_FOUND)


def test_pull(tmp_path):
    pulled = run_tunery("models", "pull", "tunery-tiny", "--json", TUNERY_MODELS_DIR=str(tmp_path))
    assert pulled.code == 0, pulled
    assert pulled.json == {"id": "tunery-tiny", "path": str(tmp_path / "tunery-tiny")}
    assert (tmp_path / "tunery-tiny" / "config.json").exists()
    again = run_tunery("models", "pull", "tunery-tiny", TUNERY_MODELS_DIR=str(tmp_path))
    assert again.out == f"{tmp_path / 'tunery-tiny'}\n"
    assert_fails(run_tunery("models", "pull", "none"), NOT_FOUND, "none")


def test_pull_in_a_terminal_shows_spinners_and_no_torn_bars(tmp_path):
    code, lines = run_in_terminal(100, "models", "pull", "tunery-tiny", TUNERY_MODELS_DIR=str(tmp_path))
    assert code == 0
    spinner = "[⠀-⣿] (pulling tunery-tiny|measuring a few steps of tunery-tiny, for jobs' estimates)"
    assert re.sub(spinner, "", "".join(lines)) == str(tmp_path / "tunery-tiny")


def test_reader_that_goes_away(stack):
    piped = subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} models list --data-dir {stack.data_dir} | head -n 1"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert piped.stdout.startswith("Fine-tuned models")
    assert piped.stderr == ""
