"""Section 4, submit: the whole Config, what of it is taken, what is refused, and how it comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svc_kit.object_store import ObjectStore
from tests.contract.account import (
    BASE_MODEL,
    DATASETS,
    SUBMIT,
    Account,
    dialogs_jsonl,
    ok,
    refused,
)
from tests.contract.samples import METADATA

FIELDS = {"job_id", "created", "status", "checkpoints", "logs", "input_config"}


@pytest.fixture(scope="module")
def data(account: Account) -> str:
    return f"dataset://{account.dialogs()}"


@pytest.fixture
def submit(account: Account, data: str, queued: Callable[[str], str]) -> Callable[..., dict[str, Any]]:
    """Submits a job that stays queued for the test's time, and returns it as the answer shows it."""

    def submit(**config: Any) -> dict[str, Any]:
        sent = {"model": BASE_MODEL, "data": data, **config}
        job: dict[str, Any] = ok(account.http.post(SUBMIT, json=sent))
        queued(job["job_id"])
        assert exactly(job["input_config"]) == exactly(sent)
        assert exactly(account.status(job["job_id"])["input_config"]) == exactly(sent)
        return job

    return submit


def exactly(value: Any) -> str:
    """JSON with types told apart (true is not 1), and 1.0 the same as 1, as in JSON."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(each) for key, each in item.items()}
        if isinstance(item, list):
            return [plain(each) for each in item]
        return int(item) if isinstance(item, float) and item.is_integer() else item

    return json.dumps(plain(value), sort_keys=True)


def test_submitted_job_has_exactly_the_contracts_fields(submit: Callable[..., dict[str, Any]]) -> None:
    job = submit()

    assert set(job) == FIELDS
    assert job["status"] == "validation"
    assert job["checkpoints"] == []


@pytest.mark.parametrize(
    "config",
    [
        {"fine_tuning_options": {}},
        {"fine_tuning_options": {"n_epochs": 1, "shuffle": False, "seed": 0, "lr": 1}},
        {"fine_tuning_options": {"n_epochs": 3.0, "batch_size": 1024, "lr": 5e-324}},
        {"fine_tuning_options": {"extras": {}}},
        {
            "fine_tuning_options": {
                "extras": {
                    **{"weight_decay": 0, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8},
                    **{"lr_scheduler": "linear", "warmup_steps": 3.0, "max_grad_norm": 1, "dtype": "float32"},
                    **{"max_sequence_length": 128, "long_rows": "truncate"},
                }
            }
        },
        *(
            {"fine_tuning_options": {"custom_training_options": {"finetuning_type": kind}}}
            for kind in ("lora", "full", "LoraFineTuneOptions", "FullFineTuneOptions")
        ),
        {
            "fine_tuning_options": {
                "custom_training_options": {
                    "finetuning_type": "lora",
                    "lora_attn_modules": [],
                    "apply_lora_to_mlp": True,
                }
            }
        },
        *(
            {"logger": logger}
            for logger in (
                {"log_type": "disk", "filename": "a.log"},
                {"log_type": "DiskLogger", "filename": "A" * 100},
                {"log_type": "wandb", "project": "my-project"},
                {"log_type": "WandBLogger", "project": "p"},
            )
        ),
        *(
            {"overrides": text}
            for text in (
                *("", "   ", "--nproc_per_node 4", "--nproc-per-node=4", "--nnodes=1"),
                "'--max_restarts' \"3\" --nnodes 1",
            )
        ),
        {"metadata": {}},
        {"metadata": METADATA},
        {"metadata": {"a": {"b": {"c": {"d": [[[["deep"]]]]}}}}},
    ],
    ids=lambda config: json.dumps(config)[:60],
)
def test_config_comes_back_as_it_was_sent(
    submit: Callable[..., dict[str, Any]], config: dict[str, Any]
) -> None:
    job = submit(**config)

    assert ("metadata" in job) == ("metadata" in config)
    assert exactly(job.get("metadata")) == exactly(config.get("metadata"))


def test_disk_loggers_file_name_is_the_logs(submit: Callable[..., dict[str, Any]], account: Account) -> None:
    job = submit(logger={"log_type": "disk", "filename": "Some_run-1.log"})

    assert job["logs"] == f"{account.url}/fine_tuning/jobs/{job['job_id']}/files/Some_run-1.log"
    assert account.http.get(job["logs"]).status_code == 200
    refused(account.http.get(job["logs"].replace("Some_run-1.log", "log.txt")), 404, "not_found")


OPTIONS = "fine_tuning_options"
CUSTOM = f"{OPTIONS}.custom_training_options"


def custom(**options: Any) -> dict[str, Any]:
    return {OPTIONS: {"custom_training_options": options}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model": None}, ("model",)),
        ({"model": 1}, ("model",)),
        ({"data": 1}, ("data",)),
        ({"data": None}, ("data",)),
        ({"modle": "x"}, ("modle",)),
        ({"suffix": "x"}, ("suffix",)),
        ({"validation_data": 1}, ("validation_data",)),
        ({"metadata": []}, ("metadata",)),
        ({"metadata": "x"}, ("metadata",)),
        ({"metadata": {"a": 2**53 + 1}}, ("metadata.a", "string")),
        ({"metadata": {"a": [{"b": -(2**60)}]}}, ("metadata.a[0].b",)),
        ({"metadata": {"a": "\ud800"}}, ("metadata.a", "surrogate")),
        ({"overrides": 1}, ("overrides",)),
        ({"overrides": ["--nnodes=1"]}, ("overrides",)),
        ({"overrides": "--nnodes 2"}, ("--nnodes", "1")),
        ({"overrides": "--nproc_per_node"}, ("--nproc_per_node", "1 to 64")),
        ({"overrides": "--nproc_per_node gpu"}, ("--nproc_per_node", "gpu")),
        ({"overrides": "--nproc_per_node=٤"}, ("--nproc_per_node",)),
        ({"overrides": "--nproc_per_node 0"}, ("--nproc_per_node",)),
        ({"overrides": "--nproc_per_node 2 --nproc-per-node 2"}, ("twice",)),
        ({"overrides": "--nproc_per_nodes 2"}, ("--nproc_per_nodes", "did you mean", "--nproc_per_node")),
        ({"overrides": "-m os"}, ("-m",)),
        ({"overrides": "--rdzv_endpoint=evil:1"}, ("--rdzv_endpoint",)),
        ({"overrides": "--no-python /bin/sh"}, ("--no-python",)),
        ({"overrides": "; rm -rf /"}, (";",)),
        ({"overrides": "'--nnodes"}, ("overrides", "quotation")),
        ({OPTIONS: []}, (OPTIONS,)),
        ({OPTIONS: {"epochs": 1}}, (f"{OPTIONS}.epochs",)),
        ({OPTIONS: {"n_epochs": 0}}, (f"{OPTIONS}.n_epochs",)),
        ({OPTIONS: {"n_epochs": 1.5}}, (f"{OPTIONS}.n_epochs",)),
        ({OPTIONS: {"n_epochs": "1"}}, (f"{OPTIONS}.n_epochs",)),
        ({OPTIONS: {"n_epochs": True}}, (f"{OPTIONS}.n_epochs",)),
        ({OPTIONS: {"n_epochs": None}}, ("n_epochs",)),
        ({OPTIONS: {"batch_size": 0}}, (f"{OPTIONS}.batch_size",)),
        ({OPTIONS: {"batch_size": 1025}}, (f"{OPTIONS}.batch_size",)),
        ({OPTIONS: {"lr": 0}}, (f"{OPTIONS}.lr",)),
        ({OPTIONS: {"lr": True}}, (f"{OPTIONS}.lr",)),
        ({OPTIONS: {"lr": "1e-3"}}, (f"{OPTIONS}.lr",)),
        ({OPTIONS: {"gradient_accumulation_steps": 0}}, (f"{OPTIONS}.gradient_accumulation_steps",)),
        ({OPTIONS: {"seed": -1}}, (f"{OPTIONS}.seed",)),
        ({OPTIONS: {"seed": 2**32}}, (f"{OPTIONS}.seed",)),
        ({OPTIONS: {"shuffle": "yes"}}, (f"{OPTIONS}.shuffle",)),
        ({OPTIONS: {"shuffle": 1}}, (f"{OPTIONS}.shuffle",)),
        (
            {
                "overrides": "--nproc_per_node 2",
                OPTIONS: {
                    "custom_training_options": {"finetuning_type": "full"},
                    "extras": {"optimizer": "adamw_8bit"},
                },
            },
            (f"{OPTIONS}.extras", "adamw_8bit", "sharded"),
        ),
        (custom(), ("finetuning_type", "lora", "full")),
        (custom(lora_rank=8), ("finetuning_type", "lora", "full")),
        (custom(finetuning_type="qlora"), ("finetuning_type", "lora", "full")),
        (custom(finetuning_type=["lora"]), ("finetuning_type",)),
        (custom(finetuning_type="full", lora_rank=8), ("lora_rank",)),
        (custom(finetuning_type="lora", fsdp_cpu_offload=True), ("fsdp_cpu_offload",)),
        (custom(finetuning_type="lora", lora_rank=0), ("lora_rank",)),
        (custom(finetuning_type="lora", lora_rank=1025), ("lora_rank",)),
        (custom(finetuning_type="lora", lora_rank="8"), ("lora_rank",)),
        (custom(finetuning_type="lora", lora_alpha=0), ("lora_alpha",)),
        (custom(finetuning_type="lora", lora_rank=None), ("lora_rank",)),
        (custom(finetuning_type="lora", apply_lora_to_mlp="true"), ("apply_lora_to_mlp",)),
        (custom(finetuning_type="lora", lora_attn_modules="q_proj"), ("lora_attn_modules",)),
        (custom(finetuning_type="lora", lora_attn_modules=["q_porj"]), ("q_porj", "did you mean", "q_proj")),
        (custom(finetuning_type="lora", lora_attn_modules=[1]), ("lora_attn_modules[0]",)),
        (custom(finetuning_type="lora", lora_attn_modules=[]), ("adapts nothing",)),
        (custom(finetuning_type="full", enable_activation_checkpointing=1), ("enable_activation_check",)),
        ({"logger": {}}, ("log_type", "disk", "wandb")),
        ({"logger": {"log_type": "file", "filename": "x"}}, ("log_type", "disk", "wandb")),
        ({"logger": {"log_type": "disk"}}, ("filename",)),
        ({"logger": {"log_type": "disk", "project": "x"}}, ("project",)),
        ({"logger": {"log_type": "wandb"}}, ("project",)),
        ({"logger": {"log_type": "wandb", "project": "a/b"}}, ("project",)),
        *(
            ({"logger": {"log_type": "disk", "filename": name}}, ("filename",))
            for name in ("", "/etc/passwd", "../x", "a/b", ".hidden", "a..b", "a\n", "A" * 101)
        ),
        ({"logger": {"log_type": "disk", "filename": "error_report.json"}}, ("filename", "take another")),
        ({OPTIONS: {"extras": []}}, (f"{OPTIONS}.extras",)),
        ({OPTIONS: {"extras": {"weight_decai": 1}}}, (f"{OPTIONS}.extras.weight_decai", "`weight_decay`")),
        ({OPTIONS: {"extras": {"nothing": 1}}}, (f"{OPTIONS}.extras.nothing", "known are", "dtype")),
        ({OPTIONS: {"extras": {"weight_decay": -1}}}, (f"{OPTIONS}.extras.weight_decay",)),
        ({OPTIONS: {"extras": {"weight_decay": "0.1"}}}, (f"{OPTIONS}.extras.weight_decay",)),
        ({OPTIONS: {"extras": {"weight_decay": True}}}, (f"{OPTIONS}.extras.weight_decay",)),
        ({OPTIONS: {"extras": {"warmup_steps": 1.5}}}, (f"{OPTIONS}.extras.warmup_steps",)),
        ({OPTIONS: {"extras": {"dtype": "float16"}}}, (f"{OPTIONS}.extras.dtype",)),
        ({OPTIONS: {"extras": {"max_sequence_length": 1}}}, (f"{OPTIONS}.extras.max_sequence_length",)),
        ({OPTIONS: {"extras": {"max_sequence_length": 2049}}}, ("max_sequence_length", "at most 2,048")),
        ({OPTIONS: {"extras": {"dtype": None}}}, (f"{OPTIONS}.extras.dtype",)),
        ({"overrides": " " * 4097}, ("overrides", "4,097", "4,096")),
        ({"metadata": {"a": "x" * 16_384}}, ("metadata", "16,384")),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_wrong_config_is_refused_by_name(
    account: Account, data: str, config: dict[str, Any], words: tuple[str, ...]
) -> None:
    sent = {"model": BASE_MODEL, "data": data, **config}
    # Through json, since httpx would refuse to encode half a surrogate pair.
    response = account.http.post(SUBMIT, content=json.dumps(sent))

    refused(response, 400, "invalid_request", *words)


def test_unknown_model_is_refused(account: Account, data: str) -> None:
    response = account.http.post(SUBMIT, json={"model": "llama", "data": data})
    refused(response, 400, "unknown_base_model", "llama", BASE_MODEL)


@pytest.mark.parametrize("missing", ["model", "data"])
def test_missing_field_is_refused(account: Account, data: str, missing: str) -> None:
    sent = {"model": BASE_MODEL, "data": data}
    del sent[missing]
    refused(account.http.post(SUBMIT, json=sent), 400, "invalid_request", missing, "missing")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"null", b'{"model": "a", "model": "b"}', b'{"metadata": {"a": 1, "a": 2}}']
)
def test_malformed_body_is_refused(account: Account, body: bytes) -> None:
    refused(account.http.post(SUBMIT, content=body), 400, "invalid_request")


@pytest.mark.parametrize(
    "uri",
    [
        *("", " ", "rows.jsonl", "/etc/passwd", "ftp://host/rows.jsonl", "http://host/rows.jsonl"),
        *("hf://rows", "gs://bucket/rows", "data:text/plain,x", "javascript:x", "dataset:", "dataset://"),
        *("https://example.org/rows.jsonl", "https://127.0.0.1/rows", "https://[::1", "https://host:99999/x"),
        *("https:///x", "file:///etc/passwd", "file://host/etc/passwd", "file:rows", "file://", "file:///"),
        *("file:///proc/self/environ", "s3://", "s3://other-bucket/rows.jsonl", "s3://tunery/rows.jsonl"),
        *("s3://tunery/accounts/acc-aaaaaaaaaaaaaaaaaaaa/datasets/x", "s3://tunery/shared/../accounts/x"),
        *("s3://tunery/shared//x", "s3://tunery/shared/%2e%2e/accounts/x", "s3:///shared/x", "x" * 5000),
        *("dataset://a/b", "dataset://a?b=c", "dataset://a#b", "file:///tmp/\x00", "file:///tmp/a\nb"),
    ],
)
@pytest.mark.parametrize("field", ["data", "validation_data"])
def test_other_uris_are_refused(account: Account, data: str, field: str, uri: str) -> None:
    refused(account.submit(**{"data": data, field: uri}), 400, "unsupported_data_uri")


@pytest.mark.parametrize("uri", ["dataset://ds-aaaaaaaaaaaaaaaaaaaa", "dataset://x", "dataset://user@x"])
@pytest.mark.parametrize("field", ["data", "validation_data"])
def test_unknown_dataset_is_refused_and_holds_nothing(account: Account, field: str, uri: str) -> None:
    dataset_id = account.dialogs()

    response = account.submit(**{"data": f"dataset://{dataset_id}", field: uri})
    refused(response, 400, "unknown_dataset")
    assert account.http.delete(f"{DATASETS}/{dataset_id}").status_code == 204


def test_csv_dataset_is_the_other_contracts(account: Account, data: str) -> None:
    csv = f"dataset://{account.dataset()}"

    refused(account.submit(csv), 400, "invalid_request", "CSV", "/api/v1/fine-tuning/jobs")
    refused(account.submit(data, validation_data=csv), 400, "invalid_request", "CSV")


@pytest.mark.parametrize("suffix", ["?", "#"])
def test_dataset_uri_with_an_empty_end_names_the_dataset(
    account: Account, submit: Callable[..., dict[str, Any]], data: str, suffix: str
) -> None:
    job = submit(data=data + suffix)

    assert account.job(job["job_id"])["dataset_id"] == data.removeprefix("dataset://")


async def test_objects_under_the_shared_prefix_are_taken(
    submit: Callable[..., dict[str, Any]], object_store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "rows").write_text(dialogs_jsonl())
    await object_store.put_file("shared/rows é.jsonl", tmp_path / "rows")
    try:
        submit(data="s3://tunery/shared/rows%20%C3%A9.jsonl")
    finally:
        await object_store.delete("shared/rows é.jsonl")


def test_missing_object_fails_the_job(account: Account) -> None:
    job_id = account.submit_job("s3://tunery/shared/nothing-here.jsonl")
    job = account.wait_status(job_id, "failed")

    report = ok(account.http.get(job["error_path"]))
    assert "shared/nothing-here.jsonl" in report["error"]


def test_files_under_the_allowed_folder_are_taken(
    submit: Callable[..., dict[str, Any]], import_folder: Path
) -> None:
    (import_folder / "sub").mkdir()
    (import_folder / "sub" / "rows").write_text(dialogs_jsonl())

    submit(data=f"file://{import_folder}/sub/rows")
    submit(data=f"file://localhost{import_folder}/other/../sub/rows")


@pytest.mark.parametrize(
    "path", ["../outside", "sub/../../outside", "%2e%2e/outside", "link", "link-folder/x"]
)
def test_no_path_leads_out_of_the_allowed_folder(account: Account, import_folder: Path, path: str) -> None:
    outside = import_folder.parent / "outside"
    outside.write_text(dialogs_jsonl())
    for link, target in (("link", outside), ("link-folder", outside.parent)):
        (import_folder / link).unlink(missing_ok=True)
        (import_folder / link).symlink_to(target)

    refused(account.submit(f"file://{import_folder}/{path}"), 400, "unsupported_data_uri")


BAD_ROWS = {
    1: "not json",
    3: '{"dialog": "x"}',
    4: '{"dialog": []}',
    5: '{"dialog": [{"role": "bot", "content": "x"}]}',
    6: '{"dialog": [{"role": "user", "content": 7}, {"role": "assistant", "content": "x"}]}',
    7: '{"dialog": [{"role": "user", "content": "x"}], "keep_loss": [true, true]}',
    8: '{"dialog": [{"role": "assistant", "content": "y"}], "keep_loss": [1]}',
    9: '{"dialog": [{"role": "user", "content": "nobody answers"}]}',
    10: '{"messages": []}',
    11: '{"dialog": [{"role": "assistant", "content": "y", "name": "z"}]}',
    12: '{"dialog": [{"role": "assistant", "content": NaN}]}',
    13: "[]",
    14: '{"dialog": [{"role": "assistant", "content": "y"}], "keep_loss": [false]}',
    15: '{"dialog": [{"role": "assistant", "content": "y"}], "dialog": []}',
}


def test_report_names_every_broken_row(account: Account, other_account: Account) -> None:
    good = dialogs_jsonl(1).strip()
    lines = [BAD_ROWS.get(number, good) for number in range(1, 18)]
    data = f"dataset://{account.dialogs(chr(10).join(lines))}"
    job_id = account.submit_job(data, metadata={"kept": True})
    job = account.wait_status(job_id, "failed")

    assert set(job) == FIELDS | {"finished_at", "error_path", "metadata"}
    assert job["metadata"] == {"kept": True}
    response = account.http.get(job["error_path"])
    assert response.headers["content-type"] == "application/json"
    report = response.json()
    assert report["job_id"] == job_id
    assert {row["line"] for row in report["rows"]} == set(BAD_ROWS)
    for row in report["rows"]:
        assert set(row) == {"data", "line", "where", "problem", "expected"}
        assert row["data"] == data
    assert f"{len(BAD_ROWS)} broken rows" in account.log(job_id)[-1]
    refused(other_account.http.get(job["error_path"]), 404, "not_found")
    # As the first contract has it: no model, no metrics, the end's time.
    seen = account.job(job_id)
    assert seen["status"] == "failed"
    assert seen["completed_at"] == job["finished_at"]
    assert not {"training_metrics", "fine_tuned_model", "task_type"} & set(seen)


def test_report_covers_the_validation_data_too(account: Account) -> None:
    broken = f"dataset://{account.dialogs('{}' + chr(10) + dialogs_jsonl(1) + '{}')}"
    job_id = account.submit_job(f"dataset://{account.dialogs()}", validation_data=broken)
    job = account.wait_status(job_id, "failed")

    rows = ok(account.http.get(job["error_path"]))["rows"]
    assert [(row["data"], row["line"]) for row in rows] == [(broken, 1), (broken, 3)]


def test_blank_values_of_a_csv_are_reported_by_line_and_column(account: Account) -> None:
    dataset_id = account.dataset('question,answer\n"a\nb",c\nd,\n ,e\nf,g\n')
    job_id = account.create_job(dataset_id)
    account.wait(job_id, "failed")

    rows = ok(account.http.get(account.status(job_id)["error_path"]))["rows"]
    assert [(row["line"], row["where"]) for row in rows] == [(4, 'column "answer"'), (5, 'column "question"')]


def test_report_of_thousands_of_rows_is_whole(account: Account) -> None:
    job_id = account.submit_job(f"dataset://{account.dialogs('{}' + chr(10) + ('{' + chr(10)) * 5000)}")
    job = account.wait_status(job_id, "failed")

    rows = ok(account.http.get(job["error_path"]))["rows"]
    assert [row["line"] for row in rows] == list(range(1, 5002))


def test_jobs_of_all_kinds_of_rows_pass_validation(
    submit: Callable[..., dict[str, Any]], account: Account
) -> None:
    rows = [
        {"dialog": [{"role": role, "content": role} for role in ("system", "user", "tool", "assistant")]},
        {"dialog": [{"role": "user", "content": "a"}], "keep_loss": [True]},
        {"dialog": [{"role": "user", "content": ""}, {"role": "assistant", "content": "\U0001f600"}]},
    ]
    content = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows)
    submit(data=f"dataset://{account.dialogs(content.encode())}")
