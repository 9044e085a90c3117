"""`tunery jobs`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tunery.commands.connection import DataDir, connect
from tunery.commands.datasets import upload_with_progress
from tunery.commands.exit_codes import ExitCode
from tunery.commands.output import (
    AsJson,
    duration_text,
    print_facts,
    print_json,
    print_table,
    status_text,
    stdout_console,
    time_text,
)
from tunery.commands.training_log import TrainingLog, parse_log_lines, record_json
from tunery.printable import printable

if TYPE_CHECKING:
    from tunery.client import TuneryClient
    from tunery.resources import Hyperparameters, Job, JobCost, JobDetails, TaskType

app = typer.Typer(help="Create, list, watch and cancel fine-tuning jobs.", no_args_is_help=True)

_SERVER_ERROR = 500

JobId = Annotated[str, typer.Argument(metavar="JOB_ID")]


@app.command()
def create(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="A dataset's id, or a CSV file to upload first.")
    ],
    model: Annotated[str | None, typer.Option(help="The base model. Default: the catalog's default.")] = None,
    task: Annotated[str, typer.Option(metavar="qa|not_qa", help="What the rows are.")] = "qa",
    epochs: Annotated[int | None, typer.Option(help="Passes over the rows.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The learning rate.")] = None,
    validation_split: Annotated[
        float | None, typer.Option(help="The share of the rows kept for validation, 0 to 1.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Goes into the new model's id.")] = None,
    priority: Annotated[
        int, typer.Option(help="Of your own queued jobs the highest goes first, -100 to 100.")
    ] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it until it has ended.")] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Start a fine-tuning job."""
    given = {
        "epochs": epochs,
        "max_steps": max_steps,
        "learning_rate": learning_rate,
        "validation_split": validation_split,
    }
    from tunery.client import ClientError

    hyperparameters = cast(
        "Hyperparameters", {name: value for name, value in given.items() if value is not None}
    )
    with connect(data_dir) as client:
        base_model = model or client.list_base_models()[0]["id"]
        is_file = os.sep in dataset or dataset.lower().endswith(".csv") or Path(dataset).is_file()
        if is_file:
            dataset = upload_with_progress(client, Path(dataset), None)["id"]
        try:
            job = client.create_job(
                base_model, dataset, cast("TaskType", task), hyperparameters, suffix, priority
            )
        except ClientError as error:
            # What was uploaded for it has no use then. A server's error doesn't tell that there is no job.
            if is_file and error.http_status is not None and error.http_status < _SERVER_ERROR:
                client.delete_dataset(dataset)
            raise
        if not follow:
            _print_job(job, as_json)
            return
        if not as_json:
            stdout_console().print(f"created {job['id']}", markup=False)
        details = _follow(client, job["id"], is_quiet=as_json)
    if as_json:
        print_json(details)
    raise typer.Exit(_exit_code(details))


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="At most so many, 1 to 100.")] = 20,
    offset: Annotated[int, typer.Option(help="Leave out so many of the newest.")] = 0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs, newest first."""
    with connect(data_dir) as client:
        page = client.list_jobs(limit, offset)
    if as_json:
        print_json(page)
        return
    print_table(
        ("ID", "STATUS", "BASE MODEL", "STEPS", "LOSS", "CREATED", "MODEL"),
        [
            (
                job["id"],
                status_text(job["status"]),
                job["base_model"],
                str(job.get("training_metrics", {}).get("steps_completed", "")),
                _loss(job, "training_loss") or "",
                time_text(job["created_at"]),
                job.get("fine_tuned_model", ""),
            )
            for job in page["data"]
        ],
        spare=("MODEL", "LOSS", "CREATED", "STEPS", "BASE MODEL"),
    )
    last = offset + len(page["data"])
    if last < page["total"]:
        stdout_console().print(f"{last} of {page['total']}; --offset {last} shows the next", style="dim")


@app.command()
def show(job_id: JobId, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show a job with everything known of it."""
    with connect(data_dir) as client:
        details = client.get_job_details(job_id)
    if as_json:
        print_json(details)
    else:
        _print_details(details)


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's log; with -f also what comes, until the job has ended."""
    with connect(data_dir) as client:
        if not follow:
            lines = client.read_log(job_id)
            if as_json:
                print_json({"data": list(parse_log_lines(lines))})
                return
            for line in lines:
                print(printable(line))
            return
        if not as_json:
            raise typer.Exit(_exit_code(_follow(client, job_id, is_quiet=False)))
        records = [record_json(record) for record in client.follow_log(job_id)]
        print_json({"data": records})
        raise typer.Exit(_exit_code(client.get_job_details(job_id)))


