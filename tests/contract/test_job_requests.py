"""Section 3, Jobs: what a request may say, and what a refusal names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.contract.account import BASE_MODEL, DATASETS, JOBS, Account, ok, qa_csv, refused

FIELDS = {"id", "status", "base_model", "dataset_id", "task_type", "hyperparameters", "created_at"}


@pytest.fixture(scope="module")
def dataset_id(account: Account) -> str:
    return account.dataset(qa_csv(10))


@pytest.fixture
def no_job_made(account: Account) -> Iterator[None]:
    """Checks that the test makes no job."""
    before = ok(account.http.get(JOBS))["total"]
    yield
    assert ok(account.http.get(JOBS))["total"] == before


@pytest.fixture
def create(account: Account, queued: Callable[[str], str]) -> Callable[..., dict[str, Any]]:
    """Makes a job that stays queued for the test's time, and returns it as the answer shows it."""

    def create(dataset_id: str, **fields: Any) -> dict[str, Any]:
        job: dict[str, Any] = ok(account.request_job(dataset_id, **fields), 201)
        queued(job["id"])
        return job

    return create


def test_new_job_has_exactly_the_contracts_fields_and_the_defaults(
    account: Account, dataset_id: str, create: Callable[..., dict[str, Any]]
) -> None:
    job = create(dataset_id)

    assert set(job) == FIELDS
    assert job["status"] == "queued"
    assert job["base_model"] == BASE_MODEL
    assert job["dataset_id"] == dataset_id
    assert job["task_type"] == "qa"
    assert job["hyperparameters"] == {"epochs": 3, "learning_rate": 2e-4, "validation_split": 0}
    assert account.job(job["id"]) == job


@pytest.mark.parametrize(
    ("given", "effective"),
    [
        ({"epochs": 1}, {"epochs": 1}),
        ({"epochs": 2.0}, {"epochs": 2}),
        ({"epochs": 2**31 - 1, "max_steps": 1}, {"epochs": 2**31 - 1, "max_steps": 1}),
        ({"max_steps": 7}, {"max_steps": 7}),
        ({"learning_rate": 1}, {"learning_rate": 1}),
        ({"learning_rate": 1e-300}, {"learning_rate": 1e-300}),
        ({"learning_rate": 1e300}, {"learning_rate": 1e300}),
        ({"validation_split": 0}, {"validation_split": 0}),
        ({"validation_split": 0.5}, {"validation_split": 0.5}),
        ({"validation_split": 0.0001}, {"validation_split": 0.0001}),
        ({"validation_split": 0.9}, {"validation_split": 0.9}),
        ({}, {}),
    ],
)
def test_effective_hyperparameters_are_shown(
    create: Callable[..., dict[str, Any]],
    dataset_id: str,
    given: dict[str, Any],
    effective: dict[str, Any],
) -> None:
    defaults = {"epochs": 3, "learning_rate": 2e-4, "validation_split": 0}

    assert create(dataset_id, hyperparameters=given)["hyperparameters"] == {**defaults, **effective}


@pytest.mark.usefixtures("no_job_made")
@pytest.mark.parametrize("value", [True, False, "1", "", None, [], {}, [1], 0.5])
@pytest.mark.parametrize("name", ["epochs", "max_steps", "learning_rate", "validation_split"])
def test_hyperparameter_of_the_wrong_type_is_named(
    account: Account, dataset_id: str, name: str, value: object
) -> None:
    if value == 0.5 and type(value) is float and name in ("learning_rate", "validation_split"):
        value = "0.5"
    message = refused(
        account.request_job(dataset_id, hyperparameters={name: value}), 400, "invalid_request", name
    )
    assert "hyperparameters" in message


@pytest.mark.usefixtures("no_job_made")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("epochs", "max_steps") for value in (0, -1, 1.5, 2**31, 2**63, 1e300)],
        *[("learning_rate", value) for value in (0, -0.0, -1e-9)],
        *[("validation_split", value) for value in (-0.0001, 1.0001, 100)],
    ],
)
def test_hyperparameter_out_of_its_range_is_named(
    account: Account, dataset_id: str, name: str, value: float
) -> None:
    refused(account.request_job(dataset_id, hyperparameters={name: value}), 400, "invalid_request", name)


