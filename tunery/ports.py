"""Free loopback ports."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection

# Below the range from which Linux draws the ports of outgoing connections, so that none is taken away
# between being found here and being bound.
_FIRST_PORT = 10_000
_LAST_PORT = 20_000


def can_bind(port: int) -> OSError | None:
    """Returns None if a server could listen on the loopback port now, else why not."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
            server.listen(1)
        except OSError as error:
            return error
    return None


def free_ports(count: int, *, taken: Collection[int] = (), offset: int = 0) -> list[int]:
    """Returns different free ports.

    Args:
        count: how many.
        taken: ports that are spoken for, though nobody may listen there yet.
        offset: the port at this distance above each is free as well.

    Raises:
        OSError: there aren't so many.
    """
    found: list[int] = []
    for port in random.sample(range(_FIRST_PORT, _LAST_PORT), _LAST_PORT - _FIRST_PORT):
        if len(found) == count:
            break
        if port in taken or can_bind(port) or (offset and can_bind(port + offset)):
            continue
        found.append(port)
    if len(found) < count:
        raise OSError(f"there are no {count} free ports between {_FIRST_PORT} and {_LAST_PORT}")
    return found
