"""`log.top_k: auto`: how many errors a token the log keeps, chosen from the run's first rounds.

In rounds 1 to R the Pilot lists the `log.top_k_limit` largest errors of every target token and adds up how much of |l| the
first k of them hold. k is the smallest that holds `log.top_k_captured` of it, over all ranks. |l| is the norm of a token's
error vector l, of order `log.top_k_norm`; 2, the Euclidean one, is that of the Copilot's loss (equation 7).
Invariant: R and what is
measured are pure functions of config and weights, and rounds up to R are always measured and cut afterwards, whatever is
known already: a restarted run writes the same rows. Used by `recorder`.
"""

from __future__ import annotations

import torch

from tc_ray.config.log import LogSection
from tc_ray.config.schema import RunConfig
from tc_ray.models.pilot.token_errors import SparseErrors


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
    """How much of |l| the first k errors hold, in both norms, added up on the device that computes them.

    What is not listed is known by its sum alone. Its squares sum to at most that times the smallest error listed, and are
    taken for that much: the share told of the Euclidean norm is never more than the true one.

    Args:
        top_k: errors listed a token besides the true one: the largest k that can be chosen.
    """

    def __init__(self, top_k: int, device: torch.device) -> None:
        # a row a norm, 1 and 2: sums over tokens of what the true token and the first k others hold; last: the whole
        self.sums = torch.zeros(2, top_k + 2, dtype=torch.float64, device=device)

    def add(self, errors: SparseErrors) -> None:
        """Take the errors of one micro-batch; waits for nothing. Tokens with a NaN or an infinity count for nothing: the log
        leaves them out too."""
        finite = (errors.values.isfinite().all(1) & errors.rest.isfinite())[:, None]
        size = errors.values.abs().double().masked_fill(~finite, 0.0)
        rest = errors.rest.double()[:, None].masked_fill(~finite, 0.0)
        self.sums[0] += torch.cat([size, rest], 1).cumsum(1).sum(0)
        self.sums[1] += torch.cat([size.square(), rest * size[:, -1:]], 1).cumsum(1).sqrt().sum(0)

    def add_over_ranks(self) -> None:
        """Add up the curves of all ranks (collective)."""
        torch.distributed.all_reduce(self.sums)

    def smallest(self, captured: float, norm: int) -> int:
        """Smallest k that holds `captured` of |l|, the norm of that order (1 or 2); all that are listed where none does."""
        curve = self.sums[norm - 1]
        enough = (curve[1:-1] >= captured * curve[-1]).nonzero()
        return int(enough[0]) + 1 if len(enough) else len(curve) - 2

    def captured(self, top_k: int, norm: int) -> float:
        """Norms of the true token's and the first `top_k` others' errors / norms of all; 1 where there is no error."""
        curve = self.sums[norm - 1]
        whole = float(curve[-1])
        return min(1.0, float(curve[top_k]) / whole) if whole else 1.0


def told(top_k: int, curve: ErrorCurve, log: LogSection, rounds: int) -> str:
    """The choice in a sentence, for people.

    Args:
        top_k: what stands. curve: of rounds 1 to `rounds`.
    """
    names = ("the summed errors", "the Euclidean norm")
    shares = [curve.captured(top_k, norm) for norm in (1, 2)]
    mine, other = log.top_k_norm - 1, 2 - log.top_k_norm
    text = (
        f"the log keeps the {top_k} largest errors a token: {_percent(shares[mine])} of |l| in rounds 1 to {rounds} "
        f"({names[mine]}; {_percent(shares[other])} of {names[other]})"
    )
    if shares[mine] < log.top_k_captured:
        text += f", less than the {100 * log.top_k_captured:g}% of log.top_k_captured"
        if top_k == log.top_k_limit:
            text += f": log.top_k_limit is {top_k}; a higher one, or log.error=dense, keeps more"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%" if share < 0.9999 else f"{100 * share:.6g}%"
