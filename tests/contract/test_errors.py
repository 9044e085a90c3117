"""Every error is in the envelope, whoever raised it."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.contract.account import CANCEL, DATASETS, JOBS, MODELS, STATUS, SUBMIT, TAIL, Account, refused
from tests.contract.contracts import OPERATIONS, Operation, check_response

EXTENSIONS = [
    *(("GET", "/api/v1/credits"), ("GET", "/api/v1/credits/entries"), ("POST", "/v1/chat/completions")),
    *(("POST", "/fine_tuning/datasets"), ("GET", "/api/v1/fine-tuning/base-models")),
    *(("GET", "/api/v1/fine-tuning/models/x/artifact"), ("GET", "/fine_tuning/jobs/x/files/log.txt")),
    ("GET", "/api/v1/fine-tuning/jobs/x/details"),
]
NO_JOB, NO_DATASET = "job-aaaaaaaaaaaaaaaaaaaa", "ds-aaaaaaaaaaaaaaaaaaaa"


def test_the_contracts_have_fourteen_operations() -> None:
    assert [operation.contract for operation in OPERATIONS] == ["A"] * 10 + ["B"] * 4


@pytest.mark.parametrize(
    "authorization",
    [
        *(None, "", "Bearer", "Bearer nonsense", "Basic dTpw", "bearer tnry_" + "a" * 43),
        *("Bearer tnry_a tnry_b", "Token tnry_a"),
    ],
)
def test_without_a_valid_key_is_401(account: Account, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    response = httpx.get(account.url + JOBS, headers=headers, trust_env=False)

    check_response(response)
    refused(response, 401, "invalid_api_key", "Authorization: Bearer")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("method", "path"),
    [(operation.method, operation.path) for operation in OPERATIONS] + EXTENSIONS,
    ids=lambda value: str(value),
)
def test_every_operation_wants_a_key(account: Account, method: str, path: str) -> None:
    """Before anything else: with a body or without, and whether or not the resource exists."""
    url = account.url + re.sub(r"\{\w+\}", "x", path)

    for body in (b"", b"{}", b"not json"):
        response = httpx.request(method, url, content=body or None, trust_env=False)
        check_response(response)
        refused(response, 401, "invalid_api_key")


def test_key_in_another_letter_case_is_no_key(account: Account) -> None:
    response = httpx.get(
        account.url + JOBS, headers={"Authorization": f"Bearer {account.api_key.upper()}"}, trust_env=False
    )
    refused(response, 401, "invalid_api_key")


def test_scheme_in_any_letter_case(account: Account) -> None:
    headers = {"Authorization": f"bEARER {account.api_key}"}
    assert httpx.get(account.url + JOBS, headers=headers, trust_env=False).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", f"{JOBS}/{NO_JOB}", "not_found"),
        ("GET", f"{JOBS}/nope", "not_found"),
        ("GET", f"{JOBS}/{NO_DATASET}", "not_found"),
        ("GET", f"{JOBS}/{NO_JOB.upper()}", "not_found"),
        ("GET", f"{JOBS}/%22%27%3B%0A%F0%9F%98%80", "not_found"),
        ("GET", f"{JOBS}/{'x' * 3000}", "not_found"),
        ("GET", f"{JOBS}/{NO_JOB}/details", "not_found"),
        ("POST", f"{JOBS}/{NO_JOB}/cancel", "not_found"),
        ("POST", f"{JOBS}/nope/cancel", "not_found"),
        ("GET", f"{DATASETS}/{NO_DATASET}", "not_found"),
        ("GET", f"{DATASETS}/nope", "not_found"),
        ("DELETE", f"{DATASETS}/{NO_DATASET}", "not_found"),
        ("DELETE", f"{DATASETS}/nope", "not_found"),
        ("DELETE", f"{DATASETS}/%25", "not_found"),
        ("DELETE", f"{MODELS}/nope", "not_found"),
        ("DELETE", f"{MODELS}/tunery-tiny", "not_found"),
        ("DELETE", f"{MODELS}/%C3%A9", "not_found"),
        ("DELETE", f"{MODELS}/{'x' * 3000}", "not_found"),
        ("GET", f"{MODELS}/nope/artifact", "not_found"),
        ("GET", f"{STATUS}?job_id={NO_JOB}", "not_found"),
        ("GET", f"{STATUS}?job_id=nope", "not_found"),
        ("GET", f"{STATUS}?job_id=%00", "not_found"),
        ("GET", f"{TAIL}?job_id={NO_JOB}", "not_found"),
        ("GET", f"{TAIL}?job_id=a%20b", "not_found"),
        ("GET", f"/fine_tuning/jobs/{NO_JOB}/files/log.txt", "not_found"),
        ("GET", "/", "route_not_found"),
        ("GET", "/api/v1", "route_not_found"),
        ("GET", "/api/v1/fine-tuning", "route_not_found"),
        ("GET", "/fine-tuning/jobs", "route_not_found"),
        ("GET", "/api/v2/fine-tuning/jobs", "route_not_found"),
        ("GET", "/API/v1/fine-tuning/jobs", "route_not_found"),
        ("POST", f"{JOBS}/{NO_JOB}/stop", "route_not_found"),
        ("GET", "/fine_tuning/jobs/list", "route_not_found"),
    ],
)
def test_what_is_not_there_is_404(account: Account, method: str, path: str, code: str) -> None:
    refused(account.http.request(method, path), 404, code)


@pytest.mark.parametrize("path", [f"{JOBS}/%00", f"{DATASETS}/a%2Fb", f"{MODELS}/..%5Cx"])
def test_malformed_path_is_400(account: Account, path: str) -> None:
    # By a client of its own: what isn't proper HTTP is answered without a request id.
    response = httpx.delete(account.url + path, headers=account.http.headers, trust_env=False)

    refused(response, 400, "invalid_request", "path is malformed")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", JOBS, "GET, POST"),
        ("DELETE", JOBS, "GET, POST"),
        ("PATCH", f"{JOBS}/{NO_JOB}", "GET"),
        ("DELETE", f"{JOBS}/{NO_JOB}", "GET"),
        ("GET", f"{JOBS}/{NO_JOB}/cancel", "POST"),
        ("PUT", DATASETS, "GET, POST"),
        ("POST", f"{DATASETS}/{NO_DATASET}", "DELETE, GET"),
        ("POST", MODELS, "GET"),
        ("GET", f"{MODELS}/nope", "DELETE"),
        ("GET", SUBMIT, "POST"),
        ("POST", STATUS, "GET"),
        ("GET", CANCEL, "POST"),
        ("POST", TAIL, "GET"),
        ("OPTIONS", JOBS, "GET, POST"),
    ],
)
def test_other_methods_are_405_with_those_allowed(
    account: Account, method: str, path: str, allowed: str
) -> None:
    response = account.http.request(method, path)

    refused(response, 405, "method_not_allowed", method)
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("path", [STATUS, TAIL])
@pytest.mark.parametrize("query", ["", "?job_id=", "?JOB_ID=x", "?id=x"])
def test_missing_job_id_is_400(account: Account, path: str, query: str) -> None:
    refused(account.http.get(path + query), 400, "invalid_request", "job_id")


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"{", b'{"job_id": ""}', b'{"job_id": 7}', b'{"job_id": null}', b'{"id": "x"}'],
)
def test_cancel_without_a_job_id_is_400(account: Account, body: bytes) -> None:
    refused(account.http.post(CANCEL, content=body), 400, "invalid_request")


def test_cancel_names_an_unknown_field(account: Account) -> None:
    response = account.http.post(CANCEL, json={"job_id": NO_JOB, "force": True})
    refused(response, 400, "invalid_request", "force")


def test_cancel_of_an_unknown_job_is_404(account: Account) -> None:
    refused(account.http.post(CANCEL, json={"job_id": NO_JOB}), 404, "not_found", NO_JOB)
    refused(account.http.post(CANCEL, json={"job_id": "a\u0000b"}), 404, "not_found")


@pytest.mark.parametrize(
    "operation", OPERATIONS, ids=lambda operation: f"{operation.method} {operation.path}"
)
def test_odd_json_never_breaks_a_service(account: Account, operation: Operation) -> None:
    path = re.sub(r"\{\w+\}", "x", operation.path)

    for body in (b"null", b"[]", b"1e999", b'"\\ud800"', b"\xff\xfe{}", b"{" * 5000):
        response = account.http.request(operation.method, path, content=body)
        assert response.status_code < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(f"a{mark}b", "1") for mark in "!#$%&'*+^`|~"],
        ("x-bin", "***"),
        ("grpc-timeout", "zzz"),
        ("grpc-previous-rpc-attempts", "x"),
        ("grpc-timeout", "1n"),
    ],
)
def test_headers_that_mean_something_to_grpc_alone_do_no_harm(
    account: Account, name: str, value: str
) -> None:
    assert account.http.get(JOBS, headers={name: value}).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a.b", "1"),
        ("x", b"caf\xe9"),
        ("x", b"\xf0\x9f\x98\x80"),
        ("te", "deflate"),
        ("x-http-status", "500"),
    ],
)
def test_odd_headers_do_no_harm(account: Account, name: str, value: str | bytes) -> None:
    assert account.http.get(JOBS, headers={name: value}).status_code == 200  # type: ignore[dict-item]
