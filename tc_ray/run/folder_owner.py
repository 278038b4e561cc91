"""Who owns the files that a run resumes from: DeepSpeed's checkpoints are pickles, which can run any code when loaded.

Invariant: a run loads no file of another user unless `run.trust_folder` allows it. Called by `run.job` before a resume.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOADED = ("config.yaml", "pilot/checkpoints", "copilot/checkpoints")
"""What a resume reads of a run folder."""


class ForeignFolderError(RuntimeError):
    """The run folder holds files of another user; the message names one, its owner and the setting."""


def check_owner(folder: Path, *, trusted: bool, own: int | None = None) -> None:
    """Refuse to resume from files that another user owns.

    The owner of a file made here now counts as this user too: a share that maps users (NFS with root squashed, a mount with
    one owner) gives it another number than this process has.

    Args:
        folder: an existing run folder. trusted: `run.trust_folder`. own: number of this user; None: found as above.

    Raises:
        ForeignFolderError: a file or folder among `LOADED` belongs to another user.
    """
    if trusted or not any((folder / name).exists() for name in LOADED):
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".owner.") as made:
        mine = {os.geteuid(), os.fstat(made.fileno()).st_uid} if own is None else {own}
    for path in _loaded(folder):
        owner = path.lstat().st_uid
        if owner not in mine:
            raise ForeignFolderError(
                f"{path} belongs to {_name(owner)}, this process runs as {_name(os.geteuid())}: a checkpoint is a pickle, which "
                "can run any code when it is loaded. If you trust its owner, set run.trust_folder=true; else use another "
                "run.folder"
            )


def _loaded(folder: Path) -> Iterator[Path]:
    for name in LOADED:
        path = folder / name
        # the folders above too: their owner can replace what is below
        for above in reversed(path.relative_to(folder).parents[:-1]):
            if (folder / above).exists():
                yield folder / above
        if path.exists() or path.is_symlink():
            yield path
            yield from path.rglob("*")


def _name(user: int) -> str:
    try:
        return f"{pwd.getpwuid(user).pw_name} (uid {user})"
    except KeyError:
        return f"uid {user}"
