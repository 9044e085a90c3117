"""Runs the auth check and the account service: `python -m gateway.authz`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from gateway.authz.accounts import Accounts
from gateway.authz.credit_accounts import JobServiceCreditAccounts
from gateway.authz.repository import AccountRepository
from gateway.authz.server import make_authz_server
from gateway.authz.settings import AuthzSettings
from gateway.authz.tables import metadata
from svc_kit.database import Database, migrate
from svc_kit.identity import Issuer, Verifier
from svc_kit.log import configure_log
from svc_kit.server import connect, serve
from svc_kit.settings import read_environment

MIGRATIONS = Path(__file__).parent / "migrations"

log = structlog.get_logger(__name__)


async def run(settings: AuthzSettings) -> None:
    """Serves until the process is told to stop."""
    database = Database(settings.database_url.get_secret_value())
    channel = connect(settings.job_svc_address, settings.tls)
    accounts = Accounts(
        AccountRepository(database),
        Issuer.load("account", settings.identity_dir),
        JobServiceCreditAccounts(channel, Issuer.load("authz", settings.identity_dir)),
    )
    if settings.first_api_key and await accounts.ensure_first(settings.first_api_key.get_secret_value()):
        log.info("made the first account")
    server, health_servicer = make_authz_server(accounts, Verifier(settings.identity_dir))
    try:
        await serve(server, health_servicer, settings.listen, tls=settings.tls)
    finally:
        await channel.close()
        await database.close()


def main() -> None:
    """Migrates, then serves."""
    settings = read_environment(AuthzSettings)
    configure_log("authz", settings.log_level)
    migrate(settings.database_url.get_secret_value(), MIGRATIONS, metadata)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
