"""The Pilot's Ray Train job: a TorchTrainer whose workers run `pilot.loop`.

Ray Train restarts the worker group when one dies; where to go on from is found by the workers in the run folder, whose
checkpoints are complete or absent. Ray Train's own checkpoint book-keeping is not used: `report` is a barrier of about
two seconds, and its snapshot file is written in place (facts measured on ray 2.60).
"""

from __future__ import annotations

import time
from typing import Any

from tc_ray.pilot.loop import PilotJob, train_worker


class PilotError(RuntimeError):
    """The Pilot failed more often than `pilot.max_failures` allows, or could not start."""


def fit_pilot(job: PilotJob) -> None:
    """Run the Pilot to its last round; blocks. The worker group is restarted up to `pilot.max_failures` times.

    Raises:
        PilotError: with the first worker's error as cause.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = job.config.resources
    per_worker: dict[str, float] = {"CPU": resources.pilot_cpus}
    if resources.gpus:
        per_worker["GPU"] = 1.0
    settings: dict[str, Any] = {"job": job}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.pilot_workers, use_gpu=resources.gpus, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            # a name of its own for each start: nothing is ever restored from Ray Train's snapshot
            name=f"start-{int(time.time() * 1000)}",
            storage_path=str(job.config.run.path / "pilot" / "ray_train"),
            failure_config=FailureConfig(max_failures=job.config.pilot.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise PilotError(f"the Pilot stopped: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = next(iter(sorted(failures.items())))
        cause = getattr(first, "cause", None) or first
        lines = [line for line in str(cause).strip().splitlines() if line.strip()]
        return f"worker {rank}: {type(cause).__name__}: {lines[-1] if lines else ''}"
    return f"{type(error).__name__}: {error}"
