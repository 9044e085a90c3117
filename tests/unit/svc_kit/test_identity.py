"""Identity tokens: who may vouch for whom."""

from __future__ import annotations

import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from svc_kit import identity
from svc_kit.errors import Unauthenticated
from svc_kit.identity import Identity, Issuer, Verifier, write_identity_keys


@pytest.fixture
def identity_dir(tmp_path: Path) -> Path:
    write_identity_keys(tmp_path)
    return tmp_path


def claims(**changes: object) -> dict[str, object]:
    now = int(time.time())
    fine = {"iss": "account", "aud": "tunery", "sub": "acct-x", "iat": now, "exp": now + 60}
    return {name: value for name, value in {**fine, **changes}.items() if value is not None}


def test_a_token_names_its_account(identity_dir: Path) -> None:
    token = Issuer.load("account", identity_dir).issue("acct-x", ("read", "write"), "tnry_abcdef")
    found = Verifier(identity_dir).verify(token)
    assert found == Identity("account", "acct-x", frozenset({"read", "write"}), "tnry_abcdef")


@pytest.mark.parametrize("scope", [None, "", "root", "READ", "read,write", ["write"], 7, True])
def test_a_token_without_a_scope_that_is_known_has_none(identity_dir: Path, scope: object) -> None:
    key = Issuer.load("account", identity_dir)._private_key
    token = jwt.encode(claims(scope=scope), key, algorithm="EdDSA", headers={"kid": "account"})
    assert Verifier(identity_dir).verify(token).scopes == frozenset()


def test_keys_are_made_once_and_private(identity_dir: Path) -> None:
    before = (identity_dir / "account.key").read_bytes()
    write_identity_keys(identity_dir)
    assert (identity_dir / "account.key").read_bytes() == before
    assert (identity_dir / "account.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": int(time.time()) - 3600},
        {"exp": None},
        {"sub": None},
        {"aud": "other"},
        {"aud": None},
        {"iss": "trainer"},
        {"iss": None},
    ],
)
def test_wrong_claims_are_refused(identity_dir: Path, changes: dict[str, object]) -> None:
    key = Issuer.load("account", identity_dir)._private_key
    token = jwt.encode(claims(**changes), key, algorithm="EdDSA", headers={"kid": "account"})
    with pytest.raises(Unauthenticated):
        Verifier(identity_dir).verify(token)


@pytest.mark.parametrize("seconds", [-60, identity.TOKEN_SECONDS + 60])
def test_a_token_that_was_let_in_is_looked_at_again_when_its_time_is_over_or_to_come(
    identity_dir: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    token, verifier = Issuer.load("account", identity_dir).issue("acct-x"), Verifier(identity_dir)
    assert verifier.verify(token).subject == "acct-x"

    def refuse(*_: object, **__: object) -> None:
        raise jwt.ExpiredSignatureError

    monkeypatch.setattr(identity.jwt, "decode", refuse)
    assert verifier.verify(token).subject == "acct-x"
    then = time.time() + seconds
    monkeypatch.setattr(identity.time, "time", lambda: then)
    with pytest.raises(Unauthenticated):
        verifier.verify(token)


def test_a_trainer_cannot_vouch_for_an_account(identity_dir: Path) -> None:
    key = Issuer.load("trainer", identity_dir)._private_key
    for kid in ("account", "trainer"):
        token = jwt.encode(claims(), key, algorithm="EdDSA", headers={"kid": kid})
        with pytest.raises(Unauthenticated):
            Verifier(identity_dir).verify(token)


def test_a_strangers_key_is_refused(identity_dir: Path) -> None:
    token = jwt.encode(claims(), Ed25519PrivateKey.generate(), algorithm="EdDSA", headers={"kid": "account"})
    with pytest.raises(Unauthenticated):
        Verifier(identity_dir).verify(token)


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
def test_other_algorithms_are_refused(identity_dir: Path) -> None:
    public = (identity_dir / "account.pub").read_bytes()
    unsigned = jwt.encode(claims(), None, algorithm="none", headers={"kid": "account"})
    header, body, _ = unsigned.split(".")
    keyed = jwt.encode(claims(), "public-key-as-secret" * 3, algorithm="HS256", headers={"kid": "account"})
    assert public
    for token in (unsigned, f"{header}.{body}.", keyed, "", "a.b.c", "x" * 5000):
        with pytest.raises(Unauthenticated):
            Verifier(identity_dir).verify(token)


@pytest.mark.parametrize("kid", [None, "", "../account", ["account"], 7])
def test_unknown_issuers_are_refused(identity_dir: Path, kid: object) -> None:
    key = Issuer.load("account", identity_dir)._private_key
    headers = {} if kid is None else {"kid": kid}
    try:
        token = jwt.encode(claims(), key, algorithm="EdDSA", headers=headers)
    except (jwt.InvalidTokenError, TypeError):
        return  # the library itself makes no such token
    with pytest.raises(Unauthenticated):
        Verifier(identity_dir).verify(token)


def test_a_token_of_its_own_is_made_anew_in_time(identity_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer = Issuer.load("job_svc", identity_dir)
    first = issuer.own_token()
    assert issuer.own_token() == first
    later = time.monotonic() + identity.TOKEN_SECONDS
    wall = time.time() + identity.TOKEN_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    monkeypatch.setattr(time, "time", lambda: wall)
    assert issuer.own_token() != first
