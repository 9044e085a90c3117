"""Trains the same rows with this engine and with its peers in turn: tokens a second, memory, loss.

    .venv/bin/python bench/train_throughput.py [--peer trl hf] [--method lora] [--rounds 3] [--steps 6]

The claims, on 2 CPU cores with SmolLM2-135M, GSM8K rows, 8 rows a step: LoRA (r=8 on q, k, v, o) at 5.5 times
TRL's default and 5 times its best setting, full fine-tuning at 3 times, with the same loss after the same
rows. Each run is a process group of its own; the runs of a round follow each other, and medians over the
rounds count. What other programs took of the machine meanwhile is noted, and a disturbed run is repeated.

On a GPU (`--device cuda`) the model is a Llama of one billion parameters made from a config, on 64 rows of
GSM8K a step or, with `--rows long`, on eight rows of 2,048 tokens, of which every one is a target. There, and
here, the share of the measured peak of bfloat16 matrix products is reported, with the model's operations
counted as in PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311).

Needs the `bench` extra: `make bench` installs it; the peers with `liger` in their names need the package
liger-kernel besides, which brings Triton. Writes `bench/results/train_throughput_METHOD.json`, on a GPU
`..._METHOD_cuda.json`, and with long rows `..._long_rows.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from kept_results import keep
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from trainer_svc.engine.examples import Example, load_examples
from trainer_svc.engine.run_spec import RunSpec
from tunery.models_dir import models_dir

BENCH = Path(__file__).parent
ROWS = BENCH.parent / "tests" / "e2e" / "gsm8k" / "rows.jsonl"
MODEL_ID = "smollm2-135m-instruct"
ROWS_PER_STEP = {"cpu": 8, "cuda": 64}
LONG_ROWS_PER_STEP = 8
LONGEST = {"cpu": 1024, "cuda": 2048}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"kind": "lora", "rank": 8, "alpha": 16}, "learning_rate": 2e-4},
    "full": {"method": {"kind": "full", "activation_checkpointing": False}, "learning_rate": 2e-5},
}
# What a peer is told besides the model, the rows and the optimizer. `--peer trl-all` compares TRL's settings:
# padding-free and packing are its best, within the noise; packing fills blocks, so its steps have other rows.
PEERS: dict[str, dict[str, Any]] = {
    "trl-default": {"peer": "trl", "weights_dtype": "float32", "arguments": {}},
    "trl-padding-free": {
        "peer": "trl",
        "weights_dtype": "float32",
        "arguments": {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
    },
    "trl-padded": {"peer": "trl", "weights_dtype": "float32", "arguments": {"gradient_checkpointing": False}},
    "trl-packed": {
        "peer": "trl",
        "weights_dtype": "float32",
        "arguments": {"gradient_checkpointing": False, "packing": True, "per_device_train_batch_size": 2},
    },
    "trl-bfloat16-packed": {
        "peer": "trl",
        "weights_dtype": "bfloat16",
        "arguments": {"gradient_checkpointing": False, "packing": True, "per_device_train_batch_size": 2},
    },
    "trl-bfloat16-padded": {
        "peer": "trl",
        "weights_dtype": "bfloat16",
        "arguments": {"gradient_checkpointing": False},
    },
    "trl-liger": {
        "peer": "trl",
        "weights_dtype": "float32",
        "arguments": {"gradient_checkpointing": False, "use_liger_kernel": True},
    },
    "trl-bfloat16-liger": {
        "peer": "trl",
        "weights_dtype": "bfloat16",
        "arguments": {"gradient_checkpointing": False, "use_liger_kernel": True},
    },
    "trl-liger-packed": {
        "peer": "trl",
        "weights_dtype": "float32",
        "arguments": {
            "gradient_checkpointing": False,
            "use_liger_kernel": True,
            "packing": True,
            "per_device_train_batch_size": 8,
        },
    },
    "hf": {"peer": "hf", "weights_dtype": "float32", "arguments": {}},
}
GROUPS = {
    "trl": ["trl-default", "trl-padding-free", "trl-packed"],
    "hf": ["hf"],
    "trl-all": [name for name in PEERS if name != "hf"],
    "trl-gpu": ["trl-default", "trl-padded", "trl-liger", "trl-bfloat16-liger", "trl-liger-packed"],
}


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        tokens_per_second: not counting padding, over all steps but the first.
        step_seconds: median over the same.
        first_step_seconds: from the process's start to the end of its first step.
        peak_mb: of the process's memory, and on a GPU of the device's, as far as the run tells it.
        losses: mean over each step's targets.
        busy_elsewhere: share of the machine's processor time that went to other programs meanwhile.
    """

    tokens_per_second: float
    step_seconds: float
    first_step_seconds: float
    peak_mb: float
    losses: list[float]
    busy_elsewhere: float


