"""What the command's exit codes mean. docs/cli.md lists them."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the client takes a third of a second, which `tunery --help` has no use for
    from tunery.client import ClientError


class ExitCode(enum.IntEnum):
    """The exit code of `tunery`."""

    OK = 0
    REFUSED = 1  # the service refused, or the job ended as failed or cancelled
    USAGE = 2  # wrong arguments, or something on this machine isn't set up
    UNREACHABLE = 3
    NOT_FOUND = 4
    INTERRUPTED = 130


# An answer from a proxy or the gateway that tells of nobody behind it.
_NOBODY_BEHIND = frozenset({None, 502, 503, 504})
_HTTP_NOT_FOUND = 404


def exit_code_of(error: ClientError) -> ExitCode:
    """Returns the exit code for a call that failed."""
    if error.http_status in _NOBODY_BEHIND or error.type == "connection_error":
        return ExitCode.UNREACHABLE
    if error.http_status == _HTTP_NOT_FOUND:
        return ExitCode.NOT_FOUND
    return ExitCode.REFUSED
