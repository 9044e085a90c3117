"""Accounts and API keys: made by admins, kept as hashes, let in for as long as they are known."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import alembic.command
import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa

from gateway.authz.__main__ import MIGRATIONS
from gateway.authz.accounts import (
    LOOKUP_SECONDS,
    MAX_KEYS,
    MIN_TOKEN_SECONDS,
    Accounts,
)
from gateway.authz.api_keys import ApiKey, is_api_key, new_api_key
from gateway.authz.repository import Account, AccountRepository
from gateway.authz.tables import accounts as accounts_table
from gateway.authz.tables import api_keys, metadata
from svc_kit.database import Database, migrate, utc_now
from svc_kit.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from svc_kit.identity import SCOPES, TOKEN_SECONDS, Identity, Issuer, Scope, Verifier, write_identity_keys
from tests.integration.gateway.stack import FIRST_KEY, Gateway
from tests.integration.gateway.upstreams import Upstreams
from tunery.account.v1 import account_service_pb2, account_service_pb2_grpc
from tunery.job.v1 import job_service_pb2, job_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

ALL = frozenset(SCOPES)
WRITE = frozenset({"read", "write"})


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
        wall_ahead: by how much the wall clock is ahead of it.
    """

    database: Database
    keys: Path
    credit_book: CreditBook = field(default_factory=CreditBook)
    now: float = 1000.0
    wall_ahead: float = 0.0

    def accounts(self, issuer: Issuer | None = None) -> Accounts:
        """Returns accounts as one replica has them."""
        issuer = issuer or Issuer.load("account", self.keys)
        return Accounts(
            AccountRepository(self.database),
            issuer,
            self.credit_book,
            lambda: self.now,
            lambda: self.now + self.wall_ahead,
        )

    async def identity(self, api_key: str, accounts: Accounts | None = None) -> Identity:
        """Returns whom services take the holder of a key for."""
        admission = await (accounts or self.accounts()).admit(api_key)
        return Verifier(self.keys).verify(admission.token)

    async def admin(self) -> Identity:
        """Returns the first account's identity; the account is made if there is none."""
        await self.accounts().ensure_first(FIRST_KEY)
        return await self.identity(FIRST_KEY)

    async def team(self) -> Any:
        """Returns the row of the one account that is no admin's."""
        (account,) = [row for row in await self.rows(accounts_table) if not row.is_admin]
        return account

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


