"""`generate` with explanations and log-probabilities, and `score`: what the fused model adds to GenerationMixin.

The library's decoding runs unchanged; the finished sequences are then recomputed in one teacher-forced pass, so one path explains
beams, several return sequences and all samplers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, StoppingCriteriaList

from tc_ray.models.fusion.core import FusedCore
from tc_ray.models.fusion.explain import Explain, explain_completions
from tc_ray.models.fusion.scoring import Completions, Scores, score_completions, up_to_the_end


class FusedGeneration(FusedCore, GenerationMixin):
    """Decoding and scoring of the fused model, for both architectures."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        *arguments: Any,
        explain: bool | Explain | None = None,
        logprobs: bool = False,
        **given: Any,
    ) -> Any:
        """transformers' `generate`, with `lam` (one number or [B]) and two more arguments.

        Args:
            explain: True or `Explain(top_k=, logit_lens=)`: returns transformers' own generate output, as with
                `return_dict_in_generate`, with an `Explanation` of all returned sequences as `.explanation`.
            logprobs: that output also has `.pilot_logprobs` and `.fused_logprobs`, fp32 [R, n] of R returned sequences (0
                beyond a sequence's end), and `.completion_mask`, bool [R, n], the tokens up to the end.

        Both describe p^ and p~ themselves, before temperature, top-k and penalties, and are recomputed over the finished
        sequences in one pass of the Pilot: equal to what decoding saw, to rounding. Raises ValueError for what fused decoding
        cannot do (use_cache=False, prefill_chunk_size, output_hidden_states, output_attentions).
        """
        asked = Explain() if explain is True else explain or None
        ends = Ends(stopping_criteria or ())
        front = inputs, generation_config, logits_processor
        if asked is None and not logprobs:
            return super().generate(*front, stopping_criteria, *arguments, **given)
        with first_call(self) as call:
            out = super().generate(*front, ends, *arguments, **given | {"return_dict_in_generate": True})
        completions = _generated(self, out, call, ends)
        if asked is not None:
            out["explanation"] = explanation = explain_completions(self, completions, asked)
        if logprobs:
            scores = explanation if asked is not None else score_completions(self, completions)
            device = out.sequences.device
            out["pilot_logprobs"], out["fused_logprobs"] = (
                found.to(device) for found in (scores.pilot_logprobs, scores.fused_logprobs)
            )
            out["completion_mask"] = scores.mask.to(device)
        return out

    @torch.no_grad()
    def score(
        self,
        sequences: torch.Tensor,
        *,
        prompt_length: int | None = None,
        source: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        lam: float | torch.Tensor | None = None,
    ) -> Scores:
        """log p^ and log p~ (equation 8) of given tokens, as decoding would have seen them: fp32 [B, n].

        The Copilot reads its own (or realised) errors, not the true ones. Only a few positions' logits are in memory at once.

        Args:
            sequences: int64 [B, S], prompt and completion; for an encoder-decoder the start token and the target, as
                `generate` returns them.
            prompt_length: columns before the completions, prompts padded on the left; None for an encoder-decoder, whose
                start token is 1.
            source: int64 [B, Q], what an encoder-decoder's encoder reads, and source_mask [B, Q].
            attention_mask: [B, S] of `sequences`, which then also marks where completions end, or [B, prompt_length]; then a
                completion ends after its first end token (`generation_config.eos_token_id`).
            lam: one number or [B]; None takes `default_lam`.
        Raises ValueError for arguments that contradict each other or the architecture.
        """
        device = self.get_input_embeddings().weight.device
        sequences = sequences.to(device)
        if (source is not None) != self.family.encoder_decoder:
            raise ValueError("an encoder-decoder needs `source`, a decoder-only model has no source")
        if prompt_length is None:
            if source is None:
                raise ValueError("give prompt_length, the columns before the completions")
            prompt_length = 1
        if not 1 <= prompt_length <= sequences.shape[1]:
            raise ValueError(
                f"completions begin at column {prompt_length}: it must be from 1 to {sequences.shape[1]}, the sequences' length"
            )
        question = None
        if source is not None:
            source = source.to(device)
            source_mask = torch.ones_like(source) if source_mask is None else source_mask.to(device)
            question = self.pilot.get_encoder()(input_ids=source, attention_mask=source_mask).last_hidden_state
            source_mask = source_mask.bool()
        attended = torch.ones_like(sequences, dtype=torch.bool)
        if attention_mask is not None:
            attended[:, : attention_mask.shape[1]] = attention_mask.to(device).bool()
        if attention_mask is not None and attention_mask.shape[1] > prompt_length:
            lengths = attended[:, prompt_length:].sum(1)
        else:
            lengths = up_to_the_end(sequences[:, prompt_length:], self.generation_config.eos_token_id)
        # no token reads what stands after it, so what follows an end needs no mask
        attended[:, prompt_length:] = True
        given = Completions(
            sequences,
            attended,
            prompt_length,
            lengths,
            self.lambdas(lam, len(sequences), device),
            question,
            source_mask,
        )
        return score_completions(self, given)

    def prepare_inputs_for_generation(self, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        """The library passes the tokenizer of `stop_strings` on to the model, which does not use it."""
        kwargs.pop("tokenizer", None)
        return super().prepare_inputs_for_generation(*arguments, **kwargs)

    def _get_candidate_generator(self, *arguments: Any, **given: Any) -> Any:
        """A drafting model takes no lambda, unless it is a fused model too."""
        if not isinstance(given.get("assistant_model"), FusedGeneration):
            given["model_kwargs"] = {name: value for name, value in given["model_kwargs"].items() if name != "lam"}
        return super()._get_candidate_generator(*arguments, **given)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        """A new fused cache, after refusing what fused decoding cannot do."""
        if generation_config.use_cache is False:
            raise ValueError("the fused model decodes with its cache: use_cache must stay true")
        for asked in ("output_hidden_states", "output_attentions"):
            if getattr(generation_config, asked):
                raise ValueError(f"the fused model has no {asked}: those are the Pilot's and the Copilot's own")
        if generation_config.prefill_chunk_size:
            raise ValueError("the Copilot begins at the end of the whole prompt: prefill_chunk_size must stay unset")
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()

    def _get_stopping_criteria(
        self, generation_config: Any, stopping_criteria: Any, *arguments: Any, **given: Any
    ) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, *arguments, **given)
        if not isinstance(stopping_criteria, Ends):
            return criteria
        stopping_criteria[:] = criteria
        return stopping_criteria


