"""Teacher-forced log-probabilities of gold tokens, a few tokens at a time, and sums of what is measured on them by text.

Invariant: the pieces of two Pilots with one vocabulary over the same texts are the same pieces, so they can be joined. The first
columns of the sums are those of `evaluation.teacher_forced`. Called by `measure` and `pilots`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from tc_ray.evaluation.scores import NLL
from tc_ray.evaluation.teacher_forced import CHUNK_ELEMENTS, NLL_FLOOR, Text
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.pilot.step import PilotStep

SQUARED_ERROR, FIRST, MOVED = 0, 2, 3
"""Columns beside NLL: squared error, tokens ranked first, and half of the sum over V of |p~ - p|."""
BATCH = 8
"""Texts of a forward pass: their log-probabilities over the whole vocabulary are held at once."""
TOP_K = 256
"""Errors kept per gold token for the Copilot's input; of a small vocabulary all."""


@dataclass(frozen=True)
class GoldTokens:
    """c gold tokens. owner: int64 [c], index of the text. log_probs: fp32 [c, V], the Pilot's. targets: int64 [c].

    f: fp32 [c, V], the Copilot's correction; None without a Copilot.
    """

    owner: torch.Tensor
    log_probs: torch.Tensor
    targets: torch.Tensor
    f: torch.Tensor | None


@torch.no_grad()
def gold_tokens(pilot: Any, texts: Sequence[Text], *, copilot: Copilot | None = None) -> Iterator[GoldTokens]:
    """All gold tokens of the texts."""
    known = [(i, text) for i, text in enumerate(texts) if len(text.ids) > text.start]
    options: dict[str, Any] = {"record": False, "top_k": 1}
    if copilot is not None:
        vocab, tap = copilot.config.vocab_size, copilot.config
        options = {"top_k": vocab - 1 if vocab < 4 * TOP_K else TOP_K, "pooling": tap.pooling, "layers": tap.tap_layers}
        options["question"] = tap.question == "states"
    step = PilotStep(pilot, **options).eval()
    try:
        for at in range(0, len(known), BATCH):
            part = known[at : at + BATCH]
            ids = pad_sequence([torch.tensor(text.ids) for _, text in part], batch_first=True)
            lengths = torch.tensor([len(text.ids) for _, text in part])
            starts = torch.tensor([text.start for _, text in part])
            owner = torch.tensor([i for i, _ in part]).repeat_interleave(lengths - starts)
            out = step.measure(ids.to(pilot.device), lengths.to(pilot.device), starts.to(pilot.device))
            f = None
            if copilot is not None:
                positions = copilot.config.positions
                batch = CopilotBatch.from_step(out.record, ids, lengths, starts, positions=positions).to(pilot.device)
                f = copilot.compact(batch).float()
            width = out.log_probs.shape[1]
            for rows in torch.arange(len(owner)).split(max(1, CHUNK_ELEMENTS // width)):
                dense = None if f is None or copilot is None else copilot.expand(f[rows], width)
                yield GoldTokens(owner[rows], out.log_probs[rows], out.targets[rows], dense)
    finally:
        step.close()


def gold_sums(
    pieces: Iterable[GoldTokens],
    texts: int,
    adjusted: Callable[[GoldTokens], torch.Tensor],
    *,
    floor: float = NLL_FLOOR,
) -> NDArray[np.float64]:
    """Sums over the gold tokens of each text [texts, 4]. adjusted: log-probabilities of what is measured."""
    sums = torch.zeros(texts, 4, dtype=torch.float64)
    for piece in pieces:
        p, q = piece.log_probs.exp(), adjusted(piece).exp()
        true = q.gather(1, piece.targets[:, None])[:, 0]
        found = torch.zeros(len(q), 4, dtype=torch.float64, device=q.device)
        # ||onehot(target) - q||^2 = 1 - 2 q(target) + ||q||^2
        found[:, SQUARED_ERROR] = (1.0 - 2.0 * true + q.square().sum(-1)).double()
        found[:, NLL] = -true.clamp_min(floor).log().double()
        found[:, FIRST] = (q.argmax(-1) == piece.targets).double()
        found[:, MOVED] = (q - p).abs().sum(-1).double() / 2
        sums.index_add_(0, piece.owner, found.cpu())
    return sums.numpy()
