"""Settings of trainer_svc."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from svc_kit.addresses import Addresses
from svc_kit.settings import ObjectStoreSettings, ServerSettings


class TrainerSettings(ServerSettings, ObjectStoreSettings):
    """What trainer_svc reads from the environment (`TUNERY_*`)."""

    job_svc_address: Addresses = Field(description="HOST:PORT of job_svc, or several with commas between.")
    models_dir: Path = Field(description="Folder of base models; those missing are fetched into it.")
    work_dir: Path = Field(description="Folder for runs under way; emptied at start.")
    trainer_id: str = Field(min_length=1, max_length=200, description="Unique; the same after a restart.")
    drain_seconds: float = Field(
        60.0,
        ge=0,
        description="How long a trainer told to stop may take to store a checkpoint of its run; after "
        "that the run is killed, and the job goes on from the checkpoint before.",
    )
    catalog_file: Path | None = Field(None, description="Base models; the packaged catalog where unset.")
