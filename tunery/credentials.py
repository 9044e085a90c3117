"""`DIR/credentials.json`: where a stack's service is, and its first account's key."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_NAME = "credentials.json"


@dataclass(frozen=True)
class Credentials:
    """A service's URL and an account's API key."""

    url: str
    api_key: str


def read_credentials(data_dir: Path) -> Credentials:
    """Reads a stack's credentials.

    Raises:
        OSError: there are none, or they can't be read.
        ValueError: the file holds something else.
    """
    path = data_dir / FILE_NAME
    try:
        credentials = Credentials(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} doesn't hold a url and an api_key") from error
    if not (isinstance(credentials.url, str) and isinstance(credentials.api_key, str)):
        raise ValueError(f"{path} doesn't hold a url and an api_key")
    return credentials


def write_credentials(data_dir: Path, credentials: Credentials) -> None:
    """Writes a stack's credentials, over those that are there."""
    write_private(data_dir / FILE_NAME, json.dumps(asdict(credentials), indent=2) + "\n")


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read; it appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
