"""Controls made of trained Pilots, without a training of their own: the mean of two Pilots, and a temperature.

Invariant: the mean is that of probabilities, at each token on the same prefix, when tokens are generated and when they are given.
Answers are scored by the evaluation's own metrics. Called by `work`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from tc_ray.config.fusion import FusionSection
from tc_ray.data.encode.tokenize import completion_ids
from tc_ray.evaluation.decode import rankings
from tc_ray.evaluation.item_trie import ItemTrie
from tc_ray.evaluation.rows import RowResult, RowSet
from tc_ray.evaluation.scores import decoded_as, result
from tc_ray.evaluation.teacher_forced import NLL_FLOOR, TINY, Text
from tc_ray.study.gold import MOVED, GoldTokens, gold_sums, gold_tokens

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
Sums = Callable[[Sequence[Text], float], NDArray[np.float64]]
"""Texts and the floor of a probability to sums, as `gold_sums` gives them."""


def results_by(rows: RowSet, tokenizer: Any, sums_of: Sums, said: Sequence[Any] | None) -> list[RowResult]:
    """Results of a model that is known by its sums over texts. said: what it decoded; None where nothing is decoded."""
    forced: list[Any]
    if rows.metric == "choice":
        asked = [(row.prompt_ids, completion_ids(option, tokenizer)) for row in rows.rows for option in row.options]
        texts = [Text(prompt + option, len(prompt)) for prompt, option in asked]
        found = iter(_forced(texts, sums_of(texts, TINY)))
        forced = [[next(found) for _ in row.options] for row in rows.rows]
    else:
        texts = [Text(row.input_ids, row.target_start) for row in rows.rows]
        forced = _forced(texts, sums_of(texts, NLL_FLOOR))
    return [
        result(number, rows, forced[number], 0, None if said is None else said[number])
        for number in range(len(rows.rows))
    ]


def _forced(texts: Sequence[Text], sums: NDArray[np.float64]) -> list[Any]:
    own = sums[:, :MOVED].tolist()  # the columns that the evaluation has
    return [[len(text.ids) - text.start, [of_text]] for text, of_text in zip(texts, own, strict=True)]


class AveragedPilots:
    """Two Pilots with one vocabulary as one model."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second
        self.config, self.device = first.config, first.device

    def generate(self, ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        """As of a transformers model: greedy or beam search on the mean of the probabilities."""
        own = SecondPilot(self.second, ids, attention_mask)
        processors = LogitsProcessorList([own, *options.pop("logits_processor", [])])
        return self.first.generate(ids, attention_mask=attention_mask, logits_processor=processors, **options)

    def sums(self, texts: Sequence[Text], floor: float) -> NDArray[np.float64]:
        """Of the mean; what is moved is counted from the first Pilot."""
        pairs = zip(gold_tokens(self.first, texts), gold_tokens(self.second, texts), strict=True)
        # the second one's probabilities in the place of f
        joined = (replace(first, f=second.log_probs) for first, second in pairs)
        return gold_sums(joined, len(texts), _mean, floor=floor)

    def said(self, rows: RowSet, tokenizer: Any, fusion: FusionSection, labels: Sequence[str]) -> list[Any] | None:
        """What the rows' metric decodes: completions, or the place of the answer among the labels; None: nothing."""
        found: list[Any] = []
        for at in range(0, len(rows.rows), fusion.eval_batch_size):
            part = rows.rows[at : at + fusion.eval_batch_size]
            if decoded_as(rows.metric) == "said":
                found += self._completions([row.prompt_ids for row in part], tokenizer, fusion)
            elif rows.metric == "ranking":
                trie = ItemTrie([completion_ids(label, tokenizer) for label in labels])
                (ranked,) = rankings(self, tokenizer, part, [("", 0.0)], trie, beams=max(fusion.ranking.cutoffs))
                for row, items in zip(part, ranked, strict=True):
                    names = [labels[item] for item in items]
                    found.append([names.index(row.answer) + 1 if row.answer in names else None, ""])
        return found or None

    def _completions(self, prompts: Sequence[list[int]], tokenizer: Any, fusion: FusionSection) -> list[str]:
        left = not self.config.is_encoder_decoder
        if (
            left and fusion.num_beams == 1
        ):  # as the batch that decodes a Pilot alone: no penalties that come with a model
            self.first.generation_config = GenerationConfig()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        side, given = "left" if left else "right", [torch.tensor(ids) for ids in prompts]
        ids = pad_sequence(given, batch_first=True, padding_value=pad, padding_side=side).to(self.device)
        mask = pad_sequence([torch.ones_like(one) for one in given], batch_first=True, padding_side=side)
        out = self.generate(
            ids,
            attention_mask=mask.to(self.device),
            max_new_tokens=fusion.max_new_tokens,
            num_beams=fusion.num_beams,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        begin = ids.shape[1] if left else 1
        return [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, begin:].tolist()]


def _mean(piece: GoldTokens) -> torch.Tensor:
    assert piece.f is not None
    return mean_log_probs(piece.log_probs, piece.f)


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


def best_temperature(pilot: Any, texts: Sequence[Text]) -> float:
    """The temperature of the lowest NLL over the gold tokens of validation rows; 1 if they have none."""
    totals = dict.fromkeys(TEMPERATURES, 0.0)
    for piece in gold_tokens(pilot, texts):
        for temperature in TEMPERATURES:
            totals[temperature] -= float(at_temperature(piece, temperature).gather(1, piece.targets[:, None]).sum())
    return min(TEMPERATURES, key=lambda temperature: (totals[temperature], abs(temperature - 1.0)))


def at_temperature(piece: GoldTokens, temperature: float) -> torch.Tensor:
    """Log-probabilities at a temperature."""
    return (piece.log_probs / temperature).log_softmax(-1)


def scaled_sums(pilot: Any, temperature: float) -> Sums:
    """Of a Pilot at a temperature."""

    def sums(texts: Sequence[Text], floor: float) -> NDArray[np.float64]:
        return gold_sums(
            gold_tokens(pilot, texts), len(texts), partial(at_temperature, temperature=temperature), floor=floor
        )

    return sums
