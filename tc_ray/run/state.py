"""What the phases of one run share, and when a run may resume a folder.

Each phase reads what earlier ones left in `Run` and adds its own. Used by `run.job`, its phases and `run.plan`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.config.fields import config_fields, public_values
from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location

if TYPE_CHECKING:
    from tc_ray.copilot.group import CopilotGroup
    from tc_ray.data.prepared.folder import PreparedData
    from tc_ray.evaluation.report import Report


class JobError(RuntimeError):
    """The run cannot start or resume; the message says why and what to do."""


@dataclass(frozen=True)
class Prepared:
    """Checked models and rows. inputs: hashes of rows and base weights. rounds: optimizer steps of the Pilot."""

    pilot_path: Path | str
    base_path: Path | str
    tokenizer: Any
    model_config: Any
    data: PreparedData
    inputs: dict[str, str]
    rounds: int


@dataclass
class Run:
    """One run while it lasts. A field that is None has not been reached, or the run has no such part."""

    config: RunConfig
    folder: Path
    log: Location
    lease: RunLease | None = None
    prepared: Prepared = field(init=False)
    ledger: Any = None
    tracker: Any = None
    copilot: CopilotGroup | None = None
    no_copilot: str | None = None
    """Why the Copilot failed for good; the run then continues with the Pilot alone."""
    last_round: int = 0
    """Of the Pilot, once it has ended; it may end before the planned one."""
    report: Report | None = None
    export: Path | None = None
    began: float = field(default_factory=time.time)
    """Unix time of this start."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds by part that the Tracker has not been sent yet."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Report the seconds of the block as those of `part`: at its end, or once the run has a Tracker."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.times[part] = self.times.get(part, 0.0) + time.monotonic() - began
            if self.tracker is not None:
                self.tracker.spent.remote(self.times)
                self.times = {}

    def check_lease(self) -> None:
        """Raises LeaseLostError if another process has taken the log over: this run may not touch it any more."""
        if self.lease is not None:
            self.lease.check()

    @property
    def copilot_steps(self) -> int:
        """Steps that the Copilot takes in the whole run."""
        return self.prepared.rounds * self.config.copilot.steps_per_round


def check_resume(config: RunConfig, folder: Path) -> None:
    """Refuse to resume a folder whose run had other settings. Raises JobError that lists the fields.

    Fields that may differ are marked in the schema (`config.section.MayChange`).
    """
    saved = folder / "config.yaml"
    if not saved.is_file():
        return
    earlier, now = public_values(load_saved_config(saved)), public_values(config)
    changed = [
        f"{name}: {earlier[name]!r} -> {now[name]!r}"
        for name in (known.path for known in config_fields().values() if not known.may_change)
        if earlier[name] != now[name]
    ]
    if changed:
        raise JobError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:5])}). "
            "Use another run.folder, or the same settings to resume it."
        )
