"""What the validations of a run have found: the round with the lowest NLL, and whether the Pilot ends early.

Invariant: what is known up to a round stands in its checkpoint, so a resumed run ends where it would have ended. Pure, without
torch: the driver reads checkpoints. Used by `loop` and `checkpoint`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tc_ray.config.training import PilotSection


@dataclass(frozen=True)
class Validated:
    """All validations so far. round: the last one's; nll: its mean over target tokens, in nats, None if it was not finite.
    lowest: of all, in round `best`; None and 0 before the first. waited: validations since then."""

    round: int = 0
    nll: float | None = None
    lowest: float | None = None
    best: int = 0
    waited: int = 0

    def then(self, round_number: int, nll: float) -> Validated:
        """After one more. An NLL that is not finite is no lower one."""
        now = replace(self, round=round_number, nll=nll if math.isfinite(nll) else None)
        if now.nll is not None and (self.lowest is None or now.nll < self.lowest):
            return replace(now, lowest=now.nll, best=round_number, waited=0)
        return replace(now, waited=self.waited + 1)

    def ended(self, settings: PilotSection) -> bool:
        """Whether the Pilot ends: `pilot.patience` validations found no lower NLL."""
        return settings.patience is not None and self.waited >= settings.patience

    def metrics(self, settings: PilotSection) -> dict[str, float | None]:
        """For the Tracker."""
        return {
            "nll": self.nll,
            "lowest": self.lowest,
            "best_round": float(self.best),
            "waited": float(self.waited),
            "ended": float(self.ended(settings)),
        }
