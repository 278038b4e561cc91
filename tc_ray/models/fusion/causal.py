"""One call of a decoder-only Pilot with its Copilot, as a causal language model's forward."""

from __future__ import annotations

import torch
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tc_ray.models.fusion.cache import FusedCache
from tc_ray.models.fusion.core import FusedCore
from tc_ray.models.fusion.distribution import fuse


class CausalForward(FusedCore):
    """Forward of decoder-only models."""

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
            past_key_values: a FusedCache; a new one is made for a prompt.
            lam: weight of the correction, one number or [B]; None takes `default_lam`; 0 is the Pilot itself.
            logits_to_keep: n. In the first call the Copilot's rows begin with the first of them, so the prompt ends there; in
                later calls it is the number of tokens.

        Raises:
            TypeError: another kind of cache. RuntimeError: the Copilot did not run from the prompt on.
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
                question = self.copilot.embed_question(input_ids[:, :prompt])
                state.ask(self.copilot.question_memory(question), attended[:, :prompt])
            f = self.corrections(logits, state, input_ids, rationale, attended)
            logits = fuse(logits, f, weights, self.space)
        return CausalLMOutputWithPast(logits=logits[:, -count:], past_key_values=cache)
