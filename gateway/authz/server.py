"""The auth check's server: a service for Envoy, one for accounts, one for the stack's own."""

from __future__ import annotations

import grpc
from envoy.service.auth.v3 import external_auth_pb2_grpc
from grpc_health.v1 import health, health_pb2_grpc

from gateway.authz.accounts import Accounts
from gateway.authz.servicer import AccountServicer, AuthorizationServicer, KeyServicer
from svc_kit.identity import Identity, Kind, Verifier
from svc_kit.interceptors import ServingInterceptor
from svc_kit.server import SERVER_OPTIONS
from tunery.account.v1 import account_service_pb2_grpc, key_service_pb2_grpc

_CHECK_SERVICE = "envoy.service.auth.v3.Authorization"


class AuthzInterceptor(ServingInterceptor):
    """Lets Envoy's question in without a token: it is what tokens come from.

    A check that fails is answered with its error's status, and Envoy then lets nobody in (503).
    """

    def _admit(self, service: str, authorization: str) -> Identity:
        if service == _CHECK_SERVICE:
            return Identity(kind="authz", subject="envoy")
        return super()._admit(service, authorization)


def make_authz_server(
    accounts: Accounts, verifier: Verifier
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """Makes the server; it listens nowhere yet. `svc_kit.server.serve` runs it.

    It is no place for clients: whoever reaches the check directly can try keys without the gateway's limits.
    """
    allow: dict[str, frozenset[Kind]] = {
        "tunery.account.v1.AccountService": frozenset({"account"}),
        "tunery.account.v1.KeyService": frozenset({"job_svc", "inference_svc"}),
    }
    interceptor = AuthzInterceptor(verifier, allow)
    server = grpc.aio.server(
        interceptors=[interceptor],
        options=SERVER_OPTIONS,
    )
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    external_auth_pb2_grpc.add_AuthorizationServicer_to_server(AuthorizationServicer(accounts), server)
    account_service_pb2_grpc.add_AccountServiceServicer_to_server(AccountServicer(accounts), server)
    key_service_pb2_grpc.add_KeyServiceServicer_to_server(KeyServicer(accounts), server)
    return server, health_servicer
