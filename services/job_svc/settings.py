"""Settings of job_svc."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from svc_kit.addresses import Addresses
from svc_kit.settings import DatabaseSettings, ObjectStoreSettings, StreamingServerSettings


class JobSettings(StreamingServerSettings, DatabaseSettings, ObjectStoreSettings):
    """What job_svc reads from the environment (`TUNERY_*`)."""

    dataset_svc_address: Addresses = Field(
        description="HOST:PORT of dataset_svc, or several with commas between."
    )
    public_url: str = Field(description="The gateway's URL; what a job's file URIs begin with.")
    catalog_file: Path | None = Field(None, description="Base models; the packaged catalog where unset.")
    credits_per_million_tokens: float = Field(1000.0, ge=0, description="Price of a million tokens.")
    lease_seconds: float = Field(15.0, gt=0, description="A trainer unheard of for so long has lost its job.")
    max_live_jobs: int = Field(
        1000,
        ge=1,
        description="Jobs of one account that may be waiting or running at once; more are refused.",
    )
    max_running_jobs: int | None = Field(
        None,
        ge=1,
        description="Jobs of one account that run at once; more wait. Unset: as many as trainers are.",
    )
    max_open_tails: int = Field(
        100, ge=1, description="Logs and metrics that an account may follow at a time, in one process."
    )
    max_retries: int = Field(
        3, ge=0, description="Restarts after faults of the platform without a new checkpoint in between."
    )
