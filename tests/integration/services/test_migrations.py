"""A service killed in the middle of its first migration starts again as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

import dataset_svc
import gateway.authz
import job_svc
from svc_kit.database import migrate


@pytest.mark.parametrize("package", [dataset_svc, job_svc, gateway.authz])
def test_a_migration_is_made_whole_or_not_at_all(
    package: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrations = Path(next(iter(package.__path__))) / "migrations"  # type: ignore[attr-defined]
    url = f"sqlite+aiosqlite:///{tmp_path}/db.sqlite"

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("alembic.operations.Operations.create_index", fail)
        with pytest.raises(KeyboardInterrupt):
            migrate(url, migrations, sa.MetaData())
    migrate(url, migrations, sa.MetaData())
    migrate(url, migrations, sa.MetaData())
    engine = sa.create_engine(f"sqlite:///{tmp_path}/db.sqlite")
    tables = sa.inspect(engine).get_table_names()
    engine.dispose()
    assert len(tables) > 1
