"""`make demo`: a whole fine-tuning, from a CSV file to a model that answers, shown on the terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from svc_kit.parent_death import dying_with_this_process
from tunery.client import ClientError, TuneryClient
from tunery.commands.datasets import upload_with_progress
from tunery.commands.exit_codes import ExitCode, exit_code_of
from tunery.commands.output import duration_text
from tunery.commands.training_log import TrainingLog
from tunery.credentials import read_credentials
from tunery.errors import SetUpError
from tunery.ports import free_ports
from tunery.resources import Hyperparameters

SAMPLE = Path(__file__).with_name("sample") / "tindra_questions.csv"
BASE_MODEL = "smollm2-135m-instruct"
QUESTIONS = ("Who makes Tindra?", "What does a red light on Tindra mean?")
# Enough for a small model to learn a hundred rows by heart; a larger set wants less of both.
HYPERPARAMETERS: Hyperparameters = {"epochs": 6, "learning_rate": 1e-3}
_MAX_ANSWER_TOKENS = 48
_STOP_SECONDS = 20
_PIPE_WIDTH = 110
_READY_MARK = "tunery is ready at "
# A demo stands alone: what is set for another installation is none of its business, but for the models.
_KEPT_VARIABLES = ("TUNERY_MODELS_DIR", "TUNERY_CATALOG_FILE")


@dataclass(frozen=True)
class Training:
    """What came of the job: the model, and the loss of its first and last step."""

    model: str
    first_loss: float
    last_loss: float


def run_demo() -> int:
    """Runs the demo; returns the command's exit code. Stops what it started, whatever happens."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    console.print(
        Panel.fit("[bold]Tunery[/bold]: from a CSV file to a model that answers", border_style="cyan")
    )
    try:
        _pull_base_model(console)
        with _running_stack(console) as client:
            _tell(console, f"Asking {BASE_MODEL} what it can't know")
            before = _ask_all(console, client, BASE_MODEL)
            training = _train(console, client)
            _tell(console, f"Asking {training.model} the same")
            after = _ask_all(console, client, training.model)
    except KeyboardInterrupt:
        console.print("interrupted; everything is stopped")
        return ExitCode.INTERRUPTED
    except ClientError as error:
        print(f"tunery: {error.message} ({error.code})", file=sys.stderr)
        return exit_code_of(error)
    _show_result(console, before, after, training)
    console.print(f"All of it took {duration_text(time.monotonic() - started)}.", style="dim")
    return ExitCode.OK


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _tell(console: Console, message: str) -> None:
    console.print(Text(f"\n▸ {message}", style="bold cyan"))


def _pull_base_model(console: Console) -> None:
    _tell(console, f"Base model {BASE_MODEL}")
    # In a process of its own, since converting it takes gigabytes that training has better use for.
    command = [sys.executable, "-P", "-m", "tunery.cli", "models", "pull", BASE_MODEL]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise SetUpError(f"the base model {BASE_MODEL} is not at hand, see above")
    console.print(f"  in {result.stdout.strip()}", markup=False)


@contextlib.contextmanager
def _running_stack(console: Console) -> Iterator[TuneryClient]:
    """Runs `tunery up` on a folder that is thrown away in the end."""
    data_dir = Path(tempfile.mkdtemp(prefix="tunery-demo-"))
    [port] = free_ports(1)
    command = [
        sys.executable,
        "-P",
        "-m",
        "tunery.cli",
        "up",
        "--data-dir",
        str(data_dir),
        "--port",
        str(port),
    ]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or not name.startswith("TUNERY_")
    }
    _tell(console, f"The service, by: tunery up --data-dir {data_dir} --port {port}")
    process = subprocess.Popen(
        dying_with_this_process(*command),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is this program's to handle
    )
    try:
        assert process.stdout
        _wait_until_ready(console, process.stdout)
        # Whatever it still says, such as that it restarts a part, is worth seeing.
        threading.Thread(target=_echo, args=(console, process.stdout), daemon=True).start()
        credentials = read_credentials(data_dir)
        with TuneryClient(credentials.url, credentials.api_key) as client:
            yield client
    finally:
        _stop(process)
        shutil.rmtree(data_dir, ignore_errors=True)


def _wait_until_ready(console: Console, output: IO[str]) -> None:
    for line in output:
        console.print(f"  {line.rstrip()}", markup=False, style="dim")
        if line.startswith(_READY_MARK):
            return
    raise SetUpError("the service did not come up, see above")


def _echo(console: Console, output: IO[str]) -> None:
    for line in output:
        console.print(f"  {line.rstrip()}", markup=False, style="dim")


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # its children notice
        process.wait()


def _ask_all(console: Console, client: TuneryClient, model: str) -> list[str]:
    answers = []
    with console.status("thinking"):
        for question in QUESTIONS:
            completion = client.ask(model, question, max_tokens=_MAX_ANSWER_TOKENS, temperature=0)
            choice = completion["choices"][0]
            text = " ".join(choice["message"]["content"].split())
            answers.append(text + (" …" if choice["finish_reason"] == "length" else ""))
            console.print(Text(f"  {question}", style="bold"))
            console.print(Padding(Text(answers[-1]), (0, 0, 0, 4)))
    return answers


def _train(console: Console, client: TuneryClient) -> Training:
    _tell(console, f"Uploading {SAMPLE.name} (POST /api/v1/fine-tuning/datasets)")
    dataset = upload_with_progress(client, SAMPLE, None)
    console.print(
        f"  {dataset['id']}: {dataset['row_count']} rows of {', '.join(dataset['columns'])}", markup=False
    )
    _tell(console, "Fine-tuning with LoRA (POST /api/v1/fine-tuning/jobs)")
    job = client.create_job(BASE_MODEL, dataset["id"], "qa", HYPERPARAMETERS, suffix="demo")
    losses = []
    with TrainingLog(console) as log:
        for record in client.follow_log(job["id"]):
            log.show(record)
            if record.HasField("step"):
                losses.append(record.step.loss)
    details = client.get_job_details(job["id"])
    if "fine_tuned_model" not in details["job"]:
        raise SetUpError(f"the job {details['job']['status']}: {details.get('error', 'see its log above')}")
    return Training(details["job"]["fine_tuned_model"], losses[0], losses[-1])


def _show_result(console: Console, before: list[str], after: list[str], training: Training) -> None:
    table = Table(
        title="The same questions, before and after", title_style="bold", show_lines=True, expand=True
    )
    table.add_column("Question", style="bold", ratio=2)
    table.add_column(f"{BASE_MODEL}, before", style="red", ratio=4)
    table.add_column(f"{training.model}, after", style="green", ratio=4)
    for question, first, second in zip(QUESTIONS, before, after, strict=True):
        table.add_row(Text(question), Text(first), Text(second))
    console.print()
    console.print(table)
    console.print(
        f"Loss: [red]{training.first_loss:.3f}[/red] before, [green]{training.last_loss:.3f}[/green] after."
    )


if __name__ == "__main__":
    from tunery.cli import run

    sys.exit(run(["demo"]))
