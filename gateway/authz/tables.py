"""The tables of accounts and their API keys."""

from __future__ import annotations

import sqlalchemy as sa

from svc_kit.database import UtcTime

metadata = sa.MetaData()

accounts = sa.Table(
    "accounts",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("is_admin", sa.Boolean, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    # SHA-256 of the key in hex. A key has 256 random bits, so that no slow hash is needed to keep it from
    # being guessed, and it can be found by its hash.
    sa.Column("key_hash", sa.String(64), primary_key=True),
    sa.Column("account_id", sa.String(64), sa.ForeignKey("accounts.id"), nullable=False),
    # The key's visible beginning, its id in the account.
    sa.Column("prefix", sa.String(16), nullable=False),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("scopes", sa.String(64), nullable=False),  # with spaces between
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Index("ix_api_keys_account_id_prefix", "account_id", "prefix", unique=True),
)
