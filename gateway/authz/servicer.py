"""Envoy's auth check, and the account service."""

from __future__ import annotations

import base64
import re

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from envoy.type.v3 import http_status_pb2
from google.rpc import code_pb2, status_pb2

from gateway.authz.accounts import HOW_TO, Accounts
from svc_kit.errors import Unauthenticated
from svc_kit.identity import current_identity
from svc_kit.interceptors import to_status
from tunery.account.v1 import account_service_pb2, account_service_pb2_grpc

# RFC 6750's form of a token. Envoy joins repeated headers with a comma, which is none of these.
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)


def _header(key: str, value: str) -> base_pb2.HeaderValueOption:
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=key, value=value),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _bearer_token(authorization: str | None) -> str:
    if not authorization:
        raise Unauthenticated(f"The call carries no API key. {HOW_TO}")
    match = _BEARER.fullmatch(authorization)
    if match is None:
        raise Unauthenticated(f"The Authorization header is not one bearer token. {HOW_TO}")
    return match[1]


def _allowed(token: str) -> external_auth_pb2.CheckResponse:
    """Lets a call go on with an identity in the key's place: services never see a key."""
    return external_auth_pb2.CheckResponse(
        status=status_pb2.Status(code=code_pb2.OK),
        ok_response=external_auth_pb2.OkHttpResponse(headers=[_header("authorization", f"Bearer {token}")]),
    )


def _denied(error: Unauthenticated, *, is_grpc: bool) -> external_auth_pb2.CheckResponse:
    headers = [_header("www-authenticate", "Bearer")]
    if is_grpc:
        # Envoy makes the gRPC status itself, without the details by which clients tell errors apart.
        headers += [_header(key, _base64(value)) for key, value in to_status(error).trailing_metadata]
    return external_auth_pb2.CheckResponse(
        status=status_pb2.Status(code=code_pb2.UNAUTHENTICATED, message=error.message),
        denied_response=external_auth_pb2.DeniedHttpResponse(
            status=http_status_pb2.HttpStatus(code=http_status_pb2.Unauthorized),
            headers=headers,
            body=error.message,
        ),
    )


def _base64(value: str | bytes) -> str:
    assert isinstance(value, bytes), "a -bin header"
    return base64.b64encode(value).rstrip(b"=").decode()


class AuthorizationServicer(external_auth_pb2_grpc.AuthorizationServicer):
    """Answers Envoy's question whether a call may go on."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def Check(
        self, request: external_auth_pb2.CheckRequest, context: grpc.aio.ServicerContext
    ) -> external_auth_pb2.CheckResponse:
        headers = request.attributes.request.http.headers
        try:
            token = await self._accounts.identity_token(_bearer_token(headers.get("authorization")))
        except Unauthenticated as error:
            is_grpc = headers.get("content-type", "").startswith("application/grpc")
            return _denied(error, is_grpc=is_grpc)
        return _allowed(token)


class AccountServicer(account_service_pb2_grpc.AccountServiceServicer):
    """tunery.account.v1.AccountService."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def CreateAccount(
        self, request: account_service_pb2.CreateAccountRequest, context: grpc.aio.ServicerContext
    ) -> account_service_pb2.CreateAccountResponse:
        credits = request.credits if request.HasField("credits") else None
        made = await self._accounts.create(current_identity(), request.name, credits)
        return account_service_pb2.CreateAccountResponse(account_id=made.account_id, api_key=made.api_key)
