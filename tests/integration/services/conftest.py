"""dataset_svc and job_svc as real processes, on each database; the tests are their clients and trainers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from svc_kit.identity import Issuer, write_identity_keys
from svc_kit.ids import new_id
from svc_kit.settings import ObjectStoreSettings
from tests.conftest import new_postgres_database, wait_until
from tunery.dataset.v1 import dataset_pb2, dataset_service_pb2, dataset_service_pb2_grpc
from tunery.job.v1 import (
    credit_service_pb2_grpc,
    fine_tuning_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2_grpc,
)
from tunery.ports import free_ports
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2
from tunery.trainer.v1 import worker_service_pb2_grpc

Metadata = tuple[tuple[str, str], ...]


@dataclass
class Services:
    """The running processes and how to call them.

    Attributes:
        environment: what every service is told.
        dataset_address: of dataset_svc.
        job_address: of job_svc.
        identity_dir: keys of every issuer.
    """

    environment: dict[str, str]
    dataset_address: str
    job_address: str
    identity_dir: Path
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    def channel(self, address: str) -> grpc.aio.Channel:
        if address not in self.channels:
            self.channels[address] = grpc.aio.insecure_channel(address)
        return self.channels[address]

    @property
    def datasets(self) -> dataset_service_pb2_grpc.DatasetServiceStub:
        return dataset_service_pb2_grpc.DatasetServiceStub(self.channel(self.dataset_address))

    @property
    def jobs(self) -> job_service_pb2_grpc.JobServiceStub:
        return job_service_pb2_grpc.JobServiceStub(self.channel(self.job_address))

    @property
    def fine_tuning(self) -> fine_tuning_service_pb2_grpc.FineTuningServiceStub:
        return fine_tuning_service_pb2_grpc.FineTuningServiceStub(self.channel(self.job_address))

    @property
    def models(self) -> model_service_pb2_grpc.ModelServiceStub:
        return model_service_pb2_grpc.ModelServiceStub(self.channel(self.job_address))

    @property
    def credits(self) -> credit_service_pb2_grpc.CreditServiceStub:
        return credit_service_pb2_grpc.CreditServiceStub(self.channel(self.job_address))

    @property
    def credit_accounts(self) -> credit_service_pb2_grpc.CreditAccountServiceStub:
        return credit_service_pb2_grpc.CreditAccountServiceStub(self.channel(self.job_address))

    @property
    def worker(self) -> worker_service_pb2_grpc.WorkerServiceStub:
        return worker_service_pb2_grpc.WorkerServiceStub(self.channel(self.job_address))

    def account(self, account_id: str | None = None) -> Metadata:
        """Returns a caller's metadata: an account's."""
        token = Issuer.load("account", self.identity_dir).issue(
            account_id or new_id("acct"), ("read", "write")
        )
        return (("authorization", f"Bearer {token}"),)

    def process(self, kind: str) -> Metadata:
        """Returns a caller's metadata: a process's of the stack."""
        return Issuer.load(kind, self.identity_dir).own_metadata()  # type: ignore[arg-type]  # one of KINDS

    async def upload(
        self, account: Metadata, text: str, file_name: str = "rows.csv", name: str | None = None
    ) -> dataset_pb2.Dataset:
        data = text.encode()
        request = dataset_service_pb2.UploadDatasetRequest
        parts = [
            request(
                header=dataset_service_pb2.UploadHeader(file_name=file_name, name=name, size_bytes=len(data))
            ),
            request(chunk=data),
        ]
        return await self.datasets.UploadDataset(iter(parts), metadata=account)

    async def new_job(self, account: Metadata, **settings: float) -> job_pb2.Job:
        """Makes a job on a small dataset of its own."""
        dataset = await self.upload(account, "question,answer\n" + "".join(f"q{i},a{i}\n" for i in range(10)))
        request = job_service_pb2.CreateJobRequest(
            base_model="tunery-tiny",
            dataset_id=dataset.id,
            task_type="qa",
            hyperparameters=job_pb2.Hyperparameters(**settings),
        )
        return await self.jobs.CreateJob(request, metadata=account)

    @contextmanager
    def running(self, module: str, folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """Runs one of the processes for the block's time; its database and its log are in the folder."""
        listen = {"dataset_svc": self.dataset_address, "job_svc": self.job_address}.get(module, "127.0.0.1:0")
        settings = {"TUNERY_DATABASE_URL": f"sqlite+aiosqlite:///{folder}/{module}.sqlite"}
        settings |= self.environment | environment
        log = folder / f"{module}.log"
        log.unlink(missing_ok=True)  # of a process before this one
        with running(module, listen, settings, log) as process:
            yield process

    async def close(self) -> None:
        for channel in self.channels.values():
            await channel.close()
        self.channels.clear()

    async def lease(self, trainer_id: str, wait_seconds: float = 10) -> worker_pb2.Lease | None:
        request = worker_pb2.LeaseJobRequest(trainer_id=trainer_id, wait_seconds=wait_seconds)
        response = await self.worker.LeaseJob(request, metadata=self.process("trainer"))
        return response.lease if response.HasField("lease") else None


