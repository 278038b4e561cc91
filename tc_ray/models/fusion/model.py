"""The fused model: Pilot and Copilot as one language model of the Pilot's architecture, made by `join` or read from a folder.

Greedy, sampling, beams, streamers and stopping criteria are transformers' own. Used by evaluation, serving and users.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from tc_ray.models import folder as layout
from tc_ray.models.copilot import Copilot
from tc_ray.models.families import family_of
from tc_ray.models.fusion.cache import FusedCache, FusedEncoderDecoderCache
from tc_ray.models.fusion.core import fuse
from tc_ray.models.fusion.generation import FusedGeneration
from tc_ray.models.pilot.load import load_pilot


class FusedModel(FusedGeneration):
    """Pilot + Copilot as one language model; make one with `join` or `from_pretrained`."""

    @staticmethod
    def join(
        pilot: Any, copilot: Copilot, *, lam: float = 1.0, space: str = "probability", feedback: str = "own"
    ) -> FusedModel:
        """The fused model of the Pilot's architecture. Arguments and errors: those of `FusedCore`."""
        kind = FusedSeq2SeqLM if family_of(pilot).encoder_decoder else FusedCausalLM
        return kind(pilot, copilot, lam=lam, space=space, feedback=feedback)

    def save_pretrained(self, folder: Path | str, *_: Any, **__: Any) -> None:
        """Write `pilot/`, `copilot/` (safetensors) and fusion.json; `pilot/` loads with plain AutoModel."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.pilot.save_pretrained(folder / layout.PILOT)
        self.copilot.save_pretrained(folder / layout.COPILOT)
        layout.FusionSettings(self.default_lam, self.space, self.feedback).write(folder)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> FusedModel:
        """Load a folder written by `save_pretrained` or by the export of a run.

        Raises NoFusedModelError: a part is missing; the message names it. DamagedFileError: fusion.json.
        FusionError: Pilot and Copilot do not fit each other. WeightsError, NotFiniteError: see `load_whole`.
        """
        folder = Path(folder)
        layout.check_parts(folder)
        settings = layout.FusionSettings.read(folder)
        pilot = load_pilot(folder / layout.PILOT, dtype=dtype, safetensors=True)
        copilot = Copilot.from_pretrained(folder / layout.COPILOT, dtype=dtype, use_safetensors=True)
        fused = cls.join(pilot, copilot, lam=settings.lam, space=settings.space, feedback=settings.feedback)
        return fused.to(device)


class FusedCausalLM(FusedModel):
    """Decoder-only Pilot + Copilot as one causal language model."""

    cache_kind = FusedCache

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        lam: float | torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 1,
    ) -> CausalLMOutputWithPast:
        """Logits [B, n, V] of p~ for the tokens after the last n = `logits_to_keep` positions.

        Args:
            input_ids: int64 [B, S]: the prompt at first, then what follows. Left padding with `attention_mask`.
            lam: weight of the correction, one number or [B]; None takes `default_lam`; 0 is the Pilot itself.
            logits_to_keep: n. In the first call the Copilot's rows begin with the first of them, so the prompt ends there.

        Errors: see `opened`.
        """
        weights = self.lambdas(lam, input_ids.shape[0], input_ids.device)
        cache, runs = self.opened(past_key_values, weights)
        if attention_mask is None:
            width = cache.get_seq_length() + input_ids.shape[1]
            attention_mask = torch.ones(input_ids.shape[0], width, device=input_ids.device)
        count = logits_to_keep or input_ids.shape[1]
        state = cache.copilot
        # once begun, every token makes a row
        rows = input_ids.shape[1] if state.rows else count
        with self.tap.recording():
            out = self.pilot(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=rows,
            )
        rationale = self.tap.take()
        logits = out.logits
        if runs:
            attended = attention_mask[:, -input_ids.shape[1] :].bool()
            if not state.rows:
                prompt = input_ids.shape[1] - rows + 1
                state.ask(self.question_memory(input_ids[:, :prompt]), attended[:, :prompt])
            f = self.corrections(logits, state, input_ids, rationale, attended)
            logits = fuse(logits, f, weights, self.space)
        return CausalLMOutputWithPast(logits=logits[:, -count:], past_key_values=cache)


class FusedSeq2SeqLM(FusedModel):
    """Encoder-decoder Pilot + Copilot as one sequence-to-sequence model."""

    cache_kind = FusedEncoderDecoderCache

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return self.pilot.get_encoder()

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Cache | None = None,
        lam: float | torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 1,
    ) -> Seq2SeqLMOutput:
        """Logits [B, n, V] of p~ for the tokens after the last n = `logits_to_keep` decoder positions.

        Args:
            input_ids: int64 [B, Q], the source; not needed with `encoder_outputs`. attention_mask: [B, Q] of the source.
            decoder_input_ids: int64 [B, S]: the start token (and any forced prefix) at first, then what follows. Each
                position makes a row of the Copilot.
            lam: as for a decoder-only model. Errors: see `opened`.
        """
        if encoder_outputs is None:
            encoder_outputs = self.pilot.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        question = encoder_outputs[0]
        if decoder_input_ids is None:
            start = self.pilot.config.decoder_start_token_id
            decoder_input_ids = torch.full((len(question), 1), start, device=question.device)
        weights = self.lambdas(lam, len(decoder_input_ids), decoder_input_ids.device)
        cache, runs = self.opened(past_key_values, weights)
        with self.tap.recording():
            out = self.pilot(
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs,
                past_key_values=cache,
                use_cache=True,
            )
        rationale = self.tap.take()
        logits = out.logits
        if runs:
            state = cache.copilot
            attended = torch.ones_like(decoder_input_ids, dtype=torch.bool)
            if decoder_attention_mask is not None:
                attended = decoder_attention_mask[:, -decoder_input_ids.shape[1] :].bool()
            if not state.rows:
                visible = torch.ones(question.shape[:2], dtype=torch.bool, device=question.device)
                if attention_mask is not None:
                    visible = attention_mask.bool()
                state.ask(self.copilot.question_memory(question), visible)
            f = self.corrections(logits, state, decoder_input_ids, rationale, attended)
            logits = fuse(logits, f, weights, self.space)
        return Seq2SeqLMOutput(
            logits=logits[:, -logits_to_keep:] if logits_to_keep else logits,
            past_key_values=cache,
            encoder_last_hidden_state=question,
        )

    def _prepare_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Any, model_kwargs: dict[str, Any], *arguments: Any
    ) -> dict[str, Any]:
        """Arguments of the decoder only are kept from the encoder."""
        kept = {name: model_kwargs.pop(name) for name in ("lam", "logits_to_keep") if name in model_kwargs}
        prepared: dict[str, Any] = super()._prepare_encoder_decoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, *arguments
        )
        return prepared | kept
