"""One call of an encoder-decoder Pilot with its Copilot, as a sequence-to-sequence model's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from tc_ray.models.fusion.cache import FusedEncoderDecoderCache
from tc_ray.models.fusion.core import FusedCore
from tc_ray.models.fusion.distribution import fuse


class Seq2SeqForward(FusedCore):
    """Forward of encoder-decoders."""

    cache_kind = FusedEncoderDecoderCache

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        """The Pilot's encoder."""
        encoder: nn.Module = self.pilot.get_encoder()
        return encoder

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
            past_key_values: a FusedEncoderDecoderCache; a new one is made for a source.
            lam: weight of the correction, one number or [B]; None takes `default_lam`; 0 is the Pilot itself.

        Raises:
            TypeError: another kind of cache. RuntimeError: the Copilot did not run from the start token on.
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
                real = torch.ones(question.shape[:2], dtype=torch.bool, device=question.device)
                visible = real if attention_mask is None else attention_mask.bool()
                state.ask(self.copilot.question_memory(question), visible)
            f = self.corrections(logits, state, decoder_input_ids, rationale, attended)
            logits = fuse(logits, f, weights, self.space)
        return Seq2SeqLMOutput(
            logits=logits[:, -logits_to_keep:] if logits_to_keep else logits,
            past_key_values=cache,
            encoder_last_hidden_state=question,
        )
