"""Runs dataset_svc: reads the environment, opens connections, serves."""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path

from dataset_svc.data_sources import DataSources
from dataset_svc.dataset_reports import DatasetReports
from dataset_svc.datasets import Datasets, Limits
from dataset_svc.job_data import JobData
from dataset_svc.servicer import DatasetServicer, JobDataServicer
from dataset_svc.settings import DatasetSettings
from dataset_svc.tables import metadata
from dataset_svc.uploads import Uploads
from svc_kit.catalog import load_catalog
from svc_kit.database import Database, migrate
from svc_kit.identity import Issuer, Verifier
from svc_kit.log import configure_log
from svc_kit.object_store import ObjectStore
from svc_kit.server import ServedService, connect, make_server, serve
from svc_kit.settings import read_environment
from tunery.dataset.v1 import dataset_service_pb2_grpc, job_data_service_pb2_grpc
from tunery.job.v1.job_service_pb2_grpc import JobLifeServiceStub


async def main(settings: DatasetSettings) -> None:
    """Serves until told to stop."""
    url = settings.database_url.get_secret_value()
    await asyncio.to_thread(migrate, url, Path(__file__).with_name("migrations"), metadata)
    database = Database(url)
    store = ObjectStore(settings)
    await store.wait_and_create_bucket()
    job_channel = connect(settings.job_svc_address, settings.tls)

    datasets = Datasets(
        database,
        store,
        JobLifeServiceStub(job_channel),
        Issuer.load("dataset_svc", settings.identity_dir),
        Limits(settings.max_datasets, settings.max_dataset_bytes),
    )
    uploads = Uploads(datasets, store, settings.max_upload_bytes, settings.max_concurrent_uploads)
    catalog = load_catalog(settings.catalog_file)
    reports = DatasetReports(datasets, store, catalog, settings.models_dir, settings.catalog_file)
    sources = DataSources(settings, datasets, store)
    job_data = JobData(sources, datasets, store, catalog, settings.models_dir)
    services = [
        ServedService(
            "tunery.dataset.v1.DatasetService",
            DatasetServicer(datasets, uploads, reports),
            dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server,
            frozenset({"account"}),
        ),
        ServedService(
            "tunery.dataset.v1.JobDataService",
            JobDataServicer(sources, datasets, job_data),
            job_data_service_pb2_grpc.add_JobDataServiceServicer_to_server,
            frozenset({"job_svc"}),
        ),
    ]
    server, health = make_server(services, Verifier(settings.identity_dir))
    await serve(server, health, settings.listen, [datasets.sweep()], tls=settings.tls)
    await reports.close()
    await job_channel.close()
    await database.close()


def give_back_large_blocks() -> None:
    """Has glibc take large blocks from the kernel one by one, and give each back when it is freed.

    By itself it stops doing so after the first was freed. The buffers of uploads, of many threads and of
    sizes of every kind, then leave gaps in its heaps: a third more memory, which grows for a long time.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, which has its own ways
    mmap_threshold, its_default = -3, 128 * 1024
    mallopt(mmap_threshold, its_default)


if __name__ == "__main__":
    give_back_large_blocks()
    settings = read_environment(DatasetSettings)
    configure_log("dataset_svc", settings.log_level)
    asyncio.run(main(settings))
