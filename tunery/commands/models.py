"""`tunery models`."""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from tunery.commands.connection import DataDir, connect
from tunery.commands.exit_codes import ExitCode
from tunery.commands.output import (
    AsJson,
    print_json,
    print_table,
    status_text,
    stderr_console,
    time_text,
)
from tunery.errors import SetUpError
from tunery.models_dir import models_dir
from tunery.printable import printable

app = typer.Typer(help="List, delete, pull and ask models.", no_args_is_help=True)


@app.command("list")
def list_(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the fine-tuned models, newest first, and the base models."""
    with connect(data_dir) as client:
        fine_tuned, base = client.list_models(), client.list_base_models()
    if as_json:
        print_json({"fine_tuned": fine_tuned, "base": base})
        return
    print_table(
        ("ID", "BASE MODEL", "JOB", "STATUS", "MADE"),
        [
            (
                model["id"],
                model["base_model"],
                model["job_id"],
                status_text(model["status"]),
                time_text(model["created_at"]),
            )
            for model in fine_tuned
        ],
        title="Fine-tuned models",
        spare=("MADE", "JOB", "BASE MODEL", "STATUS"),
    )
    print()
    print_table(
        ("ID", "CONTEXT", "LICENCE", "DESCRIPTION"),
        [
            (model["id"], str(model["context_length"]), model["licence"], model["description"])
            for model in base
        ],
        title="Base models",
        spare=("CONTEXT", "LICENCE", "DESCRIPTION"),
    )


@app.command()
def delete(
    model_id: Annotated[str, typer.Argument(metavar="MODEL_ID")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete a fine-tuned model; from then on it doesn't answer."""
    with connect(data_dir) as client:
        client.delete_model(model_id)
    if as_json:
        print_json({"id": model_id, "deleted": True})
    else:
        print(f"deleted {model_id}")


@app.command()
def pull(model_id: Annotated[str, typer.Argument(metavar="BASE_MODEL_ID")], as_json: AsJson = False) -> None:
    """Bring a base model onto this machine, into TUNERY_MODELS_DIR (default ~/.cache/tunery/models)."""
    from svc_kit.catalog import HubSource, load_catalog
    from svc_kit.errors import UnknownBaseModel
    from trainer_svc.base_models import PullError
    from trainer_svc.base_models import pull as pull_base_model
    from trainer_svc.probes import ProbeFailed, Probes

    configured = os.environ.get("TUNERY_CATALOG_FILE")
    try:
        entry = load_catalog(Path(configured) if configured else None).get(model_id)
    except UnknownBaseModel as error:
        stderr_console().print(f"tunery: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(ExitCode.NOT_FOUND) from error
    except (ValueError, OSError) as error:
        raise SetUpError(str(error)) from error
    progress: AbstractContextManager[object] = nullcontext()  # the hub's library draws a bar for each file
    if not isinstance(entry.parsed_source, HubSource):
        progress = stderr_console().status(f"pulling {model_id}")
        os.environ["TQDM_DISABLE"] = "1"  # transformers' own bars would tear the spinner apart
    try:
        with progress:
            folder = pull_base_model(entry, models_dir(os.environ))
        probes = Probes(models_dir(os.environ))
        if probes.get(entry, "lora", "auto") is None:
            with stderr_console().status(f"measuring a few steps of {model_id}, for jobs' estimates"):
                asyncio.run(probes.measure(entry, "lora", "auto"))
    except ProbeFailed as error:
        stderr_console().print(f"tunery: {error}; jobs are measured when they train", markup=False)
    except (PullError, OSError) as error:
        raise SetUpError(str(error)) from error
    if as_json:
        print_json({"id": model_id, "path": str(folder)})
    else:
        print(folder)


@app.command()
def ask(
    model_id: Annotated[str, typer.Argument(metavar="MODEL_ID", help="A fine-tuned or a base model.")],
    question: Annotated[str, typer.Argument()],
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest answer.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model one question and print its answer."""
    given = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in given.items() if value is not None}
    with connect(data_dir) as client, stderr_console().status(f"{model_id} is thinking"):
        completion = client.ask(model_id, question, system, **options)
    if as_json:
        print_json(completion)
    else:
        print(printable(completion["choices"][0]["message"]["content"]))
