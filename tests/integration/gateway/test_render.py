"""The gateway's settings, and what they make of Envoy's configuration."""

from __future__ import annotations

import asyncio
import re
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from pydantic import ValidationError

from gateway.__main__ import GatewayEnvironment
from gateway.binary import envoy_path
from gateway.render import GatewaySettings, render
from gateway.routes import method_routes, rest_paths
from svc_kit.addresses import Address
from tests.certificates import Authority
from tests.integration.gateway.stack import DESCRIPTORS, FIRST_KEY, run_gateway

UPSTREAMS = {
    "dataset_svc_address": "127.0.0.1:1",
    "job_svc_address": "job-svc:50052",
    "inference_svc_address": "[::1]:3",
    "authz_address": "authz.tunery.svc.cluster.local:4",
}


def settings(**changes: Any) -> GatewaySettings:
    return GatewaySettings(**{**UPSTREAMS, "descriptors": DESCRIPTORS, **changes})


def clusters(**changes: Any) -> dict[str, Any]:
    configuration = yaml.safe_load(render(settings(**changes)))
    return {cluster["name"]: cluster for cluster in configuration["static_resources"]["clusters"]}


def test_upstreams_are_found_by_address_or_by_name() -> None:
    made = clusters()

    assert {name: cluster["type"] for name, cluster in made.items()} == {
        "dataset_svc": "STATIC",
        "job_svc": "STRICT_DNS",
        "inference_svc": "STATIC",
        "authz": "STRICT_DNS",
    }
    endpoint = made["inference_svc"]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    assert endpoint["address"]["socket_address"] == {"address": "::1", "port_value": 3}


def test_calls_are_spread_over_replicas_that_are_well() -> None:
    made = clusters(job_svc_address="127.0.0.1:1,127.0.0.2:2")["job_svc"]

    [locality] = made["load_assignment"]["endpoints"]
    assert [each["endpoint"]["address"]["socket_address"] for each in locality["lb_endpoints"]] == [
        {"address": "127.0.0.1", "port_value": 1},
        {"address": "127.0.0.2", "port_value": 2},
    ]
    assert made["type"] == "STATIC"
    assert all(cluster["health_checks"] for cluster in clusters().values())


def test_services_are_shown_a_certificate_where_they_speak_tls(tmp_path: Path) -> None:
    tls = Authority(tmp_path).issue("gateway")
    configuration = yaml.safe_load(render(settings(job_svc_address="127.0.0.1:1,127.0.0.2:2"), tls))
    made = {cluster["name"]: cluster for cluster in configuration["static_resources"]["clusters"]}

    assert {name: _believed(cluster) for name, cluster in made.items()} == {
        "dataset_svc": [("IP_ADDRESS", "127.0.0.1")],
        "job_svc": [("IP_ADDRESS", "127.0.0.1"), ("IP_ADDRESS", "127.0.0.2")],
        "inference_svc": [("IP_ADDRESS", "::1")],
        "authz": [("DNS", "authz.tunery.svc.cluster.local")],
    }
    assert "transport_socket" not in clusters()["job_svc"]


def _believed(cluster: dict[str, Any]) -> list[tuple[str, str]]:
    context = cluster["transport_socket"]["typed_config"]["common_tls_context"]
    names = context["validation_context"]["match_typed_subject_alt_names"]
    return [(name["san_type"], name["matcher"]["exact"]) for name in names]


