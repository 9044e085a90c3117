"""An estimate by hand, and when a run can't fit."""

from __future__ import annotations

from typing import Any

import pytest

from job_svc.estimates import RowCounts, cost_of, find_probes, in_words, put_probe, refusal, roomiest
from svc_kit.database import Database
from tunery.dataset.v1 import job_data_service_pb2 as data_pb2

GIB = 2**30
COUNTS = RowCounts(
    num_rows=20, num_tokens=2000, num_targets=1000, longest_row_tokens=300, num_validation_tokens=600
)
PROBE = {
    "base_model": "m",
    "method": "lora",
    "dtype": "auto",
    "device": "cpu, 2 cores",
    "startup_seconds": 5.0,
    "load_seconds": 2.0,
    "seconds_per_step": 0.1,
    "seconds_per_token": 0.01,
    "seconds_per_target": 0.02,
    "base_memory_bytes": 1.0 * GIB,
    "bytes_per_token": 2.0**20,
    "total_memory_bytes": 8.0 * GIB,
    "tokens_per_pass": 1024,
}


def run(**changes: Any) -> dict[str, Any]:
    usual = {
        "method": {"kind": "lora"},
        "epochs": 2,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "extras": {},
        "torchrun_arguments": [],
    }
    return usual | changes


def test_by_hand() -> None:
    cost = cost_of(run(), COUNTS, PROBE)
    # 20 rows, 8 a step: 3 steps an epoch.
    assert cost.steps == 6
    assert cost.tokens == 4000
    training = 6 * 0.1 + 4000 * 0.01 + 2000 * 0.02
    validating = 2 * 600 * 0.01 / 3
    assert cost.seconds == pytest.approx(5 + 2 + training + validating + 1)
    # A step has 800 tokens, less than a pass may have.
    assert cost.memory_bytes == pytest.approx(GIB + 800 * 2**20)


def test_max_steps_end_it_early() -> None:
    cost = cost_of(run(max_steps=3), COUNTS, PROBE)
    assert (cost.steps, cost.tokens) == (3, 2000)


def test_measurements_between_the_epochs_count() -> None:
    more = cost_of(run(extras={"eval_every_steps": 2}), COUNTS, PROBE).seconds
    assert more - cost_of(run(), COUNTS, PROBE).seconds == pytest.approx(3 * 600 * 0.01 / 3)


def test_gpus_share_the_work_and_cores_do_not() -> None:
    two = run(torchrun_arguments=["--nproc_per_node=2"])
    assert cost_of(two, COUNTS, PROBE).steps == 4
    on_gpus = PROBE | {"device": "NVIDIA H100"}
    assert cost_of(two, COUNTS, on_gpus).seconds < cost_of(two, COUNTS, PROBE).seconds


TWO = {"torchrun_arguments": ["--nproc_per_node=2"]}
FULL = {"method": {"kind": "full"}}


def test_shards_halve_the_weights_memory() -> None:
    on_gpus = PROBE | {"device": "NVIDIA H100"}
    one = cost_of(run(**FULL), COUNTS, on_gpus).memory_bytes
    two = cost_of(run(**FULL, **TWO), COUNTS, on_gpus).memory_bytes
    assert one - two == pytest.approx(GIB / 2)


def test_processes_on_one_processor_share_its_memory() -> None:
    activations = 800 * 2**20
    assert cost_of(run(**TWO), COUNTS, PROBE).memory_bytes == pytest.approx(2 * (GIB + activations))
    # The shards add up to the whole.
    assert cost_of(run(**FULL, **TWO), COUNTS, PROBE).memory_bytes == pytest.approx(GIB + 2 * activations)
    told = why(PROBE, torchrun_arguments=["--nproc_per_node=8"])
    assert told is not None
    assert "needs about 14.2 GiB" in told
    assert "fewer processes, by --nproc_per_node" in told


def test_weights_in_4_bits_are_not_refused_by_what_the_whole_ones_take() -> None:
    large = PROBE | {"base_memory_bytes": 20.0 * GIB}
    assert why(large) is not None
    assert why(large, extras={"quantize_base": "nf4"}) is None


