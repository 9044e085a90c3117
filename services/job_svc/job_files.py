"""The files of a job that its URIs point to, and tars of folders in the store."""

from __future__ import annotations

import json
import tarfile
from collections.abc import AsyncIterator
from typing import Any

import sqlalchemy as sa

from job_svc.jobs import Jobs
from job_svc.log_stream import PAGE_LINES, LogStream
from svc_kit.errors import NotFound
from svc_kit.object_store import ObjectStore

DEFAULT_LOG_NAME = "log.txt"
ERROR_REPORT_NAME = "error_report.json"
WANDB_NAME = "wandb.tar"
JSON, TEXT, TAR = "application/json", "text/plain; charset=utf-8", "application/x-tar"


def log_name(job: sa.Row[Any]) -> str:
    """Returns the name of a job's log file: the disk logger's, where the job has one."""
    return job.input_config.get("logger", {}).get("filename", DEFAULT_LOG_NAME)


def checkpoint_path(checkpoint: sa.Row[Any]) -> str:
    """Returns the path of a checkpoint among the job's files."""
    name = f"epoch-{checkpoint.epoch}" if checkpoint.ends_epoch else f"step-{checkpoint.step}"
    return f"checkpoints/{name}.tar"


class JobFiles:
    """Reads jobs' files."""

    def __init__(self, jobs: Jobs, logs: LogStream, store: ObjectStore) -> None:
        self._jobs = jobs
        self._logs = logs
        self._store = store

    async def open(self, account_id: str, job_id: str, path: str) -> tuple[str, AsyncIterator[bytes]]:
        """Returns a file's content type and its bytes.

        Raises:
            NotFound: the account has no such job, or the job no such file.
        """
        job = await self._jobs.get(account_id, job_id)
        if path == log_name(job):
            return TEXT, self._log(job_id)
        if path == ERROR_REPORT_NAME and job.status == "failed":
            if job.error_report_key:
                return JSON, self._store.read_chunks(job.error_report_key)
            return JSON, _plain_report(job)
        if path == WANDB_NAME and job.wandb_prefix and job.status != "cancelled":
            return TAR, self.tar(job.wandb_prefix)
        for checkpoint in (await self._jobs.checkpoints([job_id]))[job_id]:
            if path == checkpoint_path(checkpoint):
                return TAR, self.tar(checkpoint.object_prefix)
        raise NotFound(f"Job {job_id} has no file {path[:200]!r}.")

    async def _log(self, job_id: str) -> AsyncIterator[bytes]:
        after_seq = 0
        while True:
            page = await self._logs.read(job_id, after_seq)
            lines = [f"{event.time.isoformat(timespec='milliseconds')} {event.message}\n" for event in page]
            yield "".join(lines).encode()
            if len(page) < PAGE_LINES:
                return
            after_seq = page[-1].seq

    async def tar(self, prefix: str) -> AsyncIterator[bytes]:
        """Yields a tar of the objects under a prefix, named by what follows it."""
        for stored in await self._store.list(prefix):
            entry = tarfile.TarInfo(stored.key.removeprefix(prefix))
            entry.size = stored.size_bytes
            entry.mtime = int(stored.modified.timestamp())
            yield entry.tobuf(tarfile.PAX_FORMAT)
            async for chunk in self._store.read_chunks(stored.key):
                yield chunk
            yield bytes(-stored.size_bytes % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)


async def _plain_report(job: sa.Row[Any]) -> AsyncIterator[bytes]:
    report = {"job_id": job.id, "error": job.error, "fault": job.fault, "rows": []}
    yield json.dumps(report, ensure_ascii=False).encode()
