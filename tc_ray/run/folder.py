"""The run folder: one driver at a time works in it, and only this user's files are loaded from it.

The lock is the kernel's (flock on `run.lock`), so it ends with its process, however that dies: a stale run is taken over by
locking, and the file's content only names the holder. The lease of the Mistake Log works on any storage and against other
commands too; the lock is for the time before it, and for runs without a log. DeepSpeed's checkpoints are pickles, which can
run any code when loaded, so a run resumes from no file of another user unless `run.trust_folder` allows it.
Used by `run.job` and `tc-ray train-copilot`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from pathlib import Path

from tc_ray.mistakelog.table.lease import WAIT_FOR_IT, Holder, LeaseHeldError

NAME = "run.lock"

LOADED = ("config.yaml", "pilot/checkpoints", "copilot/checkpoints")
"""What a resume reads of a run folder."""

log = logging.getLogger(__name__)


class FolderLock:
    """A held lock, a context manager. Its file stays after the process, without meaning.

    Args:
        what: the run, for the error of a second one. name: of the lock's file.

    Raises LeaseHeldError: names the holder's host, process and start.
    """

    def __init__(self, folder: Path, what: str, name: str = NAME) -> None:
        path = folder / name
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise LeaseHeldError(f"{folder} is in use: {_holder(path)}. {WAIT_FOR_IT}") from None
        except OSError as error:
            log.warning("%s: this file system has no locks (%s); only the log's lease stops a second run", path, error)
            return
        try:
            os.ftruncate(self._handle, 0)
            os.write(self._handle, Holder.this(what).to_json())
        except OSError as error:  # a full disk; the lock is held without it
            log.warning("%s: the holder of the lock cannot be written there (%s)", path, error)

    def __enter__(self) -> FolderLock:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def _holder(path: Path) -> str:
    try:
        return str(Holder.from_json(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # it is writing its name, or could not
        return "another run"


class ForeignFolderError(RuntimeError):
    """The run folder holds files of another user; the message names one, its owner and the setting."""


def check_owner(folder: Path, *, trusted: bool, own: int | None = None) -> None:
    """Raise ForeignFolderError if a file among `LOADED` belongs to another user, unless `trusted` (`run.trust_folder`).

    The owner of a file made here now counts as this user too: a share that maps users (NFS with root squashed, a mount with
    one owner) gives it another number than this process has. own: number of this user instead.
    """
    loaded = [folder / name for name in LOADED if (folder / name).exists()]
    if trusted or not loaded:
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".owner.") as made:
        mine = {os.geteuid(), os.fstat(made.fileno()).st_uid} if own is None else {own}
    for path in (path for top in loaded for path in (top, *top.rglob("*"))):
        owner = path.lstat().st_uid
        if owner not in mine:
            raise ForeignFolderError(
                f"{path} belongs to uid {owner}, this process runs as uid {os.geteuid()}: a checkpoint is a pickle, which can "
                "run any code when it is loaded. If you trust its owner, set run.trust_folder=true; else use another run.folder"
            )
