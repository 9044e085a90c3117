"""Since when a job's data can't be prepared, and how often a sweep of what it left was asked for."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("failing_since", sa.DateTime(timezone=True)))
    op.add_column("jobs", sa.Column("sweeps_asked_for", sa.Integer(), server_default="0", nullable=False))
