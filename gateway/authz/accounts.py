"""Accounts, their API keys, and the identity that a key stands for."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from gateway.authz.api_keys import (
    FIRST_KEY_NAME,
    ApiKey,
    is_api_key,
    key_hash,
    new_api_key,
    scopes_up_to,
)
from gateway.authz.repository import Account, AccountRepository, Changes
from svc_kit.errors import Conflict, InvalidRequest, NotFound, PermissionDenied, Unauthenticated
from svc_kit.identity import SCOPES, TOKEN_SECONDS, Identity, Issuer, Scope
from svc_kit.ids import new_id

# A key that is taken back still works for at most this long, here and at the gateway together.
LOOKUP_SECONDS = 4.0
# A service is shown a token when the call reaches it: after a wait for the service or, where that ended
# meanwhile, a second time.
MIN_TOKEN_SECONDS = 100.0
_MAX_CACHED = 10_000
MAX_NAME_CHARS = 100
MAX_KEYS = 100

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


@dataclass(frozen=True)
class Admission:
    """Whom an API key stands for.

    Attributes:
        account_id: the account's id.
        token: the account's signed identity, good for `MIN_TOKEN_SECONDS` or more.
        seconds: how long this may be believed; then the key may have been taken back.
    """

    account_id: str
    token: str
    seconds: float


class Accounts:
    """Lets keys in, makes accounts and their keys.

    Keys found and tokens made are kept for a while, since every call of every client asks for them.
    """

    def __init__(
        self,
        repository: AccountRepository,
        issuer: Issuer,
        credit_accounts: CreditAccounts,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Args:
        repository: the store.
        issuer: vouches for accounts.
        credit_accounts: job_svc, or what stands for it.
        clock: seconds that only go up.
        wall_clock: seconds since 1970, which tokens' times are in; it may be set.
        """
        self._repository = repository
        self._issuer = issuer
        self._credit_accounts = credit_accounts
        self._clock = clock
        self._wall_clock = wall_clock
        self._found: dict[str, tuple[ApiKey, float]] = {}
        self._tokens: dict[ApiKey, tuple[str, float]] = {}

    async def admit(self, api_key: str) -> Admission:
        """Returns whom a key stands for.

        Raises:
            Unauthenticated: the key is malformed or not known.
        """
        if not is_api_key(api_key):
            raise Unauthenticated(f"The bearer token is not an API key of this service. {HOW_TO}")
        key, asked = await self._find(key_hash(api_key))
        if key is None:
            raise _taken_back()
        return Admission(key.account_id, self._token(key), asked + LOOKUP_SECONDS - self._clock())

    async def _find(self, hash_: str) -> tuple[ApiKey | None, float]:
        """Returns a key, and when it was known to be there."""
        now = self._clock()
        known, asked = self._found.get(hash_, (None, -math.inf))
        if now - asked < LOOKUP_SECONDS:
            return known, asked
        key = await self._repository.find_key(hash_)
        self._found.pop(hash_, None)
        if key is not None:
            _make_room(self._found)
            self._found[hash_] = (key, now)
        return key, now

    def _token(self, key: ApiKey) -> str:
        now = self._wall_clock()
        token, made = self._tokens.get(key, ("", -math.inf))
        # A token's times are whole seconds, rounded down. If it is of the future, the clock was set.
        if 0 <= now - made < TOKEN_SECONDS - 1 - MIN_TOKEN_SECONDS:
            return token
        token = self._issuer.issue(key.account_id, key.scopes, key.id)
        self._tokens.pop(key, None)
        _make_room(self._tokens)
        self._tokens[key] = (token, now)
        return token

    async def create(self, caller: Identity, name: str, credits: float | None) -> NewAccount:
        """Makes an account with one key.

        Its credit account is opened first: one that nobody ever uses harms nobody, while an account
        without it would have no limit.

        Raises:
            PermissionDenied: the calling key has no scope `admin`.
            Unauthenticated: the calling key was taken back meanwhile.
            InvalidRequest: the name is empty or too long, or credits are negative or not a number.
            Unavailable: job_svc can't be reached.
        """
        if "admin" not in caller.scopes:
            raise PermissionDenied("Only an API key with the scope `admin` may make accounts.", scope="admin")
        name = _checked_name(name)
        if credits is not None and not (math.isfinite(credits) and credits >= 0):
            raise InvalidRequest(f"credits: {credits}, expected a number of at least 0.", field="credits")
        account = Account(new_id("acct"), name, is_admin=False)
        api_key = new_api_key()
        await self._credit_accounts.open(account.id, credits)
        async with self._changes(caller, account.id) as changes:
            await changes.add(account, _first_key(account, api_key))
        return NewAccount(account.id, api_key)

    async def create_key(
        self, caller: Identity, name: str, scopes: Sequence[str], account_id: str | None
    ) -> tuple[ApiKey, str]:
        """Makes a key of an account, None being the caller's own; returns what is kept of it, and the key.

        Raises:
            InvalidRequest: the name is empty or too long, or there is no such scope.
            PermissionDenied: the scopes are more than the caller's or the account's, or the account is
                another's and the calling key has no scope `admin`.
            NotFound: there is no such account.
            Conflict: the account has `MAX_KEYS` keys.
            Unauthenticated: the calling key was taken back meanwhile.
        """
        name = _checked_name(name)
        highest = _highest(scopes)
        account = await self._account(caller, account_id)
        if highest not in caller.scopes:
            raise PermissionDenied(
                f"The API key has no scope `{highest}`, and so can give it to no other key.", scope=highest
            )
        if highest == "admin" and not account.is_admin:
            raise PermissionDenied(f"{account.id} is no admin's account; its keys can't have `admin`.")
        api_key = new_api_key()
        key = ApiKey.of(api_key, account.id, name, scopes_up_to(highest))
        async with self._changes(caller, account.id) as changes:
            if len(await changes.list_keys(account.id)) >= MAX_KEYS:
                raise Conflict(f"{account.id} has {MAX_KEYS} API keys; take one back first.")
            await changes.add_key(key)
        return key, api_key

    async def list_keys(self, caller: Identity, account_id: str | None) -> list[ApiKey]:
        """Returns an account's keys, oldest first; None is the caller's own account.

        Raises:
            PermissionDenied: the account is another's and the calling key has no scope `admin`.
            NotFound: there is no such account.
        """
        account = await self._account(caller, account_id)
        return await self._repository.list_keys(account.id)

    async def revoke_key(self, caller: Identity, key_id: str, account_id: str | None) -> None:
        """Takes a key back: at once here, within `LOOKUP_SECONDS` elsewhere.

        Raises:
            Conflict: it is the calling key.
            PermissionDenied: it has a scope that the calling key lacks, or the account is another's and the
                calling key has no scope `admin`.
            NotFound: there is no such account, or it has no such key.
            Unauthenticated: the calling key was taken back meanwhile.
        """
        account = await self._account(caller, account_id)
        if (account.id, key_id) == (caller.subject, caller.key_id):
            raise Conflict(
                "This is the API key that makes the call. Make another, and take this one back with that."
            )
        async with self._changes(caller, account.id) as changes:
            key = next((key for key in await changes.list_keys(account.id) if key.id == key_id), None)
            if key is None:
                raise NotFound("There is no such API key.")
            if key.scopes[-1] not in caller.scopes:
                raise PermissionDenied(
                    f"The calling API key has no scope `{key.scopes[-1]}`, which the other has.",
                    scope=key.scopes[-1],
                )
            await changes.remove_key(key)
        self._found.pop(key.key_hash, None)

    async def revoked_of(self, names: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
        """Returns which of some keys, each an account's id and a key's, aren't there (any more)."""
        return set(names) - await self._repository.names_of_keys({account_id for account_id, _ in names})

    async def _account(self, caller: Identity, account_id: str | None) -> Account:
        if account_id not in (None, caller.subject) and "admin" not in caller.scopes:
            raise PermissionDenied(
                "Only an API key with the scope `admin` may name another account.", scope="admin"
            )
        wanted = caller.subject if account_id is None else account_id
        # PostgreSQL takes no NUL.
        account = await self._repository.find_account(wanted) if "\0" not in wanted else None
        if account is None:
            raise NotFound("There is no such account.")
        return account

    @asynccontextmanager
    async def _changes(self, caller: Identity, account_id: str) -> AsyncIterator[Changes]:
        """A transaction on an account in which the calling key, which may be believed for seconds after it
        was taken back, is still there."""
        async with self._repository.change(caller.subject, account_id) as changes:
            if caller.key_id not in {key.id for key in await changes.list_keys(caller.subject)}:
                raise _taken_back()
            yield changes

    async def ensure_first(self, api_key: str) -> bool:
        """Makes the first account, an admin that keeps no balance, if there is none; returns whether it did.

        Idempotent, and safe from several replicas at once.

        Raises:
            ValueError: the key doesn't have a key's form.
        """
        if not is_api_key(api_key):
            raise ValueError("the first API key must be tnry_ and 43 characters of A-Z a-z 0-9 _ -")
        account = Account(new_id("acct"), "admin", is_admin=True)
        return await self._repository.add_first(account, _first_key(account, api_key))


def _taken_back() -> Unauthenticated:
    return Unauthenticated(f"The API key is unknown or was taken back. {HOW_TO}")


def _first_key(account: Account, api_key: str) -> ApiKey:
    scopes = scopes_up_to("admin" if account.is_admin else "write")
    return ApiKey.of(api_key, account.id, FIRST_KEY_NAME, scopes)


def _checked_name(name: str) -> str:
    name = name.strip()
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise InvalidRequest(f"name: {len(name)} characters, expected 1 to {MAX_NAME_CHARS}.", field="name")
    if not name.isprintable():
        raise InvalidRequest("name: a control character, expected plain text.", field="name")
    return name


def _highest(scopes: Sequence[str]) -> Scope:
    """Returns the scope that brings all the others."""
    expected = f"expected one or more of {', '.join(SCOPES)}"
    if not scopes:
        raise InvalidRequest(f"scopes: empty, {expected}.", field="scopes")
    for scope in scopes:
        if scope not in SCOPES:
            raise InvalidRequest(f"scopes: {scope!r}, {expected}.", field="scopes")
    return max(cast(Sequence[Scope], scopes), key=SCOPES.index)


def _make_room(cache: dict[_Key, _Value]) -> None:
    if len(cache) >= _MAX_CACHED:
        cache.pop(next(iter(cache)))  # the oldest
