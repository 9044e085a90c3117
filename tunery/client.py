"""The Python client: datasets, jobs, models and chat over REST, a job's log over native gRPC.

with TuneryClient("http://127.0.0.1:8080", api_key) as client:
    dataset = client.upload_dataset(Path("rows.csv"))
    job = client.create_job("smollm2-135m-instruct", dataset["id"], "qa")
    for record in client.follow_log(job["id"]):
        print(record.message)
"""

from __future__ import annotations

import io
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote, urlsplit

import grpc
import httpx
import tenacity
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tunery.account.v1 import account_service_pb2, account_service_pb2_grpc
from tunery.job.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc
from tunery.resources import (
    ApiKey,
    BaseModel,
    ChatMessage,
    CreatedApiKey,
    Dataset,
    DatasetReport,
    FineTunedModel,
    Hyperparameters,
    Job,
    JobDetails,
    JobList,
    Scope,
    TaskType,
)

API = "/api/v1/fine-tuning"
KEYS = "/api/v1/keys"
ENDED_STATUSES = frozenset({"completed", "failed", "cancelled"})
RECONNECT_SECONDS = 60.0
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
# The whole body is checked and stored before the answer comes; a model may think for long.
_SLOW_ANSWER_SECONDS = 600.0
_FIRST_RECONNECT_PAUSE_SECONDS = 0.2
_CREATE_TRIES = 10  # with their pauses they outlast a service's restart
_LONGEST_RECONNECT_PAUSE_SECONDS = 2.0
_PROGRESS_CHUNK_BYTES = 256 * 1024
# What the transport says when a connection breaks or a server restarts; the call is worth repeating.
_BROKEN_CONNECTION = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
    }
)
_HEADER_WORD = re.compile(r"[!-~]+")
# Nothing answered, or only the gateway did.
_OUT_OF_REACH = frozenset({None, 502, 503, 504})
# A server that ends in this very moment cancels its calls.
_ANSWER_LOST = _OUT_OF_REACH | {499}
_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
}

LogRecord = job_pb2.LogRecord


