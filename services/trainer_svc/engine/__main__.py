"""One run in a process of its own: `python -m trainer_svc.engine RUN_SPEC.json`, under torchrun.

Exit codes: 0 done; 3 the job can't succeed as asked for; 1 anything else. torchrun itself exits with 1 in
both cases, so what a launcher reads is the `failed` event.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from transformers.utils import logging as transformers_logging

from svc_kit.parent_death import die_with_command
from trainer_svc.engine.device import is_out_of_memory, make_deterministic
from trainer_svc.engine.errors import JOB_FAULT_EXIT_CODE, Fault, JobFault, OutOfMemory, Stopped
from trainer_svc.engine.events import EVENTS_FILE, EventLog
from trainer_svc.engine.process_group import ProcessGroup, join_process_group
from trainer_svc.engine.run_spec import RunSpec, read_run_spec
from trainer_svc.engine.train import train

_FIRST_RANK_REPORTS_SECONDS = 10


def main(arguments: list[str]) -> int:
    """Runs the specification that the one argument names. Returns the exit code."""
    die_with_command()  # no run outlives its launcher
    # At once: a cancelled job's work is thrown away, and checkpoints appear whole or not at all.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if len(arguments) != 1:
        print("usage: python -m trainer_svc.engine RUN_SPEC.json", file=sys.stderr)
        return 2
    try:
        spec = read_run_spec(Path(arguments[0]))
    except JobFault as error:
        print(error, file=sys.stderr)
        return JOB_FAULT_EXIT_CODE
    transformers_logging.disable_progress_bar()
    make_deterministic()
    group = join_process_group()
    exit_code = run(spec, group)
    if group.world_size > 1:
        # To leave a group in good order takes all its processes, and the others may be elsewhere.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def run(spec: RunSpec, group: ProcessGroup) -> int:
    """Trains, and turns whatever goes wrong into a `failed` event and an exit code."""
    if group.is_first:
        spec.output_dir.mkdir(parents=True, exist_ok=True)
        if (spec.output_dir / EVENTS_FILE).exists():
            print(
                f"{spec.output_dir} holds another run already; give each run its own folder", file=sys.stderr
            )
            return 1
    events = EventLog(spec.output_dir, silent=not group.is_first)
    try:
        train(spec, group, events)
    except Stopped:
        pass
    except JobFault as error:
        return _fail(spec, events, group, str(error), "job")
    except OutOfMemory as error:
        return _fail(spec, events, group, str(error), "memory", tokens_per_pass=error.tokens_per_pass)
    except Exception as error:
        if is_out_of_memory(error):
            message = (
                "the memory is too small for the model and its training state; train a smaller base model"
            )
            return _fail(spec, events, group, message, "job")
        traceback.print_exc()
        return _fail(spec, events, group, f"{type(error).__name__}: {error}", "platform")
    finally:
        events.close()
    return 0


def _fail(
    spec: RunSpec, events: EventLog, group: ProcessGroup, message: str, fault: Fault, **facts: int
) -> int:
    """Writes the `failed` event, and returns the exit code."""
    exit_code = JOB_FAULT_EXIT_CODE if fault == "job" else 1
    if group.is_first:
        events.write("failed", message, fault=fault, **facts)
        return exit_code
    # torchrun kills all processes once one has ended, and the first may still be writing its event. Or it
    # waits for this one, and knows of nothing.
    time.sleep(_FIRST_RANK_REPORTS_SECONDS)
    if not _has_failed(spec.output_dir):
        own = EventLog(spec.output_dir)
        own.write("failed", message, fault=fault, **facts)
        own.close()
    return exit_code


def _has_failed(output_dir: Path) -> bool:
    lines = (output_dir / EVENTS_FILE).read_text(encoding="utf-8").splitlines()
    return any(json.loads(line)["kind"] == "failed" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
