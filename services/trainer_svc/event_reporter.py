"""Sends an attempt's events up, in order, each until it is acknowledged."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import structlog
from google.protobuf import json_format, struct_pb2, timestamp_pb2

from svc_kit.errors import TuneryError, Unavailable
from svc_kit.identity import Issuer
from svc_kit.interceptors import from_rpc_error
from trainer_svc.event_spool import EventSpool
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2
from tunery.trainer.v1.worker_service_pb2_grpc import WorkerServiceStub

log = structlog.get_logger(__name__)

_BATCH_EVENTS = 200
_CALL_SECONDS = 10
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 2.0
_MAX_FAILURES = 30


class JobServiceClient:
    """Calls the worker protocol in the trainer's name."""

    def __init__(self, stub: WorkerServiceStub, issuer: Issuer) -> None:
        self._stub = stub
        self._issuer = issuer

    async def call(self, rpc: str, request: Any, timeout_seconds: float = _CALL_SECONDS) -> Any:
        """Calls once.

        Raises:
            TuneryError: what job_svc said, or that it can't be reached.
        """
        try:
            method = getattr(self._stub, rpc)
            return await method(request, timeout=timeout_seconds, metadata=self._issuer.own_metadata())
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def call_until_answered(self, rpc: str, request: Any) -> Any:
        """Calls again and again while job_svc can't be reached, and for a while when it fails.

        Raises:
            TuneryError: job_svc refused, or failed at this very call `_MAX_FAILURES` times.
        """
        pause = _FIRST_PAUSE_SECONDS
        failures = 0
        while True:
            try:
                return await self.call(rpc, request)
            except TuneryError as error:
                failures += not isinstance(error, Unavailable)
                if error.http_status < 500 or failures == _MAX_FAILURES:
                    raise
                log.warning("job_svc can't be reached; the call is repeated", rpc=rpc, cause=error.message)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def end_attempt(self, lease: worker_pb2.Lease, **outcome: Any) -> None:
        """Says how an attempt ended; what became of a lease that is lost needs no saying.

        Args:
            lease: the attempt's.
            outcome: `completed`, `failed` or `handed_back`.
        """
        request = worker_pb2.EndAttemptRequest(job_id=lease.job_id, lease_token=lease.lease_token, **outcome)
        try:
            await self.call_until_answered("EndAttempt", request)
        except TuneryError as error:
            log.info("job_svc had ended the attempt already", job_id=lease.job_id, cause=error.message)


class EventReporter:
    """Numbers events and sends them. What can't be sent for now is kept on the disk, and training goes on."""

    def __init__(self, client: JobServiceClient, spool: EventSpool, next_seq: int) -> None:
        self._client = client
        self._spool = spool
        self._next_seq = next_seq
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()

    def add(
        self, kind: str, message: str, time: timestamp_pb2.Timestamp | None, data: dict[str, Any]
    ) -> None:
        """Adds an event at the end of the job's log; a time of None is now."""
        if time is None:
            time = timestamp_pb2.Timestamp()
            time.GetCurrentTime()
        struct = json_format.ParseDict(data, struct_pb2.Struct())
        self._spool.add(
            worker_pb2.Event(seq=self._next_seq, time=time, kind=kind, message=message, data=struct)
        )
        self._next_seq += 1
        self._drained.clear()
        self._changed.set()

    async def run(self) -> None:
        """Sends events as they come, until cancelled.

        Raises:
            LeaseLost: the job is another's now, or was cancelled.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            await send(self._client, self._spool)
            if not self._changed.is_set():
                self._drained.set()

    async def drained(self) -> None:
        """Returns once every event added so far is acknowledged."""
        await self._drained.wait()


async def send(client: JobServiceClient, spool: EventSpool) -> None:
    """Sends a spool's events, in order, each until it is acknowledged.

    Raises:
        LeaseLost: the job is another's now, or was cancelled.
        TuneryError: job_svc refused them otherwise.
    """
    while True:
        events, position = spool.peek(_BATCH_EVENTS)
        if not events:
            return
        request = worker_pb2.ReportEventsRequest(
            job_id=spool.lease.job_id, lease_token=spool.lease.lease_token, events=events
        )
        await client.call_until_answered("ReportEvents", request)
        spool.acknowledge(position)
