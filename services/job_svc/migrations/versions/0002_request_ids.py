"""A job keeps the id of the request that made it; those to sweep are found at once."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("request_id", sa.String(length=128), nullable=True))
    op.create_index("jobs_by_sweep", "jobs", ["swept", "status"])
