"""Decoder-only Copilot (appendix E.2, pattern 1 of table 18), assembled from a pretrained decoder's own layers.

Layers 1, 3, 5, ... keep causal self-attention over the error rows. Layers 2, 4, 6, ... use the same projections for
cross-attention: queries from the rows, keys and values from the memory, which is the prompt's input embeddings X~ and
the Pilot's layer-mean states h, concatenated over positions. Row i sees all of X~ and the states up to the one that
predicts token i. No code of the decoder family is repeated: the layers come from AutoModel.

Invariant: training (`forward`, all rows at once) and decoding (`decode` with a cache, one row at a time) run the same
code, so they agree to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, Cache, PreTrainedModel

from tc_ray.models.copilot.batch import CopilotBatch
from tc_ray.models.copilot.config import CopilotConfig
from tc_ray.models.taps import TAP_DEFINITION

OUTPUT_STD = 1e-2
"""Of W_out's first weights: small beside the errors, large enough to give the tokens different directions."""


class Copilot(PreTrainedModel):
    """Predicts the Pilot's errors f [.., V] from earlier errors and from what the Pilot saw and thought."""

    config_class = CopilotConfig
    base_model_prefix = "copilot"
    _supports_sdpa = True

    def __init__(self, config: CopilotConfig) -> None:
        super().__init__(config)
        decoder_config = config.decoder_config()
        decoder_config._attn_implementation = "sdpa"
        # the dtype being loaded, not the one the base was saved in
        decoder = AutoModel.from_config(decoder_config, dtype=torch.get_default_dtype())
        width = decoder_config.hidden_size
        self.layers = decoder.layers
        self.norm = decoder.norm
        self.rotary_emb = decoder.rotary_emb
        # E of the Pilot, frozen: makes X~ from the logged ids, and W_in = A E^T when the widths agree
        self.question_embedding = nn.Embedding(config.vocab_size, config.pilot_hidden_size)
        self.error_embedding = None if width == config.pilot_hidden_size else nn.Embedding(config.vocab_size, width)
        self.error_projection = nn.Linear(width, width, bias=False)
        # row 0 has no earlier error; zeros would give uniform attention (method.md)
        self.start = nn.Embedding(1, width)
        # first-token states are 100 times larger than the others: normalise what is attended to (method.md)
        self.question_norm = nn.RMSNorm(config.pilot_hidden_size, eps=1e-6)
        self.state_norm = nn.RMSNorm(config.pilot_hidden_size, eps=1e-6)
        same = width == config.pilot_hidden_size
        self.memory_projection = nn.Identity() if same else nn.Linear(config.pilot_hidden_size, width, bias=False)
        self.state_projection = (
            nn.Linear(config.pilot_hidden_size, width, bias=False) if config.producing_state else None
        )
        # f lives on these tokens and is 0 elsewhere: Adam moves the rows of tokens that never occur as far as any other,
        # and tens of thousands of them drown the few that matter (docs/decisions.md)
        self.output = nn.Linear(width, config.output_size or config.vocab_size, bias=False)
        self.register_buffer("output_ids", torch.arange(self.output.out_features))
        # the step of a row of W_out moves f by lr * |state|; 1/sqrt(d) makes that independent of the width
        self.output_scale = width**-0.5
        self.post_init()
        self.reset_new_weights()
        self.freeze_embeddings()

    @torch.no_grad()
    def reset_new_weights(self) -> None:
        """Initialise what no pretrained decoder has: A at identity, W_out small, start vector and projections."""
        nn.init.eye_(self.error_projection.weight)
        nn.init.normal_(self.start.weight, std=0.02)
        nn.init.normal_(self.output.weight, std=OUTPUT_STD)
        for projection in (self.memory_projection, self.state_projection):
            if isinstance(projection, nn.Linear) and projection.in_features == projection.out_features:
                nn.init.eye_(
                    projection.weight
                )  # pretrained layers can read a hidden state of their own family as it is
            elif isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def freeze_embeddings(self) -> None:
        """E is shared knowledge of both models, not trained: X~ must stay what the Pilot's embedding gives."""
        self.question_embedding.requires_grad_(False)
        if self.error_embedding is not None:
            self.error_embedding.requires_grad_(False)

    @classmethod
    def from_decoder(
        cls,
        base: Path | str,
        layers: Sequence[int],
        *,
        pilot_embedding: torch.Tensor,
        output_ids: torch.Tensor | None = None,
        producing_state: bool = True,
        positions: str = "all",
        random_weights: bool = False,
    ) -> Copilot:
        """Copilot initialised from chosen layers of a pretrained decoder, fp32.

        Args:
            base: folder or hub id of a decoder of the Pilot's family.
            layers: indices of its layers, in order.
            pilot_embedding: [V, d_P] the Pilot's token embedding.
            positions: states of the log it will be trained on, all or target.
            output_ids: int64 [A], the tokens f can be non-zero for; None is the whole vocabulary.
            random_weights: read only the base's config (tests).
        """
        base_config = AutoConfig.from_pretrained(base)
        missing = [i for i in layers if not 0 <= i < base_config.num_hidden_layers]
        if missing:
            raise ValueError(
                f"copilot.layers {missing} are not layers of {base}, which has {base_config.num_hidden_layers}"
            )
        fields = base_config.to_dict()
        fields["num_hidden_layers"] = len(layers)
        if fields.get("layer_types"):
            fields["layer_types"] = [fields["layer_types"][i] for i in layers]
        vocab_size, pilot_width = pilot_embedding.shape
        copilot = cls(
            CopilotConfig(
                decoder=fields,
                pilot_hidden_size=pilot_width,
                vocab_size=vocab_size,
                producing_state=producing_state,
                tap=TAP_DEFINITION,
                positions=positions,
                output_size=0 if output_ids is None else len(output_ids),
                source=f"{Path(str(base)).name}, layers {list(layers)}",
            )
        )
        copilot.question_embedding.weight.data.copy_(pilot_embedding)
        if output_ids is not None:
            copilot.output_ids.copy_(output_ids)
        if not random_weights:
            decoder = AutoModel.from_pretrained(base, dtype=torch.float32)
            for own, index in zip(copilot.layers, layers, strict=True):
                own.load_state_dict(decoder.layers[index].state_dict())
            copilot.norm.load_state_dict(decoder.norm.state_dict())
            if copilot.error_embedding is not None:
                common = min(vocab_size, decoder.get_input_embeddings().weight.shape[0])
                copilot.error_embedding.weight.data[:common].copy_(decoder.get_input_embeddings().weight[:common])
        return copilot

    # -- input rows and memory ------------------------------------------------------------------------------------

    @property
    def _error_table(self) -> torch.Tensor:
        return (self.question_embedding if self.error_embedding is None else self.error_embedding).weight

    def error_rows(self, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """W_in l for sparse errors: int64 [N, k+1], fp32 [N, k+1] -> [N, d_C]; no [N, V] tensor is made."""
        table = self._error_table
        summed = F.embedding_bag(ids, table, mode="sum", per_sample_weights=values.to(table.dtype))
        return self.error_projection(summed)

    def dense_error_rows(self, errors: torch.Tensor) -> torch.Tensor:
        """W_in l for dense errors [N, V] -> [N, d_C]: realised errors at inference."""
        table = self._error_table
        return self.error_projection(errors.to(table.dtype) @ table)

    def own_error_rows(self, f: torch.Tensor) -> torch.Tensor:
        """W_in f for the Copilot's own output [N, A] of `predict` -> [N, d_C]."""
        table = self._error_table
        table = table if self.is_full else table[self.output_ids]
        return self.error_projection(f.to(table.dtype) @ table)

    def question_memory(self, ids: torch.Tensor) -> torch.Tensor:
        """X~ of prompt tokens, int64 [B, Q] -> [B, Q, d_C], as attended to."""
        return self.memory_projection(self.question_norm(self.question_embedding(ids)))

    def state_memory(self, states: torch.Tensor) -> torch.Tensor:
        """Layer-mean states [B, P, d_P] -> [B, P, d_C], as attended to."""
        return self.memory_projection(self.state_norm(states.to(self.state_norm.weight.dtype)))

    def with_producing_state(self, rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Add the projected state [B, n, d_P] that predicts each row's token to rows [B, n, d_C], if configured."""
        if self.state_projection is None:
            return rows
        return rows + self.state_projection(self.state_norm(states.to(self.state_norm.weight.dtype)))

    # -- the layers -----------------------------------------------------------------------------------------------

    def decode(
        self,
        rows: torch.Tensor,
        memory: torch.Tensor,
        visible: torch.Tensor,
        *,
        first_row: int = 0,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Final states [B, n, d_C] of input rows; `predict` maps them to f.

        Args:
            rows: [B, n, d_C] input rows first_row .. first_row + n - 1.
            memory: [B, M_new, d_C] memory not yet in the cache (all of it when there is no cache).
            visible: bool [B, n, M], which memory positions (cached and new) each row sees.
            cache: holds self-attention and memory keys and values of this Copilot's layers; grows in place.
        """
        positions = torch.arange(first_row, first_row + rows.shape[1], device=rows.device)[None]
        position_embeddings = self.rotary_emb(rows, positions)
        mask = visible[:, None]
        for index, layer in enumerate(self.layers):
            if index % 2 == 0:
                rows = layer(rows, attention_mask=None, position_embeddings=position_embeddings, past_key_values=cache)
            else:
                rows = _cross_attention_layer(layer, rows, memory, mask, cache)
        return self.norm(rows)

    @property
    def is_full(self) -> bool:
        """Whether f covers the whole vocabulary in token order."""
        return self.output.out_features == self.config.vocab_size

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        """f = W_out state on the output tokens: [.., d_C] -> [.., A], no softmax."""
        return self.output(states * self.output_scale)

    def expand(self, f: torch.Tensor) -> torch.Tensor:
        """[.., A] on the output tokens -> [.., V], zero elsewhere."""
        if self.is_full:
            return f
        return f.new_zeros(*f.shape[:-1], self.config.vocab_size).index_copy(-1, self.output_ids, f)

    def output_places(self, ids: torch.Tensor) -> torch.Tensor:
        """Where token ids stand among the output tokens; -1 for those that f cannot reach."""
        if self.is_full:
            return ids
        places = torch.full((self.config.vocab_size,), -1, dtype=torch.int64, device=ids.device)
        places[self.output_ids] = torch.arange(len(self.output_ids), device=ids.device)
        return places[ids]

    def forward(self, batch: CopilotBatch) -> torch.Tensor:
        """f [N, V] for the N real target rows of a batch in row order, teacher-forced with the true l_<i."""
        return self.expand(self.compact(batch))

    def compact(self, batch: CopilotBatch) -> torch.Tensor:
        """`forward` on the output tokens only: [N, A]."""
        count, rows, entries = batch.error_ids.shape
        errors = self.error_rows(batch.error_ids.view(-1, entries), batch.error_values.view(-1, entries))
        start = self.start.weight.expand(count, 1, -1)
        inputs = torch.cat([start.to(errors.dtype), errors.view(count, rows, -1)[:, :-1]], 1)
        states = batch.states
        at = (batch.state_position[:, None] == batch.row_position[:, :, None]).to(torch.uint8).argmax(-1)
        producing = states.gather(1, at[:, :, None].expand(-1, -1, states.shape[2]))
        inputs = self.with_producing_state(inputs, producing)
        memory = torch.cat([self.question_memory(batch.question_ids), self.state_memory(states)], 1)
        causal = (batch.state_position[:, None] <= batch.row_position[:, :, None]) & (batch.state_position >= 0)[
            :, None
        ]
        question = batch.question_mask[:, None].expand(-1, rows, -1)
        final = self.decode(inputs, memory, torch.cat([question, causal], 2))
        return self.predict(final[batch.row_mask])


def _cross_attention_layer(
    layer: Any, rows: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor, cache: Cache | None
) -> torch.Tensor:
    """A decoder layer with its self-attention's projections used for attention to the memory, without RoPE."""
    attention = layer.self_attn
    batch, count, _ = rows.shape
    query = attention.q_proj(layer.input_layernorm(rows)).view(batch, count, -1, attention.head_dim).transpose(1, 2)
    memory = layer.input_layernorm(memory)  # what the pretrained keys and values were made from
    key = attention.k_proj(memory).view(batch, memory.shape[1], -1, attention.head_dim).transpose(1, 2)
    value = attention.v_proj(memory).view(batch, memory.shape[1], -1, attention.head_dim).transpose(1, 2)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=attention.scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    rows = rows + attention.o_proj(out.transpose(1, 2).reshape(batch, count, -1))
    return rows + layer.mlp(layer.post_attention_layernorm(rows))


def choose_layers(layers: Sequence[int] | None, every: int, available: int) -> list[int]:
    """Layers of the base model a Copilot starts from: an explicit list, or every k-th with the last among them."""
    if layers is not None:
        return list(layers)
    return list(range(available - 1, -1, -every))[::-1]
