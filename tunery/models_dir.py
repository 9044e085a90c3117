"""Where base models lie on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

DEFAULT_MODELS_DIR = Path("~/.cache/tunery/models")


def models_dir(environment: Mapping[str, str]) -> Path:
    """Returns the folder of the base models: `TUNERY_MODELS_DIR`, else one in the user's cache."""
    return Path(environment.get("TUNERY_MODELS_DIR") or DEFAULT_MODELS_DIR).expanduser().absolute()