@pytest.mark.parametrize("value", ["", "host", "host:", ":1", "host:x", "host:70000", "host:-1"])
def test_an_address_is_host_and_port(value: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        Address.parse(value)
    with pytest.raises(ValidationError, match="is not HOST:PORT"):
        settings(job_svc_address=value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"listen": "localhost:8080"}, "must be an IP address"),
        ({"admin": "0.0.0.0:9901"}, "on loopback only"),
        ({"admin": "192.0.2.1:9901"}, "on loopback only"),
        ({"admin": "admin:9901"}, "on loopback only"),
        ({"tls_key": "/key.pem"}, "go together"),
        ({"tls_certificate": "/cert.pem"}, "go together"),
        ({"max_upload_bytes": 0}, "greater than or equal to 1"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        settings(**changes)


def test_values_cannot_break_out_of_the_configuration() -> None:
    path = '/tmp/a": {x}\n- "b'
    configuration = yaml.safe_load(render(settings(access_log=path, admin='/tmp/"\n')))

    assert configuration["admin"]["address"]["pipe"]["path"] == '/tmp/"\n'
    manager = configuration["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    assert manager["typed_config"]["access_log"][0]["typed_config"]["path"] == path


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in UPSTREAMS.items():
        monkeypatch.setenv(f"TUNERY_GATEWAY_{name.upper()}", value)
    monkeypatch.setenv("TUNERY_GATEWAY_LISTEN", "0.0.0.0:80")

    environment = GatewayEnvironment()

    assert (environment.listen, environment.job_svc_address) == ("0.0.0.0:80", "job-svc:50052")
    assert environment.descriptors == DESCRIPTORS
    assert render(environment) == render(settings(listen="0.0.0.0:80"))


@pytest.mark.parametrize("services_tls", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"admin": "127.0.0.1:0", "access_log": "/dev/null", "max_upload_bytes": 5},
        {"request_headers_timeout_seconds": 0.5},
    ],
)
async def test_envoy_takes_it(tmp_path: Path, changes: dict[str, Any], services_tls: bool) -> None:
    file = tmp_path / "envoy.yaml"
    tls = Authority(tmp_path).issue("gateway") if services_tls else None
    file.write_text(render(settings(**changes), tls))

    process = await asyncio.create_subprocess_exec(
        envoy_path(), "--mode", "validate", "-c", file, "-l", "error",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()

    assert process.returncode == 0, output.decode()


def test_timeouts_and_retries_of_routes() -> None:
    routes = {route.path.split(".")[-1]: route for route in method_routes(DESCRIPTORS)}

    assert {
        name: (routes[name].timeout_seconds, routes[name].idle_seconds, routes[name].is_read)
        for name in (
            "JobService/TailLogs",
            "FineTuningService/TailJob",
            "FineTuningService/GetJobFile",
            "ModelService/DownloadFineTunedModel",
            "DatasetService/UploadDataset",
            "DatasetService/GetDatasetReport",
            "ChatService/CreateChatCompletion",
            "JobService/CreateJob",
            "JobService/CreateJobFromJson",
            "FineTuningService/SubmitJobFromJson",
            "JobService/CancelJob",
            "DatasetService/DeleteDataset",
            "AccountService/CreateAccount",
            "JobService/GetJob",
            "CreditService/GetCredits",
        )
    } == {
        "JobService/TailLogs": (0, 86400, False),
        "FineTuningService/TailJob": (0, 86400, False),
        "FineTuningService/GetJobFile": (0, 300, False),
        "ModelService/DownloadFineTunedModel": (0, 300, False),
        "DatasetService/UploadDataset": (0, 300, False),
        "DatasetService/GetDatasetReport": (300, 0, True),
        "ChatService/CreateChatCompletion": (600, 0, False),
        "JobService/CreateJob": (30, 0, False),
        "JobService/CreateJobFromJson": (30, 0, False),
        "FineTuningService/SubmitJobFromJson": (30, 0, False),
        "JobService/CancelJob": (15, 0, False),
        "DatasetService/DeleteDataset": (15, 0, False),
        "AccountService/CreateAccount": (15, 0, False),
        "JobService/GetJob": (15, 0, True),
        "CreditService/GetCredits": (15, 0, True),
    }
    uploads = {name for name, route in routes.items() if route.is_upload}
    assert uploads == {
        "DatasetService/UploadCsvForm",
        "DatasetService/UploadDialogsForm",
        "DatasetService/UploadDataset",
    }


def test_no_two_rest_paths_meet() -> None:
    # The routes for wrong methods ask each path's pattern in turn, as if no other path fitted it too.
    paths = rest_paths(DESCRIPTORS)
    examples = [re.sub(r"\[\^/\]\+", "x", path.pattern).replace("(/.*)?", "/a/b") for path in paths]
    for example in examples:
        plain = example.removesuffix("/?").replace("\\", "")
        assert sum(re.fullmatch(path.pattern, plain) is not None for path in paths) == 1, plain


async def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    process = await asyncio.create_subprocess_exec(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
        "-addext", "subjectAltName=IP:127.0.0.1",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0
    context = ssl.create_default_context(cafile=str(certificate))
    async with (
        run_gateway(tmp_path / "stack", tls_certificate=certificate, tls_key=key) as gateway,
        httpx.AsyncClient(verify=context) as client,
    ):
        answer = await client.get(
            f"https://{gateway.address}/api/v1/fine-tuning/jobs",
            headers={"authorization": f"Bearer {FIRST_KEY}"},
        )
    assert answer.json() == {"data": [], "total": 0}
