"""What every service's `migrations/env.py` does: run on the connection that `database.migrate` gives."""

from __future__ import annotations

from alembic import context


def run_migrations() -> None:
    """Runs the migrations inside the caller's transaction."""
    attributes = context.config.attributes
    context.configure(
        connection=attributes["connection"],
        target_metadata=attributes["metadata"],
        version_table=attributes["version_table"],
        render_as_batch=True,
    )
    context.run_migrations()
