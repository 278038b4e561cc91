"""The asynchronous part of a run: Pilot and Copilot train at the same time and meet only in the Mistake Log.

`start_copilot` returns at once: a thread of the driver keeps the learners alive, which read the log's committed rounds.
`train_pilot` blocks until the Pilot has its last round. `finish_copilot` waits for the steps that are still due. The Copilot
starts first because it reserves its CPUs in a placement group, while Ray Train takes what is left. Called by `run.job`.
"""

from __future__ import annotations

from tc_ray.cluster.session import copilot_need, pilot_need
from tc_ray.files import is_whole
from tc_ray.run.state import Run


def start_copilot(run: Run) -> None:
    """Leaves `run.copilot`, the group of learners, working in the background."""
    from tc_ray.copilot.group import CopilotGroup
    from tc_ray.copilot.worker import CopilotJob

    need, made = copilot_need(run.config), run.prepared
    assert need is not None, "a run with a log has a Copilot"
    job = CopilotJob(run.config, made.pilot_path, made.base_path, made.rounds, run.ledger, run.tracker, made.inputs)
    run.copilot = CopilotGroup(job, need)
    run.copilot.start()


def copilot_is_done(run: Run) -> bool:
    """There is no Copilot, or an earlier start finished it; the Ledger is informed, so that it may retire rounds."""
    if run.ledger is None:
        return True
    if not is_whole(run.folder / "copilot" / "final"):
        return False
    rounds = _pilot_end(run) or run.prepared.rounds
    run.ledger.report_copilot.remote(rounds, rounds * run.config.copilot.steps_per_round)
    return True


def train_pilot(run: Run) -> None:
    """Leaves `pilot/final`, and every round of the run in the log."""
    from tc_ray.pilot.loop import PilotJob
    from tc_ray.pilot.trainer import fit_pilot

    made = run.prepared
    job = PilotJob(
        run.config, made.pilot_path, made.data.file("train"), made.rounds, run.ledger, run.tracker, made.inputs
    )
    fit_pilot(job, pilot_need(run.config))
    run.last_round = _pilot_end(run)


def pilot_is_done(run: Run) -> bool:
    """`pilot/final` is whole and, where there is a log, the Ledger has all of its rounds."""
    if not is_whole(run.folder / "pilot" / "final"):
        return False
    run.last_round = _pilot_end(run)
    return run.ledger is None or run.last_round > 0


def _pilot_end(run: Run) -> int:
    """The Pilot's last round, as the Ledger knows it; 0 before its end, and without a log."""
    import ray

    return 0 if run.ledger is None else int(ray.get(run.ledger.state.remote()).last_round)


def finish_copilot(run: Run) -> None:
    """Leaves `copilot/final` or, if the Copilot failed for good, the reason in `run.no_copilot`; gives its CPUs back."""
    from tc_ray.copilot.group import CopilotError

    assert run.copilot is not None
    try:
        run.copilot.wait()
    except CopilotError as error:
        run.check_lease()
        run.no_copilot = str(error)
    run.copilot.stop()
