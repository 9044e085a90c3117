"""deploy/ against the tree and the services: no container engine is needed, so none is used."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from pydantic_settings import BaseSettings

from dataset_svc.settings import DatasetSettings
from gateway.__main__ import GatewayEnvironment
from gateway.authz.api_keys import is_api_key, new_api_key
from gateway.authz.settings import AuthzSettings
from gateway.binary import envoy_path
from gateway.render import render
from inference_svc.settings import InferenceSettings
from job_svc.settings import JobSettings
from svc_kit.identity import KINDS, Issuer, Verifier, write_identity_keys
from tests.certificates import Authority
from tests.certificates import variables as tls_variables
from trainer_svc.settings import TrainerSettings
from tunery.ports import free_ports

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# Our processes: what each runs, and the class that reads its environment.
SETTINGS: dict[str, tuple[str, type[BaseSettings]]] = {
    "dataset_svc": ("dataset_svc", DatasetSettings),
    "job_svc": ("job_svc", JobSettings),
    "trainer_svc": ("trainer_svc", TrainerSettings),
    "inference_svc": ("inference_svc", InferenceSettings),
    "authz": ("gateway.authz", AuthzSettings),
    "gateway": ("gateway", GatewayEnvironment),
}
# The kinds of callers that each service vouches for, and so the private keys that it has.
OWN_KINDS = {
    "dataset_svc": {"dataset_svc"},
    "job_svc": {"job_svc"},
    "trainer_svc": {"trainer"},
    "inference_svc": {"inference_svc"},
    "authz": {"account", "authz"},
}
OUTSIDE_PORTS = {"minio": 9000, "postgres": 5432}
FOREIGN = set(OUTSIDE_PORTS)
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")
every_service = pytest.mark.parametrize("name", SETTINGS)


def env_file() -> dict[str, str]:
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def filled_in() -> dict[str, str]:
    """The example with its secrets filled in as it says."""
    values = env_file()
    return values | {
        "POSTGRES_PASSWORD": "0123456789abcdef",
        "S3_SECRET_KEY": "0123456789abcdef",
        "FIRST_API_KEY": new_api_key(),
    }


def interpolated(text: str, values: dict[str, str]) -> str:
    """What Compose makes of `${NAME}`, `${NAME:-default}`, `${NAME:?message}` and `$$`."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        if match[2] == ":-":
            return values.get(match[1]) or match[3]
        assert values.get(match[1]), f"{match[1]} is not set"
        return values[match[1]]

    return VARIABLE.sub(value, text)


def strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for item in node.values():
            yield from strings(item)
    elif isinstance(node, list):
        for item in node:
            yield from strings(item)


def environment(name: str, values: dict[str, str]) -> dict[str, str]:
    """The TUNERY_* variables of a service, those that its command sets among them."""
    found = {
        key: interpolated(value, values)
        for key, value in SERVICES[name]["environment"].items()
        if key.startswith("TUNERY_")
    }
    of_command = re.findall(r"(TUNERY_\w+)=", " ".join(SERVICES[name]["command"]))
    return found | dict.fromkeys(of_command, "a3f1c2d4e5b6")


def variables(settings: type[BaseSettings], *, required: bool = False) -> set[str]:
    prefix = settings.model_config["env_prefix"]
    fields = settings.model_fields.items()
    return {f"{prefix}{name}".upper() for name, field in fields if field.is_required() or not required}


