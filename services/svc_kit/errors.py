"""Every error that a client can see, in one table.

A domain raises one of these exceptions. `interceptors.py` ends the call with its gRPC status, which has an
`ErrorInfo` detail, and the gateway turns that into the REST envelope
`{"error": {"message", "type", "code"}}`. Nothing else maps errors. `docs/errors.md` lists the same
rows, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

ERROR_DOMAIN = "tunery"


class TuneryError(Exception):
    """An error with a stable code that the client is meant to read.

    Attributes:
        code: stable snake_case name, what programs compare with.
        type: the family of the error, as `error.type` in REST.
        grpc_status: the status of a native gRPC call.
        http_status: the status of a REST call.
        when: the condition, one sentence for docs/errors.md.
    """

    code = "internal_error"
    type = "server_error"
    grpc_status = grpc.StatusCode.INTERNAL
    http_status = 500
    when = "The service failed in a way it did not foresee; its log has the request id."

    def __init__(self, message: str, **details: object) -> None:
        """Args:
        message: what was wrong, where, what was expected and what to do.
        details: facts for programs, such as `field` or `line`; strings in `ErrorInfo.metadata`.
        """
        super().__init__(message)
        self.message = message
        self.details: Mapping[str, str] = {key: str(value) for key, value in details.items()}


class InvalidRequest(TuneryError, ValueError):
    code = "invalid_request"
    type = "invalid_request_error"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    when = "A field is missing, unknown, of the wrong type or out of its range; the message names it."


class MalformedFile(InvalidRequest):
    code = "malformed_file"
    when = "An uploaded file is not what its kind asks for; the message names the line and the column."


class MalformedUpload(InvalidRequest):
    code = "malformed_upload"
    when = "The multipart body is broken, incomplete, or lacks the `file` part."


class UnsupportedColumns(InvalidRequest):
    code = "unsupported_columns"
    when = "The dataset's columns don't fit the task; the message lists those looked for and those found."


class UnknownBaseModel(InvalidRequest):
    code = "unknown_base_model"
    when = "The base model is not in the catalog; the message lists those that are."


class UnknownDataset(InvalidRequest):
    code = "unknown_dataset"
    when = "A request names a dataset that the account doesn't have."


class UnsupportedDataUri(InvalidRequest):
    code = "unsupported_data_uri"
    when = "A data URI is of a kind, host, bucket or folder that the configuration doesn't allow."


class Unauthenticated(TuneryError):
    code = "invalid_api_key"
    type = "authentication_error"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401
    when = "The bearer token is missing, unknown or revoked."


class InsufficientCredits(TuneryError):
    code = "insufficient_credits"
    type = "billing_error"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 402
    when = "The account's balance is below the job's cost; the message has both."


class PermissionDenied(TuneryError):
    code = "forbidden"
    type = "permission_error"
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403
    when = "The API key may not do this; the message names the scope that it lacks."


class NotFound(TuneryError):
    code = "not_found"
    type = "not_found_error"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404
    when = "The resource doesn't exist, or belongs to another account."


class Conflict(TuneryError):
    code = "conflict"
    type = "conflict_error"
    grpc_status = grpc.StatusCode.ABORTED
    http_status = 409
    when = "The resource's state doesn't allow this."


class DatasetInUse(Conflict):
    code = "dataset_in_use"
    when = "A queued or running job uses the dataset; the message names the job."


class JobEnded(Conflict):
    code = "job_ended"
    when = "The job has ended already and can't be cancelled."


class LeaseLost(Conflict):
    code = "lease_lost"
    when = "The trainer's lease on the job has gone to another or the job has ended (worker protocol only)."


class PayloadTooLarge(TuneryError):
    code = "payload_too_large"
    type = "invalid_request_error"
    grpc_status = grpc.StatusCode.OUT_OF_RANGE
    http_status = 413
    when = "The upload is over the configured limit."


class TooManyRequests(TuneryError):
    code = "rate_limited"
    type = "rate_limit_error"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    when = "The service is at its limit; try again after a pause."


class LimitReached(TooManyRequests):
    code = "limit_reached"
    when = (
        "The account has as many jobs, datasets, bytes, uploads or streams as it may; the message says which."
    )


class Unavailable(TuneryError):
    code = "unavailable"
    type = "server_error"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    when = "A part of the service can't be reached for now; try again."


def table() -> list[type[TuneryError]]:
    """All rows: the base class first, then every descendant, each once."""
    rows: list[type[TuneryError]] = [TuneryError]
    for row in rows:
        rows.extend(child for child in row.__subclasses__() if child not in rows)
    return rows


# A status travels in HTTP headers, the message twice; what is larger than these may hold is lost whole.
MAX_MESSAGE_CHARS = 2000
MAX_DETAIL_CHARS = 300


def to_status(error: TuneryError) -> grpc.Status:
    """Returns the gRPC status of an error, with `ErrorInfo` as its first detail.

    The gateway reads from it: `reason` is the code, `metadata.type` and `metadata.http_status` the rest.
    """
    details = {name: _shortened(value, MAX_DETAIL_CHARS) for name, value in error.details.items()}
    info = error_details_pb2.ErrorInfo(
        reason=error.code,
        domain=ERROR_DOMAIN,
        metadata={**details, "type": error.type, "http_status": str(error.http_status)},
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    code = code_pb2.Code.Value(error.grpc_status.name)
    message = _shortened(error.message, MAX_MESSAGE_CHARS)
    return rpc_status.to_status(status_pb2.Status(code=code, message=message, details=[detail]))


def _shortened(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."
