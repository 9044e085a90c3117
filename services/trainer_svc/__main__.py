"""Runs trainer_svc: reads the environment, opens connections, works."""

from __future__ import annotations

import asyncio

from svc_kit.catalog import load_catalog
from svc_kit.identity import Issuer, Verifier
from svc_kit.log import configure_log
from svc_kit.object_store import ObjectStore
from svc_kit.server import connect, make_server, serve
from svc_kit.settings import read_environment
from trainer_svc.event_reporter import JobServiceClient
from trainer_svc.probes import Probes
from trainer_svc.settings import TrainerSettings
from trainer_svc.worker import Worker
from tunery.trainer.v1.worker_service_pb2_grpc import WorkerServiceStub


async def main(settings: TrainerSettings) -> None:
    """Works until told to stop. The server only answers for the trainer's health."""
    channel = connect(settings.job_svc_address, settings.tls)
    issuer = Issuer.load("trainer", settings.identity_dir)
    worker = Worker(
        settings.trainer_id,
        JobServiceClient(WorkerServiceStub(channel), issuer),
        ObjectStore(settings),
        load_catalog(settings.catalog_file),
        settings.models_dir,
        Probes(settings.models_dir),
        settings.work_dir,
        settings.drain_seconds,
    )
    server, health = make_server([], Verifier(settings.identity_dir))
    await serve(server, health, settings.listen, [worker.run()], tls=settings.tls)
    await channel.close()


if __name__ == "__main__":
    settings = read_environment(TrainerSettings)
    configure_log("trainer_svc", settings.log_level)
    asyncio.run(main(settings))
