"""Runs job_svc: reads the environment, opens connections, serves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from job_svc.change_feed import ChangeFeed
from job_svc.credits import CreditLedger, Price
from job_svc.job_data_client import JobDataClient
from job_svc.job_files import JobFiles
from job_svc.jobs import Jobs
from job_svc.lease_queue import LeaseQueue
from job_svc.log_stream import LogStream
from job_svc.models import Models
from job_svc.servicer import CreditServicer, FineTuningServicer, JobServicer, ModelServicer
from job_svc.settings import JobSettings
from job_svc.stack_servicer import (
    CreditAccountServicer,
    JobLifeServicer,
    ModelArtifactServicer,
    WorkerServicer,
)
from job_svc.sweeper import Sweeper
from job_svc.tables import metadata
from job_svc.validation import Validator
from svc_kit.catalog import load_catalog
from svc_kit.database import Database, migrate
from svc_kit.identity import Issuer, Kind, Verifier
from svc_kit.log import configure_log
from svc_kit.object_store import ObjectStore
from svc_kit.open_streams import OpenStreams
from svc_kit.server import ServedService, connect, make_server, serve
from svc_kit.settings import read_environment
from tunery.account.v1 import account_service_pb2_grpc  # noqa: F401  # described by reflection
from tunery.dataset.v1 import dataset_service_pb2_grpc  # noqa: F401  # described by reflection
from tunery.inference.v1 import chat_service_pb2_grpc  # noqa: F401  # described by reflection
from tunery.job.v1 import (
    credit_service_pb2_grpc,
    fine_tuning_service_pb2_grpc,
    job_service_pb2_grpc,
    model_service_pb2_grpc,
)
from tunery.trainer.v1 import worker_service_pb2_grpc

log = structlog.get_logger(__name__)

# The gateway sends all reflection here, so it describes the other services' public rpcs too.
REFLECTED = (
    "tunery.account.v1.AccountService",
    "tunery.dataset.v1.DatasetService",
    "tunery.inference.v1.ChatService",
)


async def main(settings: JobSettings) -> None:
    """Serves until told to stop."""
    url = settings.database_url.get_secret_value()
    await asyncio.to_thread(migrate, url, Path(__file__).with_name("migrations"), metadata)
    database = Database(url)
    store = ObjectStore(settings)
    catalog = load_catalog(settings.catalog_file)
    price = Price(settings.credits_per_million_tokens)
    feed = ChangeFeed(database)
    dataset_channel = connect(settings.dataset_svc_address, settings.tls)
    issuer = Issuer.load("job_svc", settings.identity_dir)
    job_data = JobDataClient(dataset_channel, issuer)
    authz_channel = connect(settings.authz_address, settings.tls)
    streams = OpenStreams(authz_channel, issuer)

    jobs = Jobs(database, feed, job_data, catalog, price, settings.max_live_jobs)
    logs = LogStream(database, feed, settings.max_open_tails)
    sweeper = Sweeper(database, feed, store)
    models = Models(database, sweeper)
    files = JobFiles(jobs, logs, store)
    ledger = CreditLedger(database)
    queue = LeaseQueue(
        database, feed, price, settings.lease_seconds, settings.max_retries, settings.max_running_jobs
    )
    validator = Validator(database, feed, job_data, price)

    account: frozenset[Kind] = frozenset({"account"})
    services = [
        ServedService(
            "tunery.job.v1.JobService",
            JobServicer(jobs, models, logs),
            job_service_pb2_grpc.add_JobServiceServicer_to_server,
            account,
        ),
        ServedService(
            "tunery.job.v1.FineTuningService",
            FineTuningServicer(jobs, logs, files, settings.public_url),
            fine_tuning_service_pb2_grpc.add_FineTuningServiceServicer_to_server,
            account,
        ),
        ServedService(
            "tunery.job.v1.ModelService",
            ModelServicer(models, files, catalog),
            model_service_pb2_grpc.add_ModelServiceServicer_to_server,
            account,
        ),
        ServedService(
            "tunery.job.v1.CreditService",
            CreditServicer(ledger),
            credit_service_pb2_grpc.add_CreditServiceServicer_to_server,
            account,
        ),
        ServedService(
            "tunery.trainer.v1.WorkerService",
            WorkerServicer(queue),
            worker_service_pb2_grpc.add_WorkerServiceServicer_to_server,
            frozenset({"trainer"}),
        ),
        ServedService(
            "tunery.job.v1.JobLifeService",
            JobLifeServicer(jobs),
            job_service_pb2_grpc.add_JobLifeServiceServicer_to_server,
            frozenset({"dataset_svc"}),
        ),
        ServedService(
            "tunery.job.v1.ModelArtifactService",
            ModelArtifactServicer(models),
            model_service_pb2_grpc.add_ModelArtifactServiceServicer_to_server,
            frozenset({"inference_svc"}),
        ),
        ServedService(
            "tunery.job.v1.CreditAccountService",
            CreditAccountServicer(ledger),
            credit_service_pb2_grpc.add_CreditAccountServiceServicer_to_server,
            frozenset({"authz"}),
        ),
    ]
    server, health = make_server(services, Verifier(settings.identity_dir), REFLECTED, streams)
    background = [feed.run(), validator.run(), queue.reap(), sweeper.run(), streams.run()]
    await serve(server, health, settings.listen, background, tls=settings.tls)
    await dataset_channel.close()
    await authz_channel.close()
    await database.close()


if __name__ == "__main__":
    settings = read_environment(JobSettings)
    configure_log("job_svc", settings.log_level)
    asyncio.run(main(settings))
