"""How a command ends when something goes wrong: one clear message on standard error, exit code 2, no traceback.

A signal ends it with one line and exit code 128 + its number. TC_RAY_DEBUG=1 shows the traceback of an error. Invariant: no
message and no line of a logger shows a secret. Used by `tc_ray.cli.main` and `jobs/train.py`.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from tc_ray.cli.output import quiet_logging, say
from tc_ray.cluster.signals import as_stopped, stop_signals
from tc_ray.config.redact import redact

DEBUG = "TC_RAY_DEBUG"
EXIT_ERROR = 2
EXIT_TRACEBACK = 1
MESSAGE_LINES = 20


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
