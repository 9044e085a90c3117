"""A gateway to test: the real Envoy and the real auth check, with doubles behind them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx

from gateway.authz.__main__ import MIGRATIONS
from gateway.authz.accounts import Accounts
from gateway.authz.credit_accounts import JobServiceCreditAccounts
from gateway.authz.repository import AccountRepository
from gateway.authz.server import make_authz_server
from gateway.authz.tables import metadata
from gateway.binary import envoy_command
from gateway.render import GatewaySettings, render
from svc_kit.database import Database, migrate
from svc_kit.identity import Issuer, Verifier, write_identity_keys
from svc_kit.server import connect
from tests.conftest import own_database
from tests.integration.gateway.upstreams import Upstreams, make_upstream

ROOT = Path(__file__).parents[3]
DESCRIPTORS = ROOT / "tunery" / "descriptors.pb"
FIRST_KEY = "tnry_" + "A" * 43
MAX_UPLOAD_BYTES = 3 * 1024 * 1024


@dataclass
class Gateway:
    """The gateway under test.

    Attributes:
        address: HOST:PORT of the one port.
        upstreams: what stands behind it.
        client: a REST client with the first account's key.
        channel: a native client's channel, without a key.
        access_log: the file of Envoy's access log.
        folder: where the configuration and the keys lie.
    """

    address: str
    upstreams: Upstreams
    client: httpx.AsyncClient
    channel: grpc.aio.Channel
    access_log: Path
    folder: Path

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


async def wait_until(condition: Callable[[], Awaitable[Any]], seconds: float = 20) -> Any:
    """Returns the first true answer of `condition`, asked again and again."""
    async with asyncio.timeout(seconds):
        while not (answer := await condition()):  # noqa: ASYNC110  # another process's state
            await asyncio.sleep(0.02)
    return answer


async def stat(gateway: Gateway, name: str) -> int:
    """Returns one of Envoy's counters."""
    transport = httpx.AsyncHTTPTransport(uds=str(gateway.folder / "envoy" / "admin.sock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        text = (await client.get("/stats", params={"filter": f"^{re.escape(name)}$"})).text
    return int(text.rpartition(" ")[2]) if text else 0


@asynccontextmanager
async def run_server(server: grpc.aio.Server) -> AsyncIterator[str]:
    """Serves on a free port for the block's time; gives the address."""
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def run_envoy(
    folder: Path, edit: Callable[[str], str] = lambda text: text, **settings: Any
) -> AsyncIterator[str]:
    """Runs Envoy on a free port for the block's time; gives the address.

    Args:
        folder: for its files.
        edit: changes the configuration, so that a test need not wait for what takes long.
        settings: of GatewaySettings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    admin = folder / "admin.sock"
    configuration = folder / "envoy.yaml"
    everything = {"listen": "127.0.0.1:0", "admin": str(admin), "descriptors": DESCRIPTORS, **settings}
    configuration.write_text(edit(render(GatewaySettings(**everything))))
    with (folder / "envoy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *envoy_command(configuration, concurrency=1), stdout=log, stderr=log
        )
    transport = httpx.AsyncHTTPTransport(uds=str(admin))

    async def listening() -> str | None:
        assert process.returncode is None, (folder / "envoy.log").read_text()
        try:
            if (await client.get("/ready")).status_code != httpx.codes.OK:  # asks its upstreams how they are
                return None
            answer = await client.get("/listeners", params={"format": "json"})
        except httpx.TransportError:
            return None
        listeners = answer.json().get("listener_statuses")
        if not listeners:
            return None
        address = listeners[0]["local_address"]["socket_address"]
        return f"{address['address']}:{address['port_value']}"

    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            address = await wait_until(listening)
        yield address
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                process.kill()
                await process.wait()


@asynccontextmanager
async def run_authz(folder: Path, job_svc_address: str, database_url: str) -> AsyncIterator[str]:
    """Runs the auth check, with the first account made, for the block's time; gives the address."""
    await asyncio.to_thread(migrate, database_url, MIGRATIONS, metadata)
    database = Database(database_url)
    channel = connect(job_svc_address)
    accounts = Accounts(
        AccountRepository(database),
        Issuer.load("account", folder),
        JobServiceCreditAccounts(channel, Issuer.load("authz", folder)),
    )
    await accounts.ensure_first(FIRST_KEY)
    server, _health = make_authz_server(accounts, Verifier(folder))
    try:
        async with run_server(server) as address:
            yield address
    finally:
        await channel.close()
        await database.close()


@asynccontextmanager
async def run_gateway(folder: Path, **settings: Any) -> AsyncIterator[Gateway]:
    """Runs the whole stack for the block's time.

    Args:
        folder: an empty one.
        settings: for `run_envoy`, in place of the stack's own.
    """
    keys = folder / "identity"
    write_identity_keys(keys)
    upstreams = Upstreams()
    async with AsyncExitStack() as stack:
        addresses = {}
        for name in ("dataset_svc", "job_svc", "inference_svc"):
            server = make_upstream(name, upstreams, Verifier(keys))
            addresses[f"{name}_address"] = await stack.enter_async_context(run_server(server))
        sqlite = {"TUNERY_DATABASE_URL": f"sqlite+aiosqlite:///{folder / 'authz.db'}"}
        database_url = {**sqlite, **own_database(folder)}["TUNERY_DATABASE_URL"]
        addresses["authz_address"] = await stack.enter_async_context(
            run_authz(keys, addresses["job_svc_address"], database_url)
        )
        access_log = folder / "access.log"
        address = await stack.enter_async_context(
            run_envoy(
                folder / "envoy",
                **{"access_log": access_log, "max_upload_bytes": MAX_UPLOAD_BYTES, **addresses, **settings},
            )
        )
        client = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"http://{address}", headers={"authorization": f"Bearer {FIRST_KEY}"}, timeout=30
            )
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield Gateway(address, upstreams, client, channel, access_log, folder)
