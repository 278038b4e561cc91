"""An exported folder, uploaded to a repository of the Hugging Face hub.

Invariant: what stops an upload (no token, a bad name, a public repository that was not asked for) is said before any other work; a
folder counts as uploaded when the hub has listed every file with its size. Used by `tc-ray export --push`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from tc_ray.export.check import ExportError
from tc_ray.files import FOLDER_MARKER
from tc_ray.text import first_line


class PushError(ExportError):
    """The hub has refused something, or cannot be reached; the message says what to do."""


@dataclass(frozen=True)
class Repository:
    """Of the hub. public: whether others may read it."""

    name: str
    public: bool

    @classmethod
    def checked(cls, name: str, *, public: bool) -> Repository:
        """A repository that may be pushed to, as far as the hub says. It need not exist. Raises PushError."""
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise PushError(f"--push {name}: {first_line(error)}") from None
        if "/" not in name:
            raise PushError(f"--push {name}: write USER/NAME")
        if get_token() is None:
            raise PushError("--push needs a token of the hub that may write: set HF_TOKEN, or run `hf auth login`")
        try:
            found = HfApi().model_info(name)
        except RepositoryNotFoundError:
            return cls(name, public)
        except Exception as error:  # of several libraries
            raise _unreachable(name, error) from error
        if not found.private and not public:
            raise PushError(f"--push {name}: the repository is there and public; add --public, or name another")
        return cls(name, public)

    def push(self, folder: Path) -> str:
        """Upload a folder in one commit, made private unless `public` where it is new. Returns its address. Raises PushError."""
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            address = api.create_repo(self.name, private=not self.public, exist_ok=True)
            api.upload_folder(
                repo_id=self.name, folder_path=folder, ignore_patterns=[FOLDER_MARKER], commit_message="tc-ray export"
            )
            stored = {
                file.rfilename: file.size for file in api.model_info(self.name, files_metadata=True).siblings or ()
            }
        except Exception as error:  # of several libraries
            raise _unreachable(self.name, error, self._advice(folder)) from error
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != FOLDER_MARKER and stored.get(name) != path.stat().st_size:
                raise PushError(f"--push {self.name}: the hub has not stored {name} whole. {self._advice(folder)}")
        return str(address)

    def _advice(self, folder: Path) -> str:
        """The same command refuses a folder that exists, so what remains to be done is said with the error."""
        private = [] if self.public else ["--private"]
        command = ["hf", "upload", self.name, str(folder), ".", "--exclude", FOLDER_MARKER, *private]
        return f"{folder} is written and whole: upload it with `{shlex.join(command)}`, or remove it and run the command again"


def _unreachable(name: str, error: Exception, advice: str = "") -> PushError:
    reason = f"{type(error).__name__}: {first_line(error, 200)}"
    check = "check HF_TOKEN, HF_ENDPOINT and the network"
    return PushError(f"--push {name}: the hub cannot be used ({reason}); {check}{advice and f'. {advice}'}")
