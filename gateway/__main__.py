"""Runs the gateway: `python -m gateway`, set up by `TUNERY_GATEWAY_*` variables.

Writes Envoy's configuration into a file and becomes Envoy.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

from gateway.binary import envoy_command
from gateway.render import GatewaySettings, render
from svc_kit.settings import TlsSettings, read_environment

_DESCRIPTORS = Path(__file__).parent.parent / "tunery" / "descriptors.pb"


class GatewayEnvironment(GatewaySettings, BaseSettings):
    """The settings, read from the environment."""

    model_config = SettingsConfigDict(env_prefix="TUNERY_GATEWAY_", frozen=True, extra="forbid")

    descriptors: Path = _DESCRIPTORS


def main() -> None:
    """Renders, then replaces this process with Envoy's; or only prints, with `--print`."""
    parser = argparse.ArgumentParser(prog="python -m gateway", description=main.__doc__)
    parser.add_argument("--print", action="store_true", help="print Envoy's configuration and end")
    arguments = parser.parse_args()
    settings, services_tls = read_environment(GatewayEnvironment), read_environment(TlsSettings).tls
    configuration = render(settings, services_tls)
    if arguments.print:
        print(configuration)
        return
    path = Path(tempfile.mkdtemp(prefix="tunery-gateway-")) / "envoy.yaml"
    path.write_text(configuration)
    command = envoy_command(path, concurrency=os.cpu_count() or 2)
    os.execv(command[0], command)  # noqa: S606  # no shell is wanted


if __name__ == "__main__":
    main()