@pytest.mark.usefixtures("no_job_made")
@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "01", "+1", ".5", "0x1"]
)
@pytest.mark.parametrize("name", ["epochs", "learning_rate", "validation_split"])
def test_what_is_no_number_is_refused(account: Account, dataset_id: str, name: str, number: str) -> None:
    body = {
        "base_model": BASE_MODEL,
        "dataset_id": dataset_id,
        "task_type": "qa",
        "hyperparameters": {name: 0},
    }
    text = json.dumps(body).replace(f'"{name}": 0', f'"{name}": {number}')

    refused(account.http.post(JOBS, content=text), 400, "invalid_request")


@pytest.mark.usefixtures("no_job_made")
@pytest.mark.parametrize("rows", [1, 2, 10])
@pytest.mark.parametrize("split", [1, 1.0, 0.99])
def test_split_that_leaves_no_training_row_is_refused(account: Account, rows: int, split: float) -> None:
    dataset_id = account.dataset(qa_csv(rows))

    response = account.request_job(dataset_id, hyperparameters={"validation_split": split})
    refused(response, 400, "invalid_request", "validation_split", f"{rows} rows")


@pytest.mark.usefixtures("no_job_made")
def test_header_without_rows_has_nothing_to_train_on(account: Account) -> None:
    refused(account.request_job(account.dataset(qa_csv(0))), 400, "invalid_request", "no rows")


@pytest.mark.usefixtures("no_job_made")
@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"base_model": None}, "invalid_request", ("base_model",)),
        ({"dataset_id": None}, "invalid_request", ("dataset_id",)),
        ({"task_type": None}, "invalid_request", ("task_type",)),
        ({"base_model": 7}, "invalid_request", ("base_model",)),
        ({"base_model": ["tunery-tiny"]}, "invalid_request", ("base_model",)),
        ({"dataset_id": 7}, "invalid_request", ("dataset_id",)),
        ({"task_type": "QA"}, "invalid_request", ("task_type", "qa", "not_qa")),
        ({"task_type": True}, "invalid_request", ("task_type",)),
        ({"hyperparameters": []}, "invalid_request", ("hyperparameters",)),
        ({"hyperparameters": "{}"}, "invalid_request", ("hyperparameters",)),
        ({"hyperparameters": {"epoch": 3}}, "invalid_request", ("hyperparameters.epoch",)),
        ({"hyperparameters": {"Epochs": 3}}, "invalid_request", ("hyperparameters.Epochs",)),
        ({"hyperparameters": {"learningRate": 3}}, "invalid_request", ("hyperparameters.learningRate",)),
        ({"baseModel": "tunery-tiny"}, "invalid_request", ("baseModel",)),
        ({"epochs": 3}, "invalid_request", ("epochs",)),
        ({"": 3}, "invalid_request", ()),
        ({"suffix": 3}, "invalid_request", ("suffix",)),
        ({"suffix": "s" * 65}, "invalid_request", ("suffix", "64")),
        ({"suffix": "a/b"}, "invalid_request", ("suffix",)),
        ({"suffix": "-a"}, "invalid_request", ("suffix",)),
        ({"suffix": "é"}, "invalid_request", ("suffix",)),
        ({"suffix": "a\n"}, "invalid_request", ("suffix",)),
        ({"base_model": "gpt-5"}, "unknown_base_model", ("gpt-5", "tunery-tiny")),
        ({"base_model": ""}, "unknown_base_model", ("tunery-tiny",)),
        ({"base_model": "Tunery-Tiny"}, "unknown_base_model", ("tunery-tiny",)),
        ({"base_model": "../tunery-tiny"}, "unknown_base_model", ("tunery-tiny",)),
        ({"base_model": "x" * 5000}, "unknown_base_model", ("tunery-tiny",)),
        ({"dataset_id": "ds-aaaaaaaaaaaaaaaaaaaa"}, "unknown_dataset", ("ds-aaaaaaaaaaaaaaaaaaaa",)),
        ({"dataset_id": ""}, "unknown_dataset", ()),
        ({"dataset_id": "x" * 5000}, "unknown_dataset", ()),
        ({"dataset_id": "a/b?c#d\u0000"}, "unknown_dataset", ()),
        ({"dataset_id": "job-aaaaaaaaaaaaaaaaaaaa"}, "unknown_dataset", ()),
    ],
)
def test_wrong_field_is_named(
    account: Account, dataset_id: str, changes: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    body = {"base_model": BASE_MODEL, "dataset_id": dataset_id, "task_type": "qa", **changes}

    refused(account.http.post(JOBS, json=body), 400, code, *words)


@pytest.mark.usefixtures("no_job_made")
@pytest.mark.parametrize("name", ["base_model", "dataset_id", "task_type"])
def test_missing_field_is_named(account: Account, dataset_id: str, name: str) -> None:
    body = {"base_model": BASE_MODEL, "dataset_id": dataset_id, "task_type": "qa"}
    del body[name]

    refused(account.http.post(JOBS, json=body), 400, "invalid_request", name, "missing")


@pytest.mark.usefixtures("no_job_made")
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ("empty",)),
        (b"  \n", ("empty",)),
        (b"{", ("line 1",)),
        (b"{}}", ("line 1",)),
        (b"[]", ("list", "object")),
        (b"null", ("null", "object")),
        (b'"{}"', ("string", "object")),
        (b"base_model=tunery-tiny", ("line 1",)),
        (b"{'base_model': 'tunery-tiny'}", ("line 1",)),
        (b'{"task_type": "qa", "task_type": "qa"}', ("task_type", "twice")),
        (b'{"hyperparameters": {"epochs": 1, "epochs": 2}}', ("epochs", "twice")),
        (b'{"suffix": "\xff"}', ("UTF-8",)),
        (b'{"suffix": "\\ud800"}', ("suffix", "surrogate")),
        (b'{"suffix": ' + b"[" * 100 + b"]" * 100 + b"}", ("32 levels",)),
        (b'{"suffix": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ("32 levels",)),
        (b'{"suffix": "a"} // no comment', ("line 1",)),
        (b'{"suffix": "a",}', ("line 1",)),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else "",
)
def test_malformed_body_is_refused(account: Account, body: bytes, words: tuple[str, ...]) -> None:
    response = account.http.post(JOBS, content=body, headers={"Content-Type": "application/json"})

    refused(response, 400, "invalid_request", *words)


