"""Accounts take turns, jobs have priorities, and a request that is repeated makes one job."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("priority", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("idempotency_key", sa.String(length=255)))
    op.add_column("jobs", sa.Column("request_digest", sa.String(length=64)))
    op.create_index("jobs_in_turn", "jobs", ["status", "account_id", "priority", "number"])
    op.create_index("jobs_by_idempotency_key", "jobs", ["account_id", "idempotency_key"], unique=True)
    op.create_table(
        "account_turns",
        sa.Column("account_id", sa.String(length=40), nullable=False),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("account_id"),
    )
