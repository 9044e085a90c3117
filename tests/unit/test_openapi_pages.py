"""docs/openapi/: valid documents of what is served, true to the given contracts and to the services."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openapi_spec_validator
import pytest
import yaml
from google.protobuf import descriptor_pb2
from openapi_schema_validator import OAS30Validator, OAS31Validator

from gateway.authz.servicer import CreateApiKeyBody
from gateway.routes import rest_bindings
from inference_svc import chat_request
from inference_svc.chat_request import ChatRequest, RequestMessage
from job_svc.config_request import (
    CancelBody,
    ConfigBody,
    DiskLoggerBody,
    FineTuningOptionsBody,
    FullBody,
    LoraBody,
    WandbLoggerBody,
)
from job_svc.csv_job_request import CsvJobBody, HyperparametersBody
from svc_kit.errors import InvalidRequest, table
from svc_kit.strict_json import StrictBody, validate
from trainer_svc.engine.run_spec import Extras
from tunery.account.v1 import account_service_pb2
from tunery.dataset.v1 import dataset_pb2, dataset_report_pb2
from tunery.inference.v1 import chat_service_pb2
from tunery.job.v1 import credit_service_pb2, fine_tuning_service_pb2, job_pb2, model_pb2

ROOT = Path(__file__).parents[2]
FIRST: dict[str, Any] = yaml.safe_load((ROOT / "docs/openapi/fine-tuning-api.yaml").read_text())
SECOND: dict[str, Any] = yaml.safe_load((ROOT / "docs/openapi/config-api.yaml").read_text())
PAGES = {"first": FIRST, "second": SECOND}
METHODS = ("get", "post", "delete")

# The given contracts: method, path, operationId, documented statuses.
GIVEN_FIRST = {
    ("get", "/fine-tuning/jobs", "listFineTuningJobs", "200 401"),
    ("post", "/fine-tuning/jobs", "createFineTuningJob", "201 400 401 402"),
    ("get", "/fine-tuning/jobs/{job_id}", "getFineTuningJob", "200 401 404"),
    ("post", "/fine-tuning/jobs/{job_id}/cancel", "cancelFineTuningJob", "200 401 404"),
    ("get", "/fine-tuning/datasets", "listDatasets", "200 401"),
    ("post", "/fine-tuning/datasets", "uploadDataset", "201 400 401"),
    ("get", "/fine-tuning/datasets/{dataset_id}", "getDataset", "200 401 404"),
    ("delete", "/fine-tuning/datasets/{dataset_id}", "deleteDataset", "204 401 404 409"),
    ("get", "/fine-tuning/models", "listFineTunedModels", "200 401"),
    ("delete", "/fine-tuning/models/{model_id}", "deleteFineTunedModel", "204 401 404"),
}
GIVEN_SECOND = {
    ("post", "/fine_tuning/jobs/submit", None, "200"),
    ("get", "/fine_tuning/jobs/status", None, "200"),
    ("post", "/fine_tuning/jobs/cancel", None, "200"),
    ("get", "/fine_tuning/jobs/tail", None, "200"),
}
REPORT_MESSAGES: list[Any] = [
    dataset_report_pb2.DatasetReport,
    dataset_report_pb2.BadRow,
    dataset_report_pb2.TokenLengths,
    dataset_report_pb2.TokenLengthBin,
    dataset_report_pb2.DuplicateRow,
    dataset_report_pb2.ExampleRow,
    dataset_report_pb2.ExampleToken,
]
# Schemas of responses, and the messages that they are made from.
RESPONSES = [
    (FIRST, "FineTuningJob", job_pb2.Job),
    (FIRST, "FineTuningJobList", job_pb2.JobList),
    (FIRST, "FineTuningJobDetails", job_pb2.JobDetails),
    (FIRST, "JobCost", job_pb2.JobCost),
    (FIRST, "Metric", job_pb2.Metric),
    (FIRST, "Hyperparameters", job_pb2.Hyperparameters),
    (FIRST, "TrainingMetrics", job_pb2.TrainingMetrics),
    (FIRST, "Dataset", dataset_pb2.Dataset),
    (FIRST, "DatasetList", dataset_pb2.DatasetList),
    (FIRST, "FineTunedModel", model_pb2.FineTunedModel),
    (FIRST, "FineTunedModelList", model_pb2.FineTunedModelList),
    (FIRST, "BaseModel", model_pb2.BaseModel),
    (FIRST, "BaseModelList", model_pb2.BaseModelList),
    (FIRST, "Credits", credit_service_pb2.Credits),
    (FIRST, "CreditEntry", credit_service_pb2.CreditEntry),
    (FIRST, "CreditEntryList", credit_service_pb2.CreditEntryList),
    (FIRST, "ApiKey", account_service_pb2.ApiKey),
    (FIRST, "ApiKeyList", account_service_pb2.ApiKeyList),
    (FIRST, "CreateApiKeyResponse", account_service_pb2.CreateApiKeyResponse),
    (FIRST, "ChatCompletion", chat_service_pb2.ChatCompletion),
    (FIRST, "TokenLogprob", chat_service_pb2.TokenLogprob),
    (SECOND, "FineTuningJob", fine_tuning_service_pb2.FineTuningJob),
    (SECOND, "Config", fine_tuning_service_pb2.Config),
    (SECOND, "FineTuningOptions", fine_tuning_service_pb2.FineTuningOptions),
    (SECOND, "Log", fine_tuning_service_pb2.Log),
    (SECOND, "Dataset", dataset_pb2.Dataset),
    *((page, message.DESCRIPTOR.name, message) for page in PAGES.values() for message in REPORT_MESSAGES),
]
# Schemas of requests, and the classes that read them.
REQUESTS = [
    (FIRST, "CreateFineTuningJobRequest", CsvJobBody),
    (FIRST, "Hyperparameters", HyperparametersBody),
    (FIRST, "ChatRequestMessage", RequestMessage),
    (FIRST, "CreateApiKeyRequest", CreateApiKeyBody),
    (SECOND, "Config", ConfigBody),
    (SECOND, "FineTuningOptions", FineTuningOptionsBody),
    (SECOND, "LoraFineTuneOptions", LoraBody),
    (SECOND, "FullFineTuneOptions", FullBody),
    (SECOND, "DiskLogger", DiskLoggerBody),
    (SECOND, "WandBLogger", WandbLoggerBody),
    (SECOND, "Extras", Extras),
]
CSV_JOB = {"base_model": "m", "dataset_id": "ds-1", "task_type": "qa"}
CONFIG = {"model": "m", "data": "dataset://ds-1"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def operations(page: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in page["paths"].items():
        yield from ((method, path, item[method]) for method in METHODS if method in item)


def schema(page: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = page["components"]["schemas"][name]
    return found


def accepts(page: dict[str, Any], name: str, value: Any) -> bool:
    validator = OAS31Validator if page is FIRST else OAS30Validator
    whole = {"$ref": f"#/components/schemas/{name}", "components": page["components"]}
    return bool(validator(whole).is_valid(value))


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_documents_are_valid(page: dict[str, Any]) -> None:
    openapi_spec_validator.validate(page)


@pytest.mark.parametrize(("page", "given"), [(FIRST, GIVEN_FIRST), (SECOND, GIVEN_SECOND)], ids=PAGES)
def test_every_given_operation_is_there_and_the_others_are_marked(
    page: dict[str, Any], given: set[tuple[str, str, str | None, str]]
) -> None:
    served = {(method, path): operation for method, path, operation in operations(page)}
    for method, path, operation_id, statuses in given:
        operation = served.pop((method, path))
        assert operation_id in (None, operation["operationId"])
        assert set(statuses.split()) <= set(operation["responses"])
        assert "x-extension" not in operation
    assert served
    assert all(operation["x-extension"] is True for operation in served.values())


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for page in PAGES.values() for *_, operation in operations(page)]
    assert len(set(ids)) == len(ids)


def bindings() -> set[tuple[str, str]]:
    """Method and path of every REST binding of the protos."""
    files = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "tunery" / "descriptors.pb").read_bytes())
    found = set()
    for file in files.file:
        for service in file.service:
            for method in service.method:
                for kind, template in rest_bindings(method):
                    found.add((kind.lower(), template.replace("=**}", "}")))
    return found


def test_the_pages_document_every_binding_and_nothing_else() -> None:
    documented = set()
    for page in PAGES.values():
        for method, path, _ in operations(page):
            [server] = page["paths"][path].get("servers", page["servers"])
            url = urlsplit(server["url"])
            assert (url.scheme, url.netloc) == ("http", "127.0.0.1:8080")
            documented.add((method, url.path + path))
    assert documented == bindings()


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_errors_of_every_operation_have_the_one_form(page: dict[str, Any]) -> None:
    assert page["security"] == [{"bearerAuth": []}]
    for _, path, operation in operations(page):
        assert {"401", "503", "default"} <= set(operation["responses"])
        if "{" in path or any(each.get("name") == "job_id" for each in operation.get("parameters", ())):
            assert "404" in operation["responses"]
        if "requestBody" in operation:
            assert {"400", "413"} <= set(operation["responses"])
        for status, response in operation["responses"].items():
            if not status.startswith("2"):
                if "$ref" in response:
                    response = page["components"]["responses"][response["$ref"].rpartition("/")[2]]
                assert response["content"]["application/json"]["schema"] == {
                    "$ref": "#/components/schemas/ErrorResponse"
                }
    kinds = schema(page, "ErrorResponse")["properties"]["error"]["properties"]["type"]["enum"]
    assert set(kinds) == {row.type for row in table()}


@pytest.mark.parametrize(
    ("page", "name", "message"), RESPONSES, ids=lambda item: getattr(item, "__name__", "")
)
def test_responses_have_the_fields_of_their_messages(page: dict[str, Any], name: str, message: Any) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    assert set(schema(page, name)["properties"]) == set(fields)
    # A field without presence is always printed.
    required = set(schema(page, name).get("required", ()))
    always = {field for field in fields if not fields[field].has_presence}
    assert always <= required


@pytest.mark.parametrize(("page", "name", "body"), REQUESTS, ids=lambda item: getattr(item, "__name__", ""))
def test_requests_have_the_fields_that_are_read(page: dict[str, Any], name: str, body: Any) -> None:
    described = schema(page, name)
    assert set(described["properties"]) == set(body.model_fields)
    assert described["additionalProperties"] is False
    required = {field for field, info in body.model_fields.items() if info.is_required()}
    assert set(described.get("required", ())) == required
    for field, info in body.model_fields.items():
        default = described["properties"][field].get("default")
        if default is not None:
            assert default == info.default, field


def test_a_chat_has_the_fields_that_are_read_and_those_that_may_be_null() -> None:
    described = schema(FIRST, "ChatRequest")
    refused = {field for field, each in described["properties"].items() if each == {"type": "null"}}
    assert refused == set(chat_request._NOT_SUPPORTED)
    assert set(described["properties"]) - refused == set(ChatRequest.model_fields)
    assert described["additionalProperties"] is False


def objects(page: dict[str, Any], node: Any) -> Iterator[dict[str, Any]]:
    """Every schema of an object below a node, references followed."""
    if isinstance(node, dict):
        if "$ref" in node:
            node = schema(page, node["$ref"].rpartition("/")[2])
        if node.get("type") == "object":
            yield node
        yield from (each for item in node.values() for each in objects(page, item))
    elif isinstance(node, list):
        yield from (each for item in node for each in objects(page, item))


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_object_of_a_request_is_closed(page: dict[str, Any]) -> None:
    for *_, operation in operations(page):
        for each in objects(page, operation.get("requestBody", {}).get("content", {})):
            is_free = "properties" not in each  # `metadata` is the caller's own
            assert each["additionalProperties"] is is_free


def reads(body: type[StrictBody], value: dict[str, Any]) -> bool:
    try:
        validate(body, value)
    except InvalidRequest:
        return False
    return True


def under(*keys: str) -> Any:
    """Puts a value below keys."""

    def put(value: Any) -> dict[str, Any]:
        for key in reversed(keys):
            value = {key: value}
        return value  # type: ignore[no-any-return]

    return put


options = under("fine_tuning_options")
method = under("fine_tuning_options", "custom_training_options")
CSV_CASES: list[dict[str, Any]] = [
    {},
    {"suffix": ""},
    {"suffix": "a" * 64},
    {"suffix": "a" * 65},
    {"suffix": "-a"},
    {"suffix": 3},
    {"task_type": "chat"},
    {"dataset_id": None},
    {"extra": 1},
    *(
        {"hyperparameters": each}
        for each in (
            {},
            {"epochs": 1},
            {"epochs": 3.0},
            {"epochs": 0},
            {"epochs": 1.5},
            {"epochs": "3"},
            {"epochs": True},
            {"epochs": 2**31},
            {"max_steps": 0},
            {"learning_rate": 0},
            {"learning_rate": 1},
            {"learning_rate": 1e-9},
            {"validation_split": 0},
            {"validation_split": 1},
            {"validation_split": 1.01},
            {"lr": 1},
            [],
        )
    ),
]
CONFIG_CASES: list[dict[str, Any]] = [
    {},
    {"validation_data": "s3://tunery/x"},
    {"overrides": "--nproc_per_node 2"},
    {"overrides": 2},
    {"metadata": {"any": [1, {"thing": True}]}},
    {"metadata": "x"},
    {"other": 1},
    {"logger": {"log_type": "disk", "filename": "run.log"}},
    {"logger": {"log_type": "DiskLogger", "filename": "run.log"}},
    {"logger": {"log_type": "disk", "filename": "../run.log"}},
    {"logger": {"log_type": "disk", "filename": "a..b"}},
    {"logger": {"log_type": "disk"}},
    {"logger": {"log_type": "wandb", "project": "p"}},
    {"logger": {"log_type": "wandb", "filename": "p"}},
    {"logger": {"log_type": "syslog", "filename": "p"}},
    {"logger": {"filename": "run.log"}},
    *map(
        options,
        (
            {},
            {"n_epochs": 2},
            {"n_epochs": 0},
            {"batch_size": 1025},
            {"lr": 0},
            {"lr": 1e-4},
            {"gradient_accumulation_steps": 0},
            {"seed": 2**32 - 1},
            {"seed": 2**32},
            {"seed": -1},
            {"shuffle": False},
            {"shuffle": 0},
            {"extras": []},
            {"epochs": 1},
        ),
    ),
    *map(
        method,
        (
            {"finetuning_type": "lora"},
            {"finetuning_type": "LoraFineTuneOptions", "lora_rank": 4, "lora_alpha": 8},
            {"finetuning_type": "full"},
            {"finetuning_type": "FullFineTuneOptions", "fsdp_cpu_offload": False},
            {"finetuning_type": "full", "lora_rank": 4},
            {"finetuning_type": "lora", "fsdp_cpu_offload": False},
            {"finetuning_type": "lora", "lora_attn_modules": ["q_proj", "o_proj"]},
            {"finetuning_type": "lora", "lora_attn_modules": ["w_proj"]},
            {"finetuning_type": "lora", "lora_rank": 0},
            {"finetuning_type": "lora", "lora_rank": 1025},
            {"finetuning_type": "lora", "lora_alpha": 65537},
            {"finetuning_type": "qlora"},
            {"lora_rank": 4},
            {},
        ),
    ),
]
CHAT_CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 2, "top_p": 0.5, "seed": 1, "stop": ["a", "b"], "max_tokens": 3},
    {"temperature": 2.1},
    {"top_p": -0.1},
    {"stop": "x"},
    {"stop": ""},
    {"stop": ["a"] * 5},
    {"n": 1},
    {"n": 2},
    {"stream": False},
    {"stream": True},
    {"presence_penalty": 0},
    {"frequency_penalty": 1},
    {"logprobs": True, "top_logprobs": 20},
    {"logprobs": True, "top_logprobs": 21},
    {"messages": []},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}]},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x", "name": "y"}]},
    {"model": ""},
    {"tool": 1},
]


@pytest.mark.parametrize(
    ("page", "name", "body", "case"),
    [
        *((FIRST, "CreateFineTuningJobRequest", CsvJobBody, CSV_JOB | case) for case in CSV_CASES),
        *((SECOND, "Config", ConfigBody, CONFIG | case) for case in CONFIG_CASES),
        *((FIRST, "ChatRequest", ChatRequest, CHAT | case) for case in CHAT_CASES),
    ],
    ids=str,
)
def test_schema_and_service_take_and_refuse_the_same(
    page: dict[str, Any], name: str, body: type[StrictBody], case: dict[str, Any]
) -> None:
    assert accepts(page, name, case) == reads(body, case)


def test_missing_required_fields_are_refused_by_both() -> None:
    for page, name, body, whole in (
        (FIRST, "CreateFineTuningJobRequest", CsvJobBody, CSV_JOB),
        (SECOND, "Config", ConfigBody, CONFIG),
        (FIRST, "ChatRequest", ChatRequest, CHAT),
    ):
        for left_out in whole:
            case = {key: value for key, value in whole.items() if key != left_out}
            assert not accepts(page, name, case)
            assert not reads(body, case)
    assert not reads(CancelBody, {})


@pytest.mark.parametrize("value", ["audio", "tools", "store"])
def test_a_field_of_openai_that_is_not_supported_may_be_null(value: str) -> None:
    assert accepts(FIRST, "ChatRequest", CHAT | {value: None})
    assert not accepts(FIRST, "ChatRequest", CHAT | {value: {}})
