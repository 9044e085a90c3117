"""Which service a command talks to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunery.credentials import FILE_NAME, Credentials, read_credentials
from tunery.errors import SetUpError

if TYPE_CHECKING:
    from tunery.client import TuneryClient

DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Use the stack that `tunery up` runs on this folder. Default: the service named by the "
        "variables TUNERY_URL and TUNERY_API_KEY.",
        show_default=False,
    ),
]


def connect(data_dir: Path | None) -> TuneryClient:
    """Returns a client of the service that the user means.

    Raises:
        SetUpError: the user named none, or the folder has no credentials.
    """
    from tunery.client import TuneryClient

    credentials = _find_credentials(data_dir)
    try:
        return TuneryClient(credentials.url, credentials.api_key)
    except ValueError as error:
        raise SetUpError(str(error)) from error


def _find_credentials(data_dir: Path | None) -> Credentials:
    if data_dir is not None:
        try:
            return read_credentials(data_dir.expanduser())
        except OSError as error:
            path = data_dir / FILE_NAME
            raise SetUpError(
                f"can't read {path}: {error.strerror}; `tunery up --data-dir {data_dir}` makes it"
            ) from error
        except ValueError as error:
            raise SetUpError(str(error)) from error
    url, api_key = os.environ.get("TUNERY_URL"), os.environ.get("TUNERY_API_KEY")
    if url and api_key:
        return Credentials(url, api_key)
    missing = " and ".join(
        name for name, value in (("TUNERY_URL", url), ("TUNERY_API_KEY", api_key)) if not value
    )
    raise SetUpError(f"which service? Give --data-dir DIR of a running `tunery up`, or set {missing}")
