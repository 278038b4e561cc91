"""Errors of committing to a log: another process has committed, the disk is full, the attempt or the lease is lost.

Invariant: each keeps its type through pickling (Ray). Raised by the store and the Ledger.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# how delta-rs and object stores name them
_SPACE_ERRORS = ("os error 28", "os error 122", "no space left", "disk quota exceeded")


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
