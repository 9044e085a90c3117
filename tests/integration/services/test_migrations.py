"""Tables are brought from any version to the newest, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alembic.autogenerate
import alembic.runtime.migration
import pytest
import sqlalchemy as sa

import dataset_svc.tables
import gateway.authz.tables
import job_svc.tables
from svc_kit.database import migrate, utc_now
from tests.conftest import new_postgres_database

PACKAGES = [dataset_svc, job_svc, gateway.authz]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "postgresql":
        return new_postgres_database(request.getfixturevalue("postgres_url"))
    return f"sqlite+aiosqlite:///{tmp_path}/db.sqlite"


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url.replace("+aiosqlite", ""))
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def is_compared(item: Any, *_: Any) -> bool:
    """Leaves out indexes over expressions, which can't be read back from SQLite."""
    return not isinstance(item, sa.Index) or all(isinstance(each, sa.Column) for each in item.expressions)


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
@pytest.mark.parametrize("package", PACKAGES)
def test_the_newest_version_is_what_the_service_thinks_it_is(package: Any, url: str) -> None:
    migrations = Path(next(iter(package.__path__))) / "migrations"
    migrate(url, migrations, package.tables.metadata)
    with connected(url) as connection:
        context = alembic.runtime.migration.MigrationContext.configure(
            connection,
            opts={"version_table": f"{migrations.parent.name}_version", "include_object": is_compared},
        )
        assert alembic.autogenerate.compare_metadata(context, package.tables.metadata) == []


def test_the_jobs_of_the_first_version_are_kept(url: str) -> None:
    migrations = Path(next(iter(job_svc.__path__))) / "migrations"
    migrate(url, migrations, job_svc.tables.metadata, "0001")
    columns = {"id": "job-a", "account_id": "acct-a", "status": "queued", "base_model": "m"}
    columns |= dict.fromkeys(("hyperparameters", "input_config", "run"), "{}") | {
        "training_uri": "dataset://d"
    }
    names = ", ".join([*columns, "created_at"])
    values = ", ".join(f":{name}" for name in [*columns, "created_at"])
    with connected(url) as connection:
        row = {**columns, "created_at": utc_now().replace(tzinfo=None).isoformat(" ")}
        connection.execute(sa.text(f"INSERT INTO jobs ({names}) VALUES ({values})"), row)
    migrate(url, migrations, job_svc.tables.metadata)
    with connected(url) as connection:
        [job] = connection.execute(job_svc.tables.jobs.select())
    assert (job.id, job.run, job.request_id) == ("job-a", {}, None)


@pytest.mark.parametrize("package", PACKAGES)
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
