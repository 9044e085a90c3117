"""Which processes the stack of `tunery up` has, and what each is told."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pydantic import ValidationError

from gateway.binary import envoy_command
from gateway.render import GatewaySettings, render
from svc_kit.identity import write_identity_keys
from svc_kit.settings import TlsSettings
from svc_kit.tls import Tls
from tunery.credentials import FILE_NAME, Credentials, read_credentials, write_credentials
from tunery.embedded_s3 import EmbeddedS3
from tunery.errors import SetUpError
from tunery.models_dir import models_dir
from tunery.ports import free_ports
from tunery.supervisor import ProcessSpec

SERVICES = {
    "dataset_svc": "dataset_svc",
    "job_svc": "job_svc",
    "authz": "gateway.authz",
    "trainer_svc": "trainer_svc",
    "inference_svc": "inference_svc",
}
# Whoever calls others is stopped before them: the gateway and the workers, the services, the store.
_STOP_STAGE = {"gateway": 0, "trainer_svc": 0, "inference_svc": 0, "s3": 2}
_SERVICES_STOP_STAGE = 1
# Under the time that `up.py` gives the first stage. What a trainer says last may be cut, if job_svc is away.
_DRAIN_SECONDS = 4.0
_CLIENT_VARIABLES = ("TUNERY_URL", "TUNERY_API_KEY")


@dataclass(frozen=True)
class Stack:
    """The processes of a stack, with where each one's health is asked.

    Attributes:
        credentials: of the first account.
        specs: the processes, in the order in which they are started.
        grpc_addresses: HOST:PORT of each Python process, by its name.
        tls: what they speak with each other; None where that is no TLS.
        embedded_s3: the S3 server of its own, where it has one.
    """

    credentials: Credentials
    specs: tuple[ProcessSpec, ...]
    grpc_addresses: Mapping[str, str]
    tls: Tls | None
    embedded_s3: EmbeddedS3 | None


@dataclass(frozen=True)
class _Replica:
    """A process of a service. A service's first keeps its name and folders however many come after it."""

    service: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.service}{self.suffix}"

    @property
    def suffix(self) -> str:
        return f"-{self.number}" if self.number > 1 else ""


def plan_stack(
    data_dir: Path,
    port: int,
    environment: Mapping[str, str],
    weed: Path | None,
    replicas: Mapping[str, int],
) -> Stack:
    """Decides on ports and settings, and writes what the processes read at their start.

    Args:
        data_dir: an absolute folder that exists and is this process's alone.
        port: the gateway's.
        environment: the operator's; `TUNERY_*` in it is handed on.
        weed: the embedded S3 server's program; None where the environment names an S3 store.
        replicas: how many processes a service has, by its name; one where it isn't named.

    Raises:
        SetUpError: the environment names a store without keys or a part of what TLS needs, or Envoy isn't
            installed.
        OSError: something can't be written.
        ValueError: a file of credentials or a variable is broken.
    """
    tls = _tls(environment)
    credentials = _keep_credentials(data_dir, f"http://127.0.0.1:{port}", environment)
    write_identity_keys(data_dir / "identity")
    for name in ("db", "logs", "run", "work", "cache"):
        (data_dir / name).mkdir(exist_ok=True, mode=0o700)
    processes = {
        service: [_Replica(service, number + 1) for number in range(replicas.get(service, 1))]
        for service in SERVICES
    }
    all_processes = list(chain.from_iterable(processes.values()))
    ports = free_ports(len(all_processes), taken={port})
    addresses = {
        process.name: f"127.0.0.1:{port}" for process, port in zip(all_processes, ports, strict=True)
    }
    found_at = {
        service: ",".join(addresses[process.name] for process in those)
        for service, those in processes.items()
    }
    embedded_s3 = EmbeddedS3(data_dir / "s3", weed, {port, *ports}) if weed else None
    shared = _shared_environment(data_dir, environment, credentials, found_at, embedded_s3)
    specs = []
    if embedded_s3:
        specs.append(_s3_process(data_dir, environment, embedded_s3))
    specs += [_service_process(process, data_dir, shared, addresses) for process in all_processes]
    try:
        specs.append(_gateway_process(data_dir, port, shared, found_at, tls))
    except FileNotFoundError as error:
        raise SetUpError(f"the gateway can't be started: {error}") from error
    return Stack(credentials, tuple(specs), addresses, tls, embedded_s3)


def _tls(environment: Mapping[str, str]) -> Tls | None:
    try:
        return TlsSettings(
            tls_cert_file=environment.get("TUNERY_TLS_CERT_FILE"),
            tls_key_file=environment.get("TUNERY_TLS_KEY_FILE"),
            tls_ca_file=environment.get("TUNERY_TLS_CA_FILE"),
        ).tls
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise SetUpError("; ".join(p["msg"].removeprefix("Value error, ") for p in problems)) from error


def _keep_credentials(data_dir: Path, url: str, environment: Mapping[str, str]) -> Credentials:
    if (data_dir / FILE_NAME).exists():
        api_key = read_credentials(data_dir).api_key
    elif not (api_key := environment.get("TUNERY_FIRST_API_KEY", "")):
        if (data_dir / "db" / "authz.sqlite").exists():
            raise SetUpError(
                f"{data_dir / FILE_NAME} is missing, and of the first account's key only a hash is kept; put "
                "the file back, or set TUNERY_FIRST_API_KEY to the key"
            )
        from gateway.authz.api_keys import new_api_key  # brings SQLAlchemy, for the first start only

        api_key = new_api_key()
    credentials = Credentials(url, api_key)
    write_credentials(data_dir, credentials)
    return credentials


