"""How a command ends when something goes wrong: one clear message on standard error, exit code 2, no traceback.

A signal that asks it to end: one line, exit code 128 + its number. TC_RAY_DEBUG=1 shows the traceback of an error. Used by `tc_ray.cli.main` and `jobs/train.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from tc_ray.signals import as_stopped, stop_signals

DEBUG = "TC_RAY_DEBUG"
EXIT_ERROR = 2
MESSAGE_LINES = 20


def run_command(command: Callable[[], object]) -> None:
    """Run a command; turn its error, or a signal that asks it to end, into a message and an exit code. SystemExit passes."""
    with stop_signals():
        try:
            command()
        except KeyboardInterrupt as interrupt:
            end_stopped(interrupt)
        except Exception as error:
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                raise
            print(f"tc-ray: {message(error)}", file=sys.stderr)
            sys.exit(EXIT_ERROR)


def end_stopped(interrupt: KeyboardInterrupt) -> NoReturn:
    """End a command that a signal has asked to end."""
    stop = as_stopped(interrupt)
    if not stop.reported:
        print(f"tc-ray: {stop}", file=sys.stderr)
    sys.exit(stop.exit_code)


def message(error: BaseException) -> str:
    """The text for a user.

    An error that crossed Ray is shown as the one that was raised there. Our own errors and those about files speak for
    themselves; any other is a surprise: its type and the way to the traceback are added.
    """
    # Ray wraps an error of a task or actor; its own text is the remote traceback.
    cause = getattr(error, "cause", None)
    while isinstance(cause, BaseException):
        error, cause = cause, getattr(cause, "cause", None)
    lines = str(error).strip().splitlines()
    text = "\n".join(lines[:MESSAGE_LINES]) or type(error).__name__
    if type(error).__module__.startswith("tc_ray."):
        return text
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.strerror and error.filename else text
    return f"{type(error).__name__}: {text} ({DEBUG}=1 shows the traceback)"
