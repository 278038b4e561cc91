"""The Ray Serve application: replicas of one deployment, each a whole server of all models.

Invariant: clients meet the bound of the engines' queues (429), so Serve lets many more requests through to a replica than
it has places; and a replica that is replaced has time for the longest request. `launch.py` calls `build_application`; a Serve
config file names `build` as its `import_path` (cluster/serve.yaml).
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.schema import LoggingConfig

from tc_ray.export.check import check_tokenizer
from tc_ray.serving.deploy.settings import ReplicaSettings, application_settings

DEPLOYMENT = "FusedModel"
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
HEALTH_PERIOD_S = 10.0
HEALTH_TIMEOUT_S = 60.0
"""Of one check. Its token waits for its turn among prompts, on a machine that may be busy with a rolling update."""
_THROUGH = 4
"""Requests that Serve lets through per place of the engines. A replica answers so many clients at once with 429, which is
quick; more wait in Serve's proxy."""
_AUTOSCALE_AT = 0.75
"""Share of an engine's places that are in use on average when a replica is added."""


def build(args: dict[str, Any]) -> Any:
    """The application of a Serve config file.

    args: `runs`, a list of run folders, exports or NAME=FOLDER; `config`, a file whose `serving` section counts instead of
    the run's own; and fields of the section (docs/config.md). The cluster can be reached from elsewhere, so an API key is
    needed (TC_RAY_API_KEY, or `key_file`), or `allow_open: true`. Raises as `command_settings`.
    """
    settings = application_settings(args)
    for export in settings.models.values():
        check_tokenizer(export)
    return build_application(settings)


def build_application(
    settings: ReplicaSettings, user_config: dict[str, Any] | None = None, *, version: str = "1"
) -> Any:
    """The Ray Serve application for `serve.run`. Loads nothing here.

    version: Serve replaces the replicas where it changes; where only user_config changes, it calls their `reconfigure`.
    """
    serving = settings.serving

    def build_app() -> Any:
        from tc_ray.serving.deploy.replica import build_app

        return build_app(settings)

    places = len(settings.models) * (serving.max_running + serving.max_waiting)
    options: dict[str, Any] = {"num_replicas": serving.replicas}
    if serving.most_replicas > serving.replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": serving.replicas,
                "max_replicas": serving.most_replicas,
                "target_ongoing_requests": max(1.0, _AUTOSCALE_AT * serving.max_running),
            }
        }

    @serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=_THROUGH * places + 64,
        # Requests wait in a proxy while no replica is there, as when the only one is being replaced.
        max_queued_requests=_THROUGH * places + 64,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_constructor_retry_count=1,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=serving.drain_time_s,
        ray_actor_options={"num_cpus": serving.threads or 1, "num_gpus": 1 if serving.gpu else 0},
        logging_config=QUIET,
        user_config=user_config,
        **options,
    )
    @serve.ingress(build_app)
    class FusedReplica:
        """A replica; Serve replaces it when the check fails."""

        async def check_health(self) -> None:
            """Raise when an engine does not generate a token."""
            reason = await self.app.state.registry.unhealthy()  # type: ignore[attr-defined]
            if reason:
                raise RuntimeError(reason)

        async def reconfigure(self, _: Any) -> None:
            """Take up Copilots that have changed: the user_config has."""
            self.app.state.replica.reload()  # type: ignore[attr-defined]

    # Without a version Serve draws one, and every `serve.run` would replace the replicas.
    return FusedReplica.options(version=version, _internal=True).bind()  # type: ignore[attr-defined]
