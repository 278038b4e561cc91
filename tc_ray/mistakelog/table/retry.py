"""Retries while the log cannot be read or written: which errors pass by themselves.

Invariant: an error is retried only if the same call may succeed later without a change of the run: no space, no quota, a store
that does not answer. All others (no permission, a missing folder) are failures. Used by the record writer, by the Ledger's start
and by the Copilot.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tc_ray.mistakelog.table.errors import is_full_disk

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.1, 2.0
# errors of object stores come without a number
_PASSING_TEXTS = (
    "connection",
    "timed out",
    "timeout",
    "error sending request",
    "slowdown",
    "slow down",
    "service unavailable",
    "too many requests",
    "internal server error",
    "bad gateway",
)

log = logging.getLogger(__name__)

T = TypeVar("T")


def may_pass(error: BaseException) -> bool:
    """Whether a call that failed with `error` is worth repeating: space may be made, a store may answer again."""
    if not isinstance(error, OSError) or isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)) or is_full_disk(error):
        return True
    if error.errno is not None:
        return error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
    return any(text in str(error).lower() for text in _PASSING_TEXTS)


def retry(act: Callable[[], T], who: str, failed: Callable[[], None] = lambda: None) -> T:
    """The result of `act`, which is repeated while it fails with an error that may pass.

    Args:
        who: begins the messages at the first failure and at the end.
        failed: called after each failure.
    """
    began, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
    while True:
        try:
            result = act()
        except OSError as error:
            if not may_pass(error):
                raise
            failed()
            if pause == _FIRST_PAUSE_SECONDS:
                log.warning("%s: the log is out of reach (%s); trying again until it is there", who, error)
        else:
            if pause > _FIRST_PAUSE_SECONDS:
                log.info("%s: the log is there again, after %.1f s", who, time.monotonic() - began)
            return result
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE_SECONDS)