def dockerfile() -> list[list[str]]:
    """The Dockerfile's instructions as words."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def copied() -> list[tuple[list[str], str]]:
    """Sources and destination of every COPY from the build context."""
    copies = [words[1:] for words in dockerfile() if words[0] == "COPY"]
    return [(words[:-1], words[-1]) for words in copies if not words[0].startswith("--from")]


def test_the_stack_is_whole() -> None:
    assert set(SERVICES) == {*SETTINGS, *FOREIGN, "identity"}
    for name, (module, _) in SETTINGS.items():
        assert f"python -m {module}" in " ".join(SERVICES[name]["command"]), name


@every_service
def test_settings_are_known_complete_and_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS[name][1]
    given = environment(name, filled_in())
    assert given.keys() - variables(settings) == set(), "unknown settings"
    assert variables(settings, required=True) - given.keys() == set(), "missing settings"
    for variable in [key for key in os.environ if key.startswith("TUNERY_")]:
        monkeypatch.delenv(variable)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    settings()


def test_the_first_key_has_a_keys_form() -> None:
    assert is_api_key(environment("authz", filled_in())["TUNERY_FIRST_API_KEY"])


def listen_port(name: str) -> int:
    key = "TUNERY_GATEWAY_LISTEN" if name == "gateway" else "TUNERY_LISTEN"
    host, port = SERVICES[name]["environment"][key].split(":")
    assert host == "0.0.0.0", "a container is reached by others"  # noqa: S104  # on a network of its own
    return int(port)


@every_service
def test_addresses_are_where_their_services_listen(name: str) -> None:
    for variable, value in environment(name, filled_in()).items():
        if variable.endswith("_ADDRESS"):
            host, port = value.split(":")
            assert variable.removeprefix("TUNERY_").removeprefix("GATEWAY_") == f"{host.upper()}_ADDRESS"
            assert int(port) == listen_port(host), variable
        if variable in ("TUNERY_S3_ENDPOINT", "TUNERY_DATABASE_URL"):
            url = urlsplit(value)
            assert url.hostname in FOREIGN
            assert url.port == OUTSIDE_PORTS[url.hostname]


def networks(name: str) -> set[str]:
    return set(SERVICES[name].get("networks", ["default"]))


@every_service
def test_whoever_is_named_in_an_address_is_on_the_same_network(name: str) -> None:
    for value in environment(name, filled_in()).values():
        for host in re.findall(r"(?:^|[/@])(\w+):\d+(?:/|$)", value):
            assert networks(name) & networks(host), host


def test_ports_are_each_services_own_and_only_the_gateways_is_published() -> None:
    ports = [listen_port(name) for name in SETTINGS]
    assert len(set(ports)) == len(ports)
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["gateway"]
    [published] = SERVICES["gateway"]["ports"]
    assert interpolated(published, env_file()) == f"127.0.0.1:8080:{listen_port('gateway')}"
    assert env_file()["PUBLIC_URL"] == "http://127.0.0.1:8080"


@every_service
def test_health_is_asked_where_the_service_listens(name: str) -> None:
    assert f"127.0.0.1:{listen_port(name)}" in " ".join(SERVICES[name]["healthcheck"]["test"])


@pytest.mark.parametrize("is_tls", [False, True])
def test_health_check_tells_a_well_server_from_none(tmp_path: Path, is_tls: bool) -> None:
    write_identity_keys(tmp_path)
    [port] = free_ports(1)
    tls = tls_variables(Authority(tmp_path / "tls").issue("service")) if is_tls else {}
    check = [sys.executable, str(DEPLOY / "check_health.py"), f"127.0.0.1:{port}"]
    assert subprocess.run(check, env={**os.environ, **tls}, capture_output=True, check=False).returncode == 1
    serving = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env={
            **{**os.environ, **tls},
            "TUNERY_IDENTITY_DIR": str(tmp_path),
            "TUNERY_LISTEN": f"127.0.0.1:{port}",
        },
        stdout=subprocess.PIPE,
    )
    try:
        assert serving.stdout
        assert b"serving" in serving.stdout.readline()
        assert subprocess.run(check, env={**os.environ, **tls}, check=False).returncode == 0
        if is_tls:
            assert subprocess.run(check, capture_output=True, check=False).returncode == 1
    finally:
        serving.kill()
        serving.communicate()


_SERVER = """
import asyncio
from svc_kit.identity import Verifier
from svc_kit.server import make_server, serve
from svc_kit.settings import ServerSettings

async def main():
    settings = ServerSettings()
    server, health = make_server([], Verifier(settings.identity_dir))
    await serve(server, health, settings.listen, tls=settings.tls)

