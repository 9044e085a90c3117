"""Every rpc and every REST path that is served, read from the protos, so that none is forgotten."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from google.api import httpbody_pb2
from google.protobuf import descriptor_pb2, json_format, message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from gateway.routes import PUBLIC_SERVICES, rest_bindings

DESCRIPTORS = Path(__file__).parents[2] / "tunery" / "descriptors.pb"


def served_services() -> dict[str, ServiceDescriptor]:
    """Every service of ours, public or not, by its full name."""
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    found = {}
    for file in files.file:
        if file.package.startswith("tunery."):
            module = importlib.import_module(file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
            services: dict[str, ServiceDescriptor] = module.DESCRIPTOR.services_by_name
            found |= {service.full_name: service for service in services.values()}
    return found


def rpcs_of(service: ServiceDescriptor) -> dict[str, MethodDescriptor]:
    """A service's rpcs, by `/package.Service/Method`."""
    return {f"/{service.full_name}/{method.name}": method for method in service.methods}


PUBLIC_RPCS = {
    rpc: method
    for name, service in served_services().items()
    if name in PUBLIC_SERVICES
    for rpc, method in rpcs_of(service).items()
}


def bindings(method: MethodDescriptor) -> list[tuple[str, str]]:
    """The HTTP methods and path templates of an rpc."""
    proto = descriptor_pb2.MethodDescriptorProto()
    method.CopyToProto(proto)
    return rest_bindings(proto)


def id_fields(message: Descriptor) -> set[str]:
    """The fields of a request that name a resource."""
    return {each.name for each in message.fields if each.name == "id" or each.name.endswith("_id")}


@dataclass(frozen=True)
class Ask:
    """A request with places for ids, such as `{job}`.

    Attributes:
        fields: the request's fields, or the JSON body's.
        status: how it is answered when the ids are another's, or nobody's: the name of a gRPC status.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    status: str = "NOT_FOUND"

    def filled(self, ids: dict[str, str]) -> dict[str, Any]:
        """The fields with ids in their places."""
        text = json.dumps(self.fields)
        for name, value in ids.items():
            text = text.replace(f"{{{name}}}", value)
        filled: dict[str, Any] = json.loads(text)
        return filled

    def message(self, method: MethodDescriptor, ids: dict[str, str]) -> Message:
        """The request of a native call."""
        filled = self.filled(ids)
        if method.input_type is httpbody_pb2.HttpBody.DESCRIPTOR:
            return httpbody_pb2.HttpBody(data=json.dumps(filled).encode())
        return json_format.ParseDict(filled, message_factory.GetMessageClass(method.input_type)())

    def rest(self, template: str, ids: dict[str, str], *, has_body: bool) -> tuple[str, bytes]:
        """The path, with what is left of the fields as its query, or the body."""
        filled = self.filled(ids)
        path = re.sub(r"\{(\w+)(=\*\*)?\}", lambda match: quote(str(filled.pop(match[1]))), template)
        if has_body:
            return path, json.dumps(filled).encode()
        return f"{path}?{urlencode(filled)}", b""
