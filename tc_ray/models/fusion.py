"""The fused model: Pilot and Copilot decoding together, `p~ = p + lam f` (equation 8, algorithm 2).

It joins transformers' GenerationMixin: greedy, sampling, streamers and stopping criteria are the library's own. Its
`forward` gives the logits of p~ for the last position; the Copilot's caches travel inside the Pilot's cache object.
Invariant: lam = 0 returns the Pilot's logits untouched. Used by evaluation and serving.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, DynamicLayer, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tc_ray.models.copilot import Copilot
from tc_ray.models.taps import TAP_DEFINITION, LayerMeanTap, decoder_layers

FUSION_FILE = "fusion.json"
SPACES = ("probability", "logits")
FEEDBACKS = ("own", "realised")


def fuse(logits: torch.Tensor, f: torch.Tensor, lam: torch.Tensor, space: str) -> torch.Tensor:
    """Logits of the fused distribution, fp32 [B, V].

    Args:
        logits: [B, V] Pilot. f: [B, V] Copilot. lam: fp32 [B].
        space: `probability`: log of clamp(p + lam f, 0) renormalised (equation 8); `logits`: logits + lam f.

    A row with lam 0 is the Pilot's logits unchanged.
    """
    logits, f, weight = logits.float(), f.float(), lam[:, None]
    if space == "logits":
        fused = logits + weight * f
    else:
        mass = (logits.softmax(-1) + weight * f).clamp_min(0.0)
        fused = (mass / mass.sum(-1, keepdim=True)).log()
    return torch.where(weight == 0, logits, fused)


class FusedCache(DynamicCache):
    """The Pilot's cache, then the Copilot's layers, then what the next Copilot row is made from.

    memory_visible: bool [B, M], real (not padded) memory positions. feedback: [B, d_C] next input row, or for realised
    feedback [B, V] the Pilot's last probabilities. rows: Copilot rows decoded so far.
    """

    def __init__(self, pilot_config: Any, pilot_layers: int, copilot_layers: int) -> None:
        super().__init__(config=pilot_config)
        self.layers.extend(DynamicLayer() for _ in range(copilot_layers))
        self.pilot_layers = pilot_layers
        self.memory_visible: torch.Tensor | None = None
        self.feedback: torch.Tensor | None = None
        self.rows = 0

    def _select(self, indices: torch.Tensor) -> None:
        if self.memory_visible is not None:
            self.memory_visible = self.memory_visible[indices]
        if self.feedback is not None:
            self.feedback = self.feedback[indices]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow beams: both models' keys and values and the Copilot's feedback."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences of the batch."""
        super().batch_select_indices(indices)
        self._select(indices)


class _CopilotView:
    """The Copilot's layers of a FusedCache, numbered from 0 as its own layers number themselves."""

    def __init__(self, cache: FusedCache) -> None:
        self._cache = cache

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.update(key, value, self._cache.pilot_layers + layer_idx)


