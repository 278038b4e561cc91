"""What all commands share: how they print and how they end when something goes wrong.

Invariant: an error is one clear message on standard error and exit code 2, without a traceback (TC_RAY_DEBUG=1 shows it); a
signal is one line and exit code 128 + its number. No message and no line of a logger shows a secret. Text from files, folders
and requests is shown as characters, so that escape codes in a file name or a foreign run's status cannot steer the terminal.
Used by `tc_ray.cli` and the entry scripts.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import typer

from tc_ray.cluster.signals import as_stopped, stop_signals
from tc_ray.config.redact import redact
from tc_ray.text import visible

DEBUG = "TC_RAY_DEBUG"
EXIT_ERROR = 2
EXIT_TRACEBACK = 1
MESSAGE_LINES = 20


def say(text: str, *, error: bool = False) -> None:
    """Print lines on standard output, or on standard error."""
    typer.echo(visible(text), err=error)


def quiet_logging() -> None:
    """Show warnings of the package as plain lines, as safe as those of `say`."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PlainLine("%(message)s"))


class _PlainLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def run_command(command: Callable[[], object]) -> None:
    """Run a command; turn its error, or a signal, into a message and an exit code. SystemExit passes."""
    logging.setLogRecordFactory(_Record)
    quiet_logging()
    with stop_signals():
        try:
            command()
        except KeyboardInterrupt as interrupt:
            end_stopped(interrupt)
        except Exception as error:  # noqa: BLE001 - every error ends as a message
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                say(redact(traceback.format_exc()), error=True)
                sys.exit(EXIT_TRACEBACK)
            say(f"tc-ray: {message(error)}", error=True)
            sys.exit(EXIT_ERROR)


def end_stopped(interrupt: KeyboardInterrupt) -> NoReturn:
    """End a command that a signal has stopped."""
    stop = as_stopped(interrupt)
    if not stop.reported:
        say(f"tc-ray: {stop}", error=True)
    sys.exit(stop.exit_code)


def message(error: BaseException) -> str:
    """The text for a user.

    An error from a Ray worker is shown as it was raised there. Errors of this package, and those that name a file, are shown as
    they are; any other gets its type and a hint how to see the traceback.
    """
    # Ray wraps an error of a task or actor; its own text is the remote traceback.
    cause = getattr(error, "cause", None)
    while isinstance(cause, BaseException):
        error, cause = cause, getattr(cause, "cause", None)
    lines = str(error).strip().splitlines()
    text = redact("\n".join(lines[:MESSAGE_LINES])) or type(error).__name__
    if type(error).__module__.startswith("tc_ray."):
        return text
    if isinstance(error, OSError) and error.strerror and error.filename:
        return redact(f"{error.strerror}: {error.filename}")
    return f"{type(error).__name__}: {text} ({DEBUG}=1 shows the traceback)"


class _Record(logging.LogRecord):
    """A line of a logger, its arguments filled in."""

    def getMessage(self) -> str:
        return redact(super().getMessage())
