"""How a command ends when something goes wrong: one clear message on standard error, exit code 2, no traceback.

TC_RAY_DEBUG=1 shows the traceback. Used by `tc_ray.cli.main` and `jobs/train.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from tc_ray.cli.output import quiet_logging, say

DEBUG = "TC_RAY_DEBUG"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
MESSAGE_LINES = 20


def run_command(command: Callable[[], object]) -> None:
    """Run a command; turn its error into a message and an exit code. SystemExit passes."""
    quiet_logging()
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        say(f"tc-ray: {message(error)}", error=True)
        sys.exit(EXIT_ERROR)


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