@dataclass(frozen=True)
class Workload:
    """What every run trains: a folder with the model, a file of rows, and how."""

    model_dir: Path
    rows_file: Path
    method: str
    steps: int
    rows_per_step: int
    device: str

    @property
    def longest(self) -> int:
        return LONGEST[self.device]

    def spec(self, output_dir: Path) -> RunSpec:
        return RunSpec(
            base_model_dir=self.model_dir,
            base_model_id=MODEL_ID,
            training_file=self.rows_file,
            output_dir=output_dir,
            batch_size=self.rows_per_step,
            max_steps=self.steps,
            shuffle=False,
            extras={"max_sequence_length": self.longest, "compile": self.device == "cuda"},
            **METHODS[self.method],
        )

    def examples(self) -> tuple[Example, ...]:
        tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        return load_examples(self.rows_file, tokenizer, self.longest, "truncate").examples

    def tokens_of_steps(self) -> list[int]:
        lengths = [example.num_tokens for example in self.examples()]
        starts = range(0, len(lengths), self.rows_per_step)
        return [sum(lengths[start : start + self.rows_per_step]) for start in starts]


def make_workload(folder: Path, device: str, method: str, steps: int, *, long_rows: bool = False) -> Workload:
    """The rows and, for a GPU, the model."""
    rows_file = folder / "rows.jsonl"
    dialogs = itertools.cycle(ROWS.read_text(encoding="utf-8").splitlines())
    rows_per_step = LONG_ROWS_PER_STEP if long_rows else ROWS_PER_STEP[device]
    num_rows = steps * rows_per_step
    lines = [_long_row(dialogs) if long_rows else next(dialogs) for _ in range(num_rows)]
    rows_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    smollm = models_dir(os.environ) / MODEL_ID
    if device == "cpu":
        return Workload(smollm, rows_file, method, steps, rows_per_step, device)
    model_dir = folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=LONGEST[device],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    return Workload(model_dir, rows_file, method, steps, rows_per_step, device)


def _long_row(dialogs: Iterator[str]) -> str:
    """Forty dialogs as one text: more than 2,048 tokens."""
    texts = [
        message["content"] for line in itertools.islice(dialogs, 40) for message in json.loads(line)["dialog"]
    ]
    return json.dumps({"text": " ".join(texts)})


def run(name: str, workload: Workload, folder: Path) -> Measured:
    """Runs the engine or a peer in a process group of its own."""
    output_dir, result_file = folder / "out", folder / "result.json"
    spec_file = folder / "spec.json"
    spec_file.write_text(workload.spec(output_dir).model_dump_json())
    command = [sys.executable, "-m", "trainer_svc.engine", str(spec_file)]
    if name != "engine":
        settings_file = folder / "settings.json"
        settings_file.write_text(json.dumps(PEERS[name]))
        command = [sys.executable, str(BENCH / "train_peers.py"), str(spec_file), str(settings_file)]
        command.append(str(result_file))
    started_at, busy_before = time.time(), busy_seconds()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        _, status, usage = os.wait4(process.pid, 0)
    elsewhere = busy_seconds() - busy_before - usage.ru_utime - usage.ru_stime
    cpu_seconds = (time.time() - started_at) * (os.cpu_count() or 1)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{name} failed:\n{(folder / 'log').read_text()[-3000:]}"
    is_engine = name == "engine"
    result = _engine_result(output_dir, workload) if is_engine else json.loads(result_file.read_text())
    ended_at = result["ended_at"]
    step_seconds = [after - before for before, after in pairwise(ended_at)]
    return Measured(
        tokens_per_second=sum(result["num_tokens"][1:]) / (ended_at[-1] - ended_at[0]),
        step_seconds=statistics.median(step_seconds),
        first_step_seconds=ended_at[0] - started_at,
        peak_mb=(result["peak_device_bytes"] or usage.ru_maxrss * 1024) / 1e6,
        losses=result["losses"],
        busy_elsewhere=round(max(0.0, elsewhere) / cpu_seconds, 3),
    )


def busy_seconds() -> float:
    """The seconds that all processors together have worked since the machine's start."""
    user, nice, system, _idle, _iowait, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(most_elsewhere: float) -> None:
    """Returns once other programs leave the machine alone for some seconds, or after a quarter of an hour."""
    deadline = time.monotonic() + 900
    while most_elsewhere < 1 and time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(5)
        if busy_seconds() - before <= 5 * most_elsewhere * (os.cpu_count() or 1):
            return


def run_undisturbed(name: str, workload: Workload, folder: Path, most_elsewhere: float) -> Measured:
    """The first run with at most this share of the machine busy elsewhere; of five the least disturbed."""
    tries = []
    for number in range(5):
        place = folder / str(number)
        place.mkdir(parents=True)
        wait_until_idle(most_elsewhere)
        tries.append(run(name, workload, place))
        print(f"{name}: {tries[-1]}", file=sys.stderr)
        if tries[-1].busy_elsewhere <= most_elsewhere:
            break
    return min(tries, key=lambda measured: measured.busy_elsewhere)