@contextmanager
def running(
    module: str, listen: str, environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a service for the block's time, from when it serves."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stderr=file,
            env={**os.environ, **environment, "TUNERY_LISTEN": listen},
        )
    try:
        wait_until(
            lambda: '"serving"' in log.read_text() or process.poll() is not None, 30, f"{module}, {log}"
        )
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.terminate()
        process.wait(15)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def service_processes(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    embedded_s3: ObjectStoreSettings,
) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp(request.param)
    identity_dir = folder / "identity"
    write_identity_keys(identity_dir)
    dataset_port, job_port = free_ports(2)
    environment = {
        "TUNERY_IDENTITY_DIR": str(identity_dir),
        "TUNERY_S3_ENDPOINT": embedded_s3.s3_endpoint,
        "TUNERY_S3_ACCESS_KEY": embedded_s3.s3_access_key.get_secret_value(),
        "TUNERY_S3_SECRET_KEY": embedded_s3.s3_secret_key.get_secret_value(),
        "TUNERY_S3_BUCKET": f"services-{request.param}",
        "TUNERY_DATASET_SVC_ADDRESS": f"127.0.0.1:{dataset_port}",
        "TUNERY_JOB_SVC_ADDRESS": f"127.0.0.1:{job_port}",
        "TUNERY_AUTHZ_ADDRESS": "127.0.0.1:1",  # nobody
        "TUNERY_PUBLIC_URL": "http://gateway.test",
        "TUNERY_MODELS_DIR": str(tmp_path_factory.getbasetemp() / "models"),  # empty at first
        "TUNERY_LEASE_SECONDS": "4",
    }
    if request.param == "postgresql":
        environment["TUNERY_DATABASE_URL"] = new_postgres_database(request.getfixturevalue("postgres_url"))
    services = Services(
        environment,
        environment["TUNERY_DATASET_SVC_ADDRESS"],
        environment["TUNERY_JOB_SVC_ADDRESS"],
        identity_dir,
    )

    with services.running("dataset_svc", folder), services.running("job_svc", folder):
        yield services


def own_services(shared: Services, **environment: str) -> Services:
    """Returns services with addresses, a bucket and some settings of their own; none of them runs yet."""
    dataset_address, job_address = (f"127.0.0.1:{port}" for port in free_ports(2))
    own = {
        "TUNERY_DATASET_SVC_ADDRESS": dataset_address,
        "TUNERY_JOB_SVC_ADDRESS": job_address,
        "TUNERY_S3_BUCKET": new_id("own"),
    }
    return Services(shared.environment | own | environment, dataset_address, job_address, shared.identity_dir)


@pytest.fixture
async def services(service_processes: Services) -> AsyncIterator[Services]:
    yield service_processes
    await service_processes.close()
