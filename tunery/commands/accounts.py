"""`tunery accounts`."""

from __future__ import annotations

from typing import Annotated

import typer

from tunery.commands.connection import DataDir, connect
from tunery.commands.output import AsJson, print_json, stderr_console

app = typer.Typer(help="Make accounts.", no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="A name for people.")],
    credits: Annotated[
        float | None,
        typer.Option(
            help="The first balance. Default: no balance is kept, and nothing is refused for want of it."
        ),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make an account and print its new API key, which is shown this once."""
    with connect(data_dir) as client:
        account_id, api_key = client.create_account(name, credits)
    if as_json:
        print_json({"account_id": account_id, "name": name, "api_key": api_key})
        return
    stderr_console().print(
        f"made account {account_id}; its API key, shown this once:", markup=False, soft_wrap=True
    )
    print(api_key)