class FusedModel(PreTrainedModel, GenerationMixin):
    """Pilot + Copilot as one causal language model.

    Args:
        pilot: causal language model. copilot: a Copilot trained beside it or beside one of its family.
        lam: default lambda. space: `probability` or `logits`. feedback: `own` f or `realised` error as Copilot input.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self, pilot: Any, copilot: Copilot, *, lam: float = 1.0, space: str = "probability", feedback: str = "own"
    ) -> None:
        if space not in SPACES:
            raise ValueError(f"fusion space {space!r} is not one of {SPACES}")
        if feedback not in FEEDBACKS:
            raise ValueError(f"feedback {feedback!r} is not one of {FEEDBACKS}")
        if copilot.config.tap != TAP_DEFINITION:
            raise ValueError(
                f"the Copilot was trained on other hidden states: {copilot.config.tap!r}, not {TAP_DEFINITION!r}"
            )
        width = pilot.get_input_embeddings().weight.shape[1]
        if width != copilot.config.pilot_hidden_size or pilot.config.vocab_size != copilot.config.vocab_size:
            raise ValueError(
                f"the Copilot was made for a Pilot of width {copilot.config.pilot_hidden_size} and vocabulary "
                f"{copilot.config.vocab_size}; this Pilot has {width} and {pilot.config.vocab_size}"
            )
        super().__init__(pilot.config)
        self.pilot = pilot
        self.copilot = copilot
        self.default_lam, self.space, self.feedback = float(lam), space, feedback
        self.generation_config = pilot.generation_config or GenerationConfig.from_model_config(pilot.config)
        self.vocab_size = pilot.config.vocab_size
        self._tap = LayerMeanTap(decoder_layers(pilot))
        self.eval()

    @classmethod
    def can_generate(cls) -> bool:
        """GenerationMixin asks; the fused model always can."""
        return True

    def get_input_embeddings(self) -> nn.Module:
        """The Pilot's token embedding."""
        return self.pilot.get_input_embeddings()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        if generation_config.use_cache is False:
            raise ValueError("the fused model decodes with its cache: use_cache must stay true")
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()

    def new_cache(self) -> FusedCache:
        """An empty cache for one batch of sequences."""
        return FusedCache(self.pilot.config, len(decoder_layers(self.pilot)), len(self.copilot.layers))

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
        """Logits [B, 1, V] of p~ for the token after `input_ids`.

        Args:
            input_ids: int64 [B, S]: the prompt at first, then one token a call. Left padding with `attention_mask`.
            past_key_values: a FusedCache; a new one is made for a prompt.
            lam: weight of the correction, one number or [B]; None takes `default_lam`; 0 is the Pilot itself.
        """
        cache = past_key_values if past_key_values is not None else self.new_cache()
        if not isinstance(cache, FusedCache):
            raise TypeError(f"past_key_values must be a FusedCache, not {type(cache).__name__}")
        weights = torch.as_tensor(
            self.default_lam if lam is None else lam, dtype=torch.float32, device=input_ids.device
        )
        weights = weights.expand(input_ids.shape[0]) if weights.ndim == 0 else weights
        if attention_mask is None:
            attention_mask = torch.ones(
                input_ids.shape[0], cache.get_seq_length() + input_ids.shape[1], device=input_ids.device
            )
        corrected = bool((weights != 0).any())
        with self._tap.recording():
            out = self.pilot(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        states = self._tap.take()
        logits = out.logits[:, -1]
        if corrected:
            f = self._correction(input_ids, attention_mask.bool(), states, cache)
            if self.feedback == "realised":
                cache.feedback = logits.float().softmax(-1)
            else:
                cache.feedback = self.copilot.own_error_rows(f)
            logits = fuse(logits, self.copilot.expand(f), weights, self.space)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

    def _correction(
        self, input_ids: torch.Tensor, attended: torch.Tensor, states: torch.Tensor, cache: FusedCache
    ) -> torch.Tensor:
        """f [B, A] of the next token on the Copilot's output tokens; appends this call's states to the Copilot's memory."""
        copilot = self.copilot
        memory = copilot.state_memory(states)
        if cache.memory_visible is None:
            if input_ids.shape[1] != cache.get_seq_length():
                raise RuntimeError("the Copilot joins at the prompt: lam cannot turn from 0 in mid-sequence")
            # the memory is what training saw: every position's state, or from the one that predicts row 0 on
            first = 0 if copilot.config.positions == "all" else input_ids.shape[1] - 1
            memory = torch.cat([copilot.question_memory(input_ids), memory[:, first:]], 1)
            cache.memory_visible = torch.cat([attended, attended[:, first:]], 1)
            row = copilot.start.weight.expand(input_ids.shape[0], -1)
        else:
            new = attended[:, -input_ids.shape[1] :]
            cache.memory_visible = torch.cat([cache.memory_visible, new], 1)
            assert cache.feedback is not None
            if self.feedback == "realised":
                realised = -cache.feedback
                realised.scatter_add_(1, input_ids[:, -1:], torch.ones_like(realised[:, :1]))
                row = copilot.dense_error_rows(realised)
            else:
                row = cache.feedback
        rows = copilot.with_producing_state(row[:, None], states[:, -1:])
        view: Any = _CopilotView(cache)
        final = copilot.decode(rows, memory, cache.memory_visible[:, None], first_row=cache.rows, cache=view)
        cache.rows += 1
        return copilot.predict(final[:, 0])

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
            FileNotFoundError: a part is missing; the message names it.
        """
        from transformers import AutoModelForCausalLM

        folder = Path(folder)
        for part in ("pilot/config.json", "copilot/config.json", FUSION_FILE):
            if not (folder / part).is_file():
                raise FileNotFoundError(f"{folder} is not an exported fused model: {part} is missing")
        settings = json.loads((folder / FUSION_FILE).read_text())
        if settings.get("format") != 1:
            raise ValueError(
                f"{folder / FUSION_FILE}: format {settings.get('format')} is not known; this version reads 1"
            )
        pilot = AutoModelForCausalLM.from_pretrained(folder / "pilot", dtype=dtype)
        copilot = Copilot.from_pretrained(folder / "copilot", dtype=dtype)
        fused = cls(pilot, copilot, lam=settings["lam"], space=settings["space"], feedback=settings["feedback"])
        return fused.to(device)


def write_settings(folder: Path, *, lam: float, space: str, feedback: str) -> None:
    """Write fusion.json, which `FusedModel.from_pretrained` reads."""
    settings = {"format": 1, "lam": lam, "space": space, "feedback": feedback}
    (folder / FUSION_FILE).write_text(json.dumps(settings, indent=2) + "\n")
