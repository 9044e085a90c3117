"""Reports on datasets through the gateway: what they tell by both paths, what is refused, and what stays."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import yaml
from google.protobuf import json_format
from openapi_schema_validator import OAS30Validator, OAS31Validator

from tests.conftest import RunningStack
from tests.contract.account import BASE_MODEL, DATASETS, DIALOGS, Account, ok, refused
from tests.contract.contracts import closed
from tests.contract.processes import eventually, service_process
from tunery.dataset.v1 import dataset_service_pb2, dataset_service_pb2_grpc

PAGES = Path(__file__).parents[2] / "docs" / "openapi"
PATHS = pytest.mark.parametrize("path", [DATASETS, DIALOGS])

CSV = (
    "id,Question,answer\n"
    "1,hi,yo\n"
    '2,"two\nlines",\n'
    "3,hi,yo\n"
    "4, ,x\n"
    f"5,{'why? ' * 40},so\n"
)  # fmt: skip
HEAD = "<|im_start|>system\nYou are Tunery.<|im_end|>\n<|im_start|>user\n"
JSONL = (
    '{"dialog": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}\n'
    "\n"
    '{"dialog": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"},'
    ' {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "4"}],'
    ' "keep_loss": [false, false, false, true]}\n'
)


def report(account: Account, path: str, dataset_id: str, **query: Any) -> Any:
    return account.http.get(f"{path}/{dataset_id}/report", params={"base_model": BASE_MODEL, **query})


def check_shape(told: dict[str, Any]) -> None:
    """Holds a report against the documents of both contracts, which know every field of it."""
    for page, validator in (
        ("fine-tuning-api.yaml", OAS31Validator),
        ("config-api.yaml", OAS30Validator),
    ):
        document = closed(yaml.safe_load((PAGES / page).read_text()))
        schema = {"$ref": "#/components/schemas/DatasetReport", "components": document["components"]}
        validator(schema).validate(told)


def marked(example: dict[str, Any]) -> str:
    """An example's text with [brackets] around each run of target tokens."""
    text = ""
    for token in example["tokens"]:
        if token["is_target"] != (text.count("[") > text.count("]")):
            text += "[" if token["is_target"] else "]"
        text += token["text"]
    return text


@pytest.fixture
def report_keys(stored_keys: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """Lists the stored reports of a dataset."""
    return lambda dataset_id: [key for key in stored_keys("accounts/") if f"{dataset_id}.reports/" in key]


def test_csv(account: Account, report_keys: Callable[[str], list[str]], stack: RunningStack) -> None:
    dataset_id = account.dataset(CSV)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(report, account, path, dataset_id, max_sequence_length=100)
            for path in (DATASETS, DIALOGS)
        ]
    told = ok(asked[0].result())
    assert ok(asked[1].result()) == told
    check_shape(told)

    lengths = told.pop("token_lengths")
    example = told.pop("example")
    assert told == {
        "dataset_id": dataset_id,
        "format": "csv",
        "base_model": BASE_MODEL,
        "task_type": "qa",
        "num_rows": 5,
        "num_bad_rows": 2,
        "bad_rows": [
            {"line": 3, "column": "answer", "problem": "the value is empty", "cure": "write some text"},
            {"line": 6, "column": "Question", "problem": "the value is empty", "cure": "write some text"},
        ],
        "num_rows_measured": 3,
        "max_sequence_length": 100,
        "num_long_rows": 1,
        "long_row_lines": [7],
        "num_duplicate_rows": 1,
        "duplicate_rows": [{"line": 5, "first_line": 2}],
        "num_rows_without_target": 1,
        "without_target_lines": [7],
    }
    assert example["text"] == HEAD + "hi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert marked(example) == HEAD + "hi<|im_end|>\n<|im_start|>assistant\n[yo<|im_end|>]\n"
    assert (example["line"], example["num_tokens"]) == (2, len(example["tokens"]))
    assert lengths["min"] == lengths["p50"] == example["num_tokens"]
    assert lengths["max"] == lengths["p95"] == lengths["p99"] > 100
    assert lengths["mean"] == pytest.approx((2 * lengths["min"] + lengths["max"]) / 3)
    assert [each["num_rows"] for each in lengths["histogram"] if each["num_rows"]] == [2, 1]

    # Made once, whoever asks and however.
    [key] = report_keys(dataset_id)
    with grpc.insecure_channel(stack.address) as channel:
        native = dataset_service_pb2_grpc.DatasetServiceStub(channel).GetDatasetReport(
            dataset_service_pb2.GetDatasetReportRequest(
                dataset_id=dataset_id, base_model=BASE_MODEL, task_type="qa", max_sequence_length=100
            ),
            metadata=[("authorization", f"Bearer {account.api_key}")],
            timeout=60,
        )
    assert json_format.MessageToDict(native, preserving_proto_field_name=True)["example"]["text"]
    assert report_keys(dataset_id) == [key]

    assert account.http.delete(f"{DATASETS}/{dataset_id}").status_code == 204
    assert report_keys(dataset_id) == []
    refused(report(account, DATASETS, dataset_id, max_sequence_length=100), 404, "not_found", dataset_id)


