"""Opens credit accounts at job_svc, in the auth check's own name."""

from __future__ import annotations

import grpc

from svc_kit.identity import Issuer
from tunery.job.v1 import credit_service_pb2, credit_service_pb2_grpc

_SECONDS = 10


class JobServiceCreditAccounts:
    """`accounts.CreditAccounts` over gRPC."""

    def __init__(self, channel: grpc.aio.Channel, issuer: Issuer) -> None:
        self._stub = credit_service_pb2_grpc.CreditAccountServiceStub(channel)
        self._issuer = issuer

    async def open(self, account_id: str, credits: float | None) -> None:
        """Opens a credit account. Idempotent per account. A job_svc that is starting again is waited for.

        Raises:
            grpc.aio.AioRpcError: job_svc refused or can't be reached; the interceptor knows how to show it.
        """
        request = credit_service_pb2.OpenCreditAccountRequest(account_id=account_id, credits=credits)
        await self._stub.OpenCreditAccount(
            request, metadata=self._issuer.own_metadata(), timeout=_SECONDS, wait_for_ready=True
        )