def test_shards_in_the_hosts_memory_are_not_the_gpus() -> None:
    offloaded = {"method": {"kind": "full", "fsdp_cpu_offload": True}}
    large = PROBE | {"device": "NVIDIA H100", "base_memory_bytes": 40.0 * GIB}
    assert why(large, **FULL, **TWO) is not None
    assert why(large, **offloaded, **TWO) is None
    # One process has nothing to shard, and a CPU no other memory.
    assert why(large, **offloaded) is not None
    assert why(large | {"device": "cpu, 2 cores"}, **offloaded, **TWO) is not None


def test_state_in_8_bits_takes_less() -> None:
    thrifty = {"extras": {"optimizer": "adamw_8bit"}}
    saved = (
        cost_of(run(**FULL), COUNTS, PROBE).memory_bytes
        - cost_of(run(**FULL, **thrifty), COUNTS, PROBE).memory_bytes
    )
    assert saved == pytest.approx(GIB * 6 / 16)
    assert cost_of(run(**thrifty), COUNTS, PROBE) == cost_of(run(), COUNTS, PROBE)


def why(probe: dict[str, Any], **changes: Any) -> str | None:
    wanted = run(**changes)
    return refusal(wanted, COUNTS, probe, cost_of(wanted, COUNTS, probe))


def test_what_fits_is_not_refused() -> None:
    assert why(PROBE) is None


def test_a_model_that_is_too_large_is_refused_with_the_numbers() -> None:
    large = PROBE | {"base_memory_bytes": 20.0 * GIB}
    told = why(large, method={"kind": "full"})
    assert told is not None
    assert "needs about 20.8 GiB" in told
    assert "has 8.0 GiB" in told
    assert "LoRA adapters instead" in told
    assert "train a smaller base model" in str(why(large))


def test_passes_that_are_too_large_are_made_smaller() -> None:
    dear = PROBE | {"bytes_per_token": 10.0 * 2**20, "device": "a GPU"}
    # 800 tokens of a step would take 7.8 GiB, the longest row takes 2.9.
    assert cost_of(run(), COUNTS, dear).memory_bytes == pytest.approx(0.95 * 8 * GIB)
    assert why(dear) is None
    assert why(dear | {"device": PROBE["device"]}) is not None


def test_rows_that_are_too_long_are_refused_with_a_length_that_fits() -> None:
    dear = PROBE | {"bytes_per_token": 50.0 * 2**20, "tokens_per_pass": 64}
    told = why(dear)
    assert told is not None
    assert "max_sequence_length to at most" in told
    fitting = int(told.rpartition("at most ")[2])
    assert why(dear, extras={"max_sequence_length": fitting}) is None
    assert why(dear, extras={"max_sequence_length": fitting + 2}) is not None


def test_words() -> None:
    cost = cost_of(run(), COUNTS, PROBE)
    assert in_words(cost, PROBE) == "estimate: 6 steps · 4,000 tokens · 1m 33s · 1.8 GiB of 8.0 GiB"


def test_rows_without_a_count_are_guessed_by_their_size() -> None:
    file = data_pb2.DataFile(size_bytes=3000, num_rows=10)
    counts = RowCounts.of(data_pb2.PrepareJobDataResponse(training=file))
    assert counts.num_tokens == counts.num_targets == 1320


async def test_measurements_are_kept_by_device(database: Database) -> None:
    large = PROBE | {"device": "gpu of 80 GiB", "total_memory_bytes": 80.0 * GIB}
    async with database.write() as connection:
        for probe in (PROBE, large, PROBE | {"base_memory_bytes": 40.0 * GIB}):
            await put_probe(database, connection, probe)
    async with database.read() as connection:
        found = await find_probes(connection, run() | {"base_model": "m"})
    assert [probe["device"] for probe in found] == ["cpu, 2 cores", "gpu of 80 GiB"]
    assert found[0]["base_memory_bytes"] == 40.0 * GIB  # the newest
    assert roomiest(found) == large
