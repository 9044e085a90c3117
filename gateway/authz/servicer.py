"""Envoy's auth check, and the account service."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from envoy.type.v3 import http_status_pb2
from google.api import httpbody_pb2
from google.protobuf import empty_pb2, struct_pb2, timestamp_pb2
from google.rpc import code_pb2, status_pb2

from gateway.authz.accounts import HOW_TO, Accounts, Admission
from gateway.authz.api_keys import ApiKey
from gateway.errors import details_headers
from svc_kit.errors import InvalidRequest, Unauthenticated
from svc_kit.idempotency import HEADER, idempotency_key
from svc_kit.identity import current_identity
from svc_kit.rest_answers import CREATED, NO_CONTENT
from svc_kit.strict_json import StrictBody, parse_json_object, validate
from tunery.account.v1 import account_service_pb2 as account_pb2
from tunery.account.v1 import account_service_pb2_grpc, key_service_pb2, key_service_pb2_grpc

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


def _allowed(admission: Admission) -> external_auth_pb2.CheckResponse:
    """Lets a call go on with an identity in the key's place: services never see a key.

    Its metadata is for the gateway's limit of requests and for gateway/auth_cache.lua.
    """
    authorization = f"Bearer {admission.token}"
    metadata = struct_pb2.Struct()
    metadata.update(
        {"account": admission.account_id, "authorization": authorization, "seconds": admission.seconds}
    )
    return external_auth_pb2.CheckResponse(
        status=status_pb2.Status(code=code_pb2.OK),
        ok_response=external_auth_pb2.OkHttpResponse(headers=[_header("authorization", authorization)]),
        dynamic_metadata=metadata,
    )


def _denied(error: Unauthenticated, *, is_grpc: bool) -> external_auth_pb2.CheckResponse:
    headers = [_header("www-authenticate", "Bearer")]
    if is_grpc:
        headers += [_header(key, value) for key, value in details_headers(error).items()]
    return external_auth_pb2.CheckResponse(
        status=status_pb2.Status(code=code_pb2.UNAUTHENTICATED, message=error.message),
        denied_response=external_auth_pb2.DeniedHttpResponse(
            status=http_status_pb2.HttpStatus(code=http_status_pb2.Unauthorized),
            headers=headers,
            body=error.message,
        ),
    )


def _refuse_idempotency_key(context: Any) -> None:
    """A key is shown once and then kept as a hash, so it can't be shown again to whoever asks again."""
    if idempotency_key(context) is not None:
        raise InvalidRequest(
            f"`{HEADER}` has no effect where an API key is made; leave it out, and revoke a key made twice.",
            field=HEADER,
        )


class AuthorizationServicer(external_auth_pb2_grpc.AuthorizationServicer):
    """Answers Envoy's question whether a call may go on."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def Check(
        self, request: external_auth_pb2.CheckRequest, context: Any
    ) -> external_auth_pb2.CheckResponse:
        headers = request.attributes.request.http.headers
        try:
            admission = await self._accounts.admit(_bearer_token(headers.get("authorization")))
        except Unauthenticated as error:
            is_grpc = headers.get("content-type", "").startswith("application/grpc")
            return _denied(error, is_grpc=is_grpc)
        return _allowed(admission)


class CreateApiKeyBody(StrictBody):
    """CreateApiKeyRequest in JSON."""

    name: str
    scopes: list[str]
    account_id: str | None = None


class AccountServicer(account_service_pb2_grpc.AccountServiceServicer):
    """tunery.account.v1.AccountService."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def CreateAccount(
        self, request: account_pb2.CreateAccountRequest, context: Any
    ) -> account_pb2.CreateAccountResponse:
        _refuse_idempotency_key(context)
        credits = request.credits if request.HasField("credits") else None
        made = await self._accounts.create(current_identity(), request.name, credits)
        return account_pb2.CreateAccountResponse(account_id=made.account_id, api_key=made.api_key)

    async def CreateApiKey(
        self, request: account_pb2.CreateApiKeyRequest, context: Any
    ) -> account_pb2.CreateApiKeyResponse:
        return await self._create_key(request.name, request.scopes, _account_id(request), context)

    async def CreateApiKeyFromJson(
        self, request: httpbody_pb2.HttpBody, context: Any
    ) -> account_pb2.CreateApiKeyResponse:
        body = validate(CreateApiKeyBody, parse_json_object(request.data))
        made = await self._create_key(body.name, body.scopes, body.account_id, context)
        await context.send_initial_metadata(CREATED)
        return made

    async def _create_key(
        self, name: str, scopes: Sequence[str], account_id: str | None, context: Any
    ) -> account_pb2.CreateApiKeyResponse:
        _refuse_idempotency_key(context)
        key, api_key = await self._accounts.create_key(current_identity(), name, scopes, account_id)
        return account_pb2.CreateApiKeyResponse(key=_message(key), api_key=api_key)

    async def ListApiKeys(
        self, request: account_pb2.ListApiKeysRequest, context: Any
    ) -> account_pb2.ApiKeyList:
        found = await self._accounts.list_keys(current_identity(), _account_id(request))
        return account_pb2.ApiKeyList(data=[_message(key) for key in found])

    async def RevokeApiKey(self, request: account_pb2.RevokeApiKeyRequest, context: Any) -> empty_pb2.Empty:
        await self._accounts.revoke_key(current_identity(), request.key_id, _account_id(request))
        await context.send_initial_metadata(NO_CONTENT)
        return empty_pb2.Empty()


class KeyServicer(key_service_pb2_grpc.KeyServiceServicer):
    """tunery.account.v1.KeyService."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def FindRevokedKeys(
        self, request: key_service_pb2.FindRevokedKeysRequest, context: Any
    ) -> key_service_pb2.FindRevokedKeysResponse:
        revoked = await self._accounts.revoked_of({(name.account_id, name.key_id) for name in request.keys})
        return key_service_pb2.FindRevokedKeysResponse(
            revoked=[
                key_service_pb2.KeyName(account_id=account_id, key_id=key_id)
                for account_id, key_id in sorted(revoked)
            ]
        )


def _account_id(request: Any) -> str | None:
    account_id: str | None = request.account_id if request.HasField("account_id") else None
    return account_id


def _message(key: ApiKey) -> account_pb2.ApiKey:
    created_at = timestamp_pb2.Timestamp()
    created_at.FromDatetime(key.created_at)
    return account_pb2.ApiKey(id=key.id, name=key.name, scopes=key.scopes, created_at=created_at)
