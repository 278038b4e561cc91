"""Teacher-forced measures of given texts: squared error, NLL and tokens ranked first, for every (space, lam) in one pass.

The Copilot reads the Pilot's true errors on the text before, as in training, so one pass of both models gives every lambda. A
ratio E||p - p~||^2 / E||p - p^||^2 (theorem 4.1) below 1 means that the Copilot works; it is no proxy for accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from tc_ray.evaluation.statistics import Choice
from tc_ray.models.copilot import CopilotBatch
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.step import PilotStep

CHUNK_ELEMENTS = 2**20
TARGETS = 512
"""Target tokens of a forward pass, but for one long text: their log-probabilities over the vocabulary are in memory."""
NLL_FLOOR = 1e-8
"""Probability below which a token's NLL stops growing: a clamped p~ can be exactly 0."""
TINY = 1e-37
"""As small a floor as fp32 has."""


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
        question = tap.question == "states"
        step = PilotStep(pilot, top_k=top_k, pooling=tap.pooling, layers=tap.tap_layers, question=question).eval()
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
    reached, f = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(len(out.targets), 0, device=device)
    if fused is not None and any(lam for _, lam in choices):
        assert out.record is not None
        positions = fused.copilot.config.positions
        batch = CopilotBatch.from_step(out.record, ids, lengths, starts, positions=positions).to(device)
        known = fused.copilot.output_ids < out.log_probs.shape[1]  # ids beyond the Pilot's are padding
        reached, f = fused.copilot.output_ids[known], fused.copilot.compact(batch).float()[:, known]
    text_of = torch.repeat_interleave(torch.arange(len(texts)), lengths - starts)
    sums = torch.zeros(len(texts), len(choices), 3, dtype=torch.float64)
    # a few rows at a time, so that [rows, V] stays in the processor's cache
    for rows in torch.arange(len(text_of)).split(max(1, CHUNK_ELEMENTS // out.log_probs.shape[1])):
        given = _Given.of(out.log_probs[rows], out.targets[rows], reached, f[rows])
        for number, (space, lam) in enumerate(choices):
            found = torch.stack(given.measures(space, lam, floor), 1).double().cpu()
            sums[:, number].index_add_(0, text_of[rows], found)
    return sums.numpy()


class _Given(NamedTuple):
    """Tokens of which f changes the columns `reached` only: what the others add up to is the same for every lambda.

    log_p, f: fp32 [N, A] on the reached columns. rest: mass of the others, rest_squared: of their squares; rest_best, rest_id: the
    largest probability among them and its token. true: p of the target. place: of the target among the reached, -1: another.
    """

    targets: torch.Tensor
    reached: torch.Tensor
    log_p: torch.Tensor
    f: torch.Tensor
    rest: torch.Tensor
    rest_squared: torch.Tensor
    rest_best: torch.Tensor
    rest_id: torch.Tensor
    true: torch.Tensor
    place: torch.Tensor

    @staticmethod
    def of(log_probs: torch.Tensor, targets: torch.Tensor, reached: torch.Tensor, f: torch.Tensor) -> _Given:
        p = log_probs.exp()
        others = p.index_fill(1, reached, 0.0)
        places = torch.full((p.shape[1],), -1, dtype=torch.int64, device=p.device)
        places[reached] = torch.arange(len(reached), device=p.device)
        true = p.gather(1, targets[:, None])[:, 0]
        best, squares = others.max(1), others.square().sum(1)
        of_others = others.sum(1), squares, best.values, best.indices
        return _Given(targets, reached, log_probs[:, reached], f, *of_others, true, places[targets])

    def measures(self, space: str, lam: float, floor: float) -> list[torch.Tensor]:
        """Squared error, nats, and 1 where the target is ranked first: fp32 [N] each."""
        shift = torch.zeros_like(self.true)
        if space == "logits":
            logits = self.log_p + lam * self.f
            if lam and len(self.reached):
                shift = logits.amax(1).clamp_min(0.0)  # only against overflow
            mass = (logits - shift[:, None]).exp()
        else:
            mass = (self.log_p.exp() + lam * self.f).clamp_min(0.0)
        down = (-shift).exp()
        total = mass.sum(1) + self.rest * down
        # where the correction takes away every token, p stays (`core.fuse`)
        mass = torch.where((total == 0)[:, None], self.log_p.exp(), mass)
        total = torch.where(total == 0, mass.sum(1) + self.rest, total)
        own = self.place >= 0
        true = self.true * down
        best, best_id = self.rest_best * down, self.rest_id
        if len(self.reached):
            true = torch.where(own, mass.gather(1, self.place.clamp_min(0)[:, None])[:, 0], true)
            top, at = mass.max(1)
            top_id = self.reached[at]
            # of equal ones the first, as argmax takes it
            ahead = (top > best) | ((top == best) & (top_id < best_id))
            best_id = torch.where(ahead, top_id, best_id)
        true = true / total
        squared = 1.0 - 2.0 * true + (mass.square().sum(1) + self.rest_squared * down * down) / total.square()
        return [squared, -true.clamp_min(floor).log(), (best_id == self.targets).float()]
