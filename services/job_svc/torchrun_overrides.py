"""`overrides`: options for torchrun, read against a list of the allowed ones."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from svc_kit.errors import InvalidRequest
from svc_kit.strict_json import nearest

MAX_PROCESSES = 64
LONGEST_OVERRIDES = 4096
_RDZV_TIMEOUT = r"(timeout|join_timeout|last_call_timeout|close_timeout|read_timeout)=[1-9][0-9]{0,4}"
MAX_RESTARTS = 10
_MOST_DIGITS = 9


def _whole_number(lowest: int, highest: int) -> Callable[[str], bool]:
    def is_right(text: str) -> bool:
        # Python itself refuses to read thousands of digits.
        is_short = len(text) <= _MOST_DIGITS
        return is_short and text.isascii() and text.isdigit() and lowest <= int(text) <= highest

    return is_right


def _local_endpoint(text: str) -> bool:
    host, _, port = text.partition(":")
    return host in ("localhost", "127.0.0.1") and _whole_number(1, 65535)(port)


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


# Option -> (what it takes, in words; the check).
ALLOWED: dict[str, tuple[str, Callable[[str], bool]]] = {
    "--nproc_per_node": (f"a number from 1 to {MAX_PROCESSES}", _whole_number(1, MAX_PROCESSES)),
    "--nnodes": ("1: a job trains on one machine", _whole_number(1, 1)),
    "--max_restarts": (
        f"a number from 0 to {MAX_RESTARTS}: how often a run that died goes on from its last checkpoint",
        _whole_number(0, MAX_RESTARTS),
    ),
    "--rdzv_backend": ("c10d", _matches("c10d")),
    "--rdzv_id": ("at most 64 of A-Z a-z 0-9 . _ -", _matches(r"[A-Za-z0-9._-]{1,64}")),
    # Another host would be one that the trainer can reach and its user perhaps not.
    "--rdzv_endpoint": (
        "localhost:PORT or 127.0.0.1:PORT, PORT from 1 to 65535, since a job trains on one machine",
        _local_endpoint,
    ),
    "--rdzv_conf": (
        "NAME=SECONDS with commas between, SECONDS from 1, of timeout, join_timeout, last_call_timeout, "
        "close_timeout and read_timeout",
        _matches(rf"{_RDZV_TIMEOUT}(,{_RDZV_TIMEOUT})*"),
    ),
}


def parse_overrides(text: str) -> list[str]:
    """Returns the options as `--name=value`, in torchrun's spelling with underscores.

    Raises:
        InvalidRequest: the text is too long, or an option is unknown, given twice, or has no value or a
            wrong one.
    """
    if len(text) > LONGEST_OVERRIDES:  # shlex takes the square of its length
        raise InvalidRequest(
            f"`overrides` has {len(text):,} characters, and {LONGEST_OVERRIDES:,} is the limit.",
            field="overrides",
        )
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidRequest(f"`overrides` can't be read: {error}.", field="overrides") from error
    found: dict[str, str] = {}
    position = 0
    while position < len(words):
        name, equals, value = words[position].partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        position += 1
        if name not in ALLOWED:
            listed = ", ".join(ALLOWED)
            raise InvalidRequest(
                f"`overrides`: {words[position - 1]!r} is not allowed{nearest(name, list(ALLOWED))}; "
                f"the options are {listed}.",
                field="overrides",
            )
        if not equals:
            value = words[position] if position < len(words) else ""
            position += 1
        expected, is_right = ALLOWED[name]
        if not is_right(value):
            raise InvalidRequest(f"`overrides`: {name} takes {expected}, not {value!r}.", field="overrides")
        if name in found:
            raise InvalidRequest(f"`overrides`: {name} is given twice.", field="overrides")
        found[name] = value
    return [f"{name}={value}" for name, value in found.items()]