def _shared_environment(
    data_dir: Path,
    environment: Mapping[str, str],
    credentials: Credentials,
    found_at: Mapping[str, str],
    embedded_s3: EmbeddedS3 | None,
) -> dict[str, str]:
    shared = {name: value for name, value in environment.items() if name not in _CLIENT_VARIABLES}
    if embedded_s3:
        shared |= {
            "TUNERY_S3_ENDPOINT": embedded_s3.endpoint,
            "TUNERY_S3_ACCESS_KEY": embedded_s3.keys.access_key,
            "TUNERY_S3_SECRET_KEY": embedded_s3.keys.secret_key,
        }
    elif missing := [
        name for name in ("TUNERY_S3_ACCESS_KEY", "TUNERY_S3_SECRET_KEY") if not environment.get(name)
    ]:
        raise SetUpError(f"TUNERY_S3_ENDPOINT is set, but {' and '.join(missing)} isn't")
    # Two stacks may share a queue, where each trainer needs a name of its own that outlives its restart.
    place = hashlib.sha256(str(data_dir).encode()).hexdigest()[:8]
    shared.setdefault("TUNERY_TRAINER_ID", f"{socket.gethostname()}-{place}")
    shared.setdefault("TUNERY_PUBLIC_URL", credentials.url)
    shared.setdefault("TUNERY_DRAIN_SECONDS", str(_DRAIN_SECONDS))
    return shared | {
        "TUNERY_IDENTITY_DIR": str(data_dir / "identity"),
        "TUNERY_DATASET_SVC_ADDRESS": found_at["dataset_svc"],
        "TUNERY_JOB_SVC_ADDRESS": found_at["job_svc"],
        "TUNERY_AUTHZ_ADDRESS": found_at["authz"],
        "TUNERY_MODELS_DIR": str(models_dir(environment)),
        "TUNERY_WORK_DIR": environment.get("TUNERY_WORK_DIR") or str(data_dir / "work"),
        "TUNERY_CACHE_DIR": environment.get("TUNERY_CACHE_DIR") or str(data_dir / "cache"),
        "TUNERY_FIRST_API_KEY": credentials.api_key,
    }


def _s3_process(data_dir: Path, environment: Mapping[str, str], server: EmbeddedS3) -> ProcessSpec:
    # Keys meant for another S3 would be let in beside its own.
    own = {name: value for name, value in environment.items() if not name.startswith(("AWS_", "WEED_"))}
    # Without a limit Go's heap doubles at each large upload, by 400 MB and more. Much less than this makes
    # the collector run without pause: at 256 MiB uploads take twice as long, at 200 MiB it never rests.
    own |= {"GOMEMLIMIT": "340MiB"}
    return ProcessSpec(
        "s3", server.command, own, data_dir / "logs" / "s3.log", _STOP_STAGE["s3"], server.folder
    )


def _service_process(
    process: _Replica, data_dir: Path, shared: Mapping[str, str], addresses: Mapping[str, str]
) -> ProcessSpec:
    own = {"TUNERY_LISTEN": addresses[process.name]}
    if not shared.get("TUNERY_DATABASE_URL"):
        own["TUNERY_DATABASE_URL"] = _sqlite_url(data_dir / "db" / f"{process.service}.sqlite")
    # Those that no two processes may have in common.
    for name in ("TUNERY_TRAINER_ID", "TUNERY_WORK_DIR", "TUNERY_CACHE_DIR"):
        own[name] = f"{shared[name]}{process.suffix}"
    environment = {**shared, **own}
    if process.service != "authz":
        del environment["TUNERY_FIRST_API_KEY"]
    return ProcessSpec(
        process.name,
        # -P: the folder that the operator stands in must not hide a module.
        (sys.executable, "-P", "-m", SERVICES[process.service]),
        environment,
        data_dir / "logs" / f"{process.name}.log",
        _STOP_STAGE.get(process.service, _SERVICES_STOP_STAGE),
    )


def _sqlite_url(path: Path) -> str:
    # As they are, these would end the path, or stand for another character.
    escapes = {ord(character): f"%{ord(character):02X}" for character in "%?#"}
    return f"sqlite+aiosqlite:///{str(path).translate(escapes)}"


def _gateway_process(
    data_dir: Path, port: int, shared: Mapping[str, str], found_at: Mapping[str, str], tls: Tls | None
) -> ProcessSpec:
    upload_limit = shared.get("TUNERY_GATEWAY_MAX_UPLOAD_BYTES") or shared.get("TUNERY_MAX_UPLOAD_BYTES")
    settings = GatewaySettings(
        listen=f"127.0.0.1:{port}",
        dataset_svc_address=found_at["dataset_svc"],
        job_svc_address=found_at["job_svc"],
        inference_svc_address=found_at["inference_svc"],
        authz_address=found_at["authz"],
        descriptors=Path(__file__).with_name("descriptors.pb"),
        access_log=Path("/dev/stdout"),  # which is its log file
        **({"max_upload_bytes": int(upload_limit)} if upload_limit else {}),
        **{
            name: int(shared[variable])
            for name in ("requests_per_second", "request_burst")
            if (variable := f"TUNERY_GATEWAY_{name.upper()}") in shared
        },
    )
    config = data_dir / "run" / "envoy.yaml"
    config.write_text(render(settings, tls), encoding="utf-8")
    own = {name: value for name, value in shared.items() if not name.startswith("TUNERY_")}
    return ProcessSpec(
        "gateway", envoy_command(config), own, data_dir / "logs" / "gateway.log", _STOP_STAGE["gateway"]
    )
