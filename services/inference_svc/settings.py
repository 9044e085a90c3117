"""Settings of inference_svc."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from svc_kit.addresses import Addresses
from svc_kit.settings import ObjectStoreSettings, StreamingServerSettings


class InferenceSettings(StreamingServerSettings, ObjectStoreSettings):
    """What inference_svc reads from the environment (`TUNERY_*`)."""

    job_svc_address: Addresses = Field(description="HOST:PORT of job_svc, or several with commas between.")
    models_dir: Path = Field(description="Folder of base models; one that is missing there is fetched.")
    cache_dir: Path = Field(
        description="Fine-tuned models fetched from the store are kept in inference_svc/ below it, which "
        "no other process may use."
    )
    catalog_file: Path | None = Field(None, description="Base models; the packaged catalog where unset.")
    max_loaded_base_models: int = Field(
        1, ge=1, description="Base models, and whole fine-tuned ones, in memory at a time."
    )
    max_loaded_adapters: int = Field(8, ge=1, description="Adapters in memory at a time, per base model.")
    max_cache_bytes: int = Field(
        20 * 1024**3, ge=1, description="Size of the cache, from which the models unused for longest go."
    )
    max_answer_tokens: int = Field(2048, ge=1, description="The longest answer that a request may ask for.")
    max_waiting_chats: int = Field(
        16,
        ge=0,
        description="Requests that may wait while one is answered; any more are refused. No "
        "account gets more than half of the places.",
    )
    chat_threads: int | None = Field(
        None, ge=1, description="Processor threads that an answer takes; torch's own choice where unset."
    )
    max_chat_body_bytes: int = Field(1024**2, ge=1, description="The largest body of a request.")
