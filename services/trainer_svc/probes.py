"""What base models cost on this machine: measured once, kept beside the models."""

from __future__ import annotations

import asyncio
import json
import os
import re
import uuid
from pathlib import Path

import structlog
from google.protobuf import json_format

from svc_kit.catalog import BaseModelEntry
from svc_kit.child_process import run_module
from trainer_svc.base_models import base_model_dir
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

log = structlog.get_logger(__name__)

_NVIDIA = Path("/proc/driver/nvidia/gpus")
_MEASURE_SECONDS = 300


class ProbeFailed(RuntimeError):
    """A base model could not be measured; the message has the last line of what it printed."""


def device() -> str:
    """The device that runs are computed on, in words; asked without torch, which takes seconds to load."""
    gpus = sorted(_NVIDIA.glob("*/information")) if _NVIDIA.exists() else []
    for gpu in gpus:
        if match := re.search(r"^Model:\s*(.+)$", gpu.read_text(), re.MULTILINE):
            return match[1].strip()
    return f"cpu, {len(os.sched_getaffinity(0))} cores"


class Probes:
    """The measurements of this machine's base models."""

    def __init__(self, models_dir: Path) -> None:
        self._models_dir = models_dir
        self._folder = models_dir / ".probes"
        self._device = device()

    def all(self) -> list[worker_pb2.Probe]:
        """Returns those that were measured on this device."""
        found = [self._read(path) for path in sorted(self._folder.glob("*.json"))]
        return [probe for probe in found if probe is not None and probe.device == self._device]

    def get(self, entry: BaseModelEntry, method: str, dtype: str) -> worker_pb2.Probe | None:
        """Returns a measurement; None when there is none of this device."""
        probe = self._read(self._path(entry, method, dtype))
        return probe if probe is not None and probe.device == self._device else None

    async def measure(self, entry: BaseModelEntry, method: str, dtype: str) -> worker_pb2.Probe:
        """Takes a few steps with a model that is here, in a process of its own, and keeps the figures.

        Raises:
            ProbeFailed: the model can't be trained here.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(entry, method, dtype)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")  # another trainer may measure the same
        arguments = (str(base_model_dir(entry, self._models_dir)), method, dtype, str(partial))
        try:
            async with asyncio.timeout(_MEASURE_SECONDS):
                exit_code, last_words = await run_module("trainer_svc.engine.probe", *arguments)
        except TimeoutError as error:
            raise ProbeFailed(f"no measurement of {entry.id} in {_MEASURE_SECONDS} s") from error
        if exit_code != 0:
            raise ProbeFailed(f"{entry.id} can't be measured: {last_words or exit_code}")
        measured = json.loads(partial.read_text(encoding="utf-8"))
        names = {"base_model": entry.id, "method": method, "dtype": dtype, "device": self._device}
        partial.write_text(json.dumps(names | measured, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
        probe = self._read(path)
        assert probe is not None
        return probe

    def _path(self, entry: BaseModelEntry, method: str, dtype: str) -> Path:
        slug = re.sub(r"[^A-Za-z0-9]+", "-", self._device).strip("-").lower()
        return self._folder / f"{entry.folder_name}.{method}.{dtype}.{slug}.json"

    @staticmethod
    def _read(path: Path) -> worker_pb2.Probe | None:
        try:
            return json_format.Parse(path.read_text(encoding="utf-8"), worker_pb2.Probe())
        except FileNotFoundError:
            return None
        except (OSError, json_format.ParseError) as error:
            log.warning("a measurement can't be read and is made again", path=str(path), cause=str(error))
            return None
