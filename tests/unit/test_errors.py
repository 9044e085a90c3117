"""The table of errors, what becomes of a row on the way to a client, and its documentation."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from gateway.errors import ANY_OTHER_ERROR, GATEWAY_ERRORS, GatewayError
from svc_kit.errors import ERROR_DOMAIN, TuneryError, table, to_status
from svc_kit.interceptors import as_tunery_error

ROOT = Path(__file__).parents[2]
DOCUMENTED = (ROOT / "docs" / "errors.md").read_text().splitlines()
TYPES = {
    "invalid_request_error",
    "authentication_error",
    "billing_error",
    "permission_error",
    "not_found_error",
    "conflict_error",
    "rate_limit_error",
    "server_error",
}
# How the transcoder answers a status. The other statuses of the table come by ErrorInfo's http_status.
HTTP_OF_GRPC = {
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
}
every_row = pytest.mark.parametrize("row", table(), ids=lambda row: row.code)


def test_codes_are_stable_names_and_each_its_own() -> None:
    codes = [row.code for row in table()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


@every_row
def test_status_carries_code_type_http_status_and_details(row: type[TuneryError]) -> None:
    error = row('a "message"\nwith Ü', line=3)

    status = to_status(error)

    assert status.code == row.grpc_status
    assert status.details == 'a "message"\nwith Ü'
    metadata = dict(status.trailing_metadata)
    rich = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert (rich.code, rich.message) == (row.grpc_status.value[0], error.message)
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert (info.domain, info.reason) == (ERROR_DOMAIN, row.code)
    assert dict(info.metadata) == {"type": row.type, "http_status": str(row.http_status), "line": "3"}


@every_row
def test_row_is_its_own_mapping(row: type[TuneryError]) -> None:
    error = row("x")
    assert as_tunery_error(error) is error


@every_row
def test_http_status_fits_the_grpc_status(row: type[TuneryError]) -> None:
    assert row.type in TYPES
    # A client that knows only the status must not take an error of its own for one of the service.
    assert row.http_status // 100 == HTTP_OF_GRPC[row.grpc_status] // 100


@every_row
def test_row_is_documented(row: type[TuneryError]) -> None:
    line = f"| `{row.code}` | {row.http_status} | {row.grpc_status.name} | `{row.type}` | {row.when} |"
    assert line in DOCUMENTED


@pytest.mark.parametrize(
    "error", [*GATEWAY_ERRORS, ANY_OTHER_ERROR], ids=lambda error: str(error.http_status)
)
def test_gateway_error_is_documented(error: GatewayError) -> None:
    assert error.type in TYPES
    assert f"| `{error.code}` | {error.http_status} | `{error.type}` | {error.when} |" in DOCUMENTED


def test_nothing_is_documented_that_is_not_there() -> None:
    lua = (ROOT / "gateway" / "envelope.lua").read_text()
    of_lua = set(re.findall(r'^(?:  \["\d+"\] =|local UNFORESEEN =) \{"\w+", "(\w+)"', lua, re.MULTILINE))
    assert "not_implemented" in of_lua
    known = {row.code for row in table()} | {e.code for e in (*GATEWAY_ERRORS, ANY_OTHER_ERROR)} | of_lua
    documented = {match[1] for line in DOCUMENTED if (match := re.match(r"\| `(\w+)` \| \d", line))}
    assert documented == known
