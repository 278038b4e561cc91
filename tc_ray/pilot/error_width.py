"""`log.top_k: auto`: how many errors a token the log keeps, chosen from the run's first rounds.

In rounds 1 to R the Pilot lists the `log.top_k_limit` largest errors of every target token and adds up how much of the sum
of |l| the first k of them hold. k is the smallest that holds `log.top_k_captured` of it, over all ranks. Invariant: R and what is
measured are pure functions of config and weights, and rounds up to R are always measured and cut afterwards, whatever is
known already: a restarted run writes the same rows. Used by `recorder`.
"""

from __future__ import annotations

import torch

from tc_ray.config.schema import RunConfig
from tc_ray.models.errors import SparseErrors


def measured_rounds(config: RunConfig, rounds: int) -> int:
    """R: rounds that k is measured over; 0 where it is given, or errors are dense.

    At most `log.top_k_rounds`; fewer when the log must be complete earlier (a checkpoint, the end of the run, or the Copilot
    in lock-step), or when the records held back would not fit into the writer's queue at once.

    Args:
        rounds: of the whole run.
    """
    log = config.log
    if not log.enabled or log.top_k != "auto" or log.error == "dense":
        return 0
    due = 1 if config.copilot.schedule == "lockstep" else min(config.pilot.checkpoint_every_rounds, rounds)
    return min(log.top_k_rounds, due, log.queue_rounds)


class ErrorCurve:
    """How much of the sum of |l| the first k errors hold, added up on the device that computes them.

    Args:
        top_k: errors listed a token besides the true one: the largest k that can be chosen.
    """

    def __init__(self, top_k: int, device: torch.device) -> None:
        # 1 - p(true), then the listed probabilities, largest first
        self.sums = torch.zeros(top_k + 1, dtype=torch.float64, device=device)

    def add(self, errors: SparseErrors) -> None:
        """Take the errors of one micro-batch; waits for nothing."""
        self.sums += errors.values.abs().sum(0, dtype=torch.float64)

    def add_over_ranks(self) -> None:
        """Add up the curves of all ranks (collective)."""
        torch.distributed.all_reduce(self.sums)

    def smallest(self, captured: float) -> int:
        """Smallest k whose errors hold `captured` of the sum of |l|; all that are listed where none does."""
        enough = (self._held() >= captured * self._total()).nonzero()
        return int(enough[0]) + 1 if len(enough) else len(self.sums) - 1

    def captured(self, top_k: int) -> float:
        """Share of the sum of |l| that the true token and the first `top_k` others hold; 1 where there is no error."""
        total = self._total()
        return min(1.0, float(self._held()[top_k - 1]) / total) if total else 1.0

    def _held(self) -> torch.Tensor:
        return self.sums.cumsum(0)[1:]

    def _total(self) -> float:
        """|l| of a token sums to 2 (1 - p(true)): what the true token lacks, the others have."""
        return 2.0 * float(self.sums[0])


def told(top_k: int, captured: float, asked: float, rounds: int, limit: int) -> str:
    """The choice in a sentence, for people; captured and asked: shares of the sum of |l|. limit: `log.top_k_limit`."""
    share = f"{100 * captured:.2f}%" if captured < 0.9999 else f"{100 * captured:.6g}%"
    text = f"the log keeps the {top_k} largest errors a token: {share} of |l| in rounds 1 to {rounds}"
    if captured < asked:
        text += f", less than the {100 * asked:g}% of log.top_k_captured"
        if top_k == limit:
            text += f": log.top_k_limit is {limit}; a higher one, or log.error=dense, keeps more"
    return text
