"""Makes the Python code and the gateway's descriptor set from `protos/`.

Run by the package's build, and by `make protos`.
"""

from __future__ import annotations

import importlib
import importlib.resources
import shutil
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
THIRD_PARTY = ROOT / "protos" / "third_party"
# Envoy writes errors out with this message, so the gateway's descriptor set needs it beside our own.
ERROR_DETAILS = "google/rpc/error_details.proto"


def generate() -> None:
    """Writes `tunery/<area>/v1/*_pb2*.py` and `tunery/descriptors.pb`; replaces what was there.

    Raises:
        RuntimeError: protoc refused the protos; its own message went to stderr.
    """
    protos = ROOT / "protos"
    areas = sorted(path.name for path in (protos / "tunery").iterdir())
    for area in areas:
        shutil.rmtree(ROOT / "tunery" / area, ignore_errors=True)
    sources = sorted(str(path.relative_to(protos)) for path in (protos / "tunery").rglob("*.proto"))
    well_known = str(importlib.resources.files("grpc_tools") / "_proto")
    googleapis = str(Path(next(iter(importlib.import_module("google.api").__path__))).parent.parent)
    arguments = [
        "protoc",
        f"-I{protos}",
        f"-I{googleapis}",
        f"-I{well_known}",
        f"--python_out={ROOT}",
        f"--pyi_out={ROOT}",
        f"--grpc_python_out={ROOT}",
    ]
    if protoc.main([*arguments, *sources]) != 0:
        raise RuntimeError("protoc refused the protos")
    descriptors = [f"--descriptor_set_out={ROOT / 'tunery' / 'descriptors.pb'}", "--include_imports"]
    if protoc.main([*arguments[:4], *descriptors, *sources, ERROR_DETAILS]) != 0:
        raise RuntimeError("protoc refused the protos")
    for area in areas:
        (ROOT / "tunery" / area / "__init__.py").touch()
        (ROOT / "tunery" / area / "v1" / "__init__.py").touch()
    _copy_googleapis(Path(googleapis))


def _copy_googleapis(site_packages: Path) -> None:
    """Puts Google's protos where buf finds them as a module of its own."""
    shutil.rmtree(THIRD_PARTY, ignore_errors=True)
    for folder in ("google/api", "google/rpc"):
        target = THIRD_PARTY / folder
        target.mkdir(parents=True)
        for path in (site_packages / folder).glob("*.proto"):
            shutil.copy(path, target)


class ProtosBuildHook(BuildHookInterface):
    """Runs `generate` before hatchling collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if (ROOT / "protos").is_dir():  # not there in a built sdist's wheel step without protos
            generate()


if __name__ == "__main__":
    generate()
