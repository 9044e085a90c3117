"""A store whose disk was full takes writes again once there is room, if need be by a restart."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import urllib3
from minio import Minio
from minio.error import MinioException

from tests.chaos.stack import Disk
from tests.integration.tunery.running import Ups, wait_for
from tunery.embedded_s3 import find_running

BUCKET = "folders"
FOLDERS = range(24)  # enough for each of the index's eight parts


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        disk = Disk(tmp_path / "data" / "s3", 2**30)
    except subprocess.CalledProcessError:
        pytest.skip("only root may make a disk of its own")
    yield disk
    disk.remove()


def test_it_takes_writes_again(disk, tmp_path) -> None:
    ups = Ups(tmp_path)
    try:
        up = ups.start_ready(tmp_path / "data")
        endpoint, keys = find_running(tmp_path / "data" / "s3")
        impatient = urllib3.PoolManager(timeout=2, retries=False)
        store = Minio(
            endpoint.removeprefix("http://"),
            access_key=keys.access_key,
            secret_key=keys.secret_key,
            secure=False,
            region="us-east-1",
            http_client=impatient,
        )
        store.make_bucket(BUCKET)

        def put(name: str) -> bool:
            # Without a byte in it an object is in the index alone.
            with suppress(MinioException, urllib3.exceptions.HTTPError):
                store.put_object(BUCKET, name, io.BytesIO(), 0)
                return True
            return False

        def takes_writes() -> bool:
            return all(put(f"{folder}/object") for folder in FOLDERS)

        assert takes_writes()
        log = tmp_path / "data" / "logs" / "s3.log"
        names = (f"{number % len(FOLDERS)}/{number}" for number in itertools.count())
        disk.fill()

        def is_harmed() -> bool:
            put(next(names))
            return bool(re.search(rb"filerldb2/\d+/\d+\.log: no space left", log.read_bytes()))

        wait_for(is_harmed, "a part of the index to find its disk full")
        disk.free()
        # That it was harmed at all, and that this would last, is seen by the restart.
        wait_for(lambda: takes_writes() and "s3 refuses to write" in up.output, "the store to take writes")
        wait_for(lambda: "s3 is well again" in up.output, "word of it")
    finally:
        ups.stop_all()
