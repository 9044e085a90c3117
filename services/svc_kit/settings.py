"""Settings that the services have in common, read from the environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class TunerySettings(BaseSettings):
    """The base of every settings class: frozen, `TUNERY_*` variables, wrong values refused at start."""

    model_config = SettingsConfigDict(env_prefix="TUNERY_", frozen=True, extra="forbid")


class ServerSettings(TunerySettings):
    """Where a service listens and whom it believes."""

    listen: str = Field("127.0.0.1:0", description="HOST:PORT that the gRPC server binds.")
    identity_dir: Path = Field(
        description="Folder of identity keys: NAME.pub of every issuer, NAME.key of this service."
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")


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
