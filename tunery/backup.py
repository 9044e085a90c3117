"""`tunery backup` and `tunery restore`: all that a stack keeps, in a folder.

A row is written after the bytes that it names and removed before them. So objects are copied, then the
databases, then the objects that came meanwhile: whatever a row of the copy names was there when the databases
were copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg
from minio.error import MinioException, S3Error
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from urllib3.exceptions import HTTPError

from svc_kit.database import utc_now
from svc_kit.errors import NotFound
from svc_kit.object_store import ObjectStore, StoredObject
from svc_kit.parent_death import dying_with_this_process
from svc_kit.settings import ObjectStoreSettings
from tunery.credentials import FILE_NAME as CREDENTIALS
from tunery.credentials import write_private
from tunery.embedded_s3 import EmbeddedS3, find_running
from tunery.errors import SetUpError
from tunery.up import FolderInUse, find_weed, own_folder

# Written last: a folder without it is no whole backup.
_MARK = "backup.json"
_OBJECTS = "objects"
_DUMP = "database.dump"
# An account has its credits, and a job its dataset, in a database that is copied after the one that names it.
_DATABASES = ("authz", "job_svc", "dataset_svc")
_TRANSFERS = 8
_TRIES = 5


@dataclass(frozen=True)
class Copied:
    """What a backup has."""

    num_objects: int
    num_bytes: int


def back_up(target: Path, data_dir: Path, environment: Mapping[str, str]) -> Copied:
    """Copies all that the stack of `data_dir` keeps into an empty folder. The stack may run meanwhile.

    Args:
        target: made where there is none. What is in it is for its owner's eyes only, keys among it.
        data_dir: the stack's folder.
        environment: where the database or the S3 store is not in that folder: that of `tunery up`.

    Raises:
        SetUpError: the target is not empty, there is no stack in the folder, or a part of it can't be read.
    """
    if not (data_dir / CREDENTIALS).exists():
        raise SetUpError(f"{data_dir} is no folder of `tunery up`: it has no {CREDENTIALS}")
    _make_empty(target)
    with _failures_told(), _store_of(data_dir, environment) as store:
        copied = asyncio.run(_Backup(store, target, data_dir, environment).run())
    shutil.copy2(data_dir / CREDENTIALS, target / CREDENTIALS)
    shutil.copytree(data_dir / "identity", target / "identity")
    write_private(target / _MARK, json.dumps({"made_at": utc_now().isoformat()}) + "\n")
    return copied


def restore(source: Path, data_dir: Path, environment: Mapping[str, str]) -> Copied:
    """Makes a stack's folder from a backup, for `tunery up` to start on.

    Args:
        source: what `back_up` wrote.
        data_dir: an empty folder; made where there is none.
        environment: that of the `tunery up` to come. A database or an S3 store that it names must be empty.

    Raises:
        SetUpError: the source is no whole backup, or the folder, the database or the store is not empty.
    """
    if not (source / _MARK).exists():
        raise SetUpError(f"{source} is no whole backup: it has no {_MARK}")
    _make_empty(data_dir)
    shutil.copytree(source / "identity", data_dir / "identity")
    with _failures_told():
        _restore_databases(source, data_dir, environment)
        with _store_of(data_dir, environment) as store:
            copied = asyncio.run(_put_all(store, source / _OBJECTS))
    # Last: `tunery backup` and `tunery up` take it for a sign that the rest is there.
    shutil.copy2(source / CREDENTIALS, data_dir / CREDENTIALS)
    return copied


@contextlib.contextmanager
def _failures_told() -> Iterator[None]:
    try:
        yield
    except (MinioException, HTTPError) as error:
        raise SetUpError(f"the object store fails: {error}") from error
    except (sqlite3.Error, psycopg.Error) as error:
        raise SetUpError(f"the database fails: {error}") from error


class _Backup:
    """One backup: what was copied so far."""

    def __init__(
        self, store: ObjectStore, target: Path, data_dir: Path, environment: Mapping[str, str]
    ) -> None:
        self._store = store
        self._target = target
        self._data_dir = data_dir
        self._environment = environment
        self._copied: dict[str, StoredObject] = {}
        self._slots = asyncio.Semaphore(_TRANSFERS)

    async def run(self) -> Copied:
        await self._copy_new()  # most of the time goes here, before there is anything to be in step with
        for _ in range(_TRIES):
            before = await self._store.list("")
            await asyncio.to_thread(_copy_databases, self._target, self._data_dir, self._environment)
            after = await self._copy_new()
            if all(stored.key in self._copied for stored in before):
                self._remove_all_but({stored.key for stored in (*before, *after)})
                return Copied(len(self._copied), sum(s.size_bytes for s in self._copied.values()))
        raise SetUpError("objects were removed faster than they could be copied; try again when less goes on")

    async def _copy_new(self) -> list[StoredObject]:
        found = await self._store.list("")
        new = [stored for stored in found if self._copied.get(stored.key) != stored]
        await asyncio.gather(*(self._copy(stored) for stored in new))
        return found

    async def _copy(self, stored: StoredObject) -> None:
        path = _path_of(self._target / _OBJECTS, stored.key)
        async with self._slots:
            try:
                await self._store.get_file(stored.key, path)
            except S3Error:
                with contextlib.suppress(NotFound):  # removed since it was listed
                    await self._store.stat(stored.key)
                    raise
                return
        self._copied[stored.key] = stored

    def _remove_all_but(self, keys: set[str]) -> None:
        for key in self._copied.keys() - keys:
            _path_of(self._target / _OBJECTS, key).unlink()
            del self._copied[key]


def _path_of(folder: Path, key: str) -> Path:
    path = folder / key
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SetUpError(f"the object {key!r} has a key that is no path of a file; remove it from the bucket")
    return path


async def _put_all(store: ObjectStore, folder: Path) -> Copied:
    await store.wait_and_create_bucket()
    if await store.list("accounts/"):
        raise SetUpError(f"the bucket {store.bucket} has objects of accounts; restore into an empty one")
    slots = asyncio.Semaphore(_TRANSFERS)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())

    async def put(path: Path) -> None:
        async with slots:
            await store.put_file(path.relative_to(folder).as_posix(), path)

    await asyncio.gather(*(put(path) for path in paths))
    return Copied(len(paths), sum(path.stat().st_size for path in paths))


@contextlib.contextmanager
def _store_of(data_dir: Path, environment: Mapping[str, str]) -> Iterator[ObjectStore]:
    """The stack's store: what is configured, or the embedded one, run for the block's time unless it runs."""
    names = {f"s3_{part}": f"TUNERY_S3_{part.upper()}" for part in ("bucket", "region")}
    settings = {field: environment[name] for field, name in names.items() if environment.get(name)}

    def store(endpoint: str, access_key: str, secret_key: str) -> ObjectStore:
        keys = {"s3_access_key": access_key, "s3_secret_key": secret_key}
        return ObjectStore(ObjectStoreSettings.model_validate({"s3_endpoint": endpoint, **keys, **settings}))

    if endpoint := environment.get("TUNERY_S3_ENDPOINT"):
        yield store(endpoint, *(environment.get(f"TUNERY_S3_{key}_KEY", "") for key in ("ACCESS", "SECRET")))
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(own_folder(data_dir))
        except FolderInUse:
            endpoint, running_keys = find_running(data_dir / "s3")
            yield store(endpoint, running_keys.access_key, running_keys.secret_key)
            return
        server = EmbeddedS3(data_dir.absolute() / "s3", find_weed(), set())
        stack.callback(server.remove_sockets)
        with (data_dir / "s3" / "backup.log").open("wb") as log:
            process = subprocess.Popen(
                dying_with_this_process(*server.command), cwd=server.folder, stdout=log, stderr=log
            )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        made = store(server.endpoint, server.keys.access_key, server.keys.secret_key)
        asyncio.run(made.wait_and_create_bucket())
        yield made


def _copy_databases(target: Path, data_dir: Path, environment: Mapping[str, str]) -> None:
    if environment.get("TUNERY_DATABASE_URL"):
        _run_postgres("pg_dump", environment, "--format=custom", f"--file={target / _DUMP}")
        return
    (target / "db").mkdir(exist_ok=True, mode=0o700)
    for name in _DATABASES:
        path = data_dir / "db" / f"{name}.sqlite"
        if not path.exists():
            raise SetUpError(f"there is no {path}; of a stack on PostgreSQL set TUNERY_DATABASE_URL")
        with (
            contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database,
            contextlib.closing(sqlite3.connect(target / "db" / path.name)) as copy,
        ):
            database.backup(copy)


def _restore_databases(source: Path, data_dir: Path, environment: Mapping[str, str]) -> None:
    url = environment.get("TUNERY_DATABASE_URL", "")
    is_dump = (source / _DUMP).exists()
    if is_dump != bool(url):
        where, cure = ("PostgreSQL", "set") if is_dump else ("SQLite", "unset")
        raise SetUpError(f"{source} is of a stack on {where}; {cure} TUNERY_DATABASE_URL")
    if not is_dump:
        shutil.copytree(source / "db", data_dir / "db")
        return
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        query = "SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()"
        [(num_tables,)] = connection.execute(query).fetchall()
    if num_tables:
        raise SetUpError("the database of TUNERY_DATABASE_URL has tables; restore into an empty one")
    _run_postgres("pg_restore", environment, "--single-transaction", "--no-owner", str(source / _DUMP))


def _run_postgres(program: str, environment: Mapping[str, str], *arguments: str) -> None:
    if (path := shutil.which(program, path=environment.get("PATH"))) is None:
        raise SetUpError(f"{program} isn't on the PATH; install PostgreSQL's client programs")
    parameters = conninfo_to_dict(environment["TUNERY_DATABASE_URL"].replace("+psycopg", ""))
    password = {"PGPASSWORD": str(parameters.pop("password"))} if "password" in parameters else {}
    done = subprocess.run(
        [path, f"--dbname={make_conninfo('', **parameters)}", *arguments],
        env={**environment, **password},  # not on the command line, which others can see
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SetUpError(f"{program} failed: {done.stderr.strip()}")


def _make_empty(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if any(folder.iterdir()):
        raise SetUpError(f"{folder} is not empty")
    folder.chmod(0o700)
