"""Explanations of decoded tokens: the Pilot's candidates, the Copilot's correction, the result (equation 8).

They describe the distributions themselves, before temperature, top-p or a penalty of the sampling. Made by
`FusedModel.generate(explain=...)`; the server returns `to_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import torch

from tc_ray.files import finite
from tc_ray.models.fusion.core import FusedCore
from tc_ray.models.fusion.scoring import Completions, log_probs_of, teacher_forced_rows


@dataclass(frozen=True)
class Explain:
    """top_k: likeliest tokens of Pilot and of fused model. logit_lens: what every layer of the Pilot would predict."""

    top_k: int = 5
    logit_lens: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k of an explanation must be at least 1, not {self.top_k}")


@dataclass(frozen=True)
class Candidates:
    """k tokens at each of n places of B completions: int64 ids and fp32 p^, p~ and f, [B, n, k] each."""

    ids: torch.Tensor
    pilot: torch.Tensor
    fused: torch.Tensor
    correction: torch.Tensor

    @property
    def shift(self) -> torch.Tensor:
        """p~ - p^: the correction after weighting, clamping and renormalising."""
        return self.fused - self.pilot

    @staticmethod
    def of(ids: torch.Tensor, p: torch.Tensor, fused: torch.Tensor, f: torch.Tensor) -> Candidates:
        """Picked from [B, n, V]."""
        return Candidates(ids, *(dense.gather(2, ids) for dense in (p, fused, f)))


@dataclass(frozen=True)
class LogitLens:
    """The logit lens (figure 4): each layer's output through the Pilot's own final norm and head, as if it were the last.

    All [B, n, L], the lowest layer first. ids: int64, likeliest token; probabilities: fp32, its probability. chosen_probability:
    fp32, and chosen_rank: int64, probability and rank (1 is the likeliest) of the generated token.
    """

    ids: torch.Tensor
    probabilities: torch.Tensor
    chosen_probability: torch.Tensor
    chosen_rank: torch.Tensor

    @staticmethod
    @torch.no_grad()
    def of(model: FusedCore, layers: Sequence[torch.Tensor], chosen: torch.Tensor) -> LogitLens:
        """softmax(head(norm(h_l))) of each layer [B, c, d], one at a time. chosen: int64 [B, c]."""
        family = model.family
        norm = family.final_norm(family.decoder(model.pilot))
        parts = []
        for states in layers:
            logits = family.logits(model.pilot, norm(states)).float()
            of_chosen = logits.gather(2, chosen[:, :, None])
            best, ids = logits.max(2)
            total = logits.logsumexp(2)
            rank = 1 + (logits > of_chosen).sum(2)
            parts.append((ids, (best - total).exp(), (of_chosen[:, :, 0] - total).exp(), rank))
        return LogitLens(*(torch.stack(part, 2) for part in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Explanation:
    """Explanation of B completions padded to n tokens; entries with `mask` False mean nothing.

    tokens: int64 [B, n]. mask: bool [B, n]. pilot_logprobs, fused_logprobs: fp32 [B, n], 0 beyond the end.
    chosen: the generated token (k = 1). pilot_top, fused_top: likeliest tokens, best first.
    lam: fp32 [B]. space, feedback: those of the model. logit_lens: None unless asked for. All on the CPU.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    pilot_logprobs: torch.Tensor
    fused_logprobs: torch.Tensor
    chosen: Candidates
    pilot_top: Candidates
    fused_top: Candidates
    lam: torch.Tensor
    space: str
    feedback: str
    logit_lens: LogitLens | None = None

    def to_dict(self, tokenizer: Any) -> dict[str, Any]:
        """Plain lists and numbers that `json.dumps(..., allow_nan=False)` takes; log 0 is None.

        {"space", "feedback", "sequences": [{"lam", "tokens": [{"id", "text", "pilot_logprob", "fused_logprob", "pilot",
        "fused", "correction", "shift", "pilot_top": [{"id", "text", "pilot", "fused", "correction", "shift"}],
        "fused_top": [...], "logit_lens": [{"layer", "id", "text", "probability", "chosen_probability", "chosen_rank"}]}]}]}
        with "logit_lens", lowest layer first, only if asked for.
        """
        text = cache(partial(token_text, tokenizer))
        sequences = []
        for b, lam in enumerate(self.lam.tolist()):
            places = self.mask[b].nonzero()[:, 0].tolist()
            sequences.append({"lam": lam, "tokens": [self._token(b, i, text) for i in places]})
        return finite({"space": self.space, "feedback": self.feedback, "sequences": sequences})

    def _token(self, b: int, i: int, text: Callable[[int], str]) -> dict[str, Any]:
        [token] = _candidates(self.chosen, b, i, text)
        token |= {
            "pilot_logprob": float(self.pilot_logprobs[b, i]),
            "fused_logprob": float(self.fused_logprobs[b, i]),
            "pilot_top": _candidates(self.pilot_top, b, i, text),
            "fused_top": _candidates(self.fused_top, b, i, text),
        }
        if self.logit_lens is not None:
            lens = self.logit_lens
            columns = {"id": lens.ids, "probability": lens.probabilities}
            columns |= {"chosen_probability": lens.chosen_probability, "chosen_rank": lens.chosen_rank}
            layers = _entries(columns, b, i, text)
            token["logit_lens"] = [{"layer": layer, **entry} for layer, entry in enumerate(layers, start=1)]
        return token


