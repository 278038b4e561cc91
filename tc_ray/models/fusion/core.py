"""The core of the fused model: Pilot, Copilot and what one call of both does (equation 8, algorithm 2).

`model` makes a language model's forward of it, `scoring` goes over given tokens with it. The Copilot's cache
travels inside the Pilot's, so whatever generation does to one happens to the other.
Invariant: lam = 0 returns the Pilot's logits unchanged, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from tc_ray.models.copilot import Copilot, CopilotConfig
from tc_ray.models.families import family_of
from tc_ray.models.folder import FEEDBACKS, SPACES
from tc_ray.models.fusion.cache import CopilotCache, FusedCache, FusedEncoderDecoderCache
from tc_ray.models.pilot.taps import LayerTap, tap_definition


class FusionError(ValueError):
    """Pilot and Copilot do not fit each other; the message says in what."""


class OwnFeedback:
    """l_i = f_i (algorithm 2): W_in W_out is one d_C x d_C matrix, made once, so f itself is not read back."""

    def __init__(self, copilot: Copilot) -> None:
        self._copilot = copilot
        self._made_of: tuple[object, ...] = ()
        self._matrix = torch.empty(0)

    def keep(self, state: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        copilot = self._copilot
        weights = (copilot.output.weight, copilot.error_table, *copilot.error_projection.parameters())
        # made again when weights were changed, swapped or moved; writes through `.data` are not noticed
        now = (*((weight._version, weight.data_ptr()) for weight in weights), state.device, state.dtype)
        if now != self._made_of:
            self._matrix, self._made_of = self._copilot.feedback_matrix().to(state), now
        return (state @ self._matrix.T)[:, None]

    def row(self, kept: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return kept


class RealisedFeedback:
    """l_i = onehot(chosen token) - p^_i: safer if the Copilot lags, at the cost of reading E."""

    def __init__(self, copilot: Copilot) -> None:
        self._copilot = copilot

    def keep(self, state: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        table = self._copilot.error_table
        common = min(len(table), logits.shape[-1])
        expected = logits.float().softmax(-1)[:, :common].to(table.dtype) @ table[:common]
        return expected[:, None]

    def row(self, kept: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        table = self._copilot.error_table
        # an id past the Copilot's vocabulary is padding of the Pilot's: never chosen, and without a row in E
        known = (token < len(table))[:, None, None]
        chosen = table[token.clamp_max(len(table) - 1)][:, None] * known
        return self._copilot.error_projection(chosen - kept)


Feedback = OwnFeedback | RealisedFeedback
STRATEGIES: dict[str, type[Feedback]] = {"own": OwnFeedback, "realised": RealisedFeedback}
"""What the Copilot reads at inference instead of the true errors, of its row before.

