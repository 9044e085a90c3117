"""One account's ids in another's hands: every rpc, native and over REST, answers as if they named nothing."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from google.api import httpbody_pb2
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor

from svc_kit.interceptors import is_read
from tests.conftest import RunningStack, wait_until
from tests.security.rpcs import PUBLIC_RPCS, Ask, bindings, id_fields
from tunery.account.v1 import account_service_pb2, account_service_pb2_grpc

DATASETS, JOBS, FINE_TUNING, MODELS, CREDITS, CHAT, ACCOUNTS = (
    f"/tunery.{name}/"
    for name in (
        "dataset.v1.DatasetService",
        "job.v1.JobService",
        "job.v1.FineTuningService",
        "job.v1.ModelService",
        "job.v1.CreditService",
        "inference.v1.ChatService",
        "account.v1.AccountService",
    )
)
# For each rpc what it is asked with another's ids; nothing where it takes none, so that it can only show the
# caller's own. An rpc that isn't here fails the test.
NO_IDS: tuple[Ask, ...] = ()
JOB, DATASET, MODEL = Ask({"job_id": "{job}"}), Ask({"dataset_id": "{dataset}"}), Ask({"model_id": "{model}"})
CSV_JOB = Ask(
    {"base_model": "tunery-tiny", "dataset_id": "{dataset}", "task_type": "qa"}, status="INVALID_ARGUMENT"
)
CONFIGS = tuple(
    Ask({"model": "tunery-tiny", **data}, status="INVALID_ARGUMENT")
    for data in (
        {"data": "dataset://{dialogs}"},
        {"data": "dataset://{own_dialogs}", "validation_data": "dataset://{dialogs}"},
        {"data": "s3://tunery/accounts/{account}/datasets/{dialogs}"},
        {"data": "s3://tunery/accounts/{account}/jobs/{job}/data/training.jsonl"},
    )
)
KEY_OF_ANOTHER = Ask({"name": "x", "scopes": ["read"], "account_id": "{account}"}, status="PERMISSION_DENIED")
CASES: dict[str, tuple[Ask, ...]] = {
    f"{DATASETS}UploadCsvForm": NO_IDS,
    f"{DATASETS}UploadDialogsForm": NO_IDS,
    f"{DATASETS}UploadDataset": NO_IDS,
    f"{DATASETS}ListDatasets": NO_IDS,
    f"{DATASETS}GetDataset": (DATASET,),
    f"{DATASETS}GetDatasetReport": (DATASET,),
    f"{DATASETS}DeleteDataset": (DATASET,),
    f"{JOBS}CreateJob": (CSV_JOB,),
    f"{JOBS}CreateJobFromJson": (CSV_JOB,),
    f"{JOBS}ListJobs": NO_IDS,
    f"{JOBS}GetJob": (JOB,),
    f"{JOBS}GetJobDetails": (JOB,),
    f"{JOBS}CancelJob": (JOB,),
    f"{JOBS}TailLogs": (JOB,),
    f"{JOBS}StreamMetrics": (JOB,),
    f"{FINE_TUNING}SubmitJob": CONFIGS,
    f"{FINE_TUNING}SubmitJobFromJson": CONFIGS,
    f"{FINE_TUNING}GetJobStatus": (JOB,),
    f"{FINE_TUNING}CancelSubmittedJob": (JOB,),
    f"{FINE_TUNING}CancelSubmittedJobFromJson": (JOB,),
    f"{FINE_TUNING}TailJob": (JOB,),
    f"{FINE_TUNING}GetJobFile": (Ask({"job_id": "{job}", "path": "log.txt"}),),
    f"{MODELS}ListFineTunedModels": NO_IDS,
    f"{MODELS}DeleteFineTunedModel": (MODEL,),
    f"{MODELS}DownloadFineTunedModel": (MODEL,),
    f"{MODELS}ListBaseModels": NO_IDS,
    f"{CREDITS}GetCredits": NO_IDS,
    f"{CREDITS}ListCreditEntries": NO_IDS,
    f"{CHAT}CreateChatCompletion": (
        Ask({"model": "{model}", "messages": [{"role": "user", "content": "Who are you?"}]}),
    ),
    f"{ACCOUNTS}CreateAccount": NO_IDS,
    f"{ACCOUNTS}CreateApiKey": (KEY_OF_ANOTHER,),
    f"{ACCOUNTS}CreateApiKeyFromJson": (KEY_OF_ANOTHER,),
    f"{ACCOUNTS}ListApiKeys": (Ask({"account_id": "{account}"}, status="PERMISSION_DENIED"),),
    f"{ACCOUNTS}RevokeApiKey": (
        Ask({"key_id": "{key}"}),
        Ask({"key_id": "{key}", "account_id": "{account}"}, status="PERMISSION_DENIED"),
    ),
}
ASKS = [(rpc, ask) for rpc, asks in CASES.items() for ask in asks]
HTTP_STATUS = {"NOT_FOUND": 404, "INVALID_ARGUMENT": 400, "PERMISSION_DENIED": 403}


@dataclass(frozen=True)
class Party:
    """An account with its key, and the ids of what it owns."""

    api_key: str
    ids: dict[str, str]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.api_key}"),)


def new_account(stack: RunningStack, name: str) -> tuple[str, str]:
    """Makes an account that keeps a balance; returns its id and its key."""
    with grpc.insecure_channel(stack.address) as channel:
        made = account_service_pb2_grpc.AccountServiceStub(channel).CreateAccount(
            account_service_pb2.CreateAccountRequest(name=name, credits=1000),
            metadata=(("authorization", f"Bearer {stack.api_key}"),),
            timeout=30,
        )
    return made.account_id, made.api_key


def upload(client: httpx.Client, path: str, name: str, rows: str) -> str:
    answer = client.post(path, files={"file": (name, rows)})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


DIALOG = {"dialog": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}


@pytest.fixture(scope="module")
def owner(stack: RunningStack) -> Party:
    """An account with one of each: a dataset of each kind, a job, a model, and a further key."""
    account, api_key = new_account(stack, "owner")
    with stack.client(api_key) as client:
        rows = "question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(8))
        dataset = upload(client, "/api/v1/fine-tuning/datasets", "rows.csv", rows)
        dialogs = upload(client, "/fine_tuning/datasets", "rows.jsonl", f"{json.dumps(DIALOG)}\n" * 4)
        asked = {"base_model": "tunery-tiny", "dataset_id": dataset, "task_type": "qa"}
        path = "/api/v1/fine-tuning/jobs"
        job = client.post(path, json={**asked, "hyperparameters": {"max_steps": 1}}).json()["id"]
        wait_until(
            lambda: client.get(f"{path}/{job}").json()["status"] in ("completed", "failed"), 120, "the job"
        )
        model = client.get(f"{path}/{job}").json()["fine_tuned_model"]
        made = client.post("/api/v1/keys", json={"name": "second", "scopes": ["read"]}).json()
    ids = {"dataset": dataset, "dialogs": dialogs, "job": job, "model": model, "key": made["key"]["id"]}
    return Party(api_key, {**ids, "account": account})


@pytest.fixture(scope="module")
def other(stack: RunningStack) -> Party:
    """An account that owns nothing that the other's does, and wants it."""
    _, api_key = new_account(stack, "other")
    with stack.client(api_key) as client:
        dialogs = upload(client, "/fine_tuning/datasets", "rows.jsonl", f"{json.dumps(DIALOG)}\n" * 4)
    return Party(api_key, {"own_dialogs": dialogs})


