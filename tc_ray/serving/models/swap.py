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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tc_ray.export.check import copilot_version
from tc_ray.serving.errors import ServingError
from tc_ray.serving.models.exports import find_export
from tc_ray.serving.models.loading import LoadedRun
from tc_ray.serving.models.registry import ModelRegistry

logger = logging.getLogger("tc_ray.serving")


def read_user_config(user_config: Any, names: set[str]) -> dict[str, Path]:
    """Model name -> export folder of its Copilot, from `user_config: {copilots: {NAME: FOLDER}, reload: ANYTHING}`.

    Raises ServingError for any other key and a name that is not served, and as `find_export`.
    """
    if not isinstance(user_config, Mapping) or set(user_config) - {"copilots", "reload"}:
        raise ServingError("user_config may hold `copilots`, a mapping of model names to export folders, and `reload`")
    copilots = user_config.get("copilots") or {}
    if not isinstance(copilots, Mapping) or set(copilots) - names:
        raise ServingError(
            f"user_config.copilots must map names of served models ({', '.join(sorted(names))}) to folders"
        )
    return {name: find_export(str(folder)) for name, folder in copilots.items()}


def load_copilots(
    registry: ModelRegistry, runs: Sequence[LoadedRun], folders: Mapping[str, Path], drain_s: float
) -> list[str]:
    """Serve the Copilots in these export folders, and of all other models those in their own.

    What is served already, by content, stays. Called from one thread at a time.

    Args:
        runs: of all models of the registry. drain_s: how long requests of a replaced Copilot may go on.

    Returns a line per Copilot that cannot be used.
    """
    problems = []
    for run in runs:
        begun, folder, before = time.monotonic(), folders.get(run.name, run.export), registry.find(run.name)
        version = before.copilot_version
        try:
            export = find_export(folder)
            if copilot_version(export) == version:
                continue
            after = run.load_copilot(export)
        except (ServingError, OSError, ValueError) as error:
            logger.error("%s: the Copilot in %s is not used, %s goes on serving: %s", run.name, folder, version, error)
            problems.append(str(error))
            continue
        registry.replace(after)
        seconds, newer = time.monotonic() - begun, after.copilot_version
        logger.info("%s: Copilot %s from %s replaces %s (loaded in %.1f s)", run.name, newer, export, version, seconds)
        # A request that looked it up before is refused by the closing engine, and looks it up again (http/routes.py).
        threading.Thread(target=run.release, args=(before.engine, drain_s), name="copilot-retire", daemon=True).start()
    return problems
