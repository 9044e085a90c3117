"""Ids of resources."""

from __future__ import annotations

import secrets

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def random_id(num_chars: int) -> str:
    """Returns random characters of a-z and 2-7: 5 bits each, safe in URLs, file names and object keys."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(num_chars))


def new_id(prefix: str) -> str:
    """Returns `PREFIX-` and 20 random characters: 100 bits, never guessed and never met twice."""
    return f"{prefix}-{random_id(20)}"
