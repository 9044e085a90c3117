"""The bitsandbytes package, where it is installed."""

from __future__ import annotations

import importlib
import math
from typing import Any

from torch import nn

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


def num_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds: in 4 bits, two lie in each byte."""
    quantized = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantized is None else math.prod(quantized.shape)
