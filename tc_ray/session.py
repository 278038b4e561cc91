"""The Ray session of a run: joins the cluster that RAY_ADDRESS names, else starts a local one and ends it.

Invariant: a cluster that was there before is left running; a local one is stopped however the run ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tc_ray.config.schema import RunConfig


def cpus_needed(config: RunConfig) -> float:
    """Ray CPUs that the run's processes ask for together."""
    r = config.resources
    copilot = r.copilot_workers * r.copilot_cpus if config.log.enabled else 0
    return r.pilot_workers * r.pilot_cpus + copilot


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """Within it Ray is up. A local Ray gets at least the CPUs the run asks for, even if the machine has fewer cores."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # workers report errors through their results; their prints stay in Ray's session folder
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        cores = os.cpu_count() or 1
        count = max(cores, int(-(-cpus_needed(config) // 1)))
        if count > cores:
            print(
                f"ray: the run asks for {count} CPUs, this machine has {cores}: processes will share cores", flush=True
            )
        ray.init(address="local", num_cpus=count, log_to_driver=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()
