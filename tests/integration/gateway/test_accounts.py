"""Accounts and API keys: made by admins, kept as hashes, let in for as long as they are known."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa

from gateway.authz.__main__ import MIGRATIONS
from gateway.authz.accounts import (
    LOOKUP_SECONDS,
    MIN_TOKEN_SECONDS,
    Accounts,
    is_api_key,
    new_api_key,
    stored_key,
)
from gateway.authz.repository import Account, AccountRepository
from gateway.authz.tables import accounts as accounts_table
from gateway.authz.tables import api_keys, metadata
from svc_kit.database import Database, migrate
from svc_kit.errors import InvalidRequest, PermissionDenied, Unauthenticated, Unavailable
from svc_kit.identity import TOKEN_SECONDS, Identity, Issuer, Verifier, write_identity_keys
from tests.integration.gateway.stack import FIRST_KEY, Gateway
from tests.integration.gateway.upstreams import Upstreams
from tunery.account.v1 import account_service_pb2, account_service_pb2_grpc
from tunery.job.v1 import job_service_pb2, job_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

ADMIN = Identity("account", "acct-admin", is_admin=True)


@dataclass
class CreditBook:
    """Where accounts' credits are opened in these tests."""

    opened: list[tuple[str, float | None]] = field(default_factory=list)
    error: Exception | None = None

    async def open(self, account_id: str, credits: float | None) -> None:
        if self.error is not None:
            raise self.error
        self.opened.append((account_id, credits))


@dataclass
class World:
    """Accounts with everything around them.

    Attributes:
        now: what the clock shows, in seconds.
    """

    database: Database
    keys: Path
    credit_book: CreditBook = field(default_factory=CreditBook)
    now: float = 1000.0

    def accounts(self) -> Accounts:
        """Returns accounts as one replica has them."""
        issuer = Issuer.load("account", self.keys)
        return Accounts(AccountRepository(self.database), issuer, self.credit_book, lambda: self.now)

    def identity(self, token: str) -> Identity:
        return Verifier(self.keys).verify(token)

    async def rows(self, table: sa.Table) -> list[Any]:
        async with self.database.read() as connection:
            return list((await connection.execute(sa.select(table))).all())


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'authz.db'}"
        return
    url = sa.make_url(request.getfixturevalue("postgres_url"))
    schema = f"authz_{uuid.uuid4().hex}"
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {schema}"))
        yield url.update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(False)
        connection.execute(sa.text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


@pytest_asyncio.fixture(loop_scope="session")
async def world(database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    write_identity_keys(tmp_path / "identity")
    await asyncio.to_thread(migrate, database_url, MIGRATIONS, metadata)
    database = Database(database_url)
    yield World(database, tmp_path / "identity")
    await database.close()


async def test_keys_have_256_random_bits() -> None:
    keys = {new_api_key() for _ in range(100)}

    assert len(keys) == 100
    assert all(is_api_key(key) and len(key) == len("tnry_") + 43 for key in keys)


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda key: key[:-1],
        lambda key: key + "x",
        lambda key: key + "\n",
        lambda key: " " + key,
        lambda key: key.replace("tnry_", "tnry-"),
        lambda key: key[:-1] + "ä",
        lambda key: "",
    ],
)
async def test_what_is_no_key(change: Callable[[str], str]) -> None:
    assert not is_api_key(change(FIRST_KEY))


async def test_migrations_make_the_tables_that_the_code_has(world: World) -> None:
    await asyncio.to_thread(migrate, world.database.url, MIGRATIONS, metadata)  # again: does nothing
    async with world.database.read() as connection:
        found = await connection.run_sync(
            lambda sync: {
                table: {column["name"]: column["nullable"] for column in sa.inspect(sync).get_columns(table)}
                for table in metadata.tables
            }
        )

    assert found == {
        name: {column.name: column.nullable for column in table.columns}
        for name, table in metadata.tables.items()
    }


async def test_create_opens_credits_and_keeps_only_the_hash(world: World) -> None:
    made = await world.accounts().create(ADMIN, " Team Ü ", 12.5)

    assert world.credit_book.opened == [(made.account_id, 12.5)]
    (account,) = await world.rows(accounts_table)
    (key,) = await world.rows(api_keys)
    assert (account.id, account.name, account.is_admin) == (made.account_id, "Team Ü", False)
    assert key.account_id == account.id
    assert key.key_hash == hashlib.sha256(made.api_key.encode()).hexdigest()
    assert made.api_key.startswith(key.prefix)
    assert len(key.prefix) == 11
    identity = world.identity(await world.accounts().identity_token(made.api_key))
    assert identity == Identity("account", made.account_id, is_admin=False)


async def test_create_without_credits_keeps_no_balance(world: World) -> None:
    made = await world.accounts().create(ADMIN, "x", None)

    assert world.credit_book.opened == [(made.account_id, None)]


@pytest.mark.parametrize(
    ("name", "credits", "field_name"),
    [
        ("", 1.0, "name"),
        ("   ", 1.0, "name"),
        ("x" * 101, 1.0, "name"),
        ("x", -0.01, "credits"),
        ("x", float("nan"), "credits"),
        ("x", float("inf"), "credits"),
    ],
)
async def test_create_refuses_what_is_out_of_range(
    world: World, name: str, credits: float, field_name: str
) -> None:
    with pytest.raises(InvalidRequest, match=field_name) as raised:
        await world.accounts().create(ADMIN, name, credits)

    assert raised.value.details == {"field": field_name}
    assert (world.credit_book.opened, await world.rows(accounts_table)) == ([], [])


