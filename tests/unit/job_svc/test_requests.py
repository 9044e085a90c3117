"""What requests for jobs come to: overrides, estimates, and the union of methods."""

from __future__ import annotations

from typing import Any

import pytest

from job_svc.config_request import LONGEST_METADATA_BYTES, ConfigBody
from job_svc.credits import Price, estimate_tokens
from job_svc.csv_job_request import CsvJobBody
from job_svc.job_state import ENDED, LIVE, SUCCESSORS, JobStatus
from job_svc.jobs import check_fit, planned_tokens
from job_svc.torchrun_overrides import parse_overrides
from svc_kit.catalog import load_catalog
from svc_kit.errors import InvalidRequest
from svc_kit.strict_json import validate
from trainer_svc.engine.run_spec import RunSpec


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", []),
        ("--nproc_per_node 2", ["--nproc_per_node=2"]),
        ("--nproc-per-node=2 --max-restarts 0", ["--nproc_per_node=2", "--max_restarts=0"]),
        ("  --nnodes  '1'  ", ["--nnodes=1"]),
        ("--rdzv-endpoint=localhost:65535", ["--rdzv_endpoint=localhost:65535"]),
        ("--rdzv_conf timeout=1,join_timeout=300", ["--rdzv_conf=timeout=1,join_timeout=300"]),
    ],
)
def test_allowed_overrides_are_read(text: str, options: list[str]) -> None:
    assert parse_overrides(text) == options


@pytest.mark.parametrize(
    "text",
    [
        "--nproc_per_node",
        "--nproc_per_node 0",
        "--nproc_per_node 65",
        "--nproc_per_node -1",
        "--nproc_per_node ٣",
        "--nproc_per_node two",
        f"--nproc_per_node {'9' * 5000}",
        "--nproc_per_node 2 --nproc_per_node 2",
        "--nproc_per_node 2 extra",
        "--nnodes 2",
        "--nnodes 1:2",
        "--rdzv_endpoint evil:1",
        "--log-dir /etc",
        "--no-python",
        "-m os",
        "script.py",
        "; rm -rf /",
        "'--nproc_per_node 2",
        "--nproc_per_node $(id)",
        "__nproc_per_node=2",
        "_-nproc_per_node=2",
        "-nproc_per_node=2",
        "---nproc_per_node=2",
        "--rdzv_endpoint=localhost",
        "--rdzv_endpoint=localhost:",
        "--rdzv_endpoint=localhost:0",
        "--rdzv_endpoint=localhost:65536",
        "--rdzv_endpoint=localhost:٣٤",
        "--rdzv_conf=timeout=٣",
        "--rdzv_conf=timeout=3,join_timeout=0",
        "--nnodes=1" + " " * 5000,
    ],
)
def test_other_overrides_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_overrides(text)
    assert caught.value.details["field"] == "overrides"


def test_a_mistyped_override_is_met_with_the_one_that_was_meant() -> None:
    with pytest.raises(InvalidRequest, match=r"did you mean `--nproc_per_node`\?"):
        parse_overrides("--nproc_per_nod 2")


@pytest.mark.parametrize("kind", ["lora", "LoraFineTuneOptions", "full", "FullFineTuneOptions"])
def test_every_request_is_a_run_that_the_engine_takes(kind: str) -> None:
    sent = {
        "model": "m",
        "data": "dataset://x",
        "fine_tuning_options": {
            "custom_training_options": {"finetuning_type": kind},
            "extras": {"warmup_steps": 3.0, "lr_scheduler": "cosine"},
        },
    }
    for plan in (
        validate(ConfigBody, sent).plan(sent),
        validate(CsvJobBody, {"base_model": "m", "dataset_id": "ds-x", "task_type": "qa"}).plan(),
    ):
        run = {**plan.run, "base_model_id": "m", "base_model_dir": "/m"}
        for service_only in ("base_model", "torchrun_arguments"):
            del run[service_only]
        RunSpec.model_validate({**run, "training_file": "/t", "output_dir": "/o"})


def config(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "data": "dataset://x", **changes}


def test_null_extras_are_the_defaults() -> None:
    sent = config(fine_tuning_options={"extras": {"eval_every_steps": None, "dtype": "float32"}})
    assert validate(ConfigBody, sent).plan(sent).run["extras"] == {"dtype": "float32"}
    wrong = config(fine_tuning_options={"extras": {"dtype": None}})
    with pytest.raises(InvalidRequest, match=r"fine_tuning_options\.extras\.dtype"):
        validate(ConfigBody, wrong).plan(wrong)


def test_rows_longer_than_the_context_are_refused() -> None:
    for length in (2048, 2049):
        sent = config(fine_tuning_options={"extras": {"max_sequence_length": length}})
        plan = validate(ConfigBody, sent).plan(sent)
        tiny = load_catalog().get("tunery-tiny")
        if length == 2048:
            check_fit(plan, tiny)
        else:
            with pytest.raises(InvalidRequest, match=r"`max_sequence_length` is 2,049, .* at most 2,048"):
                check_fit(plan, tiny)


def test_long_texts_are_refused_with_the_limit() -> None:
    validate(ConfigBody, config(metadata={"a": "é" * (LONGEST_METADATA_BYTES // 2 - 5)}))
    with pytest.raises(InvalidRequest, match=r"`metadata`: its JSON has 16,\d+ bytes, and 16,384 is"):
        validate(ConfigBody, config(metadata={"a": "é" * (LONGEST_METADATA_BYTES // 2)}))
    with pytest.raises(InvalidRequest, match=r"`overrides` has 1,000,000 characters, and 4,096 is"):
        parse_overrides("a " * 500_000)


def test_max_steps_lowers_the_estimate() -> None:
    run = {"batch_size": 8, "gradient_accumulation_steps": 1, "epochs": 4}
    whole = planned_tokens(run, size_bytes=8000, num_rows=80)
    assert whole == 4 * estimate_tokens(8000, 80)
    assert planned_tokens({**run, "max_steps": 10}, 8000, 80) == pytest.approx(whole / 4, abs=1)
    assert planned_tokens({**run, "max_steps": 1000}, 8000, 80) == whole


def test_a_price_is_exact_in_millionths() -> None:
    assert Price(1000).of(1) == 1000
    assert Price(0.5).of(3) == 2
    assert Price(0).of(10**9) == 0


def test_every_state_leads_to_an_end() -> None:
    assert {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED} == ENDED
    for status in LIVE:
        assert JobStatus.CANCELLED in SUCCESSORS[status]
