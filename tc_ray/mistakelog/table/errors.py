"""Errors of one who commits to a log: somebody else has committed, the disk is full, the attempt or the lease is lost.

Invariant: each survives the way through Ray (pickling) with its type. Raised by the store and the Ledger, met by everybody who
writes to a log.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# how delta-rs names them
_SPACE_ERRORS = ("os error 28", "os error 122")


class CommitConflictError(RuntimeError):
    """Another committer changed the table since this store last read it: `refresh`, decide anew, try again.

    It says nothing of the own commit where the other one came right after it.
    """


class LogFullError(OSError):
    """There is no space left where the log is. Nothing was changed; the same call may succeed later."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return LogFullError, (self.strerror,)


class FencedError(RuntimeError):
    """The caller belongs to an attempt that a newer one has replaced: it must stop."""

    may_pass = True
    """Of the Pilot's next start, which is another attempt; see `tc_ray.cluster.failures`."""


class LeaseLostError(FencedError):
    """Another process has taken the log over, for this one was taken for dead. Final: everything of this run must stop."""

    may_pass = False

    @classmethod
    def of(cls, location: object) -> LeaseLostError:
        """With the text that users see."""
        return cls(
            f"{location}: another process has taken this log over, because this run gave no sign of life; this run must stop. "
            "The same command goes on from the last checkpoint when the other one has ended"
        )


@contextmanager
def full_disk_named(location: object) -> Iterator[None]:
    """Turns delta-rs' nameless OSError of a full disk into `LogFullError`."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise LogFullError(f"no space left at {location}") from error
        raise


def is_full_disk(error: OSError) -> bool:
    """The disk, or a quota on it, is full; delta-rs says so in the text only."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in _SPACE_ERRORS)


class WriterError(RuntimeError):
    """The writer thread has failed; its cause is chained. Nothing after the last acknowledged round is in the log."""

    may_pass = True
