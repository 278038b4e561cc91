"""The Ray Serve application: replicas of one deployment, each a whole server of all models.

Invariant: the engines' queues are the bound that clients meet (429), so Serve lets many more requests through to a replica
than it has places; and a replica that is replaced is given time for the longest request. Called by launch.py and
jobs/serve_app.py.
"""

from __future__ import annotations

from typing import Any

from tc_ray.serving.settings import ReplicaSettings, Scale

DEPLOYMENT = "FusedModel"
HEALTH_PERIOD_S = 10.0
HEALTH_TIMEOUT_S = 60.0
"""Of one check. Its token waits for its turn among prompts, on a machine that may be busy with a rolling update."""
_ROOM = 4
"""Requests that Serve lets through, for each that an engine takes in: so many clients at once are answered with 429 by a
replica, which is quick; what is more waits in the proxy."""
_AUTOSCALE_AT = 0.75
"""Share of an engine's places that are in use on average when a replica is added."""


def build_application(settings: ReplicaSettings, scale: Scale | None = None) -> Any:
    """The Ray Serve application for `serve.run`, or for a Serve config file. Loads nothing here."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    scale = scale or Scale()

    def build() -> Any:
        from tc_ray.serving.deploy.replica import build_app

        return build_app(settings)

    places = len(settings.models) * (settings.engine.max_running + settings.engine.max_waiting)
    through = _ROOM * places + 64
    options: dict[str, Any] = {"num_replicas": scale.min_replicas}
    if scale.max_replicas > scale.min_replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": scale.min_replicas,
                "max_replicas": scale.max_replicas,
                "target_ongoing_requests": max(1.0, _AUTOSCALE_AT * settings.engine.max_running),
            }
        }

    @serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=through,
        # While no replica is there (the only one is being replaced) requests wait; so many a proxy.
        max_queued_requests=through,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_constructor_retry_count=1,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_s,
        ray_actor_options={"num_cpus": settings.threads or 1, "num_gpus": 1 if settings.gpu else 0},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        **options,
    )
    @serve.ingress(build)
    class FusedReplica:
        """A replica; Serve replaces it when the check fails."""

        async def check_health(self) -> None:
            """Raise when an engine does not generate a token."""
            reason = await self.app.state.replica.unhealthy()  # type: ignore[attr-defined]
            if reason:
                raise RuntimeError(reason)

        async def reconfigure(self, user_config: Any) -> None:
            """Take a changed user_config."""
            import asyncio

            await asyncio.to_thread(self.app.state.replica.configure, user_config)  # type: ignore[attr-defined]

    return FusedReplica.bind()  # type: ignore[attr-defined]
