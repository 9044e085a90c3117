"""Keys get names and scopes, and are told apart by their beginning."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("api_keys") as table:
        table.add_column(sa.Column("name", sa.String(100)))
        table.add_column(sa.Column("scopes", sa.String(64)))
    op.execute("UPDATE api_keys SET name = 'first key', scopes = 'read write'")
    op.execute(
        "UPDATE api_keys SET scopes = 'read write admin' "
        "WHERE account_id IN (SELECT id FROM accounts WHERE is_admin)"
    )
    with op.batch_alter_table("api_keys") as table:
        table.alter_column("name", existing_type=sa.String(100), nullable=False)
        table.alter_column("scopes", existing_type=sa.String(64), nullable=False)
    op.drop_index("ix_api_keys_account_id", "api_keys")
    op.create_index("ix_api_keys_account_id_prefix", "api_keys", ["account_id", "prefix"], unique=True)
