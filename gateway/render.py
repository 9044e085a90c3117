"""Envoy's configuration, from typed settings."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import jinja2
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gateway import routes
from gateway.errors import ANY_OTHER_ERROR, GATEWAY_ERRORS, RATE_LIMITED, REFUSED, details_headers
from svc_kit.addresses import Address, Addresses, parse_addresses
from svc_kit.errors import TooManyRequests
from svc_kit.tls import Tls

MAX_JSON_BYTES = 1024 * 1024
_FOLDER = Path(__file__).parent


def _checked_listen(text: str) -> str:
    if Address.parse(text).ip_version is None:
        raise ValueError(f"{text!r}: the host must be an IP address; 0.0.0.0 is every one of the machine's")
    return text


def _checked_admin(text: str) -> str:
    if not text.startswith("/"):
        address = Address.parse(text)
        if address.ip_version is None or not ipaddress.ip_address(address.host).is_loopback:
            raise ValueError(f"{text!r}: Envoy's admin page can stop it, so it is served on loopback only")
    return text


class GatewaySettings(BaseModel):
    """What differs between one gateway and another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: Annotated[str, AfterValidator(_checked_listen)] = Field(
        "127.0.0.1:8080", description="IP:PORT of the one port that clients use; port 0 takes a free one."
    )
    admin: Annotated[str, AfterValidator(_checked_admin)] | None = Field(
        None, description="Envoy's admin page: a loopback IP:PORT, or the path of a Unix socket."
    )
    dataset_svc_address: Addresses = Field(
        description="HOST:PORT of dataset_svc, or several with commas between."
    )
    job_svc_address: Addresses = Field(description="HOST:PORT of job_svc, or several with commas between.")
    inference_svc_address: Addresses = Field(
        description="HOST:PORT of inference_svc, or several with commas between."
    )
    authz_address: Addresses = Field(
        description="HOST:PORT of the auth check and the account service, or several with commas between."
    )
    descriptors: Path = Field(description="The descriptor set that the package's build makes.")
    max_upload_bytes: int = Field(1024**3, ge=1, description="The largest file of an upload, in bytes.")
    access_log: Path | None = Field(None, description="One JSON object a line for each call; none if unset.")
    tls_certificate: Path | None = Field(None, description="PEM file; with tls_key, the port speaks TLS.")
    tls_key: Path | None = Field(None, description="PEM file.")
    requests_per_second: int = Field(
        100, ge=1, description="Requests of one account that are taken in the long run; any more get 429."
    )
    request_burst: int = Field(200, ge=1, description="How many of them may come at once.")
    request_headers_timeout_seconds: float = Field(
        10.0, gt=0, description="A request whose headers take longer is ended with 408."
    )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> GatewaySettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError(
                "TUNERY_GATEWAY_TLS_CERTIFICATE and TUNERY_GATEWAY_TLS_KEY go together; set both, or none"
            )
        return self


def _transcoded(methods: Iterable[routes.MethodRoute]) -> list[str]:
    return sorted({route.path.split("/")[1] for route in methods})


def render(settings: GatewaySettings, services_tls: Tls | None = None) -> str:
    """Returns Envoy's whole configuration in YAML.

    Args:
        settings: of this gateway.
        services_tls: what it shows to the services and believes of them, where they speak TLS.

    Raises:
        FileNotFoundError: there is no descriptor set at `settings.descriptors`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  # YAML, no HTML; values are written as JSON
    )
    method_routes = routes.method_routes(settings.descriptors)
    admin = settings.admin or ""
    tls = {"certificate": str(settings.tls_certificate), "key": str(settings.tls_key)}
    return environment.get_template("envoy.yaml.j2").render(
        listen=Address.parse(settings.listen),
        admin_pipe=admin if admin.startswith("/") else None,
        admin_address=Address.parse(admin) if admin and not admin.startswith("/") else None,
        upstreams={
            "dataset_svc": parse_addresses(settings.dataset_svc_address),
            "job_svc": parse_addresses(settings.job_svc_address),
            "inference_svc": parse_addresses(settings.inference_svc_address),
            "authz": parse_addresses(settings.authz_address),
        },
        descriptors=str(settings.descriptors.absolute()),
        lua=str(_FOLDER / "envelope.lua"),
        auth_cache_lua=str(_FOLDER / "auth_cache.lua"),
        requests_per_second=settings.requests_per_second,
        request_burst=settings.request_burst,
        rate_limited=RATE_LIMITED,
        rate_limited_headers={"retry-after": "1", **details_headers(TooManyRequests(RATE_LIMITED.message))},
        tls=tls if settings.tls_certificate else None,
        services_tls=services_tls,
        access_log=str(settings.access_log) if settings.access_log else None,
        request_headers_timeout_seconds=settings.request_headers_timeout_seconds,
        max_json_bytes=MAX_JSON_BYTES,
        # A file's frame is the multipart headers, or 11 bytes for each chunk of a native upload. The
        # service holds the file itself to the limit.
        max_upload_body_bytes=settings.max_upload_bytes + settings.max_upload_bytes // 64 + MAX_JSON_BYTES,
        method_routes=method_routes,
        open_methods=routes.OPEN_METHODS,
        open_seconds=routes.OPEN_SECONDS,
        open_per_second=routes.OPEN_PER_SECOND,
        open_burst=routes.OPEN_BURST,
        rest_paths=routes.rest_paths(settings.descriptors),
        transcoded_services=_transcoded(method_routes),
        refused=REFUSED,
        errors=GATEWAY_ERRORS,
        any_other_error=ANY_OTHER_ERROR,
    )