class ClientError(Exception):
    """The service refused a call, or can't be reached.

    Attributes:
        message: what was wrong, for people.
        type: the family of the error, `connection_error` when nothing was reached.
        code: stable snake_case name; docs/errors.md lists them. `unreachable` when nothing was reached.
        http_status: the answer's status (for native calls the one that REST would have), None when
            nothing was reached.
    """

    def __init__(self, message: str, *, type: str, code: str, http_status: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.type = type
        self.code = code
        self.http_status = http_status


class TuneryClient:
    """Calls one Tunery service with one account's key. Not for use by several threads at once."""

    def __init__(self, url: str, api_key: str) -> None:
        """Args:
            url: the gateway's, such as `http://127.0.0.1:8080`.
            api_key: the account's key.

        Raises:
            ValueError: the URL is not http:// or https:// with a host, or the key can't be one.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no service's URL; expected such as http://127.0.0.1:8080")
        if not _HEADER_WORD.fullmatch(api_key):
            raise ValueError("the API key has a space, a line break or another character that no key has")
        self.url = url.rstrip("/")
        self._api_key = api_key
        # A proxy configured for the way out must not be asked for this machine's own services.
        self._is_local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._target = f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
        self._is_tls = parts.scheme == "https"
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=not self._is_local,
        )
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every connection."""
        self._http.close()
        if self._channel is not None:
            self._channel.close()

    def upload_dataset(
        self, path: Path, name: str | None = None, on_progress: Callable[[int, int], None] | None = None
    ) -> Dataset:
        """Uploads a CSV file; the file is streamed, never held in memory.

        One call makes one dataset: where the answer is lost on its way, the file is sent again with its key.

        Args:
            path: the file, ending in `.csv`.
            name: shown instead of the file's name; at most 256 characters.
            on_progress: called with the bytes sent so far and the file's size; it begins anew with the file.

        Raises:
            ClientError: the file is broken (`malformed_file`, with line and column) or too large.
            OSError: the file can't be read.
        """
        with path.open("rb") as file:
            size_bytes = path.stat().st_size

            def request() -> dict[str, Any]:
                body = _ReportingFile(file, size_bytes, on_progress)
                return {
                    "files": {"file": (path.name, body, "text/csv")},
                    "data": {} if name is None else {"name": name},
                    "timeout": httpx.Timeout(_SLOW_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
                }

            return self._create(f"{API}/datasets", request)

    def list_datasets(self) -> list[Dataset]:
        """Returns the account's datasets, newest first."""
        return self._json("GET", f"{API}/datasets")["data"]

    def get_dataset_report(
        self,
        dataset_id: str,
        base_model: str | None = None,
        task_type: TaskType | None = None,
        max_sequence_length: int | None = None,
    ) -> DatasetReport:
        """Returns what a job would make of a dataset's rows. The first time it takes seconds to minutes.

        Args:
            dataset_id: the dataset, CSV or JSONL.
            base_model: whose tokens are counted; None: the catalog's default.
            task_type: what a CSV's rows are; None: what its columns fit.
            max_sequence_length: the longest row in tokens; None: the model's context.

        Raises:
            ClientError: there is no such dataset (`not_found`) or model (`unknown_base_model`), the columns
                don't fit (`unsupported_columns`), or an argument is out of its range.
        """
        asked = {
            "base_model": base_model,
            "task_type": task_type,
            "max_sequence_length": max_sequence_length,
        }
        return self._json(
            "GET",
            f"{API}/datasets/{_segment(dataset_id)}/report",
            params={name: value for name, value in asked.items() if value is not None},
            timeout=httpx.Timeout(_SLOW_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
        )

    def delete_dataset(self, dataset_id: str) -> None:
        """Deletes a dataset.

        Raises:
            ClientError: there is none (`not_found`), or a job uses it (`dataset_in_use`).
        """
        self._request("DELETE", f"{API}/datasets/{_segment(dataset_id)}")

    def create_job(
        self,
        base_model: str,
        dataset_id: str,
        task_type: TaskType,
        hyperparameters: Hyperparameters | None = None,
        suffix: str | None = None,
        priority: int = 0,
    ) -> Job:
        """Makes a job, which starts as soon as a trainer is free and the account has its turn.

        One call makes one job: where the answer is lost on its way, the request is sent again with its key.

        Raises:
            ClientError: a field is wrong (400), the credits don't suffice (402), or the account has as many
                jobs as it may (`limit_reached`).
        """
        request: dict[str, Any] = {"base_model": base_model, "dataset_id": dataset_id, "task_type": task_type}
        if hyperparameters:
            request["hyperparameters"] = hyperparameters
        if suffix is not None:
            request["suffix"] = suffix
        if priority:
            request["priority"] = priority
        return self._create(f"{API}/jobs", lambda: _json_body(request))

    def list_jobs(self, limit: int = 20, offset: int = 0) -> JobList:
        """Returns a page of the account's jobs, newest first; `limit` is 1 to 100."""
        return self._json("GET", f"{API}/jobs", params={"limit": limit, "offset": offset})

    def get_job_details(self, job_id: str) -> JobDetails:
        """Returns a job with everything known of it.

        Raises:
            ClientError: there is none (`not_found`).
        """
        return self._json("GET", f"{API}/jobs/{_segment(job_id)}/details")

    def cancel_job(self, job_id: str) -> Job:
        """Cancels a job.

        Raises:
            ClientError: there is none (`not_found`), or it has ended (`job_ended`).
        """
        return self._json("POST", f"{API}/jobs/{_segment(job_id)}/cancel")

    def follow_log(
        self, job_id: str, after_seq: int = 0, reconnect_seconds: float = RECONNECT_SECONDS
    ) -> Iterator[LogRecord]:
        """Yields a job's log, each record once and in order, until the job has ended.

        A connection that breaks is taken up again where it broke off.

        Args:
            job_id: the job.
            after_seq: only records with a higher `seq`; 0 for all.
            reconnect_seconds: how long to go on trying without hearing anything.

        Raises:
            ClientError: there is no such job, or the service was out of reach for too long.
        """
        heard = time.monotonic()
        pause = _FIRST_RECONNECT_PAUSE_SECONDS
        while True:
            seq_before, failure = after_seq, None
            try:
                for record in self._tail(job_id, after_seq):
                    assert record.seq > after_seq, "the stream went back"
                    after_seq = record.seq
                    yield record
                    if record.kind == "end":
                        return
            except grpc.RpcError as error:
                failure = self._from_rpc_error(error)
                if error.code() not in _BROKEN_CONNECTION or failure.code == "internal_error":
                    raise failure from error
            if after_seq > seq_before:
                heard, pause = time.monotonic(), _FIRST_RECONNECT_PAUSE_SECONDS
            elif failure is None and self._has_ended(job_id):
                return  # the caller had the last record already
            if time.monotonic() - heard > reconnect_seconds:
                raise failure or _unreachable(self.url, "the log's stream ends before the job does")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_RECONNECT_PAUSE_SECONDS)

    def read_log(self, job_id: str) -> Iterator[str]:
        """Yields the lines of a job's log so far, each with its time in front, and ends.

        Raises:
            ClientError: there is no such job.
        """
        told = self._json("GET", "/fine_tuning/jobs/status", params={"job_id": job_id})
        # Not at `logs`: that is a page of Weights & Biases where the job logs there, and its host is the one
        # that the service knows itself by, which may differ from ours.
        name = told["input_config"].get("logger", {}).get("filename", "log.txt")
        path = f"/fine_tuning/jobs/{_segment(job_id)}/files/{quote(name)}"
        try:
            with self._http.stream("GET", path) as response:
                if not response.is_success:
                    response.read()
                    raise _from_response(response)
                yield from response.iter_lines()
        except httpx.TransportError as error:
            raise _unreachable(self.url, str(error) or type(error).__name__) from error

    def list_models(self) -> list[FineTunedModel]:
        """Returns the account's fine-tuned models, newest first."""
        return self._json("GET", f"{API}/models")["data"]

    def list_base_models(self) -> list[BaseModel]:
        """Returns the models that jobs can start from; the first is the default."""
        return self._json("GET", f"{API}/base-models")["data"]

    def delete_model(self, model_id: str) -> None:
        """Deletes a fine-tuned model.

        Raises:
            ClientError: there is none (`not_found`).
        """
        self._request("DELETE", f"{API}/models/{_segment(model_id)}")

    def chat(self, model: str, messages: Sequence[ChatMessage], **options: float | int) -> dict[str, Any]:
        """Asks a fine-tuned or a base model; returns OpenAI's chat completion object.

        Args:
            model: the model's id.
            messages: the conversation so far.
            options: such as `max_tokens` and `temperature`; what is left out has the service's default.

        Raises:
            ClientError: there is no such model (404), or an option is wrong (400).
        """
        return self._json(
            "POST",
            "/v1/chat/completions",
            **_json_body({"model": model, "messages": list(messages), **options}),
            timeout=httpx.Timeout(_SLOW_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
        )

    def ask(
        self, model: str, question: str, system: str | None = None, **options: float | int
    ) -> dict[str, Any]:
        """Asks a model one question, as `chat` does, after a system message if one is given."""
        asked: list[ChatMessage] = [{"role": "user", "content": question}]
        if system is not None:
            asked.insert(0, {"role": "system", "content": system})
        return self.chat(model, asked, **options)

    def create_account(self, name: str, credits: float | None = None) -> tuple[str, str]:
        """Makes an account; returns its id and its API key, which is never shown again.

        Args:
            name: for people, 1 to 100 characters.
            credits: the first balance; None: no balance is kept.

        Raises:
            ClientError: this client's key has no scope `admin` (`forbidden`), or an argument is wrong.
        """
        request = account_service_pb2.CreateAccountRequest(name=name, credits=credits)
        stub = account_service_pb2_grpc.AccountServiceStub(self._open_channel())
        try:
            answer = stub.CreateAccount(request, metadata=self._metadata(), timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            raise self._from_rpc_error(error) from error
        return answer.account_id, answer.api_key

    def create_key(self, name: str, scopes: Sequence[Scope], account_id: str | None = None) -> CreatedApiKey:
        """Makes an API key, which is never shown again. Not idempotent.

        Args:
            name: for people, 1 to 100 characters.
            scopes: what it may do, no more than this client's own key may.
            account_id: whose key; None: the caller's own account's. Another takes the scope `admin`.

        Raises:
            ClientError: the scopes are too many (`forbidden`), or an argument is wrong.
        """
        request: dict[str, Any] = {"name": name, "scopes": list(scopes)}
        if account_id is not None:
            request["account_id"] = account_id
        return self._json("POST", KEYS, **_json_body(request))

    def list_keys(self, account_id: str | None = None) -> list[ApiKey]:
        """Returns an account's keys, oldest first."""
        return self._json("GET", KEYS, params=_account(account_id))["data"]

    def revoke_key(self, key_id: str, account_id: str | None = None) -> None:
        """Takes a key back, which opens nothing any more within 5 seconds.

        Raises:
            ClientError: there is none (`not_found`), or it is this client's own (`conflict`).
        """
        self._request("DELETE", f"{KEYS}/{_segment(key_id)}", params=_account(account_id))

    def _tail(self, job_id: str, after_seq: int) -> Iterator[LogRecord]:
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        request = job_service_pb2.TailLogsRequest(job_id=job_id, after_seq=after_seq)
        call = stub.TailLogs(request, metadata=self._metadata())
        try:
            yield from call
        finally:
            call.cancel()

    def _from_rpc_error(self, error: grpc.RpcError) -> ClientError:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # a failed call is its own error
        for detail in status.details if status else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                return ClientError(
                    error.details() or "",
                    type=info.metadata.get("type", "server_error"),
                    code=info.reason,
                    http_status=int(info.metadata.get("http_status", "500")),
                )
        code: grpc.StatusCode = error.code()
        told = error.details() or code.name
        if code in _BROKEN_CONNECTION:
            return _unreachable(self.url, told)
        return ClientError(
            told, type="server_error", code=code.name.lower(), http_status=_HTTP_STATUS.get(code)
        )

    def _has_ended(self, job_id: str) -> bool:
        try:
            return self.get_job_details(job_id)["job"]["status"] in ENDED_STATUSES
        except ClientError as error:
            if error.http_status in _OUT_OF_REACH:
                return False
            raise

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._api_key}"),)

    def _open_channel(self) -> grpc.Channel:
        if self._channel is None:
            options = (
                # A peer that vanished without a word is noticed within half a minute.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.max_reconnect_backoff_ms", 2_000),
                ("grpc.enable_http_proxy", 0 if self._is_local else 1),
            )
            self._channel = (
                grpc.secure_channel(self._target, grpc.ssl_channel_credentials(), options)
                if self._is_tls
                else grpc.insecure_channel(self._target, options)
            )
        return self._channel

    def _create(self, path: str, request: Callable[[], dict[str, Any]]) -> Any:
        """Posts what `request` makes anew for each try, all with one key, until an answer comes."""
        key = str(uuid.uuid4())
        for attempt in tenacity.Retrying(
            retry=_may_have_been_done,
            stop=tenacity.stop_after_attempt(_CREATE_TRIES),
            wait=tenacity.wait_exponential(multiplier=_FIRST_RECONNECT_PAUSE_SECONDS, max=2),
            reraise=True,
        ):
            with attempt:
                arguments = request()
                arguments["headers"] = arguments.get("headers", {}) | {"Idempotency-Key": key}
                return self._json("POST", path, **arguments)
        raise AssertionError("the last attempt returns or raises")

    def _json(self, method: str, path: str, **arguments: Any) -> Any:
        response = self._request(method, path, **arguments)
        try:
            return response.json()
        except json.JSONDecodeError as error:
            raise ClientError(
                f"{self.url} doesn't answer as Tunery does: no JSON from {method} {path}",
                type="connection_error",
                code="unexpected_answer",
                http_status=response.status_code,
            ) from error

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise _unreachable(self.url, str(error) or type(error).__name__) from error
        if response.is_success:
            return response
        raise _from_response(response)


class _ReportingFile(io.RawIOBase):
    """A file that tells how much of it was read. httpx asks `seek` and `tell` for its length."""

    def __init__(
        self, file: BinaryIO, size_bytes: int, on_progress: Callable[[int, int], None] | None
    ) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._on_progress = on_progress
        self._reported = 0

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        position = self._file.tell()
        is_due = position - self._reported >= _PROGRESS_CHUNK_BYTES or position == self._size_bytes
        if self._on_progress and is_due:
            self._reported = position
            self._on_progress(position, self._size_bytes)
        return chunk

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _may_have_been_done(state: tenacity.RetryCallState) -> bool:
    """Whether a call, by this try or one before it, may have been carried out and its answer lost."""
    assert state.outcome is not None
    error = state.outcome.exception()
    if not isinstance(error, ClientError) or error.http_status not in _ANSWER_LOST:
        return False
    return state.attempt_number > 1 or not isinstance(error.__cause__, httpx.ConnectError)


def _account(account_id: str | None) -> dict[str, str]:
    return {} if account_id is None else {"account_id": account_id}


def _json_body(document: Mapping[str, Any]) -> dict[str, Any]:
    # httpx's own `json` raises ValueError for NaN and for half of a surrogate pair; the service says what is
    # wrong with them.
    return {"content": json.dumps(document), "headers": {"content-type": "application/json"}}


def _segment(resource_id: str) -> str:
    """Returns an id as a part of a path.

    Raises:
        ClientError: no path can carry it, so it is no resource's.
    """
    if not resource_id.strip(".") or "/" in resource_id:
        raise ClientError(
            f"{resource_id!r} is no id.", type="not_found_error", code="not_found", http_status=404
        )
    return quote(resource_id, safe="")


def _unreachable(url: str, reason: str) -> ClientError:
    return ClientError(
        f"can't reach {url}: {reason}", type="connection_error", code="unreachable", http_status=None
    )


def _from_response(response: httpx.Response) -> ClientError:
    try:
        told: Mapping[str, str] = response.json()["error"]
        return ClientError(
            told["message"], type=told["type"], code=told["code"], http_status=response.status_code
        )
    except (ValueError, KeyError, TypeError):  # not our envelope: something else answers at that address
        return ClientError(
            f"{response.url} answered {response.status_code} {response.reason_phrase}",
            type="connection_error",
            code="unexpected_answer",
            http_status=response.status_code,
        )
