"""An account's ledger in order, with its amounts: pages and balances of many jobs."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_index("credit_entries_by_account", "credit_entries", ["account_id", "number", "amount"])
