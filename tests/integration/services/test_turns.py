"""Whose job is taken next: accounts take turns, and inside an account the highest priority goes first."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from svc_kit.database import Database
from svc_kit.ids import new_id
from tests.conftest import new_postgres_database
from tunery.job.v1 import job_pb2, job_service_pb2
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

from .conftest import Metadata, Services, own_services
from .test_worker_protocol import end


async def new_jobs(services: Services, account: Metadata, *priorities: int) -> list[str]:
    """Makes jobs on one dataset, and waits until each is queued."""
    dataset = await services.upload(account, "question,answer\nq,a\n")
    made = []
    for priority in priorities:
        request = job_service_pb2.CreateJobRequest(
            base_model="tunery-tiny",
            dataset_id=dataset.id,
            task_type="qa",
            priority=priority,
            hyperparameters=job_pb2.Hyperparameters(epochs=1),
        )
        made.append((await services.jobs.CreateJob(request, metadata=account)).id)
    for job_id in made:
        tail = services.jobs.TailLogs(job_service_pb2.TailLogsRequest(job_id=job_id), metadata=account)
        async for record in tail:
            if record.message.endswith("job queued"):
                break
        tail.cancel()
    return made


async def take_all(services: Services, num_jobs: int, *, one_by_one: bool) -> list[str]:
    """Leases so many jobs, ending each at once or only after the last."""
    leases: list[worker_pb2.Lease] = []
    for _ in range(num_jobs):
        lease = await services.lease(new_id("trainer"))
        assert lease is not None
        leases.append(lease)
        if one_by_one:
            await end_one(services, lease)
    if not one_by_one:
        for lease in leases:
            await end_one(services, lease)
    return [lease.job_id for lease in leases]


async def end_one(services: Services, lease: worker_pb2.Lease) -> None:
    await end(services, lease, failed=worker_pb2.Failed(message="enough", fault="job"))


async def test_one_accounts_flood_does_not_starve_another(services: Services) -> None:
    flood = await new_jobs(services, services.account(), *[0] * 6)
    few = await new_jobs(services, services.account(), 0, 0)
    taken = await take_all(services, 8, one_by_one=True)
    assert [job_id for job_id in taken if job_id in flood] == flood
    assert [job_id for job_id in taken if job_id in few] == few
    # In turns: the last of the few comes no later than fourth.
    assert taken.index(few[-1]) <= 3


async def test_the_account_with_fewest_running_jobs_is_next(services: Services) -> None:
    first, second = services.account(), services.account()
    flood = await new_jobs(services, first, *[0] * 4)
    taken = await take_all(services, 1, one_by_one=True)
    busy = [await services.lease(new_id("trainer")) for _ in range(2)]
    other = await new_jobs(services, second, 0)
    taken += await take_all(services, 2, one_by_one=True)
    assert taken == [flood[0], other[0], flood[3]]
    for lease in busy:
        assert lease is not None
        await end_one(services, lease)


async def test_the_highest_priority_of_an_account_goes_first(services: Services) -> None:
    low, middle, high, also_high = await new_jobs(services, services.account(), -5, 0, 7, 7)
    assert await take_all(services, 4, one_by_one=False) == [high, also_high, middle, low]


async def test_a_jobs_priority_is_shown_and_bounded(services: Services) -> None:
    account = services.account()
    [job_id] = await new_jobs(services, account, 3)
    request = job_service_pb2.GetJobDetailsRequest(job_id=job_id)
    assert (await services.jobs.GetJobDetails(request, metadata=account)).priority == 3
    await take_all(services, 1, one_by_one=True)


@pytest.mark.parametrize("service_processes", ["postgresql"], indirect=True)
async def test_an_account_whose_job_another_has_locked_is_passed_over(services: Services) -> None:
    """By a replica that has come to a halt, say: the others' jobs don't wait for it."""
    locked = await new_jobs(services, services.account(), 0)
    free = await new_jobs(services, services.account(), 0)
    url = services.environment["TUNERY_DATABASE_URL"].replace("+psycopg", "")
    with psycopg.connect(url) as halted:
        halted.execute("SELECT id FROM jobs WHERE id = %s FOR UPDATE", locked)
        async with asyncio.timeout(20):
            assert await take_all(services, 1, one_by_one=True) == free
    assert await take_all(services, 1, one_by_one=True) == locked


@pytest.mark.parametrize("service_processes", ["postgresql"], indirect=True)
async def test_trainers_that_ask_at_once_keep_to_the_limit(
    service_processes: Services, postgres_url: str, tmp_path: Path
) -> None:
    services = own_services(
        service_processes,
        TUNERY_MAX_RUNNING_JOBS="1",
        TUNERY_DATABASE_URL=new_postgres_database(postgres_url),
    )
    with services.running("dataset_svc", tmp_path), services.running("job_svc", tmp_path):
        waiting = await new_jobs(services, services.account(), *[0] * 5)
        for _ in range(len(waiting)):
            asked = [services.lease(new_id("trainer"), wait_seconds=0.2) for _ in range(8)]
            [lease] = [lease for lease in await asyncio.gather(*asked) if lease is not None]
            await end_one(services, lease)
        await services.close()


async def test_what_a_halted_process_holds_in_postgresql_is_freed(postgres_url: str) -> None:
    url = sa.make_url(new_postgres_database(postgres_url)).update_query_dict(
        {"options": "-c statement_timeout=7s"}
    )
    database = Database(url.render_as_string(hide_password=False))
    async with database.write() as connection:
        for setting, expected in (
            ("idle_in_transaction_session_timeout", "10s"),
            ("lock_timeout", "8s"),
            ("statement_timeout", "7s"),  # of the operator's own
        ):
            assert await connection.scalar(sa.text(f"SHOW {setting}")) == expected
    await database.close()