`keep`: final state [B, d_C] of the Copilot and logits [B, V] of the Pilot -> what is kept of a row, [B, 1, d_C]. `row`: of that and the
chosen token, int64 [B], the next input row [B, 1, d_C]. Nothing of size V is kept between rows."""


class FusedCore(PreTrainedModel):
    """Pilot and Copilot, and one call of both.

    pilot: language model. copilot: trained beside it or beside another model of its family.
    lam: default lambda. space: `probability` or `logits`. feedback: `own` f or `realised` error as Copilot input.
    Raises FusionError: the Pilot is not what the Copilot was trained on. ValueError: an unknown space or feedback, or lam not finite.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True
    cache_kind: ClassVar[type[FusedCache | FusedEncoderDecoderCache]]

    def __init__(
        self, pilot: Any, copilot: Copilot, *, lam: float = 1.0, space: str = "probability", feedback: str = "own"
    ) -> None:
        if space not in SPACES:
            raise ValueError(f"fusion space {space!r} is not one of {SPACES}")
        if feedback not in FEEDBACKS:
            raise ValueError(f"feedback {feedback!r} is not one of {FEEDBACKS}")
        if not math.isfinite(lam):
            raise ValueError(f"lam is {lam}: give a number")
        check_fit(pilot.config, copilot.config)
        super().__init__(pilot.config)
        self.pilot = pilot
        self.copilot = copilot
        self.default_lam, self.space, self.feedback = float(lam), space, feedback
        self.generation_config = pilot.generation_config or GenerationConfig.from_model_config(pilot.config)
        self.vocab_size = pilot.config.vocab_size
        self.family = family_of(pilot)
        self.tap = LayerTap(self.family.layers(pilot), copilot.config.pooling, copilot.config.tap_layers)
        self._strategies = {name: kind(copilot) for name, kind in STRATEGIES.items()}
        self.eval()

    @property
    def strategy(self) -> Feedback:
        return self._strategies[self.feedback]

    def get_input_embeddings(self) -> nn.Module:
        return self.pilot.get_input_embeddings()

    def new_cache(self) -> FusedCache | FusedEncoderDecoderCache:
        """An empty cache for one batch of sequences."""
        return self.cache_kind(self.family.decoder(self.pilot).config)  # an encoder-decoder's stacks differ in depth

    def release(self) -> None:
        """Remove the tap from the Pilot, which others may still use. Do not call this model afterwards."""
        self.tap.close()

    def lambdas(self, lam: float | torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        """lam as fp32 [batch]; ValueError for a number that is not finite, or a tensor of another shape."""
        if isinstance(lam, float) and not math.isfinite(lam):  # a tensor is not read: that would wait for the device
            raise ValueError(f"lam is {lam}: give a number")
        weights = torch.as_tensor(self.default_lam if lam is None else lam, dtype=torch.float32, device=device)
        if weights.ndim == 0:
            return weights.expand(batch)
        if weights.shape != (batch,):
            raise ValueError(
                f"lam has shape {tuple(weights.shape)} for {batch} sequences: give one number, or one per sequence"
            )
        return weights

    def opened(self, cache: Any, weights: torch.Tensor) -> tuple[Any, bool]:
        """The cache of a call, a new one for None, and whether the Copilot runs: once begun at lam 0 too, else it could not go on.

        Raises TypeError for another kind of cache, RuntimeError if the Copilot did not run from the first call on.
        """
        cache = self.new_cache() if cache is None else cache
        if not isinstance(cache, self.cache_kind):
            raise TypeError(f"past_key_values must be a {self.cache_kind.__name__}, not {type(cache).__name__}")
        begun = cache.copilot.rows > 0
        runs = begun or bool((weights != 0).any())
        if runs and not begun and cache.get_seq_length():
            raise RuntimeError("the Copilot joins at the prompt: lam cannot turn from 0 in mid-sequence")
        return cache, runs

    def question_memory(self, ids: torch.Tensor) -> torch.Tensor:
        """X~ of prompts, int64 [B, Q], as the Copilot attends to it: [B, Q, d_C] (decoder-only)."""
        given = self.copilot.config.question == "states"
        question = self.get_input_embeddings()(ids) if given else self.copilot.embed_question(ids)
        return self.copilot.question_memory(question)

    def corrections(
        self,
        logits: torch.Tensor,
        cache: CopilotCache,
        tokens: torch.Tensor,
        rationale: torch.Tensor,
        attended: torch.Tensor,
    ) -> torch.Tensor:
        """f [B, n, V] of n positions, one Copilot row after the other: each reads what the row before it left.

        logits: [B, n, V] of the Pilot for the last n positions of this call. tokens: int64 [B, S], rationale: fp32 [B, S, d_P] and
        attended: bool [B, S] (no padding) of all its positions. Those before the first row enter the memory at once.
        """
        copilot, strategy = self.copilot, self.strategy
        memory = copilot.rationale_memory(rationale)
        count = logits.shape[1]
        shift = rationale.shape[1] - count
        begun = cache.rows > 0
        # the memory is what training saw: every position's state, or from the one that predicts row 0 on
        taken = 0 if begun or copilot.config.positions == "all" else shift
        rows = []
        for number in range(count):
            at = shift + number
            if cache.rows == 0:
                row = copilot.first_rows(len(tokens))
            else:
                assert cache.feedback is not None
                row = strategy.row(cache.feedback[:, -1:], tokens[:, at])
            visible = cache.see(attended[:, taken : at + 1])
            state = copilot.decode(
                copilot.with_producing_state(row, rationale[:, at : at + 1]),
                cache.with_question(memory[:, taken : at + 1]),
                copilot.seen_by_row(visible)[:, None],
                first_row=cache.rows,
                self_cache=cache.self_attention,
                memory_cache=cache.memory,
            )[:, 0]
            taken = at + 1
            cache.feed(strategy.keep(state, logits[:, number]))
            rows.append(copilot.expand(copilot.predict(state), logits.shape[-1]))
        return torch.stack(rows, 1)


def check_fit(pilot_config: Any, copilot_config: CopilotConfig) -> None:
    """Raise FusionError if a Pilot of this config does not give what the Copilot was trained on. Tokenizers: `export.check`."""
    tap, pooling, layers = copilot_config.tap, copilot_config.pooling, copilot_config.tap_layers
    expected = tap_definition(pooling, layers)
    if tap != expected:
        raise FusionError(f"the Copilot was trained on other hidden states: {tap!r}, not {expected!r}")
    kinds = ("decoder-only", "encoder-decoder")
    own, pilot = (family_of(config).encoder_decoder for config in (copilot_config.decoder_config(), pilot_config))
    if own != pilot:
        raise FusionError(f"the Copilot is {kinds[own]}, the Pilot {kinds[pilot]}")
    count = family_of(pilot_config).layer_count(pilot_config)
    if layers and layers[-1] >= count:
        raise FusionError(
            f"the Copilot was trained on states of the Pilot's layers {layers}, from 0; this Pilot has {count} layers"
        )
    if pilot_config.hidden_size != copilot_config.pilot_hidden_size:
        raise FusionError(
            f"the Copilot was made for a Pilot of width {copilot_config.pilot_hidden_size}; "
            f"this Pilot has {pilot_config.hidden_size}"
        )


def fuse(logits: torch.Tensor, f: torch.Tensor, lam: torch.Tensor, space: str) -> torch.Tensor:
    """Logits of the fused distribution, fp32 [B, .., V].

    logits: [B, .., V] Pilot. f: [B, .., V] Copilot. lam: fp32 [B].
    space: `probability`: equation 8, clamped and renormalised; `logits`: logits + lam f.

    A sequence with lam 0 keeps the Pilot's logits unchanged. In probability space a row whose every p~ is 0 does too.
    """
    logits, f = logits.float(), f.float()
    weight = lam.view(-1, *[1] * (logits.ndim - 1))
    fused = logits + weight * f if space == "logits" else _in_probability_space(logits, f, weight)
    return torch.where(weight == 0, logits, fused)


def _in_probability_space(logits: torch.Tensor, f: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """log of clamp(p + lam f, 0) renormalised. p~ can leave [0, 1]; a token whose p~ is clamped gets -inf."""
    mass = (logits.softmax(-1) + weight * f).clamp_min(0.0)
    total = mass.sum(-1, keepdim=True)
    # if the correction takes away every token there is no p~: the row keeps p^. NaN stays NaN, because a correction that is
    # not finite must not look like the Pilot
    return torch.where(total == 0, logits, (mass / total).log())
