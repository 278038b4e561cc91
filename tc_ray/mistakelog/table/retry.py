"""Retries while the log cannot be read or written: which errors pass by themselves, and how long it took.

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

FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.1, 2.0

log = logging.getLogger(__name__)

T = TypeVar("T")

_PASSING_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EPIPE,
}
# errors of object stores and of delta-rs come without a number
_PASSING_TEXTS = (
    "os error 28",
    "os error 122",
    "no space left",
    "disk quota exceeded",
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


def may_pass(error: BaseException) -> bool:
    """Whether a call that failed with `error` is worth repeating: space may be made, a store may answer again."""
    if not isinstance(error, OSError) or isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _PASSING_ERRNOS:
        return True
    return error.errno is None and any(text in str(error).lower() for text in _PASSING_TEXTS)


def retry(act: Callable[[], T], who: str) -> T:
    """The result of `act`, which is repeated while it fails with an error that may pass. who: begins the message, logged once."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return act()
        except OSError as error:
            if not may_pass(error):
                raise
            if pause == FIRST_PAUSE_SECONDS:
                log.warning("%s: the log cannot be read (%s); trying again until it can", who, error)
        time.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE_SECONDS)


class RetryClock:
    """Whether the log can be written now, and for how many seconds it could not. Not thread-safe: use it under a lock.

    Args:
        who: begins the messages, which are logged at each change.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._seconds = 0.0
        self._since: float | None = None
        self._dropped_before = 0

    @property
    def open(self) -> bool:
        """The log cannot be written now."""
        return self._since is not None

    @property
    def seconds(self) -> float:
        """In all so far."""
        return self._seconds + (time.monotonic() - self._since if self._since is not None else 0.0)

    def begin(self, error: BaseException, consequence: str, dropped: int) -> None:
        """A write has failed; `dropped`: records dropped so far."""
        if self._since is None:
            self._since, self._dropped_before = time.monotonic(), dropped
            log.warning("%s: the log cannot be written (%s); %s", self._who, error, consequence)

    def end(self, dropped: int) -> None:
        """A write has succeeded."""
        if self._since is not None:
            seconds = time.monotonic() - self._since
            self._seconds, self._since = self._seconds + seconds, None
            log.info(
                "%s: the log can be written again after %.1f s; %d records were dropped",
                self._who,
                seconds,
                dropped - self._dropped_before,
            )
