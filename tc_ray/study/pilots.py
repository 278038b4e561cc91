"""Controls made of trained Pilots, without a training of their own: the mean of two Pilots, and a temperature.

Invariant: the mean is that of probabilities, at each token on the same prefix, when tokens are generated and when they are given.
Called by `work`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from tc_ray.evaluation.decode import HeldOut
from tc_ray.study.gold import GoldMeasures, GoldTokens, gold_measures, gold_tokens

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)


class AveragedPilots:
    """Two Pilots with one vocabulary as one model, as far as the metrics use a model."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second
        self.config, self.device = first.config, first.device

    def generate(self, ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        """As of a transformers model: greedy or beam search on the mean of the probabilities."""
        own = SecondPilot(self.second, ids, attention_mask)
        processors = LogitsProcessorList([own, *options.pop("logits_processor", [])])
        return self.first.generate(ids, attention_mask=attention_mask, logits_processor=processors, **options)

    def gold(self, examples: Sequence[HeldOut], *, batch_size: int) -> GoldMeasures:
        """Of the mean; the correction is counted from the first Pilot."""
        pairs = zip(
            gold_tokens(self.first, examples, batch_size=batch_size),
            gold_tokens(self.second, examples, batch_size=batch_size),
            strict=True,
        )
        # the second one's probabilities in the place of f
        joined = (replace(first, f=second.log_probs) for first, second in pairs)
        return gold_measures(joined, len(examples), lambda piece: mean_log_probs(piece.log_probs, _other(piece)))


def _other(piece: GoldTokens) -> torch.Tensor:
    assert piece.f is not None
    return piece.f


def mean_log_probs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """log((p + q) / 2) of log p and log q."""
    return torch.logaddexp(first, second) - math.log(2.0)


class SecondPilot(LogitsProcessor):
    """Replaces the scores of a generating Pilot by the mean with another one. ids, mask: [B, S], what `generate` was given.

    The other Pilot keeps its keys and values while sequences grow; beams that change places are computed anew.
    """

    def __init__(self, pilot: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self._pilot, self._ids, self._mask = pilot, ids, mask
        self._seen: torch.Tensor | None = None
        self._cache: Any = None
        self._encoded: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [R, V] after the sequences [R, n]."""
        ask = self._of_encoder_decoder if self._pilot.config.is_encoder_decoder else self._of_decoder
        other = ask(input_ids)
        mean: Any = mean_log_probs(scores.float().log_softmax(-1), other.float().log_softmax(-1))
        return mean

    def _of_decoder(self, ids: torch.Tensor) -> torch.Tensor:
        mask = self._mask.repeat_interleave(len(ids) // len(self._mask), 0)
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
        seen = 0 if self._seen is None else self._seen.shape[1]
        if self._seen is None or len(self._seen) != len(ids) or not torch.equal(ids[:, :seen], self._seen):
            seen, self._cache = 0, None
        out = self._pilot(
            input_ids=ids[:, seen:],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, seen:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._seen, self._cache = ids.clone(), out.past_key_values
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def _of_encoder_decoder(self, ids: torch.Tensor) -> torch.Tensor:
        if self._encoded is None:
            encoder = self._pilot.get_encoder()
            self._encoded = encoder(input_ids=self._ids, attention_mask=self._mask).last_hidden_state
        times = len(ids) // len(self._ids)
        states = BaseModelOutput(last_hidden_state=self._encoded.repeat_interleave(times, 0))
        mask = self._mask.repeat_interleave(times, 0)
        logits: torch.Tensor = self._pilot(
            encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids, use_cache=False
        ).logits[:, -1]
        return logits


def best_temperature(pilot: Any, examples: Sequence[HeldOut], *, batch_size: int) -> float:
    """The temperature of the lowest NLL over the gold tokens of validation rows; 1 if they have none."""
    totals = dict.fromkeys(TEMPERATURES, 0.0)
    for piece in gold_tokens(pilot, examples, batch_size=batch_size):
        for temperature in TEMPERATURES:
            totals[temperature] -= float(at_temperature(piece, temperature).gather(1, piece.targets[:, None]).sum())
    return min(TEMPERATURES, key=lambda temperature: (totals[temperature], abs(temperature - 1.0)))


def at_temperature(piece: GoldTokens, temperature: float) -> torch.Tensor:
    """Log-probabilities at a temperature."""
    return (piece.log_probs / temperature).log_softmax(-1)
