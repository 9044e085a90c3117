"""Which calls the gateway lets through, to whom, and with what limits: read from the descriptor set."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2

DEFAULT_SECONDS = 15
SUBMIT_SECONDS = 30
CHAT_SECONDS = 600
REPORT_SECONDS = 300
TAIL_IDLE_SECONDS = 24 * 3600
TRANSFER_IDLE_SECONDS = 300

# What isn't named here is not reachable, whatever else the upstream serves.
PUBLIC_SERVICES = {
    "tunery.dataset.v1.DatasetService": "dataset_svc",
    "tunery.job.v1.JobService": "job_svc",
    "tunery.job.v1.FineTuningService": "job_svc",
    "tunery.job.v1.ModelService": "job_svc",
    "tunery.job.v1.CreditService": "job_svc",
    "tunery.inference.v1.ChatService": "inference_svc",
    "tunery.account.v1.AccountService": "authz",
}
# Open to everyone, to job_svc: load balancers ask for health without a key, and the schema is public. Streams
# among them end with the time, so that nobody holds more than some of those that job_svc has for all.
OPEN_METHODS = (
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
OPEN_SECONDS = 300
OPEN_PER_SECOND = 5
OPEN_BURST = 50
# Those that make something from one message, and look whether its key came before. Uploads do too, and are
# sent again where the gateway's buffer of 1 MiB holds them.
_KEYED = (
    "/tunery.job.v1.JobService/CreateJob",
    "/tunery.job.v1.JobService/CreateJobFromJson",
    "/tunery.job.v1.FineTuningService/SubmitJob",
    "/tunery.job.v1.FineTuningService/SubmitJobFromJson",
)
_TIMEOUT_SECONDS = dict.fromkeys(_KEYED, SUBMIT_SECONDS) | {
    "/tunery.dataset.v1.DatasetService/GetDatasetReport": REPORT_SECONDS,
    "/tunery.inference.v1.ChatService/CreateChatCompletion": CHAT_SECONDS,
}
# Silent for as long as a job trains without a line.
_TAILS = (
    "/tunery.job.v1.JobService/TailLogs",
    "/tunery.job.v1.JobService/StreamMetrics",
    "/tunery.job.v1.FineTuningService/TailJob",
)


_READ = descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS


@dataclass(frozen=True)
class MethodRoute:
    """The route of one rpc, native or transcoded.

    Attributes:
        path: `/package.Service/Method`.
        cluster: the upstream.
        timeout_seconds: for the whole call; 0 for one that may take as long as it moves.
        idle_seconds: how long the call may be silent; 0 where the whole call's limit does that.
        is_upload: takes a body over the limit for JSON.
        is_read: may be sent twice, so that it is retried in more cases than a refused connection.
        takes_key: so may it where it carries an `idempotency-key`.
    """

    path: str
    cluster: str
    timeout_seconds: int
    idle_seconds: int
    is_upload: bool
    is_read: bool
    takes_key: bool


@dataclass(frozen=True)
class RestMethod:
    """An HTTP method that a path takes.

    Attributes:
        name: such as `GET`.
        query_parameters: the names that it takes in the query, each at most once: the fields of the rpc's
            request that are neither in the path nor in the body.
        is_upload: whether its body is an upload.
    """

    name: str
    query_parameters: tuple[str, ...]
    is_upload: bool


@dataclass(frozen=True)
class RestPath:
    """A path of the REST contracts, with the methods that it takes.

    Attributes:
        pattern: a regular expression for the whole path. A trailing slash is in it, since the
            transcoder takes one.
        methods: sorted by name.
    """

    pattern: str
    methods: tuple[RestMethod, ...]


def _files(descriptors: Path) -> Iterable[descriptor_pb2.FileDescriptorProto]:
    return descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes()).file


def _methods(descriptors: Path) -> Iterator[tuple[str, descriptor_pb2.MethodDescriptorProto]]:
    for file in _files(descriptors):
        for service in file.service:
            name = f"{file.package}.{service.name}"
            if name in PUBLIC_SERVICES:
                yield from ((name, method) for method in service.method)


def _rules(method: descriptor_pb2.MethodDescriptorProto) -> Iterator[tuple[str, str, http_pb2.HttpRule]]:
    """Yields an rpc's HTTP methods and path templates, with the rules that they stand in."""
    rule = method.options.Extensions[annotations_pb2.http]
    for each in (rule, *rule.additional_bindings):
        kind = each.WhichOneof("pattern")
        if kind:
            yield kind.upper(), getattr(each, kind), each


def rest_bindings(method: descriptor_pb2.MethodDescriptorProto) -> list[tuple[str, str]]:
    """Returns the HTTP methods and path templates of an rpc; none where it has no REST form."""
    return [(kind, template) for kind, template, _rule in _rules(method)]


def method_routes(descriptors: Path) -> list[MethodRoute]:
    """Returns a route for each rpc of the public services."""
    routes = []
    for service, method in _methods(descriptors):
        path = f"/{service}/{method.name}"
        is_stream = method.client_streaming or method.server_streaming
        idle_seconds = TAIL_IDLE_SECONDS if path in _TAILS else TRANSFER_IDLE_SECONDS if is_stream else 0
        routes.append(
            MethodRoute(
                path=path,
                cluster=PUBLIC_SERVICES[service],
                timeout_seconds=0 if is_stream else _TIMEOUT_SECONDS.get(path, DEFAULT_SECONDS),
                idle_seconds=idle_seconds,
                is_upload=method.client_streaming,
                is_read=method.options.idempotency_level == _READ and not is_stream,
                takes_key=path in _KEYED or method.client_streaming,
            )
        )
    return routes


def _pattern(template: str) -> str:
    """Returns the regular expression of a path template such as `/jobs/{job_id}/files/{path=**}`."""
    parts = []
    for segment in template.strip("/").split("/"):
        if re.fullmatch(r"\{\w+=\*\*\}", segment):
            parts.append("(/.*)?")
        elif segment.startswith("{"):
            parts.append("/[^/]+")
        else:
            parts.append("/" + re.escape(segment).replace(r"\-", "-"))
    return "".join(parts) + "/?"


def rest_paths(descriptors: Path) -> list[RestPath]:
    """Returns every path that has a REST binding."""
    fields = {
        f".{file.package}.{message.name}": [field.name for field in message.field]
        for file in _files(descriptors)
        for message in file.message_type
    }
    methods: defaultdict[str, list[RestMethod]] = defaultdict(list)
    for _service, method in _methods(descriptors):
        for kind, template, rule in _rules(method):
            assert rule.body in ("", "*"), "the body is the whole request, or nothing of it"
            in_path = re.findall(r"\{(\w+)", template)
            free = () if rule.body else (name for name in fields[method.input_type] if name not in in_path)
            methods[_pattern(template)].append(RestMethod(kind, tuple(free), method.client_streaming))
    return [
        RestPath(pattern, tuple(sorted(taken, key=lambda method: method.name)))
        for pattern, taken in methods.items()
    ]