class Ends(StoppingCriteriaList):
    """Criteria that record where each sequence ends: ids do not show it if the padding token can also be generated.

    lengths: int64 [R], prompt included, of the sequences that have ended, 0 for the others."""

    lengths: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **given: Any) -> torch.Tensor:
        """Bool [R], the sequences that end with their last token."""
        done: torch.Tensor = super().__call__(input_ids, scores, **given)
        if self.lengths is None or len(self.lengths) != len(done):
            self.lengths = torch.zeros(len(done), dtype=torch.int64, device=done.device)
        self.lengths[done & (self.lengths == 0)] = input_ids.shape[1]
        return done


@contextmanager
def first_call(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yields a dict that receives the arguments of the first forward call: the library's prompts, masks and lam."""
    call: dict[str, Any] = {}

    def note(_module: nn.Module, _arguments: Any, given: dict[str, Any]) -> None:
        if not call:
            call.update(given)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield call
    finally:
        handle.remove()


def _generated(model: FusedCore, out: Any, call: dict[str, Any], ends: Ends) -> Completions:
    """The completions of R returned sequences of a decoding that ran R' sequences at a time."""
    seq2seq = model.family.encoder_decoder
    first = call["decoder_input_ids" if seq2seq else "input_ids"]
    # the first call's kept logits predict the first tokens of the completions (more than one in assisted decoding)
    start = first.shape[1] - (call.get("logits_to_keep") or 1) + 1
    sequences, beams = out.sequences.to(first.device), out.get("beam_indices")
    if beams is None:
        of = torch.arange(len(sequences), device=first.device)
        ended = torch.zeros_like(of) if ends.lengths is None else ends.lengths.to(first.device)
        lengths = torch.where(ended > 0, ended, sequences.shape[1]) - start
    else:
        of = beams[:, 0].clamp_min(0).to(first.device)  # the beam that a sequence began in has its prompt
        lengths = (beams >= 0).sum(1).to(first.device)
    lam = model.lambdas(call.get("lam"), len(first), first.device)[of]
    mask = call.get("decoder_attention_mask" if seq2seq else "attention_mask")
    attended = torch.ones_like(sequences, dtype=torch.bool)
    if mask is not None:
        attended[:, :start] = mask[of, :start].bool()
    if not seq2seq:
        return Completions(sequences, attended, start, lengths, lam)
    question = call["encoder_outputs"][0][of]
    real = torch.ones(question.shape[:2], dtype=torch.bool, device=first.device)
    if call.get("attention_mask") is not None:
        real = call["attention_mask"][of].bool()
    return Completions(sequences, attended, start, lengths, lam, question, real)
