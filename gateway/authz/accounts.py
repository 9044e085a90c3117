"""Accounts, their API keys, and the identity that a key stands for."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gateway.authz.repository import Account, AccountRepository, StoredKey
from svc_kit.errors import InvalidRequest, PermissionDenied, Unauthenticated
from svc_kit.identity import TOKEN_SECONDS, Identity, Issuer
from svc_kit.ids import new_id

KEY_PREFIX = "tnry_"
_KEY = re.compile(r"tnry_[A-Za-z0-9_-]{43}")
_VISIBLE_CHARS = len(KEY_PREFIX) + 6
# A key that is taken away still works for at most this long.
LOOKUP_SECONDS = 3.0
# Services take a token for the whole of a call's start, queueing included.
MIN_TOKEN_SECONDS = 30.0
_MAX_CACHED = 10_000
MAX_NAME_CHARS = 100

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

HOW_TO = "Send an API key in the header `Authorization: Bearer tnry_...`; `tunery up` and admins make keys."


class CreditAccounts(Protocol):
    """Where an account's credits are kept."""

    async def open(self, account_id: str, credits: float | None) -> None:
        """Opens a credit account; None keeps no balance. Idempotent per account."""


@dataclass(frozen=True)
class NewAccount:
    """An account just made.

    Attributes:
        account_id: its id.
        api_key: its key, known here for the last time.
    """

    account_id: str
    api_key: str


def new_api_key() -> str:
    """Returns a key: `tnry_` and 43 characters that carry 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def is_api_key(text: str) -> bool:
    """Tells whether a text has the form of a key."""
    return _KEY.fullmatch(text) is not None


def stored_key(api_key: str) -> StoredKey:
    """Returns what is kept of a key."""
    return StoredKey(hashlib.sha256(api_key.encode()).hexdigest(), api_key[:_VISIBLE_CHARS])


class Accounts:
    """Lets keys in and makes accounts.

    Keys found and tokens made are kept for a while, since every call of every client asks for them.
    """

    def __init__(
        self,
        repository: AccountRepository,
        issuer: Issuer,
        credit_accounts: CreditAccounts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        repository: the store.
        issuer: vouches for accounts.
        credit_accounts: job_svc, or what stands for it.
        clock: seconds that only go up.
        """
        self._repository = repository
        self._issuer = issuer
        self._credit_accounts = credit_accounts
        self._clock = clock
        self._found: dict[str, tuple[Account, float]] = {}
        self._tokens: dict[Account, tuple[str, float]] = {}

    async def identity_token(self, api_key: str) -> str:
        """Returns a signed token for the account that a key belongs to, good for `MIN_TOKEN_SECONDS` or more.

        Raises:
            Unauthenticated: the key is malformed or not known.
        """
        if not is_api_key(api_key):
            raise Unauthenticated(f"The bearer token is not an API key of this service. {HOW_TO}")
        account = await self._find(stored_key(api_key).key_hash)
        if account is None:
            raise Unauthenticated(f"The API key is unknown or was taken back. {HOW_TO}")
        return self._token(account)

    async def _find(self, key_hash: str) -> Account | None:
        asked = self._clock()
        account, found = self._found.get(key_hash, (None, -math.inf))
        if asked - found < LOOKUP_SECONDS:
            return account
        account = await self._repository.find_by_key_hash(key_hash)
        self._found.pop(key_hash, None)
        if account is not None:
            _make_room(self._found)
            self._found[key_hash] = (account, asked)
        return account

    def _token(self, account: Account) -> str:
        now = self._clock()
        token, ends = self._tokens.get(account, ("", -math.inf))
        if ends - now > MIN_TOKEN_SECONDS:
            return token
        token = self._issuer.issue(account.id, is_admin=account.is_admin)
        self._tokens.pop(account, None)
        _make_room(self._tokens)
        # A token's times are whole seconds, rounded down.
        self._tokens[account] = (token, now + TOKEN_SECONDS - 1)
        return token

    async def create(self, caller: Identity, name: str, credits: float | None) -> NewAccount:
        """Makes an account with one key.

        Its credit account is opened first: one that nobody ever uses harms nobody, while an account
        without it would have no limit.

        Raises:
            PermissionDenied: the caller is no admin.
            InvalidRequest: the name is empty or too long, or credits are negative or not a number.
            Unavailable: job_svc can't be reached.
        """
        if not caller.is_admin:
            raise PermissionDenied("Only an admin's API key may make accounts.")
        if not 1 <= len(name.strip()) <= MAX_NAME_CHARS:
            raise InvalidRequest(
                f"name: {len(name.strip())} characters, expected 1 to {MAX_NAME_CHARS}.", field="name"
            )
        if not name.isprintable():
            raise InvalidRequest("name: a control character, expected plain text.", field="name")
        if credits is not None and not (math.isfinite(credits) and credits >= 0):
            raise InvalidRequest(f"credits: {credits}, expected a number of at least 0.", field="credits")
        account = Account(new_id("acct"), name.strip(), is_admin=False)
        api_key = new_api_key()
        await self._credit_accounts.open(account.id, credits)
        await self._repository.add(account, stored_key(api_key))
        return NewAccount(account.id, api_key)

    async def ensure_first(self, api_key: str) -> bool:
        """Makes the first account, an admin that keeps no balance, if there is none; returns whether it did.

        Idempotent, and safe from several replicas at once.

        Raises:
            ValueError: the key doesn't have a key's form.
        """
        if not is_api_key(api_key):
            raise ValueError("the first API key must be tnry_ and 43 characters of A-Z a-z 0-9 _ -")
        account = Account(new_id("acct"), "admin", is_admin=True)
        return await self._repository.add_first(account, stored_key(api_key))


def _make_room(cache: dict[_Key, _Value]) -> None:
    if len(cache) >= _MAX_CACHED:
        cache.pop(next(iter(cache)))  # the oldest
