"""`tc-ray`: the typer application that joins the commands. Entry point of the console script."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tc_ray import __version__
from tc_ray.cli.chat import chat
from tc_ray.cli.command import end_stopped, run_command, say
from tc_ray.cli.config import config
from tc_ray.cli.export import export
from tc_ray.cli.init import init
from tc_ray.cli.log import log
from tc_ray.cli.models import evaluate, fuse, serve
from tc_ray.cli.report import report
from tc_ray.cli.status import status
from tc_ray.cli.study import study
from tc_ray.cli.train import train
from tc_ray.cli.train_copilot import train_copilot
from tc_ray.config.redact import redact


class _Commands(TyperGroup):
    """A signal ends a command as it ends `jobs/train.py`; the library alone would print "Aborted!" and exit with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            end_stopped(interrupt)
        except Exception as error:
            if hasattr(error, "message"):  # of typer, about a wrong word on the command line
                with suppress(AttributeError):  # jinja's cannot be set
                    error.message = redact(str(error.message))
            raise


app = typer.Typer(
    name="tc-ray",
    cls=_Commands,
    help="Fine-tune language models that learn from their own mistakes, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("init")(init)
app.command("train")(train)
app.command("train-copilot")(train_copilot)
app.command("eval")(evaluate)
app.command("study")(study)
app.command("fuse")(fuse)
app.command("export")(export)
app.command("serve")(serve)
app.command("chat")(chat)
app.command("status")(status)
app.command("report")(report)
app.add_typer(log, name="log")
app.add_typer(config, name="config")


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
    run_command(lambda: app(prog_name="tc-ray"))  # also as `python -m`, for the shell's completion


if __name__ == "__main__":
    main()
