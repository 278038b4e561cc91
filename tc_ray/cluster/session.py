"""The Ray session of a run: joins the cluster that RAY_ADDRESS names, else starts a local one and ends it.

Invariant: a cluster that was joined is left running; a local one is stopped however the run ends. A cluster that can never hold
the run is refused before anything is started in it. Called by `run.job` and `run.evaluate`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tc_ray.cluster.address import check_address
from tc_ray.cluster.capacity import SAY_SECONDS, Need, amounts, check_capacity, total
from tc_ray.cluster.signals import Stopped, take_signals
from tc_ray.config.schema import RunConfig
from tc_ray.text import visible


def pilot_need(config: RunConfig) -> Need:
    """Resources of the Pilot's workers."""
    return _need(config, "pilot", "Pilot worker")


def copilot_need(config: RunConfig) -> Need | None:
    """Resources of the Copilot's learners; None: there are none."""
    return _need(config, "copilot", "Copilot learner") if config.log.enabled else None


def evaluation_need(config: RunConfig) -> Need:
    """Resources of one evaluation worker. They start when training has released its own, as many as the cluster has room for."""
    of_training = pilot_need(config)
    return Need("evaluation worker", 1, of_training.bundle, of_training.settings[1:])


def training_needs(config: RunConfig) -> list[Need]:
    """What runs at the same time in training."""
    return [need for need in (pilot_need(config), copilot_need(config)) if need is not None]


def _need(config: RunConfig, who: str, process: str) -> Need:
    count, cpus, gpus, custom = (
        getattr(config.resources, f"{who}_{of}") for of in ("workers", "cpus", "gpus", "resources")
    )
    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {}) | custom
    used = ["workers", "cpus", *(["gpus"] if gpus else []), *(["resources"] if custom else [])]
    return Need(process, count, bundle, tuple(f"resources.{who}_{of}" for of in used))


def cpus_needed(config: RunConfig) -> float:
    """Ray CPUs that the run's processes ask for together."""
    return total(training_needs(config))["CPU"]


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """Ray runs inside it. A local Ray gets at least the CPUs that the run asks for, even if the machine has fewer cores."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        # workers report errors through their results; their prints stay in Ray's session folder
        if address:
            check_address(address)
            ray.init(address=address, log_to_driver=False)
        else:
            cores = os.cpu_count() or 1
            count = max(cores, int(-(-cpus_needed(config) // 1)))
            if count > cores:
                text = f"ray: the run asks for {count} CPUs, this machine has {cores}: processes will share cores"
                print(visible(text), flush=True)
            ray.init(address="local", num_cpus=count, log_to_driver=False, logging_level="warning")
        take_signals()  # Ray has set its own handlers
        yield
    except SystemExit as end:
        if end.code == signal.SIGTERM:  # while it starts, Ray itself handles the signal: it exits with its number
            raise Stopped(signal.SIGTERM) from None
        raise
    finally:
        ray.shutdown()


def check_room(config: RunConfig) -> None:
    """Refuse a cluster that can never hold the run (CapacityError), then wait until it has a CPU to read the data with."""
    import ray

    alone = [Need("task that prepares data", 1, {"CPU": 1.0}, ())]
    pilot, *copilot = training_needs(config)
    least = replace(pilot, count=config.resources.pilot_min_workers or pilot.count)
    check_capacity([least, *copilot], alone + ([evaluation_need(config)] if config.log.enabled else []))
    first = ray.remote(num_cpus=1)(lambda: None).remote()  # while it is pending, an autoscaler adds nodes
    while not ray.wait([first], timeout=SAY_SECONDS)[0]:
        free = amounts(ray.available_resources())
        text = f"ray: waiting for 1 CPU to prepare the data; free now: {free} (Ctrl-C ends the wait)"
        print(visible(text), flush=True)
