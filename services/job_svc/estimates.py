"""What a job will take, told from measured steps of its base model on the trainer's device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from job_svc import credits
from job_svc.job_plan import LARGEST_COUNT
from job_svc.tables import probes
from svc_kit.database import Database
from trainer_svc.engine.run_spec import num_processes
from tunery.dataset.v1 import job_data_service_pb2 as data_pb2

# What the operating system and the service itself need is not the run's to have.
_USABLE_MEMORY = 0.95
# Of the 16 bytes that a weight takes with its gradient and AdamW's state, the state's 8 become 2.
_WITH_STATE_IN_8_BITS = 10 / 16
# Of a pass forward and backward, the forward one alone.
_FORWARD_SHARE = 1 / 3
# Leasing, fetching, storing and reading back small files.
_SERVICE_SECONDS = 1.0


@dataclass(frozen=True)
class RowCounts:
    """What is known of a job's rows.

    Attributes:
        num_rows: to train on.
        num_tokens: of these, in one epoch.
        num_targets: of these, trained on.
        longest_row_tokens: of the longest row.
        num_validation_tokens: of the rows to validate on; 0 without any.
    """

    num_rows: int
    num_tokens: float
    num_targets: float
    longest_row_tokens: int
    num_validation_tokens: float

    @classmethod
    def of(cls, data: data_pb2.PrepareJobDataResponse) -> RowCounts:
        training = data.training
        # Where no tokenizer was at hand, the size has to do.
        guessed = credits.estimate_tokens(training.size_bytes, training.num_rows)
        return cls(
            num_rows=training.num_rows,
            num_tokens=training.num_tokens or guessed,
            num_targets=training.num_targets if training.num_tokens else guessed,
            longest_row_tokens=training.longest_row_tokens,
            num_validation_tokens=data.validation.num_tokens,
        )


@dataclass(frozen=True)
class Cost:
    """What a job takes: tokens and steps in all, seconds from a trainer's start, and the most memory."""

    tokens: float
    steps: int
    seconds: float
    memory_bytes: float


def cost_of(run: dict[str, Any], counts: RowCounts, probe: dict[str, Any]) -> Cost:
    """Returns what a run will take.

    Args:
        run: a `tunery.trainer.v1.TrainingRun` as an object.
        counts: of its rows.
        probe: a `tunery.trainer.v1.Probe` as an object.
    """
    processes = num_processes(run["torchrun_arguments"])
    rows_per_step = run["batch_size"] * run["gradient_accumulation_steps"] * processes
    steps_per_epoch = math.ceil(counts.num_rows / rows_per_step)
    all_steps = run["epochs"] * steps_per_epoch
    steps = min(all_steps, run.get("max_steps", all_steps))
    share = run["epochs"] * steps / all_steps
    tokens, targets = counts.num_tokens * share, counts.num_targets * share
    # On one processor, processes share its cores; each GPU computes for itself.
    workers = 1 if _is_cpu(probe) else processes
    training = (
        steps * probe["seconds_per_step"]
        + (tokens * probe["seconds_per_token"] + targets * probe["seconds_per_target"]) / workers
    )
    measurements = math.ceil(steps / steps_per_epoch) + steps // run["extras"].get("eval_every_steps", 2**31)
    validating = (
        measurements * counts.num_validation_tokens * probe["seconds_per_token"] * _FORWARD_SHARE / workers
    )
    # At the end the model is loaded once more, to be checked.
    return Cost(
        tokens=tokens,
        steps=min(steps, LARGEST_COUNT),
        seconds=(probe["startup_seconds"] + probe["load_seconds"] + training + validating + _SERVICE_SECONDS),
        memory_bytes=_memory(run, counts, probe),
    )


def _memory(run: dict[str, Any], counts: RowCounts, probe: dict[str, Any]) -> float:
    """The most that one device will hold: where passes of the usual size don't fit, they are made smaller."""
    usual, least = _memory_of_passes(run, counts, probe), _least_memory(run, counts, probe)
    return max(least, min(usual, _usable(probe)))


def _least_memory(run: dict[str, Any], counts: RowCounts, probe: dict[str, Any]) -> float:
    """What one device has to hold, on a GPU even if each row is a pass by itself.

    On a CPU passes are small anyway, each core has one, and a run dies of those that are too large.
    """
    return _memory_of_passes(run, counts, probe if _is_cpu(probe) else probe | {"tokens_per_pass": 0})


