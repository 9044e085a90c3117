"""The worker: asks for a job, runs it, asks again."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

import structlog

from svc_kit.catalog import Catalog
from svc_kit.errors import LeaseLost, TuneryError
from svc_kit.log import working_for
from svc_kit.object_store import ObjectStore
from trainer_svc.attempt import Attempt
from trainer_svc.event_reporter import JobServiceClient, send
from trainer_svc.event_spool import SPOOL_FILE, EventSpool
from trainer_svc.probes import Probes
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

log = structlog.get_logger(__name__)

_WAIT_SECONDS = 20.0
_CALL_MARGIN_SECONDS = 5.0
_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_CHECKED_BYTES = 4 * 1024 * 1024
_FULL_DISK_PAUSE_SECONDS = 2.0


class Worker:
    """One slot: one job at a time."""

    def __init__(
        self,
        trainer_id: str,
        client: JobServiceClient,
        store: ObjectStore,
        catalog: Catalog,
        models_dir: Path,
        probes: Probes,
        work_dir: Path,
        drain_seconds: float,
    ) -> None:
        self._trainer_id = trainer_id
        self._client = client
        self._store = store
        self._catalog = catalog
        self._models_dir = models_dir
        self._probes = probes
        self._work_dir = work_dir
        self._drain_seconds = drain_seconds
        self._faults_in_a_row = 0

    async def run(self) -> None:
        """Works until cancelled; a run under way is handed back then."""
        await self._clear_work_dir()
        for probe in self._probes.all():
            await self._client.call_until_answered("PutProbe", worker_pb2.PutProbeRequest(probe=probe))
        while True:
            lease = await self._lease()
            if lease is None:
                continue
            with working_for(lease.request_id or None, lease.job_id):
                await self._attempt(lease)

    async def _attempt(self, lease: worker_pb2.Lease) -> None:
        log.info("job leased", attempt=lease.attempt)
        folder = self._work_dir / lease.job_id
        try:
            attempt = Attempt(
                *(lease, self._client, self._store, self._catalog, self._models_dir, self._probes, folder),
                self._drain_seconds,
            )
        except OSError as error:
            log.error("the job is handed back: the disk takes no more", cause=str(error))
            reason = f"the trainer can't write to its disk ({error.strerror})"
            shutil.rmtree(folder, ignore_errors=True)
            await self._client.end_attempt(lease, handed_back=worker_pb2.HandedBack(reason=reason))
            await self._pause_after_fault()
            return
        try:
            is_own_fault = await attempt.run()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        log.info("attempt ended", attempt=lease.attempt)
        if is_own_fault:
            await self._pause_after_fault()
        else:
            self._faults_in_a_row = 0

    async def _pause_after_fault(self) -> None:
        """Another trainer may do better. What is wrong here could fail every job of the queue in turn."""
        self._faults_in_a_row += 1
        await asyncio.sleep(min(_PAUSE_SECONDS * 2**self._faults_in_a_row, _LONGEST_PAUSE_SECONDS))

    async def _clear_work_dir(self) -> None:
        """Sends what a killed trainer had not sent, and removes what it left."""
        for path in self._work_dir.glob(f"*/{SPOOL_FILE}"):
            try:
                with closing(EventSpool(path)) as spool:
                    await self._send_rest(spool)
            except (TuneryError, ValueError, OSError) as error:
                log.info("events of a former attempt are dropped", path=str(path), cause=str(error))
        shutil.rmtree(self._work_dir, ignore_errors=True)

    async def _send_rest(self, spool: EventSpool) -> None:
        try:
            await send(self._client, spool)
        except LeaseLost:
            # What the killed trainer was storing may have come after the job was swept.
            stopped = worker_pb2.HandedBack(reason="the run was stopped")
            await self._client.end_attempt(spool.lease, handed_back=stopped)
            raise

    async def _lease(self) -> worker_pb2.Lease | None:
        try:
            self._check_disk()
        except OSError as error:
            log.error("the disk takes no more, so no job is asked for", cause=str(error))
            await asyncio.sleep(_FULL_DISK_PAUSE_SECONDS)
            return None
        request = worker_pb2.LeaseJobRequest(trainer_id=self._trainer_id, wait_seconds=_WAIT_SECONDS)
        try:
            response = await self._client.call("LeaseJob", request, _WAIT_SECONDS + _CALL_MARGIN_SECONDS)
        except TuneryError as error:
            log.warning("no job could be asked for", cause=error.message)
            await asyncio.sleep(_PAUSE_SECONDS)
            return None
        return response.lease if response.HasField("lease") else None

    def _check_disk(self) -> None:
        """Writes a little: with a disk that is full every job of the queue would fail here in turn.

        Raises:
            OSError: it can't be written.
        """
        self._work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._work_dir) as file:
            file.write(bytes(_CHECKED_BYTES))
