"""Errors of committing to a log: another process has committed, the disk is full, the attempt or the lease is lost. And retries.

Invariants: each error keeps its type through pickling (Ray). A call is retried only if it may succeed later without a change of the
run: no space, no quota, a store that does not answer. All others (no permission, a missing folder) are failures.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

# how delta-rs and object stores name them
_SPACE_ERRORS = ("os error 28", "os error 122", "no space left", "disk quota exceeded")
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


class CommitConflictError(RuntimeError):
    """Another committer changed the table since this store last read it: `refresh`, decide anew, try again.

    If the other commit came right after the own one, the own one is in the table.
    """


class LogFullError(OSError):
    """No space is left where the log is. Nothing was changed; the same call may succeed later."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return LogFullError, (self.strerror,)


class FencedError(RuntimeError):
    """The caller belongs to an attempt that a newer one has replaced: it must stop."""

    may_pass = True
    """A new start of the Pilot, which is another attempt, may succeed; see `tc_ray.cluster.failures`."""


class LeaseLostError(FencedError):
    """Another process has taken the log over, because this one seemed dead. Final: everything of this run must stop."""

    may_pass = False

    @classmethod
    def of(cls, location: object) -> LeaseLostError:
        """With the message for users."""
        return cls(
            f"{location}: another process has taken this log over, because this run gave no sign of life; this run must stop. "
            "The same command resumes from the last checkpoint when the other process has ended"
        )


@contextmanager
def full_disk_named(location: object) -> Iterator[None]:
    """Turns delta-rs' OSError of a full disk, which has no errno, into `LogFullError`."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise LogFullError(f"no space left at {location}") from error
        raise


def is_full_disk(error: OSError) -> bool:
    """The disk, or a quota on it, is full; delta-rs says so only in the text."""
    if error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(text in str(error).lower() for text in _SPACE_ERRORS)


class WriterError(RuntimeError):
    """The writer thread has failed; the cause is chained. Rounds after the last acknowledged one are not in the log."""

    may_pass = True


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
