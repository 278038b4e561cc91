"""The fused model of a decoder-only Pilot."""

from __future__ import annotations

import torch
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tc_ray.models.fusion.cache import FusedCache
from tc_ray.models.fusion.model import FusedModel


class FusedCausalLM(FusedModel):
    """Decoder-only Pilot + Copilot as one causal language model."""

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
            past_key_values: a FusedCache; a new one is made for a prompt.
            lam: weight of the correction, one number or [B]; None takes `default_lam`; 0 is the Pilot itself.
            logits_to_keep: n. In the first call the Copilot's rows begin with the first of them, so the prompt is what
                stands up to there; in later calls it is the number of tokens.

        Raises:
            TypeError: another kind of cache. RuntimeError: the Copilot was not there from the prompt on.
        """
        cache = past_key_values if past_key_values is not None else self.new_cache()
        if not isinstance(cache, FusedCache):
            raise TypeError(f"past_key_values must be a FusedCache, not {type(cache).__name__}")
        weights = self._weights(lam, input_ids.shape[0], input_ids.device)
        before = cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], before + input_ids.shape[1], device=input_ids.device)
        count = logits_to_keep or input_ids.shape[1]
        state = cache.copilot
        # once begun the Copilot hears every token, at lam 0 too: it could not go on otherwise
        corrected = state.rows > 0 or bool((weights != 0).any())
        if corrected and before and not state.rows:
            raise RuntimeError("the Copilot joins at the prompt: lam cannot turn from 0 in mid-sequence")
        # once it has begun, every token makes a row
        rows = input_ids.shape[1] if state.rows else count
        with self._tap.recording():
            out = self.pilot(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=rows,
            )
        states = self._tap.take()
        logits = out.logits
        if corrected:
            attended = attention_mask[:, -input_ids.shape[1] :].bool()
            if not state.rows:
                prompt = input_ids.shape[1] - rows + 1
                state.ask(self.copilot.question_memory(input_ids[:, :prompt]), attended[:, :prompt])
            logits = self._fused_logits(logits, weights, state, input_ids, states, attended)
        return CausalLMOutputWithPast(logits=logits[:, -count:], past_key_values=cache)
