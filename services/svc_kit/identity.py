"""Who calls: short-lived signed tokens that every service verifies itself.

Each issuer has an Ed25519 key pair of its own, and may vouch only for callers of its own kind: the
gateway for accounts, a trainer for trainers, a service for itself. So a trainer's key, stolen, opens
nothing but the worker protocol.
"""

from __future__ import annotations

import contextvars
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from svc_kit.errors import Unauthenticated
from svc_kit.log import REQUEST_ID_HEADER, current_request_id

Kind = Literal["account", "trainer", "dataset_svc", "job_svc", "inference_svc", "authz"]
"""What a caller can be. Every kind but `account` is a process of the stack; its name is its issuer's."""

KINDS: tuple[Kind, ...] = get_args(Kind)
Scope = Literal["read", "write", "admin"]
"""What an API key may do: `read` changes nothing, `write` is every call on the account's own things, `admin`
makes accounts. Each brings those before it."""

SCOPES: tuple[Scope, ...] = get_args(Scope)
# The auth check vouches for accounts, and also calls job_svc in its own name: hence two keys.
TOKEN_SECONDS = 120
_AUDIENCE = "tunery"
_LEEWAY_SECONDS = 5
_MAX_VERIFIED = 2_000
_MAX_KEPT_CHARS = 2_000  # a process of the stack can make them as long as it likes


@dataclass(frozen=True)
class Identity:
    """A verified caller.

    Attributes:
        kind: what the caller is.
        subject: the account's id, or the process's name.
        scopes: what an account's API key may do; processes of the stack have none.
        key_id: which of the account's API keys calls.
    """

    kind: Kind
    subject: str
    scopes: frozenset[Scope] = frozenset()
    key_id: str = ""


_current: contextvars.ContextVar[Identity] = contextvars.ContextVar("identity")


def current_identity() -> Identity:
    """Returns the caller of the rpc that is being served.

    Raises:
        Unauthenticated: outside of an rpc, or in one that lets everyone in.
    """
    identity = _current.get(None)
    if identity is None:
        raise Unauthenticated("The call carries no identity.")
    return identity


def set_current_identity(identity: Identity) -> None:
    """Names the caller for the rest of the current task."""
    _current.set(identity)


class Issuer:
    """Makes tokens of one kind."""

    def __init__(self, kind: Kind, private_key: Ed25519PrivateKey) -> None:
        self._kind = kind
        self._private_key = private_key
        self._own: tuple[str, float] = ("", 0.0)

    @classmethod
    def load(cls, kind: Kind, identity_dir: Path) -> Issuer:
        """Reads `KIND.key` (PEM).

        Raises:
            FileNotFoundError: there is no such key; `write_identity_keys` makes them.
        """
        pem = (identity_dir / f"{kind}.key").read_bytes()
        key = serialization.load_pem_private_key(pem, password=None)
        assert isinstance(key, Ed25519PrivateKey)
        return cls(kind, key)

    def issue(self, subject: str, scopes: Iterable[Scope] = (), key_id: str = "") -> str:
        """Returns a token for `subject`, good for `TOKEN_SECONDS`."""
        now = time.time()
        claims = {
            "iss": self._kind,
            "aud": _AUDIENCE,
            "sub": subject,
            "iat": int(now),
            "exp": int(now) + TOKEN_SECONDS,
            "scope": " ".join(scopes),
            "key": key_id,
        }
        return jwt.encode(claims, self._private_key, algorithm="EdDSA", headers={"kid": self._kind})

    def own_token(self) -> str:
        """Returns a token that names this process itself, renewed at half its life or if clocks jump."""
        token, made = self._own
        if not 0 <= time.time() - made < TOKEN_SECONDS / 2:
            token = self.issue(self._kind)
            self._own = (token, time.time())
        return token

    def own_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call in this process's own name, for the request that is worked for."""
        authorization = ("authorization", f"Bearer {self.own_token()}")
        request_id = current_request_id()
        return (authorization, (REQUEST_ID_HEADER, request_id)) if request_id else (authorization,)


@dataclass(frozen=True)
class _Verified:
    """Whom a token names, from when and until when, in seconds since 1970."""

    identity: Identity
    issued_at: int
    expires_at: int

    def is_good_at(self, now: float) -> bool:
        return self.issued_at - _LEEWAY_SECONDS <= now < self.expires_at + _LEEWAY_SECONDS


class Verifier:
    """Checks tokens against the public keys of the known issuers."""

    def __init__(self, identity_dir: Path) -> None:
        """Reads every `KIND.pub` (PEM) in the folder.

        Raises:
            FileNotFoundError: the folder has none.
        """
        self._keys = {
            kind: serialization.load_pem_public_key((identity_dir / f"{kind}.pub").read_bytes())
            for kind in KINDS
            if (identity_dir / f"{kind}.pub").exists()
        }
        if not self._keys:
            raise FileNotFoundError(f"no identity keys (*.pub) in {identity_dir}")
        self._verified: dict[str, _Verified] = {}

    def verify(self, token: str) -> Identity:
        """Returns whom the token names.

        A caller shows the same one for a minute or more. Its signature is checked once, its times always.

        Raises:
            Unauthenticated: the token is malformed, expired, of an unknown issuer, or not signed by it.
        """
        known = self._verified.get(token)
        if known and known.is_good_at(time.time()):
            return known.identity
        verified = self._verify(token)
        if len(token) > _MAX_KEPT_CHARS:
            return verified.identity
        if len(self._verified) >= _MAX_VERIFIED:
            self._verified.clear()
        self._verified[token] = verified
        return verified.identity

    def _verify(self, token: str) -> _Verified:
        try:
            kind: Kind = jwt.get_unverified_header(token)["kid"]  # an unknown one is the KeyError below
            claims = jwt.decode(
                token,
                self._keys[kind],  # type: ignore[arg-type]  # Ed25519, as written by write_identity_keys
                algorithms=["EdDSA"],
                audience=_AUDIENCE,
                issuer=kind,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iat", "sub", "aud", "iss"]},
            )
        except (jwt.InvalidTokenError, KeyError, TypeError) as error:
            # The gateway, whose token it is, answers by this text that the call is to be sent again.
            raise Unauthenticated("The identity token is not valid.") from error
        scopes = str(claims.get("scope", "")).split()
        identity = Identity(
            kind=kind,
            subject=claims["sub"],
            scopes=frozenset(scope for scope in SCOPES if scope in scopes),
            key_id=str(claims.get("key", "")),
        )
        return _Verified(identity, int(claims["iat"]), int(claims["exp"]))


def write_identity_keys(identity_dir: Path) -> None:
    """Makes a key pair for every kind that has none yet. Private keys get mode 0600. Safe to repeat."""
    identity_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for kind in KINDS:
        private_path, public_path = identity_dir / f"{kind}.key", identity_dir / f"{kind}.pub"
        if private_path.exists() and public_path.exists():
            continue
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        descriptor = os.open(private_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        public_path.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m svc_kit.identity DIR")
    write_identity_keys(Path(sys.argv[1]))
