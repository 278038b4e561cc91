"""Teacher-forced measures of given texts: squared error, NLL and tokens ranked first, for every (space, lam) in one pass.

The Copilot reads the Pilot's true errors on the text before, as in training, so one pass of both models gives every lambda. A
ratio E||p - p~||^2 / E||p - p^||^2 (theorem 4.1) below 1 means that the Copilot works; it is no proxy for accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from tc_ray.evaluation.statistics import Choice
from tc_ray.models.copilot import CopilotBatch
from tc_ray.models.fusion import FusedModel, fuse
from tc_ray.models.pilot.step import PilotStep

CHUNK_ELEMENTS = 2**20
TARGETS = 512
"""Target tokens of a forward pass, but for one long text: their log-probabilities over the vocabulary are in memory."""
NLL_FLOOR = 1e-8
"""Probability below which a token's NLL stops growing: a clamped p~ can be exactly 0."""
TINY = 1e-37
"""As small a floor as fp32 has."""
SQUARED_ERROR, NLL, FIRST = range(3)
"""Columns of what `text_measures` gives."""


@dataclass(frozen=True)
class Text:
    """A prompt and what follows it: ids[start:] is measured."""

    ids: list[int]
    start: int


def text_measures(
    model: Any, texts: Sequence[Text], choices: Sequence[Choice], *, batch_size: int, floor: float = NLL_FLOOR
) -> NDArray[np.float64]:
    """Sums over the tokens of each text: squared error, nats, tokens ranked first. [texts, choices, 3]; 0 without tokens.

    model: a fused model, or a Pilot, which is measured as lambda 0.
    """
    sums = np.zeros((len(texts), len(choices), 3))
    fused = model if isinstance(model, FusedModel) else None
    pilot = model if fused is None else fused.pilot
    if fused is None:
        step = PilotStep(pilot, top_k=1, record=False).eval()
    else:
        top_k = fused.vocab_size - 1 if fused.vocab_size < 1024 else 256
        tap = fused.copilot.config
        step = PilotStep(pilot, top_k=top_k, pooling=tap.pooling, layers=tap.tap_layers).eval()
    try:
        for numbers in _batches(texts, batch_size):
            sums[numbers] = _measured(step, fused, [texts[number] for number in numbers], choices, floor)
    finally:
        step.close()
    return sums


def _batches(texts: Sequence[Text], batch_size: int) -> Iterator[list[int]]:
    """Numbers of texts of similar length."""
    batch: list[int] = []
    targets = 0
    for number in sorted(range(len(texts)), key=lambda i: len(texts[i].ids)):
        count = len(texts[number].ids) - texts[number].start
        if not count:
            continue
        if batch and (len(batch) == batch_size or targets + count > TARGETS):
            yield batch
            batch, targets = [], 0
        batch.append(number)
        targets += count
    if batch:
        yield batch


@torch.no_grad()
def _measured(
    step: PilotStep, fused: FusedModel | None, texts: Sequence[Text], choices: Sequence[Choice], floor: float
) -> NDArray[np.float64]:
    device = step.model.device
    ids = pad_sequence([torch.tensor(text.ids) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text.ids) for text in texts])
    starts = torch.tensor([text.start for text in texts])
    out = step.measure(ids.to(device), lengths.to(device), starts.to(device))
    f = None
    if fused is not None and any(lam for _, lam in choices):
        assert out.record is not None
        positions = fused.copilot.config.positions
        batch = CopilotBatch.from_step(out.record, ids, lengths, starts, positions=positions).to(device)
        f = fused.copilot.compact(batch).float()
    text_of = torch.repeat_interleave(torch.arange(len(texts)), lengths - starts)
    sums = torch.zeros(len(texts), len(choices), 3, dtype=torch.float64)
    # a few rows at a time, so that [rows, V] stays in the processor's cache over all choices
    for rows in torch.arange(len(text_of)).split(max(1, CHUNK_ELEMENTS // out.log_probs.shape[1])):
        log_probs, targets = out.log_probs[rows], out.targets[rows]
        dense = None if f is None or fused is None else fused.copilot.expand(f[rows], log_probs.shape[1])
        for number, (space, lam) in enumerate(choices):
            p = log_probs.exp()
            if lam and dense is not None:
                p = fuse(log_probs, dense, torch.full((len(rows),), lam, device=device), space).softmax(-1)
            true = p.gather(1, targets[:, None])[:, 0]
            # ||onehot(target) - p||^2 = 1 - 2 p(target) + ||p||^2
            squared = 1.0 - 2.0 * true + p.square().sum(-1)
            nll = -true.clamp_min(floor).log()
            first = (p.argmax(-1) == targets).float()
            found = torch.stack([squared, nll, first], 1).double().cpu()
            sums[:, number].index_add_(0, text_of[rows], found)
    return sums.numpy()
