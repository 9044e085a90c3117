"""Sends a run's numbers to Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.events import Subscriber
from trainer_svc.engine.run_spec import RunSpec

_INIT_SECONDS = 30


@dataclass(frozen=True)
class WandbRun:
    """A run of Weights & Biases under way.

    Attributes:
        record: a subscriber for the event log.
        finish: ends the run; its files are complete afterwards.
        place: where it is to be found, for people.
        url: the run's page; None offline.
    """

    record: Subscriber
    finish: Callable[[], None]
    place: str
    url: str | None


def start_wandb(spec: RunSpec) -> WandbRun:
    """Starts a run of `spec.wandb_project`.

    Without WANDB_API_KEY in the environment, or where the server can't be used, the run is written to
    `output_dir/wandb` only, in the form that `wandb sync` uploads later.

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

    def start(mode: Literal["online", "offline"]) -> wandb.Run:
        return wandb.init(
            project=spec.wandb_project,
            dir=spec.output_dir,
            mode=mode,
            config=spec.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", init_timeout=_INIT_SECONDS),
        )

    run, why_offline = None, "WANDB_API_KEY isn't set"
    if os.environ.get("WANDB_API_KEY"):
        try:
            run = start("online")
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            why_offline = f"its server can't be used ({' '.join(str(error).split())})"
    url = None if run is None else run.url
    if run is None:
        run = start("offline")
    # wandb's own steps only rise, and those of a run that goes back don't.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def record(event: dict[str, Any]) -> None:
        match event["kind"]:
            case "step":
                keys = ("loss", "learning_rate", "tokens_per_second", "grad_norm", "epoch")
                run.log({"step": event["step"]} | {f"train/{key}": event[key] for key in keys})
            case "validation":
                run.log({"step": event["step"], "validation/loss": event["loss"]})

    place = url or f"offline, since {why_offline}; `wandb sync` uploads its files"
    return WandbRun(record, run.finish, place, url)