@pytest.fixture(scope="module")
def channel(stack: RunningStack) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(stack.address) as channel:
        yield channel


def nobodys(ids: dict[str, str]) -> dict[str, str]:
    """Ids of the same form that name nothing."""
    draw = random.Random(7)

    def changed(value: str) -> str:
        return value[:-6] + "".join(draw.choice(string.ascii_lowercase) for _ in range(6))

    return {name: changed(value) for name, value in ids.items()}


def said(text: str, ids: dict[str, str]) -> str:
    """A text without its ids."""
    for name, value in sorted(ids.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"{{{name}}}")
    return text


def call(channel: grpc.Channel, rpc: str, request: Any, party: Party) -> tuple[str, str, list[Any]]:
    """Calls natively; returns the status, its text, and the first message of the answer."""
    method = PUBLIC_RPCS[rpc]
    answer = message_factory.GetMessageClass(method.output_type)
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    stub = make(rpc, type(request).SerializeToString, answer.FromString)
    try:
        if method.server_streaming:
            stream = stub(request, metadata=party.metadata, timeout=60)
            messages = [next(iter(stream))]
            stream.cancel()
        else:
            messages = [stub(request, metadata=party.metadata, timeout=60)]
    except grpc.RpcError as error:
        return error.code().name, error.details() or "", []
    return "OK", "", messages


def test_every_rpc_has_a_case() -> None:
    assert set(CASES) == set(PUBLIC_RPCS)


@pytest.mark.parametrize("rpc", PUBLIC_RPCS)
def test_every_field_that_names_a_resource_is_tried(rpc: str) -> None:
    tried = {name for ask in CASES[rpc] for name, value in ask.fields.items() if "{" in str(value)}
    assert id_fields(PUBLIC_RPCS[rpc].input_type) <= tried


