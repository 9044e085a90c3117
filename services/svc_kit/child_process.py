"""Modules that run in a process of their own, since what they import is too large to keep."""

from __future__ import annotations

import asyncio
import os
import sys

from svc_kit.parent_death import dying_with_this_process

_MAX_LAST_WORDS_CHARS = 500


def without_settings() -> dict[str, str]:
    """This process's environment without the service's settings, its keys among them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    # Waiting threads sleep: spinning, they would take the cores from those that they wait for as soon as
    # anything else runs on the machine.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


async def run_module(module: str, *arguments: str) -> tuple[int, str]:
    """Runs `python -m MODULE ARGUMENTS...` to its end; kills it when cancelled, or when this process dies.

    Returns:
        The exit code, and the last line of standard error; empty if there is none.
    """
    environment = without_settings() | {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = await asyncio.create_subprocess_exec(
        # -P: the folder that the service stands in must not hide a module.
        *dying_with_this_process(sys.executable, "-P", "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        _, printed = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
    assert process.returncode is not None
    lines = [line for line in printed.decode(errors="replace").splitlines() if line.strip()]
    return process.returncode, (lines or [""])[-1].strip()[:_MAX_LAST_WORDS_CHARS]
