"""Settings of dataset_svc."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from svc_kit.addresses import Addresses
from svc_kit.settings import DatabaseSettings, ObjectStoreSettings, ServerSettings


class DatasetSettings(ServerSettings, DatabaseSettings, ObjectStoreSettings):
    """What dataset_svc reads from the environment (`TUNERY_*`)."""

    job_svc_address: Addresses = Field(description="HOST:PORT of job_svc, or several with commas between.")
    models_dir: Path = Field(
        description="Folder of base models, for reports on datasets; those missing are fetched into it."
    )
    catalog_file: Path | None = Field(None, description="Base models; the packaged catalog where unset.")
    max_upload_bytes: int = Field(2**30, gt=0, description="Largest file, uploaded or named by a URI.")
    max_datasets: int = Field(10_000, ge=1, description="Datasets of one account; more are refused.")
    max_concurrent_uploads: int = Field(
        16, ge=1, description="Uploads of one account at a time, in each process; more are refused."
    )
    max_dataset_bytes: int | None = Field(
        None,
        ge=1,
        description="Bytes of all datasets of one account; more are refused. Unset: no limit.",
    )
    import_file_roots: tuple[Path, ...] = Field(
        (), description='Folders that file:// URIs may point into, as JSON: ["/srv/data"]. None by default.'
    )
    import_https_hosts: tuple[str, ...] = Field(
        (), description="Hosts (HOST or HOST:PORT) that https:// URIs may name, as JSON. None by default."
    )
    import_https_private: bool = Field(
        False, description="Whether those hosts may have loopback, link-local or private addresses."
    )
    import_https_ca_file: Path | None = Field(
        None, description="PEM of the authorities that those hosts' certificates are checked against."
    )
    import_s3_prefixes: tuple[str, ...] = Field(
        ("shared/",),
        description="Keys that every account's s3:// URIs may name, beside its own under accounts/ID/.",
    )
