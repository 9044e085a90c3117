"""`tunery keys`."""

from __future__ import annotations

from typing import Annotated

import typer

from tunery.commands.connection import DataDir, connect
from tunery.commands.output import AsJson, print_json, print_table, stderr_console, time_text
from tunery.resources import Scope

app = typer.Typer(help="Make, list and take back API keys.", no_args_is_help=True)

Account = Annotated[
    str | None,
    typer.Option("--account", metavar="ACCOUNT_ID", help="Another account's keys; for admins."),
]
_ID_CHARS = 11


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="A name for people.")],
    scope: Annotated[
        Scope,
        typer.Option(
            help="What the key may do: `read` changes nothing, `write` is all that an account does, `admin` "
            "also makes accounts."
        ),
    ] = "write",
    account: Account = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key and print it; it is shown this once."""
    with connect(data_dir) as client:
        made = client.create_key(name, [scope], account)
    if as_json:
        print_json(made)
        return
    stderr_console().print(f"made key {made['key']['id']}; shown this once:", markup=False, soft_wrap=True)
    print(made["api_key"])


@app.command("list")
def list_(account: Account = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List API keys, oldest first. A key's id is its first 11 characters."""
    with connect(data_dir) as client:
        keys = client.list_keys(account)
    if as_json:
        print_json({"data": keys})
        return
    print_table(
        ("ID", "NAME", "SCOPES", "MADE"),
        [(key["id"], key["name"], " ".join(key["scopes"]), time_text(key["created_at"])) for key in keys],
        spare=("MADE",),
    )


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, its first 11 characters, or the whole key.")],
    account: Account = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Take an API key back: within 5 seconds it opens nothing any more."""
    key_id = key_id[:_ID_CHARS]  # a whole key has no place in a path, which is logged
    with connect(data_dir) as client:
        client.revoke_key(key_id, account)
    if as_json:
        print_json({"id": key_id, "revoked": True})
        return
    stderr_console().print(f"took back key {key_id}", markup=False, soft_wrap=True)