def test_dialogs(account: Account) -> None:
    told = ok(report(account, DIALOGS, account.dialogs(JSONL)))
    check_shape(told)

    assert "task_type" not in told
    assert (told["format"], told["num_rows"], told["num_bad_rows"]) == ("jsonl", 2, 1)
    assert told["bad_rows"] == [
        {
            "line": 1,
            "column": "dialog[1].role",
            "problem": 'found "bot"',
            "cure": "write one of system, user, assistant, tool",
        }
    ]
    assert told["max_sequence_length"] == 2048, "the model's context length"
    assert (told["num_long_rows"], told["num_duplicate_rows"], told["without_target_lines"]) == (0, 0, [])
    assert marked(told["example"]) == (
        HEAD + "2+2?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[4<|im_end|>]\n"
    )


def test_nothing_to_measure(account: Account) -> None:
    told = ok(report(account, DATASETS, account.dataset("text\n"), task_type="not_qa"))
    check_shape(told)

    assert (told["task_type"], told["num_rows"], told["num_rows_measured"]) == ("not_qa", 0, 0)
    assert not {"token_lengths", "example"} & set(told)


@PATHS
def test_wrong_questions_are_refused(account: Account, path: str) -> None:
    qa, dialogs = account.dataset(), account.dialogs()
    refused(report(account, path, qa, base_model="gpt-9"), 400, "unknown_base_model", "gpt-9", BASE_MODEL)
    refused(report(account, path, qa, base_model=""), 400, "unknown_base_model")
    refused(report(account, path, qa, task_type="chat"), 400, "invalid_request", "task_type", "not_qa")
    refused(report(account, path, qa, task_type="not_qa"), 400, "unsupported_columns", "question", "text")
    refused(report(account, path, dialogs, task_type="qa"), 400, "invalid_request", "task_type", "JSONL")
    for length in (1, 0, -1, 2049):
        told = report(account, path, qa, max_sequence_length=length)
        refused(told, 400, "invalid_request", "max_sequence_length", "from 2 to 2048")
    refused(report(account, path, qa, max_sequence_length="many"), 400, "invalid_request")
    refused(report(account, path, qa, max_sequence_length=2**31), 400, "invalid_request")
    columns = account.dataset("colour,size\nred,3\n")
    told = report(account, path, columns)
    refused(told, 400, "unsupported_columns", '"qa" needs', '"not_qa" needs', '"colour", "size"')


@PATHS
def test_only_an_accounts_own_datasets(account: Account, other_account: Account, path: str) -> None:
    dataset_id = account.dataset()
    refused(report(other_account, path, dataset_id), 404, "not_found", dataset_id)
    # Whatever is wrong with the question besides.
    refused(report(other_account, path, dataset_id, base_model="gpt-9"), 404, "not_found", dataset_id)
    refused(report(account, path, "ds-" + "a" * 20), 404, "not_found")
    refused(report(account, path, "nonsense"), 404, "not_found", "nonsense")
    refused(account.http.post(f"{path}/{dataset_id}/report"), 405, "method_not_allowed")


def measuring_processes(stack: RunningStack) -> list[psutil.Process]:
    found = []
    for process in service_process(stack, "dataset_svc").children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "trainer_svc.engine.dataset_report" in process.cmdline():
                found.append(process)
    return found


def test_a_report_that_nobody_waits_for_is_given_up(
    account: Account, stack: RunningStack, report_keys: Callable[[str], list[str]]
) -> None:
    dataset_id = account.dataset()
    host, _, port = stack.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"GET {DATASETS}/{dataset_id}/report?base_model={BASE_MODEL} HTTP/1.1"
        connection.sendall(
            f"{head}\r\nHost: {host}\r\nAuthorization: Bearer {account.api_key}\r\n\r\n".encode()
        )
        [process] = eventually(lambda: measuring_processes(stack), 30, "the report's process")
        assert not [name for name in process.environ() if name.startswith("TUNERY_")]
    eventually(lambda: not measuring_processes(stack), 5, "the process to be killed")
    assert report_keys(dataset_id) == []
    assert json.loads(account.http.get(f"{DATASETS}/{dataset_id}").text)["id"] == dataset_id
