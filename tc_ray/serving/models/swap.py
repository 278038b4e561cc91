"""Newer Copilots without a pause: each is loaded beside the one that serves, then put in its place.

Ray Serve's `reconfigure` starts it: `user_config: {copilots: {NAME: FOLDER}}` names the export folders, and a changed
`reload` has them read again.
Invariant: a Copilot that cannot be used is reported in one log line and changes nothing. Requests in progress end with the
Copilot that they began with. Owned by deploy/replica.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.export.check import copilot_version
from tc_ray.serving.errors import ServingError
from tc_ray.serving.models.exports import find_export
from tc_ray.serving.models.loading import LoadedCopilot, LoadedRun

if TYPE_CHECKING:
    from tc_ray.serving.models.registry import ModelRegistry

RETIRE_AFTER_S = 5.0
"""A replaced engine takes requests for so long still: some have looked it up before."""
logger = logging.getLogger("tc_ray.serving")


def read_user_config(user_config: Any, names: set[str]) -> dict[str, Path]:
    """Model name -> export folder of its Copilot, from `user_config: {copilots: {NAME: FOLDER}, reload: ANYTHING}`.

    Raises ServingError for any other key, a name that is not served, and a folder without an exported model.
    """
    if not isinstance(user_config, Mapping) or set(user_config) - {"copilots", "reload"}:
        raise ServingError("user_config may hold `copilots`, a mapping of model names to export folders, and `reload`")
    copilots = user_config.get("copilots") or {}
    if not isinstance(copilots, Mapping) or set(copilots) - names:
        raise ServingError(
            f"user_config.copilots must map names of served models ({', '.join(sorted(names))}) to folders"
        )
    return {name: find_export(str(folder)) for name, folder in copilots.items()}


class CopilotSwap:
    """Replaces Copilots in the model registry. Called from one thread at a time.

    Args:
        registry: what requests are served from. loaded: run -> the Copilot that it serves with now.
        drain_s: how long requests of a replaced Copilot may go on.
    """

    def __init__(self, registry: ModelRegistry, loaded: Mapping[LoadedRun, LoadedCopilot], *, drain_s: float) -> None:
        self._registry, self._current, self._drain_s = registry, dict(loaded), drain_s

    @property
    def names(self) -> set[str]:
        """Names of the served models."""
        return {run.name for run in self._current}

    def load(self, folders: Mapping[str, Path]) -> list[str]:
        """Serve the Copilots in these export folders, and of all other models those in their own.

        What is served already, by content, stays. Returns a line per Copilot that cannot be used.
        """
        problems = [self._load(run, folders.get(run.name, run.export)) for run in list(self._current)]
        return [problem for problem in problems if problem is not None]

    def _load(self, run: LoadedRun, folder: Path) -> str | None:
        before = self._current[run]
        version = before.served.copilot_version
        try:
            export = find_export(folder)
            if copilot_version(export) == version:
                return None
            after = run.load_copilot(export)
        except (ServingError, OSError, ValueError) as error:
            logger.error("%s: the Copilot in %s is not used, %s goes on serving: %s", run.name, folder, version, error)
            return str(error)
        self._registry.replace(after.served)
        self._current[run] = after
        logger.info(
            "%s: Copilot %s from %s replaces %s (loaded in %.1f s)",
            run.name,
            after.served.copilot_version,
            export,
            version,
            after.seconds,
        )
        threading.Thread(target=self._retire, args=(run, before), name="copilot-retire", daemon=True).start()
        return None

    def _retire(self, run: LoadedRun, before: LoadedCopilot) -> None:
        time.sleep(RETIRE_AFTER_S)
        before.served.engine.close(drain_s=self._drain_s)
        run.release(before.model)
