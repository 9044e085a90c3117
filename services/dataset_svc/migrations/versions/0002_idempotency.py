"""An upload that is repeated makes one dataset."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("datasets", sa.Column("idempotency_key", sa.String(length=255)))
    op.add_column("datasets", sa.Column("file_sha256", sa.String(length=64)))
    op.create_index("datasets_by_idempotency_key", "datasets", ["account_id", "idempotency_key"], unique=True)
