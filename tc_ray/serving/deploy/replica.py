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
from typing import TYPE_CHECKING, Any

from tc_ray.serving.errors import ServingError
from tc_ray.serving.latency import prepare_process
from tc_ray.serving.models.loading import LoadedCopilot, LoadedRun
from tc_ray.serving.models.swap import CopilotSwap, read_user_config
from tc_ray.serving.settings import ReplicaSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger("tc_ray.serving")


class Replica:
    """The models of a server, loaded. Raises ServingError where one cannot be loaded."""

    def __init__(self, settings: ReplicaSettings) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from tc_ray.serving.engine import Turns
        from tc_ray.serving.models.registry import ModelRegistry

        disable_progress_bar()  # Serve copies a replica's output to the user's terminal
        torch.set_num_threads(settings.serving.threads or 1)
        prepare_process()
        turns = Turns()
        loaded: dict[LoadedRun, LoadedCopilot] = {}
        for name, export in settings.models.items():
            begun = time.monotonic()
            run = LoadedRun(name, export, settings.serving, turns)
            loaded[run] = run.load_copilot(export)
            version = loaded[run].served.copilot_version
            logger.info("%s: loaded in %.1f s, Copilot %s", name, time.monotonic() - begun, version)
        self.registry = ModelRegistry([copilot.served for copilot in loaded.values()])
        self._swap = CopilotSwap(self.registry, loaded, drain_s=settings.serving.drain_time_s)
        self._swaps = ThreadPoolExecutor(1, thread_name_prefix="copilot-swap")
        self._serving = False

    def configure(self, user_config: Any) -> None:
        """Serve's user_config: which folders the Copilots come from.

        At the start the Copilots are loaded before the replica answers, and a problem raises ServingError, so that Serve
        reports a failed deployment. Later they are loaded in the background, and a problem is logged: an error would make
        Serve end a replica that serves well.
        """
        if not self._serving:
            for problem in self._swap.load(read_user_config(user_config, self._swap.names)):
                raise ServingError(problem)
            return
        try:
            self._swaps.submit(self._swap.load, read_user_config(user_config, self._swap.names))
        except ServingError as error:
            logger.error("the new user_config is not used: %s", error)

    async def unhealthy(self) -> str | None:
        """What is wrong with the first engine that does not generate. None: nothing, and the replica serves from now on."""
        for served in self.registry:
            reason = await asyncio.to_thread(served.engine.unhealthy)
            # An engine that was replaced meanwhile is stopped, and that is no fault.
            if reason and self.registry.find(served.name) is served:
                return f"{served.name}: {reason}"
        self._serving = True
        return None


def build_app(settings: ReplicaSettings) -> FastAPI:
    """Load the models and return the app of a replica within Ray Serve; `app.state.replica` is the Replica.

    Raises ServingError.
    """
    from tc_ray.serving.http.app import create_app

    log_to_stderr()
    replica = Replica(settings)
    app = create_app(replica.registry, settings)
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