async def test_create_is_for_admins(world: World) -> None:
    with pytest.raises(PermissionDenied):
        await world.accounts().create(Identity("account", "acct-x"), "x", None)

    assert world.credit_book.opened == []


async def test_no_account_without_its_credit_account(world: World) -> None:
    world.credit_book.error = Unavailable("job_svc is away")

    with pytest.raises(Unavailable):
        await world.accounts().create(ADMIN, "x", 5.0)

    assert await world.rows(accounts_table) == []


async def test_the_first_account_is_made_once(world: World) -> None:
    other_key = new_api_key()

    made = [await world.accounts().ensure_first(key) for key in (FIRST_KEY, FIRST_KEY, other_key)]

    assert made == [True, False, False]
    (account,) = await world.rows(accounts_table)
    assert account.is_admin
    assert world.credit_book.opened == []
    assert world.identity(await world.accounts().identity_token(FIRST_KEY)).is_admin
    with pytest.raises(Unauthenticated):
        await world.accounts().identity_token(other_key)


async def test_replicas_that_start_at_once_make_one_first_account(world: World) -> None:
    replicas = [world.accounts() for _ in range(5)]

    made = await asyncio.gather(*(replica.ensure_first(FIRST_KEY) for replica in replicas))

    assert sorted(made) == [False] * 4 + [True]
    assert len(await world.rows(accounts_table)) == 1


async def test_a_first_key_of_another_form_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="tnry_ and 43 characters"):
        await world.accounts().ensure_first("password")


async def test_the_same_key_twice_is_refused_whole(world: World) -> None:
    await world.accounts().ensure_first(FIRST_KEY)
    repository = AccountRepository(world.database)
    key = hashlib.sha256(FIRST_KEY.encode()).hexdigest()
    (stored,) = await world.rows(api_keys)
    assert stored.key_hash == key

    with pytest.raises(sa.exc.IntegrityError):
        await repository.add(Account("acct-2", "second", is_admin=False), stored_key(FIRST_KEY))

    assert len(await world.rows(accounts_table)) == 1


async def test_a_key_taken_away_works_for_3_seconds_at_most(world: World) -> None:
    accounts = world.accounts()
    await accounts.ensure_first(FIRST_KEY)
    await accounts.identity_token(FIRST_KEY)
    async with world.database.write() as connection:
        await connection.execute(sa.delete(api_keys))

    world.now += LOOKUP_SECONDS - 0.01
    await accounts.identity_token(FIRST_KEY)
    world.now += 0.01
    with pytest.raises(Unauthenticated, match="unknown or was taken back"):
        await accounts.identity_token(FIRST_KEY)
    assert LOOKUP_SECONDS == 3


async def test_a_key_not_found_is_looked_up_again(world: World) -> None:
    accounts = world.accounts()
    with pytest.raises(Unauthenticated):
        await accounts.identity_token(FIRST_KEY)

    await world.accounts().ensure_first(FIRST_KEY)

    assert world.identity(await accounts.identity_token(FIRST_KEY)).is_admin


async def test_a_token_is_used_again_until_30_seconds_are_left(world: World) -> None:
    await world.accounts().ensure_first(FIRST_KEY)
    issued = []

    class CountingIssuer(Issuer):
        def issue(self, subject: str, *, is_admin: bool = False) -> str:
            issued.append(subject)
            return super().issue(subject, is_admin=is_admin)

    issuer = CountingIssuer.load("account", world.keys)
    accounts = Accounts(AccountRepository(world.database), issuer, world.credit_book, lambda: world.now)
    first = await accounts.identity_token(FIRST_KEY)
    world.now += TOKEN_SECONDS - MIN_TOKEN_SECONDS - 2
    assert await accounts.identity_token(FIRST_KEY) == first
    assert len(issued) == 1

    world.now += 2
    await accounts.identity_token(FIRST_KEY)

    assert len(issued) == 2


async def test_create_account_through_the_gateway(gateway: Gateway, upstreams: Upstreams) -> None:
    stub = account_service_pb2_grpc.AccountServiceStub(gateway.channel)
    admin = (("authorization", f"Bearer {FIRST_KEY}"),)

    made = await stub.CreateAccount(
        account_service_pb2.CreateAccountRequest(name="team", credits=7), metadata=admin
    )

    opened = upstreams.last
    assert (opened.method, opened.identity.kind) == ("OpenCreditAccount", "authz")
    assert (opened.request.account_id, opened.request.credits) == (made.account_id, 7)
    own = (("authorization", f"Bearer {made.api_key}"),)
    await job_service_pb2_grpc.JobServiceStub(gateway.channel).ListJobs(
        job_service_pb2.ListJobsRequest(), metadata=own
    )
    assert upstreams.last.identity == Identity("account", made.account_id, is_admin=False)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.CreateAccount(account_service_pb2.CreateAccountRequest(name="x"), metadata=own)
    assert raised.value.code() == grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.CreateAccount(account_service_pb2.CreateAccountRequest(name=""), metadata=admin)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.CreateAccount(account_service_pb2.CreateAccountRequest(name="x"))
    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_create_account_has_no_rest_form(gateway: Gateway) -> None:
    answer = await gateway.client.post("/tunery.account.v1.AccountService/CreateAccount", json={"name": "x"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found")