async def test_a_migration_gives_keys_that_are_there_their_scopes(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = alembic.command.upgrade
    with monkeypatch.context() as patched:
        patched.setattr("alembic.command.upgrade", lambda config, _: upgrade(config, "0001"))
        await asyncio.to_thread(migrate, database_url, MIGRATIONS, metadata)
    database = Database(database_url)
    now = utc_now()
    async with database.write() as connection:
        for name, is_admin in (("boss", True), ("team", False)):
            values = {"id": name, "name": name, "is_admin": is_admin, "created_at": now}
            await connection.execute(sa.insert(accounts_table).values(values))
            key = {"key_hash": name, "account_id": name, "prefix": "tnry_abcdef", "created_at": now}
            await connection.execute(sa.insert(api_keys).values(key))

    await asyncio.to_thread(migrate, database_url, MIGRATIONS, metadata)

    repository = AccountRepository(database)
    assert [await repository.find_key(name) for name in ("boss", "team")] == [
        ApiKey("boss", "tnry_abcdef", "boss", "first key", ("read", "write", "admin"), now),
        ApiKey("team", "tnry_abcdef", "team", "first key", ("read", "write"), now),
    ]
    with pytest.raises(sa.exc.IntegrityError):
        async with repository.change("team") as changes:
            await changes.add_key(ApiKey("other", "tnry_abcdef", "team", "x", ("read",), now))
    await database.close()


async def test_create_opens_credits_and_keeps_only_the_hash(world: World) -> None:
    made = await world.accounts().create(await world.admin(), " Team Ü ", 12.5)

    assert world.credit_book.opened == [(made.account_id, 12.5)]
    account = await world.team()
    (key,) = [row for row in await world.rows(api_keys) if row.account_id == account.id]
    assert (account.id, account.name, account.is_admin) == (made.account_id, "Team Ü", False)
    assert key.key_hash == hashlib.sha256(made.api_key.encode()).hexdigest()
    assert made.api_key.startswith(key.prefix)
    assert len(key.prefix) == 11
    assert await world.identity(made.api_key) == Identity("account", made.account_id, WRITE, key.prefix)


async def test_create_without_credits_keeps_no_balance(world: World) -> None:
    made = await world.accounts().create(await world.admin(), "x", None)

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
    admin = await world.admin()
    with pytest.raises(InvalidRequest, match=field_name) as raised:
        await world.accounts().create(admin, name, credits)

    assert raised.value.details == {"field": field_name}
    assert (world.credit_book.opened, len(await world.rows(accounts_table))) == ([], 1)


async def test_create_is_for_admins(world: World) -> None:
    with pytest.raises(PermissionDenied):
        await world.accounts().create(Identity("account", "acct-x"), "x", None)

    assert world.credit_book.opened == []


async def test_no_account_without_its_credit_account(world: World) -> None:
    admin = await world.admin()
    world.credit_book.error = Unavailable("job_svc is away")

    with pytest.raises(Unavailable):
        await world.accounts().create(admin, "x", 5.0)

    assert len(await world.rows(accounts_table)) == 1


async def test_the_first_account_is_made_once(world: World) -> None:
    other_key = new_api_key()

    made = [await world.accounts().ensure_first(key) for key in (FIRST_KEY, FIRST_KEY, other_key)]

    assert made == [True, False, False]
    (account,) = await world.rows(accounts_table)
    assert account.is_admin
    assert world.credit_book.opened == []
    assert (await world.identity(FIRST_KEY)).scopes == ALL
    with pytest.raises(Unauthenticated):
        await world.accounts().admit(other_key)


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
        async with repository.change("acct-2") as changes:
            await changes.add(
                Account("acct-2", "second", is_admin=False), ApiKey.of(FIRST_KEY, "acct-2", "x", ())
            )

    assert len(await world.rows(accounts_table)) == 1


async def test_a_key_taken_away_works_for_4_seconds_at_most(world: World) -> None:
    accounts = world.accounts()
    await accounts.ensure_first(FIRST_KEY)
    await accounts.admit(FIRST_KEY)
    async with world.database.write() as connection:
        await connection.execute(sa.delete(api_keys))

    world.now += LOOKUP_SECONDS - 0.25
    # Whoever keeps the answer keeps it no longer than it is kept here.
    assert (await accounts.admit(FIRST_KEY)).seconds == 0.25
    world.now += 0.25
    with pytest.raises(Unauthenticated, match="unknown or was taken back"):
        await accounts.admit(FIRST_KEY)
    assert LOOKUP_SECONDS == 4


async def test_a_key_not_found_is_looked_up_again(world: World) -> None:
    accounts = world.accounts()
    with pytest.raises(Unauthenticated):
        await accounts.admit(FIRST_KEY)

    await world.accounts().ensure_first(FIRST_KEY)

    assert (await world.identity(FIRST_KEY, accounts)).scopes == ALL


async def test_a_token_is_used_again_until_100_seconds_are_left(world: World) -> None:
    await world.accounts().ensure_first(FIRST_KEY)
    issued = []

    class CountingIssuer(Issuer):
        def issue(self, subject: str, scopes: Iterable[Scope] = (), key_id: str = "") -> str:
            issued.append(subject)
            return super().issue(subject, scopes, key_id)

    issuer = CountingIssuer.load("account", world.keys)
    accounts = world.accounts(issuer)
    first = (await accounts.admit(FIRST_KEY)).token
    world.now += TOKEN_SECONDS - MIN_TOKEN_SECONDS - 2
    assert (await accounts.admit(FIRST_KEY)).token == first
    assert len(issued) == 1

    world.now += 2
    await accounts.admit(FIRST_KEY)

    assert len(issued) == 2


async def member(world: World, *scopes: Scope) -> Identity:
    """The identity of a new account's first key, as if it had these scopes."""
    made = await world.accounts().create(await world.admin(), "team", None)
    return replace(await world.identity(made.api_key), scopes=frozenset(scopes))


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (["read"], ("read",)),
        (["write"], ("read", "write")),
        (["write", "read", "write"], ("read", "write")),
    ],
)
async def test_a_key_has_its_scopes_and_those_before_them(
    world: World, asked: list[str], given: tuple[Scope, ...]
) -> None:
    caller = await member(world, "read", "write")

    key, api_key = await world.accounts().create_key(caller, " ci ", asked, None)

    assert (key.account_id, key.name, key.scopes, key.id) == (caller.subject, "ci", given, api_key[:11])
    assert await world.identity(api_key) == Identity("account", caller.subject, frozenset(given), key.id)
    listed = await world.accounts().list_keys(caller, None)
    assert [(each.name, each.scopes) for each in listed] == [("first key", ("read", "write")), ("ci", given)]
    assert listed[1] == key
    assert all(api_key not in str(row) for row in await world.rows(api_keys))


