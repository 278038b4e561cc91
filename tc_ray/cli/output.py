"""How commands print.

Invariant: text from files, folders and requests is shown as characters: escape codes in a file name or in the status of a
foreign run cannot steer the terminal. Used by commands, `errors.run_command` and the entry scripts.
"""

from __future__ import annotations

import logging

import typer

from tc_ray.text import visible


def say(text: str, *, error: bool = False) -> None:
    """Print lines on standard output, or on standard error."""
    typer.echo(visible(text), err=error)


def quiet_logging() -> None:
    """Show warnings of the package as plain lines, as safe as those of `say`."""
    handler = logging.lastResort
    if handler is not None:
        handler.setFormatter(_Visible("%(message)s"))


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