asyncio.run(main())
"""


def test_every_image_is_pinned() -> None:
    images = [service["image"] for name, service in SERVICES.items() if name in FOREIGN]
    [argument] = [words[1] for words in dockerfile() if words[0] == "ARG" and "PYTHON_IMAGE" in words[1]]
    images.append(argument.removeprefix("PYTHON_IMAGE="))
    assert images[-1].startswith("python:3.11")
    readme = (DEPLOY / "README.md").read_text()
    images += re.findall(r"^\s+(\w+:[\w.-]+) \w", readme, re.MULTILINE)
    for image in images:
        assert re.search(r":(RELEASE\.\d{4}-\d\d-\d\dT[\d-]+Z|\d+\.\d+[\w.-]*)$", image), image
    assert {words[1] for words in dockerfile() if words[0] == "FROM"} == {"${PYTHON_IMAGE}"}
    versions = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert versions
    assert COMPOSE["x-tunery"]["image"] == f"tunery:{versions[1]}"


def test_the_image_runs_as_its_own_user_and_installs_pinned_versions() -> None:
    words = dockerfile()
    assert [each[1] for each in words if each[0] == "USER"] == ["tunery"]
    installs = [part for each in words if each[0] == "RUN" for part in " ".join(each[1:]).split("&&")]
    installs = [part for part in installs if "pip install" in part]
    assert installs
    assert all("--constraint constraints.txt" in part for part in installs)
    [torch_index] = [each[1] for each in words if each[:1] == ["ARG"] and "TORCH_INDEX" in each[1]]
    assert torch_index.endswith("/whl/cpu")
    assert env_file()["TORCH_INDEX"] == torch_index.removeprefix("TORCH_INDEX=")
    [extras] = [each[1] for each in words if each[:1] == ["ARG"] and each[1].startswith("EXTRAS")]
    assert env_file()["EXTRAS"] == extras.removeprefix("EXTRAS=")


def test_build_context_and_everything_copied_are_there() -> None:
    build = COMPOSE["x-tunery"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DEPLOY / "Dockerfile"
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    assert lines[1] == "*"
    for pattern in let_in:
        assert (ROOT / pattern).exists(), pattern
    for sources, _ in copied():
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) for pattern in let_in), source


def test_paths_inside_the_image_are_made_by_the_dockerfile() -> None:
    placed = {destination + Path(source).name for sources, destination in copied() for source in sources}
    [made] = [" ".join(words) for words in dockerfile() if "install --directory" in " ".join(words)]
    folders = set(re.findall(r"(?<= )/[\w/]+", made.partition("--mode")[2]))
    for name in {*SETTINGS, "identity"}:
        service = SERVICES[name]
        named = [
            text for text in strings([service["command"], service.get("healthcheck", {})]) if " " not in text
        ]
        for path in named:
            if path.startswith("/opt/"):
                assert path in placed
        for volume in service.get("volumes", []):
            source, target, *_ = volume.split(":")
            assert source in COMPOSE["volumes"]
            assert target in folders
        for value in service.get("environment", {}).values():
            if value and value.startswith("/") and not value.startswith("/dev/"):
                assert value in folders


def test_volumes_and_networks_are_declared_and_used() -> None:
    mounted = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert mounted == set(COMPOSE["volumes"])
    assert {*COMPOSE["networks"], "default"} == set().union(*map(networks, SERVICES))
    assert COMPOSE["networks"]["sql"]["internal"] is True
    assert networks("postgres") == {"sql"}
    with_tables = {name for name in SETTINGS if "TUNERY_DATABASE_URL" in environment(name, filled_in())}
    assert {name for name in SERVICES if "sql" in networks(name)} == with_tables | {"postgres"}


def test_services_wait_for_those_that_tell_when_they_are_ready() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], other
            else:
                assert (how["condition"], other) == ("service_completed_successfully", "identity"), name
        assert "mem_limit" in service, name
        assert service["restart"] == ("no" if name == "identity" else "unless-stopped")


def test_example_names_exactly_the_variables_of_the_compose_file() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    used = {match[1] for match in VARIABLE.finditer(text) if match[1]}
    assert set(env_file()) == used
    required = {match[1] for match in VARIABLE.finditer(text) if match[2] == ":?"}
    assert {name for name, value in env_file().items() if not value} <= required
    passed_on = {
        key for name in SETTINGS for key, value in SERVICES[name]["environment"].items() if not value
    }
    commented = re.findall(r"^# (\w+)=$", (DEPLOY / ".env.example").read_text(), re.MULTILINE)
    assert set(commented) == passed_on


def test_each_service_gets_its_own_private_keys_and_no_others(tmp_path: Path) -> None:
    script = SERVICES["identity"]["command"][1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["/bin/sh", str(DEPLOY / Path(script).name), str(tmp_path)]
    for _ in range(2):  # safe to repeat
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})
    for name, kinds in OWN_KINDS.items():
        folder = tmp_path / name
        assert {path.stem for path in folder.glob("*.key")} == kinds
        assert {path.stem for path in folder.glob("*.pub")} == set(KINDS)
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.glob("*.key"))
        for kind in kinds:
            token = Issuer.load(kind, folder).issue("x")
            assert Verifier(tmp_path / "job_svc").verify(token).kind == kind
        mount = environment(name, filled_in())["TUNERY_IDENTITY_DIR"]
        assert f"identity_{name}:{mount}:ro" in SERVICES[name]["volumes"]
        assert f"identity_{name}:{mount}" in SERVICES["identity"]["volumes"]
        identity_volumes = [volume for volume in SERVICES[name]["volumes"] if "identity" in volume]
        assert len(identity_volumes) == 1


def test_envoy_takes_the_gateways_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key, value in environment("gateway", filled_in()).items():
        monkeypatch.setenv(key, value)
    config = tmp_path / "envoy.yaml"
    config.write_text(render(GatewayEnvironment()))
    command = [str(envoy_path()), "--mode", "validate", "--config-path", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_trainer_is_named_by_its_container(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$TUNERY_TRAINER_ID $*"\n')
    python.chmod(0o755)
    (tmp_path / "hostname").write_text("#!/bin/sh\necho a3f1c2d4e5b6\n")
    (tmp_path / "hostname").chmod(0o755)
    command = [interpolated(word, {}) for word in SERVICES["trainer_svc"]["command"]]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "a3f1c2d4e5b6 -m trainer_svc\n"


def test_the_image_holds_every_module_and_file(tmp_path: Path) -> None:
    for sources, destination in copied():
        for source in sources:
            if source.startswith("deploy/"):
                continue
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*_pb2*", "descriptors.pb")
                shutil.copytree(ROOT / source, tmp_path / destination, ignore=ignored)
            else:
                shutil.copy(ROOT / source, tmp_path / destination)
    hatchling = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", "dist"]
    subprocess.run(hatchling, cwd=tmp_path, check=True, capture_output=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in ["gateway", "tunery", *(path.name for path in (ROOT / "services").iterdir())]:
        folder = ROOT / "services" if (ROOT / "services" / package).is_dir() else ROOT
        for path in (folder / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(folder).as_posix() in held
    commands = " ".join(text for service in SERVICES.values() for text in strings(service.get("command", [])))
    commands += (DEPLOY / "make_identity.sh").read_text() + (DEPLOY / "README.md").read_text()
    modules = set(re.findall(r"python -m ([\w.]+)", commands))
    assert {module for module, _ in SETTINGS.values()} <= modules
    for module in modules:
        path = module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__main__.py"} & held, module


def test_gpu_file_adds_to_services_that_there_are() -> None:
    overlay = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
    assert set(overlay["services"]) == {"trainer_svc", "inference_svc"}


def test_readme_names_files_and_settings_that_there_are() -> None:
    readme = (DEPLOY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (DEPLOY / link).exists(), link
    for name in re.findall(r"^\| `([^`]+)` \|", readme, re.MULTILINE):
        assert (DEPLOY / name).exists(), name
    known = {"TUNERY_URL", "TUNERY_API_KEY"}.union(*(variables(each) for _, each in SETTINGS.values()))
    assert set(re.findall(r"TUNERY_\w+", readme)) <= known
    assert set(re.findall(r"(?:--scale |compose run .*?)(\w+_svc)", readme)) <= set(SERVICES)
