"""API keys: what they look like, and what is kept of them."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from svc_kit.database import utc_now
from svc_kit.identity import SCOPES, Scope

KEY_PREFIX = "tnry_"
FIRST_KEY_NAME = "first key"
_KEY = re.compile(r"tnry_[A-Za-z0-9_-]{43}")
_ID_CHARS = len(KEY_PREFIX) + 6


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key.

    Attributes:
        key_hash: SHA-256 of the key, in hex.
        id: the key's first 11 characters, unique in its account.
        account_id: whom it stands for.
        name: for people.
        scopes: what it may do.
        created_at: when it was made.
    """

    key_hash: str
    id: str
    account_id: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: dt.datetime

    @classmethod
    def of(cls, api_key: str, account_id: str, name: str, scopes: Iterable[Scope]) -> ApiKey:
        """Returns what is kept of a key that is made now."""
        return cls(key_hash(api_key), api_key[:_ID_CHARS], account_id, name, tuple(scopes), utc_now())


def new_api_key() -> str:
    """Returns a key: `tnry_` and 43 characters that carry 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def is_api_key(text: str) -> bool:
    """Tells whether a text has the form of a key."""
    return _KEY.fullmatch(text) is not None


def key_hash(api_key: str) -> str:
    """Returns what a key is found by."""
    return hashlib.sha256(api_key.encode()).hexdigest()


def scopes_up_to(highest: Scope) -> tuple[Scope, ...]:
    """Returns a scope with those that it brings."""
    return SCOPES[: SCOPES.index(highest) + 1]
