"""What runs in a replica's process: models, engines, the app over them, and the swap of Copilots.

Invariant: a replica answers only when every model has generated a token. Called by deployment.py; the tests use `Replica`
without Serve as well.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI
from transformers.utils.logging import disable_progress_bar

from tc_ray.export.check import ExportError
from tc_ray.serving.deploy.settings import ReplicaSettings
from tc_ray.serving.engine.engine import Turns
from tc_ray.serving.errors import ServingError
from tc_ray.serving.http.app import create_app
from tc_ray.serving.latency import prepare_process
from tc_ray.serving.models.loading import LoadedRun
from tc_ray.serving.models.registry import ModelRegistry
from tc_ray.serving.models.swap import load_copilots, read_user_config

logger = logging.getLogger("tc_ray.serving")


class Replica:
    """The models of a server, loaded. Raises ServingError where one cannot be loaded."""

    def __init__(self, settings: ReplicaSettings) -> None:
        disable_progress_bar()  # Serve copies a replica's output to the user's terminal
        torch.set_num_threads(settings.serving.threads or 1)
        prepare_process()
        turns = Turns()
        runs: list[LoadedRun] = []
        self.registry = ModelRegistry()
        for name, export in settings.models.items():
            begun = time.monotonic()
            run = LoadedRun(name, export, settings.serving, turns)
            served = run.load_copilot(export)
            runs.append(run)
            self.registry.replace(served)
            logger.info("%s: loaded in %.1f s, Copilot %s", name, time.monotonic() - begun, served.copilot_version)
        self._load = partial(load_copilots, self.registry, runs, drain_s=settings.serving.drain_time_s)
        self._names = set(settings.models)
        self._swaps = ThreadPoolExecutor(1, thread_name_prefix="copilot-swap")
        self._serving = False

    def configure(self, user_config: Any) -> None:
        """Serve's user_config: which folders the Copilots come from.

        At the start the Copilots are loaded before the replica answers, and a problem raises ServingError, so that Serve
        reports a failed deployment. Later they are loaded in the background, and a problem is logged: an error would make
        Serve end a replica that serves well.
        """
        if not self._serving:
            for problem in self._load(read_user_config(user_config, self._names)):
                raise ServingError(problem)
            return
        try:
            self._swaps.submit(self._load, read_user_config(user_config, self._names))
        except (ServingError, ExportError) as error:
            logger.error("the new user_config is not used: %s", error)

    async def unhealthy(self) -> str | None:
        """What is wrong with the engines. None: nothing, and the replica serves from now on."""
        reason = await self.registry.unhealthy()
        self._serving = self._serving or reason is None
        return reason


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
