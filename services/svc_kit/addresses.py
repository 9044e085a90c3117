"""Where services are found: one address, or one for each of a service's replicas."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator


@dataclass(frozen=True)
class Address:
    """A host and a port; `host` is an IP address or a DNS name."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads `HOST:PORT` or `[IPV6]:PORT`.

        Raises:
            ValueError: it is neither.
        """
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(host.strip("[]"), int(port))

    @property
    def ip_version(self) -> int | None:
        """4 or 6; None for a name."""
        try:
            return ipaddress.ip_address(self.host).version
        except ValueError:
            return None


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Reads one address, or several with commas between.

    Raises:
        ValueError: one is no address, or several are not all IP addresses of the same version, which is what
            gRPC can take; a name may stand for several by itself.
    """
    addresses = tuple(Address.parse(part.strip()) for part in text.split(","))
    versions = {address.ip_version for address in addresses}
    if len(addresses) > 1 and (len(versions) > 1 or None in versions):
        raise ValueError(
            f"{text!r}: several addresses must be IP addresses of one version; instead of several names give "
            "one that stands for all"
        )
    return addresses


def grpc_target(text: str) -> str:
    """Returns what gRPC is to connect to for `text`, which `parse_addresses` accepts."""
    addresses = parse_addresses(text)
    if len(addresses) == 1:
        return text
    hosts = ",".join(
        f"[{address.host}]:{address.port}" if address.ip_version == 6 else f"{address.host}:{address.port}"
        for address in addresses
    )
    return f"ipv{addresses[0].ip_version}:{hosts}"


def _checked(text: str) -> str:
    parse_addresses(text)
    return text


Addresses = Annotated[str, AfterValidator(_checked)]
