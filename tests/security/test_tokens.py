"""Every rpc of every service, asked straight and not through the gateway, by whoever may not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from svc_kit.identity import KINDS, SCOPES, Issuer, Kind
from tests.conftest import RunningStack
from tests.security.rpcs import rpcs_of, served_services

ACCOUNT: frozenset[Kind] = frozenset({"account"})
# Which process serves a service, and for whom. A service that isn't here fails the test.
SERVED: dict[str, tuple[str, frozenset[Kind]]] = {
    "tunery.account.v1.AccountService": ("gateway.authz", ACCOUNT),
    "tunery.account.v1.KeyService": ("gateway.authz", frozenset({"job_svc", "inference_svc"})),
    "tunery.dataset.v1.DatasetService": ("dataset_svc", ACCOUNT),
    "tunery.dataset.v1.JobDataService": ("dataset_svc", frozenset({"job_svc"})),
    "tunery.inference.v1.ChatService": ("inference_svc", ACCOUNT),
    "tunery.job.v1.CreditAccountService": ("job_svc", frozenset({"authz"})),
    "tunery.job.v1.CreditService": ("job_svc", ACCOUNT),
    "tunery.job.v1.FineTuningService": ("job_svc", ACCOUNT),
    "tunery.job.v1.JobLifeService": ("job_svc", frozenset({"dataset_svc"})),
    "tunery.job.v1.JobService": ("job_svc", ACCOUNT),
    "tunery.job.v1.ModelArtifactService": ("job_svc", frozenset({"inference_svc"})),
    "tunery.job.v1.ModelService": ("job_svc", ACCOUNT),
    "tunery.trainer.v1.WorkerService": ("job_svc", frozenset({"trainer"})),
}
RPCS = {rpc: name for name, service in served_services().items() for rpc in rpcs_of(service)}


@dataclass(frozen=True)
class Inside:
    """The stack as one sees it who reached its inner network.

    Attributes:
        channels: to each process, by its module.
        identity_dir: the keys of every issuer, for the test to forge with.
        api_key: one that the gateway takes.
    """

    channels: dict[str, grpc.Channel]
    identity_dir: Path
    api_key: str

    def status(self, rpc: str, authorization: str | None) -> str:
        """Calls with an empty request; returns the status."""
        module, _ = SERVED[RPCS[rpc]]
        metadata = () if authorization is None else (("authorization", authorization),)
        # Whatever the rpc is, a refusal comes before its first message.
        call = self.channels[module].stream_stream(rpc)
        answer = call(iter([b""]), metadata=metadata, timeout=20)
        try:
            next(iter(answer), None)
        except grpc.RpcError as error:
            return str(error.code().name)
        answer.cancel()
        return "OK"


@pytest.fixture(scope="module")
def inside(stack: RunningStack) -> Iterator[Inside]:
    channels = {}
    for command, environment in stack.processes():
        module = command[-1]
        if module in {module for module, _ in SERVED.values()}:
            channels[module] = grpc.insecure_channel(environment["TUNERY_LISTEN"])
    yield Inside(channels, stack.data_dir / "identity", stack.api_key)
    for channel in channels.values():
        channel.close()


def forgeries(inside: Inside, kind: Kind) -> dict[str, str | None]:
    """What is none of a caller's kind, though it looks like one of it."""
    key = load_pem_private_key((inside.identity_dir / f"{kind}.key").read_bytes(), password=None)
    public = (inside.identity_dir / f"{kind}.pub").read_bytes()
    now = int(time.time())
    right = {
        "iss": kind,
        "aud": "tunery",
        "sub": "acct-x",
        "iat": now,
        "exp": now + 60,
        "scope": " ".join(SCOPES),
    }

    def token(signer: object = key, algorithm: str = "EdDSA", **changes: object) -> str:
        claims = {name: value for name, value in {**right, **changes}.items() if value is not None}
        return "Bearer " + jwt.encode(claims, signer, algorithm=algorithm, headers={"kid": kind})  # type: ignore[arg-type]  # wrong ones too

    head, body, signature = token().split(".")
    return {
        "nothing": None,
        "an empty header": "",
        "no token": "Bearer ",
        "nonsense": "Bearer nonsense",
        "an API key": f"Bearer {inside.api_key}",
        "another scheme": token().replace("Bearer", "Basic"),
        "expired": token(exp=now - 60),
        "for ever": token(exp=None),
        "for others": token(aud="other"),
        "for anybody": token(aud=None),
        "of nobody": token(sub=None),
        "of another issuer": token(iss="other"),
        "signed by a stranger": token(Ed25519PrivateKey.generate()),
        "unsigned": token(None, "none"),
        "signed with the public key": token(public.hex(), "HS256"),
        "without its signature": f"{head}.{body}.",
        "with another's body": f"{head}.{token(sub='acct-y').split('.')[1]}.{signature}",
        "twice": f"{token()}, {token()}",
    }


def test_every_service_is_known() -> None:
    assert set(SERVED) == set(served_services())


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
@pytest.mark.parametrize("rpc", RPCS)
def test_no_forged_token_is_taken(inside: Inside, rpc: str) -> None:
    answers = {
        (kind, what): inside.status(rpc, token)
        for kind in SERVED[RPCS[rpc]][1]
        for what, token in forgeries(inside, kind).items()
    }

    assert set(answers.values()) == {"UNAUTHENTICATED"}, answers


@pytest.mark.parametrize("rpc", RPCS)
def test_callers_of_another_kind_are_not_let_in(inside: Inside, rpc: str) -> None:
    _, allowed = SERVED[RPCS[rpc]]

    answers = {
        kind: inside.status(rpc, f"Bearer {Issuer.load(kind, inside.identity_dir).issue(kind, SCOPES)}")
        for kind in KINDS
        if kind not in allowed
    }

    assert len(answers) == len(KINDS) - len(allowed) > 0
    assert set(answers.values()) == {"PERMISSION_DENIED"}, answers


@pytest.mark.parametrize("rpc", [rpc for rpc, name in RPCS.items() if SERVED[name][1] == ACCOUNT])
def test_an_accounts_token_without_scopes_opens_nothing(inside: Inside, rpc: str) -> None:
    token = Issuer.load("account", inside.identity_dir).issue("acct-x")

    assert inside.status(rpc, f"Bearer {token}") == "PERMISSION_DENIED"


def test_the_right_ones_are_let_in(inside: Inside) -> None:
    """Or all the others would show nothing."""
    for rpc in ("/tunery.job.v1.JobService/ListJobs", "/tunery.job.v1.JobLifeService/FilterLiveJobs"):
        [kind] = SERVED[RPCS[rpc]][1]
        token = Issuer.load(kind, inside.identity_dir).issue("acct-x", SCOPES)
        assert inside.status(rpc, f"Bearer {token}") == "OK"