def _engine_result(output_dir: Path, workload: Workload) -> dict[str, Any]:
    """What `train_peers.py` writes for a peer, from the engine's events."""
    events = [json.loads(line) for line in (output_dir / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    on_gpu = any(event.get("device") == "cuda" for event in events)
    return {
        "ended_at": [datetime.fromisoformat(step["time"]).timestamp() for step in steps],
        "losses": [step["loss"] for step in steps],
        "num_tokens": workload.tokens_of_steps(),
        "peak_device_bytes": steps[-1].get("peak_memory_bytes") if on_gpu else None,
    }


def flops_per_token(workload: Workload) -> float:
    """Operations that a token needs, recomputation not counted: 6N + 12LHQT (PaLM, appendix B).

    With frozen weights 4N, since their gradients aren't needed. T is the mean length of the rows.
    """
    config = AutoConfig.from_pretrained(workload.model_dir)
    # Every weight but the embedding's table is part of a product; a tied table is, as the output head.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    lengths = [example.num_tokens for example in workload.examples()]
    attention = 12 * config.num_hidden_layers * config.hidden_size * statistics.mean(lengths)
    return float((4 if workload.method == "lora" else 6) * weights + attention)


def matrix_peak(device: str) -> float:
    """Operations a second of one large bfloat16 product: the best of some tries."""
    size = 2048 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).bfloat16()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and what they come to."""
    names = ["engine", *(name for peer in options.peer for name in GROUPS.get(peer, [peer]))]
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="tunery-bench-") as folder:
        workload = make_workload(
            Path(folder), options.device, options.method, options.steps, long_rows=options.rows == "long"
        )
        for number in range(options.rounds):
            for name in names:
                place = Path(folder, f"{number}-{name}")
                runs[name].append(run_undisturbed(name, workload, place, options.most_elsewhere))
        needed, peak = flops_per_token(workload), matrix_peak(options.device)
    result: dict[str, Any] = {"method": options.method, "steps": options.steps, "rounds": options.rounds}
    for name, measured in runs.items():
        speed = statistics.median(m.tokens_per_second for m in measured)
        result[name] = {
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_of_each_round": [round(m.tokens_per_second, 1) for m in measured],
            "step_seconds": round(statistics.median(m.step_seconds for m in measured), 3),
            "first_step_seconds": round(statistics.median(m.first_step_seconds for m in measured), 1),
            "peak_mb": round(max(m.peak_mb for m in measured)),
            "share_of_matrix_peak": round(speed * needed / peak, 3),
            "busy_elsewhere_of_each_round": [m.busy_elsewhere for m in measured],
            "losses": [round(loss, 4) for loss in measured[-1].losses],
            "mean_loss": round(statistics.mean(measured[-1].losses), 4),
        }
        if name != "engine":
            ratios = [
                ours.tokens_per_second / theirs.tokens_per_second
                for ours, theirs in zip(runs["engine"], measured, strict=True)
            ]
            result[name]["engine_is_faster_by"] = round(statistics.median(ratios), 2)
    return result | {
        "flops_per_token": round(needed),
        "matrix_peak_gflops": round(peak / 1e9),
    }


def main() -> None:
    """Measures, prints, and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", nargs="*", default=["trl"], choices=[*GROUPS, *PEERS])
    parser.add_argument("--method", choices=list(METHODS), default="lora")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", choices=["short", "long"], default="short")
    parser.add_argument(
        "--most-elsewhere",
        type=float,
        default=0.05,
        help="repeat a run while other programs took more than this share of the machine (0.05); 1: never",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--dry", action="store_true", help="leave the kept result as it is")
    options = parser.parse_args()
    assert options.device == "cpu" or torch.cuda.is_available(), "there is no GPU here"
    result = measure(options)
    result["threads"] = torch.get_num_threads()
    if not options.dry:
        kind = "" if options.device == "cpu" else "_cuda"
        kind += "_long_rows" if options.rows == "long" else ""
        machine = torch.cuda.get_device_name() if options.device == "cuda" else None
        result = keep(f"train_throughput_{options.method}{kind}", result, machine)
    if options.json:
        print(json.dumps(result))
        return
    for name in runs_of(result):
        row = result[name]
        faster = f"{row['engine_is_faster_by']:6.2f}x" if "engine_is_faster_by" in row else "       "
        print(
            f"{name:20} {row['tokens_per_second']:8.1f} tokens/s {faster}  step {row['step_seconds']:.3f} s  "
            f"first {row['first_step_seconds']:5.1f} s  {row['peak_mb']:6} MB  loss {row['mean_loss']:.4f}"
        )


def runs_of(result: dict[str, Any]) -> list[str]:
    return [name for name in result if name == "engine" or name in PEERS]


if __name__ == "__main__":
    main()