def token_text(tokenizer: Any, token: int) -> str:
    """Text of one token with its leading blank; bytes that are no whole character become U+FFFD, padding ids ''."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:  # the model's vocabulary is padded beyond the tokenizer's
        return ""
    text: str = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # SentencePiece drops the blank of a first word
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text


def _candidates(given: Candidates, b: int, i: int, text: Callable[[int], str]) -> list[dict[str, Any]]:
    columns = {"id": given.ids, "pilot": given.pilot, "fused": given.fused, "correction": given.correction}
    return _entries(columns | {"shift": given.shift}, b, i, text)


def _entries(columns: dict[str, torch.Tensor], b: int, i: int, text: Callable[[int], str]) -> list[dict[str, Any]]:
    rows = zip(*(column[b, i].tolist() for column in columns.values()), strict=True)
    return [{"text": text(row[0]), **dict(zip(columns, row, strict=True))} for row in rows]


def explain_completions(model: FusedCore, given: Completions, asked: Explain) -> Explanation:
    """Explanation of given completions, with f at lam 0 too. ValueError: no token was generated."""
    parts: list[dict[str, Any]] = []
    for rows in teacher_forced_rows(model, given, corrections=True, layers=asked.logit_lens):
        tokens = given.tokens[:, rows.span]
        assert rows.f is not None
        dense = rows.pilot.softmax(2), rows.fused.softmax(2), rows.f
        k = min(asked.top_k, rows.pilot.shape[2])
        parts.append(
            {
                "pilot_logprobs": log_probs_of(rows.pilot, tokens),
                "fused_logprobs": log_probs_of(rows.fused, tokens),
                "chosen": Candidates.of(tokens[:, :, None], *dense),
                "pilot_top": Candidates.of(rows.pilot.topk(k, 2).indices, *dense),
                "fused_top": Candidates.of(rows.fused.topk(k, 2).indices, *dense),
            }
            | ({"logit_lens": LogitLens.of(model, rows.layers, tokens)} if asked.logit_lens else {})
        )
    if not parts:
        raise ValueError("there is nothing to explain: no token was generated")
    joined = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    mask = given.mask.cpu()
    for name in ("pilot_logprobs", "fused_logprobs"):
        joined[name] = joined[name].masked_fill(~mask, 0)
    return Explanation(
        tokens=given.tokens.cpu(), mask=mask, lam=given.lam.cpu(), space=model.space, feedback=model.feedback, **joined
    )


def _joined(parts: list[Any]) -> Any:
    """Tensors, or dataclasses of tensors, joined over places, on the CPU."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat([part.cpu() for part in parts], 1)
    return type(parts[0])(*(_joined([getattr(part, f.name) for part in parts]) for f in fields(parts[0])))