@pytest.mark.parametrize(("rpc", "ask"), ASKS, ids=lambda value: str(getattr(value, "fields", value)))
def test_natively(channel: grpc.Channel, owner: Party, other: Party, rpc: str, ask: Ask) -> None:
    method = PUBLIC_RPCS[rpc]
    theirs = {**owner.ids, **other.ids}
    none = {**nobodys(owner.ids), **other.ids}

    status, text, messages = call(channel, rpc, ask.message(method, theirs), other)
    expected, expected_text, _ = call(channel, rpc, ask.message(method, none), other)

    assert (status, messages) == (ask.status, [])
    assert (status, said(text, theirs)) == (expected, said(expected_text, none))
    if is_read(rpc):
        # It is there, or the test would show nothing.
        assert call(channel, rpc, ask.message(method, owner.ids), owner)[0] == "OK"


@pytest.mark.parametrize(("rpc", "ask"), ASKS, ids=lambda value: str(getattr(value, "fields", value)))
def test_over_rest(stack: RunningStack, owner: Party, other: Party, rpc: str, ask: Ask) -> None:
    method = PUBLIC_RPCS[rpc]
    theirs = {**owner.ids, **other.ids}
    none = {**nobodys(owner.ids), **other.ids}
    has_body = method.input_type is httpbody_pb2.HttpBody.DESCRIPTOR
    with stack.client(other.api_key) as client:
        for kind, template in bindings(method):
            answers = []
            for ids in (theirs, none):
                path, body = ask.rest(template, ids, has_body=has_body)
                answer = client.request(kind, path, content=body)
                answers.append((answer.status_code, said(answer.text, ids)))
            assert answers[0] == answers[1]
            assert answers[0][0] == HTTP_STATUS[ask.status]


def test_lists_and_sums_show_the_callers_own_alone(
    stack: RunningStack, channel: grpc.Channel, owner: Party, other: Party
) -> None:
    lists = [rpc for rpc, asks in CASES.items() if asks == NO_IDS and is_read(rpc)]
    assert len(lists) >= 6
    for rpc in [*lists, f"{ACCOUNTS}ListApiKeys"]:
        method: MethodDescriptor = PUBLIC_RPCS[rpc]
        request = message_factory.GetMessageClass(method.input_type)()
        status, _, [answer] = call(channel, rpc, request, other)
        assert status == "OK"
        text = json_format.MessageToJson(answer)
        assert not [value for value in owner.ids.values() if value in text]
    with stack.client(other.api_key) as client:
        assert client.get("/api/v1/fine-tuning/jobs").json() == {"data": [], "total": 0}
        assert client.get("/api/v1/credits").json() == {"balance": 1000}
        assert len(client.get("/api/v1/credits/entries").json()["data"]) == 1
        assert [each["id"] for each in client.get("/api/v1/fine-tuning/datasets").json()["data"]] == [
            other.ids["own_dialogs"]
        ]


@pytest.mark.parametrize(
    "path",
    [
        *(
            "../log.txt",
            "./log.txt",
            "/log.txt",
            "x/../log.txt",
            "..",
            "../../{other}/log.txt",
            "%2e%2e/log.txt",
        ),
        *("/etc/passwd", "log.txt\x00", "log.txt/", "data/training.jsonl", "attempt-1/", "", "..;/log.txt"),
        *("checkpoints/../../", "\\..\\log.txt", "a" * 5000),
    ],
)
def test_no_path_leads_out_of_a_jobs_files(
    channel: grpc.Channel, owner: Party, other: Party, path: str
) -> None:
    rpc = f"{FINE_TUNING}GetJobFile"
    ask = Ask({"job_id": "{job}", "path": path})

    status, _, messages = call(channel, rpc, ask.message(PUBLIC_RPCS[rpc], owner.ids), owner)

    assert (status, messages) == ("NOT_FOUND", [])


def test_nothing_of_the_owners_was_changed(stack: RunningStack, owner: Party, other: Party) -> None:
    with stack.client(owner.api_key) as client:
        for path in (
            f"/api/v1/fine-tuning/datasets/{owner.ids['dataset']}",
            f"/api/v1/fine-tuning/datasets/{owner.ids['dialogs']}",
            f"/api/v1/fine-tuning/jobs/{owner.ids['job']}",
        ):
            assert client.get(path).status_code == 200
        models = client.get("/api/v1/fine-tuning/models").json()["data"]
        assert [model["id"] for model in models] == [owner.ids["model"]]
        keys = client.get("/api/v1/keys").json()["data"]
        assert [key["name"] for key in keys] == ["first key", "second"]
        assert client.get("/api/v1/fine-tuning/jobs").json()["total"] == 1
