"""Settings that the services have in common, read from the environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

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
            name = f"{prefix}{problem['loc'][0]}".upper() if problem["loc"] else prefix
            print(f"{name}: {problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)
    except SettingsError as error:
        print(f"{error}; {prefix} variables that hold a list take JSON", file=sys.stderr)
    sys.exit(_WRONG_SETTINGS_EXIT_CODE)


class TunerySettings(BaseSettings):
    """The base of every settings class: frozen, `TUNERY_*` variables, wrong values refused at start."""

    model_config = SettingsConfigDict(env_prefix="TUNERY_", frozen=True, extra="forbid")


class ServerSettings(TunerySettings):
    """Where a service listens and whom it believes."""

    listen: str = Field("127.0.0.1:0", description="HOST:PORT that the gRPC server binds.")
    identity_dir: Path = Field(
        description="Folder of identity keys: NAME.pub of every issuer, NAME.key of this service."
    )
    log_level: str = Field(
        "INFO", pattern="(?i)^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING or ERROR."
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