@pytest.mark.usefixtures("no_job_made")
def test_json_over_a_mebibyte_is_413(account: Account) -> None:
    body = {"base_model": "x" * 2**20}

    refused(account.http.post(JOBS, json=body), 413, "payload_too_large")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON"])
def test_content_type_in_other_spellings_is_taken(
    account: Account, dataset_id: str, queued: Callable[[str], str], content_type: str
) -> None:
    body = json.dumps({"base_model": BASE_MODEL, "dataset_id": dataset_id, "task_type": "qa"})
    response = account.http.post(JOBS, content=body, headers={"Content-Type": content_type})

    queued(ok(response, 201)["id"])


@pytest.mark.parametrize(
    ("task_type", "header"),
    [
        *[("qa", header) for header in ("question,answer", "prompt,completion", "instruction,output")],
        *[("qa", header) for header in ("input,output", "ANSWER,other,Question", "Output,INPUT")],
        ("qa", "system,context,question,answer"),
        ("qa", "Instruction,Input,Output"),
        *[("not_qa", header) for header in ("text", "Text,other", "PROMPT,Completion", "instruction,output")],
        ("not_qa", "output,input,instruction"),
    ],
)
def test_columns_that_fit_the_task_are_taken(
    account: Account, create: Callable[..., dict[str, Any]], task_type: str, header: str
) -> None:
    row = ",".join("words" for _ in header.split(","))
    job = create(account.dataset(f"{header}\n{row}\n{row}\n"), task_type=task_type)

    assert job["task_type"] == task_type


