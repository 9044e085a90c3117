"""The bitsandbytes package, where it is installed."""

from __future__ import annotations

import importlib
from typing import Any

from trainer_svc.engine.errors import JobFault


def bitsandbytes_for(setting: str) -> Any:
    """Returns the package.

    Args:
        setting: what needs it, for the error.

    Raises:
        JobFault: the package isn't installed on this machine.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise JobFault(
            f"{setting} needs bitsandbytes, which isn't installed on this trainer: "
            "its operator can run `pip install bitsandbytes`"
        ) from error
