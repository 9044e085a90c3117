"""dataset_svc's JobDataService, asked in job_svc's own name."""

from __future__ import annotations

import grpc
import structlog

from svc_kit.errors import TuneryError
from svc_kit.identity import Issuer
from svc_kit.interceptors import from_rpc_error
from tunery.dataset.v1 import job_data_service_pb2 as data_pb2
from tunery.dataset.v1.job_data_service_pb2_grpc import JobDataServiceStub

log = structlog.get_logger(__name__)

_HOLD_SECONDS = 10


class JobDataClient:
    """Holds jobs' data and has it prepared."""

    def __init__(self, channel: grpc.aio.Channel, issuer: Issuer) -> None:
        self._stub = JobDataServiceStub(channel)
        self._issuer = issuer

    async def hold(self, request: data_pb2.HoldJobDataRequest) -> list[data_pb2.HeldData]:
        """Checks a job's URIs and holds the datasets among them.

        Raises:
            InvalidRequest: a URI is not allowed, or names a dataset that is unknown or doesn't fit.
            Unavailable: dataset_svc can't be reached.
        """
        try:
            # A dataset_svc that is starting again is waited for: whoever makes a job need not know.
            response = await self._stub.HoldJobData(
                request, timeout=_HOLD_SECONDS, wait_for_ready=True, metadata=self._issuer.own_metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return list(response.data)

    async def release(self, job_id: str) -> None:
        """Gives back the holds of a job that was not made; those that can't be lapse by themselves."""
        try:
            await self._stub.ReleaseJobData(
                data_pb2.ReleaseJobDataRequest(job_id=job_id),
                timeout=_HOLD_SECONDS,
                metadata=self._issuer.own_metadata(),
            )
        except grpc.aio.AioRpcError as error:
            log.warning("a hold could not be released", job_id=job_id, cause=error.details())

    async def prepare(
        self, request: data_pb2.PrepareJobDataRequest
    ) -> data_pb2.PrepareJobDataResponse | TuneryError:
        """Has a job's data copied and checked, however long that takes.

        Returns:
            What was prepared; or the error, which is no exception here: its kind decides what becomes of
            the job.
        """
        try:
            return await self._stub.PrepareJobData(request, metadata=self._issuer.own_metadata())
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
