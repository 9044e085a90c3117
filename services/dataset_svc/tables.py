"""The tables of dataset_svc."""

from __future__ import annotations

import sqlalchemy as sa

from svc_kit.database import JsonText, Number, UtcTime

metadata = sa.MetaData()

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("number", Number, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("account_id", sa.String(40), nullable=False),
    # uploading -> stored, or removed; stored -> deleted; deleted -> removed. Only stored ones are shown.
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("format", sa.String(8), nullable=False),
    sa.Column("object_key", sa.Text, nullable=False),
    sa.Column("name", sa.String(256), nullable=False, server_default=""),
    sa.Column("size_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("row_count", sa.Integer, nullable=False, server_default="0"),
    sa.Column("columns", JsonText, nullable=False, server_default="[]"),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("file_sha256", sa.String(64)),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Index("datasets_by_idempotency_key", "account_id", "idempotency_key", unique=True),
    sa.Index("datasets_by_account", "account_id", "number"),
    sa.Index("datasets_by_status", "status", "number"),
)

holds = sa.Table(
    "dataset_holds",
    metadata,
    sa.Column("dataset_id", sa.String(40), sa.ForeignKey("datasets.id"), primary_key=True),
    sa.Column("job_id", sa.String(40), primary_key=True),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Index("dataset_holds_by_job", "job_id"),
)
