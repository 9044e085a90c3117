"""The two given contracts, read as they are meant, and responses held against them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import yaml
from openapi_schema_validator import (
    OAS30Validator,
    OAS31Validator,
    oas30_format_checker,
    oas31_format_checker,
)

_HERE = Path(__file__).parent
_RFC3339_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
_ERROR_ROW = re.compile(r"^\| `(\w+)` \| (\d{3}) \|(?: \w+ \|)? `(\w+)` \|", re.MULTILINE)

DISCRIMINATED = {
    "LoraFineTuneOptions": ("finetuning_type", ["lora", "LoraFineTuneOptions"]),
    "FullFineTuneOptions": ("finetuning_type", ["full", "FullFineTuneOptions"]),
    "DiskLogger": ("log_type", ["disk", "DiskLogger"]),
    "WandBLogger": ("log_type", ["wandb", "WandBLogger"]),
}


def read_first() -> dict[str, Any]:
    """Contract A. Its `exclusiveMinimum: true` is draft 4's; in OpenAPI 3.1 it is a number."""
    document = yaml.safe_load((_HERE / "given" / "qubrid.openapi.yaml").read_text())
    for schema in _schemas(document):
        if schema.get("exclusiveMinimum") is True:
            schema["exclusiveMinimum"] = schema.pop("minimum")
    return document


def read_second() -> dict[str, Any]:
    """Contract B. A discriminator's value is part of its member, which alone tells the members apart."""
    document = yaml.safe_load((_HERE / "given" / "fine_tuning.openapi.yaml").read_text())
    schemas = document["components"]["schemas"]
    schemas["Message"] = {
        "type": "object",
        "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
    }
    for name, (discriminator, values) in DISCRIMINATED.items():
        schemas[name]["properties"][discriminator] = {"type": "string", "enum": values}
        schemas[name]["required"] = [discriminator]
    for schema in _schemas(schemas):
        if "discriminator" in schema:
            schema["discriminator"]["mapping"] = {
                value: member["$ref"]
                for member in schema["oneOf"]
                for value in DISCRIMINATED[member["$ref"].rpartition("/")[2]][1]
            }
    # YAML reads the statuses as numbers.
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"] = {str(status): each for status, each in operation["responses"].items()}
    return document


def _schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Every object of a document, schemas among them."""
    if isinstance(node, dict):
        yield node
        for item in node.values():
            yield from _schemas(item)
    elif isinstance(node, list):
        for item in node:
            yield from _schemas(item)


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """A copy in which an object has no field beside those that its schema names."""
    document = copy.deepcopy(document)
    for schema in _schemas(document["components"]["schemas"]):
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return document


@dataclass(frozen=True)
class Operation:
    """One operation of a contract: where it is served, and its responses by status."""

    contract: str
    method: str
    path: str
    responses: dict[str, Any]

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\{\w+\}", "[^/]+", self.path))


class Contract:
    """One contract as a judge of responses."""

    def __init__(
        self, name: str, document: dict[str, Any], prefix: str, validator: Any, formats: Any
    ) -> None:
        self._document = closed(document)
        self._validator = validator
        self._formats = formats
        self.operations = [
            Operation(name, method.upper(), prefix + path, operation["responses"])
            for path, item in document["paths"].items()
            for method, operation in item.items()
        ]

    def check(self, schema: dict[str, Any], value: Any) -> None:
        """Fails unless a JSON value is what a schema of this contract says, and has nothing more."""
        whole = {**schema, "components": self._document["components"]}
        self._validator(whole, format_checker=self._formats).validate(value)
        _check_times(value)

    def named(self, name: str) -> dict[str, Any]:
        """A schema by its name."""
        return {"$ref": f"#/components/schemas/{name}"}


def _check_times(value: Any, key: str = "") -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in ("metadata", "input_config", "extras"):
                _check_times(item, name)
    elif isinstance(value, list):
        for item in value:
            _check_times(item)
    elif key.endswith("_at") or key in ("created", "timestamp"):
        assert _RFC3339_UTC.fullmatch(value), f"{key}: {value!r}"


FIRST = Contract("A", read_first(), "/api/v1", OAS31Validator, oas31_format_checker)
SECOND = Contract("B", read_second(), "", OAS30Validator, oas30_format_checker)
OPERATIONS = [*FIRST.operations, *SECOND.operations]


@cache
def documented_errors() -> frozenset[tuple[str, int, str]]:
    """Every error of docs/errors.md: code, status and type."""
    page = (_HERE.parents[1] / "docs" / "errors.md").read_text()
    return frozenset((code, int(status), kind) for code, status, kind in _ERROR_ROW.findall(page))


def find_operation(request: httpx.Request) -> Operation | None:
    """The contracts' operation that a request calls; None for an extension."""
    for operation in OPERATIONS:
        if operation.method == request.method and operation.pattern.fullmatch(request.url.path):
            return operation
    return None


def check_error(response: httpx.Response) -> dict[str, str]:
    """Fails unless a response is an error in the envelope, with a code of docs/errors.md; returns it."""
    assert response.headers["content-type"] == "application/json", response.headers
    body = response.json()
    FIRST.check(FIRST.named("ErrorResponse"), body)
    assert set(body) == {"error"}, body
    error: dict[str, str] = body["error"]
    assert set(error) == {"message", "type", "code"}, error
    assert error["message"].strip(), "an error says what was wrong"
    assert (error["code"], response.status_code, error["type"]) in documented_errors(), error
    return error


def check_response(response: httpx.Response) -> None:
    """Holds a response against the contract, whatever its status."""
    assert "x-request-id" in response.headers
    assert not [name for name in response.headers if name.startswith(("grpc-", "x-http-", "x-tunery-"))]
    if response.status_code >= 400:
        response.read()
        check_error(response)
        return
    operation = find_operation(response.request)
    if operation is None:
        return
    documented = operation.responses.get(str(response.status_code))
    assert documented is not None, f"{operation.method} {operation.path} answers {response.status_code}"
    if response.status_code == 204:
        response.read()
        assert response.content == b""
        assert "content-type" not in response.headers
        assert response.headers.get("content-length", "0") == "0"
        return
    [(content_type, media)] = documented["content"].items()
    assert response.headers["content-type"] == content_type
    if content_type == "application/x-ndjson":
        assert response.headers["transfer-encoding"] == "chunked"
        return
    response.read()
    contract = FIRST if operation.contract == "A" else SECOND
    contract.check(media["schema"], response.json())


def check_log_line(line: dict[str, Any]) -> None:
    """Fails unless a line of a tail is as the contract says, with every field there."""
    schema = SECOND.operations[-1].responses["200"]["content"]["application/x-ndjson"]["schema"]
    SECOND.check(schema, line)
    assert set(line) == {"logs"}
    for log in line["logs"]:
        assert set(log) == {"message", "timestamp"}