@app.command()
def cancel(job_id: JobId, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Cancel a job that has not ended."""
    with connect(data_dir) as client:
        job = client.cancel_job(job_id)
    if as_json:
        print_json(job)
    else:
        print(f"cancelled {job_id}")


def _follow(client: TuneryClient, job_id: str, *, is_quiet: bool) -> JobDetails:
    with TrainingLog(stdout_console(), is_quiet=is_quiet) as log:
        try:
            for record in client.follow_log(job_id):
                log.show(record)
        except KeyboardInterrupt:
            typer.echo(f"tunery: {job_id} goes on; `tunery jobs logs -f {job_id}` watches it again", err=True)
            raise
    details = client.get_job_details(job_id)
    if not is_quiet and "fine_tuned_model" in details["job"]:
        print(f"the model is {details['job']['fine_tuned_model']}")
    return details


def _exit_code(details: JobDetails) -> ExitCode:
    """Returns what a job that has ended means to a program, and says on stderr why it is no success."""
    job = details["job"]
    if job["status"] == "completed":
        return ExitCode.OK
    reason = f": {printable(' '.join(details['error'].split()))}" if "error" in details else ""
    typer.echo(f"tunery: {job['id']} {job['status']}{reason}", err=True)
    return ExitCode.REFUSED


def _print_job(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        print_facts(_job_facts(job))


def _print_details(details: JobDetails) -> None:
    job = details["job"]
    steps = job.get("training_metrics", {}).get("steps_completed")
    total = details.get("total_steps")
    remaining = details.get("remaining_seconds")
    print_facts(
        [
            *_job_facts(job),
            ("error", details.get("error")),
            ("steps", f"{steps or 0} of {total}" if total else None),
            ("remaining", None if remaining is None else duration_text(remaining)),
            ("training loss", _loss(job, "training_loss")),
            ("validation loss", _loss(job, "validation_loss")),
            ("tokens", f"{details['tokens_trained']:,.0f}"),
            ("estimate", _cost(details.get("estimate"))),
            ("actual", _cost(details.get("actual"))),
            ("attempts", str(details["attempts"])),
            ("credits held", _number(details.get("credits_held"))),
            ("credits charged", _number(details.get("credits_charged"))),
        ]
    )


def _cost(cost: JobCost | None) -> str | None:
    if cost is None:
        return None
    duration, gib = duration_text(cost["seconds"]), cost["memory_bytes"] / 2**30
    return f"{cost['steps']:,} steps, {cost['tokens']:,.0f} tokens, {duration}, {gib:.1f} GiB"


def _job_facts(job: Job) -> list[tuple[str, str | None]]:
    hyperparameters = ", ".join(f"{name} {value}" for name, value in job["hyperparameters"].items())
    return [
        ("id", job["id"]),
        ("status", job["status"]),
        ("base model", job["base_model"]),
        ("dataset", job.get("dataset_id")),
        ("task", job.get("task_type")),
        ("settings", hyperparameters or None),
        ("model", job.get("fine_tuned_model")),
        ("created", time_text(job["created_at"])),
        ("ended", time_text(job.get("completed_at")) or None),
    ]


def _loss(job: Job, name: str) -> str | None:
    value = cast("dict[str, float]", job.get("training_metrics", {})).get(name)
    return None if value is None else f"{value:.4f}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"