@pytest.mark.usefixtures("no_job_made")
@pytest.mark.parametrize(
    ("task_type", "header", "words"),
    [
        ("qa", "text", ("question and answer", "prompt and completion", "input and output", '"text"')),
        ("qa", "question,output", ("question and answer", '"question", "output"')),
        ("qa", " question,answer", ('" question"', "Spaces")),
        ("qa", "questions,answers", ("question and answer", '"questions", "answers"')),
        ("qa", "question,Question,answer", ('"question", "Question"',)),
        ("qa", "question;answer", ("commas",)),
        ("not_qa", "question,answer", ("text", "prompt and completion", "instruction and output", '"qa"')),
        ("not_qa", "input,output", ("text", "instruction and output", '"input", "output"')),
    ],
)
def test_refusal_lists_columns_looked_for_and_found(
    account: Account, task_type: str, header: str, words: tuple[str, ...]
) -> None:
    row = ",".join("words" for _ in header.split(","))
    dataset_id = account.dataset(f"{header}\n{row}\n{row}\n")

    refused(account.request_job(dataset_id, task_type=task_type), 400, "unsupported_columns", *words)
    # A refused request holds nothing.
    assert account.http.delete(f"{DATASETS}/{dataset_id}").status_code == 204


@pytest.mark.usefixtures("no_job_made")
def test_jsonl_dataset_is_the_other_contracts(account: Account) -> None:
    dataset_id = account.dialogs()

    refused(account.request_job(dataset_id), 400, "invalid_request", "JSONL", "/fine_tuning/jobs/submit")
    assert account.http.delete(f"{DATASETS}/{dataset_id}").status_code == 204


@pytest.mark.parametrize("suffix", ["a", "A1._-z", "s" * 64, ""])
def test_suffix_of_up_to_64_characters_is_taken(
    create: Callable[..., dict[str, Any]], dataset_id: str, suffix: str
) -> None:
    assert set(create(dataset_id, suffix=suffix)) == FIELDS


class TestList:
    """Paging, on an account with seven jobs."""

    @pytest.fixture(scope="class")
    @staticmethod
    def lister(new_account: Callable[..., Account], busy_trainer: Any) -> Iterator[tuple[Account, list[str]]]:
        assert busy_trainer.job_id
        account = new_account()
        dataset_id = account.dataset()
        jobs = [account.create_job(dataset_id) for _ in range(7)]
        yield account, jobs[::-1]
        for job_id in jobs:
            account.cancel(job_id)

    def test_newest_first_with_the_total(self, lister: tuple[Account, list[str]]) -> None:
        account, jobs = lister
        page = ok(account.http.get(JOBS))

        assert set(page) == {"data", "total"}
        assert [job["id"] for job in page["data"]] == jobs
        assert page["total"] == 7
        assert page["data"][3] == account.job(jobs[3])

    @pytest.mark.parametrize(
        ("limit", "offset", "expected"),
        [
            *((1, 0, slice(0, 1)), (100, 0, slice(0, 7)), (3, 2, slice(2, 5)), (3, 6, slice(6, 7))),
            *((3, 7, slice(0, 0)), (100, 2**31 - 1, slice(0, 0))),
        ],
    )
    def test_pages(self, lister: tuple[Account, list[str]], limit: int, offset: int, expected: slice) -> None:
        account, jobs = lister
        page = ok(account.http.get(JOBS, params={"limit": limit, "offset": offset}))

        assert [job["id"] for job in page["data"]] == jobs[expected]
        assert page["total"] == 7

    @pytest.mark.parametrize(
        "query",
        [
            *("limit=0", "limit=101", "limit=-1", "limit=abc", "limit=", "limit=1.5", "limit=true"),
            *("limit=99999999999999999999", "limit=1&limit=2", "limit=null", "limit=0x10"),
            *("offset=-1", "offset=abc", "offset=", "offset=0.5", "offset=99999999999999999999"),
        ],
    )
    def test_out_of_range_is_400(self, lister: tuple[Account, list[str]], query: str) -> None:
        refused(lister[0].http.get(f"{JOBS}?{query}"), 400, "invalid_request", query.split("=")[0])


def test_default_page_has_20(new_account: Callable[..., Account], busy_trainer: Any) -> None:
    assert busy_trainer.job_id
    account = new_account()
    dataset_id = account.dataset()
    jobs = [account.create_job(dataset_id) for _ in range(21)]

    page = ok(account.http.get(JOBS))
    assert [job["id"] for job in page["data"]] == jobs[:0:-1]
    assert page["total"] == 21
    for job_id in jobs:
        account.cancel(job_id)