def _usable(probe: dict[str, Any]) -> float:
    return float(probe["total_memory_bytes"]) * _USABLE_MEMORY


def _memory_of_passes(run: dict[str, Any], counts: RowCounts, probe: dict[str, Any]) -> float:
    """The most that one device holds: one process's on a GPU, all processes' on a CPU."""
    processes = num_processes(run["torchrun_arguments"])
    trains_all = run["method"]["kind"] == "full"
    step_tokens = run["batch_size"] * counts.num_tokens / counts.num_rows
    pass_tokens = max(min(probe["tokens_per_pass"], step_tokens), _longest_row(run, counts))
    num_on_device = processes if _is_cpu(probe) else 1
    base = float(probe["base_memory_bytes"]) / (processes if trains_all else 1)
    if trains_all and run["extras"].get("optimizer") == "adamw_8bit":
        base *= _WITH_STATE_IN_8_BITS
    return num_on_device * (base + probe["bytes_per_token"] * pass_tokens)


def _holds_weights_otherwise(run: dict[str, Any], probe: dict[str, Any]) -> bool:
    """Whether the device holds less of the model than a probe's does: in 4 bits, or a layer at a time."""
    is_quantized = run["extras"].get("quantize_base", "none") != "none"
    is_offloaded = (
        run["method"].get("fsdp_cpu_offload", False) and num_processes(run["torchrun_arguments"]) > 1
    )
    return is_quantized or (is_offloaded and not _is_cpu(probe))


def _is_cpu(probe: dict[str, Any]) -> bool:
    return bool(probe["device"].startswith("cpu"))


def _longest_row(run: dict[str, Any], counts: RowCounts) -> int:
    limit = run["extras"].get("max_sequence_length")
    return min(counts.longest_row_tokens, limit) if limit else counts.longest_row_tokens


def refusal(run: dict[str, Any], counts: RowCounts, probe: dict[str, Any], cost: Cost) -> str | None:
    """Returns why a run can't fit its device and what would make it fit; None when it fits."""
    total, usable = probe["total_memory_bytes"], _usable(probe)
    if cost.memory_bytes <= usable or _holds_weights_otherwise(run, probe):
        return None
    # On a CPU one process takes the least.
    smallest = run | {"torchrun_arguments": []} if _is_cpu(probe) else run
    without_rows = _least_memory(smallest, counts, probe | {"bytes_per_token": 0.0})
    if _least_memory(smallest, counts, probe) <= usable:
        cure = "train in fewer processes, by --nproc_per_node"
    elif without_rows > usable:
        cure = (
            "train LoRA adapters instead of all weights, or a smaller base model"
            if run["method"]["kind"] == "full"
            else "train a smaller base model"
        )
    else:
        fitting = int((usable - without_rows) / probe["bytes_per_token"]) if probe["bytes_per_token"] else 0
        cure = f"set extras.max_sequence_length to at most {max(fitting, 2):,}"
    return (
        f"the run needs about {_gib(cost.memory_bytes)} of memory and the trainer's device "
        f"({probe['device']}) has {_gib(total)}: {cure}"
    )


def in_words(cost: Cost, probe: dict[str, Any]) -> str:
    """Returns an estimate as a line of a job's log."""
    minutes, seconds = divmod(round(cost.seconds), 60)
    duration = f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"
    return (
        f"estimate: {cost.steps:,} steps · {cost.tokens:,.0f} tokens · {duration} · "
        f"{_gib(cost.memory_bytes)} of {_gib(probe['total_memory_bytes'])}"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


async def put_probe(database: Database, connection: AsyncConnection, probe: dict[str, Any]) -> None:
    """Keeps a measurement; for each kind of device the newest counts."""
    key = {name: probe[name] for name in ("base_model", "method", "dtype", "device")}
    await database.upsert(connection, probes, key, {"figures": probe})


async def find_probes(connection: AsyncConnection, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the measurements that a run's estimate can be made from, one for each kind of device."""
    query = sa.select(probes.c.figures).where(
        probes.c.base_model == run["base_model"],
        probes.c.method == run["method"]["kind"],
        probes.c.dtype == run["extras"].get("dtype", "auto"),
    )
    return list(await connection.scalars(query.order_by(probes.c.device)))


def roomiest(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the measurement on the device with the most memory: what doesn't fit there fits nowhere."""
    return max(found, key=lambda probe: float(probe["total_memory_bytes"]))
