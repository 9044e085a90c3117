"""`tunery datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tunery.commands.connection import DataDir, connect
from tunery.commands.dataset_report import print_report
from tunery.commands.output import (
    AsJson,
    print_facts,
    print_json,
    print_table,
    size_text,
    stderr_console,
    time_text,
)
from tunery.errors import SetUpError
from tunery.printable import printable

if TYPE_CHECKING:
    from tunery.client import TuneryClient
    from tunery.resources import Dataset, TaskType

app = typer.Typer(help="Upload, list, check and delete training data.", no_args_is_help=True)


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(metavar="FILE.csv", help="The CSV file.")],
    name: Annotated[str | None, typer.Option(help="Shown instead of the file's name.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Upload a CSV file."""
    with connect(data_dir) as client:
        dataset = upload_with_progress(client, file, name)
    if as_json:
        print_json(dataset)
        return
    print_facts(
        [
            ("id", dataset["id"]),
            ("name", dataset["name"]),
            ("rows", str(dataset["row_count"])),
            ("columns", ", ".join(dataset["columns"])),
            ("size", size_text(dataset["size_bytes"])),
        ]
    )


@app.command("list")
def list_(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the datasets, newest first."""
    with connect(data_dir) as client:
        datasets = client.list_datasets()
    if as_json:
        print_json({"data": datasets})
        return
    print_table(
        ("ID", "NAME", "ROWS", "SIZE", "COLUMNS", "UPLOADED"),
        [
            (
                dataset["id"],
                dataset["name"],
                str(dataset["row_count"]),
                size_text(dataset["size_bytes"]),
                ", ".join(dataset["columns"]),
                time_text(dataset["created_at"]),
            )
            for dataset in datasets
        ],
        spare=("NAME", "ROWS", "UPLOADED", "SIZE", "COLUMNS"),
    )


@app.command()
def report(
    dataset_id: Annotated[str, typer.Argument(metavar="DATASET_ID")],
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", "--model", help="Whose tokens to count. Default: the catalog's default."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="qa|not_qa", help="What a CSV's rows are. Default: what its columns fit."),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(metavar="N", help="The longest row in tokens. Default: the model's context."),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Tell what is wrong with a dataset's rows and what a model will see of them, before a job is made."""
    with connect(data_dir) as client, stderr_console().status(f"looking through {dataset_id}"):
        told = client.get_dataset_report(
            dataset_id, base_model, cast("TaskType | None", task), max_sequence_length
        )
    if as_json:
        print_json(told)
    else:
        print_report(told)


@app.command()
def delete(
    dataset_id: Annotated[str, typer.Argument(metavar="DATASET_ID")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete a dataset that no queued or running job uses."""
    with connect(data_dir) as client:
        client.delete_dataset(dataset_id)
    if as_json:
        print_json({"id": dataset_id, "deleted": True})
    else:
        print(f"deleted {dataset_id}")


def upload_with_progress(client: TuneryClient, file: Path, name: str | None) -> Dataset:
    """Uploads a CSV file, with a bar on the terminal.

    Raises:
        SetUpError: the file can't be read.
    """
    if file.exists() and not file.is_file():
        raise SetUpError(f"{file} is not a file")
    console = stderr_console()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task(f"uploading {printable(file.name)}".replace("[", "\\["), total=None)
        try:
            return client.upload_dataset(
                file, name, lambda sent, total: progress.update(bar, completed=sent, total=total)
            )
        except OSError as error:
            raise SetUpError(f"can't read {file}: {error.strerror or error}") from error
