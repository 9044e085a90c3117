"""An account's next job stands first in the index, however many it has queued."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.drop_index("jobs_in_turn", "jobs")
    op.create_index("jobs_in_turn", "jobs", ["status", "account_id", sa.text("priority DESC"), "number"])
