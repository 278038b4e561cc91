"""The Pilot's NLL on validation rows while it trains.

Invariant: a validation changes nothing of the training: no gradient, no dropout, no random number. Every rank gets the same NLL
and so comes to the same conclusions (`validated`). Called by `loop`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tc_ray.data.prepared.batches import TrainTable
from tc_ray.pilot.engine import step_inputs


class ValidationRows:
    """Up to `most` rows of validation.parquet that have a completion, spread evenly over the file, in batches for W ranks."""

    def __init__(self, file: Path, *, most: int, batch_size: int, rank: int, world_size: int) -> None:
        self._table = TrainTable(file, held_out=True)
        rows = self._table.with_target()
        if len(rows) > most:
            rows = rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
        # rows of similar length share a batch
        rows = rows[np.argsort(self._table.lengths(rows), kind="stable")]
        self._batches = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
        self._rank, self._world_size = rank, world_size
        self._tokens = self._table.target_tokens(rows)

    @torch.no_grad()
    def nll(self, engine: Any) -> float:
        """Mean NLL in nats per target token of the model in training (collective)."""
        device, total = engine.device, torch.zeros((), dtype=torch.float64, device=engine.device)
        engine.eval()
        for first in range(0, len(self._batches), self._world_size):
            # under ZeRO-3 all ranks take part in each forward pass: one without a batch repeats the first
            own = first + self._rank < len(self._batches)
            batch = self._table.batch(self._batches[first + self._rank if own else 0])
            loss = engine(loss_scale=1.0, **step_inputs(batch, device))[0]
            if own:
                total += loss.double()
        engine.train()
        if self._world_size > 1:
            dist.all_reduce(total)
        return float(total) / self._tokens
