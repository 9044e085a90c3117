"""Sends a run's numbers to Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.events import Subscriber
from trainer_svc.engine.run_spec import RunSpec


@dataclass(frozen=True)
class WandbRun:
    """A run of Weights & Biases under way.

    Attributes:
        record: a subscriber for the event log.
        finish: ends the run; its files are complete afterwards.
        url: the run's page; None offline.
    """

    record: Subscriber
    finish: Callable[[], None]
    url: str | None


def start_wandb(spec: RunSpec) -> WandbRun:
    """Starts a run of `spec.wandb_project`.

    Without WANDB_API_KEY in the environment the run is written to `output_dir/wandb` only, in the form that
    `wandb sync` uploads later.

    Raises:
        JobFault: the package isn't installed on this machine.
    """
    try:
        # Imported here: an extra, and slow to import.
        import wandb
    except ImportError as error:
        raise JobFault(
            "the wandb logger was asked for, but wandb isn't installed on this trainer: "
            "its operator can run `pip install tunery[wandb]`"
        ) from error
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    run = wandb.init(
        project=spec.wandb_project,
        dir=spec.output_dir,
        mode="online" if has_key else "offline",
        config=spec.model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off"),
    )

    def record(event: dict[str, Any]) -> None:
        match event["kind"]:
            case "step":
                keys = ("loss", "learning_rate", "tokens_per_second", "grad_norm", "epoch")
                run.log({f"train/{key}": event[key] for key in keys}, step=event["step"])
            case "validation":
                run.log({"validation/loss": event["loss"]}, step=event["step"])

    return WandbRun(record, run.finish, run.url if has_key else None)
