"""`tc-ray`: the typer application that joins the commands. Entry point of the console script."""

from __future__ import annotations

from typing import Annotated

import typer

from tc_ray import __version__
from tc_ray.cli.errors import run_command
from tc_ray.cli.eval import evaluate
from tc_ray.cli.fuse import fuse
from tc_ray.cli.log import log
from tc_ray.cli.once import OnceCommand
from tc_ray.cli.output import say
from tc_ray.cli.serve import serve
from tc_ray.cli.status import status
from tc_ray.cli.train import train
from tc_ray.cli.train_copilot import train_copilot

app = typer.Typer(
    name="tc-ray",
    help="Fine-tune language models that learn from their own mistakes, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train", cls=OnceCommand)(train)
app.command("train-copilot", cls=OnceCommand)(train_copilot)
app.command("eval", cls=OnceCommand)(evaluate)
app.command("fuse", cls=OnceCommand)(fuse)
app.command("serve", cls=OnceCommand)(serve)
app.command("status", cls=OnceCommand)(status)
app.add_typer(log, name="log")


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"tc-ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; errors become one message and exit code 2."""
    run_command(app)


if __name__ == "__main__":
    main()
