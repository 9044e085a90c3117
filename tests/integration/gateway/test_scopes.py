"""A key opens what its scopes say, by REST and natively alike, whichever rpc it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2

from gateway.routes import PUBLIC_SERVICES, rest_bindings
from svc_kit.interceptors import is_read
from tests.integration.gateway.stack import DESCRIPTORS, FIRST_KEY, Gateway
from tests.integration.gateway.upstreams import Upstreams

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEYS = "/api/v1/keys"


def public_rpcs() -> Iterator[tuple[str, descriptor_pb2.MethodDescriptorProto]]:
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    for file in files.file:
        for service in file.service:
            if f"{file.package}.{service.name}" in PUBLIC_SERVICES:
                yield from (
                    (f"/{file.package}.{service.name}/{method.name}", method) for method in service.method
                )


RPCS = dict(public_rpcs())
# What a service answers itself, in place of the doubles.
OWN_ACCOUNT_SERVICE = "/tunery.account.v1.AccountService/"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def reader(gateway: Gateway) -> str:
    """A key with the scope `read`."""
    made = await gateway.client.post(KEYS, json={"name": "reader", "scopes": ["read"]})
    assert made.status_code == 201, made.text
    return str(made.json()["api_key"])


async def test_reads_are_what_rest_gets_and_the_log() -> None:
    gets = {rpc for rpc, method in RPCS.items() if any(kind == "GET" for kind, _ in rest_bindings(method))}
    assert {rpc for rpc in RPCS if is_read(rpc)} == gets | {"/tunery.job.v1.JobService/TailLogs"}


@pytest.mark.parametrize("rpc", RPCS)
async def test_native_calls(gateway: Gateway, upstreams: Upstreams, reader: str, rpc: str) -> None:
    method = RPCS[rpc]
    make = {
        (False, False): gateway.channel.unary_unary,
        (False, True): gateway.channel.unary_stream,
        (True, False): gateway.channel.stream_unary,
    }[(method.client_streaming, method.server_streaming)]
    request = iter([b""]) if method.client_streaming else b""
    call = make(rpc)(request, metadata=(("authorization", f"Bearer {reader}"),))

    if is_read(rpc):
        assert await call.code() == grpc.StatusCode.OK
        return
    assert await call.code() == grpc.StatusCode.PERMISSION_DENIED
    assert await call.details() == "The API key has no scope `write`, which this call needs."
    assert upstreams.calls == []


@pytest.mark.parametrize(
    ("rpc", "binding"), [(rpc, each) for rpc, method in RPCS.items() for each in rest_bindings(method)]
)
async def test_rest_calls(
    gateway: Gateway, upstreams: Upstreams, reader: str, rpc: str, binding: tuple[str, str]
) -> None:
    kind, template = binding
    path = re.sub(r"\{\w+(=\*\*)?\}", "x", template)

    answer = await gateway.client.request(kind, path, headers={"authorization": f"Bearer {reader}"})

    if is_read(rpc):
        assert answer.status_code == 200
        return
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "forbidden")
    assert error["message"] == "The API key has no scope `write`, which this call needs."
    assert upstreams.calls == []


async def test_keys_over_rest(gateway: Gateway) -> None:
    made = await gateway.client.post(KEYS, json={"name": "ci", "scopes": ["write"]})
    assert made.status_code == 201
    key = made.json()["key"]
    assert (key["name"], key["scopes"]) == ("ci", ["read", "write"])
    listed = (await gateway.client.get(KEYS)).json()["data"]
    assert listed[0] == {**listed[0], "id": FIRST_KEY[:11], "scopes": ["read", "write", "admin"]}
    assert listed[-1] == key
    assert made.json()["api_key"] not in json.dumps(listed)

    gone = await gateway.client.delete(f"{KEYS}/{key['id']}")

    assert (gone.status_code, gone.content) == (204, b"")
    again = await gateway.client.delete(f"{KEYS}/{key['id']}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")
    own = await gateway.client.delete(f"{KEYS}/{FIRST_KEY[:11]}")
    assert (own.status_code, own.json()["error"]["code"]) == (409, "conflict")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        '{"name": "x"}',
        '{"scopes": ["read"]}',
        '{"name": "x", "scopes": "read"}',
        '{"name": "x", "scopes": ["root"]}',
        '{"name": "x", "scopes": []}',
        '{"name": "x", "scopes": ["read"], "admin": true}',
        '{"name": "x", "scopes": ["read"], "account_id": null}',
        '{"name": "x", "scopes": ["read"], "scopes": ["admin"]}',
    ],
)
async def test_a_key_that_is_asked_for_wrongly(gateway: Gateway, body: str) -> None:
    before = (await gateway.client.get(KEYS)).json()

    answer = await gateway.client.post(KEYS, content=body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert (await gateway.client.get(KEYS)).json() == before
