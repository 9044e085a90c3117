"""The ledger, on both databases."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from svc_kit.ids import new_id
from tunery.job.v1 import credit_service_pb2, job_service_pb2
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

from .conftest import Metadata, Services
from .test_worker_protocol import completed, end, lease_of


async def balance(services: Services, account: Metadata) -> float:
    """Returns the balance, after checking that it is the entries' sum."""
    credits = await services.credits.GetCredits(credit_service_pb2.GetCreditsRequest(), metadata=account)
    entries = await services.credits.ListCreditEntries(
        credit_service_pb2.ListCreditEntriesRequest(), metadata=account
    )
    assert credits.balance == pytest.approx(sum(entry.amount for entry in entries.data))
    return credits.balance


async def cancel_all(services: Services, account: Metadata) -> None:
    for job in (await services.jobs.ListJobs(job_service_pb2.ListJobsRequest(), metadata=account)).data:
        await services.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job.id), metadata=account)


async def open_account(services: Services, credits: float | None) -> Metadata:
    account_id = new_id("acct")
    request = credit_service_pb2.OpenCreditAccountRequest(account_id=account_id, credits=credits)
    for _ in range(2):  # idempotent
        await services.credit_accounts.OpenCreditAccount(request, metadata=services.process("authz"))
    return services.account(account_id)


async def test_a_hold_is_settled_by_what_was_trained(services: Services) -> None:
    account = await open_account(services, 100)
    job = await services.new_job(account)
    held = await balance(services, account)
    assert held < 100
    lease = await lease_of(services, job, new_id("trainer"))
    await end(services, lease, completed=completed(lease, tokens_trained=50))
    assert await balance(services, account) == pytest.approx(100 - 0.05)


async def test_a_job_that_took_more_than_was_held_is_charged_in_full(services: Services) -> None:
    account = await open_account(services, 100)
    job = await services.new_job(account)
    assert 98 < await balance(services, account) < 100
    lease = await lease_of(services, job, new_id("trainer"))
    await end(services, lease, completed=completed(lease, tokens_trained=30_000))
    assert await balance(services, account) == pytest.approx(100 - 30)


async def test_a_charge_never_takes_the_balance_below_zero(services: Services) -> None:
    account = await open_account(services, 100)
    job = await services.new_job(account)
    lease = await lease_of(services, job, new_id("trainer"))
    await end(services, lease, completed=completed(lease, tokens_trained=1e9))
    assert await balance(services, account) == 0


async def test_a_failed_job_costs_nothing(services: Services) -> None:
    account = await open_account(services, 100)
    job = await services.new_job(account)
    lease = await lease_of(services, job, new_id("trainer"))
    await end(services, lease, failed=worker_pb2.Failed(message="bad", fault="job"))
    assert await balance(services, account) == 100


async def test_a_job_cancelled_in_the_queue_costs_nothing(services: Services) -> None:
    account = await open_account(services, 100)
    job = await services.new_job(account)
    await services.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job.id), metadata=account)
    assert await balance(services, account) == 100


async def test_too_few_credits_make_no_job(services: Services) -> None:
    account = await open_account(services, 0.001)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.new_job(account)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    jobs = await services.jobs.ListJobs(job_service_pb2.ListJobsRequest(), metadata=account)
    assert jobs.total == 0
    assert await balance(services, account) == pytest.approx(0.001)


async def test_the_same_credits_are_not_spent_twice(services: Services) -> None:
    """The balance is enough for one of the jobs that are made at the same time."""
    account = await open_account(services, 100)
    await services.new_job(account)
    cost = 100 - await balance(services, account)
    poor = await open_account(services, cost * 1.5)
    made = await asyncio.gather(*(services.new_job(poor) for _ in range(6)), return_exceptions=True)
    assert sum(not isinstance(job, Exception) for job in made) == 1
    assert await balance(services, poor) >= 0
    for owner in (account, poor):
        await cancel_all(services, owner)


async def test_an_account_without_a_balance_pays_nothing(services: Services) -> None:
    account = await open_account(services, None)
    credits = await services.credits.GetCredits(credit_service_pb2.GetCreditsRequest(), metadata=account)
    assert not credits.HasField("balance")
    job = await services.new_job(account)
    await services.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job.id), metadata=account)


async def test_the_ledger_in_pages(services: Services) -> None:
    account = await open_account(services, 100)
    for _ in range(2):
        await services.new_job(account)

    async def page(**wanted: int) -> list[float]:
        request = credit_service_pb2.ListCreditEntriesRequest(**wanted)
        answer = await services.credits.ListCreditEntries(request, metadata=account)
        return [entry.amount for entry in answer.data]

    everything = await page()
    assert len(everything) == 3
    assert everything[0] == 100
    assert await page(limit=2) == everything[:2]
    assert await page(limit=2, offset=2) == everything[2:]
    assert await page(offset=3) == []
    for wanted in ({"limit": 0}, {"limit": 10_001}, {"limit": -1}, {"offset": -1}):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await page(**wanted)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await cancel_all(services, account)
