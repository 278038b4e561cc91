"""The Pilot's Ray Train job: a TorchTrainer whose workers run `pilot.loop`, started anew when a worker dies.

Invariant: each start is a Ray Train run of its own that never retries: restarts are counted here, and an error that would come again
(`failures.is_final`) ends the Pilot at once. Workers resume by the run folder. Ray Train's own book-keeping of checkpoints is not
used: `report` is a barrier of about two seconds, and its snapshot file is written in place (ray 2.60). How many workers a start has
is chosen here too (`room`): Ray Train's elastic policy takes all of a node's CPUs for free. Called by `tc_ray.run.job`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from tc_ray.cluster.capacity import Need
from tc_ray.cluster.failures import first_final, is_final, short
from tc_ray.pilot.loop import PilotJob, train_worker
from tc_ray.pilot.room import Growth, MoreRoomError, room_for

NO_ROOM = "WorkerGroupStartupTimeoutError"
"""Ray Train's error when workers found no free node within a minute: no failure, they keep waiting."""


class PilotError(RuntimeError):
    """The Pilot failed more often than `pilot.max_failures` allows, or in a way that a new start would repeat."""


def fit_pilot(job: PilotJob, need: Need) -> None:
    """Run the Pilot to its last round on workers of `need`, or on fewer (`resources.pilot_min_workers`); blocks.

    Raises PilotError, with Ray Train's error as cause.
    """
    from ray.train import TrainingFailedError

    failed = 0
    while True:
        job.tracker.waiting.remote("pilot", need.starting())
        count = room_for(job, need)
        growth = Growth(job, need, count)
        try:
            _fit(replace(job, config=job.config.with_pilot_workers(count)), replace(need, count=count), growth)
        except MoreRoomError:
            continue
        except TrainingFailedError as error:
            who, first = _first(error)
            if type(first).__name__ == NO_ROOM:
                continue
            if failed >= job.config.pilot.max_failures or is_final(first):
                raise PilotError(f"the Pilot stopped: {who}{short(first)}") from error
            failed += 1
            job.tracker.event.remote("restart", f"Pilot workers, after {who}{short(first)}")
        else:
            return


def _fit(job: PilotJob, need: Need, growth: Growth) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        """Leaves SIGINT to the driver: Ray Train's own handler ends the process with code 0 and its status untouched."""

        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = growth.controller = controller

    resources = job.config.resources
    trainer = Trainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if resources.pilot_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=need.count,
            use_gpu=resources.pilot_gpus > 0,
            resources_per_worker=dict(need.bundle),
            placement_strategy=resources.placement.upper(),
        ),
        run_config=RunConfig(
            # a name of its own for each start: nothing is ever restored from Ray Train's snapshot
            name=f"start-{int(time.time() * 1000)}",
            storage_path=str(job.config.run.path / "pilot" / "ray_train"),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        with growth:
            trainer.fit()
    except BaseException as error:
        if growth.ended and isinstance(error, Exception):
            raise MoreRoomError from error
        if trainer.controller is not None and not isinstance(error, TrainingFailedError):
            import ray  # the driver is stopped, and a Ray that outlives it would keep the workers

            ray.kill(trainer.controller)
        raise


def _first(error: Exception) -> tuple[str, Exception]:
    """Which worker failed first ("" for the controller), and its error."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return "", getattr(error, "controller_failure", error)
    rank, first = first_final(failures)
    return f"worker {rank}: ", first
