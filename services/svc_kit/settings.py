"""Settings that the services have in common, read from the environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, FilePath, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from svc_kit.addresses import Addresses
from svc_kit.tls import Tls

Settings = TypeVar("Settings", bound=BaseSettings)
_WRONG_SETTINGS_EXIT_CODE = 2


def read_environment(settings: type[Settings]) -> Settings:
    """Reads settings from the environment. For `__main__.py` only: it ends the process where it can't.

    Raises:
        SystemExit: a variable is missing or wrong; stderr has a line for each, without any value, since
            values can be secrets.
    """
    prefix = settings.model_config["env_prefix"]
    try:
        return settings()
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            name = f"{prefix}{problem['loc'][0]}: ".upper() if problem["loc"] else ""
            print(f"{name}{problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)
    except SettingsError as error:
        print(f"{error}; {prefix} variables that hold a list take JSON", file=sys.stderr)
    sys.exit(_WRONG_SETTINGS_EXIT_CODE)


class TunerySettings(BaseSettings):
    """The base of every settings class: frozen, `TUNERY_*` variables, wrong values refused at start."""

    model_config = SettingsConfigDict(env_prefix="TUNERY_", frozen=True, extra="forbid")


class TlsSettings(TunerySettings):
    """TLS between the processes of the stack: all three files, or none."""

    tls_cert_file: Path | None = Field(
        None, description="PEM of this process's certificate, good for the host that others find it at."
    )
    tls_key_file: Path | None = Field(None, description="PEM of the certificate's key.")
    tls_ca_file: Path | None = Field(
        None, description="PEM of the authority whose certificates are believed, of services and of callers."
    )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        files = (self.tls_cert_file, self.tls_key_file, self.tls_ca_file)
        if any(files) and not all(files):
            raise ValueError(
                "TUNERY_TLS_CERT_FILE, TUNERY_TLS_KEY_FILE and TUNERY_TLS_CA_FILE go together; "
                "set all three, or none to have no TLS between the services"
            )
        if self.tls is not None:
            self.tls.check()
        return self

    @property
    def tls(self) -> Tls | None:
        """The files together; None where there is to be no TLS."""
        if self.tls_cert_file and self.tls_key_file and self.tls_ca_file:
            return Tls(self.tls_cert_file, self.tls_key_file, self.tls_ca_file)
        return None


class ServerSettings(TlsSettings):
    """Where a service listens and whom it believes."""

    listen: str = Field("127.0.0.1:0", description="HOST:PORT that the gRPC server binds.")
    identity_dir: Path = Field(
        description="Folder of identity keys: NAME.pub of every issuer, NAME.key of this service."
    )
    log_level: str = Field(
        "INFO", pattern="(?i)^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING or ERROR."
    )


class StreamingServerSettings(ServerSettings):
    """Of a service that streams to accounts."""

    authz_address: Addresses = Field(
        description="HOST:PORT of the auth check, asked whether open streams' API keys are still there."
    )


class DatabaseSettings(TunerySettings):
    """A service's own database."""

    database_url: SecretStr = Field(
        description="sqlite+aiosqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE. "
        "Each service keeps its own tables; on PostgreSQL they may share one database."
    )


class ObjectStoreSettings(TunerySettings):
    """The S3 store."""

    s3_endpoint: str = Field(description="http://HOST:PORT or https://HOST of MinIO or any S3.")
    s3_access_key: SecretStr = Field(description="The access key.")
    s3_secret_key: SecretStr = Field(description="The secret key.")
    s3_bucket: str = Field("tunery", description="The bucket; made at start where it doesn't exist.")
    s3_region: str = Field("us-east-1", description="The bucket's region.")
    s3_ca_file: FilePath | None = Field(
        None,
        description="PEM file of the authority that signs the store's certificate; unset: the public ones.",
    )
