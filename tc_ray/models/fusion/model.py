"""The fused model: Pilot and Copilot as one language model of the Pilot's architecture (equation 8, algorithm 2).

It joins transformers' GenerationMixin: greedy, sampling, beams, streamers and stopping criteria are the library's own. The
Copilot's caches travel inside the Pilot's cache object, so whatever generation does to one happens to the other.
Invariant: lam = 0 returns the Pilot's logits untouched. Used by evaluation and serving.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from tc_ray.models.copilot import Copilot, CopilotConfig
from tc_ray.models.families import family_of
from tc_ray.models.fusion.cache import CopilotCache, FusedCache, FusedEncoderDecoderCache
from tc_ray.models.fusion.distribution import SPACES, fuse
from tc_ray.models.fusion.feedback import FEEDBACKS
from tc_ray.models.fusion.folder import read_settings, write_settings
from tc_ray.models.fusion.generation import ExplainedGeneration
from tc_ray.models.pilot.taps import POOLINGS, LayerTap, tap_definition


class FusionError(ValueError):
    """Pilot and Copilot do not fit each other; the message says in what."""


class FusedModel(PreTrainedModel, ExplainedGeneration):
    """Pilot + Copilot as one language model; make one with `join` or `from_pretrained`.

    Args:
        pilot: language model. copilot: a Copilot trained beside it or beside another one of its family.
        lam: default lambda. space: `probability` or `logits`. feedback: `own` f or `realised` error as Copilot input.

    Raises:
        FusionError: architecture, hidden states or width are not what the Copilot was trained on.
        ValueError: an unknown space or feedback, or a lam that is not finite.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self, pilot: Any, copilot: Copilot, *, lam: float = 1.0, space: str = "probability", feedback: str = "own"
    ) -> None:
        if space not in SPACES:
            raise ValueError(f"fusion space {space!r} is not one of {SPACES}")
        if feedback not in FEEDBACKS:
            raise ValueError(f"feedback {feedback!r} is not one of {tuple(FEEDBACKS)}")
        if not math.isfinite(lam):
            raise ValueError(f"lam is {lam}: give a number")
        check_fit(pilot.config, copilot.config)
        super().__init__(pilot.config)
        self.pilot = pilot
        self.copilot = copilot
        self.default_lam, self.space, self.feedback = float(lam), space, feedback
        self.generation_config = pilot.generation_config or GenerationConfig.from_model_config(pilot.config)
        self.vocab_size = pilot.config.vocab_size
        self._family = family_of(pilot)
        self._tap = LayerTap(self._family.layers(pilot), copilot.config.pooling, copilot.config.tap_layers)
        self._feedbacks = {name: kind(copilot) for name, kind in FEEDBACKS.items()}
        self._share_embedding()
        self.eval()

    @staticmethod
    def join(
        pilot: Any, copilot: Copilot, *, lam: float = 1.0, space: str = "probability", feedback: str = "own"
    ) -> FusedModel:
        """The fused model of the Pilot's architecture. Arguments and errors: those of the class."""
        from tc_ray.models.fusion.causal import FusedCausalLM
        from tc_ray.models.fusion.seq2seq import FusedSeq2SeqLM

        kind = FusedSeq2SeqLM if family_of(pilot).encoder_decoder else FusedCausalLM
        return kind(pilot, copilot, lam=lam, space=space, feedback=feedback)

    @classmethod
    def can_generate(cls) -> bool:
        """GenerationMixin asks; the fused model always can."""
        return True

    def get_input_embeddings(self) -> nn.Module:
        """The Pilot's token embedding."""
        embedding: nn.Module = self.pilot.get_input_embeddings()
        return embedding

    def new_cache(self) -> FusedCache | FusedEncoderDecoderCache:
        """An empty cache for one batch of sequences."""
        kind = FusedEncoderDecoderCache if self._family.encoder_decoder else FusedCache
        return kind(self._family.decoder(self.pilot).config)  # an encoder-decoder's stacks differ in depth

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        if generation_config.use_cache is False:
            raise ValueError("the fused model decodes with its cache: use_cache must stay true")
        for asked in ("output_hidden_states", "output_attentions"):
            if getattr(generation_config, asked):
                raise ValueError(f"the fused model has no {asked}: those are the Pilot's and the Copilot's own")
        if generation_config.prefill_chunk_size:
            raise ValueError("the Copilot begins at the end of the whole prompt: prefill_chunk_size must stay unset")
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()

    @torch.no_grad()
    def _share_embedding(self) -> None:
        """One copy in memory of the embedding that both models hold, where they are the same numbers."""
        own, table = self.copilot.question_embedding, self._family.embedding_table(self.pilot)
        embedding = self.pilot.get_input_embeddings().weight
        if own is None or table.data_ptr() != embedding.data_ptr() or own.weight.shape != embedding.shape:
            return
        alike = (own.weight.dtype, own.weight.device) == (embedding.dtype, embedding.device)
        if alike and torch.equal(own.weight, embedding):
            own.weight = embedding

    def release(self) -> None:
        """Let go of the Pilot, which others may go on using: the tap leaves its layers. This model is of no use after."""
        self._tap.close()

    # -- one call -------------------------------------------------------------------------------------------------

    def _weights(self, lam: float | torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        """lam as fp32 [B]."""
        if isinstance(lam, float) and not math.isfinite(lam):  # a tensor is not read: that would wait for the device
            raise ValueError(f"lam is {lam}: give a number")
        weights = torch.as_tensor(self.default_lam if lam is None else lam, dtype=torch.float32, device=device)
        if weights.ndim == 0:
            return weights.expand(batch)
        if weights.shape != (batch,):
            raise ValueError(
                f"lam has shape {tuple(weights.shape)} for {batch} sequences: give one number, or a tensor with one a sequence"
            )
        return weights

    def _fused_logits(
        self,
        logits: torch.Tensor,
        weights: torch.Tensor,
        cache: CopilotCache,
        tokens: torch.Tensor,
        states: torch.Tensor,
        attended: torch.Tensor,
    ) -> torch.Tensor:
        """Logits of p~ [B, n, V]. Arguments: those of `corrections`, and lam fp32 [B]."""
        rows = self.corrections(logits, cache, tokens, states, attended)
        return torch.stack([fuse(logits[:, i], f, weights, self.space) for i, f in enumerate(rows)], 1)

    def corrections(
        self,
        logits: torch.Tensor,
        cache: CopilotCache,
        tokens: torch.Tensor,
        states: torch.Tensor,
        attended: torch.Tensor,
    ) -> Iterator[torch.Tensor]:
        """f [B, V] of n positions, one Copilot row after the other: each reads what the row before it left.

        Args:
            logits: [B, n, V] of the Pilot for the last n positions of this call.
            tokens: int64 [B, S] and states: fp32 [B, S, d_P] of this call's positions.
            attended: bool [B, S], real (not padded) positions.

        The memory grows with the rows; positions before the first row belong to it at once.
        """
        copilot, feedback = self.copilot, self._feedbacks[self.feedback]
        memory = copilot.state_memory(states)
        count = logits.shape[1]
        shift = states.shape[1] - count
        begun = cache.rows > 0
        # the memory is what training saw: every position's state, or from the one that predicts row 0 on
        taken = 0 if begun or copilot.config.positions == "all" else shift
        for number in range(count):
            at = shift + number
            if cache.rows == 0:
                row = copilot.start.weight.expand(len(tokens), -1)[:, None]
            else:
                assert cache.feedback is not None
                row = feedback.row(cache.feedback[:, -1:], tokens[:, at])
            visible = cache.see(attended[:, taken : at + 1])
            state = copilot.decode(
                copilot.with_producing_state(row, states[:, at : at + 1]),
                self._with_question(cache, memory[:, taken : at + 1]),
                visible[:, None],
                first_row=cache.rows,
                self_cache=cache.self_attention,
                memory_cache=cache.memory,
            )[:, 0]
            taken = at + 1
            cache.feed(feedback.keep(state, logits[:, number]))
            yield copilot.expand(copilot.predict(state), logits.shape[-1])

    def _with_question(self, cache: CopilotCache, memory: torch.Tensor) -> torch.Tensor:
        """Before the first row, the question joins the memory."""
        if cache.question is None:
            return memory
        question, cache.question = cache.question, None
        return torch.cat([question, memory], 1)

    # -- one folder -----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str, *_: Any, **__: Any) -> None:
        """Write `pilot/`, `copilot/` (safetensors) and fusion.json; `pilot/` loads with plain AutoModel."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.pilot.save_pretrained(folder / "pilot")
        self.copilot.save_pretrained(folder / "copilot")
        write_settings(folder, lam=self.default_lam, space=self.space, feedback=self.feedback)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> FusedModel:
        """Load a folder written by `save_pretrained`.

        Raises:
            NoFusedModelError: a part is missing; the message names it. ValueError: an unknown format.
            FusionError: Pilot and Copilot do not fit each other.
        """
        from tc_ray.models.pilot.load import load_pilot

        folder = Path(folder)
        settings = read_settings(folder)
        pilot = load_pilot(folder / "pilot", dtype=dtype, safetensors=True)
        copilot = Copilot.from_pretrained(folder / "copilot", dtype=dtype, use_safetensors=True)
        fused = cls.join(pilot, copilot, lam=settings.lam, space=settings.space, feedback=settings.feedback)
        return fused.to(device)


def check_fit(pilot_config: Any, copilot_config: CopilotConfig) -> None:
    """Raise FusionError where a Pilot of this config does not give what the Copilot was trained on.

    Vocabularies may differ in their padding: token ids are aligned. That both use one tokenizer is checked where the
    tokenizers are at hand (`tc-ray fuse`).
    """
    tap, pooling, layers = copilot_config.tap, copilot_config.pooling, copilot_config.tap_layers
    if pooling not in POOLINGS:
        raise FusionError(f"the Copilot was trained on states pooled by {pooling!r}: not one of {', '.join(POOLINGS)}")
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
