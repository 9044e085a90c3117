"""The command `tunery`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tunery.commands import accounts, datasets, jobs, keys, models
from tunery.commands.exit_codes import ExitCode, exit_code_of
from tunery.errors import SetUpError
from tunery.printable import printable

app = typer.Typer(
    help="Fine-tune language models on your own machines. `tunery up` runs the service, the rest uses it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(datasets.app, name="datasets")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(accounts.app, name="accounts")
app.add_typer(keys.app, name="keys")


@app.command()
def up(
    data_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where everything is kept.")] = Path("data"),
    port: Annotated[
        int, typer.Option(metavar="PORT", help="Where the service listens, on 127.0.0.1.")
    ] = 8080,
    replicas: Annotated[
        str,
        typer.Option(
            metavar="SERVICE=N,...",
            help="Several processes of dataset, job, trainer or inference, as in dataset=2,job=3,trainer=2. "
            "All but trainer need PostgreSQL.",
        ),
    ] = "",
) -> None:
    """Run the whole service in the foreground, until Ctrl-C."""
    from tunery.up import run_up

    raise typer.Exit(run_up(data_dir, port, os.environ, replicas))


StackFolder = Annotated[Path, typer.Option("--data-dir", metavar="DIR", help="The stack's folder.")]


@app.command()
def backup(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="An empty folder, for the copy.")],
    data_dir: StackFolder = Path("data"),
) -> None:
    """Copy all that a stack keeps, keys among it. It may run meanwhile."""
    from tunery.backup import back_up

    copied = back_up(target, data_dir, os.environ)
    typer.echo(
        f"{target}: the databases, the keys and {copied.num_objects} objects, {copied.num_bytes} bytes"
    )


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="What `tunery backup` made.")],
    data_dir: StackFolder = Path("data"),
) -> None:
    """Make a stack's folder from a backup; `tunery up` then goes on where the copy was made."""
    from tunery.backup import restore as restore_from

    copied = restore_from(source, data_dir, os.environ)
    typer.echo(
        f"{data_dir}: the databases, the keys and {copied.num_objects} objects, {copied.num_bytes} bytes"
    )


@app.command()
def demo() -> None:
    """Show it all: fine-tune a small model on a sample, and ask it before and after."""
    from tunery.demo import run_demo

    raise typer.Exit(run_demo())


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code. Errors are a line on stderr each."""
    for argument in arguments:
        if any(
            "\ud800" <= char <= "\udfff" for char in argument
        ):  # Python's stand-ins for bytes that are no text
            return _fail(f"the argument {argument!r} is not UTF-8", ExitCode.USAGE)
    try:
        code: int = app(args=list(arguments), prog_name="tunery", standalone_mode=False) or ExitCode.OK
        sys.stdout.flush()  # not left to Python's end, where nobody catches what goes wrong
        return code
    except typer.TyperException as error:
        # Every one that is raised for wrong arguments can say what is wrong; the base class doesn't tell.
        return _fail(error.format_message(), ExitCode.USAGE)
    except (SetUpError, OSError, KeyboardInterrupt, typer.Abort) as error:
        return _end_of(error)
    except Exception as error:
        # Imported by now if it was a call to the service that failed.
        client = sys.modules.get("tunery.client")
        if client and isinstance(error, client.ClientError):
            return _fail(f"{error.message} ({error.code})", exit_code_of(error))
        raise


def main() -> None:
    """The entry point of the package."""
    if sys.stderr is None:  # closed; Python would print what is meant for it on stdout
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # for good
    if sys.stdout is None:
        sys.exit(_fail("standard output is closed", ExitCode.USAGE))
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="backslashreplace")  # for a locale without the characters that are printed
    sys.exit(run(sys.argv[1:]))


def _end_of(error: BaseException) -> int:
    match error:
        case SetUpError():
            return _fail(str(error), ExitCode.USAGE)
        case OSError():
            # What is still to be written goes nowhere, or Python would complain once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # whoever read our output has gone, as `head` does
                return ExitCode.OK
            return _fail(str(error), ExitCode.USAGE)
        case _:
            return _fail("interrupted", ExitCode.INTERRUPTED)


def _fail(message: str, code: ExitCode) -> int:
    if message:  # a command without its subcommand has printed its help instead
        print(f"tunery: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
