"""The Copilot: rows of errors in, predicted errors f out, for both architectures (sections 3.1 and E.2).

The layers between are a stack of the base's own (`stacks`). The memory is the question X~ and the rationale (the Pilot's pooled
states h), concatenated over positions; row i sees all of X~ and the rationale up to the state that predicts token i, or
before it (`producing_state: unseen`).
Invariant: training (`forward`, all rows at once) and decoding (`decode` with caches, a row at a time) run the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel

from tc_ray.models.copilot.batch import CopilotBatch
from tc_ray.models.copilot.stacks import CopilotConfig, DecoderOnlyStack, EncoderDecoderStack, Places
from tc_ray.models.families import family_of
from tc_ray.models.pilot.taps import tap_definition
from tc_ray.models.weights import HEADS, check_finite, load_whole

EMBEDDING = "of the token embedding"
"""Its name in a refusal: the table is the same by another name in each family."""
OUTPUT_STD = 1e-2
"""Of W_out's first weights: small beside the errors, large enough to give the tokens different directions."""


class Copilot(PreTrainedModel):
    """Predicts the Pilot's errors f [.., V] from earlier errors, the question and the rationale."""

    config_class = CopilotConfig
    base_model_prefix = "copilot"
    _supports_sdpa = True

    def __init__(self, config: CopilotConfig) -> None:
        super().__init__(config)
        decoder_config = config.decoder_config()
        self.encoder_decoder = family_of(decoder_config).encoder_decoder
        self.stack = (EncoderDecoderStack if self.encoder_decoder else DecoderOnlyStack)(config)
        width, pilot_width = decoder_config.hidden_size, config.pilot_hidden_size
        same = width == pilot_width
        self.free_input = config.error_input == "free"
        # E of the Pilot, frozen: makes X~ from the logged ids (decoder-only), and W_in = A E^T when the widths agree
        from_ids = not self.encoder_decoder and config.question == "ids"
        needed = from_ids or (same and not self.free_input)
        self.question_embedding = nn.Embedding(config.vocab_size, pilot_width) if needed else None
        self.error_embedding = None if same and not self.free_input else nn.Embedding(config.vocab_size, width)
        self.error_projection = nn.Identity() if self.free_input else nn.Linear(width, width, bias=False)
        # row 0 has no earlier error; zeros give uniform attention
        self.start = nn.Embedding(1, width) if config.start_row == "learned" else None
        # first-token states are 100 times larger than the others: normalise what is attended to
        self.question_norm, self.rationale_norm = (
            nn.RMSNorm(pilot_width, eps=1e-6) if config.memory_norm else nn.Identity() for _ in range(2)
        )
        self.memory_projection = nn.Identity() if same else nn.Linear(pilot_width, width, bias=False)
        in_input = config.producing_state == "input"
        self.state_projection = nn.Linear(pilot_width, width, bias=False) if in_input else None
        # f lives on these tokens and is 0 elsewhere: Adam moves the rows of tokens that never occur as far as any other,
        # and tens of thousands of them drown the few that matter (docs/decisions.md)
        self.output = nn.Linear(width, config.output_size or config.vocab_size, bias=False)
        self.register_buffer("output_ids", torch.arange(self.output.out_features))
        # the step of a row of W_out moves f by lr * |state|; 1/sqrt(d) makes that independent of the width
        self.output_scale = width**-0.5 if config.scaled_output else 1.0
        self.post_init()
        self.reset_new_weights()
        self.freeze_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no file holds when weights are loaded: RoPE frequencies follow from the family's config."""
        if "RotaryEmbedding" not in type(module).__name__:
            super()._init_weights(module)
            return
        made: Any = type(module)
        for name, buffer in made(module.config).named_buffers():
            getattr(module, name).copy_(buffer)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.stack.block if self.encoder_decoder else self.stack.layers

    @property
    def new_modules(self) -> list[nn.Module]:
        """Modules that no pretrained decoder has: trained in full even if the layers get adapters."""
        new = [self.error_projection, self.start, self.state_projection, self.output]
        new += [self.question_norm, self.rationale_norm, self.memory_projection]
        new += [self.error_embedding] if self.free_input else []
        return [module for module in new if module is not None]

    @torch.no_grad()
    def reset_new_weights(self) -> None:
        """Initialise the new modules: A at identity, a free W_in as torch does, W_out small, start vector and projections."""
        if self.start is not None:
            nn.init.normal_(self.start.weight, std=0.02)
        # f is of one size at first, scaled or not
        width, scaled = self.output.in_features, self.config.scaled_output
        nn.init.normal_(self.output.weight, std=OUTPUT_STD if scaled else OUTPUT_STD * width**-0.5)
        if isinstance(self.error_projection, nn.Linear):
            nn.init.eye_(self.error_projection.weight)
        if self.error_embedding is not None and self.free_input:
            bound = len(self.error_embedding.weight) ** -0.5
            nn.init.uniform_(self.error_embedding.weight, -bound, bound)
        elif self.error_embedding is not None:
            nn.init.zeros_(self.error_embedding.weight)  # ids that the base does not know add nothing to a row
        for projection in (self.memory_projection, self.state_projection):
            if isinstance(projection, nn.Linear) and projection.in_features == projection.out_features:
                # pretrained layers can read a hidden state of their own family as it is
                nn.init.eye_(projection.weight)
            elif isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **given: Any) -> Copilot:
        """transformers' own; WeightsError or NotFiniteError unless the folder is whole and finite (`weights.load_whole`)."""
        copilot: Copilot = load_whole(super(), folder, **given)
        copilot.freeze_embeddings()  # the loader replaces parameters
        return copilot

    def freeze_embeddings(self) -> None:
        """E is shared knowledge of both models, not trained: X~ must stay what the Pilot's embedding gives."""
        for embedding in (self.question_embedding, None if self.free_input else self.error_embedding):
            if embedding is not None:
                embedding.requires_grad_(False)

    @classmethod
    def from_decoder(
        cls,
        base: Path | str,
        layers: Sequence[int],
        *,
        pilot: nn.Module,
        output_ids: torch.Tensor | None = None,
        random_weights: bool = False,
        pooling: str = "mean",
        tap_layers: list[int] | None = None,
        **config: Any,
    ) -> Copilot:
        """Copilot for `pilot`, initialised from chosen layers of a pretrained decoder, fp32.

        base: folder or hub id of a model of the Pilot's kind, of any width. layers: of its decoder, in order; no others are read.
        pilot: its embedding alone is read.
        output_ids: int64 [A], the tokens f can be non-zero for; None is the whole vocabulary.
        random_weights: read only the base's config. pooling, tap_layers, config: fields of `CopilotConfig`.
        Raises ValueError: see `check_base`. WeightsError: the base's folder is not whole. NotFiniteError: NaN or infinity in
        what is read of base or Pilot.
        """
        base_config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        family, pilot_family = family_of(base_config), family_of(pilot)
        check_base(base, base_config, pilot, layers)
        table = pilot_family.embedding_table(pilot)
        check_finite([(EMBEDDING, table)], str(getattr(pilot, "name_or_path", "") or "the Pilot"))
        if family.encoder_decoder:
            config |= {"positions": "target", "question": "states"}
        copilot = cls(
            CopilotConfig(
                decoder=family.with_layers(base_config, layers),
                pilot_hidden_size=table.shape[1],
                vocab_size=table.shape[0],
                pooling=pooling,
                tap_layers=tap_layers,
                tap=tap_definition(pooling, tap_layers),
                output_size=0 if output_ids is None else len(output_ids),
                source=f"{Path(str(base)).name}, layers {list(layers)}",
                **config,
            )
        )
        if copilot.question_embedding is not None:
            copilot.question_embedding.weight.data.copy_(table)
        if output_ids is not None:
            copilot.output_ids.copy_(output_ids)
        if random_weights:
            decoder = AutoModel.from_config(base_config).float()
        else:
            decoder = load_whole(AutoModel, base, leave_out=HEADS, mapped=True)
            check_finite(copilot.stack.load_layers(decoder, layers), str(base))
        if copilot.error_embedding is not None and not copilot.free_input:
            own = family.embedding_table(decoder)
            check_finite([(EMBEDDING, own)], str(base))
            # vocabularies of one family may be padded to different sizes: ids both have mean the same token
            common = min(len(own), len(table))
            copilot.error_embedding.weight.data[:common].copy_(own[:common])
        return copilot

    @property
    def error_table(self) -> torch.Tensor:
        """E in W_in = A E^T, or a free W_in transposed: [V, d_C]."""
        embedding = self.question_embedding if self.error_embedding is None else self.error_embedding
        assert embedding is not None
        return embedding.weight

    def error_rows(self, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """W_in l for sparse errors: int64 [N, k+1], fp32 [N, k+1] -> [N, d_C]; no [N, V] tensor is made."""
        table = self.error_table
        summed = F.embedding_bag(ids, table, mode="sum", per_sample_weights=values.to(table.dtype))
        return self.error_projection(summed)

    def embed_question(self, ids: torch.Tensor) -> torch.Tensor:
        """X~ [B, Q, d_P] of prompt tokens, int64 [B, Q], where it follows from them (`CopilotConfig.question`)."""
        assert self.question_embedding is not None
        return self.question_embedding(ids)

    def first_rows(self, count: int) -> torch.Tensor:
        """Input row 0 of `count` sequences, [count, 1, d_C]."""
        weight = self.output.weight
        zeros = weight.new_zeros(1, weight.shape[1])
        return (zeros if self.start is None else self.start.weight).expand(count, 1, -1)

    def question_memory(self, question: torch.Tensor) -> torch.Tensor:
        """X~ [B, Q, d_P] -> [B, Q, d_C], as attended to."""
        return self.memory_projection(self.question_norm(question.to(self.output.weight.dtype)))

    def rationale_memory(self, rationale: torch.Tensor) -> torch.Tensor:
        """Pooled states [B, P, d_P] -> [B, P, d_C], as attended to."""
        return self.memory_projection(self._normed(rationale))

    def with_producing_state(self, rows: torch.Tensor, rationale: torch.Tensor) -> torch.Tensor:
        """Add the projected state [B, n, d_P] that predicts each row's token to rows [B, n, d_C], if configured."""
        return rows if self.state_projection is None else rows + self.state_projection(self._normed(rationale))

    def _normed(self, rationale: torch.Tensor) -> torch.Tensor:
        return self.rationale_norm(rationale.to(self.output.weight.dtype))

    def seen_by_row(self, visible: torch.Tensor) -> torch.Tensor:
        """Of the memory up to a row's producing state, bool [B, M], what that row sees."""
        if self.config.producing_state != "unseen":
            return visible
        return torch.cat([visible[:, :-1], torch.zeros_like(visible[:, -1:])], 1)

    def decode(
        self,
        rows: torch.Tensor,
        memory: torch.Tensor,
        visible: torch.Tensor,
        *,
        first_row: int = 0,
        self_cache: Any = None,
        memory_cache: Any = None,
        places: Places | None = None,
        **aligned: torch.Tensor | None,
    ) -> torch.Tensor:
        """Final states [B, n, d_C] of input rows; `predict` maps them to f.

        rows: [B, n, d_C] input rows first_row .. first_row + n - 1.
        memory: [B, M_new, d_C] memory not yet in the cache. visible: bool [B, n, M], positions (cached and new) a row sees.
        self_cache, memory_cache: keys and values over rows and memory, with transformers' `update`; both grow in place.
        places: where `memory`, then [R, d_C] without padding, belongs; without caches.
        aligned: for one row each of sequences whose `first_row` cached rows are aligned to the right. positions:
        int64 [B, 1], number of each row. seen: bool [B, first_row + 1], which cached rows, and this one, are real; None: all.
        """
        states: torch.Tensor = self.stack(
            rows,
            memory,
            visible,
            first_row=first_row,
            self_cache=self_cache,
            memory_cache=memory_cache,
            places=places,
            **aligned,
        )
        return states * self.output_scale

    @property
    def is_full(self) -> bool:
        """Whether f covers the whole vocabulary in token order."""
        return self.output.out_features == self.config.vocab_size

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        """f = W_out state, no softmax: [.., d_C] of `decode` -> [.., A]."""
        return self.output(states)

    def expand(self, f: torch.Tensor, vocab_size: int | None = None) -> torch.Tensor:
        """[.., A] on the output tokens -> [.., V], zero elsewhere. vocab_size: of the logits; ids beyond it are padding."""
        width = self.config.vocab_size if vocab_size is None else vocab_size
        if self.is_full:
            return f[..., :width] if f.shape[-1] >= width else F.pad(f, (0, width - f.shape[-1]))
        common = min(width, self.config.vocab_size)
        full = f.new_zeros(*f.shape[:-1], self.config.vocab_size).index_copy(-1, self.output_ids, f)
        return full if common == width == self.config.vocab_size else F.pad(full[..., :common], (0, width - common))

    def output_places(self, ids: torch.Tensor) -> torch.Tensor:
        """Places of token ids, int64 [..], among the output tokens: int64 [..], -1 for tokens that f cannot reach."""
        if self.is_full:
            return ids
        places = torch.full((self.config.vocab_size,), -1, dtype=torch.int64, device=ids.device)
        places[self.output_ids] = torch.arange(len(self.output_ids), device=ids.device)
        return places[ids]

    @torch.no_grad()
    def feedback_matrix(self) -> torch.Tensor:
        """W_in W_out, fp32 [d_C, d_C]: the next input row straight from a state, without going through V."""
        table = self.error_table if self.is_full else self.error_table[self.output_ids]
        through = table.float().T @ self.output.weight.float()
        return through if self.free_input else self.error_projection.weight.float() @ through

    def forward(self, batch: CopilotBatch) -> torch.Tensor:
        """f [N, V] for the N real target rows of a batch in row order, teacher-forced with the true l_<i."""
        return self.expand(self.compact(batch))

    def compact(self, batch: CopilotBatch) -> torch.Tensor:
        """`forward` on the output tokens only: [N, A]."""
        return self.predict(self.states(batch))

    def states(self, batch: CopilotBatch) -> torch.Tensor:
        """Final states [N, d_C] of the real target rows: f = states W_out^T."""
        count, rows, entries = batch.error_ids.shape
        errors = self.error_rows(batch.error_ids.view(-1, entries), batch.error_values.view(-1, entries))
        inputs = torch.cat([self.first_rows(count).to(errors.dtype), errors.view(count, rows, -1)[:, :-1]], 1)
        # the log's bf16 until here loses nothing; from here on in the model's precision
        rationale = batch.rationale.float()
        if self.state_projection is not None:
            at = (batch.rationale_position[:, None] == batch.row_position[:, :, None]).to(torch.uint8).argmax(-1)
            producing = rationale.gather(1, at[:, :, None].expand(-1, -1, rationale.shape[2]))
            inputs = self.with_producing_state(inputs, producing)
        # what is made of the memory is most of a step: padding takes no part in it
        asked, shown = batch.question_mask, batch.rationale_position >= 0
        if batch.question is None:
            question = self.embed_question(batch.question_ids[asked])
        else:
            question = batch.question[asked].float()
        memory = torch.cat([self.question_memory(question), self.rationale_memory(rationale[shown])])
        position = batch.rationale_position[:, None]
        last = batch.row_position[:, :, None] - int(self.config.producing_state == "unseen")
        causal = (position <= last) & (position >= 0)
        visible = torch.cat([asked[:, None].expand(-1, rows, -1), causal], 2)
        return self.decode(inputs, memory, visible, places=Places.of(asked, shown))[batch.row_mask]


def check_base(base: Path | str, base_config: Any, pilot: Any, layers: Sequence[int]) -> None:
    """Raise ValueError for a base of another architecture than the Pilot (model or config), or layers that it does not have."""
    family, pilot_family = family_of(base_config), family_of(pilot)
    kinds = ("decoder-only", "encoder-decoder")
    if family.encoder_decoder != pilot_family.encoder_decoder:
        raise ValueError(
            f"the Copilot's base {base} is {kinds[family.encoder_decoder]}, the Pilot is "
            f"{kinds[pilot_family.encoder_decoder]}: take a base of the Pilot's family (model.copilot)"
        )
    count = family.layer_count(base_config)
    missing = [i for i in layers if not 0 <= i < count]
    if missing:
        raise ValueError(f"copilot.layers {missing} are not layers of {base}, which has {count}")


def choose_layers(layers: Sequence[int] | None, every: int, available: int) -> list[int]:
    """Layers of the base model a Copilot starts from: an explicit list, or every k-th with the last among them."""
    if layers is not None:
        return list(layers)
    return list(range(available - 1, -1, -every))[::-1]
