"""What the phases of one run share. Each phase reads what earlier ones left here and adds its own. Used by `run.job`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location

if TYPE_CHECKING:
    from tc_ray.copilot.group import CopilotGroup
    from tc_ray.data.prepared.folder import PreparedData
    from tc_ray.evaluation.report import Report


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
    report: Report | None = None
    export: Path | None = None

    def check_lease(self) -> None:
        """Raises LeaseLostError if another process has taken the log over: this run may not touch it any more."""
        if self.lease is not None:
            self.lease.check()

    @property
    def copilot_steps(self) -> int:
        """Steps that the Copilot takes in the whole run."""
        return self.prepared.rounds * self.config.copilot.steps_per_round