@pytest.mark.parametrize(
    ("name", "scopes", "field_name"),
    [
        ("", ["read"], "name"),
        ("x" * 101, ["read"], "name"),
        ("a\nb", ["read"], "name"),
        ("x", [], "scopes"),
        ("x", ["root"], "scopes"),
        ("x", ["read", "Write"], "scopes"),
    ],
)
async def test_create_key_refuses_what_is_out_of_range(
    world: World, name: str, scopes: list[str], field_name: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await world.accounts().create_key(await world.admin(), name, scopes, None)

    assert raised.value.details == {"field": field_name}


async def test_no_key_gives_more_than_it_has(world: World) -> None:
    caller = await member(world, "read", "write")
    reader = replace(caller, scopes=frozenset({"read"}))
    for who, scopes in ((caller, ["admin"]), (reader, ["write"]), (reader, ["read", "admin"])):
        with pytest.raises(PermissionDenied, match="has no scope"):
            await world.accounts().create_key(who, "x", scopes, None)
    with pytest.raises(PermissionDenied, match="no admin's account"):
        await world.accounts().create_key(await world.admin(), "x", ["admin"], caller.subject)

    assert len(await world.accounts().list_keys(caller, None)) == 1


async def test_another_account_is_for_admins_to_name(world: World) -> None:
    caller, other = await member(world, "read", "write"), await member(world, "read", "write")
    accounts = world.accounts()
    for account_id in (other.subject, "acct-of-nobody", ""):
        for ask in (
            accounts.list_keys(caller, account_id),
            accounts.create_key(caller, "x", ["read"], account_id),
            accounts.revoke_key(caller, "tnry_abcdef", account_id),
        ):
            with pytest.raises(PermissionDenied, match="another account"):
                await ask
    assert await accounts.list_keys(caller, caller.subject) == await accounts.list_keys(caller, None)

    key, api_key = await accounts.create_key(await world.admin(), "x", ["read"], other.subject)

    assert (await world.identity(api_key)).subject == other.subject
    assert key in await accounts.list_keys(await world.admin(), other.subject)
    for ask in (
        accounts.list_keys(await world.admin(), "acct-of-nobody"),
        accounts.list_keys(await world.admin(), ""),
    ):
        with pytest.raises(NotFound):
            await ask


@pytest.mark.parametrize("seconds", [600, -600])
async def test_tokens_are_made_anew_once_the_wall_clock_was_set(
    world: World, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    await world.admin()
    accounts = world.accounts()
    before = (await accounts.admit(FIRST_KEY)).token
    world.now += 1
    assert (await accounts.admit(FIRST_KEY)).token == before

    world.wall_ahead += seconds
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)

    assert (await accounts.admit(FIRST_KEY)).token != before


async def test_a_revoked_key_is_refused_at_once_and_its_id_is_free(world: World) -> None:
    accounts, caller = world.accounts(), await member(world, "read", "write")
    key, api_key = await accounts.create_key(caller, "x", ["read"], None)
    await accounts.admit(api_key)

    await accounts.revoke_key(caller, key.id, None)

    with pytest.raises(Unauthenticated, match="taken back"):
        await accounts.admit(api_key)
    with pytest.raises(NotFound):
        await accounts.revoke_key(caller, key.id, None)
    assert key not in await accounts.list_keys(caller, None)


async def test_no_account_locks_itself_out_but_an_admin_may(world: World) -> None:
    accounts = world.accounts()
    made = await accounts.create(await world.admin(), "team", None)
    own = await world.identity(made.api_key)
    with pytest.raises(Conflict, match="makes the call"):
        await accounts.revoke_key(own, own.key_id, None)
    other = await member(world, "read", "write")
    with pytest.raises(NotFound):
        await accounts.revoke_key(other, own.key_id, None)

    await accounts.revoke_key(await world.admin(), own.key_id, own.subject)

    assert await accounts.list_keys(await world.admin(), own.subject) == []
    _, api_key = await accounts.create_key(await world.admin(), "again", ["write"], own.subject)
    assert (await world.identity(api_key)).subject == own.subject


async def test_no_key_takes_back_one_with_more_scopes(world: World) -> None:
    accounts = world.accounts()
    await accounts.ensure_first(FIRST_KEY)
    first = await world.identity(FIRST_KEY)
    _, api_key = await accounts.create_key(first, "ci", ["write"], None)
    ci = await world.identity(api_key)

    with pytest.raises(PermissionDenied, match="no scope `admin`"):
        await accounts.revoke_key(ci, first.key_id, None)

    _, api_key = await accounts.create_key(first, "reader", ["read"], None)
    await accounts.revoke_key(ci, api_key[:11], None)
    await accounts.revoke_key(first, ci.key_id, None)
    assert [key.id for key in await accounts.list_keys(first, None)] == [first.key_id]


@pytest.mark.parametrize("odd", ["", "\0", "é" * 400, "' OR 1=1 --", "%", "tnry_______"])
async def test_odd_ids_name_nothing(world: World, odd: str) -> None:
    accounts, caller = world.accounts(), await member(world, "read", "write")
    with pytest.raises(NotFound):
        await accounts.revoke_key(caller, odd, None)
    with pytest.raises(NotFound):
        await accounts.list_keys(await world.admin(), odd)


async def test_an_account_has_100_keys_at_most(world: World) -> None:
    caller = await member(world, "read", "write")
    repository = AccountRepository(world.database)
    async with repository.change(caller.subject) as changes:
        for number in range(MAX_KEYS - 4):
            await changes.add_key(
                ApiKey(f"{number}", f"tnry_{number:06}", caller.subject, "x", ("read",), utc_now())
            )

    made = await asyncio.gather(
        *(world.accounts().create_key(caller, "x", ["read"], None) for _ in range(10)), return_exceptions=True
    )

    refused = [each for each in made if isinstance(each, BaseException)]
    assert {type(each) for each in refused} == {Conflict}
    assert "has 100 API keys" in str(refused[0])
    assert len(await world.accounts().list_keys(caller, None)) == MAX_KEYS


async def test_a_key_that_was_taken_back_changes_nothing_in_the_seconds_that_it_is_still_let_in(
    world: World,
) -> None:
    accounts, admin = world.accounts(), await world.admin()
    _, api_key = await accounts.create_key(admin, "second", ["admin"], None)
    second = await world.identity(api_key)
    team = await member(world, "read", "write")
    await accounts.revoke_key(second, admin.key_id, None)

    for change in (
        accounts.revoke_key(admin, second.key_id, None),
        accounts.revoke_key(admin, team.key_id, team.subject),
        accounts.create_key(admin, "x", ["admin"], None),
        accounts.create_key(admin, "x", ["read"], team.subject),
        accounts.create(admin, "x", None),
    ):
        with pytest.raises(Unauthenticated, match="taken back"):
            await change

    assert [key.id for key in await accounts.list_keys(second, None)] == [second.key_id]
    assert [key.id for key in await accounts.list_keys(team, None)] == [team.key_id]
    assert len(await world.rows(accounts_table)) == 2


async def test_of_two_keys_that_take_each_other_back_one_stays(world: World) -> None:
    for _ in range(5):
        caller = await member(world, "read", "write")
        _, api_key = await world.accounts().create_key(caller, "second", ["write"], None)
        second = await world.identity(api_key)

        done = await asyncio.gather(
            world.accounts().revoke_key(caller, second.key_id, None),
            world.accounts().revoke_key(second, caller.key_id, None),
            return_exceptions=True,
        )

        assert [type(each) for each in done if each is not None] == [Unauthenticated]
        assert len(await world.accounts().list_keys(caller, None)) == 1


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
    assert upstreams.last.identity == Identity("account", made.account_id, WRITE, made.api_key[:11])

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


@pytest.mark.asyncio(loop_scope="session")
async def test_making_a_key_takes_no_idempotency_key(gateway: Gateway) -> None:
    """A key is shown once, so that it can't be shown again to whoever asks again."""
    headers = {"idempotency-key": "again"}
    before = (await gateway.client.get("/api/v1/keys")).json()

    answer = await gateway.client.post(
        "/api/v1/keys", json={"name": "x", "scopes": ["read"]}, headers=headers
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert "`Idempotency-Key` has no effect" in answer.json()["error"]["message"]
    stub = account_service_pb2_grpc.AccountServiceStub(gateway.channel)
    metadata = (("authorization", f"Bearer {FIRST_KEY}"), ("idempotency-key", "again"))
    for call, request in (
        (stub.CreateAccount, account_service_pb2.CreateAccountRequest(name="x")),
        (stub.CreateApiKey, account_service_pb2.CreateApiKeyRequest(name="x", scopes=["read"])),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(request, metadata=metadata)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (await gateway.client.get("/api/v1/keys")).json() == before
