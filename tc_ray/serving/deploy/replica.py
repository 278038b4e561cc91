"""What runs in a replica's process: models, engines, the app over them, and the swap of Copilots.

Invariant: a replica answers only when every model has generated a token. The tests use `Replica` without Serve as well.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from fastapi import FastAPI
from transformers.utils.logging import disable_progress_bar

from tc_ray.export.check import copilot_version, find_export
from tc_ray.serving.deploy.settings import ReplicaSettings
from tc_ray.serving.engine.engine import Turns
from tc_ray.serving.http.app import create_app
from tc_ray.serving.models.registry import LoadedRun, ModelRegistry
from tc_ray.serving.wire import prepare_process

logger = logging.getLogger("tc_ray.serving")


class Replica:
    """The models of a server, loaded. Raises ServingError where one cannot be loaded."""

    def __init__(self, settings: ReplicaSettings) -> None:
        disable_progress_bar()  # Serve copies a replica's output to the user's terminal
        torch.set_num_threads(settings.serving.threads or 1)
        prepare_process()
        turns = Turns()
        self._drain_s = settings.serving.drain_time_s
        self._runs: list[LoadedRun] = []
        self.registry = ModelRegistry()
        for name, export in settings.models.items():
            begun = time.monotonic()
            run = LoadedRun(name, export, settings.serving, turns)
            served = run.load_copilot(export)
            self._runs.append(run)
            self.registry.replace(served)
            logger.info("%s: loaded in %.1f s, Copilot %s", name, time.monotonic() - begun, served.copilot_version)
        self._swaps = ThreadPoolExecutor(1, thread_name_prefix="copilot-swap")

    def reload(self) -> None:
        """Read the exports' Copilots again in the background, and serve those that have changed.

        Requests in progress end with the Copilot that they began with. One that cannot be used is reported in one log line
        and changes nothing.
        """
        for run in self._runs:
            self._swaps.submit(self._reload, run)

    def _reload(self, run: LoadedRun) -> None:
        begun, before = time.monotonic(), self.registry.find(run.name)
        version = before.copilot_version
        try:
            if copilot_version(find_export(run.export)) == version:
                return
            after = run.load_copilot(run.export)
        except Exception as error:  # noqa: BLE001 - of strangers' files
            logger.error(
                "%s: the Copilot in %s is not used, %s goes on serving: %s", run.name, run.export, version, error
            )
            return
        self.registry.replace(after)
        seconds, newer = time.monotonic() - begun, after.copilot_version
        logger.info("%s: Copilot %s replaces %s (loaded in %.1f s)", run.name, newer, version, seconds)
        # A request that looked it up before is refused by the closing engine, and looks it up again (http/routes.py).
        retire = threading.Thread(
            target=run.release, args=(before.engine, self._drain_s), name="copilot-retire", daemon=True
        )
        retire.start()


def build_app(settings: ReplicaSettings) -> FastAPI:
    """Load the models and return the app of a replica within Ray Serve; `app.state.replica` is the Replica.

    Raises ServingError.
    """
    log_to_stderr()
    replica = Replica(settings)
    app = create_app(replica.registry, settings.serving, settings.key_digests)
    app.state.replica = replica
    app.state.reporting = asyncio.create_task(app.state.metrics.run(replica.registry))
    return app


def log_to_stderr() -> None:
    """Show this package's log lines from level INFO on. They never hold prompts."""
    package = logging.getLogger("tc_ray")
    if not package.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
